"""What a run tells: a line an epoch, and the picture it leaves beside its checkpoint."""

import argparse
from functools import partial

import pandas as pd
import torch
from torch import nn

from curvature.estimate import estimate_curvature, prepared
from curvature.results import QUANTITIES, averaged
from curvature.subjects import Subject, for_examples
from data.datasets import ImageData
from models.layers import CenteredSoftplus, LipschitzBatchNorm2d
from training.epoch import COLUMNS
from training.run_files import Run
from utils.distributed import world_size
from utils.numerics import at_chance
from utils.plots import draw_bars, new_figure, save_figure
from utils.precision import autocast_taken_off, denormals_flushed

FORMATS = {"learning_rate": "g", "test_accuracy": ".2f", "seconds": ".1f", "images_per_second": ".0f"}
FORMATS |= dict.fromkeys(QUANTITIES, ".4g")
# estimate_curvature.py's defaults
NUM_PRODUCTS = 10
BATCH_SIZE = 64


def format_metrics(row: dict[str, float]) -> str:
    """One epoch's metrics for the screen: name value, two spaces, name value, ..."""
    shown = (f"{name} {format(value, FORMATS.get(name, '.4f'))}" for name, value in row.items() if name != "epoch")
    return "  ".join(shown)


def count_parameters(loss: nn.Module) -> str:
    """How many numbers are trained, in words."""
    total, of_model = (sum(p.numel() for p in m.parameters() if p.requires_grad) for m in (loss, loss.model))
    betas_and_gammas = sum(isinstance(m, (CenteredSoftplus, LipschitzBatchNorm2d)) for m in loss.model.modules())
    parts = [
        f"{of_model - betas_and_gammas:,} weights",
        f"{betas_and_gammas} beta and gamma" if betas_and_gammas else "",
    ]
    parts += [f"{total - of_model} of the loss"] if total > of_model else []
    return ", ".join(filter(None, parts))


def describe(flags: argparse.Namespace, run: Run, data: ImageData, loss: nn.Module) -> str:
    """What is about to be trained, in words."""
    size = run.flags["image_size"]
    processes = f"; {world_size()} processes" if world_size() > 1 else ""
    resumed = f"\nresuming {run.resumed_from} after epoch {run.saved['epoch']}" if run.saved else ""
    return (
        f"{flags.model_arch} ({count_parameters(loss)}) with {type(loss).__name__} on {flags.dataset}: "
        f"{len(data.train)} training and {len(data.test)} test images of {size} x {size}, "
        f"{len(data.class_names)} classes; {flags.device}, {flags.precision}, torch {torch.__version__}"
        f"{processes}{resumed}"
    )


def mean_curvature(model: nn.Module, data: ImageData, flags: argparse.Namespace) -> dict[str, float]:
    """Means over --measure-curvature test images, as estimate_curvature.py measures them by default.

    Training goes on as if nothing had been measured. NaN where no image enters the averages.
    """
    batch_size = -(-min(BATCH_SIZE, flags.batch_size, flags.measure_curvature) // world_size())
    chosen = {"split": "test", "num_samples": flags.measure_curvature, "prng_seed": flags.prng_seed}
    chosen = argparse.Namespace(**chosen, batch_size=batch_size)
    subject = Subject(flags.model_arch, flags.model_arch, model, flags.dataset, data)
    with denormals_flushed(False), autocast_taken_off(model), prepared(model) as network:
        of_batch = partial(estimate_curvature, network, num_iterations=NUM_PRODUCTS)
        (results,) = for_examples(subject, chosen, lambda x, y, draw: of_batch(x, y, generator=draw).columns())
    return results.loc[averaged(results), list(QUANTITIES)].mean().to_dict()


def remark_on_chance(row: dict[str, float], data: ImageData, flags: argparse.Namespace, loss: nn.Module) -> str | None:
    """What to try where a network tells the test images apart no better than chance."""
    if not at_chance(row["test_accuracy"], data.test.labels.tolist()):
        return None
    remedies = ["train for more epochs", "try a smaller --lr"]
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in loss.modules()):
        remedies += [] if flags.calibrate_batchnorm else ["--calibrate-batchnorm"]
        remedies.append("a larger --bn-momentum")
    remedies += ["smaller penalties"] if flags.regularizer != "none" else []
    return (
        f"the train loss is {row['train_loss']:.4g}, but a test accuracy of {row['test_accuracy']:.2f} % is at chance, "
        f"no better than always answering one class; {', or '.join(remedies)}"
    )


def plot_training(run: Run, metrics: list[dict], model: nn.Module) -> None:
    """The curves of a run, and for a low-curvature network beta and gamma by layer."""
    with torch.no_grad():
        betas = [m.beta.item() for m in model.modules() if isinstance(m, CenteredSoftplus)]
        gammas = [m.log_gamma.exp().item() for m in model.modules() if isinstance(m, LipschitzBatchNorm2d)]
    bars = {"beta by activation": betas} if betas else {}
    bars |= {"gamma by BatchNorm": gammas} if gammas else {}
    table = pd.DataFrame(metrics).set_index("epoch")
    measured = [name for name in QUANTITIES if name in table]
    penalties = [name for name in table if name not in (*COLUMNS, *measured, "raw_loss")]
    panels = {
        "loss": [name for name in ("train_loss", "raw_loss", "test_loss") if name in table],
        "test accuracy, %": ["test_accuracy"],
        "unweighted penalty terms" if penalties else "learning rate": penalties or ["learning_rate"],
    }
    panels |= {"means over test images": measured} if measured else {}
    figure, axes = new_figure(len(panels) + len(bars))
    figure.suptitle(run.checkpoint.stem)
    for axis, (panel, names) in zip(axes, panels.items(), strict=False):
        axis.plot(table.index, table[names], marker=".", label=[name.replace("_", " ") for name in names])
        axis.set(xlabel="epoch", title=panel)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.legend()
    for axis, names in zip(axes[2:], list(panels.values())[2:], strict=False):
        axis.set_yscale("linear" if (table[names] <= 0).any(axis=None) else "log")  # a loss may have negative terms
    for axis, (panel, values) in zip(axes[len(panels) :], bars.items(), strict=True):
        draw_bars(axis, panel, values)
    save_figure(figure, run.picture)
