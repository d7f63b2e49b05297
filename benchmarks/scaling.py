"""How the cost of training grows: with the batch, with the number of images, with processes; with a picture.

    python benchmarks/scaling.py --output benchmarks/scaling.png

Each point trains one epoch on random images in new processes, after a step that does not count. Every round visits
every point, and the median counts. Memory is the peak above the network and its images.
"""

import os
import sys
from functools import partial
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
        seconds = []

        def epoch(split: Split) -> None:
            batches = training_batches(split, point.batch_size, seed=0, epoch=1, **share)
            train_epoch(training.training_step, training.optimizer, batches)

        def a_step_and_an_epoch() -> None:
            for part in (split[slice(point.batch_size)], split):
                seconds.append(seconds_of(partial(epoch, part)))

        memory = peak_memory(device, a_step_and_an_epoch)
        return seconds[-1], memory


def cost(point: Point, device: torch.device) -> dict:
    os.environ["OMP_NUM_THREADS"] = str(point.threads or os.cpu_count())
    seconds, memory = in_new_process(measure, point, device.type, processes=point.processes)
    steps = -(-point.images // point.batch_size)
    return point._asdict() | {"s a step": seconds / steps, "s an epoch": seconds, "MiB": memory}


def plot(path: Path, costs: pd.DataFrame) -> None:
    figure, axes = new_figure(4)
    alone, shared = costs[costs.threads == 0], costs[costs.threads > 0]
    batches, images = alone[alone.images == 4 * alone.batch_size], alone[alone.batch_size == 64]
    panels = (batches, "batch_size", "s a step"), (batches, "batch_size", "MiB"), (images, "images", "s an epoch")
    for axis, (rows, x, y) in zip(axes, panels, strict=False):
        for method, own in rows.groupby("method", sort=False):
            axis.plot(own[x], own[y], "o-", label=method)
        axis.set(xlabel=x.replace("_", " "), ylabel=y, xlim=(0, None), ylim=(0, None))
        axis.legend()
    axes[-1].bar([f"{p.processes} x {p.threads}" for p in shared.itertuples()], shared["s a step"])
    axes[-1].set(xlabel="processes x threads", ylabel="s a step", title=shared.method.iloc[0])
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
    # one thread each, and all threads for one process
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
