"""Gradient stability against closed forms, accuracies that only fall, and evaluate_robustness as a user runs it."""

import json
import runpy
import shutil
import sys
from itertools import pairwise, product

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from conftest import THIN, assert_one_line_error, run_main
from torch import nn

import train_models
from curvature.estimate import prepared
from experiments import evaluate_robustness
from experiments.robustness import examine, gradient_stability, input_gradient_of, strongest, withstood
from models.model_selector import model_architecture
from training.attacks import PGD

pytestmark = pytest.mark.usefixtures("thin_vgg")


class Quadratic(nn.Module):
    """Logits (x' A x / 2, 0): the gradient of the first is A x, and changes by A delta."""

    def __init__(self, *diagonal: float):
        super().__init__()
        self.diagonal = torch.tensor(diagonal, dtype=torch.float64)

    def forward(self, x):
        value = 0.5 * (x.flatten(1).square() * self.diagonal).sum(dim=1)
        return torch.stack([value, torch.zeros_like(value)], dim=1)


def images_of(n: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(n, 1, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def stability_of(quadratic: Quadratic, images: torch.Tensor, deltas: list[float], draws: int) -> torch.Tensor:
    gradient = input_gradient_of("logit", quadratic, torch.zeros(len(images), dtype=torch.int64))
    return gradient_stability(gradient, images, deltas, draws, torch.Generator().manual_seed(0))


def test_stability_on_quadratics():
    """A = c I: ||c delta|| / ||c x|| whatever the direction. Where x = 0 the gradient is 0, and there is no answer."""
    images = images_of(4)
    images[3] = 0
    stability = stability_of(Quadratic(*[-3.0] * 6), images, [0.1, 2.0], draws=3)
    expected = torch.tensor([[0.1], [2.0]], dtype=torch.float64) / images[:3].flatten(1).norm(dim=1)
    assert torch.allclose(stability[:, :3], expected, rtol=1e-12)
    assert stability[:, 3].isnan().all()

    # A = diag(s, -s, 0, ...): ||A delta|| = delta s sqrt(v_1^2 + v_2^2), v uniform on the sphere
    stability = stability_of(Quadratic(2, -2, 0, 0, 0, 0), images[:1].expand(1000, -1, -1, -1), [0.5], draws=4)
    # v_1^2 + v_2^2 ~ Beta(1, 2) in six dimensions: the mean of its root is B(3/2, 2) / B(1, 2) = (4/15) / (1/2)
    expected = 0.5 * 2 * (8 / 15) / (2 * images[0].flatten()[:2].norm())
    # the root's standard deviation is 0.22: 4000 draws give the mean to 0.7 %
    assert stability.mean().item() == pytest.approx(expected.item(), rel=0.02)


def test_input_gradients_of_softmax_regression():
    """grad l = W'(p - e_y); that of a logit is a row of W."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(6, 3)).double()
    images, labels = images_of(5), torch.tensor([0, 1, 2, 0, 1])
    expected = {"loss": model(images).softmax(dim=1) - F.one_hot(labels, 3), "logit": F.one_hot(labels, 3).double()}
    with prepared(model) as network:
        for quantity, by_hand in expected.items():
            found = input_gradient_of(quantity, network, labels)(images)
            assert torch.allclose(found, (by_hand @ model[1].weight).view_as(images), rtol=1e-9)


def examined(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, flags: str, use_folding: bool = True):
    flags = evaluate_robustness.build_parser().parse_args(f"--pgd-steps 3 --restarts 2 --draws 2 {flags}".split())
    generators = [torch.Generator().manual_seed(i) for i in range(len(images))]
    with prepared(model, use_folding) as network:
        return examine(network, flags, images, labels, generators)


def test_a_folded_network_gives_the_same_columns():
    torch.manual_seed(0)
    model = model_architecture["vgg11lcnn"](10, 16).double()
    images = torch.rand(6, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    labels = model.eval()(images).argmax(dim=1)
    labels[0] = (labels[0] + 1) % 10  # one is wrong as it is
    flags = "--eps-l2 4 0.5 --eps-linf 0.2 --deltas 0.1 0.5"
    folded, plain = (examined(model, images, labels, flags, use_folding) for use_folding in (True, False))
    names = ["stability_loss_0.1", "stability_loss_0.5", "stability_logit_0.1", "stability_logit_0.5"]
    assert list(folded) == ["predicted", "loss", *names, "pgd_l2_0.5", "pgd_l2_4", "pgd_linf_0.2"] == list(plain)
    for name, column in folded.items():
        assert torch.allclose(column.double(), plain[name].double(), rtol=1e-6), name
    assert not folded["pgd_l2_0.5"][0]


def test_accuracy_never_rises_with_the_radius_nor_above_the_clean_one():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(6, 20), nn.Softplus(), nn.Linear(20, 4)).double()
    images, labels, asked = images_of(60), torch.randint(0, 4, (60,)), []
    with prepared(model) as network, torch.no_grad():
        labels[:40] = network(images[:40]).argmax(dim=1)

        def one_step(rows, eps):
            asked.append(len(rows))
            return strongest(network, images[rows], labels[rows], PGD("l2", eps, 1), 1, [torch.Generator()] * len(rows))

        clean = network(images).argmax(dim=1) == labels
        found = withstood(network, labels, dict.fromkeys([0.02, 0.1, 0.3], clean), one_step)
        after = withstood(network, labels, found, lambda rows, eps: images[rows])  # harmless
    masks = [clean, *found.values()]
    for smaller, larger in pairwise(masks):
        assert not (larger & ~smaller).any()
        assert larger.sum() < smaller.sum()
    assert asked == [mask.sum() for mask in masks[:-1]]  # who has fallen is not tried again
    assert [mask.tolist() for mask in after.values()] == [mask.tolist() for mask in found.values()]


def test_a_model_that_works_in_place_gives_what_it_gives_out_of_place():
    """The first layer may overwrite its input, as a normalization does: the images stay what they are."""

    class Normalization(nn.Module):
        def forward(self, x):
            return x.sub_(0.4) if self.in_place else x - 0.4

    torch.manual_seed(0)
    first, images, labels = Normalization(), images_of(60), torch.arange(60) % 4
    model = nn.Sequential(first, nn.Flatten(), nn.Linear(6, 8), nn.Softplus(), nn.Linear(8, 4)).double()
    model[2].weight.data *= 10  # steep: some examples fall, and others do not
    before, results = images.clone(), []
    for first.in_place in (True, False):
        results.append(examined(model, images, labels, "--eps-l2 0.2 --eps-linf 0.1 --deltas 0.1"))
    one, other = results
    assert torch.equal(images, before)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert 0 < one["pgd_l2_0.2"].sum() < (one["predicted"] == labels).sum()


@pytest.fixture(scope="module")
def checkpoint(photographs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("robustness")
    flags = "--model-arch vgg11 --dataset imagefolder --image-size 16 --num-epochs 6 --batch-size 8 --lr 0.02"
    flags += f" --bn-momentum 0.5 --data-dir {photographs} --output-dir {folder}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(*THIN)
        assert train_models.main(flags.split()) == 0
    return folder / "vgg11_imagefolder.pt"


SMALL = "--pgd-steps 3 --restarts 2 --deltas 0.1 0.2 --draws 2 --eps-l2 20 0.1 --eps-linf 32/255 --data-fraction 1"


@pytest.mark.draws
@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_the_script_on_real_images(checkpoint, tmp_path, monkeypatch, capsys):
    path, picture = tmp_path / "r.csv", tmp_path / "r.png"
    files = [checkpoint, shutil.copy(checkpoint, tmp_path / "copy.pt"), "--output", path, "--plot", picture]
    monkeypatch.setattr(sys, "argv", ["-m", *SMALL.split(), "--model-filename", *map(str, files)])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_module("experiments.evaluate_robustness", run_name="__main__")
    assert picture.read_bytes().startswith(b"\x89PNG")
    table, content = pd.read_csv(path), json.loads(path.with_suffix(".json").read_text())
    assert content["settings"]["pgd_steps"] == 3
    first, second = content["models"]
    assert {**first, "model": ""} == {**second, "model": ""}
    mine = table[table["model"] == str(checkpoint)].reset_index(drop=True)
    assert len(mine) == len(table) / 2 == 12
    assert first["accuracy"] == pytest.approx(100 * np.mean(mine["predicted"] == mine["label"]))
    for attack, radii in {"pgd_l2": ["0.1", "20"], "pgd_linf": ["0.12549"]}.items():
        accuracies = first["robust_accuracy"].pop(attack)
        assert accuracies == pytest.approx({eps: 100 * np.mean(mine[f"{attack}_{eps}"]) for eps in radii})
    assert not first["robust_accuracy"]
    assert mine["pgd_l2_20"].sum() < (mine["predicted"] == mine["label"]).sum()
    for quantity, delta in product(("loss", "logit"), ("0.1", "0.2")):
        values = mine[f"stability_{quantity}_{delta}"]
        expected = {"mean": np.mean(values), "sd": np.std(values), "left_out": 0}
        assert first["stability"][quantity][delta] == pytest.approx(expected)

    # other batches, the same numbers
    flags = ["--model-filename", checkpoint, *SMALL.split(), "--batch-size", 5, "--output", path]
    printed = run_main(evaluate_robustness, flags, capsys).stdout
    assert "PGD, l2: accuracy in %" in printed
    assert "PGD alone" in printed
    pd.testing.assert_frame_equal(pd.read_csv(path), mine, rtol=1e-4)


MY_NET = """
from torch import nn

def fine(num_classes):
    return nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, num_classes)).double()
"""


def test_autoattack_by_flag_on_an_outside_model(photographs, users_file, tmp_path, capsys):
    users_file("my_net", MY_NET)
    # a PGD that goes nowhere, and a radius at which everything falls
    flags = "--norms l2 --eps-l2 8 --pgd-steps 1 --pgd-step-size 1e-9 --restarts 1 --deltas --num-samples 6"
    flags += f" --model-arch my_net:fine --dataset imagefolder --data-dir {photographs} --autoattack"
    result = run_main(evaluate_robustness, [*flags.split(), "--output", tmp_path / "aa.csv"], capsys)
    assert result.returncode == 0, result.stderr
    assert "PGD alone" not in result.stdout
    assert "PGD and AutoAttack, l2: accuracy in %" in result.stdout
    (summary,) = json.loads((tmp_path / "aa.json").read_text())["models"]
    pgd = summary["robust_accuracy"].pop("pgd_l2")
    assert pgd["8"] > 0
    assert summary["robust_accuracy"] == {"autoattack_l2": {"8": 0}}


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        ([], 2, ["nothing to measure"]),
        (["absent.pt", "--output", "x.txt"], 2, ["must end in .csv"]),
        (["absent.pt", "--plot", "x.jpg"], 2, ["must end in .png"]),
        (["absent.pt", "--eps-l2", "0"], 2, ["--eps-l2", "more than 0"]),
        (["absent.pt", "--eps-linf", "8/0"], 2, ["fraction such as 8/255"]),
        (["absent.pt", "--autoattack"], 1, ["pip install pyautoattack, or leave --autoattack out"]),
        (["trained.pt", "--dataset", "digits"], 2, ["with --dataset imagefolder, not digits", "leave --dataset out"]),
        (["trained.pt", "--image-size", 32], 2, ["--image-size 16, not 32", "leave --image-size out"]),
        (["trained.pt", "--data-dir", "three"], 2, ["2 classes apart, but imagefolder has 3", "--data-dir"]),
    ],
)
def test_errors(flags, code, words, checkpoint, photographs, tmp_path, monkeypatch, capsys):
    for package in ("autoattack", "pyautoattack"):
        monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.chdir(tmp_path)
    shutil.copy(checkpoint, "trained.pt")
    shutil.copytree(photographs, "three")
    for split in ("train", "test"):
        shutil.copytree(f"three/{split}/china", f"three/{split}/third")
    flags = ["--model-filename", *flags] if flags else []
    assert_one_line_error(run_main(evaluate_robustness, flags, capsys), code, *words)
