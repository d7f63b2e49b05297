"""What a run tells: a line an epoch, and the picture it leaves beside its checkpoint."""

from pathlib import Path

import torch
from torch import nn

from models.layers import CenteredSoftplus, LipschitzBatchNorm2d
from training.epoch import COLUMNS
from utils.plots import draw_bars, new_figure, save_figure

FORMATS = {"learning_rate": "g", "test_accuracy": ".2f", "seconds": ".1f", "images_per_second": ".0f"}


def format_metrics(row: dict[str, float]) -> str:
    """One epoch's metrics for the screen: name value, two spaces, name value, ..."""
    shown = (f"{name} {format(value, FORMATS.get(name, '.4f'))}" for name, value in row.items() if name != "epoch")
    return "  ".join(shown)


def count_parameters(loss: nn.Module) -> str:
    """How many numbers are trained, in words."""
    total, of_model = (sum(p.numel() for p in m.parameters() if p.requires_grad) for m in (loss, loss.model))
    bends = sum(isinstance(m, (CenteredSoftplus, LipschitzBatchNorm2d)) for m in loss.model.modules())
    parts = [f"{of_model - bends:,} weights", f"{bends} beta and gamma" if bends else ""]
    parts += [f"{total - of_model} of the loss"] if total > of_model else []
    return ", ".join(filter(None, parts))


def plot_training(path: Path, title: str, metrics: list[dict], model: nn.Module) -> None:
    """The curves of a run, from a dict per epoch, and for a low-curvature network beta and gamma by layer."""
    with torch.no_grad():
        betas = [m.beta.item() for m in model.modules() if isinstance(m, CenteredSoftplus)]
        gammas = [m.log_gamma.exp().item() for m in model.modules() if isinstance(m, LipschitzBatchNorm2d)]
    figure, axes = new_figure(3 + bool(betas) + bool(gammas))
    figure.suptitle(title)
    penalties = [name for name in metrics[0] if name not in (*COLUMNS, "raw_loss")]
    panels = {
        "loss": [name for name in ("train_loss", "raw_loss", "test_loss") if name in metrics[0]],
        "test accuracy, %": ["test_accuracy"],
        "unweighted penalty terms" if penalties else "learning rate": penalties or ["learning_rate"],
    }
    for axis, (panel, names) in zip(axes, panels.items(), strict=False):
        for name in names:
            values = [row[name] for row in metrics]
            axis.plot([row["epoch"] for row in metrics], values, marker=".", label=name.replace("_", " "))
        axis.set(xlabel="epoch", title=panel)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.legend()
    axes[2].set_yscale("log")
    bars = {"beta by activation": betas, "gamma by BatchNorm": gammas}
    for axis, name in zip(axes[3:], [name for name, values in bars.items() if values], strict=True):
        draw_bars(axis, name, bars[name])
    save_figure(figure, path)
