"""Pictures, to PNG."""

from pathlib import Path

import numpy as np
from torch import nn

from models.layers import CenteredSoftplus, LipschitzBatchNorm2d
from utils.checkpoint import write_atomically

# the columns of a run's metrics that every loss has; the others are the terms of a particular loss
NOT_PENALTIES = {"epoch", "learning_rate", "train_loss", "raw_loss", "test_loss", "test_accuracy", "seconds"}
NOT_PENALTIES |= {"images_per_second"}


def new_figure(columns: int):
    """A row of panels that needs no display."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.5 * columns, 3.6), layout="constrained")
    return figure, np.atleast_1d(figure.subplots(1, columns))


def save_figure(figure, path: Path) -> None:
    write_atomically(Path(path), lambda file: figure.savefig(file, format="png", dpi=120))


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
        axis.bar(range(1, len(values) + 1), values)
        axis.set(xlabel="layer, input to output", title=name, yscale="log")  # one may be a hundred times another
    save_figure(figure, path)


def plot_curvature(path: Path, curvatures: list[tuple[str, np.ndarray]]) -> None:
    """How normalized curvature is distributed over examples, one violin per label, on a log axis.

    Args:
        curvatures: a label and the (N,) values of one model on one split, for each; zero and non-finite ones are not
            drawn.
    """
    figure, (axis,) = new_figure(1)
    logs = [np.log10(values[np.isfinite(values) & (values > 0)]) for _, values in curvatures]
    drawn = [i for i, values in enumerate(logs, start=1) if len(values) > 1]
    if drawn:
        axis.violinplot([logs[i - 1] for i in drawn], positions=drawn, showmedians=True, widths=0.8)
    axis.set_xticks(range(1, len(logs) + 1), [label for label, _ in curvatures], rotation=15, ha="right", fontsize=7)
    axis.yaxis.set_major_formatter(lambda exponent, _: f"{10**exponent:.3g}")
    axis.set(ylabel="normalized curvature C", title="curvature by example")
    axis.grid(axis="y", alpha=0.3)
    save_figure(figure, path)
