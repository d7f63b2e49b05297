"""Results of measurements: DataFrames with one row an example, their summary as text, and files that can be read back.

The columns are model (the checkpoint's path, or the callable that made the model), split (train or test) and those of
``COLUMNS``; with --top-k and --trace-probes also eigenvalue_2, ..., trace and trace_error.
"""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from data.batches import Split, epoch_seed, to_pixels
from utils.distributed import gather_shares, own_share
from utils.errors import UserError, one_line
from utils.files import write_atomically
from utils.progress import progress

QUANTITIES = {
    "gradient_norm": "gradient norm ||grad l||",
    "hessian_norm": "Hessian norm ||hess l||",
    "curvature": "normalized curvature C",
}
COLUMNS = ["index", "label", "predicted", "loss", *QUANTITIES, "eigenvalue", "residual", "products", "converged"]
INTEGERS = ("index", "label", "predicted", "products")
LEFT_OUT = ("not finite", "zero gradient", "zero Hessian")
INDICES_SHOWN = 5


def for_examples(
    split: Split,
    indices: Tensor,
    batch_size: int,
    dtype: torch.dtype,
    seed: int,
    description: str,
    measure: Callable[[Tensor, Tensor, list[torch.Generator]], dict[str, Tensor]],
) -> pd.DataFrame:
    """Measure some examples of a split, batch by batch; every process does its share of the batches.

    Args:
        indices: (n,) the examples' positions in the split.
        dtype: of the pixels that ``measure`` is given.
        description: stands beside the progress.
        measure: images (N, ...), labels (N,) and N generators -> named columns (N,). Only the seed and the example's
            position decide a generator: no result depends on the batch, the order or the process.

    Returns:
        On every process, n rows in the order of ``indices``: index, label and the columns, numbers in float64.
    """
    parts = own_share(list(indices.split(batch_size)))
    tables = []
    for part in progress(parts, description, sum(map(len, parts)), "examples", size=len):
        batch = split[part.to(split.images.device)]
        generators = [torch.Generator().manual_seed(epoch_seed(seed, index)) for index in part.tolist()]
        columns = {"index": part, "label": batch.labels}
        columns |= measure(to_pixels(batch.images, dtype), batch.labels, generators)
        tables.append(pd.DataFrame({name: column.cpu().numpy() for name, column in columns.items()}))
    results = pd.concat(gather_shares(tables), ignore_index=True)
    return results.astype(dict.fromkeys(results.select_dtypes("floating"), "float64"))


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
    """Mean, standard deviation, median, 5 % and 95 % quantiles; NaN where there are no values."""
    low, median, high = values.quantile([0.05, 0.5, 0.95])
    return {"mean": values.mean(), "sd": values.std(ddof=0), "median": median, "q05": low, "q95": high}


def summarize(results: pd.DataFrame) -> dict:
    """Examples, distributions and convergence of the rows of one model and split, in plain numbers."""
    reasons = left_out(results)
    kept = results[reasons == ""]
    summary: dict = {"examples": len(results), "averaged": len(kept)}
    summary["left_out"] = {reason: int((reasons == reason).sum()) for reason in LEFT_OUT}
    for name in [*QUANTITIES, *results.filter(regex="^(eigenvalue_|trace)")]:
        summary[name] = distribution(kept[name][np.isfinite(kept[name])])
    summary["accuracy"] = 100 * float((results["predicted"] == results["label"]).mean())
    summary["worst_residual"] = max(kept["residual"], default=0.0)
    summary["converged"] = int(kept["converged"].sum())
    summary["products"] = int(results["products"].sum())
    return summary


def format_summary(results: pd.DataFrame) -> str:
    """The summary of the rows of one model and split for the screen."""
    summary = summarize(results)
    count, num_averaged, converged = summary["examples"], summary["averaged"], summary["converged"]
    lines = [f"  {results['split'].iloc[0]}, {count} examples, accuracy {summary['accuracy']:.2f} %"]
    lines.append(f"    {'':<26} {'mean +/- sd':<26} {'median':<13}{'5 %':<11} 95 %")
    titles = QUANTITIES | {"trace_error": "  its standard error"}
    for name, d in summary.items():
        if isinstance(d, dict) and "mean" in d:
            spread = f"{d['mean']:.5g} +/- {d['sd']:.3g}"
            title = titles.get(name, name.replace("_", " "))
            lines.append(f"    {title:<26} {spread:<26} {d['median']:<13.5g}{d['q05']:<11.4g} {d['q95']:.4g}")
    lines.append(
        f"    {converged} of {num_averaged} converged; worst relative residual {summary['worst_residual']:.2g}; "
        f"{summary['products']} Hessian-vector products, {summary['products'] / count:.3g} an example"
    )
    if not num_averaged:
        lines.append(
            "    nothing is left to average; where a loss has underflowed, weights saved in float64 can tell more"
        )
    if converged < num_averaged:
        lines.append("    the others' Hessian norms are lower bounds; a larger --num-power-iter brings them closer")
    for reason, number in summary["left_out"].items():
        if number:
            indices = results["index"][left_out(results) == reason]
            where = ", ".join(map(str, indices[:INDICES_SHOWN])) + (", ..." if number > INDICES_SHOWN else "")
            lines.append(f"    left out of these figures: {number} with {reason} (index {where})")
    return "\n".join(lines)


def named(results: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """The rows of each model and split, with a short name for the model: its file's, longer where others share it.

    A column "source" tells models of one name apart: the result file a row was read from, or "".
    """
    groups = list(results.assign(source=results.get("source", "")).groupby(["source", "model", "split"], sort=False))
    keys = [key for key, _ in groups]
    for names in (
        [Path(model).stem for _, model, _ in keys],
        [model for _, model, _ in keys],
        [Path(model).stem + (f" ({Path(source).name})" if source else "") for source, model, _ in keys],
        [model + (f" ({source})" if source else "") for source, model, _ in keys],
    ):
        rows = {(name, split) for name, (_, _, split) in zip(names, keys, strict=True)}
        models = {(name, model) for name, (_, model, _) in zip(names, keys, strict=True)}
        if len(rows) == len(keys) and len(models) == len(set(names)):
            break
    return [(name, rows) for name, (_, rows) in zip(names, groups, strict=True)]


def comparison_table(results: pd.DataFrame) -> str:
    """All models and splits side by side, a row for each: accuracy, means, and the median curvature."""
    groups = named(results)
    table = []
    for name, rows in groups:
        summary = summarize(rows)
        gradient, hessian, curvature = (summary[quantity] for quantity in QUANTITIES)
        table.append(
            {
                "model": name,
                "split": rows["split"].iloc[0],
                "examples": len(rows),
                "accuracy": f"{summary['accuracy']:.2f} %",
                "||grad l||": f"{gradient['mean']:.4g}",
                "||hess l||": f"{hessian['mean']:.4g}",
                "C": f"{curvature['mean']:.4g}",
                "median C": f"{curvature['median']:.4g}",
                "converged": f"{summary['converged'] / max(1, summary['averaged']):.0%}",
            }
        )
    table = pd.DataFrame(table).set_index("model").rename_axis(index=None, columns="model")
    lines = [table.to_string(col_space=11)]
    for split in sorted(set(results["split"])):
        if len({tuple(rows["index"]) for _, rows in groups if rows["split"].iloc[0] == split}) > 1:
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
            results = pd.read_csv(path, dtype=str, keep_default_na=False)
        if missing := {"model", "split", *COLUMNS} - set(results):
            raise ValueError(f"no {', '.join(sorted(missing))}")
        if results.empty:
            raise ValueError("no rows")
        converged = results["converged"].astype(str).map({"True": 1, "False": 0})
        types = dict.fromkeys(results, "float64") | dict.fromkeys([*INTEGERS, "converged"], "int64")
        results = results.assign(converged=converged).astype(types | {"model": "str", "split": "str"})
        return results.astype({"converged": "bool"})
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); name a file that --output wrote") from error
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise UserError(f"{path}: not a result file that --output wrote ({one_line(error)})") from error
