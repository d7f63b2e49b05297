"""Runs that are killed, that find no room, that go wrong, or that are not alone; and runs that are repeated."""

import copy
import errno
import fcntl
import multiprocessing
import os
import random
import resource
import shlex
import signal
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import ROOT, TwoBlocks, assert_one_line_error, run_main, run_script

import train_models
from models.checkpoint import read_checkpoint
from models.model_selector import model_architecture
from regularized_loss import CELoss, regularizers
from tests.test_command_line import states_equal
from training.epoch import FiniteSteps, NonFiniteStep, build_optimizer
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
LCNN = ["--model-arch", "resnet18lcnn", "--regularizer", "curvature_and_gnorm"]
FORKS = multiprocessing.get_context("forkserver")  # its processes start with torch imported
FORKS.set_forkserver_preload(["torch", "torchvision", "pandas", "matplotlib.pyplot", "sklearn.datasets", "pytest"])


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


def contents() -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in Path("run").iterdir()}


def process(arguments: list[str], folder: str, output: str) -> None:
    """train_models.py in a process of its own, what it prints into a file; resnet18lcnn is a small one."""
    os.chdir(folder)
    model_architecture["resnet18lcnn"] = TwoBlocks
    with open(output, "w") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    sys.exit(train_models.main(arguments))


def start(flags: list, until: str = "") -> multiprocessing.Process:
    """A run that goes on by itself, once it has printed this; what it prints is in output.txt."""
    Path("output.txt").write_text("")
    started = FORKS.Process(target=process, args=(list(map(str, flags)), os.getcwd(), "output.txt"))
    started.start()
    while until not in Path("output.txt").read_text():
        assert started.is_alive(), Path("output.txt").read_text()
        time.sleep(0.002)
    return started


def end(started: multiprocessing.Process, how: signal.Signals) -> int:
    """Send the signal and wait; returns the exit code."""
    os.kill(started.pid, how)
    started.join(60)
    return started.exitcode


@pytest.mark.long
def test_killed_twenty_times_a_run_ends_as_if_it_never_was(flags, run):
    assert run("--num-epochs", 600, "--output-dir", "whole").returncode == 0
    flags, generator, during_writes = [*flags, "--num-epochs", 600, "--resume"], random.Random(0), 0
    for kill in range(20):
        for old in Path("run").glob(".*.tmp"):
            old.unlink()
        started = start(flags)
        if kill % 2:
            while not list(Path("run").glob(".*.tmp")) and started.is_alive():
                time.sleep(0.0005)
            time.sleep(generator.uniform(0, 0.01))
        else:
            time.sleep(generator.uniform(0.05, 1.0))
        during_writes += bool(list(Path("run").glob(".*.tmp")))
        assert end(started, signal.SIGKILL) == -signal.SIGKILL, "it ended by itself: more epochs are needed"
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


def test_a_killed_and_resumed_run_ends_bit_identical_to_an_uninterrupted_one(flags, run, monkeypatch):
    monkeypatch.setitem(model_architecture, "resnet18lcnn", TwoBlocks)
    more = [*LCNN, "--num-epochs", 16, "--batch-size", 10, "--calibrate-batchnorm"]
    name = "resnet18lcnn_curvature_and_gnorm_imagefolder"
    unfinished = f"run/{name}.unfinished.pt"
    assert run(*more, "--output-dir", "whole").returncode == 0
    assert end(start([*flags, *more], "epoch 1/16"), signal.SIGKILL) == -signal.SIGKILL
    assert not Path(f"run/{name}.pt").exists()
    saved = torch.load(unfinished, weights_only=True)
    assert saved["epoch"] < 16

    # an unfinished run is not overwritten, nor continued with other flags
    assert_one_line_error(run(*more), 2, "--resume", "--overwrite")
    assert_one_line_error(run(*more, "--resume", "--momentum", 0.5), 2, "--momentum 0.9, not 0.5")
    # a flag that did not exist when the run was started had its default
    del saved["flags"]["adv_eps"]
    torch.save(saved, unfinished)
    assert_one_line_error(run(*more, "--resume", "--adv-eps", 0.2), 2, "--adv-eps 0.1, not 0.2")

    resumed = run(*more, "--resume").stdout
    assert "resuming" in resumed
    assert "epoch 1/16" not in resumed
    assert states_equal(*(torch.load(f"{folder}/{name}.pt", weights_only=True) for folder in ("whole", "run")))
    assert not Path(unfinished).exists()
    whole, broken = (pd.read_csv(f"{folder}/{name}_metrics.csv") for folder in ("whole", "run"))
    times = ["seconds", "images_per_second"]
    pd.testing.assert_frame_equal(whole.drop(columns=times), broken.drop(columns=times), check_exact=True)
    assert broken["epoch"].tolist() == list(range(1, 17))
    # resuming a finished run says so and changes nothing
    before = contents()
    assert "is finished" in run(*more, "--resume").stdout
    assert contents()[Path(f"run/{name}.pt")] == before[Path(f"run/{name}.pt")]


@pytest.mark.parametrize(("how", "code", "word"), [("SIGINT", 130, "interrupted"), ("SIGTERM", 143, "terminated")])
def test_a_signal_keeps_the_finished_epochs_and_prints_how_to_go_on(how, code, word, flags, run, capsys):
    assert end(start([*flags, "--num-epochs", 40], "epoch 2/"), signal.Signals[how]) == code
    lines = Path("output.txt").read_text().splitlines()
    assert f"train_models.py: {word}" in lines
    assert "Traceback" not in "".join(lines)
    saved = read_checkpoint(UNFINISHED)
    assert saved["epoch"] >= 2
    momenta = [state["momentum_buffer"] for state in saved["optimizer"]["state"].values()]
    assert any(momentum.abs().max() > 0 for momentum in momenta)
    # the line it printed is the command that goes on
    (command,) = (line.split(": ", 1)[1] for line in lines if line.startswith("to go on"))
    interpreter, script, *arguments = shlex.split(command)
    assert (interpreter, script) == (sys.executable, str(ROOT / "train_models.py"))
    assert "saved" in run_main(train_models, arguments, capsys).stdout
    assert "is finished" in run_main(train_models, arguments, capsys).stdout
    assert "epoch 1/1" in run("--overwrite", "--num-epochs", "1").stdout
    assert not UNFINISHED.exists()


def test_a_run_that_is_replaced_goes_only_when_there_is_something_in_its_place(run, monkeypatch):
    assert run("--num-epochs", 1).returncode == 0
    old, replacing = contents(), ["--num-epochs", 2, "--overwrite"]
    assert_one_line_error(run(*replacing, "--lr", 1e30), 1, "what was saved before it stays")
    assert contents() == old
    with monkeypatch.context() as patch:
        patch.setattr(train_models, "evaluate", lambda *_: signal.raise_signal(signal.SIGINT))
        result = run(*replacing)
    assert result.returncode == 130
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


def stopped_after_an_epoch(run, monkeypatch, *more) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Run, "write_metrics", lambda *_: signal.raise_signal(signal.SIGINT))
        assert run(*more).returncode == 130


ZERO = torch.zeros(1)
SPOILED = [{"optimizer": 7}, {"metrics": []}, {"metrics": ["well"]}, {"metrics": [{"epoch": "one"}]}, {"epoch": 5}]
STATES = [{9: {"momentum_buffer": ZERO}}, {0: {"momentum_buffer": ZERO}}, {0: {"momentum_buffer": "zeros"}}]


def test_an_unfinished_checkpoint_that_cannot_be_resumed(run, monkeypatch):
    stopped_after_an_epoch(run, monkeypatch, "--num-epochs", 2)
    saved = torch.load(UNFINISHED)
    spoiled = [saved | changes for changes in SPOILED]
    spoiled += [saved | {"optimizer": saved["optimizer"] | {"state": state}} for state in STATES]
    for content in (*spoiled, {key: value for key, value in saved.items() if key != "optimizer"}):
        torch.save(content, UNFINISHED)
        result = run("--num-epochs", 2, "--resume")
        assert_one_line_error(result, 1, "unfinished.pt: ", "start again, with --overwrite")


def refuse(number: int):
    """What the system does when it refuses."""

    def refused(*_, **__):
        raise OSError(number, os.strerror(number))

    return refused


def test_a_full_disk_leaves_the_last_checkpoint(run, monkeypatch):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    evaluate = train_models.evaluate

    def fill_the_disk(*arguments):  # after the first epoch no file may grow beyond 100 kB
        if UNFINISHED.exists():
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        return evaluate(*arguments)

    monkeypatch.setattr(train_models, "evaluate", fill_the_disk)
    try:
        result = run("--num-epochs", 3)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert_one_line_error(result, 1, "unfinished.pt could not be written", "make room")
    assert read_checkpoint(UNFINISHED)["epoch"] == 1
    assert not list(Path("run").glob(".*"))
    monkeypatch.setattr(train_models, "evaluate", evaluate)
    assert run("--num-epochs", 3, "--resume").returncode == 0
    assert read_checkpoint(f"run/{NAME}.pt")["epoch"] == 3


def test_places_that_a_run_cannot_write_to(run, monkeypatch):
    for place in ("/proc/run", "/dev/null/run", "small_net.py"):
        result = run("--output-dir", place)
        assert_one_line_error(result, 1, f"{place}/{NAME}.pt cannot be written", "name another")
    Path("run").mkdir()
    mine = Path(f"run/{NAME}_metrics.csv")
    mine.write_text("mine")  # without a checkpoint
    for more in ([], ["--resume"]):
        assert_one_line_error(run(*more), 2, "_metrics.csv exists", "--overwrite")
    monkeypatch.setattr("os.fsync", refuse(errno.ENOSPC))
    with pytest.raises(UserError, match="No space left"):
        write_atomically(mine, b"new")
    assert mine.read_text() == "mine"
    monkeypatch.setattr(fcntl, "flock", refuse(errno.ENOLCK))
    assert_one_line_error(run(), 1, "cannot be locked", "No locks available", "--output-dir")


def test_a_folder_that_becomes_read_only(run, monkeypatch):
    """As root may write anywhere, the refusal of the system is acted."""
    evaluate, replace, denied = train_models.evaluate, os.replace, refuse(errno.EACCES)

    def make_read_only(*arguments):  # when the first epoch is saved
        monkeypatch.setattr(os, "replace", denied if UNFINISHED.exists() else replace)
        return evaluate(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(train_models, "evaluate", make_read_only)
        stopped = run("--num-epochs", 3)
    assert_one_line_error(stopped, 1, "could not be written (Permission denied)", "another place")
    assert read_checkpoint(UNFINISHED)["epoch"] == 1
    monkeypatch.setattr("tempfile.TemporaryFile", denied)
    for more in ("--resume", "--overwrite"):
        again = run("--num-epochs", 3, more)
        assert_one_line_error(again, 1, "cannot be written (Permission denied)", "another place")


class Odd(CELoss):
    """``answer`` makes its metadata, by step, and its total of its cross-entropies."""

    steps, answer = 0, None

    def compute_loss(self, input, target):
        self.steps += 1
        self.metadata, total = type(self).answer(self.losses(input, target), self.steps)
        return total


@pytest.fixture
def odd(run, monkeypatch):
    """A run with an odd loss, by its answer."""

    def run_odd(answer, *more):
        monkeypatch.setattr(Odd, "answer", staticmethod(answer))
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
    monkeypatch.setitem(model_architecture, "resnet18lcnn", TwoBlocks)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        run("--model-arch", "resnet18lcnn")
    monkeypatch.setitem(regularizers, "odd", lambda model, flags: torch.nn.CrossEntropyLoss())
    assert_one_line_error(run("--regularizer", "odd"), 2, "CrossEntropyLoss", "extend CELoss")


class Learned(CELoss):
    """A parameter, a counter, random numbers and a moving average of the network, all of them its own."""

    def __init__(self, model):
        super().__init__(model)
        self.scale = torch.nn.Parameter(torch.zeros(()))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.average = copy.deepcopy(model).requires_grad_(False).eval()

    def compute_loss(self, input, target):
        self.steps += 1
        with torch.no_grad():
            for own, new in zip(self.average.parameters(), self.model.parameters(), strict=True):
                own.lerp_(new, 0.5)
            distance = (self.average(input) * torch.rand_like(input[:, :1, 0, 0])).square().mean()
        raw_loss = self.losses(input, target).mean()
        self.metadata = {"steps": self.steps, "at": self.epoch / self.num_epochs}
        return raw_loss * self.scale.exp() - self.scale * distance


def test_a_loss_with_a_state_resumes_bit_identical(run, monkeypatch):
    monkeypatch.setitem(regularizers, "learned", lambda model, flags: Learned(model))
    more = ["--regularizer", "learned", "--num-epochs", 3]
    assert run(*more, "--output-dir", "whole").returncode == 0
    stopped_after_an_epoch(run, monkeypatch, *more)
    assert run(*more, "--resume").returncode == 0
    name = "small_net.make_learned_imagefolder.pt"
    whole, broken = (read_checkpoint(f"{folder}/{name}") for folder in ("whole", "run"))
    assert states_equal(whole, broken)
    assert whole["loss"]["scale"] != 0
    assert whole["loss"]["steps"] == 6
    assert [row["at"] for row in whole["metrics"]] == [1 / 3, 2 / 3, 1]
    assert any(key.startswith("average.") for key in whole["loss"])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_no_step_is_taken_with_a_gradient_that_is_not_finite(value):
    model = torch.nn.Linear(3, 2)
    optimizer = build_optimizer(CELoss(model), 0.1, 0.9, 5e-4)
    finite = FiniteSteps(CELoss(model), optimizer)
    before = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    finite.check({"train_loss": torch.tensor(1.0)})
    optimizer.step()
    after = [p.detach().clone() for p in model.parameters()]
    assert not any(map(torch.equal, before, after))
    model.bias.grad[1] = value
    with pytest.raises(NonFiniteStep, match=r"step 2: the gradient (nan|inf)"):
        finite.check({"train_loss": torch.tensor(1.0)})
    optimizer.step()  # what a GPU goes on to do until the epoch ends
    assert all(map(torch.equal, after, model.parameters()))


def test_two_runs_at_once(flags, run):
    first = start([*flags, "--num-epochs", 500], "epoch 1/")
    try:
        for more in (["--resume"], ["--overwrite"], []):
            second = run("--num-epochs", 500, *more)
            assert_one_line_error(second, 1, "another process is training", "--output-dir")
        other = run("--num-epochs", 1, "--regularizer", "gnorm")
        assert other.returncode == 0, other.stderr  # another run's files
        assert first.is_alive()
    finally:
        end(first, signal.SIGKILL)
    again = run("--num-epochs", 1, "--overwrite")  # the dead hold no lock
    assert again.returncode == 0, again.stderr
    assert not list(Path("run").glob(".*"))


@pytest.mark.long
@pytest.mark.parametrize("threads", [1, 2])
def test_the_same_seed_gives_the_same_bits(flags, threads, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", str(threads))
    for folder in ("a", "b"):
        more = ["--model-arch", "vgg11lcnn", *LCNN[2:], "--num-epochs", 1, "--output-dir", Path(folder).resolve()]
        run_script("train_models.py", *flags, *more)
    a, b = (read_checkpoint(f"{folder}/vgg11lcnn_curvature_and_gnorm_imagefolder.pt") for folder in ("a", "b"))
    assert states_equal(a, b)
