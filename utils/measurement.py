"""Measuring a whole split: choosing its examples, going through them in batches, and reporting."""

import csv
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from data.batches import Split, batches
from utils.checkpoint import write_atomically
from utils.curvature import CurvatureEstimate, estimate_curvature
from utils.progress import progress

QUANTITIES = {
    "gradient_norm": "gradient norm ||grad l||",
    "hessian_norm": "Hessian norm ||hess l||",
    "curvature": "normalized curvature C",
}


@dataclass(frozen=True)
class Measurement:
    """One model on the chosen examples of one split."""

    model: str  # the checkpoint's path
    split: str  # train or test
    test_accuracy: float  # percent, on the whole test split
    indices: Tensor  # (N,) positions in the split
    labels: Tensor  # (N,)
    estimate: CurvatureEstimate  # of (N,) tensors, on the CPU


def choose_examples(num_examples: int, fraction: float, generator: torch.Generator) -> Tensor:
    """round(fraction * n) of the n examples, at least 1, at random: positions, each at most once, increasing."""
    count = max(1, round(fraction * num_examples))
    return torch.randperm(num_examples, generator=generator)[:count].sort().values


def measure_split(
    model: nn.Module,
    split: Split,
    batch_size: int,
    num_iterations: int,
    generator: torch.Generator,
    description: str = "",
) -> CurvatureEstimate:
    """estimate_curvature on every example of a split, in its order, batch by batch; the result is on the CPU."""
    num_batches = -(-len(split) // batch_size)
    dtype = next(model.parameters()).dtype
    estimates = [
        estimate_curvature(model, images, labels, num_iterations=num_iterations, generator=generator)
        for images, labels in progress(batches(split, batch_size, dtype), description, num_batches, "batches")
    ]
    return CurvatureEstimate.concatenate(estimates).to("cpu")


def summarize(values: Tensor) -> dict[str, float]:
    """Mean, standard deviation and median of the finite ones among (N,) values."""
    values = values[values.isfinite()].double()
    if not len(values):
        return {"mean": float("nan"), "sd": float("nan"), "median": float("nan")}
    return {"mean": float(values.mean()), "sd": float(values.std(correction=0)), "median": float(np.median(values))}


def format_measurement(measurement: Measurement) -> str:
    """Mean, sd and median of the three quantities, the number of examples, and how converged they are."""
    estimate = measurement.estimate
    lines = [f"  {measurement.split}, {len(estimate)} examples"]
    for name, title in QUANTITIES.items():
        s = summarize(getattr(estimate, name))
        lines.append(f"    {title:<26} {s['mean']:.6g} +/- {s['sd']:.3g}, median {s['median']:.6g}")
    residual = estimate.residual
    lines.append(f"    relative residual          median {np.nanmedian(residual):.2g}, worst {residual.max():.2g}")
    bad = int((~estimate.curvature.isfinite()).sum())
    if bad:
        where = measurement.indices[~estimate.curvature.isfinite()][:5].tolist()
        lines.append(f"    {bad} examples are not finite and are left out of the above, first at {where}")
    return "\n".join(lines)


def model_names(measurements: list[Measurement]) -> list[str]:
    """A name for each measurement's model: its file's, or the whole path where two files have the same."""
    paths = {m.model for m in measurements}
    distinct = len({Path(path).stem for path in paths}) == len(paths)
    return [Path(m.model).stem if distinct else m.model for m in measurements]


def labelled_curvatures(measurements: list[Measurement]) -> list[tuple[str, np.ndarray]]:
    """What plot_curvature draws: a label and the (N,) normalized curvatures of each measurement."""
    names = model_names(measurements)
    return [(f"{name}\n{m.split}", m.estimate.curvature.numpy()) for name, m in zip(names, measurements, strict=True)]


def comparison_table(measurements: list[Measurement]) -> str:
    """Every model's means and median curvature side by side: a row per model and split."""
    names = model_names(measurements)
    width = max(map(len, names))
    lines = [f"{'model':<{width}}  split  test accuracy  ||grad l||  ||hess l||           C    median C"]
    for name, m in zip(names, measurements, strict=True):
        accuracy = f"{m.test_accuracy:.2f} %" if m.split == "test" else ""
        means = [summarize(getattr(m.estimate, quantity))["mean"] for quantity in QUANTITIES]
        numbers = [*means, summarize(m.estimate.curvature)["median"]]
        row = "".join(f"{number:>12.4g}" for number in numbers)
        lines.append(f"{name:<{width}}  {m.split:<5}  {accuracy:>13}{row}")
    return "\n".join(lines)


def write_measurements(path: Path, measurements: list[Measurement]) -> None:
    """One CSV row per model, split and example; written atomically."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["model", "split", "index", "label", *QUANTITIES, "residual"])
    for m in measurements:
        columns = [m.indices, m.labels, *(getattr(m.estimate, name) for name in QUANTITIES), m.estimate.residual]
        writer.writerows([m.model, m.split, *row] for row in zip(*(c.tolist() for c in columns), strict=True))
    write_atomically(path, lambda file: file.write(text.getvalue().encode()))
