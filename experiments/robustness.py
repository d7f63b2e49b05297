"""Robustness at single examples: how stable the input gradient is, and which examples withstand attacks.

Gradient stability of a function f at x (paper, section 5): ||grad f(x + delta) - grad f(x)|| / ||grad f(x)|| for random
delta of a given l2 norm, f being the example's loss or the logit of its true class.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curvature.derivatives import cross_entropy, input_vector_jacobian_product
from curvature.folding import FoldedNetwork
from training.attacks import PGD, auto_attack, loss_gradient, strongest
from utils.numerics import Generators, draw_normal, normalize, norms
from utils.plots import new_figure, save_figure

STABILITY = {"loss": "loss", "logit": "true-class logit"}  # f in the names of columns, and in words


@dataclass(frozen=True)
class RobustnessSettings:
    """What is tried on every example. Distances are in units of pixels in [0, 1]."""

    radii: dict[str, tuple[float, ...]]  # "l2" or "linf" -> the eps to attack with
    pgd_steps: int = 20
    pgd_step_size: float | None = None  # None: see training.attacks.PGD
    restarts: int = 3
    autoattack: bool = False
    deltas: tuple[float, ...] = ()  # l2 norms of the random changes for gradient stability
    draws: int = 5  # how many of them an example
    seed: int = 0


@torch.no_grad()
def gradient_stability(
    gradient: Callable[[Tensor], Tensor],
    images: Tensor,
    deltas: Sequence[float],
    draws: int,
    generator: Generators = None,
) -> Tensor:
    """||grad f(x + delta) - grad f(x)|| / ||grad f(x)||, the mean over random directions of delta.

    x + delta is not cut to [0, 1]: its distance is meant to be exact.

    Args:
        gradient: x (N, ...) -> (N, ...), the gradient of each example's f.
        images: (N, ...) the x.
        deltas: k l2 norms; all are tried in the same directions.
        draws: how many directions.

    Returns:
        (k, N), NaN where grad f(x) is zero.
    """
    here = gradient(images)
    changes = images.new_zeros(len(deltas), len(images))
    for _ in range(draws):
        direction = normalize(draw_normal(images, generator).flatten(1)).view_as(images)
        for change, delta in zip(changes, deltas, strict=True):
            change += norms(gradient(images + delta * direction) - here) / draws
    return torch.where(norms(here) > 0, changes / norms(here), torch.nan)


def input_gradient_of(quantity: str, network: nn.Module | FoldedNetwork, labels: Tensor) -> Callable[[Tensor], Tensor]:
    """x (N, ...) -> (N, ...): the input gradient of each example's "loss", or of the "logit" of its true class."""
    if quantity == "loss":
        return lambda x: loss_gradient(network, x, labels)[1]

    def true_class(logits: Tensor) -> Tensor:
        return F.one_hot(labels, logits.shape[1]).to(logits.dtype)

    return lambda x: input_vector_jacobian_product(network, x, true_class)[1]


@torch.no_grad()
def withstood(
    network: nn.Module | FoldedNetwork,
    labels: Tensor,
    correct: Tensor,
    radii: Sequence[float],
    attack: Callable[[Tensor, float], Tensor],
    standing: dict[float, Tensor] | None = None,
) -> dict[float, Tensor]:
    """Which examples are classified correctly as they are and wherever an attack led them.

    A ball holds every smaller one: who is fooled at one radius counts as fooled at all larger ones. So accuracy never
    rises with the radius, and never above that of the images themselves.

    Args:
        network: frozen and in eval mode.
        labels: (N,) class indices.
        correct: (N,) mask of the examples classified correctly as they are.
        radii: of the attacks.
        attack: (k,) positions of the examples still standing, and a radius -> (k, ...) images in the balls around them.
        standing: who withstood another attack at these radii; the others are not tried again.

    Returns:
        radius -> (N,) mask, smallest radius first.
    """
    left = correct
    found = {}
    for radius in sorted(radii):
        left = left & standing[radius] if standing else left.clone()
        rows = left.nonzero()[:, 0]
        if len(rows):
            left[rows] = network(attack(rows, radius)).argmax(dim=1) == labels[rows]
        found[radius] = left
    return found


def examine(
    network: nn.Module | FoldedNetwork,
    images: Tensor,
    labels: Tensor,
    generators: list[torch.Generator],
    settings: RobustnessSettings,
) -> dict[str, Tensor]:
    """Everything the settings ask for, at a batch of examples.

    Args:
        network: frozen and in eval mode, see ``curvature.estimate.prepared``.
        images: (N, ...) pixels in [0, 1].
        labels: (N,) class indices.
        generators: one for each example, so that its results do not depend on the batch.

    Returns:
        Columns (N,): predicted, loss; stability_<loss or logit>_<delta>; <attack>_<norm>_<eps>, True for
        those that withstand. AutoAttack is tried on what PGD left standing, and its columns tell of both.
    """
    with torch.no_grad():
        logits = network(images.clone())  # a clone, as the model may work in place
    correct = logits.argmax(dim=1) == labels
    columns = {"predicted": logits.argmax(dim=1), "loss": cross_entropy(logits, labels)}
    for quantity in STABILITY if settings.deltas else ():
        gradient = input_gradient_of(quantity, network, labels)
        stability = gradient_stability(gradient, images, settings.deltas, settings.draws, generators)
        names = (f"stability_{quantity}_{delta:g}" for delta in settings.deltas)
        columns |= dict(zip(names, stability, strict=True))

    def pgd(norm: str, rows: Tensor, eps: float) -> Tensor:
        attack = PGD(norm, eps, settings.pgd_steps, settings.pgd_step_size)
        own = [generators[row] for row in rows.tolist()]
        return strongest(network, images[rows], labels[rows], attack, settings.restarts, own)[0]

    def auto(norm: str, rows: Tensor, eps: float) -> Tensor:
        return auto_attack(network, images[rows], labels[rows], norm, eps, settings.seed)

    for norm, radii in settings.radii.items():
        standing = withstood(network, labels, correct, radii, partial(pgd, norm))
        columns |= {f"pgd_{norm}_{eps:g}": mask for eps, mask in standing.items()}
        if settings.autoattack:
            standing = withstood(network, labels, correct, radii, partial(auto, norm), standing)
            columns |= {f"autoattack_{norm}_{eps:g}": mask for eps, mask in standing.items()}
    return columns


def summarize(results: pd.DataFrame) -> dict:
    """Accuracies in percent, by attack and eps, and the mean and standard deviation of stability, by delta.

    Examples whose gradient is zero or not finite have no stability; ``left_out`` counts them.

    Args:
        results: the rows of one model and split, with the columns of ``examine``.
    """
    robust: dict = {}
    stability: dict = {}
    for attack in ATTACKS:
        for column in results.filter(regex=f"^{attack}_"):
            name, eps = column.rsplit("_", 1)
            robust.setdefault(name, {})[eps] = 100 * float(results[column].mean())
    for column in results.filter(regex="^stability_"):
        _, quantity, delta = column.split("_")
        kept = results[column][np.isfinite(results[column])]
        cell = {"mean": kept.mean(), "sd": kept.std(ddof=0), "left_out": len(results) - len(kept)}
        stability.setdefault(quantity, {})[delta] = cell
    return {
        "model": results["model"].iloc[0],
        "split": results["split"].iloc[0],
        "examples": len(results),
        "accuracy": 100 * float((results["predicted"] == results["label"]).mean()),
        "robust_accuracy": robust,
        "stability": stability,
    }


def format_summary(summary: dict) -> str:
    """A model's summary for the screen."""
    lines = [f"  {summary['split']}, {summary['examples']} examples, accuracy {summary['accuracy']:.2f} %"]
    for attack, accuracies in summary["robust_accuracy"].items():
        name, norm = attack.split("_")
        title = f"{ {'pgd': 'PGD', 'autoattack': 'PGD and AutoAttack'}[name] }, {norm}: accuracy in %"
        lines.append(f"    {title:<44}" + "".join(f"  eps {eps}: {value:.2f}" for eps, value in accuracies.items()))
    for quantity, changes in summary["stability"].items():
        title = f"relative change of the {STABILITY[quantity]}'s gradient"
        cells = "".join(f"  delta {delta}: {value['mean']:.3f}" for delta, value in changes.items())
        lines.append(f"    {title:<44}{cells}")
        if left_out := max(value["left_out"] for value in changes.values()):
            lines.append(f"    left out of these: {left_out} whose gradient is zero or not finite")
    return "\n".join(lines)


ATTACKS = {"pgd": ("PGD", "-"), "autoattack": ("AutoAttack", "--")}  # name in a summary -> in the picture, its line


def plot_robustness(path: Path, names: Sequence[str], summaries: Sequence[dict]) -> None:
    """Accuracy by eps, a panel for each norm, and the gradients' relative change by delta, a panel for each gradient.

    Args:
        names: for the legend, one for each summary.
        summaries: as experiments.robustness makes them, all with the same settings.
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
