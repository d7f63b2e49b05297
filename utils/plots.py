"""Pictures, to PNG."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import nn

from models.bound import LayerTable
from models.layers import CenteredSoftplus, LipschitzBatchNorm2d
from utils.files import write_atomically
from utils.results import QUANTITIES, Measurement

# the columns of a run's metrics that every loss has; the others are the terms of a particular loss
NOT_PENALTIES = {"epoch", "learning_rate", "train_loss", "raw_loss", "test_loss", "test_accuracy", "seconds"}
NOT_PENALTIES |= {"images_per_second"}


def new_figure(columns: int, rows: int = 1):
    """Panels that need no display: the figure, and its axes row by row in one (rows * columns,) array."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.5 * columns, 3.6 * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False).ravel()


def save_figure(figure, path: Path) -> None:
    write_atomically(Path(path), lambda file: figure.savefig(file, format="png", dpi=120))


def draw_bars(axis, title: str, values: list[float], names: list[str] | None = None) -> None:
    """A bar for each layer, from input to output; numbered, or named below."""
    positions = range(1, len(values) + 1)
    axis.bar(positions, values)
    # a log axis, as one may be a hundred times another; from a power of ten, for bars need a foot to be compared
    foot = 10.0 ** np.floor(np.log10(min(values)) - 1e-9)
    axis.set(xlabel="layer, input to output", yscale="log", ylim=(foot, 1.2 * max(values)))
    axis.set_title(title, fontsize=9)  # a model's name may be long
    if names:
        axis.set_xticks(positions, names, rotation=90, fontsize=6)  # as small as resnet34's 36 names need to fit


def plot_training(path: Path, title: str, metrics: list[dict], model: nn.Module) -> None:
    """The curves of a run, and for a low-curvature network beta and gamma by layer.

    Args:
        metrics: one dict per epoch, as in metrics.csv.
        model: the trained network; layers are drawn in the order of its modules, from input to output in ours.
    """
    betas = [m.beta.item() for m in model.modules() if isinstance(m, CenteredSoftplus)]
    gammas = [m.log_gamma.exp().item() for m in model.modules() if isinstance(m, LipschitzBatchNorm2d)]
    figure, axes = new_figure(3 + bool(betas) + bool(gammas))
    figure.suptitle(title)
    epochs = [row["epoch"] for row in metrics]

    def curve(axis, name: str, **style) -> None:
        axis.plot(epochs, [row[name] for row in metrics], marker=".", label=name.replace("_", " "), **style)

    for name in ("train_loss", "raw_loss", "test_loss"):
        if name in metrics[0]:
            curve(axes[0], name)
    axes[0].set(xlabel="epoch", title="loss")
    for axis in axes[:3]:
        axis.xaxis.get_major_locator().set_params(integer=True)
    axes[0].legend()
    curve(axes[1], "test_accuracy")
    axes[1].set(xlabel="epoch", title="test accuracy, %")

    penalties = [name for name in metrics[0] if name not in NOT_PENALTIES]
    for name in penalties or ["learning_rate"]:
        curve(axes[2], name)
    axes[2].set(xlabel="epoch", title="unweighted penalty terms" if penalties else "learning rate")
    axes[2].set_yscale("log")
    axes[2].legend()

    panels = [("beta by activation", betas), ("gamma by BatchNorm", gammas)]
    for axis, (name, values) in zip(axes[3:], [panel for panel in panels if panel[1]], strict=True):
        draw_bars(axis, name, values)
    save_figure(figure, path)


def plot_measurements(path: Path, measurements: Sequence[tuple[str, Measurement]]) -> None:
    """How gradient norm, Hessian norm and curvature are distributed over examples: a panel each, on a log axis.

    Args:
        measurements: named; a violin for each, of the examples that enter its averages.
    """
    figure, axes = new_figure(len(QUANTITIES))
    figure.set_figheight(4.8)  # the names below need room
    figure.suptitle("the examples of each model and split; bars: extremes and median", fontsize=9)
    labels = [f"{name}\n{m.split}, {m.averaged().sum()} examples" for name, m in measurements]
    for axis, (quantity, title) in zip(axes, QUANTITIES.items(), strict=True):
        values = [m.columns[quantity][m.averaged()] for _, m in measurements]
        logs = [np.log10(v[v > 0]) for v in values]
        drawn = [i for i, values in enumerate(logs) if len(values)]
        if drawn:
            axis.violinplot([logs[i] for i in drawn], positions=drawn, widths=0.8)
            medians = [np.log10(np.median(10 ** logs[i])) for i in drawn]
            axis.hlines(medians, np.array(drawn) - 0.3, np.array(drawn) + 0.3)
        axis.set_xticks(range(len(labels)), labels, rotation=30 if len(labels) < 5 else 90, ha="right", fontsize=7)
        axis.yaxis.set_major_formatter(lambda exponent, _: f"{10**exponent:.3g}")
        axis.set(title=title)
        axis.grid(axis="y", alpha=0.3)
    save_figure(figure, path)


ATTACKS = {"pgd": ("PGD", "-"), "autoattack": ("AutoAttack", "--")}  # name in a summary -> in the picture, its line


def plot_robustness(path: Path, names: Sequence[str], summaries: Sequence[dict]) -> None:
    """Accuracy by eps, a panel for each norm, and the gradients' relative change by delta, a panel for each gradient.

    Args:
        names: for the legend, one for each summary.
        summaries: as utils.robustness makes them, all with the same settings.
    """
    norms = list(dict.fromkeys(attack.split("_")[1] for attack in summaries[0]["robust_accuracy"]))
    quantities = list(summaries[0]["stability"])
    figure, axes = new_figure(len(norms) + len(quantities))
    for axis, norm in zip(axes, norms, strict=False):
        axis.set(xlabel=f"{norm} eps", title=f"accuracy under attack, {norm}, %")
        for i, summary in enumerate(summaries):
            for attack, (title, line) in ATTACKS.items():
                if accuracies := summary["robust_accuracy"].get(f"{attack}_{norm}"):
                    xs, ys = [0.0, *map(float, accuracies)], [summary["accuracy"], *accuracies.values()]
                    label = names[i] if attack == "pgd" else f"{names[i]}, {title}"
                    axis.plot(xs, ys, line, marker=".", color=f"C{i}", label=label)
    for axis, quantity in zip(axes[len(norms) :], quantities, strict=True):
        axis.set(xlabel="l2 norm of delta", title=f"relative change of the {quantity}'s gradient", yscale="log")
        for i, summary in enumerate(summaries):
            changes = summary["stability"][quantity]
            axis.plot(list(map(float, changes)), [c["mean"] for c in changes.values()], marker=".", color=f"C{i}")
    handles, labels = axes[0].get_legend_handles_labels()
    for axis in axes:
        axis.grid(alpha=0.3)
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)), fontsize=8)
    save_figure(figure, path)


def plot_layers(path: Path, tables: list[tuple[str, LayerTable]]) -> None:
    """beta and gamma of every layer, on a log axis: a row of two panels for each network.

    Args:
        tables: a label and the layers of each network, at least one.
    """
    figure, axes = new_figure(2, rows=len(tables))
    for (label, table), panels in zip(tables, axes.reshape(-1, 2), strict=True):
        for axis, quantity in zip(panels, ("beta", "gamma"), strict=True):
            values = {row.name: getattr(row, quantity) for row in table.rows}
            values = {name: value for name, value in values.items() if value is not None}
            draw_bars(axis, f"{label}\n{quantity} by layer", list(values.values()), list(values))
    save_figure(figure, path)
