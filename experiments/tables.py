"""The tables and figures of a comparison, from the files of its runs."""

import csv
import json
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from curvature.pictures import plot_measurements
from curvature.results import QUANTITIES, Measurement, read_measurements, summarize
from experiments.robustness import ATTACKS, STABILITY, plot_robustness
from utils.errors import UserError
from utils.files import write_atomically, write_csv

# columns of table.csv, each followed by its standard deviation over seeds, and their headings in table.md
COLUMNS = {
    "gradient_norm": "‖∇f‖",
    "hessian_norm": "‖∇²f‖",
    "curvature": "C",
    "test_accuracy": "test accuracy, %",
    "cost": "training cost",
}


@dataclass(frozen=True)
class Run:
    """The files of one training run and of its measurements."""

    folder: Path

    @property
    def curvature(self) -> Path:
        return self.folder / "curvature.csv"

    @property
    def robustness(self) -> Path:
        return self.folder / "robustness.json"

    def is_finished(self) -> bool:
        """Whether it is trained and measured: both files are written as a whole, and after training."""
        return self.curvature.exists() and self.robustness.exists()

    def measurements(self) -> list[Measurement]:
        """One for each split."""
        return read_measurements(self.curvature)

    def report(self) -> dict:
        """What evaluate_robustness.py wrote: its settings, and what it found."""
        try:
            return json.loads(self.robustness.read_text())
        except (OSError, ValueError) as error:
            raise UserError(f"{self.robustness} cannot be read; delete it, and it is made again") from error

    def robustness_summary(self) -> dict:
        """accuracy; robust_accuracy by attack and eps; stability by kind and delta. See experiments/robustness.py."""
        (model,) = self.report()["models"]
        return {name: model[name] for name in ("accuracy", "robust_accuracy", "stability")}

    def metrics(self) -> list[dict[str, str]]:
        """One row for each epoch."""
        (path,) = self.folder.glob("*_metrics.csv")
        with open(path, newline="") as file:
            return list(csv.DictReader(file))

    def seconds_per_epoch(self) -> float:
        return statistics.median(float(row["seconds"]) for row in self.metrics())


Runs = dict[str, list[Run]]  # method -> its runs, one for each seed


def mean_and_sd(name: str, values: Sequence[float]) -> dict[str, float | str]:
    """Two cells of a table: the mean, and the standard deviation over seeds (n - 1); empty where there is none."""
    values = [value for value in values if math.isfinite(value)]  # NaN: a seed with nothing to average
    return {
        name: statistics.fmean(values) if values else "",
        f"{name}_sd": statistics.stdev(values) if len(values) > 1 else "",
    }


def format_mean_and_sd(row: dict, name: str) -> str:
    """mean ± sd in a cell for the reader."""
    mean, sd = row[name], row[f"{name}_sd"]
    return "" if mean == "" else f"{mean:.4g}" if sd == "" else f"{mean:.4g} ± {sd:.2g}"


def markdown_table(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    heads = list(heads)
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def curvature_rows(runs: Runs) -> list[dict]:
    """A row of table.csv for each method and split; every number is a mean over examples first, then over seeds."""
    standard = {run.folder.name: run.seconds_per_epoch() for run in runs.get("Standard", [])}
    rows = []
    for method, of_method in runs.items():
        accuracies = [float(run.metrics()[-1]["test_accuracy"]) for run in of_method]
        costs = [
            run.seconds_per_epoch() / standard[run.folder.name] for run in of_method if run.folder.name in standard
        ]
        measurements = [measurement for run in of_method for measurement in run.measurements()]
        for split in sorted({m.split for m in measurements}):  # test, train
            summaries = [summarize(m) for m in measurements if m.split == split]
            row = {"method": method, "split": split, "seeds": len(of_method)}
            for quantity in QUANTITIES:
                row |= mean_and_sd(quantity, [summary[quantity]["mean"] for summary in summaries])
            row |= mean_and_sd("test_accuracy", accuracies) | mean_and_sd("cost", costs)
            rows.append(row | {name: sum(s[name] for s in summaries) for name in ("examples", "averaged", "converged")})
    return rows


def flattened(summary: dict) -> dict[tuple[str, str, str], float | None]:
    """(accuracy or stability, kind of it, size of the change) -> number; None where all gradients were zero."""
    cells = {}
    for attack, accuracies in summary["robust_accuracy"].items():
        cells |= {("accuracy", attack, eps): value for eps, value in {"0": summary["accuracy"], **accuracies}.items()}
    for kind, changes in summary["stability"].items():
        cells |= {("stability", kind, delta): change["mean"] for delta, change in changes.items()}
    return cells


def robustness_rows(runs: Runs) -> list[dict]:
    """A row of robustness.csv for each method and key of ``flattened``."""
    rows = []
    for method, of_method in runs.items():
        found = [flattened(run.robustness_summary()) for run in of_method]
        for measure, kind, size in found[0]:
            values = [cells[measure, kind, size] for cells in found]
            known = [value for value in values if value is not None]
            head = {"method": method, "measure": measure, "kind": kind, "size": size, "seeds": len(known)}
            rows.append(head | mean_and_sd("mean", known))
    return rows


def describe(runs: Runs, settings: dict) -> str:
    """What was compared, in a line for a caption."""
    training = settings["train_models.py, standard"]
    counts = sorted({len(of_method) for of_method in runs.values()})
    seeds = " to ".join(map(str, dict.fromkeys((counts[0], counts[-1]))))
    versions = {run.report()["settings"]["torch"] for of_method in runs.values() for run in of_method}
    size = settings["data"]["image_size"]
    return (
        f"{training['model_arch']} on {training['dataset']} ({size} x {size}), {training['num_epochs']} epochs, "
        f"{seeds} seed{'' if counts[-1] == 1 else 's'} a method, torch {', '.join(sorted(versions))}."
    )


def curvature_markdown(runs: Runs, rows: list[dict], settings: dict) -> str:
    """table.md from the rows of table.csv."""
    examples, averaged, converged = (sum(row[name] for row in rows) for name in ("examples", "averaged", "converged"))
    caption = (
        f"{describe(runs, settings)} Means over examples, f being the loss; ± is the standard deviation over seeds. "
        "Test accuracy is over the whole test split; training cost is the time of an epoch relative to Standard's. "
        f"The curvature of {converged / max(1, averaged):.1%} of the examples converged"
    )
    caption += "; the others' is a lower bound." if converged < averaged else "."
    if averaged < examples:
        caption += f" Left out: {examples - averaged} whose gradient or Hessian is zero or not finite."
    parts = [caption]
    for split in sorted({row["split"] for row in rows}):
        of_split = [row for row in rows if row["split"] == split]
        count = max(row["examples"] // row["seeds"] for row in of_split)
        parts.append(f"Gradient, Hessian and curvature at {count} {split} examples:")
        cells = ([row["method"], *(format_mean_and_sd(row, name) for name in COLUMNS)] for row in of_split)
        parts.append(markdown_table(["method", *COLUMNS.values()], cells))
    return "\n\n".join(parts) + "\n"


def robustness_markdown(runs: Runs, rows: list[dict], settings: dict) -> str:
    """robustness.md from the rows of robustness.csv."""
    attack = settings["evaluate_robustness.py"]
    parts = [f"{describe(runs, settings)} PGD: --pgd-steps {attack['pgd_steps']} --restarts {attack['restarts']}."]
    for measure, kind in dict.fromkeys((row["measure"], row["kind"]) for row in rows):
        cells = {(r["method"], r["size"]): r for r in rows if (r["measure"], r["kind"]) == (measure, kind)}
        sizes = list(dict.fromkeys(size for _, size in cells))
        if measure == "accuracy":
            name, norm = kind.split("_")
            title, symbol = f"Accuracy in % under {ATTACKS[name][0]}, {norm}", "eps"
        else:
            title, symbol = f"Relative change of the {STABILITY[kind]}'s gradient under random changes", "delta"
        parts.append(f"{title}:")
        body = ([method, *(format_mean_and_sd(cells[method, size], "mean") for size in sizes)] for method in runs)
        parts.append(markdown_table(["method", *(f"{symbol} {size}" for size in sizes)], body))
    return "\n\n".join(parts) + "\n"


def write_tables(folder: Path, runs: Runs, settings: dict) -> None:
    """table.csv, table.md, robustness.csv and robustness.md of the finished runs."""
    makers: dict[str, tuple[Callable, Callable]] = {
        "table": (curvature_rows, curvature_markdown),
        "robustness": (robustness_rows, robustness_markdown),
    }
    for name, (make_rows, make_text) in makers.items():
        rows = make_rows(runs)
        write_csv(folder / f"{name}.csv", rows)
        text = make_text(runs, rows, settings)
        write_atomically(folder / f"{name}.md", text.encode())


def pooled(measurements: Sequence[Measurement]) -> Measurement:
    """The examples of all seeds as one measurement."""
    columns = {name: np.concatenate([m.columns[name] for m in measurements]) for name in measurements[0].columns}
    return Measurement(measurements[0].model, measurements[0].split, columns)


def over_seeds(values: Sequence):
    """The mean of numbers, or of nested dicts of them."""
    if isinstance(values[0], dict):
        return {key: over_seeds([value[key] for value in values]) for key in values[0]}
    return statistics.fmean(math.nan if value is None else value for value in values)


def draw_figures(folder: Path, runs: Runs) -> None:
    """curvature.png, distributions over the test examples of all seeds; robustness.png, accuracy under attack."""
    tests = {
        method: pooled([m for run in of_method for m in run.measurements() if m.split == "test"])
        for method, of_method in runs.items()
    }
    plot_measurements(folder / "curvature.png", list(tests.items()))
    summaries = [over_seeds([run.robustness_summary() for run in of_method]) for of_method in runs.values()]
    plot_robustness(folder / "robustness.png", list(runs), summaries)
