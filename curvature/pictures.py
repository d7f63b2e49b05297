"""Pictures of measurements and of layers, to PNG."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from curvature.results import QUANTITIES, averaged
from models.bound import LayerTable
from utils.plots import draw_bars, new_figure, save_figure


def plot_results(path: Path, results: Sequence[tuple[str, pd.DataFrame]]) -> None:
    """How gradient norm, Hessian norm and curvature are distributed over examples: a panel each, on a log axis.

    Args:
        results: the rows of a model and split, named; a violin for each, of the examples that enter its averages.
    """
    figure, axes = new_figure(len(QUANTITIES))
    figure.set_figheight(4.8)  # the names below need room
    figure.suptitle("the examples of each model and split; bars: extremes and median", fontsize=9)
    kept = [rows[averaged(rows)] for _, rows in results]
    labels = [  # a folder a line, as paths are long
        name.replace("/", "/\n") + f"\n{rows['split'].iloc[0]}, {averaged(rows).sum()} examples"
        for name, rows in results
    ]
    drawn = np.flatnonzero([len(rows) for rows in kept])
    for axis, (quantity, title) in zip(axes, QUANTITIES.items(), strict=True):
        if len(drawn):
            axis.violinplot([np.log10(kept[i][quantity]) for i in drawn], positions=drawn, widths=0.8)
            axis.hlines([np.log10(kept[i][quantity].median()) for i in drawn], drawn - 0.3, drawn + 0.3)
        axis.set_xticks(range(len(labels)), labels, rotation=30 if len(labels) < 5 else 90, ha="right", fontsize=7)
        axis.yaxis.set_major_formatter(lambda exponent, _: f"{10**exponent:.3g}")
        axis.set(title=title)
        axis.grid(axis="y", alpha=0.3)
    save_figure(figure, path)


def plot_layers(path: Path, tables: list[tuple[str, LayerTable]]) -> None:
    """beta and gamma of every layer, on a log axis: a row of two panels for each network.

    Args:
        tables: a label and the layers of each network, at least one.
    """
    figure, axes = new_figure(2, rows=len(tables))
    for (label, table), panels in zip(tables, axes.reshape(-1, 2), strict=True):
        for axis, quantity in zip(panels, ("beta", "gamma"), strict=True):
            rows = [row for row in table.rows if getattr(row, quantity) is not None]
            values, names = [getattr(row, quantity) for row in rows], [row.name for row in rows]
            draw_bars(axis, f"{label}\n{quantity} by layer", values, names)
    save_figure(figure, path)
