"""Runs that are killed, that find no room, that go wrong, or that are not alone; and runs that are repeated."""

import ctypes
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
from typing import ClassVar

import pytest
import torch
from conftest import ROOT, TwoBlocks, assert_one_line_error, run_main, run_script

import train_models
from curvature.estimate import estimate_curvature
from models.checkpoint import read_checkpoint
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


def without_roots_privilege() -> None:
    """In a child process: give up root's right to write what its permissions forbid."""
    drop_from_bounding_set, override_permissions = 24, 1  # prctl.h, capability.h
    if os.geteuid() == 0 and ctypes.CDLL(None).prctl(drop_from_bounding_set, override_permissions, 0, 0, 0):
        raise OSError("root's privilege cannot be given up here")


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


def test_a_folder_that_becomes_read_only(small_run):
    flags, folder = small_run
    place = folder / "run"
    flags += ["--num-epochs", 100_000, "--output-dir", place]
    first = start_in(folder, flags, "epoch 1/", preexec_fn=without_roots_privilege)
    try:
        place.chmod(0o555)
        _, errors = first.communicate(timeout=60)
        stopped = subprocess.CompletedProcess(flags, first.returncode, "", errors)
        assert_one_line_error(stopped, 1, "could not be written (Permission denied)", "another place")
        last = read_checkpoint(place / f"{NAME}.unfinished.pt")["epoch"]
        assert last >= 1
        again = train_in(folder, *flags, "--resume", preexec_fn=without_roots_privilege)
        assert_one_line_error(again, 1, "cannot be written (Permission denied)", "another place")
        command = [sys.executable, ROOT / "estimate_curvature.py", "--model-filename", place / f"{NAME}.unfinished.pt"]
        command += ["--model-arch", "small_net:make", "--output", place / "out.csv"]
        measured = subprocess.run(
            list(map(str, command)), cwd=folder, capture_output=True, text=True, preexec_fn=without_roots_privilege
        )
        assert_one_line_error(measured, 1, "out.csv cannot be written (Permission denied)", "another place")
    finally:
        first.kill()
        place.chmod(0o755)


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


class OddTerms(CELoss):
    """Its terms are those of the step in ``sets``."""

    sets: ClassVar[list[dict]] = []

    def compute_loss(self, input, target):
        raw_loss = self.losses(input, target).mean()
        self.metadata = self.sets.pop(0)
        return raw_loss


@pytest.mark.parametrize(
    ("sets", "words"),
    [
        ([{"a": torch.ones(1)}], "'a' is of shape (1,); set a scalar"),
        ([{"a": 1.0}, {"a": 1.0, "b": 2.0}], "a at first, a, b later"),
        ([{"a": 1.0}, {}], "a at first"),
        ([{"epoch": 1.0}], "'epoch' is a column"),
        ([{"train_loss": 1.0}], "'train_loss' is a column"),
    ],
)
def test_terms_that_cannot_be_columns(sets, words, small_run, monkeypatch, capsys):
    flags, folder = small_run
    monkeypatch.chdir(folder)
    monkeypatch.setattr(OddTerms, "sets", list(sets))
    monkeypatch.setitem(regularizers, "odd", lambda model, flags: OddTerms(model))
    result = run_main(train_models, [*flags, "--regularizer", "odd", "--output-dir", folder / "run"], capsys)
    assert_one_line_error(result, 1, "metadata of OddTerms", words)


class OddTotal(CELoss):
    """What it returns is made of its cross-entropies by ``make``."""

    make = None

    def compute_loss(self, input, target):
        return type(self).make(self.losses(input, target))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda losses: None, "returned a NoneType"),
        (lambda losses: losses.mean().item(), "returned a float"),
        (lambda losses: losses, "returned a tensor of shape (12,)"),
        (lambda losses: losses.mean().detach(), "returned a tensor without gradient"),
    ],
)
def test_what_is_nothing_to_minimize(make, words, small_run, monkeypatch, capsys):
    flags, folder = small_run
    monkeypatch.chdir(folder)
    monkeypatch.setattr(OddTotal, "make", staticmethod(make))
    monkeypatch.setitem(regularizers, "odd", lambda model, flags: OddTotal(model))
    result = run_main(train_models, [*flags, "--regularizer", "odd", "--output-dir", folder / "run"], capsys)
    assert_one_line_error(result, 1, "OddTotal.compute_loss", words)


def test_a_mistake_in_a_loss_keeps_its_traceback(small_run, monkeypatch, capsys):
    """Whoever edits regularized_loss.py needs the line; the network is not to blame."""
    flags, folder = small_run
    monkeypatch.chdir(folder)
    monkeypatch.setitem(regularizers, "odd", lambda model, flags: CELoss(model))
    monkeypatch.setattr(CELoss, "losses", lambda self, input, target: "no tensor")
    with pytest.raises(AttributeError, match="mean"):
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


def test_the_estimators_batch_size_changes_rounding_only():
    torch.manual_seed(0)
    model = TwoBlocks(4, 16).eval()
    images, labels = torch.rand(7, 3, 16, 16), torch.arange(7) % 4

    def estimate(size: int):
        found = []
        for i in range(0, 7, size):
            generators = [torch.Generator().manual_seed(j) for j in range(i, min(i + size, 7))]
            part = estimate_curvature(
                model, images[i : i + size], labels[i : i + size], num_iterations=40, tol=1e-4, generator=generators
            )
            found.append(torch.stack([part.gradient_norm, part.hessian_norm, part.curvature]))
        return torch.cat(found, dim=1)

    whole = estimate(7)
    for size in (1, 2, 3):
        torch.testing.assert_close(estimate(size), whole, rtol=1e-4, atol=0)
