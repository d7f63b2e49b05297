"""What tells how a run goes: curvature after each epoch, epochs' checkpoints, and networks at chance."""

import argparse
import shutil
import signal

import pandas as pd
import pytest
import torch
from conftest import assert_one_line_error, run_main
from torch import nn

import estimate_curvature
import train_models
from curvature.results import QUANTITIES, comparison_table, format_summary, summarize
from data.batches import Split
from data.datasets import ImageData
from experiments.tables import Run as ComparedRun
from experiments.tables import curvature_markdown, curvature_table, mean_and_sd
from models.checkpoint import read_checkpoint
from regularized_loss import CELoss, regularizers
from tests.test_command_line import states_equal
from training.report import mean_curvature
from training.run_files import Run
from utils.numerics import at_chance
from utils.precision import denormals_flushed

NETS = """
from torch import nn
def make():
    first = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.BatchNorm2d(4), nn.Softplus())
    return nn.Sequential(first, nn.Flatten(), nn.Linear(196, 2))
class Rounded(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(768, 2)
    def forward(self, x):
        return self.linear(x.flatten(1)).round()
"""


@pytest.fixture
def watched(photographs, users_file, tmp_path, capsys):
    """watched(folder, flags...) trains a small network into the folder and returns what it printed."""
    users_file("watched_net", NETS)
    data = ["--dataset", "imagefolder", "--data-dir", photographs, "--image-size", 16]
    data += ["--batch-size", 10, "--lr", 0.01, "--device", "cpu"]
    return lambda folder, *flags: run_main(train_models, [*data, "--output-dir", tmp_path / folder, *flags], capsys)


NETWORKS = "conftest:TwoBlocks --regularizer curvature_and_gnorm", "watched_net:make --adversarial-training"


@pytest.mark.parametrize("network", NETWORKS)
def test_the_curvature_of_each_epoch_is_its_checkpoints(network, watched, tmp_path, capsys):
    """Measured or not, the run is the same bits; what it measured is what the script measures afterwards."""
    arch, *more = network.split()
    flags = ["--model-arch", arch, *more, "--precision", "bf16", "--num-epochs", 2]
    for place, extra in (("plain", []), ("watched", ["--measure-curvature", 7, "--save-every", 1])):
        result = watched(place, *flags, *extra)
        assert result.returncode == 0, result.stderr
    folder, (path,) = tmp_path / "watched", (tmp_path / "plain").glob("*.pt")
    kept = [folder / f"{path.stem}_epoch{k}.pt" for k in (1, 2)]
    names = {file.name for file in (*(tmp_path / "plain").iterdir(), *kept)}
    assert {file.name for file in folder.iterdir()} == names
    plain, whole = read_checkpoint(path), read_checkpoint(folder / path.name)
    assert states_equal(plain["model"], whole["model"])
    assert all(tensor.dtype in (torch.float32, torch.int64) for tensor in whole["model"].values())
    unmeasured = [{k: v for k, v in row.items() if k not in QUANTITIES} for row in whole["metrics"]]
    assert states_equal(plain["metrics"], unmeasured)
    assert "optimizer" not in read_checkpoint(kept[0])
    flags = ["--model-arch", arch, "--split", "test", "--num-samples", 7, "--output", tmp_path / "found.csv"]
    assert run_main(estimate_curvature, [*flags, "--model-filename", *kept], capsys).returncode == 0
    found = pd.read_csv(tmp_path / "found.csv").groupby("model")[list(QUANTITIES)].mean()
    rows = pd.read_csv(folder / f"{path.stem}_metrics.csv")[list(QUANTITIES)]
    assert rows.to_numpy() == pytest.approx(found.to_numpy(), rel=1e-5)


def test_a_resumed_run_goes_on_watching(watched, tmp_path, monkeypatch):
    flags = ["--model-arch", "watched_net:make", "--num-epochs", 3, "--measure-curvature", 7]  # of the same images
    name = "watched_net.make_imagefolder"
    assert watched("whole", *flags, "--save-every", 1).returncode == 0
    with monkeypatch.context() as patch:
        patch.setattr(Run, "write_metrics", lambda *_: signal.raise_signal(signal.SIGINT))
        assert watched("broken", *flags, "--save-every", 1).returncode == 130
    assert_one_line_error(watched("broken", *flags[:-2], "--resume"), 2, "with --measure-curvature 7, not without;")
    other = watched("broken", *flags, "--bn-momentum", 0.5, "--resume")
    assert_one_line_error(other, 2, "without --bn-momentum, not with 0.5;")
    assert watched("broken", *flags, "--save-every", 3, "--resume").returncode == 0  # where files go may change
    whole, broken = (read_checkpoint(tmp_path / folder / f"{name}.pt") for folder in ("whole", "broken"))
    assert states_equal(whole, broken)
    for folder, epochs in (("whole", (1, 2, 3)), ("broken", (1, 3))):
        assert {p.name for p in (tmp_path / folder).glob("*_epoch*")} == {f"{name}_epoch{k}.pt" for k in epochs}


def test_epochs_of_a_replaced_run_do_not_stay(watched, tmp_path):
    flags = ["--model-arch", "watched_net:make", "--num-epochs", 2]
    folder, name = tmp_path / "run", "watched_net.make_imagefolder"
    assert watched("run", *flags, "--save-every", 1).returncode == 0
    mine = shutil.copy(folder / f"{name}_epoch1.pt", folder / f"{name}_epoch1_mine.pt")
    kept = {path.name for path in folder.glob("*.pt")}
    assert watched("run", *flags, "--overwrite", "--lr", 1e30).returncode == 1  # nothing is in their place
    assert {path.name for path in folder.glob("*.pt")} == kept
    assert watched("run", *flags, "--overwrite", "--num-epochs", 1, "--save-every", 1, "--seed", 3).returncode == 0
    assert {path.name for path in folder.glob("*.pt")} == {f"{name}.pt", f"{name}_epoch1.pt", mine.name}
    assert read_checkpoint(folder / f"{name}_epoch1.pt")["flags"]["prng_seed"] == 3
    for end in (".pt", "_metrics.csv", ".png"):
        (folder / f"{name}{end}").unlink()
    assert_one_line_error(watched("run", *flags), 2, "_epoch1.pt exists, without its checkpoint", "--overwrite")


def test_a_network_that_cannot_be_measured_is_refused_before_the_first_epoch(watched, monkeypatch):
    result = watched("run", "--model-arch", "watched_net:Rounded", "--measure-curvature", 7)
    assert_one_line_error(result, 1, "watched_net:Rounded: its logits do not depend differentiably on the pixels")
    assert "epoch 1" not in result.stdout

    class Named(CELoss):
        def compute_loss(self, input, target):
            self.metadata = {"curvature": 1.0}
            return self.losses(input, target).mean()

    monkeypatch.setitem(regularizers, "none", lambda model, flags: Named(model))
    flags = ["--model-arch", "watched_net:make", "--num-epochs", 1]
    assert_one_line_error(watched("run", *flags, "--measure-curvature", 2), 2, "Named", "'curvature'", "rename it")
    assert watched("run", *flags).returncode == 0


def test_measuring_in_training_keeps_denormals_and_leaves_training_as_it_is():
    """Two logits, some 92 apart: the loss is below float32's smallest normal number."""
    sure = nn.Sequential(nn.Flatten(), nn.Linear(48, 2))
    sure[1].bias.data = torch.tensor([92.0, 0.0])
    images = torch.randint(0, 256, (5, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    split = Split(images, torch.zeros(5, dtype=torch.int64))
    flags = argparse.Namespace(batch_size=2, measure_curvature=4, prng_seed=1, model_arch="m:sure", dataset="none")
    state = torch.get_rng_state()
    with denormals_flushed():
        found = mean_curvature(sure, ImageData(split, split, ["a", "b"], True), flags)
        assert torch.tensor([1e-39]) * 1.0 == 0
    assert torch.equal(torch.get_rng_state(), state)
    assert 0 < found["gradient_norm"] < 1e-38


def test_what_is_at_chance():
    for correct, counts, expected in (
        (47, [36] * 10, True),  # digits: a tenth, give or take 1.6 %
        (48, [36] * 10, False),  # and 13.2 % is above 10 % + 2 * 1.58 %
        (95, [90, 10], True),  # always the first of two, give or take
        (97, [90, 10], False),
        (4, [4], False),  # a perfect network of one class
        (4, [1, 1, 1, 1], False),
    ):
        labels = [label for label, count in enumerate(counts) for _ in range(count)]
        assert at_chance(100 * correct / len(labels), labels) is expected


def answers(model: str, predicted: list[int]) -> pd.DataFrame:
    """Results of 50 examples of 5 classes, of which a model answers ``predicted``."""
    columns = dict.fromkeys(("gradient_norm", "hessian_norm", "curvature", "eigenvalue", "loss"), 1.0)
    columns |= {"index": range(50), "label": [0, 1, 2, 3, 4] * 10, "predicted": predicted}
    columns |= {"residual": 1e-4, "products": 7, "converged": True}
    return pd.DataFrame({"model": model, "split": "test", **columns})


def test_a_network_at_chance_is_marked_wherever_it_is_compared(tmp_path):
    good, constant = answers("good.pt", [0, 1, 2, 3, 4] * 10), answers("constant.pt", [3] * 50)
    for rows, marked in ((good, False), (constant, True)):
        assert summarize(rows)["at_chance"] is marked
        assert ("at chance" in format_summary(rows)) == marked
    lines = comparison_table(pd.concat([good, constant])).splitlines()
    assert ["*" in line for line in lines] == [False, False, True, True]
    assert lines[-1].startswith("* at chance: ")

    runs = [ComparedRun(m, tmp_path / m / f"seed{seed}") for seed in (1, 2) for m in ("Standard", "LCNN")]
    good.loc[0, ["gradient_norm", "curvature"]] = 0.0, 1e6  # to be left out
    for run, rows in zip(runs, (good, good, good, constant), strict=True):
        run.folder.mkdir(parents=True)
        rows.to_csv(run.curvature, index=False)
        (run.folder / "x_metrics.csv").write_text("test_accuracy,seconds\n55.5,1.0\n")
    table = curvature_table(runs)
    assert dict(zip(table["method"], table["at_chance"], strict=True)) == {"Standard": 0, "LCNN": 1}
    assert table["curvature"].tolist() == [1, 1]
    assert table["averaged"].tolist() == table["converged"].tolist() == [98, 99]
    text = curvature_markdown(table, "a caption")
    assert "curvature at 50 test examples:" in text
    assert (text.count("†"), text.count("55.5 ± 0 †"), text.count("† At least one network at chance: ")) == (2, 1, 1)


@pytest.mark.filterwarnings("error")
def test_cells_of_a_table_with_and_without_standard_deviations():
    rows = pd.DataFrame({"a": [1.23456, 2.0, None], "a_sd": [0.125, None, None], "b": [1.0] * 3, "b_sd": [None] * 3})
    assert mean_and_sd(rows, "a") == ["1.235 ± 0.12", "2", ""]
    assert mean_and_sd(rows.astype({"b_sd": "float64"}), "b") == ["1"] * 3


def test_training_at_chance_says_so_after_three_epochs_and_at_the_end(watched, monkeypatch):
    flags = ["--model-arch", "watched_net:make", "--num-epochs", 5]
    for accuracy, times in ((50.0, 2), (100.0, 0)):
        monkeypatch.setattr(train_models, "evaluate", lambda *_, accuracy=accuracy: (0.7, accuracy))
        result = watched(str(accuracy), *flags)
        assert result.returncode == 0, result.stderr
        assert result.stdout.count("is at chance") == result.stdout.count("--calibrate-batchnorm") == times
        assert ("is at chance" in watched(str(accuracy), *flags, "--resume").stdout) == (times > 0)
