"""Results of measurements: DataFrames with a row an example, their summary as text, and files that can be read back.

The columns are ``COLUMNS``; with --top-k also eigenvalue_2, ..., with --trace-probes ``PROBED`` and their _error.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd

from utils.errors import UserError, one_line
from utils.files import write_atomically
from utils.numerics import at_chance

QUANTITIES = {
    "gradient_norm": "gradient norm ||grad l||",
    "hessian_norm": "Hessian norm ||hess l||",
    "curvature": "normalized curvature C",
}
# model is the checkpoint's path, or the callable that made the network; split is train or test
COLUMNS = {"model": "str", "split": "str", **dict.fromkeys(("index", "label", "predicted"), "int64")}
COLUMNS |= dict.fromkeys(("loss", *QUANTITIES, "eigenvalue", "residual"), "float64")
COLUMNS |= {"products": "int64", "converged": "bool"}
PROBED = ("trace", "curvature_score", "frobenius_norm")
LEFT_OUT = ("not finite", "zero gradient", "zero Hessian")
INDICES_SHOWN = 5
AT_CHANCE = "at chance: no better, within two standard errors, than always answering the most frequent label; "
AT_CHANCE += "little curvature is no merit there"


def left_out(results: pd.DataFrame) -> pd.Series:
    """Why an example enters no average, one of ``LEFT_OUT``; "" for those that do.

    A gradient or Hessian of exactly 0 is a loss that has underflowed or does not depend on the pixels.
    """
    finite = np.isfinite(results[list(QUANTITIES)]).all(axis=1)
    reasons = np.select([~finite, results["gradient_norm"] == 0, results["hessian_norm"] == 0], LEFT_OUT, default="")
    return pd.Series(reasons, index=results.index)


def averaged(results: pd.DataFrame) -> pd.Series:
    """Whether an example enters averages and pictures."""
    return left_out(results) == ""


def distribution(values: pd.Series) -> dict[str, float]:
    """Mean, standard deviation, median, 5 % and 95 % quantiles of the finite values; NaN where there are none."""
    values = values[np.isfinite(values)]
    low, median, high = values.quantile([0.05, 0.5, 0.95])
    return {"mean": values.mean(), "sd": values.std(ddof=0), "median": median, "q05": low, "q95": high}


def summarize(results: pd.DataFrame) -> dict:
    """Examples, distributions and convergence of the rows of one model and split, in plain numbers."""
    reasons = left_out(results)
    kept = results[reasons == ""]
    accuracy = 100 * float((results["predicted"] == results["label"]).mean())
    measured = [*QUANTITIES, *results.filter(regex=f"^(eigenvalue_|{'|'.join(PROBED)})")]
    return {
        "examples": len(results),
        "averaged": len(kept),
        "left_out": {reason: int((reasons == reason).sum()) for reason in LEFT_OUT},
        **{name: distribution(kept[name]) for name in measured},
        "accuracy": accuracy,
        "at_chance": at_chance(accuracy, results["label"]),
        "worst_residual": max(kept["residual"], default=0.0),
        "converged": int(kept["converged"].sum()),
        "products": int(results["products"].sum()),
    }


def format_summary(results: pd.DataFrame) -> str:
    """The summary of the rows of one model and split for the screen."""
    summary = summarize(results)
    count, kept, converged = summary["examples"], summary["averaged"], summary["converged"]
    lines = [f"  {results['split'].iloc[0]}, {count} examples, accuracy {summary['accuracy']:.2f} %"]
    lines += [AT_CHANCE] if summary["at_chance"] else []
    lines.append(f"{'':<26} {'mean +/- sd':<26} {'median':<13}{'5 %':<11} 95 %")
    titles = QUANTITIES | {f"{name}_error": "  its standard error" for name in PROBED}
    for name, d in summary.items():
        if (
            isinstance(d, dict) and "mean" in d and (name in QUANTITIES or pd.notna(d["mean"]))
        ):  # one probe has no error
            title, spread = titles.get(name, name.replace("_", " ")), f"{d['mean']:.5g} +/- {d['sd']:.3g}"
            lines.append(f"{title:<26} {spread:<26} {d['median']:<13.5g}{d['q05']:<11.4g} {d['q95']:.4g}")
    cost = f"{summary['products']} Hessian-vector products, {summary['products'] / count:.3g} an example"
    lines.append(f"{converged} of {kept} converged; worst relative residual {summary['worst_residual']:.2g}; {cost}")
    if not kept:
        lines.append("nothing is left to average; where a loss has underflowed, weights saved in float64 can tell more")
    if converged < kept:
        lines.append("the others' Hessian norms are lower bounds; a larger --num-power-iter brings them closer")
    for reason, number in summary["left_out"].items():
        if number:
            indices = results["index"][left_out(results) == reason]
            where = ", ".join(map(str, indices[:INDICES_SHOWN])) + (", ..." if number > INDICES_SHOWN else "")
            lines.append(f"left out of these figures: {number} with {reason} (index {where})")
    return "\n    ".join(lines)


def short_names(models: Iterable[str]) -> dict[str, str]:
    """A name for each model: the end of its path without ".pt", with as many folders as tell it from the others."""
    paths = {model: Path(re.sub(r"\.\w+$", "", model)).parts for model in models}
    ends = {model: [str(Path(*p[-length:])) for length in range(1, len(p) + 1)] for model, p in paths.items()}
    counts = Counter(end for own in ends.values() for end in own)
    return {model: next((end for end in own if counts[end] == 1), model) for model, own in ends.items()}


def named(results: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """The rows of each model and split, with a short name for the model.

    A column "source", if there is one, tells models of one name apart: the result file a row was read from.
    """
    results = results.assign(source=results.get("source", "")).fillna({"source": ""})
    models = results[["model", "source"]].drop_duplicates()
    names = models["model"].map(short_names(models["model"]))
    files = models["source"].map(lambda source: source and f" ({Path(source).name})")
    paths = models["source"].map(lambda source: source and f" ({source})")
    models["name"] = next(choice for choice in (names, names + files, names + paths) if choice.is_unique)
    groups = results.merge(models).groupby(["source", "model", "name", "split"], sort=False)
    return [(name, rows) for (_, _, name, _), rows in groups]


def comparison_table(results: pd.DataFrame) -> str:
    """All models and splits side by side, a row for each: accuracy, means, and the median curvature."""
    groups = [(name, rows, summarize(rows)) for name, rows in named(results)]
    width = max(len("model"), *(len(name) for name, *_ in groups))
    heads = ("accuracy", "||grad l||", "||hess l||", "C", "median C", "converged")
    lines = [f"{'model':<{width}}  split  examples" + "".join(f"{head:>12}" for head in heads)]
    for name, rows, summary in groups:
        numbers = [summary[quantity]["mean"] for quantity in QUANTITIES] + [summary["curvature"]["median"]]
        mark = "*" if summary["at_chance"] else " "
        cells = [f"{summary['accuracy']:.2f} %{mark}", *(f"{number:.4g}" for number in numbers)]
        cells.append(f"{summary['converged'] / max(1, summary['averaged']):.0%}")
        row = "".join(f"{cell:>12}" for cell in cells)
        lines.append(f"{name:<{width}}  {rows['split'].iloc[0]:<5}  {len(rows):>8}{row}")
    lines += [f"* {AT_CHANCE}"] if any(summary["at_chance"] for *_, summary in groups) else []
    for split in sorted(set(results["split"])):
        if len({tuple(rows["index"]) for _, rows, _ in groups if rows["split"].iloc[0] == split}) > 1:
            lines.append(f"not all rows of the {split} split are of the same examples")
    return "\n".join(lines)


def write_rows(path: Path, results: pd.DataFrame) -> None:
    """A CSV whose numbers are read back exactly."""
    write_atomically(path, results.to_csv(index=False, na_rep="nan", lineterminator="\n").encode())


def write_json(path: Path, content: dict) -> None:
    """JSON with null for every number it does not know; paths and devices as text."""
    content = json.loads(json.dumps(content, default=str), parse_constant=lambda constant: None)
    write_atomically(path, json.dumps(content, indent=1).encode())


def write_results(path: Path, results: pd.DataFrame, settings: dict) -> None:
    """One row per model, split and example: as CSV, or with settings and summaries as JSON, as the path ends."""
    if path.suffix != ".json":
        write_rows(path, results)
        return
    parts = [
        {"model": model, "split": split, "summary": summarize(rows), "examples": rows.to_dict("records")}
        for (model, split), rows in results.groupby(["model", "split"], sort=False)
    ]
    write_json(path, {"settings": settings, "measurements": parts})


def read_results(path: Path) -> pd.DataFrame:
    """What write_results wrote.

    Raises:
        UserError: if the file is missing, or is not such a file.
    """
    try:
        if path.suffix == ".json":
            parts = json.loads(path.read_text())["measurements"]
            results = pd.DataFrame([row for part in parts for row in part["examples"]])
        else:
            results = pd.read_csv(path, dtype="str")  # astype reads numbers exactly, which not every read_csv does
            results["converged"] = results["converged"] == "True"
        if results.empty:
            raise ValueError("no rows")
        return results.astype(dict.fromkeys(results, "float64") | COLUMNS)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); name a file that --output wrote") from error
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise UserError(f"{path}: not a result file that --output wrote ({one_line(error)})") from error
