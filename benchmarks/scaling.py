"""How the cost of training grows: with the batch, with the number of images, with processes; with a picture.

    python benchmarks/scaling.py --output benchmarks/scaling.png

Each point trains one epoch on random images in new processes, after a step that does not count. Every round visits
every point, and the median counts. Memory is the peak above the network and its images.
"""

import os
import sys
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.measure import DEVICE, in_new_process, machine, peak_memory, seconds_of, show
from benchmarks.train import CLASSES, SIZE, Training, method_flags
from data.batches import Split, training_batches
from training.epoch import train_epoch
from utils import cli, distributed
from utils.plots import new_figure, save_figure
from utils.precision import denormals_flushed

METHODS = {"Standard": "standard", "LCNN + GradReg": "lcnn_gradreg"}
BATCH_SIZES = (16, 32, 64, 128)  # 4 steps of each
IMAGES = (256, 512)  # in batches of 64
SHARES = ((1, 1), (2, 1), (1, 2))  # processes, and threads of each, for a batch of 64


class Point(NamedTuple):
    method: str
    images: int
    batch_size: int
    processes: int = 1
    threads: int = 0  # of each process; 0: all cores


def measure(point: Point) -> tuple[float, float]:
    """Seconds of an epoch, and MiB."""
    flags = method_flags(1, METHODS[point.method])
    with distributed.process_group(flags.device), denormals_flushed():  # as in training
        training = Training(flags)
        images = torch.randint(0, 256, (point.images, 3, SIZE, SIZE), dtype=torch.uint8)
        split = Split(images, torch.arange(point.images) % CLASSES).to(flags.device)
        share = {"rank": distributed.rank(), "world_size": distributed.world_size()}
        seconds = []

        def epoch(split: Split) -> None:
            batches = training_batches(split, point.batch_size, seed=0, epoch=1, **share)
            train_epoch(training.training_step, training.optimizer, batches)

        def a_step_and_an_epoch() -> None:
            epoch(split[: point.batch_size])
            seconds.append(seconds_of(lambda: epoch(split)))

        memory = peak_memory(a_step_and_an_epoch)
        return seconds[0], memory


def cost(point: Point) -> dict:
    os.environ["OMP_NUM_THREADS"] = str(point.threads or os.cpu_count())
    seconds, memory = in_new_process(measure, point, processes=point.processes)
    steps = -(-point.images // point.batch_size)
    return point._asdict() | {"s a step": seconds / steps, "s an epoch": seconds, "MiB": memory}


def plot(path: Path, costs: pd.DataFrame) -> None:
    figure, axes = new_figure(4)
    alone, shared = costs[costs.threads == 0], costs[costs.threads > 0]
    batches, images = alone[alone.images == 4 * alone.batch_size], alone[alone.batch_size == 64]
    panels = (batches, "batch_size", "s a step"), (batches, "batch_size", "MiB"), (images, "images", "s an epoch")
    for axis, (rows, x, y) in zip(axes, panels, strict=False):
        lines = rows.pivot(index=x, columns="method", values=y)[list(METHODS)]
        lines.plot(ax=axis, style="o-", xlabel=x.replace("_", " "), ylabel=y, xlim=(0, None), ylim=(0, None))
    axes[-1].bar([f"{p.processes} x {p.threads}" for p in shared.itertuples()], shared["s a step"])
    axes[-1].set(xlabel="processes x threads", ylabel="s a step", title=shared.method.iloc[0])
    save_figure(figure, path)


def main() -> None:
    parser = cli.Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="timings of each point")
    parser.add_argument("--output", type=Path, default=Path("scaling.png"), help="the picture")
    flags = parser.parse_args()
    points = [Point(method, 4 * size, size) for method in METHODS for size in BATCH_SIZES]
    points += [Point(method, images, 64) for method in METHODS for images in IMAGES]
    points += [Point("LCNN + GradReg", 256, 64, *share) for share in SHARES]
    costs = pd.DataFrame([cost(point) for _ in range(flags.rounds) for point in dict.fromkeys(points)])
    costs = costs.groupby(list(Point._fields), sort=False, as_index=False).median()
    print(f"{machine()}, {DEVICE}, {os.cpu_count()} cores, {flags.rounds} rounds")
    show(costs.set_index("method"), "{:.3g}")
    plot(flags.output, costs)
    print(f"saved {flags.output}")


if __name__ == "__main__":
    main()
