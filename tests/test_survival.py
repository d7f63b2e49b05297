"""Runs that are killed, that find no room, that go wrong, or that are not alone; and runs that are repeated."""

import copy
import errno
import fcntl
import io
import os
import re
import resource
import shlex
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, TwoBlocks, assert_one_line_error, run_main, run_script

import train_models
from models.checkpoint import read_checkpoint
from models.model_selector import model_architecture
from regularized_loss import CELoss, regularizers
from tests.test_command_line import read_metrics, states_equal
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


@pytest.fixture
def small_run(photographs, tmp_path):
    """Flags of a quick run without --output-dir, and the folder to start it in."""
    (tmp_path / "small_net.py").write_text(SMALL_NET)
    flags = ["--model-arch", "small_net:make", "--dataset", "imagefolder", "--data-dir", photographs]
    return [*flags, "--image-size", 16, "--batch-size", 12, "--lr", 0.01, "--device", "cpu"], tmp_path


def train_in(folder, *arguments, **more) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / "train_models.py", *arguments]
    return subprocess.run(list(map(str, command)), cwd=folder, capture_output=True, text=True, timeout=300, **more)


@pytest.mark.long
def test_killed_twenty_times_a_run_ends_as_if_it_never_was(small_run):
    flags, folder = small_run
    flags += ["--num-epochs", 600]
    whole = train_in(folder, *flags, "--output-dir", folder / "whole")
    assert whole.returncode == 0, whole.stderr
    command = [sys.executable, ROOT / "tests" / "kill_worker.py", folder / "killed", 0, *flags]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    killed = subprocess.run(
        list(map(str, command)), cwd=folder, env=environment, capture_output=True, text=True, timeout=600
    )
    assert killed.returncode == 0, killed.stdout + killed.stderr
    during_writes = int(re.search(r"20 kills, (\d+) during writes", killed.stdout)[1])
    assert during_writes >= 3
    assert states_equal(*(read_checkpoint(folder / name / f"{NAME}.pt") for name in ("whole", "killed")))
    rows = read_metrics(folder / "killed" / f"{NAME}_metrics.csv")
    assert [int(row["epoch"]) for row in rows] == list(range(1, 601))
    left = {path.name for path in (folder / "killed").iterdir()}
    assert left == {f"{NAME}.pt", f"{NAME}_metrics.csv", f"{NAME}.png"}


@pytest.mark.parametrize(("how", "code", "word"), [("SIGINT", 130, "interrupted"), ("SIGTERM", 143, "terminated")])
def test_a_signal_keeps_the_finished_epochs_and_prints_how_to_go_on(how, code, word, small_run, monkeypatch, capsys):
    flags, folder = small_run
    flags += ["--output-dir", folder / "run", "--num-epochs", 60]
    process = start_in(folder, flags, "epoch 2/")
    process.send_signal(signal.Signals[how])
    output, errors = process.communicate()
    assert process.returncode == code
    assert errors.strip() == f"train_models.py: {word}"
    unfinished = folder / "run" / f"{NAME}.unfinished.pt"
    saved = read_checkpoint(unfinished)
    assert saved["epoch"] >= 2
    momenta = [state["momentum_buffer"] for state in saved["optimizer"]["state"].values()]
    assert any(momentum.abs().max() > 0 for momentum in momenta)
    # the line it printed is the command that goes on
    interpreter, script, *arguments = shlex.split(output.splitlines()[-1].split(": ", 1)[1])
    assert (interpreter, script) == (sys.executable, str(ROOT / "train_models.py"))
    monkeypatch.chdir(folder)
    assert "saved" in run_main(train_models, arguments, capsys).stdout
    assert "is finished" in run_main(train_models, arguments, capsys).stdout
    again = run_main(train_models, [*flags, "--overwrite", "--num-epochs", "1"], capsys)
    assert "epoch 1/1" in again.stdout
    assert not unfinished.exists()


def test_a_run_that_is_replaced_goes_only_when_there_is_something_in_its_place(small_run, monkeypatch, capsys):
    flags, folder = small_run
    monkeypatch.chdir(folder)
    flags += ["--output-dir", folder / "run"]
    assert run_main(train_models, [*flags, "--num-epochs", 1], capsys).returncode == 0
    old = {path: path.read_bytes() for path in (folder / "run").iterdir()}
    result = run_main(train_models, [*flags, "--num-epochs", 2, "--overwrite", "--lr", 1e30], capsys)
    assert_one_line_error(result, 1, "what was saved before it stays")
    assert {path: path.read_bytes() for path in (folder / "run").iterdir()} == old
    with monkeypatch.context() as patch:
        patch.setattr(train_models, "evaluate", lambda *_: signal.raise_signal(signal.SIGINT))
        result = run_main(train_models, [*flags, "--num-epochs", 2, "--overwrite"], capsys)
    assert result.returncode == 130
    assert "start again" in result.stdout.splitlines()[-1]
    assert result.stdout.splitlines()[-1].endswith("--overwrite")
    assert {path: path.read_bytes() for path in (folder / "run").iterdir()} == old

    write_metrics = Run.write_metrics

    def interrupted(run, rows):  # when the first epoch of the new run is saved
        assert {path.name for path in (folder / "run").glob("[!.]*.p*")} == {f"{NAME}.unfinished.pt"}
        write_metrics(run, rows)
        signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "write_metrics", interrupted)
        result = run_main(train_models, [*flags, "--num-epochs", 2, "--overwrite"], capsys)
    assert result.stdout.splitlines()[-1].endswith("--resume")
    assert run_main(train_models, [*flags, "--num-epochs", 2, "--resume"], capsys).returncode == 0
    assert read_checkpoint(folder / "run" / f"{NAME}.pt")["epoch"] == 2


def test_metrics_without_a_checkpoint_are_left_alone(small_run, monkeypatch, capsys):
    flags, folder = small_run
    monkeypatch.chdir(folder)
    (folder / "run").mkdir()
    (folder / "run" / f"{NAME}_metrics.csv").write_text("mine")
    for more in ([], ["--resume"]):
        result = run_main(train_models, [*flags, "--output-dir", folder / "run", *more], capsys)
        assert_one_line_error(result, 2, "_metrics.csv exists", "--overwrite")
    assert (folder / "run" / f"{NAME}_metrics.csv").read_text() == "mine"


@pytest.mark.parametrize(
    "spoil",
    [
        lambda saved: saved.pop("optimizer"),
        lambda saved: saved.update(optimizer=7),
        lambda saved: saved["optimizer"].update(state={9: {"momentum_buffer": torch.zeros(1)}}),
        lambda saved: saved["optimizer"].update(state={0: {"momentum_buffer": torch.zeros(1)}}),
        lambda saved: saved["optimizer"].update(state={0: {"momentum_buffer": "zeros"}}),
        lambda saved: saved.update(metrics=[]),
        lambda saved: saved.update(metrics=["well"]),
        lambda saved: saved.update(metrics=[{"epoch": "one"}]),
        lambda saved: saved.update(epoch=5),
    ],
)
def test_an_unfinished_checkpoint_that_cannot_be_resumed(spoil, unfinished_run, monkeypatch, capsys):
    flags, folder, content = unfinished_run
    monkeypatch.chdir(folder)
    saved = torch.load(io.BytesIO(content))
    spoil(saved)
    torch.save(saved, folder / "run" / f"{NAME}.unfinished.pt")
    result = run_main(train_models, [*flags, "--resume"], capsys)
    assert_one_line_error(result, 1, "unfinished.pt: ", "start again, with --overwrite")


@pytest.fixture
def unfinished_run(small_run, monkeypatch, capsys):
    """A run of two epochs stopped after the first: its flags, the folder to start it in, and its checkpoint's bytes."""
    flags, folder = small_run
    monkeypatch.chdir(folder)
    flags += ["--output-dir", folder / "run", "--num-epochs", 2]
    with monkeypatch.context() as patch:
        patch.setattr(Run, "write_metrics", lambda *_: signal.raise_signal(signal.SIGINT))
        assert run_main(train_models, flags, capsys).returncode == 130
    return flags, folder, (folder / "run" / f"{NAME}.unfinished.pt").read_bytes()


def test_a_file_system_without_locks(small_run, monkeypatch, capsys):
    flags, folder = small_run
    monkeypatch.chdir(folder)

    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    result = run_main(train_models, [*flags, "--output-dir", folder / "run"], capsys)
    assert_one_line_error(result, 1, "cannot be locked", "No locks available", "--output-dir")


def test_a_full_disk_leaves_the_last_checkpoint(small_run, monkeypatch, capsys):
    flags, folder = small_run
    monkeypatch.chdir(folder)
    flags += ["--num-epochs", 3, "--output-dir", folder / "run"]
    unfinished = folder / "run" / f"{NAME}.unfinished.pt"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    evaluate, calls = train_models.evaluate, 0

    def fill_the_disk(*arguments):  # after the first epoch no file may grow beyond 100 kB
        nonlocal calls
        calls += 1
        if calls == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        return evaluate(*arguments)

    monkeypatch.setattr(train_models, "evaluate", fill_the_disk)
    try:
        result = run_main(train_models, flags, capsys)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert_one_line_error(result, 1, "unfinished.pt could not be written", "make room")
    assert read_checkpoint(unfinished)["epoch"] == 1
    assert not list((folder / "run").glob(".*"))
    assert run_main(train_models, [*flags, "--resume"], capsys).returncode == 0
    assert read_checkpoint(folder / "run" / f"{NAME}.pt")["epoch"] == 3


def test_no_room_at_all(small_run, monkeypatch, capsys):
    flags, folder = small_run
    monkeypatch.chdir(folder)
    for place in ("/proc/run", "/dev/null/run", folder / "small_net.py"):
        result = run_main(train_models, [*flags, "--output-dir", place], capsys)
        assert_one_line_error(result, 1, f"--output-dir {place} cannot be made a folder", "name another")
    path = folder / "file"
    path.write_bytes(b"old")

    def full(file):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UserError, match="No space left"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"


def start_in(folder, flags, until: str, **more) -> subprocess.Popen:
    """A run that has printed a line which starts so."""
    run = subprocess.Popen(
        [sys.executable, str(ROOT / "train_models.py"), *map(str, flags)],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **more,
    )
    if not any(line.startswith(until) for line in run.stdout):
        pytest.fail(run.communicate()[1])
    return run


def test_a_folder_that_becomes_read_only(small_run, monkeypatch, capsys):
    """As root may write anywhere, the refusal of the system is acted."""
    flags, folder = small_run
    monkeypatch.chdir(folder)
    flags += ["--num-epochs", 3, "--output-dir", folder / "run"]
    evaluate, replace = train_models.evaluate, os.replace

    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    def make_read_only(*arguments):  # when the first epoch is saved
        monkeypatch.setattr(os, "replace", refuse if list((folder / "run").glob("*.unfinished.pt")) else replace)
        return evaluate(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(train_models, "evaluate", make_read_only)
        stopped = run_main(train_models, flags, capsys)
    assert_one_line_error(stopped, 1, "could not be written (Permission denied)", "another place")
    assert read_checkpoint(folder / "run" / f"{NAME}.unfinished.pt")["epoch"] == 1
    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    for more in (["--resume"], ["--overwrite"]):
        again = run_main(train_models, [*flags, *more], capsys)
        assert_one_line_error(again, 1, "cannot be written (Permission denied)", "another place")


class GoesBad(CELoss):
    """From the fourth step on nan, as a term of its own."""

    steps = 0

    def compute_loss(self, input, target):
        GoesBad.steps += 1
        raw_loss = self.losses(input, target).mean()
        penalty = raw_loss * (torch.nan if GoesBad.steps >= 4 else 1.0)
        self.metadata = {"raw_loss": raw_loss, "penalty": penalty}
        return raw_loss + penalty


def test_a_loss_that_goes_bad_stops_the_run_at_that_step(small_run, monkeypatch, capsys):
    flags, folder = small_run
    monkeypatch.chdir(folder)
    monkeypatch.setitem(regularizers, "bad", lambda model, flags: GoesBad(model))
    monkeypatch.setattr(GoesBad, "steps", 0)
    flags += ["--regularizer", "bad", "--num-epochs", 3, "--output-dir", folder / "run"]
    result = run_main(train_models, flags, capsys)  # two steps an epoch
    assert_one_line_error(result, 1, "epoch 2, step 2: train_loss nan, penalty nan, the gradient nan", "--lr")
    assert "raw_loss nan" not in result.stderr
    saved = read_checkpoint(folder / "run" / "small_net.make_bad_imagefolder.unfinished.pt")
    assert saved["epoch"] == 1
    assert all(tensor.isfinite().all() for tensor in saved["model"].values())


class Odd(CELoss):
    """``answer`` makes its metadata, by step, and its total of its cross-entropies."""

    answer = None

    def compute_loss(self, input, target):
        self.steps = getattr(self, "steps", 0) + 1
        self.metadata, total = type(self).answer(self.losses(input, target), self.steps)
        return total


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
def test_what_cannot_be_logged_or_minimized(answer, words, small_run, monkeypatch, capsys):
    flags, folder = small_run
    monkeypatch.chdir(folder)
    monkeypatch.setattr(Odd, "answer", staticmethod(answer))
    monkeypatch.setitem(regularizers, "odd", lambda model, flags: Odd(model))
    result = run_main(train_models, [*flags, "--regularizer", "odd", "--output-dir", folder / "run"], capsys)
    assert_one_line_error(result, 1, "Odd", words)


def test_a_loss_that_is_no_celoss_is_refused_by_name(small_run, monkeypatch, capsys):
    flags, folder = small_run
    monkeypatch.chdir(folder)
    monkeypatch.setitem(regularizers, "odd", lambda model, flags: torch.nn.CrossEntropyLoss())
    result = run_main(train_models, [*flags, "--regularizer", "odd", "--output-dir", folder / "run"], capsys)
    assert_one_line_error(result, 2, "CrossEntropyLoss", "extend CELoss")


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


def test_a_loss_with_a_state_resumes_bit_identical(small_run, monkeypatch, capsys):
    flags, folder = small_run
    monkeypatch.chdir(folder)
    monkeypatch.setitem(regularizers, "learned", lambda model, flags: Learned(model))
    flags += ["--regularizer", "learned", "--num-epochs", 3]
    name = "small_net.make_learned_imagefolder"
    for place in ("whole", "broken"):
        arguments = [*flags, "--output-dir", folder / place]
        if place == "broken":
            with monkeypatch.context() as patch:
                patch.setattr(Run, "write_metrics", lambda *_: signal.raise_signal(signal.SIGINT))
                assert run_main(train_models, arguments, capsys).returncode == 130
            arguments += ["--resume"]
        assert run_main(train_models, arguments, capsys).returncode == 0
    whole, broken = (read_checkpoint(folder / place / f"{name}.pt") for place in ("whole", "broken"))
    assert states_equal(whole, broken)
    assert whole["loss"]["scale"] != 0
    assert whole["loss"]["steps"] == 6
    assert [row["at"] for row in whole["metrics"]] == [1 / 3, 2 / 3, 1]
    assert any(key.startswith("average.") for key in whole["loss"])


def test_a_mistake_in_a_loss_keeps_its_traceback(small_run, monkeypatch, capsys):
    """Whoever edits regularized_loss.py needs the line; the network is not to blame."""
    flags, folder = small_run
    monkeypatch.chdir(folder)
    monkeypatch.setitem(regularizers, "odd", lambda model, flags: CELoss(model))
    monkeypatch.setattr(CELoss, "losses", lambda self, input, target: "no tensor")
    with pytest.raises(AttributeError, match="mean"):
        run_main(train_models, [*flags, "--regularizer", "odd", "--output-dir", folder / "run"], capsys)
    # with a network of ours whatever torch says, too: "use other layers" would not help
    monkeypatch.setattr(CELoss, "losses", lambda self, input, target: self.model(input) @ self.model(input))
    monkeypatch.setitem(model_architecture, "resnet18lcnn", TwoBlocks)
    flags[1] = "resnet18lcnn"
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        run_main(train_models, [*flags, "--regularizer", "odd", "--output-dir", folder / "run"], capsys)


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


def test_two_runs_at_once(small_run, monkeypatch, capsys):
    flags, folder = small_run
    monkeypatch.chdir(folder)
    flags += ["--output-dir", folder / "run"]
    first = start_in(folder, [*flags, "--num-epochs", 100_000], "epoch 1/")
    try:
        for more in (["--resume"], ["--overwrite"], []):
            second = run_main(train_models, [*flags, "--num-epochs", 100000, *more], capsys)
            assert_one_line_error(second, 1, "another process is training", "--output-dir")
        other = run_main(train_models, [*flags, "--num-epochs", 1, "--regularizer", "gnorm"], capsys)
        assert other.returncode == 0, other.stderr  # another run's files
        assert first.poll() is None
    finally:
        first.send_signal(signal.SIGKILL)
        first.communicate()
    time.sleep(0.1)
    again = run_main(train_models, [*flags, "--num-epochs", 1, "--overwrite"], capsys)  # the dead hold no lock
    assert again.returncode == 0, again.stderr
    assert not list((folder / "run").glob(".*"))


@pytest.mark.long
@pytest.mark.parametrize("threads", [1, 2])
def test_the_same_seed_gives_the_same_bits(photographs, tmp_path, threads, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", str(threads))
    flags = ["--model-arch", "vgg11lcnn", "--regularizer", "curvature_and_gnorm", "--dataset", "imagefolder"]
    flags += ["--data-dir", photographs, "--image-size", 16, "--batch-size", 12, "--num-epochs", 1, "--lr", 0.01]
    for name in ("a", "b"):
        run_script("train_models.py", *flags, "--device", "cpu", "--output-dir", tmp_path / name)
    a, b = (read_checkpoint(tmp_path / n / "vgg11lcnn_curvature_and_gnorm_imagefolder.pt") for n in ("a", "b"))
    assert states_equal(a, b)
