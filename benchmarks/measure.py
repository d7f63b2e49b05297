"""What the benchmarks share: variants timed in turns, and the memory that one takes."""

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch


def seconds_of(work: Callable[[], object]) -> float:
    """How long a call takes; on a GPU by events around what it launches."""
    if not torch.cuda.is_available():
        began = time.perf_counter()
        work()
        return time.perf_counter() - began
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    began.record()
    work()
    ended.record()
    torch.cuda.synchronize()
    return began.elapsed_time(ended) / 1000


def interleaved(variants: dict[str, Callable[[], object]], rounds: int, warm_up: int = 1) -> dict[str, float]:
    """Median seconds of each variant, all of them taking turns after warm_up rounds that do not count."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds + warm_up):
        for name, variant in variants.items():
            seconds[name].append(seconds_of(variant))
    return {name: statistics.median(times[warm_up:]) for name, times in seconds.items()}


class PeakMemory:
    """MiB taken at most since this was made, above what was in use then; on a CPU by the whole process."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # the highest mark so far becomes what is in use now
        self.before = self.now("VmRSS")

    def now(self, entry: str) -> float:
        if self.cuda:
            return (torch.cuda.max_memory_allocated() if entry == "VmHWM" else torch.cuda.memory_allocated()) / 2**20
        return int(Path("/proc/self/status").read_text().split(f"{entry}:")[1].split()[0]) / 2**10

    def taken(self) -> float:
        return self.now("VmHWM") - self.before
