"""Weight files and runs in the state that people leave them in, through the scripts; see also test_outside_model.py."""

import signal
from collections import OrderedDict

import pandas as pd
import pytest
import torch
from conftest import assert_one_line_error, run_main
from torch import nn

import estimate_curvature
import regularized_loss
import train_models
from models.checkpoint import read_checkpoint
from tests.test_command_line import states_equal
from training.run_files import Run

NETS = """
import torch
from torch import nn

def tiny(num_classes):
    smooth = nn.Softplus(beta=5), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), *smooth, nn.Linear(8, num_classes))

class Remembers(nn.Module):
    # a buffer in float64 for its own reasons, and one that is None until the first batch
    def __init__(self, num_classes):
        super().__init__()
        self.layers = tiny(num_classes)
        self.register_buffer("seen", torch.zeros((), dtype=torch.float64))
        self.register_buffer("mean", None)

    def forward(self, x):
        if self.training:
            self.seen += len(x)
            new = x.detach().mean((0, 2, 3))[:, None, None]
            self.mean = new if self.mean is None else self.mean.lerp(new, 0.5)
        return self.layers(x if self.mean is None else x - self.mean)
"""


@pytest.fixture
def folder(users_file):
    """The current directory, with nets.py in it."""
    return users_file("nets", NETS)


def under(prefix: str, state: dict) -> OrderedDict:
    return OrderedDict((prefix + key, value) for key, value in state.items())


def test_every_layout_is_measured_as_the_bare_weights_are(folder, capsys):
    torch.manual_seed(0)
    namespace = {}
    exec(NETS, namespace)
    state = namespace["tiny"](10).state_dict()
    parameters = {key: nn.Parameter(value) if value.is_floating_point() else value for key, value in state.items()}
    files = {
        "bare.pt": state,
        "compiled_ddp.pt": {"model": under("_orig_mod.module.", state)},
        "lightning.ckpt": {"epoch": 3, "state_dict": under("model.", state), "hyper_parameters": {"lr": 0.1}},
        "smoothing.pth.tar": {"state_dict": under("1.module.", state)},
        "ema.pth": {"state_dict_ema": state, "epoch": 3},
        "nested.pt": {"model": {"state_dict": state}},
        "parameters.pt": parameters,
    }
    for name, content in files.items():
        torch.save(content, folder / name)
    flags = ["--model-arch", "nets:tiny", "--dataset", "digits", "--split", "test", "--num-samples", 2]
    result = run_main(estimate_curvature, [*flags, "--model-filename", *files, "--output", "all.csv"], capsys)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count(" read as 0.weight") == 3
    tables = [table.drop(columns="model") for _, table in pd.read_csv("all.csv").groupby("model", sort=False)]
    assert len(tables) == len(files)
    for table in tables:
        pd.testing.assert_frame_equal(table.reset_index(drop=True), tables[0])


@pytest.mark.parametrize(
    ("order", "expected"), [(["1", "10", "2"], ["1", "2", "10"]), (["2", "1", "10"], ["2", "1", "10"])]
)
def test_files_that_a_shell_lists_come_in_the_order_of_their_numbers(order, expected, folder, capsys):
    namespace = {}
    exec(NETS, namespace)
    for number in order:
        torch.save(namespace["tiny"](10).state_dict(), folder / f"net_epoch{number}.pt")
    flags = ["--model-arch", "nets:tiny", "--dataset", "digits", "--split", "test", "--num-samples", 1]
    files = [f"net_epoch{number}.pt" for number in order]
    result = run_main(estimate_curvature, [*flags, "--model-filename", *files, "--output", "all.csv"], capsys)
    assert result.returncode == 0, result.stderr
    assert list(pd.read_csv("all.csv")["model"]) == [f"net_epoch{number}.pt" for number in expected]
    table = [line.split()[0] for line in result.stdout.splitlines() if line.startswith("net_") and " test " in line]
    assert table == [f"net_epoch{number}" for number in expected]


def run_flags(photographs, folder, *flags) -> list:
    data = ["--dataset", "imagefolder", "--data-dir", photographs, "--image-size", 16, "--device", "cpu"]
    return [*data, "--lr", 0.01, "--batch-size", 12, "--output-dir", folder, *flags]


def stopped_after_the_first_epoch(arguments, monkeypatch, capsys) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Run, "write_metrics", lambda *_: signal.raise_signal(signal.SIGINT))
        assert run_main(train_models, arguments, capsys).returncode == 130


class Remembering(regularized_loss.CELoss):
    """A buffer of its own that is None until the first batch."""

    def __init__(self, model, *_):
        super().__init__(model)
        self.register_buffer("average", None)

    def compute_loss(self, input, target):
        loss = super().compute_loss(input, target)
        self.average = loss.detach() if self.average is None else self.average.lerp(loss.detach(), 0.1)
        return loss + (loss - self.average).square()


def test_buffers_of_any_kind_resume_bit_identical_and_are_measured(folder, photographs, monkeypatch, capsys):
    monkeypatch.setitem(regularized_loss.regularizers, "remembering", Remembering)
    flags = ["--model-arch", "nets:Remembers", "--regularizer", "remembering", "--num-epochs", 3]
    name = "nets.Remembers_remembering_imagefolder.pt"
    whole, broken = (run_flags(photographs, folder / place, *flags) for place in ("whole", "broken"))
    assert run_main(train_models, whole, capsys).returncode == 0
    stopped_after_the_first_epoch(broken, monkeypatch, capsys)
    result = run_main(train_models, [*broken, "--resume"], capsys)
    assert result.returncode == 0, result.stderr
    saved = [read_checkpoint(folder / place / name) for place in ("whole", "broken")]
    assert states_equal(*saved)
    assert {tensor.dtype for tensor in saved[0]["model"].values()} == {torch.float32, torch.float64, torch.int64}
    assert saved[0]["model"]["seen"] == 3 * 24
    measuring = ["--model-arch", "nets:Remembers", "--model-filename", folder / "whole" / name, "--num-samples", 1]
    assert run_main(estimate_curvature, measuring, capsys).returncode == 0


def test_a_finished_run_says_so_without_its_data(folder, photographs, monkeypatch, capsys):
    flags = run_flags(photographs, folder, "--model-arch", "nets:tiny", "--num-epochs", 1, "--no-augment")
    assert run_main(train_models, flags, capsys).returncode == 0
    written = {path: path.read_bytes() for path in folder.glob("nets.tiny_imagefolder*")}
    for path in written:
        if path.suffix != ".pt":
            path.unlink()  # as a kill may have done
    monkeypatch.setattr(train_models, "load_dataset", None)
    result = run_main(train_models, [*flags, "--resume"], capsys)
    assert "is finished: learning_rate" in result.stdout, result.stderr
    assert {path: path.read_bytes() for path in folder.glob("nets.tiny_imagefolder*")} == written
    result = run_main(train_models, [*flags, "--resume", "--augment"], capsys)
    assert_one_line_error(result, 2, "was started with --no-augment, not --augment;")


def test_weights_of_losses_may_come_and_go(folder, photographs, monkeypatch, capsys):
    monkeypatch.setitem(regularized_loss.WEIGHTS, "reg_old", (0.5, "of a loss that was removed later"))
    flags = run_flags(photographs, folder, "--model-arch", "nets:tiny", "--num-epochs", 2)
    stopped_after_the_first_epoch(flags, monkeypatch, capsys)
    monkeypatch.delitem(regularized_loss.WEIGHTS, "reg_old")
    monkeypatch.setitem(regularized_loss.WEIGHTS, "reg_new", (0.5, "of a loss that was added"))
    result = run_main(train_models, [*flags, "--resume", "--reg-new", 1], capsys)
    assert_one_line_error(result, 2, "was started with --reg-new 0.5, not 1.0")
    assert run_main(train_models, [*flags, "--resume"], capsys).returncode == 0


@pytest.mark.parametrize(("names", "fits"), [(["flower", "china"], False), (["china", "flower"], True), (None, True)])
def test_classes_of_other_names_or_in_another_order(names, fits, folder, photographs, capsys):
    flags = ["--model-arch", "nets:tiny", "--num-epochs", 1]
    assert run_main(train_models, run_flags(photographs, folder, *flags), capsys).returncode == 0
    path = folder / "nets.tiny_imagefolder.pt"
    saved = torch.load(path)
    saved.pop("class_names")
    torch.save(saved | ({"class_names": names} if names else {}), path)
    result = run_main(estimate_curvature, [*flags[:2], "--model-filename", path, "--num-samples", 1], capsys)
    if fits:
        assert result.returncode == 0, result.stderr
    else:
        assert_one_line_error(result, 2, "'flower'", "'china'", "--data-dir")
