"""How the cost of training grows: with the batch, with the number of images, with processes; with a picture.

    python benchmarks/scaling.py --output benchmarks/scaling.png

Each point is a process (or several) of its own that trains one epoch on random 32 x 32 images, as train_models.py does,
after a step that does not count; every round visits every point, and the median over the rounds is taken. Memory is the
peak above the network, its images and the first imports. Several processes share the batch, and the processor's cores.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.measure import PeakMemory  # noqa: E402
from data.batches import Split, training_batches  # noqa: E402
from models.model_selector import model_architecture  # noqa: E402
from regularized_loss import regularizers  # noqa: E402
from train_models import build_parser  # noqa: E402
from training.epoch import Gradients, build_optimizer, train_epoch  # noqa: E402
from utils import cli, distributed  # noqa: E402

CLASSES, SIZE = 10, 32
METHODS = {"Standard": ("resnet18", "none"), "LCNN + GradReg": ("resnet18lcnn", "curvature_and_gnorm")}


class Point(NamedTuple):
    method: str
    images: int
    batch_size: int
    processes: int = 1
    threads: int = 0  # of each process; 0: all cores, shared out


class Cost(NamedTuple):
    step: float  # seconds
    epoch: float  # seconds
    memory: float  # MiB, of one process


def measure(point: Point, device: torch.device) -> None:
    """Train, and print the Cost from the first process."""
    with distributed.process_group(device):
        torch.manual_seed(0)
        arch, regularizer = METHODS[point.method]
        model = model_architecture[arch](CLASSES, SIZE).to(device, memory_format=torch.channels_last)
        optimizer = build_optimizer(model, 1e-3, 0.9, 5e-4)
        gradients = Gradients(regularizers[regularizer](model, build_parser().parse_args([])), model)
        images = torch.randint(0, 256, (point.images, 3, SIZE, SIZE), dtype=torch.uint8)
        split = Split(images, torch.arange(point.images) % CLASSES).to(device)
        rank, world_size = distributed.rank(), distributed.world_size()

        def epoch(split: Split) -> None:
            batches = training_batches(split, point.batch_size, 0, 1, rank=rank, world_size=world_size)
            train_epoch(model, gradients, optimizer, batches)

        memory = PeakMemory(device)
        epoch(split[slice(point.batch_size)])
        began = time.perf_counter()
        epoch(split)  # ends with the losses' values on the host
        seconds = time.perf_counter() - began
        print(seconds / -(-point.images // point.batch_size), seconds, memory.taken())


def cost(point: Point, device: torch.device) -> Cost:
    """What ``measure`` finds in new processes."""
    launcher = [sys.executable]
    if point.processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={point.processes}"]
    command = [*launcher, __file__, "--device", device.type, "--point", *map(str, point)]
    threads = point.threads or max(1, (os.cpu_count() or 1) // point.processes)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    if result.returncode:
        raise SystemExit(f"{point}: {result.stderr}")
    return Cost(*map(float, result.stdout.split()))


def plot(path: Path, costs: dict[Point, Cost], curves: dict[str, list[Point]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (by_batch, by_memory, by_images, by_processes) = plt.subplots(1, 4, figsize=(17, 4))
    for method in METHODS:

        def line(axes, curve: str, x: str, y: str, method=method) -> None:
            points = [p for p in curves[curve] if p.method == method]
            axes.plot([getattr(p, x) for p in points], [getattr(costs[p], y) for p in points], "o-", label=method)

        line(by_batch, "batch", "batch_size", "step")
        line(by_memory, "batch", "batch_size", "memory")
        line(by_images, "images", "images", "epoch")
    by_batch.set(xlabel="batch size", ylabel="seconds a step", title="one step")
    by_memory.set(xlabel="batch size", ylabel="MiB", title="peak memory")
    by_images.set(xlabel="training images", ylabel="seconds an epoch", title="one epoch")
    bars = curves["processes"]
    names = [f"{p.processes} x {p.threads}" for p in bars]
    by_processes.bar(names, [costs[p].step for p in bars])
    by_processes.set(xlabel="processes x threads", ylabel="seconds a step", title=bars[0].method)
    for axes in (by_batch, by_memory, by_images):
        axes.set(xlim=(0, None), ylim=(0, None))
        axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[16, 32, 64, 128])
    parser.add_argument("--images", type=int, nargs="+", default=[256, 512], help="in batches of 64")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="sharing batches of 64")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", type=cli.device, default="auto")
    parser.add_argument("--output", type=Path, default=Path("scaling.png"), help="the picture")
    parser.add_argument("--point", nargs=5, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    torch.set_flush_denormal(True)  # as in training
    if flags.point:
        measure(Point(flags.point[0], *map(int, flags.point[1:])), flags.device)
        return

    most = max(flags.processes)
    curves = {
        "batch": [Point(m, 4 * size, size) for m in METHODS for size in flags.batch_sizes],
        "images": [Point(m, n, 64) for m in METHODS for n in flags.images],
        # with one thread each, and one process with as many threads as there are processes at most
        "processes": [Point("LCNN + GradReg", 256, 64, n, 1) for n in flags.processes]
        + [Point("LCNN + GradReg", 256, 64, 1, most)],
    }
    points = list(dict.fromkeys(point for curve in curves.values() for point in curve))
    found: dict[Point, list[Cost]] = {point: [] for point in points}
    for _ in range(flags.rounds):
        for point in points:
            found[point].append(cost(point, flags.device))
    costs = {point: Cost(*map(statistics.median, zip(*found[point], strict=True))) for point in points}
    print(f"torch {torch.__version__}, {flags.device}, {os.cpu_count()} cores, {flags.rounds} rounds")
    print(f"{'':<16}{'images':>8}{'batch':>8}{'processes x threads':>22}{'s a step':>10}{'s an epoch':>12}{'MiB':>8}")
    for point, (step, epoch, memory) in costs.items():
        who = f"{point.processes} x {point.threads or 'all'}"
        print(
            f"{point.method:<16}{point.images:>8}{point.batch_size:>8}{who:>22}{step:>10.3g}{epoch:>12.3g}{memory:>8.0f}"
        )
    plot(flags.output, costs, curves)
    print(f"saved {flags.output}")


if __name__ == "__main__":
    main()
