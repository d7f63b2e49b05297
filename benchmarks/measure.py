"""What the benchmarks share: time, memory, new processes and tables."""

import statistics
import time
from collections.abc import Callable, Hashable
from pathlib import Path

import pandas as pd
import torch
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from utils import cli

DEVICE = cli.device("auto")


def machine(device: torch.device = DEVICE) -> str:
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    return f"torch {torch.__version__}, {where}"


def show(table: pd.DataFrame, number: str = "{:.4g}") -> None:
    print(table.to_string(float_format=number.format), flush=True)


def seconds_of(work: Callable[[], object]) -> float:
    """Of a call, and on a GPU of everything it launches."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    wait()
    began = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - began


def interleaved(variants: dict[Hashable, Callable[[], object]], rounds: int) -> dict[Hashable, float]:
    """Median seconds of variants that take turns, after some rounds that warm up."""
    warm_up = 5 if torch.cuda.is_available() else 1
    seconds = [{name: seconds_of(work) for name, work in variants.items()} for _ in range(warm_up + rounds)]
    return {name: statistics.median(times[name] for times in seconds[warm_up:]) for name in variants}


def peak_memory(work: Callable[[], object]) -> float:
    """MiB that a call takes at most, on a CPU with everything in the process."""
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return (torch.cuda.max_memory_allocated() - before) / 2**20

    def kibibytes(entry: str) -> int:
        return int(Path("/proc/self/status").read_text().split(f"{entry}:")[1].split()[0])

    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before = kibibytes("VmRSS")
    work()
    return (kibibytes("VmHWM") - before) / 2**10


def in_new_process(function: Callable, *arguments, processes: int = 1):
    """function(*arguments) in new processes, as torchrun starts them; the result of the first."""
    c10d = {"run_id": "benchmark", "rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0"}
    config = LaunchConfig(1, 1, processes, start_method="spawn", max_restarts=0, **c10d)
    return elastic_launch(config, function)(*arguments)[0]
