"""Gradient stability against closed forms, accuracies that only fall, and evaluate_robustness.py as a user runs it."""

import csv
import json
import shutil
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import assert_one_line_error, run_main, run_script
from torch import nn

import train_models
from curvature.estimate import prepared
from experiments import evaluate_robustness
from experiments.robustness import RobustnessSettings, examine, gradient_stability, input_gradient_of, withstood
from models.layers import LCNN
from models.resnet import ResNet
from training.attacks import PGD, strongest


class Quadratic(nn.Module):
    """Logits (x' A x / 2, 0): the gradient of the first is A x, and changes by A delta."""

    def __init__(self, matrix: torch.Tensor):
        super().__init__()
        self.matrix = matrix

    def forward(self, x):
        x = x.flatten(1)
        value = 0.5 * ((x @ self.matrix) * x).sum(dim=1)
        return torch.stack([value, torch.zeros_like(value)], dim=1)


def images_of(n: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(n, 1, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_stability_on_a_multiple_of_the_identity_is_the_relative_distance():
    """A = c I: ||c delta|| / ||c x|| whatever the direction. Where x = 0 the gradient is 0, and there is no answer."""
    images, labels = images_of(4), torch.zeros(4, dtype=torch.int64)
    images[3] = 0
    gradient = input_gradient_of("logit", Quadratic(-3 * torch.eye(6, dtype=torch.float64)), labels)
    stability = gradient_stability(gradient, images, [0.1, 2.0], draws=3)
    expected = torch.tensor([[0.1], [2.0]], dtype=torch.float64) / images[:3].flatten(1).norm(dim=1)
    assert torch.allclose(stability[:, :3], expected, rtol=1e-12)
    assert stability[:, 3].isnan().all()


def test_stability_on_a_quadratic_in_expectation():
    """E ||A delta||^2 = delta^2 tr(A^2) / d; with two equal singular values and the rest 0 the mean of the norm itself
    is delta * s * E sqrt(v_1^2 + v_2^2), for v uniform on the sphere in six dimensions E = B(5/2, 1/2... ) below."""
    matrix = torch.diag(torch.tensor([2.0, -2.0, 0, 0, 0, 0], dtype=torch.float64))
    images, labels = images_of(1), torch.zeros(1, dtype=torch.int64)
    gradient = input_gradient_of("logit", Quadratic(matrix), labels)
    stability = gradient_stability(gradient, images, [0.5], 4000, torch.Generator().manual_seed(0))
    # v_1^2 + v_2^2 ~ Beta(1, 2): the mean of its root is B(3/2, 2) / B(1, 2) = (4/15) / (1/2)
    expected = 0.5 * 2 * (8 / 15) / (matrix @ images.flatten()).norm()
    # the root's standard deviation is 0.22: 4000 draws know the mean of 0.533 to 0.7 %
    assert stability.item() == pytest.approx(expected.item(), rel=0.02)


def test_stability_of_the_loss_is_that_of_its_gradient():
    """Softmax regression: grad l = W'(p - e_y)."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(6, 3)).double()
    images, labels = images_of(5), torch.tensor([0, 1, 2, 0, 1])

    def by_hand(x):
        error = model(x).softmax(dim=1) - F.one_hot(labels, 3)
        return (error @ model[1].weight).detach().view_as(x)

    generators = [[torch.Generator().manual_seed(i) for i in range(5)] for _ in range(2)]
    with prepared(model) as network:
        found = gradient_stability(input_gradient_of("loss", network, labels), images, [0.3], 4, generators[0])
        logit = gradient_stability(input_gradient_of("logit", network, labels), images, [0.3], 4)
    assert torch.allclose(found, gradient_stability(by_hand, images, [0.3], 4, generators[1]), rtol=1e-9)
    assert torch.allclose(logit, torch.zeros(1, 5, dtype=torch.float64))  # the gradient of a linear logit is constant


def test_a_folded_network_gives_the_same_columns():
    torch.manual_seed(0)
    model = ResNet(LCNN, (1, 1, 1, 1), 10, 8).double()
    images = torch.rand(6, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    labels = model.eval()(images).argmax(dim=1)
    labels[0] = (labels[0] + 1) % 10  # one is wrong as it is
    settings = RobustnessSettings({"l2": (0.5, 4.0), "linf": (0.2,)}, 3, None, 2, deltas=(0.1, 0.5), draws=2)

    def columns(use_folding: bool):
        with prepared(model, use_folding) as network:
            return examine(network, images, labels, settings, [torch.Generator().manual_seed(i) for i in range(6)])

    folded, plain = columns(True), columns(False)
    assert folded.keys() == plain.keys()
    for name, column in folded.items():
        assert torch.allclose(column.double(), plain[name].double(), rtol=1e-6), name
    assert not folded["pgd_l2_0.5"][0]


def test_accuracy_never_rises_with_the_radius_nor_above_the_clean_one():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(6, 20), nn.Softplus(), nn.Linear(20, 4)).double()
    images, labels = images_of(60), torch.randint(0, 4, (60,))
    with prepared(model) as network, torch.no_grad():
        labels[:40] = network(images[:40]).argmax(dim=1)
        asked = []

        def one_step(rows, eps):
            asked.append(len(rows))
            return strongest(network, images[rows], labels[rows], PGD("l2", eps, 1))[0]

        clean = network(images).argmax(dim=1) == labels
        found = withstood(network, labels, clean, [0.3, 0.02, 0.1], one_step)
    assert list(found) == [0.02, 0.1, 0.3]
    masks = [clean, *found.values()]
    for smaller, larger in pairwise(masks):
        assert not (larger & ~smaller).any()
        assert larger.sum() < smaller.sum()
    assert asked == [mask.sum() for mask in masks[:-1]]  # who has fallen is not tried again

    def harmless(rows, eps):
        return images[rows]

    with torch.no_grad():
        after = withstood(model, labels, clean, list(found), harmless, standing=found)
    assert all(torch.equal(after[eps], found[eps]) for eps in found)


def test_a_model_that_works_in_place_gives_what_it_gives_out_of_place():
    """The first layer may overwrite its input, as a normalization does: the images stay what they are."""

    class Normalized(nn.Module):
        def __init__(self, in_place: bool):
            super().__init__()
            self.in_place, self.net = (
                in_place,
                nn.Sequential(nn.Flatten(), nn.Linear(6, 8), nn.Softplus(), nn.Linear(8, 4)),
            )

        def forward(self, x):
            return self.net(x.sub_(0.4).div_(0.2) if self.in_place else (x - 0.4) / 0.2)

    images, labels = images_of(12), torch.arange(12) % 4
    settings = RobustnessSettings({"l2": (0.2,), "linf": (0.1,)}, 3, None, 2, deltas=(0.1,), draws=2)
    found = []
    for in_place in (False, True):
        torch.manual_seed(0)
        model, batch = Normalized(in_place).double(), images.clone()
        with prepared(model) as network:
            found.append(
                examine(network, batch, labels, settings, [torch.Generator().manual_seed(i) for i in range(12)])
            )
        assert torch.equal(batch, images)
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert found[0]["pgd_l2_0.2"].any()


@pytest.fixture(scope="module")
def checkpoint(photographs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("robustness")
    flags = ["--dataset", "imagefolder", "--data-dir", photographs, "--image-size", 16, "--num-epochs", 6]
    flags += ["--model-arch", "vgg11", "--batch-size", 8, "--lr", 0.02, "--bn-momentum", 0.5]
    assert train_models.main([*map(str, flags), "--output-dir", str(folder)]) == 0
    return folder / "vgg11_imagefolder.pt"


SMALL = ["--pgd-steps", 3, "--restarts", 2, "--deltas", 0.1, 0.2, "--draws", 2]
SMALL += ["--norms", "l2", "linf", "--eps-l2", 20, 0.1, "--eps-linf", "32/255", "--data-fraction", 1]


def test_the_script_on_real_images(checkpoint, tmp_path, capsys):
    table, picture = tmp_path / "r.csv", tmp_path / "r.png"
    copy = shutil.copy(checkpoint, tmp_path / "copy.pt")
    files = ["--model-filename", checkpoint, copy]
    run_script("experiments.evaluate_robustness", *files, *SMALL, "--output", table, "--plot", picture)
    with open(table, newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 12
    assert picture.read_bytes().startswith(b"\x89PNG")
    content = json.loads(table.with_suffix(".json").read_text())
    assert content["settings"]["pgd_steps"] == 3
    first, second = content["models"]
    assert {**first, "model": ""} == {**second, "model": ""}
    mine = [row for row in rows if row["model"] == str(checkpoint)]
    assert first["accuracy"] == pytest.approx(100 * np.mean([row["predicted"] == row["label"] for row in mine]))
    assert first["robust_accuracy"].keys() == {"pgd_l2", "pgd_linf"}
    for attack, accuracies in first["robust_accuracy"].items():
        previous = first["accuracy"]
        for eps, accuracy in accuracies.items():
            column = [row[f"{attack}_{eps}"] == "True" for row in mine]
            assert accuracy == pytest.approx(100 * np.mean(column))
            assert accuracy <= previous
            previous = accuracy
    assert list(first["robust_accuracy"]["pgd_l2"]) == ["0.1", "20"]
    assert first["robust_accuracy"]["pgd_l2"]["20"] < first["accuracy"]
    for quantity in ("loss", "logit"):
        for delta, cell in first["stability"][quantity].items():
            values = [float(row[f"stability_{quantity}_{delta}"]) for row in mine]
            assert cell["mean"] == pytest.approx(np.mean(values))
            assert cell["left_out"] == 0

    # other batches, the same numbers; and an outside model
    again = run_main(
        evaluate_robustness,
        ["--model-filename", checkpoint, *SMALL, "--batch-size", 5, "--output", tmp_path / "again.csv"],
        capsys,
    )
    assert again.returncode == 0, again.stderr
    assert "accuracy" in again.stdout
    with open(tmp_path / "again.csv", newline="") as file:
        for row, other in zip(csv.DictReader(file), mine, strict=True):
            for name in row.keys() - {"model"}:
                same = row[name] == other[name]
                assert same or float(row[name]) == pytest.approx(float(other[name]), rel=1e-4), name


def test_outside_models_and_self_checks(photographs, tmp_path, monkeypatch, capsys):
    (tmp_path / "my_nets.py").write_text(
        "from torch import nn\n"
        "def fine(num_classes):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(768, 8), nn.Softplus(), nn.Linear(8, num_classes))\n"
        "def softmax(num_classes):\n"
        "    return nn.Sequential(fine(num_classes), nn.Softmax(dim=1))\n"
    )
    monkeypatch.chdir(tmp_path)
    data = ["--dataset", "imagefolder", "--data-dir", photographs, "--image-size", 16, *SMALL]
    result = run_main(evaluate_robustness, ["--model-arch", "my_nets:fine", *data], capsys)
    assert result.returncode == 0, result.stderr
    assert "PGD, l2" in result.stdout
    result = run_main(evaluate_robustness, ["--model-arch", "my_nets:softmax", *data], capsys)
    assert_one_line_error(result, 1, "probabilities", "leave its softmax out")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], ["nothing to measure"]),
        (["--model-arch", "resnet18"], ["nothing to measure"]),
        (["--model-filename", "x.pt", "--lcnn"], ["--lcnn is for"]),
        (["--model-filename", "x.pt", "--output", "x.txt"], ["must end in .csv"]),
        (["--model-filename", "x.pt", "--plot", "x.jpg"], ["must end in .png"]),
        (["--model-filename", "x.pt", "--eps-l2", "0"], ["--eps-l2", "more than 0"]),
        (["--model-filename", "x.pt", "--eps-linf", "8/0"], ["fraction such as 8/255"]),
        (["--model-filename", "x.pt", "--norms", "l1"], ["invalid choice"]),
    ],
)
def test_wrong_flags_end_in_one_line(flags, words, capsys):
    assert_one_line_error(run_main(evaluate_robustness, flags, capsys), 2, *words)


def test_missing_autoattack_is_said_before_anything_is_done(monkeypatch, capsys):
    for package in ("autoattack", "pyautoattack"):
        monkeypatch.setitem(sys.modules, package, None)
    result = run_main(evaluate_robustness, ["--model-filename", "x.pt", "--autoattack"], capsys)
    assert_one_line_error(result, 1, "pip install pyautoattack")


def test_autoattack_by_flag(photographs, tmp_path, monkeypatch, capsys):
    (tmp_path / "my_linear.py").write_text(
        "import torch\n"
        "from torch import nn\n"
        "def linear(num_classes):\n"
        "    return nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, num_classes)).double()\n"
    )
    monkeypatch.chdir(tmp_path)
    flags = [
        "--model-arch",
        "my_linear:linear",
        "--dataset",
        "imagefolder",
        "--data-dir",
        photographs,
        "--split",
        "test",
    ]
    # a PGD that goes nowhere, and a radius at which everything falls
    flags += ["--norms", "l2", "--eps-l2", 8, "--pgd-steps", 1, "--pgd-step-size", 1e-9, "--restarts", 1]
    flags += ["--deltas", "--autoattack", "--num-samples", 6]
    result = run_main(evaluate_robustness, [*flags, "--output", tmp_path / "aa.csv"], capsys)
    assert result.returncode == 0, result.stderr
    assert "PGD alone" not in result.stdout
    (summary,) = json.loads((tmp_path / "aa.json").read_text())["models"]
    assert summary["robust_accuracy"]["autoattack_l2"]["8"] == 0
    assert summary["robust_accuracy"]["pgd_l2"]["8"] > 0
    assert summary["robust_accuracy"].keys() == {"pgd_l2", "autoattack_l2"}


@pytest.mark.parametrize("norm", ["l2", pytest.param("linf", marks=pytest.mark.long)])
def test_adversarial_training_by_flag(norm, photographs, tmp_path, capsys, monkeypatch):
    """Any loss trains on images moved by what the flags describe."""
    moved = []

    def record(attack, model, batches, *arguments):
        moved.append(attack)
        yield from original(model, batches, attack)

    original = train_models.adversarial_batches
    monkeypatch.setattr(train_models, "adversarial_batches", lambda m, b, a: record(a, m, b))
    flags = ["--dataset", "imagefolder", "--data-dir", photographs, "--image-size", 16, "--num-epochs", 1]
    flags += ["--model-arch", "vgg11", "--regularizer", "gnorm", "--batch-size", 12, "--lr", 0.01]
    flags += ["--adversarial-training", "--adv-norm", norm, "--adv-eps", "8/255", "--adv-steps", 2]
    result = run_main(train_models, [*flags, "--output-dir", tmp_path], capsys)
    assert result.returncode == 0, result.stderr
    assert moved == [PGD(norm, 8 / 255, 2, 0.01)]
    assert (tmp_path / "vgg11_gnorm_adversarial_imagefolder.pt").is_file()
