"""How the cost of training grows: with the batch, with the number of images, with processes; with a picture.

    python benchmarks/scaling.py --output benchmarks/scaling.png

Each point is a process (or several) of its own that trains one epoch on random 32 x 32 images, as train_models.py does,
after a step that does not count; every round visits every point, and the median over the rounds is taken. Memory is the
peak above the network, its images and the first imports. Several processes share the batch, and the processor's cores.
"""

import os
import sys
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.measure import in_new_process, machine, peak_memory, seconds_of, show
from benchmarks.train import CLASSES, SIZE, Training, method_flags
from data.batches import Split, training_batches
from training.epoch import train_epoch
from utils import cli, distributed
from utils.plots import new_figure, save_figure
from utils.precision import denormals_flushed

METHODS = {"Standard": "standard", "LCNN + GradReg": "lcnn_gradreg"}


class Point(NamedTuple):
    method: str
    images: int
    batch_size: int
    processes: int = 1
    threads: int = 0  # of each process; 0: all cores


def measure(point: Point, device_type: str) -> tuple[float, float]:
    """Seconds of an epoch, and MiB."""
    device = cli.device(device_type)  # each process its own
    with distributed.process_group(device), denormals_flushed():  # as in training
        training = Training(method_flags(METHODS[point.method], batch_size=1, device=device))
        images = torch.randint(0, 256, (point.images, 3, SIZE, SIZE), dtype=torch.uint8)
        split = Split(images, torch.arange(point.images) % CLASSES).to(device)
        share = {"rank": distributed.rank(), "world_size": distributed.world_size()}

        def epoch(split: Split) -> None:
            batches = training_batches(split, point.batch_size, seed=0, epoch=1, **share)
            train_epoch(training.training_step, training.optimizer, batches)

        def one_step_and_an_epoch() -> None:
            nonlocal seconds
            epoch(split[slice(point.batch_size)])
            seconds = seconds_of(lambda: epoch(split))

        seconds = 0.0
        memory = peak_memory(device, one_step_and_an_epoch)
        return seconds, memory


def cost(point: Point, device: torch.device) -> dict:
    """The point, and what ``measure`` finds in new processes."""
    os.environ["OMP_NUM_THREADS"] = str(point.threads or os.cpu_count())
    seconds, memory = in_new_process(measure, point, device.type, processes=point.processes)
    steps = -(-point.images // point.batch_size)
    return point._asdict() | {"s a step": seconds / steps, "s an epoch": seconds, "MiB": memory}


def plot(path: Path, costs: pd.DataFrame) -> None:
    """One step and its memory by batch, an epoch by images, and a step by processes."""
    figure, (by_batch, by_memory, by_images, by_processes) = new_figure(4)
    alone = costs[costs.threads == 0]
    for method in METHODS:
        own = alone[alone.method == method]
        batches, images = own[own.images == 4 * own.batch_size], own[own.batch_size == 64]
        by_batch.plot(batches.batch_size, batches["s a step"], "o-", label=method)
        by_memory.plot(batches.batch_size, batches["MiB"], "o-", label=method)
        by_images.plot(images.images, images["s an epoch"], "o-", label=method)
    by_batch.set(xlabel="batch size", ylabel="seconds a step", title="one step")
    by_memory.set(xlabel="batch size", ylabel="MiB", title="peak memory")
    by_images.set(xlabel="training images", ylabel="seconds an epoch", title="one epoch")
    for axis in (by_batch, by_memory, by_images):
        axis.set(xlim=(0, None), ylim=(0, None))
        axis.legend()
    shared = costs[costs.threads > 0]
    by_processes.bar([f"{p.processes} x {p.threads}" for p in shared.itertuples()], shared["s a step"])
    by_processes.set(xlabel="processes x threads", ylabel="seconds a step", title=shared.method.iloc[0])
    save_figure(figure, path)


def main() -> None:
    parser = cli.Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[16, 32, 64, 128], help="of 4 steps each")
    parser.add_argument("--images", type=int, nargs="+", default=[256, 512], help="in batches of 64")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="sharing batches of 64")
    parser.add_argument("--rounds", type=int, default=3, help="timings of each point")
    parser.add_argument("--device", type=cli.device, default="auto", help="cpu, cuda, ...")
    parser.add_argument("--output", type=Path, default=Path("scaling.png"), help="the picture")
    flags = parser.parse_args()
    points = [Point(m, 4 * size, size) for m in METHODS for size in flags.batch_sizes]
    points += [Point(m, images, 64) for m in METHODS for images in flags.images]
    # with one thread each, and one process with as many threads as there are processes at most
    shared = [(n, 1) for n in flags.processes] + [(1, max(flags.processes))]
    points += [Point("LCNN + GradReg", 256, 64, *share) for share in shared]
    costs = pd.DataFrame([cost(point, flags.device) for _ in range(flags.rounds) for point in dict.fromkeys(points)])
    costs = costs.groupby(list(Point._fields), sort=False, as_index=False).median()
    print(f"{machine(flags.device)}, {flags.device}, {os.cpu_count()} cores, {flags.rounds} rounds")
    show(costs.set_index("method"), "{:.3g}")
    plot(flags.output, costs)
    print(f"saved {flags.output}")


if __name__ == "__main__":
    main()
