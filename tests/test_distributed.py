"""Training on several gloo processes: what one process computes, the same bits on each, and no hang."""

import csv
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT

from utils.checkpoint import read_checkpoint

WORKER = ROOT / "tests" / "distributed_worker.py"
TIMEOUT = 240


def environment(**more) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | {k: str(v) for k, v in more.items()}


def launch(processes: int, *arguments, check: int | None = 0, **variables) -> subprocess.CompletedProcess:
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [*launcher, *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment(**variables), timeout=TIMEOUT)
    assert check is None or result.returncode == check, result.stdout + result.stderr
    return result


def test_gradients_of_every_loss_are_those_of_one_process(tmp_path):
    """A batch of 7, and one of 2, in which one of three processes has no example of its own."""
    for processes in (1, 2, 3):
        launch(processes, WORKER, "gradients", tmp_path / f"{processes}.pt")
    one, two, three = (torch.load(tmp_path / f"{processes}.pt") for processes in (1, 2, 3))
    assert len(one) == 12
    for name, gradients in one.items():
        largest = max(gradient.abs().max() for gradient in gradients.values())
        assert largest > 1e-3
        for parameter, gradient in gradients.items():
            for others in (two, three):
                torch.testing.assert_close(others[name][parameter], gradient, rtol=0, atol=1e-10 * largest.item())


def training_flags(photographs, folder) -> list:
    flags = ["--dataset", "imagefolder", "--data-dir", photographs, "--image-size", 16, "--num-epochs", 2]
    flags += ["--model-arch", "resnet18lcnn", "--regularizer", "curvature_and_gnorm", "--batch-size", 9]
    return [*flags, "--lr", 0.01, "--device", "cpu", "--output-dir", folder]


def test_every_process_has_the_same_network_and_a_run_goes_on_with_another_number(photographs, tmp_path):
    flags = training_flags(photographs, tmp_path / "run")
    name = tmp_path / "run" / "resnet18lcnn_curvature_and_gnorm_imagefolder"
    for epochs, processes in ((1, 2), (2, 3)):
        digests = tmp_path / str(processes)
        digests.mkdir()
        result = launch(processes, WORKER, "train", *flags, "--resume", DIGESTS=digests, STOP_AFTER=1, check=None)
        own = [(digests / str(rank)).read_text().splitlines() for rank in range(processes)]
        assert len(own[0]) == (2 if epochs == 1 else 1), result.stderr  # the epoch it was stopped in, too
        assert all(digest == own[0] for digest in own)
        metrics = list(csv.DictReader((tmp_path / "run" / f"{name.name}_metrics.csv").open()))
        assert [int(row["epoch"]) for row in metrics] == list(range(1, epochs + 1))
        assert f"epoch {epochs}/2" in result.stdout
        assert result.stdout.count("with CurvatureAndGradientRegularizedLoss") == 1  # one process speaks
    assert result.returncode == 0
    assert read_checkpoint(f"{name}.pt")["epoch"] == 2


def test_a_killed_process_ends_the_others_with_a_message(photographs, tmp_path):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    flags = training_flags(photographs, tmp_path)
    flags[flags.index("--num-epochs") + 1] = 100_000
    command = [sys.executable, str(ROOT / "train_models.py"), *map(str, flags)]
    processes = [
        subprocess.Popen(
            command,
            env=environment(RANK=rank, WORLD_SIZE=2, MASTER_ADDR="localhost", MASTER_PORT=port),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
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
    result = launch(2, ROOT / "train_models.py", *flags, check=1)  # torchrun's own code
    assert result.stderr.count("train_models.py: error:") == 1
    assert "--overwrite" in result.stderr


@pytest.mark.parametrize("flag", ["--cuda-graph", "--precision=tf32"])
def test_what_needs_a_gpu_is_refused_without_one(photographs, tmp_path, flag):
    result = launch(1, ROOT / "train_models.py", *training_flags(photographs, tmp_path), flag, check=2)
    assert "CUDA device" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
