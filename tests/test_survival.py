"""Runs that are killed, that find no room, that go wrong, or that are not alone; and runs that are repeated."""

import errno
import fcntl
import os
import random
import resource
import shlex
import signal
import sys
import time
from pathlib import Path
from unittest import mock

import pandas as pd
import pytest
import torch
from conftest import ROOT, Script, assert_one_line_error, run_main, run_script

import train_models
from models.checkpoint import read_checkpoint
from regularized_loss import CELoss, regularizers
from tests.test_command_line import states_equal
from training.run_files import Run
from utils.errors import UserError
from utils.files import write_atomically

# small, but with enough weights that its checkpoint takes a while to write
SMALL_NET = """
from torch import nn
def make():
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Softplus(), nn.Flatten(),
                         nn.Linear(1024, 1000), nn.Softplus(), nn.Linear(1000, 2))
"""
NAME = "small_net.make_imagefolder"
UNFINISHED = Path("run", f"{NAME}.unfinished.pt")
LCNN = ["--model-arch", "conftest:TwoBlocks", "--regularizer", "curvature_and_gnorm"]


@pytest.fixture
def flags(photographs, tmp_path, monkeypatch) -> list[str]:
    """Flags of a quick run to run/, and the folder of its network to start it in."""
    monkeypatch.chdir(tmp_path)
    Path("small_net.py").write_text(SMALL_NET)
    flags = "--model-arch small_net:make --dataset imagefolder --image-size 16 --batch-size 12 --lr 0.01 --device cpu"
    return [*flags.split(), "--output-dir", "run", "--data-dir", str(photographs)]


@pytest.fixture
def run(flags, capsys):
    """The quick run with more flags."""
    return lambda *more: run_main(train_models, [*flags, *more], capsys)


@pytest.mark.long
def test_killed_twenty_times_a_run_ends_as_if_it_never_was(flags, run):
    assert run("--num-epochs", 600, "--output-dir", "whole").returncode == 0
    flags, generator, during_writes = [*flags, "--num-epochs", 600, "--resume"], random.Random(0), 0
    for kill in range(20):
        for old in Path("run").glob(".*.tmp"):
            old.unlink()
        started = Script("train_models.py", *flags)
        if kill % 2:
            while not list(Path("run").glob(".*.tmp")) and started.is_alive():
                time.sleep(0.0005)
            time.sleep(generator.uniform(0, 0.01))
        else:
            time.sleep(generator.uniform(0.05, 1.0))
        during_writes += bool(list(Path("run").glob(".*.tmp")))
        assert started.end(signal.SIGKILL) == -signal.SIGKILL, "it ended by itself: more epochs are needed"
        for path in Path("run").glob("[!.]*"):  # everything with a name of its own is whole
            if path.suffix == ".pt":
                read_checkpoint(path)
            else:
                rows = pd.read_csv(path)
                assert rows["epoch"].tolist() == list(range(1, len(rows) + 1))
                assert rows.notna().all(axis=None)
    assert during_writes >= 3
    assert run("--num-epochs", 600, "--resume").returncode == 0
    assert states_equal(*(read_checkpoint(f"{folder}/{NAME}.pt") for folder in ("whole", "run")))
    assert pd.read_csv(f"run/{NAME}_metrics.csv")["epoch"].tolist() == list(range(1, 601))
    assert {path.name for path in Path("run").iterdir()} == {f"{NAME}.pt", f"{NAME}_metrics.csv", f"{NAME}.png"}


def test_a_killed_and_resumed_run_ends_bit_identical_to_an_uninterrupted_one(flags, run):
    more = [*LCNN, "--num-epochs", 6, "--batch-size", 10, "--calibrate-batchnorm"]
    name = "conftest.TwoBlocks_curvature_and_gnorm_imagefolder"
    unfinished = f"run/{name}.unfinished.pt"
    started = Script("train_models.py", *flags, *more)
    started.wait_for("epoch 1/6")
    assert started.end(signal.SIGKILL) == -signal.SIGKILL
    assert not Path(f"run/{name}.pt").exists()
    saved = torch.load(unfinished, weights_only=True)
    assert 0 < saved["epoch"] < 6

    # an unfinished run is not overwritten, nor continued with other flags
    assert_one_line_error(run(*more), 2, "--resume", "--overwrite")
    assert_one_line_error(run(*more, "--resume", "--momentum", 0.5), 2, "--momentum 0.9, not 0.5")
    # a flag that did not exist when the run was started had its default
    del saved["flags"]["adv_eps"]
    torch.save(saved, unfinished)
    assert_one_line_error(run(*more, "--resume", "--adv-eps", 0.2), 2, "--adv-eps 0.1, not 0.2")

    resumed = run(*more, "--resume").stdout
    assert "resuming" in resumed
    assert "epoch 1/6" not in resumed
    assert not Path(unfinished).exists()
    assert run(*more, "--output-dir", "whole").returncode == 0
    assert states_equal(*(read_checkpoint(f"{folder}/{name}.pt") for folder in ("whole", "run")))


def test_two_runs_at_once_and_what_a_signal_leaves(flags, run):
    flags = [*flags, "--num-epochs", "500"]
    first = Script("train_models.py", *flags)
    first.wait_for("epoch 1/")
    for more in (["--resume"], ["--overwrite"], []):
        assert_one_line_error(run("--num-epochs", 500, *more), 1, "another process is training", "--output-dir")
    other = run("--num-epochs", 1, "--regularizer", "gnorm")
    assert other.returncode == 0, other.stderr  # another run's files
    assert first.is_alive()
    assert first.end(signal.SIGTERM) == 143
    assert first.stderr.splitlines()[-1] == "train_models.py: terminated"
    assert "Traceback" not in first.stderr
    command = shlex.join([sys.executable, str(ROOT / "train_models.py"), *flags, "--resume"])
    assert first.stdout.splitlines()[-1] == f"to go on after the last finished epoch: {command}"
    assert read_checkpoint(UNFINISHED)["epoch"] >= 1
    assert "epoch 1/1" in run("--overwrite", "--num-epochs", 1).stdout
    assert not UNFINISHED.exists()
    assert not list(Path("run").glob(".*"))


def contents() -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in Path("run").iterdir()}


def test_a_run_that_is_replaced_goes_only_when_there_is_something_in_its_place(run, monkeypatch):
    assert run("--num-epochs", 1).returncode == 0
    old, replacing = contents(), ["--num-epochs", 2, "--overwrite"]
    assert_one_line_error(run(*replacing, "--lr", 1e30), 1, "what was saved before it stays")
    assert contents() == old
    with monkeypatch.context() as patch:
        patch.setattr(train_models, "evaluate", lambda *_: (torch.nan, 50.0))
        assert_one_line_error(run(*replacing), 1, "epoch 1 ended with", "test_loss nan", "it was not saved", "--lr")
        patch.setattr(train_models, "evaluate", lambda *_: signal.raise_signal(signal.SIGINT))
        result = run(*replacing)
    assert (result.returncode, result.stderr) == (130, "train_models.py: interrupted\n")
    assert "start again" in result.stdout.splitlines()[-1]
    assert result.stdout.splitlines()[-1].endswith("--overwrite")
    assert contents() == old

    write_metrics = Run.write_metrics

    def interrupted(run, rows):  # when the first epoch of the new run is saved
        assert list(Path("run").glob("[!.]*.p*")) == [UNFINISHED]
        write_metrics(run, rows)
        signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "write_metrics", interrupted)
        assert run(*replacing).stdout.splitlines()[-1].endswith("--resume")
    assert run("--num-epochs", 2, "--resume").returncode == 0
    assert read_checkpoint(f"run/{NAME}.pt")["epoch"] == 2


ZERO = torch.zeros(1)
SPOILED = [{"optimizer": 7}, {"metrics": []}, {"metrics": ["well"]}, {"metrics": [{"epoch": "one"}]}, {"epoch": 5}]
STATES = [{9: {"momentum_buffer": ZERO}}, {0: {"momentum_buffer": ZERO}}, {0: {"momentum_buffer": "zeros"}}]


def test_an_unfinished_checkpoint_that_cannot_be_resumed(run, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Run, "write_metrics", lambda *_: signal.raise_signal(signal.SIGINT))
        assert run("--num-epochs", 2).returncode == 130
    saved = torch.load(UNFINISHED)
    spoiled = [saved | changes for changes in SPOILED]
    spoiled += [saved | {"optimizer": saved["optimizer"] | {"state": state}} for state in STATES]
    for content in (*spoiled, {key: value for key, value in saved.items() if key != "optimizer"}):
        torch.save(content, UNFINISHED)
        result = run("--num-epochs", 2, "--resume")
        assert_one_line_error(result, 1, "unfinished.pt: ", "start again, with --overwrite")


def refuse(number: int):
    """What the system does when it refuses; acted, as root may write anywhere."""
    return mock.Mock(side_effect=OSError(number, os.strerror(number)))


def test_a_full_disk_leaves_the_last_checkpoint(run, monkeypatch):
    limits, write_metrics = resource.getrlimit(resource.RLIMIT_FSIZE), Run.write_metrics

    def fill_the_disk(*arguments):  # after the first epoch no file may grow beyond 100 kB
        write_metrics(*arguments)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))

    with monkeypatch.context() as patch:
        patch.setattr(Run, "write_metrics", fill_the_disk)
        try:
            result = run("--num-epochs", 3)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert_one_line_error(result, 1, "unfinished.pt could not be written", "make room")
    assert read_checkpoint(UNFINISHED)["epoch"] == 1
    assert not list(Path("run").glob(".*"))
    assert run("--num-epochs", 3, "--resume").returncode == 0
    assert read_checkpoint(f"run/{NAME}.pt")["epoch"] == 3


def test_places_that_a_run_cannot_write_to(run, monkeypatch):
    for place in ("/proc/run", "small_net.py"):
        result = run("--output-dir", place)
        assert_one_line_error(result, 1, f"{place}/{NAME}.pt cannot be written", "name another")
    Path("run").mkdir()
    mine = Path(f"run/{NAME}_metrics.csv")
    mine.write_text("mine")  # without a checkpoint
    for more in ([], ["--resume"]):
        assert_one_line_error(run(*more), 2, "_metrics.csv exists", "--overwrite")
    for call, number in (("os.fsync", errno.ENOSPC), ("os.replace", errno.EACCES)):
        with monkeypatch.context() as patch:
            patch.setattr(call, refuse(number))
            with pytest.raises(UserError, match=os.strerror(number)):
                write_atomically(mine, b"new")
        assert [file.read_text() for file in Path("run").iterdir()] == ["mine"]
    with monkeypatch.context() as patch:
        patch.setattr("tempfile.TemporaryFile", refuse(errno.EACCES))
        assert_one_line_error(run("--overwrite"), 1, "cannot be written (Permission denied)", "another place")
    monkeypatch.setattr(fcntl, "flock", refuse(errno.ENOLCK))
    assert_one_line_error(run(), 1, "cannot be locked", "No locks available", "--output-dir")


@pytest.fixture
def odd(run, monkeypatch):
    """A run with a loss whose metadata and total ``answer`` makes of its cross-entropies, by step."""

    def run_odd(answer, *more):
        class Odd(CELoss):
            steps = 0

            def compute_loss(self, input, target):
                self.steps += 1
                self.metadata, total = answer(self.losses(input, target), self.steps)
                return total

        monkeypatch.setitem(regularizers, "odd", lambda model, flags: Odd(model))
        return run("--regularizer", "odd", *more)

    return run_odd


def test_a_loss_that_goes_bad_stops_the_run_at_that_step(odd):
    def answer(losses, step):  # from the fourth step on nan, as a term of its own
        penalty = losses.mean() * (torch.nan if step >= 4 else 1.0)
        return {"raw_loss": losses.mean(), "penalty": penalty}, losses.mean() + penalty

    result = odd(answer, "--num-epochs", 3)  # two steps an epoch
    assert_one_line_error(result, 1, "epoch 2, step 2: train_loss nan, penalty nan, the gradient nan", "--lr")
    assert "raw_loss nan" not in result.stderr
    saved = read_checkpoint("run/small_net.make_odd_imagefolder.unfinished.pt")
    assert saved["epoch"] == 1
    assert all(tensor.isfinite().all() for tensor in saved["model"].values())


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (lambda losses, step: ({"a": torch.ones(1)}, losses.mean()), "'a' is of shape (1,); set a scalar"),
        (lambda losses, step: (dict.fromkeys("ab"[:step], 1.0), losses.mean()), "a at first, a, b later"),
        (lambda losses, step: ({"epoch": 1.0}, losses.mean()), "'epoch' is a column"),
        (lambda losses, step: ({}, None), "returned a NoneType"),
        (lambda losses, step: ({}, losses.mean().item()), "returned a float"),
        (lambda losses, step: ({}, losses), "returned a tensor of shape (12,)"),
        (lambda losses, step: ({}, losses.mean().detach()), "returned a tensor without gradient"),
    ],
)
def test_what_cannot_be_logged_or_minimized(answer, words, odd):
    assert_one_line_error(odd(answer), 1, "Odd", words)


def test_a_mistake_in_a_loss_keeps_its_traceback_and_another_module_is_refused(run, monkeypatch):
    """Whoever edits regularized_loss.py needs the line; the network is not to blame."""
    monkeypatch.setattr(CELoss, "losses", lambda self, input, target: "no tensor")
    with pytest.raises(AttributeError, match="mean"):
        run()
    # with a network of ours whatever torch says, too: "use other layers" would not help
    monkeypatch.setattr(CELoss, "losses", lambda self, input, target: self.model(input) @ self.model(input))
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        run(*LCNN[:2])
    monkeypatch.setitem(regularizers, "odd", lambda model, flags: torch.nn.CrossEntropyLoss())
    assert_one_line_error(run("--regularizer", "odd"), 2, "CrossEntropyLoss", "extend CELoss")


@pytest.mark.long
@pytest.mark.parametrize("threads", [1, 2])
def test_the_same_seed_gives_the_same_bits(flags, threads, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", str(threads))
    for folder in ("a", "b"):
        more = ["--model-arch", "vgg11lcnn", *LCNN[2:], "--num-epochs", 1, "--output-dir", Path(folder).resolve()]
        run_script("train_models.py", *flags, *more)
    a, b = (read_checkpoint(f"{folder}/vgg11lcnn_curvature_and_gnorm_imagefolder.pt") for folder in ("a", "b"))
    assert states_equal(a, b)
