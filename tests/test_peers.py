"""benchmarks/peers.py: every method finds the dense Hessian's eigenvalue, and its products are counted."""

import re

import pytest
import torch
from conftest import TwoBlocks, run_main

from benchmarks import peers
from curvature.derivatives import cross_entropy
from utils.numerics import frozen_in_eval

TOL = 1e-4
PACKAGES = "eigsh, curvlinops", "PyHessian"


def two_blocks() -> TwoBlocks:
    return TwoBlocks(2, 16)


@pytest.fixture(scope="module")
def example():
    """A frozen network in eval mode, images (3, 3, 8, 8) and labels."""
    torch.manual_seed(0)
    model = TwoBlocks(5, 8)
    with frozen_in_eval(model):
        yield model, torch.rand(3, 3, 8, 8), torch.tensor([0, 3, 4])


def test_every_method_finds_the_largest_eigenvalue(example):
    """In magnitude, of dense Hessians in float64."""
    model, images, labels = example
    model.double()
    dense = [
        torch.autograd.functional.hessian(lambda x, i=i: cross_entropy(model(x[None]), labels[i : i + 1]).sum(), image)
        for i, image in enumerate(images.double())
    ]
    model.float()
    truth = torch.stack([torch.linalg.eigvalsh(h.view(192, 192)).abs().max() for h in dense])
    methods = peers.installed_methods(2)
    assert len(methods) >= 4
    for name, method in methods.items():
        values, products = torch.tensor(method(*example, TOL), dtype=torch.float64).unbind(dim=1)
        near = 1e-4 if name != "PyHessian" else 100 * TOL  # it looks at the change of its estimate alone
        torch.testing.assert_close(values.abs(), truth, rtol=near, atol=0, msg=name)
        assert (products >= 3).all()


def test_products_are_counted(example, monkeypatch):
    """Power iteration with no tolerance takes all; a basis of 20 takes at least 20, whosever operator it is."""
    diagonal, calls = torch.linspace(-2, 1, 192).numpy(), []
    value, products = peers.arpack(lambda v: calls.append(v) or diagonal * v, example[1][0], TOL, 0)
    assert (value, products) == (pytest.approx(-2, rel=TOL), len(calls))
    methods = peers.installed_methods(2)
    counts = {name: [found[1] for found in methods[name](*example, TOL)] for name in methods if "eigsh" in name}
    assert min(counts["eigsh, double backward"]) >= 20
    assert counts["eigsh, double backward"] != counts["eigsh, double backward, ncv=5"]
    assert counts.get("eigsh, curvlinops", counts["eigsh, double backward"]) == counts["eigsh, double backward"]
    monkeypatch.setattr(peers, "MOST_PRODUCTS", 7)
    for name in {"ours", "PyHessian"} & methods.keys():
        assert [found[1] for found in methods[name](*example, 0)] == [7, 7, 7]


def test_the_command_line(photographs, monkeypatch, capsys):
    monkeypatch.setattr(peers, "find_spec", lambda package: None)
    flags = ["--model-arch", f"{__name__}:two_blocks", "--dataset", "imagefolder", "--data-dir", photographs]
    flags += ["--image-size", 16, "--num-samples", 3, "--batch-size", 2, "--rounds", 1, "--device", "cpu"]
    result = run_main(peers, flags, capsys)
    assert result.returncode == 0, result.stderr
    assert "3 images of 16 x 16, tolerance 0.001" in result.stdout
    rows = dict(re.findall(r"^(ours|eigsh, double backward)  +(\S.*)$", result.stdout, re.MULTILINE))
    seconds, products, median, largest, ratio = map(float, rows["eigsh, double backward"].split())
    assert seconds > 0
    assert products >= 20
    assert median <= largest < 1e-3
    assert ratio == pytest.approx(seconds / float(rows["ours"].split()[0]), rel=0.02)
    for package in PACKAGES:
        assert f"{package}: not installed, so left out" in result.stdout
