"""Networks of other projects through the three scripts, as they are and made low-curvature by --lcnn."""

import json

import pandas as pd
import pytest
import torch
import torchvision
from conftest import assert_one_line_error, run_main
from torch import nn

import estimate_curvature
import train_models
from experiments import evaluate_robustness
from models.checkpoint import load_model
from models.layers import CenteredSoftplus
from utils.errors import UsageError

RESNET = "test_any_network:short_resnet"
NAME = "test_any_network.short_resnetlcnn_curvature_and_gnorm_imagefolder"
LCNN = ["--model-arch", RESNET, "--lcnn", "--regularizer", "curvature_and_gnorm", "--calibrate-batchnorm"]


def short_resnet(num_classes: int) -> nn.Module:
    """torchvision's resnet18 without its two widest stages."""
    model = torchvision.models.resnet18()
    model.layer3 = model.layer4 = nn.Identity()
    model.fc = nn.Linear(128, num_classes)
    return model


def training(photographs, output, *flags) -> list:
    data = ["--dataset", "imagefolder", "--data-dir", photographs, "--image-size", 32, "--batch-size", 12]
    return [*data, "--lr", 0.001, "--bn-momentum", 0.9, "--num-epochs", 1, "--output-dir", output, *flags]


@pytest.fixture(scope="module")
def trained(photographs, tmp_path_factory):
    """The folder of a run of torchvision's resnet18 with --lcnn and the paper's loss."""
    folder = tmp_path_factory.mktemp("any")
    assert train_models.main([str(f) for f in training(photographs, folder, *LCNN, "--overwrite")]) == 0
    return folder


def test_train_resume_estimate_and_evaluate(trained, photographs, tmp_path, capsys):
    (row,) = pd.read_csv(trained / f"{NAME}_metrics.csv").to_dict("records")
    assert {"beta_term", "gamma_term", "gradnorm"} <= row.keys()
    assert row["beta_term"] == pytest.approx(9 * 5, rel=0.05)  # 9 activations, each with its own beta near 5
    path, table, output = trained / f"{NAME}.pt", tmp_path / "curvature.csv", tmp_path / "robustness.csv"
    assert "is finished" in run_main(train_models, training(photographs, trained, *LCNN, "--resume"), capsys).stdout
    flags = ["--model-arch", RESNET, "--model-filename", path, "--split", "test", "--num-samples", 4]
    result = run_main(estimate_curvature, [*flags, "--num-power-iter", 10, "--output", table], capsys)
    assert result.returncode == 0, result.stderr
    curvature = pd.read_csv(table)["curvature"]
    assert len(curvature) == 4
    assert (curvature > 0).all(), curvature
    small = ["--norms", "l2", "--eps-l2", 0.1, "--pgd-steps", 2, "--restarts", 1, "--deltas", 0.1, "--draws", 1]
    result = run_main(evaluate_robustness, [*flags, *small, "--output", output], capsys)
    assert result.returncode == 0, result.stderr
    assert json.loads(output.with_suffix(".json").read_text())["models"][0]["examples"] == 4


def test_a_checkpoint_does_not_run_the_code_it_names(trained, photographs, capsys):
    path = trained / f"{NAME}.pt"
    for flags, *words in (
        ([], "if you trust that", f"--model-arch {RESNET}"),
        (["--model-arch", "torchvision.models:vgg11"], f"holds a {RESNET}"),
        (["--model-arch", RESNET, "--image-size", 64], "--image-size 32, not 64"),
    ):
        result = run_main(estimate_curvature, ["--model-filename", path, *flags], capsys)
        assert_one_line_error(result, 2, *words)
    with pytest.raises(UsageError, match="if you trust that"):
        load_model(path)
    model = load_model(path, RESNET)
    assert sum(isinstance(module, CenteredSoftplus) for module in model.modules()) == 9
    assert not model.training


def test_weights_of_a_state_dict_go_into_the_low_curvature_version(trained, photographs, tmp_path, capsys):
    state = torch.load(trained / f"{NAME}.pt", weights_only=True)["model"]
    torch.save(state, tmp_path / "weights.pt")
    flags = ["--model-filename", tmp_path / "weights.pt", "--model-arch", RESNET, "--image-size", 32]
    flags += ["--split", "test", "--num-samples", 2, "--num-power-iter", 2]
    data = ["--dataset", "imagefolder", "--data-dir", photographs]
    assert_one_line_error(run_main(estimate_curvature, [*flags, "--lcnn"], capsys), 2, "give --dataset")
    result = run_main(estimate_curvature, [*flags, *data], capsys)
    assert_one_line_error(result, 1, "do not fit")  # those of another network
    result = run_main(estimate_curvature, [*flags, *data, "--lcnn"], capsys)
    assert result.returncode == 0, result.stderr
    assert "made low-curvature" in result.stdout
    assert "ReLU -> CenteredSoftplus" in result.stdout


def test_mobilenet_needs_lcnn_for_the_gradient_penalty(photographs, tmp_path, capsys):
    """torch has no second derivative for its Hardsigmoid."""
    arch = ["--model-arch", "torchvision.models:mobilenet_v3_small", "--regularizer", "gnorm"]
    result = run_main(train_models, training(photographs, tmp_path, *arch), capsys)
    assert_one_line_error(result, 1, "cannot be trained with GradNormRegularizedLoss", "--lcnn")
    result = run_main(train_models, training(photographs, tmp_path, *arch, "--lcnn"), capsys)
    assert result.returncode == 0, result.stderr
    assert "Hardsigmoid -> Sigmoid" in result.stdout
    assert (tmp_path / "torchvision.models.mobilenet_v3_smalllcnn_gnorm_imagefolder.pt").is_file()


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        (["--model-arch", "resnet18", "--lcnn"], 2, ["--lcnn is for", "resnet18lcnn"]),
        (["--model-arch", "no_such_net"], 2, ["neither package.module:callable nor one of resnet18"]),
        (["--model-arch", RESNET, "--regularizer", "curvature"], 2, ["trainable beta or gamma"]),
        (["--model-arch", RESNET, "--regularizer", "hessian"], 2, ["PyTorch's BatchNorm", "three times", "--lcnn"]),
        (["--model-arch", RESNET, "--lcnn", "--regularizer", "curvature_bound"], 2, ["not a low-curvature network of"]),
        (["--model-arch", "resnet18", "--beta-weight-decay", "0.1"], 2, ["--beta-weight-decay needs"]),
        (["--model-arch", "torch.nn:Identity"], 1, ["gives torch.float32 (2, 3, 32, 32)"]),
    ],
)
def test_what_does_not_go_together_ends_in_one_line(flags, code, words, photographs, tmp_path, capsys):
    assert_one_line_error(run_main(train_models, training(photographs, tmp_path, *flags), capsys), code, *words)
    assert not list(tmp_path.glob("*.pt"))
