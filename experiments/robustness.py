"""Robustness at single examples: how stable the input gradient is, and which examples withstand attacks.

Networks are frozen and in eval mode (``curvature.estimate.prepared``). Images are (N, ...) pixels in [0, 1], labels
(N,) class indices. Each example has its own generator: nothing depends on its batch.
"""

import argparse
import importlib
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curvature.derivatives import cross_entropy, input_vector_jacobian_product
from curvature.folding import FoldedNetwork
from training.attacks import NORMS, PGD, loss_gradient, project
from utils.errors import UserError
from utils.numerics import Generators, draw_normal, normalize, norms
from utils.plots import new_figure, save_figure

Network = nn.Module | FoldedNetwork
# names in columns -> titles; lines in pictures
STABILITY = {"loss": "loss", "logit": "true-class logit"}
ATTACKS = {"pgd": ("PGD", "-"), "autoattack": ("AutoAttack", "--")}


@torch.no_grad()
def gradient_stability(
    gradient: Callable[[Tensor], Tensor],
    images: Tensor,
    deltas: Sequence[float],
    draws: int,
    generator: Generators = None,
) -> Tensor:
    """Means of ||grad f(x + delta) - grad f(x)|| / ||grad f(x)|| over random directions (paper, section 5).

    x + delta is not cut to [0, 1]: its distance is exact.

    Args:
        gradient: x (N, ...) -> (N, ...), the gradient of each example's f.
        deltas: k l2 norms. All are tried in the same directions.
        draws: how many directions.

    Returns:
        (k, N); NaN for 0 / 0.
    """
    here = gradient(images)
    changes = images.new_zeros(len(deltas), len(images))
    for _ in range(draws):
        direction = normalize(draw_normal(images, generator).flatten(1)).view_as(images)
        for change, delta in zip(changes, deltas, strict=True):
            change += norms(gradient(images + delta * direction) - here) / draws
    return torch.where(norms(here) > 0, changes / norms(here), torch.nan)


def input_gradient_of(quantity: str, network: Network, labels: Tensor) -> Callable[[Tensor], Tensor]:
    """x (N, ...) -> (N, ...), the input gradient of each example's "loss", or of the "logit" of its true class."""
    if quantity == "loss":
        return lambda x: loss_gradient(network, x, labels)[1]
    return lambda x: input_vector_jacobian_product(network, x, lambda z: F.one_hot(labels, z.shape[1]).to(z.dtype))[1]


@torch.no_grad()
def strongest(
    network: Network, images: Tensor, labels: Tensor, attack: PGD, restarts: int, generators: list[torch.Generator]
) -> Tensor:
    """The worst point (N, ...) on PGD's climbs, each from another random start.

    That is a misclassified one if there is one (the image itself if it is), else that of largest loss.
    """
    worst = images.clone()
    logits = network(images.clone()).to(images.dtype)  # a clone, as the model may work in place
    largest = cross_entropy(logits, labels)
    rows = (logits.argmax(dim=1) == labels).nonzero()[:, 0]  # those still standing
    for _, step in product(range(restarts), range(attack.steps + 1)):
        if not len(rows):
            break
        if step == 0:
            x = attack.random_start(images[rows], [generators[row] for row in rows.tolist()])
        logits, gradient = loss_gradient(network, x, labels[rows])
        loss = cross_entropy(logits, labels[rows])
        wrong = logits.argmax(dim=1) != labels[rows]
        better = wrong | (loss > largest[rows])
        worst[rows[better]], largest[rows[better]] = x[better], loss[better]
        rows = rows[~wrong]
        x = attack.step(x[~wrong], images[rows], gradient[~wrong])
    return worst


def import_auto_attack() -> Callable:
    """The class AutoAttack (Croce & Hein, ICML 2020), silent; UserError if no package that has it is installed."""
    # the authors' repository prints unless told not to, their package on PyPI does not
    for package, silent in (("autoattack", {"verbose": False}), ("pyautoattack", {})):
        with suppress(ImportError):
            return partial(importlib.import_module(package).AutoAttack, **silent)
    raise UserError("AutoAttack is not installed; pip install pyautoattack, or leave --autoattack out")


@torch.no_grad()
def auto_attack(network: Network, images: Tensor, labels: Tensor, norm: str, eps: float, seed: int) -> Tensor:
    """What AutoAttack's standard version finds, in float32: APGD on the cross-entropy and targeted, FAB, Square.

    With fewer than ten classes it has fewer targets, below four no targeted APGD. Its random numbers are drawn for the
    whole batch: what it finds for an image depends a little on the others.

    Args:
        norm: "l2" or "linf".

    Returns:
        (N, ...) pixels in [0, 1], within eps of the images; the images themselves where it found nothing.

    Raises:
        UserError: if AutoAttack is not installed.
    """
    with torch.random.fork_rng(devices=[images.device] if images.is_cuda else []):  # it seeds torch's generators
        settings = {"norm": {"l2": "L2", "linf": "Linf"}[norm], "eps": eps, "seed": seed, "device": images.device}
        # a copy, as the model may work in place
        attack = import_auto_attack()(lambda x: network(x.to(images.dtype, copy=True)).float(), **settings)
        num_classes = attack.model(images[:1]).shape[1]
        targets = min(attack.apgd_targeted.n_target_classes, num_classes - 1)
        attack.apgd_targeted.n_target_classes = attack.fab.n_target_classes = targets
        if num_classes < 4:
            attack.attacks_to_run.remove("apgd-t")
        found = attack.run_standard_evaluation(images.float(), labels)
    found = found[0] if isinstance(found, tuple) else found  # the package on PyPI adds predictions
    # rounding may leave the ball
    return (images + project(found.to(images.dtype) - images, norm, eps)).clamp(0, 1)


@torch.no_grad()
def withstood(
    network: Network, labels: Tensor, standing: dict[float, Tensor], attack: Callable[[Tensor, float], Tensor]
) -> dict[float, Tensor]:
    """Which examples are classified correctly wherever an attack led them: radius -> (N,) mask.

    An example that is fooled at one radius counts as fooled at all larger ones.

    Args:
        standing: radius, smallest first -> (N,) mask of the examples to be tried there.
        attack: (k,) positions of examples and a radius -> (k, ...) images in the balls around them.
    """
    left, found = True, {}
    for radius, tried in standing.items():
        left = tried & left
        rows = left.nonzero()[:, 0]
        if len(rows):
            left[rows] = network(attack(rows, radius)).argmax(dim=1) == labels[rows]
        found[radius] = left
    return found


def distinct(distances: Sequence[float]) -> list[float]:
    """In increasing order, one of each name in the results."""
    return sorted({f"{distance:g}": distance for distance in distances}.values())


def examine(
    network: Network, flags: argparse.Namespace, images: Tensor, labels: Tensor, generators: list[torch.Generator]
) -> dict[str, Tensor]:
    """What the flags of evaluate_robustness ask for, at a batch of examples.

    Returns:
        Columns (N,): predicted, loss, stability_<loss or logit>_<delta>, and <attack>_<norm>_<eps>: whether an example
        withstands. AutoAttack is tried on what PGD left standing, and its columns tell of both.
    """
    with torch.no_grad():
        logits = network(images.clone()).to(images.dtype)  # a clone, as the model may work in place
    columns = {"predicted": logits.argmax(dim=1), "loss": cross_entropy(logits, labels)}
    deltas = distinct(flags.deltas)
    for quantity in STABILITY if deltas else ():
        gradient = input_gradient_of(quantity, network, labels)
        stability = gradient_stability(gradient, images, deltas, flags.draws, generators)
        columns |= {f"stability_{quantity}_{delta:g}": row for delta, row in zip(deltas, stability, strict=True)}

    def pgd(norm: str, rows: Tensor, eps: float) -> Tensor:
        attack = PGD(norm, eps, flags.pgd_steps, flags.pgd_step_size)
        own = [generators[row] for row in rows.tolist()]
        return strongest(network, images[rows], labels[rows], attack, flags.restarts, own)

    def auto(norm: str, rows: Tensor, eps: float) -> Tensor:
        return auto_attack(network, images[rows], labels[rows], norm, eps, flags.prng_seed)

    attacks = {"pgd": pgd} | ({"autoattack": auto} if flags.autoattack else {})
    for norm in sorted(set(flags.norms)):
        standing = dict.fromkeys(distinct(getattr(flags, f"eps_{norm}")), columns["predicted"] == labels)
        for name, attack in attacks.items():
            standing = withstood(network, labels, standing, partial(attack, norm))
            columns |= {f"{name}_{norm}_{eps:g}": mask for eps, mask in standing.items()}
    return columns


def summarize(results: pd.DataFrame) -> dict:
    """The rows of one model and split, with the columns of ``examine``, in plain numbers.

    That is accuracy in percent by attack and eps, and mean and standard deviation of stability by delta. Examples whose
    gradient is zero or not finite have no stability; ``left_out`` counts them.
    """
    robust, stability = {}, {}
    for attack in ATTACKS:
        for column, withstands in results.filter(regex=f"^{attack}_").items():
            name, eps = column.rsplit("_", 1)
            robust.setdefault(name, {})[eps] = 100 * float(withstands.mean())
    for column, changes in results.filter(regex="^stability_").items():
        _, quantity, delta = column.split("_")
        kept = changes[np.isfinite(changes)]
        cell = {"mean": kept.mean(), "sd": kept.std(ddof=0), "left_out": len(changes) - len(kept)}
        stability.setdefault(quantity, {})[delta] = cell
    return {
        **results[["model", "split"]].iloc[0],
        "examples": len(results),
        "accuracy": 100 * float((results["predicted"] == results["label"]).mean()),
        "robust_accuracy": robust,
        "stability": stability,
    }


def format_summary(summary: dict) -> str:
    """A summary for the screen."""
    lines = [f"  {summary['split']}, {summary['examples']} examples, accuracy {summary['accuracy']:.2f} %"]
    for attack, accuracies in summary["robust_accuracy"].items():
        name, norm = attack.split("_")
        title = f"{'PGD and ' * (name != 'pgd')}{ATTACKS[name][0]}, {norm}: accuracy in %"
        lines.append(f"    {title:<50}" + "".join(f"  eps {eps}: {value:.2f}" for eps, value in accuracies.items()))
    for quantity, changes in summary["stability"].items():
        title = f"relative change of the {STABILITY[quantity]}'s gradient"
        cells = "".join(f"  delta {delta}: {value['mean']:.3f}" for delta, value in changes.items())
        lines.append(f"    {title:<50}{cells}")
        if left_out := max(value["left_out"] for value in changes.values()):
            lines.append(f"    left out of these: {left_out} whose gradient is zero or not finite")
    return "\n".join(lines)


def plot_robustness(path: Path, results: Iterable[tuple[str, pd.DataFrame]]) -> None:
    """A panel for each norm (accuracy by eps) and each gradient (relative change by delta).

    Args:
        results: the rows of a model and split, named; all have the same columns.
    """
    summaries = [(name, summarize(rows)) for name, rows in results]
    _, first = summaries[0]
    titles = {norm: f"accuracy under attack, {norm}, %" for norm in NORMS if f"pgd_{norm}" in first["robust_accuracy"]}
    titles |= {quantity: f"relative change of the {quantity}'s gradient" for quantity in first["stability"]}
    figure, axes = new_figure(len(titles))
    panels = dict(zip(titles, axes, strict=True))
    for panel, axis in panels.items():
        axis.set(xlabel=f"{panel} eps", title=titles[panel])
        axis.grid(alpha=0.3)
        if panel in STABILITY:
            axis.set(xlabel="l2 norm of delta", yscale="log")
    for i, (label, summary) in enumerate(summaries):
        style = {"marker": ".", "color": f"C{i}"}
        for attack, accuracies in summary["robust_accuracy"].items():
            name, norm = attack.split("_")
            title, line = ATTACKS[name]
            xs, ys = [0.0, *map(float, accuracies)], [summary["accuracy"], *accuracies.values()]
            panels[norm].plot(xs, ys, line, label=label if name == "pgd" else f"{label}, {title}", **style)
        for quantity, changes in summary["stability"].items():
            panels[quantity].plot([*map(float, changes)], [change["mean"] for change in changes.values()], **style)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    save_figure(figure, path)
