"""What a run tells: a line an epoch, and the picture it leaves beside its checkpoint."""

from pathlib import Path

import torch
from torch import nn

from models.layers import CenteredSoftplus, LipschitzBatchNorm2d
from training.run_files import RunFiles
from utils.files import write_csv
from utils.plots import draw_bars, new_figure, save_figure

FORMATS = {"learning_rate": "g", "test_accuracy": ".2f", "seconds": ".1f", "images_per_second": ".0f"}


def format_metrics(row: dict[str, float]) -> str:
    """One epoch's metrics for the screen: name value, two spaces, name value, ..."""
    shown = (f"{name} {format(value, FORMATS.get(name, '.4f'))}" for name, value in row.items() if name != "epoch")
    return "  ".join(shown)


def count_parameters(optimizer: torch.optim.Optimizer) -> str:
    """How many numbers are trained, and how many of them are a beta or a gamma, in words."""
    counts = [sum(parameter.numel() for parameter in group["params"]) for group in optimizer.param_groups]
    return f"{counts[0]:,} weights" + (f", {counts[1]} beta and gamma" if len(counts) > 1 else "")


# the columns of a run's metrics that every loss has; the others are the terms of a particular loss
NOT_PENALTIES = {"epoch", "learning_rate", "train_loss", "raw_loss", "test_loss", "test_accuracy", "seconds"}
NOT_PENALTIES |= {"images_per_second"}


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


def write_report(files: RunFiles, metrics: list[dict], model: torch.nn.Module) -> None:
    """What a finished run leaves beside its checkpoint."""
    write_csv(files.metrics, metrics)
    plot_training(files.picture, files.checkpoint.stem, metrics, model)
