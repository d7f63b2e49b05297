"""Results of curvature measurements: their summary, as text, and in files that can be read back."""

import csv
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from curvature.estimate import CurvatureEstimate, estimate_curvature
from curvature.folding import FoldedNetwork
from data.batches import Split, epoch_seed, to_pixels
from utils.distributed import gather_shares, own_share
from utils.errors import UserError, one_line
from utils.files import write_atomically, write_csv
from utils.progress import progress

QUANTITIES = {
    "gradient_norm": "gradient norm ||grad l||",
    "hessian_norm": "Hessian norm ||hess l||",
    "curvature": "normalized curvature C",
}
INTEGERS = {"index", "label", "predicted", "products"}
COLUMNS = ["index", "label", "predicted", "loss", *QUANTITIES, "eigenvalue", "residual", "products", "converged"]
INDICES_SHOWN = 5


@dataclass(frozen=True)
class ExampleTable:
    """Numbers of one model on the chosen examples of one split."""

    model: str  # the checkpoint's path, or the callable that made the model
    split: str  # train or test
    columns: dict[str, np.ndarray]  # name -> (N,)
    source: str = ""  # the result file it was read from

    def __len__(self) -> int:
        return len(self.columns["index"])

    def rows(self) -> list[dict]:
        """One dict per example: model, split and the columns."""
        columns = {name: column.tolist() for name, column in self.columns.items()}
        head = {"model": self.model, "split": self.split}
        return [head | dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


@dataclass(frozen=True)
class Measurement(ExampleTable):
    """Curvature; the columns are COLUMNS, and with --top-k and --trace-probes more."""

    def left_out(self) -> dict[str, np.ndarray]:
        """Reason -> (N,) mask of the examples for which C means nothing, and which no average may hide; one each.

        A gradient or Hessian of exactly 0 is a loss that has underflowed or does not depend on the pixels.
        """
        gradient, hessian = self.columns["gradient_norm"], self.columns["hessian_norm"]
        not_finite = ~(np.isfinite(gradient) & np.isfinite(hessian) & np.isfinite(self.columns["curvature"]))
        return {
            "not finite": not_finite,
            "zero gradient": ~not_finite & (gradient == 0),
            "zero Hessian": ~not_finite & (gradient != 0) & (hessian == 0),
        }

    def averaged(self) -> np.ndarray:
        """(N,) mask of the examples that enter averages and pictures: those not left out."""
        return ~np.any(list(self.left_out().values()), axis=0)


def distribution(values: np.ndarray) -> dict[str, float]:
    """Mean, standard deviation, median, 5 % and 95 % quantiles of (N,) values; NaN where there are none."""
    if not len(values):
        return dict.fromkeys(("mean", "sd", "median", "q05", "q95"), math.nan)
    values = values.astype(np.float64)
    low, median, high = np.quantile(values, [0.05, 0.5, 0.95])
    return {"mean": values.mean(), "sd": values.std(), "median": median, "q05": low, "q95": high}


def summarize(measurement: Measurement) -> dict:
    """What there is to say of one measurement, in plain numbers: examples, distributions, convergence."""
    columns, averaged = measurement.columns, measurement.averaged()
    summary: dict = {"examples": len(measurement), "averaged": int(averaged.sum())}
    summary["left_out"] = {reason: int(mask.sum()) for reason, mask in measurement.left_out().items()}
    summary |= {name: distribution(columns[name][averaged]) for name in QUANTITIES}
    for name, column in columns.items():
        if name.startswith(("eigenvalue_", "trace")):
            summary[name] = distribution(column[averaged & np.isfinite(column)])
    summary["accuracy"] = 100 * np.mean(columns["predicted"] == columns["label"])
    summary["worst_residual"] = columns["residual"][averaged].max(initial=0.0)
    summary["converged"] = int((columns["converged"] & averaged).sum())
    summary["products"] = int(columns["products"].sum())
    return {name: value.item() if isinstance(value, np.generic) else value for name, value in summary.items()}


def format_measurement(measurement: Measurement) -> str:
    """The summary for the screen."""
    summary = summarize(measurement)
    count, averaged, converged = summary["examples"], summary["averaged"], summary["converged"]
    titles = dict(QUANTITIES)
    titles |= {name: name.replace("_", " ") for name in summary if name.startswith(("eigenvalue_", "trace"))}
    titles |= {"trace_error": "  its standard error"} if "trace_error" in titles else {}
    head = f"  {measurement.split}, {count} examples, accuracy {summary['accuracy']:.2f} %"
    lines = [head, f"    {'':<26} {'mean +/- sd':<26} {'median':<13}{'5 %':<11} 95 %"]
    for name, title in titles.items():
        d = summary[name]
        spread = f"{d['mean']:.5g} +/- {d['sd']:.3g}"
        lines.append(f"    {title:<26} {spread:<26} {d['median']:<13.5g}{d['q05']:<11.4g} {d['q95']:.4g}")
    lines.append(
        f"    {converged} of {averaged} converged; worst relative residual {summary['worst_residual']:.2g}; "
        f"{summary['products']} Hessian-vector products, {summary['products'] / count:.3g} an example"
    )
    if not averaged:
        lines.append(
            "    nothing is left to average; where a loss has underflowed, weights saved in float64 can tell more"
        )
    if converged < averaged:
        lines.append("    the others' Hessian norms are lower bounds; a larger --num-power-iter brings them closer")
    for reason, mask in measurement.left_out().items():
        if mask.any():
            where = ", ".join(map(str, measurement.columns["index"][mask][:INDICES_SHOWN]))
            more = ", ..." if mask.sum() > INDICES_SHOWN else ""
            lines.append(f"    left out of these figures: {mask.sum()} with {reason} (index {where}{more})")
    return "\n".join(lines)


def model_names(measurements: Sequence[ExampleTable]) -> list[str]:
    """A short name for each measurement's model: its file's, as much longer as it takes to tell them apart."""

    def distinct(names: list[str]) -> bool:
        pairs = {(name, m.split) for name, m in zip(names, measurements, strict=True)}
        models = {(name, m.model) for name, m in zip(names, measurements, strict=True)}
        return len(pairs) == len(measurements) and len(models) == len(set(names))

    sources = [f" ({Path(m.source).name})" if m.source else "" for m in measurements]
    stems = [Path(m.model).stem for m in measurements]
    paths = [m.model for m in measurements]
    for names in (stems, paths, [a + b for a, b in zip(stems, sources, strict=True)]):
        if distinct(names):
            return names
    return [f"{m.model} ({m.source})" if m.source else m.model for m in measurements]


def comparison_table(measurements: Sequence[Measurement]) -> str:
    """All measurements side by side, a row for each: accuracy, means, and the median curvature."""
    names = model_names(measurements)
    width = max(map(len, ["model", *names]))
    titles = ("accuracy", "||grad l||", "||hess l||", "C", "median C", "converged")
    lines = [f"{'model':<{width}}  split  examples" + "".join(f"{title:>12}" for title in titles)]
    for name, m in zip(names, measurements, strict=True):
        summary = summarize(m)
        numbers = [summary[quantity]["mean"] for quantity in QUANTITIES] + [summary["curvature"]["median"]]
        cells = [f"{summary['accuracy']:.2f} %", *(f"{number:.4g}" for number in numbers)]
        cells.append(f"{summary['converged'] / max(1, summary['averaged']):.0%}")
        row = "".join(f"{cell:>12}" for cell in cells)
        lines.append(f"{name:<{width}}  {m.split:<5}  {summary['examples']:>8}{row}")
    for split in sorted({m.split for m in measurements}):
        if len({tuple(m.columns["index"]) for m in measurements if m.split == split}) > 1:
            lines.append(f"not all rows of the {split} split are of the same examples")
    return "\n".join(lines)


def strict_json(value):
    """Nested dicts and lists with None for every number JSON does not know."""
    if isinstance(value, dict):
        return {key: strict_json(item) for key, item in value.items()}
    if isinstance(value, list):
        return [strict_json(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_measurements(path: Path, measurements: Sequence[Measurement], settings: dict) -> None:
    """One row per model, split and example: as CSV, or with settings and summaries as JSON, as the path ends."""
    if path.suffix != ".json":
        write_csv(path, [row for m in measurements for row in m.rows()])
        return
    parts = [{"model": m.model, "split": m.split, "summary": summarize(m), "examples": m.rows()} for m in measurements]
    text = json.dumps(strict_json({"settings": settings, "measurements": parts}), indent=1, allow_nan=False)
    write_atomically(path, text.encode())


def as_column(name: str, values: Iterable) -> np.ndarray:
    """Numbers as read from a file; JSON's null and CSV's nan are NaN."""
    if name == "converged":
        return np.array([value in (True, "True") for value in values])
    numbers = [math.nan if value is None else float(value) for value in values]
    return np.array(numbers, dtype=np.int64 if name in INTEGERS else np.float64)


def read_measurements(path: Path) -> list[Measurement]:
    """What write_measurements wrote.

    Raises:
        UserError: if the file is missing, or is not such a file.
    """
    try:
        if path.suffix == ".json":
            parts = json.loads(path.read_text())["measurements"]
            rows = [row for part in parts for row in part["examples"]]
        else:
            with open(path, newline="") as file:
                rows = list(csv.DictReader(file))
        if not rows or (missing := {"model", "split", *COLUMNS} - rows[0].keys()):
            raise ValueError(f"no {', '.join(sorted(missing))}" if rows else "no rows")
        groups: dict[tuple[str, str], list[dict]] = {}
        for row in rows:
            groups.setdefault((str(row["model"]), str(row["split"])), []).append(row)
        return [
            Measurement(
                model,
                split,
                {n: as_column(n, [r[n] for r in group]) for n in group[0] if n not in ("model", "split")},
                str(path),
            )
            for (model, split), group in groups.items()
        ]
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); name a file that --output wrote") from error
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError, csv.Error) as error:
        raise UserError(f"{path}: not a result file that --output wrote ({one_line(error)})") from error


def example_generators(indices: Tensor, seed: int) -> list[torch.Generator]:
    """A random generator for each example, which only the seed and its position in the split decide: what is estimated
    does not depend on the batch, the order, or the process an example comes in."""
    return [torch.Generator().manual_seed(epoch_seed(seed, index)) for index in indices.tolist()]


def measure_split(
    model: nn.Module | FoldedNetwork,
    split: Split,
    indices: Tensor,
    dtype: torch.dtype,
    batch_size: int,
    seed: int,
    description: str = "",
    **settings,
) -> CurvatureEstimate:
    """estimate_curvature at some examples of a split, batch by batch; every process does its share of the batches.

    Args:
        model: measured as it is: see ``measurable``.
        indices: (n,) the examples' positions in the split.
        dtype: of the model.
        settings: passed on to ``estimate_curvature``.

    Returns:
        The estimate of all n examples in the order of ``indices``, on the CPU, on every process.
    """
    parts = own_share(list(indices.split(batch_size)))
    estimates = []
    for part in progress(parts, description, sum(map(len, parts)), "examples", size=len):
        batch = split[part.to(split.images.device)]
        generators = example_generators(part, seed)
        images = to_pixels(batch.images, dtype)
        estimates.append(estimate_curvature(model, images, batch.labels, generator=generators, **settings).to("cpu"))
    return CurvatureEstimate.concatenate(gather_shares(estimates))


def as_measurement(
    model: str | Path, split: str, indices: Tensor, labels: Tensor, estimate: CurvatureEstimate
) -> Measurement:
    """The columns of a result file, one row per example."""
    columns = {"index": indices, "label": labels}
    columns |= {name: getattr(estimate, name) for name in COLUMNS if name not in columns}
    for k in range(1, estimate.eigenvalues.shape[1]):
        columns[f"eigenvalue_{k + 1}"] = estimate.eigenvalues[:, k]
    if estimate.trace is not None:
        columns |= {"trace": estimate.trace, "trace_error": estimate.trace_error}
    return Measurement(str(model), split, {name: np.asarray(tensor) for name, tensor in columns.items()})
