"""The tables and figures of a comparison, from the files of its runs."""

import json
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from curvature.pictures import plot_results
from curvature.results import AT_CHANCE, QUANTITIES, averaged, read_results
from experiments.robustness import ATTACKS, STABILITY, plot_robustness
from utils.files import write_atomically
from utils.numerics import at_chance

# columns of table.csv, beside their standard deviations over seeds -> headings of table.md
COLUMNS = {"gradient_norm": "‖∇f‖", "hessian_norm": "‖∇²f‖", "curvature": "C"}
COLUMNS |= {"test_accuracy": "test accuracy, %", "cost": "training cost"}
COUNTS = ["examples", "averaged", "converged"]  # over all seeds


class Run(NamedTuple):
    """A training run and its measurements."""

    method: str
    folder: Path  # named by the seed

    @property
    def curvature(self) -> Path:
        return self.folder / "curvature.csv"

    @property
    def robustness(self) -> Path:
        return self.folder / "robustness.json"

    def is_finished(self) -> bool:
        """Whether it is trained and measured."""
        return self.curvature.exists() and self.robustness.exists()

    def results(self) -> pd.DataFrame:
        """A row an example, with the run's method and seed."""
        return read_results(self.curvature).assign(method=self.method, seed=self.folder.name)

    def training(self) -> dict:
        """The last test accuracy, and the median of the epochs' seconds."""
        metrics = pd.read_csv(*self.folder.glob("*_metrics.csv"))
        numbers = {"test_accuracy": metrics["test_accuracy"].iloc[-1], "seconds": metrics["seconds"].median()}
        return {"method": self.method, "seed": self.folder.name, **numbers}

    def report(self) -> dict:
        """What evaluate_robustness wrote: settings, and a summary of one model."""
        return json.loads(self.robustness.read_text())


def curvature_table(runs: list[Run]) -> pd.DataFrame:
    """table.csv: a row a method and split, with means over seeds of means over examples; at_chance counts seeds."""
    results = pd.concat([run.results() for run in runs])
    results = results.assign(examples=1, averaged=averaged(results))
    results["converged"] &= results["averaged"]
    results[list(QUANTITIES)] = results[list(QUANTITIES)].where(results["averaged"])
    by_seed = results.groupby(["method", "split", "seed"])
    chance = by_seed.apply(lambda rows: at_chance(100 * (rows["predicted"] == rows["label"]).mean(), rows["label"]))
    by_seed = by_seed.agg(dict.fromkeys(QUANTITIES, "mean") | dict.fromkeys(COUNTS, "sum")).assign(at_chance=chance)

    training = pd.DataFrame([run.training() for run in runs])
    standard = training[training["method"] == "Standard"].set_index("seed")["seconds"]
    training["cost"] = training["seconds"] / training["seed"].map(standard)
    groups = training.merge(by_seed.reset_index()).groupby(["method", "split"], sort=False)
    columns = {"seeds": ("seed", "size")}
    for name in COLUMNS:  # std: with n - 1, so NaN for one seed
        columns |= {name: (name, "mean"), f"{name}_sd": (name, "std")}
    columns |= {name: (name, "sum") for name in [*COUNTS, "at_chance"]}
    return groups.agg(**columns).reset_index()


def robustness_table(runs: list[Run]) -> pd.DataFrame:
    """robustness.csv: a row a method, measure (accuracy or stability), kind, and size of the change."""
    rows = []
    for run in runs:
        (summary,) = run.report()["models"]
        for attack, accuracies in summary["robust_accuracy"].items():
            by_eps = {"0": summary["accuracy"], **accuracies}
            rows += [(run.method, "accuracy", attack, eps, value) for eps, value in by_eps.items()]
        for quantity, changes in summary["stability"].items():
            rows += [(run.method, "stability", quantity, delta, change["mean"]) for delta, change in changes.items()]
    keys = ["method", "measure", "kind", "size"]
    table = pd.DataFrame(rows, columns=[*keys, "value"]).astype({"value": float})  # None where all gradients were zero
    return table.groupby(keys, sort=False)["value"].agg(seeds="count", mean="mean", mean_sd="std").reset_index()


def mean_and_sd(rows: pd.DataFrame, name: str) -> list[str]:
    """Cells "mean ± sd", or as much of it as there is."""
    cells = [f"{mean:.4g} ± {sd:.2g}" for mean, sd in zip(rows[name], rows[f"{name}_sd"], strict=True)]
    return [cell.removesuffix(" ± nan").replace("nan", "") for cell in cells]


def markdown(columns: dict[str, list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *zip(*columns.values(), strict=True)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def describe(runs: list[Run], settings: dict) -> str:
    """What was compared, for a caption."""
    training, size = settings["train_models.py, lcnn_gradreg"], settings["data"]["image_size"]
    counts = Counter(run.method for run in runs).values()
    seeds = " to ".join(map(str, sorted({min(counts), max(counts)})))
    versions = sorted({run.report()["settings"]["torch"] for run in runs})
    return (
        f"{training['model_arch'].removesuffix('lcnn')} on {training['dataset']} ({size} x {size}), "
        f"{training['num_epochs']} epochs, {seeds} seed{'' if max(counts) == 1 else 's'} a method, "
        f"torch {', '.join(versions)}. LCNN rows: --reg-beta {training['reg_beta']:g} --reg-gamma "
        f"{training['reg_gamma']:g}; penalties on gradients: --reg-gnorm {training['reg_gnorm']:g}; --reg-warmup "
        f"{training['reg_warmup']:g}."
    )


def curvature_markdown(table: pd.DataFrame, description: str) -> str:
    examples, averaged, converged = table[COUNTS].sum()
    caption = (
        f"{description} Means over examples, f being the loss; ± is the standard deviation over seeds. "
        "Test accuracy is over the whole test split; training cost is the time of an epoch relative to Standard's. "
        f"The curvature of {converged / max(1, averaged):.1%} of the examples converged"
    )
    caption += "; the others' is a lower bound." if converged < averaged else "."
    if averaged < examples:
        caption += f" Left out: {examples - averaged} whose gradient or Hessian is zero or not finite."
    parts = [caption]
    for split, rows in table.groupby("split"):
        count = (rows["examples"] // rows["seeds"]).max()
        cells = {name: mean_and_sd(rows, name) for name in COLUMNS}
        marked = zip(cells["test_accuracy"], rows["at_chance"], strict=True)
        cells["test_accuracy"] = [cell + " †" * (seeds > 0) for cell, seeds in marked]
        columns = {"method": rows["method"]} | {COLUMNS[name]: column for name, column in cells.items()}
        parts += [f"Gradient, Hessian and curvature at {count} {split} examples:", markdown(columns)]
        parts += [f"† At least one network {AT_CHANCE}."] if rows["at_chance"].any() else []
    return "\n\n".join(parts) + "\n"


def robustness_markdown(table: pd.DataFrame, description: str, settings: dict) -> str:
    attack = settings["evaluate_robustness.py"]
    parts = [f"{description} PGD: --pgd-steps {attack['pgd_steps']} --restarts {attack['restarts']}."]
    for (measure, kind), rows in table.groupby(["measure", "kind"], sort=False):
        title, symbol = f"Relative change of the {STABILITY.get(kind)}'s gradient under random changes", "delta"
        if measure == "accuracy":
            name, norm = kind.split("_")
            title, symbol = f"Accuracy in % under {ATTACKS[name][0]}, {norm}", "eps"
        columns = {f"{symbol} {size}": mean_and_sd(cells, "mean") for size, cells in rows.groupby("size", sort=False)}
        parts += [f"{title}:", markdown({"method": rows["method"].unique(), **columns})]
    return "\n\n".join(parts) + "\n"


def write_tables(folder: Path, runs: list[Run], settings: dict) -> None:
    """Write table.csv, table.md, robustness.csv and robustness.md."""
    curvature, robustness, description = curvature_table(runs), robustness_table(runs), describe(runs, settings)
    texts = {
        "table.csv": curvature.to_csv(index=False, lineterminator="\n"),
        "table.md": curvature_markdown(curvature, description),
        "robustness.csv": robustness.to_csv(index=False, lineterminator="\n"),
        "robustness.md": robustness_markdown(robustness, description, settings),
    }
    for name, text in texts.items():
        write_atomically(folder / name, text.encode())


def draw_figures(folder: Path, runs: list[Run]) -> None:
    """Draw curvature.png and robustness.png, over the test examples of all seeds."""
    results = pd.concat([run.results() for run in runs]).query("split == 'test'")
    plot_results(folder / "curvature.png", list(results.groupby("method", sort=False)))
    examined = pd.concat([pd.read_csv(run.robustness.with_suffix(".csv")).assign(method=run.method) for run in runs])
    plot_robustness(folder / "robustness.png", examined.groupby("method", sort=False))
