"""Training on several gloo processes: what one process computes, the same bits on each, and no hang."""

import os
import shlex
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import ROOT, Script, assert_one_line_error, run_main
from torch.distributed.run import get_args_parser as torchrun_parser

import estimate_curvature
import train_models
from curvature.results import QUANTITIES
from experiments import compare_methods, evaluate_robustness, label_errors, two_moons
from tests.distributed_worker import gradients_of_every_loss
from training.run_files import Run

WORKER = ROOT / "tests" / "distributed_worker.py"
NAME = "conftest.TwoBlocks_curvature_and_gnorm_imagefolder"


def launch(processes: int, script: str | Path, *arguments) -> list[Script]:
    """Processes that find each other as torchrun's do."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        group = {"WORLD_SIZE": processes, "MASTER_ADDR": "localhost", "MASTER_PORT": probe.getsockname()[1]}
    return [Script(script, *arguments, **group, RANK=rank) for rank in range(processes)]


def finish(processes: list[Script]) -> list[str]:
    """What each process printed, once all have ended well."""
    try:
        codes = [process.end() for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert not any(codes), [process.stderr for process in processes]
    return [process.stdout for process in processes]


def test_gradients_are_those_of_one_process_and_all_stop_at_a_step_that_is_bad_on_one(tmp_path):
    """A batch of 7, and one of 2, in which two of three processes have no example of their own. By torchrun itself."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3"]
    command = [*torchrun, WORKER, "steps", tmp_path / "gradients.pt"]
    variables = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=variables, timeout=240)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("step 1: b nan, the gradient inf, so the step was not taken") == 3
    one = gradients_of_every_loss()
    three = torch.load(tmp_path / "gradients.pt")
    assert len(one) == 15
    for name, gradients in one.items():
        assert gradients.keys() == three[name].keys()
        largest = max(gradient.abs().max() for gradient in gradients.values())
        assert largest > 1e-3
        for parameter, gradient in gradients.items():
            torch.testing.assert_close(three[name][parameter], gradient, rtol=0, atol=1e-10 * largest.item())


@pytest.fixture
def flags(photographs, tmp_path) -> list:
    """Flags of a run to tmp_path."""
    flags = ["--dataset", "imagefolder", "--data-dir", photographs, "--image-size", 16, "--batch-size", 9]
    flags += ["--model-arch", "conftest:TwoBlocks", "--regularizer", "curvature_and_gnorm", "--lr", 0.01]
    return [*flags, "--device", "cpu", "--output-dir", tmp_path]


def test_a_run_goes_on_with_more_processes_that_all_have_the_same_network(flags, tmp_path, monkeypatch, capsys):
    flags += ["--num-epochs", 2, "--measure-curvature", 7]
    with monkeypatch.context() as patch:
        patch.setattr(Run, "write_metrics", lambda *_: signal.raise_signal(signal.SIGINT))
        assert run_main(train_models, flags, capsys).returncode == 130
    digests = tmp_path / "digests"
    digests.mkdir()
    first, *others = finish(launch(3, WORKER, "train", digests, *flags, "--resume"))
    assert "epoch 1/2" not in first
    assert "epoch 2/2" in first
    assert others == ["", ""]  # one process speaks
    zero, one, two = ((digests / str(rank)).read_text().splitlines() for rank in range(3))
    assert len(zero) == 1
    assert zero == one == two
    assert len(list(digests.glob("seed *"))) == 3  # each draws its own random numbers
    metrics = pd.read_csv(tmp_path / f"{NAME}_metrics.csv")
    assert metrics["epoch"].tolist() == [1, 2]
    # three processes measured what one does
    measuring = ["--model-filename", tmp_path / f"{NAME}.pt", "--split", "test", "--num-samples", 7]
    measuring += ["--model-arch", "conftest:TwoBlocks", "--output", tmp_path / "found.csv"]
    assert run_main(estimate_curvature, measuring, capsys).returncode == 0
    means = pd.read_csv(tmp_path / "found.csv")[list(QUANTITIES)].mean()
    assert dict(means) == pytest.approx(dict(metrics[list(QUANTITIES)].iloc[1]), rel=1e-5)


def test_a_killed_process_ends_the_others_with_a_message(flags, tmp_path):
    first, second = launch(2, "train_models.py", *flags, "--num-epochs", 100_000)
    try:
        first.wait_for("epoch 1/")
        second.end(signal.SIGKILL)
        assert first.end() == 1
    finally:
        first.kill()
    assert "process 0 of 2: another one has ended" in first.stderr
    assert len(first.stderr.strip().splitlines()) == 1, first.stderr
    assert (tmp_path / f"{NAME}.unfinished.pt").is_file()


def test_a_refused_run_is_refused_once(flags, tmp_path):
    (tmp_path / f"{NAME}.pt").write_bytes(b"")
    first, second = launch(2, "train_models.py", *flags)
    assert (first.end(), second.end()) == (2, 2)
    assert first.stderr.startswith("train_models.py: error:")
    assert "--overwrite" in first.stderr
    assert (second.stdout, second.stderr) == ("", "")


@pytest.mark.parametrize(("script", "nodes"), [(train_models, 1), (estimate_curvature, 2), (evaluate_robustness, 2)])
def test_srun_without_torchrun_is_refused_with_the_line_to_use(script, nodes, monkeypatch, capsys):
    """As torchrun itself reads that line."""
    monkeypatch.setenv("SLURM_NTASKS", "4")
    monkeypatch.setenv("SLURM_NNODES", str(nodes))
    flags = ["--dataset", "imagefolder", "--data-dir", "a folder", "--seed", "3"]
    result = run_main(script, flags, capsys)
    assert_one_line_error(result, 2, "srun starts 4 processes", f"srun --nodes={nodes} --ntasks={nodes} ")
    line = torchrun_parser().parse_args(shlex.split(result.stderr.split(" torchrun ")[1]))
    assert (line.nnodes, line.nproc_per_node, line.standalone) == (str(nodes), str(4 // nodes), nodes == 1)
    assert line.training_script.endswith(script.__name__ if line.module else f"/{script.__name__}.py")
    assert line.training_script_args == flags


def test_scripts_of_one_process_are_to_be_started_once(monkeypatch, capsys):
    monkeypatch.setenv("SLURM_NTASKS", "2")
    for script in (compare_methods, label_errors, two_moons):
        line = f"srun --nodes=1 --ntasks=1 python -m {script.__name__} --seed 3\n"
        assert_one_line_error(run_main(script, ["--seed", "3"], capsys), 2, "srun starts 2 processes", line)
