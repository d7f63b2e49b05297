"""Training on several gloo processes: what one process computes, the same bits on each, and no hang."""

import csv
import os
import shlex
import signal
import socket
import subprocess
import sys
import time

import pandas as pd
import pytest
import torch
from conftest import ROOT, TwoBlocks, assert_one_line_error, run_main
from torch.distributed.run import get_args_parser as torchrun_parser

import estimate_curvature
import train_models
from curvature.results import QUANTITIES
from experiments import compare_methods, evaluate_robustness, label_errors, two_moons
from models.checkpoint import read_checkpoint
from models.model_selector import model_architecture
from tests.distributed_worker import gradients_of_every_loss

WORKER = ROOT / "tests" / "distributed_worker.py"
TIMEOUT = 240


def environment(**more) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)} | {k: str(v) for k, v in more.items()}


def launch(processes: int, *arguments, **variables) -> list[subprocess.Popen]:
    """Processes that find each other as torchrun's do, which would take another import of torch to start them."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        group = {"WORLD_SIZE": processes, "MASTER_ADDR": "localhost", "MASTER_PORT": probe.getsockname()[1]}
    command = [sys.executable, *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return [
        subprocess.Popen(command, env=environment(**group, RANK=rank, **variables), **pipes)
        for rank in range(processes)
    ]


def finish(processes: list[subprocess.Popen]) -> list[str]:
    """What each process printed, once all have ended."""
    try:
        written = [process.communicate(timeout=TIMEOUT) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert not any("Traceback" in errors for _, errors in written), written
    return [output for output, _ in written]


def test_gradients_of_every_loss_are_those_of_one_process(tmp_path):
    """A batch of 7, and one of 2, in which one of three processes has no example of its own."""
    gradients_of_every_loss(tmp_path / "1.pt")
    for processes in (2, 3):
        finish(launch(processes, WORKER, "gradients", tmp_path / f"{processes}.pt"))
    one, two, three = (torch.load(tmp_path / f"{processes}.pt") for processes in (1, 2, 3))
    assert len(one) == 14
    for name, gradients in one.items():
        assert gradients.keys() == two[name].keys() == three[name].keys()
        largest = max(gradient.abs().max() for gradient in gradients.values())
        assert largest > 1e-3
        for parameter, gradient in gradients.items():
            for others in (two, three):
                torch.testing.assert_close(others[name][parameter], gradient, rtol=0, atol=1e-10 * largest.item())


def test_all_processes_stop_at_a_step_that_is_bad_on_one():
    processes = launch(2, WORKER, "finite")
    written = [process.communicate(timeout=TIMEOUT)[1] for process in processes]
    assert written == ["step 1: b nan, so the step was not taken"] * 2


def training_flags(photographs, folder) -> list:
    flags = ["--dataset", "imagefolder", "--data-dir", photographs, "--image-size", 16, "--num-epochs", 2]
    flags += ["--model-arch", "resnet18lcnn", "--regularizer", "curvature_and_gnorm", "--batch-size", 9]
    return [*flags, "--lr", 0.01, "--device", "cpu", "--output-dir", folder]


def test_every_process_has_the_same_network_and_a_run_goes_on_with_another_number(
    photographs, tmp_path, monkeypatch, capsys
):
    flags = [*training_flags(photographs, tmp_path / "run"), "--measure-curvature", 7]
    name = tmp_path / "run" / "resnet18lcnn_curvature_and_gnorm_imagefolder"
    for epochs, processes in ((1, 2), (2, 3)):
        digests = tmp_path / str(processes)
        digests.mkdir()
        group = launch(processes, WORKER, "train", *flags, "--resume", DIGESTS=digests, STOP_AFTER=1)
        first, *others = finish(group)
        own = [(digests / str(rank)).read_text().splitlines() for rank in range(processes)]
        assert len(own[0]) == (2 if epochs == 1 else 1)  # the epoch it was stopped in, too
        assert all(digest == own[0] for digest in own)
        metrics = list(csv.DictReader((tmp_path / "run" / f"{name.name}_metrics.csv").open()))
        assert [int(row["epoch"]) for row in metrics] == list(range(1, epochs + 1))
        assert f"epoch {epochs}/2" in first
        assert others == [""] * (processes - 1)  # one process speaks
    assert [process.returncode for process in group] == [0, 0, 0]
    last = read_checkpoint(f"{name}.pt")["metrics"][-1]
    assert last["epoch"] == 2
    # three processes measured what one does
    monkeypatch.setitem(model_architecture, "resnet18lcnn", TwoBlocks)
    measuring = ["--model-filename", f"{name}.pt", "--split", "test", "--num-samples", 7]
    run_main(estimate_curvature, [*measuring, "--output", tmp_path / "found.csv"], capsys)
    means = pd.read_csv(tmp_path / "found.csv")[list(QUANTITIES)].mean()
    assert dict(means) == pytest.approx({key: last[key] for key in QUANTITIES}, rel=1e-5)


def test_a_killed_process_ends_the_others_with_a_message(photographs, tmp_path):
    flags = training_flags(photographs, tmp_path)
    flags[flags.index("--num-epochs") + 1] = 100_000
    processes = launch(2, ROOT / "train_models.py", *flags)
    try:
        started = time.monotonic()
        for line in processes[0].stdout:
            if line.startswith("epoch 1/") or time.monotonic() - started > TIMEOUT:
                break
        processes[1].send_signal(signal.SIGKILL)
        _, stderr = processes[0].communicate(timeout=60)
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert processes[0].returncode == 1, stderr
    assert "process 0 of 2: another one has ended" in stderr
    assert "Traceback" not in stderr
    assert len(stderr.strip().splitlines()) == 1, stderr
    assert (tmp_path / "resnet18lcnn_curvature_and_gnorm_imagefolder.unfinished.pt").is_file()


def test_a_refused_run_is_refused_once(photographs, tmp_path):
    flags = training_flags(photographs, tmp_path)
    (tmp_path / "resnet18lcnn_curvature_and_gnorm_imagefolder.pt").write_bytes(b"")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*torchrun, ROOT / "train_models.py", *flags]
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment(), timeout=TIMEOUT)
    assert result.returncode == 1  # torchrun's own code
    assert result.stderr.count("train_models.py: error:") == 1
    assert "--overwrite" in result.stderr


@pytest.mark.parametrize("nodes", [1, 2])
@pytest.mark.parametrize("script", [train_models, estimate_curvature, evaluate_robustness])
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


@pytest.mark.parametrize("script", [compare_methods, label_errors, two_moons])
def test_scripts_of_one_process_are_to_be_started_once(script, monkeypatch, capsys):
    monkeypatch.setenv("SLURM_NTASKS", "2")
    line = f"srun --nodes=1 --ntasks=1 python -m {script.__name__} --seed 3\n"
    assert_one_line_error(run_main(script, ["--seed", "3"], capsys), 2, "srun starts 2 processes", line)


@pytest.mark.parametrize("flag", ["--precision=tf32"])
def test_what_needs_a_gpu_is_refused_without_one(photographs, tmp_path, flag, capsys):
    result = run_main(train_models, [*training_flags(photographs, tmp_path), flag], capsys)
    assert_one_line_error(result, 2, "CUDA device")
