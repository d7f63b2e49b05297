"""Attacks: the worst pixels within a small distance of an image, as far as gradients or AutoAttack find them.

Projected gradient descent (PGD; Madry et al., ICLR 2018) climbs the cross-entropy inside the ball of radius eps around
the image, in the l2 or the l-infinity norm, and inside [0, 1]. For AutoAttack (Croce & Hein, ICML 2020) its authors'
package is called, where it is installed.
"""

import importlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from curvature.derivatives import cross_entropy, cross_entropy_gradient, input_vector_jacobian_product
from curvature.folding import FoldedNetwork
from data.batches import Batch
from utils.errors import UserError
from utils.numerics import Generators, draw_normal, frozen_in_eval, normalize, norms

NORMS = ("l2", "linf")


def perturbation_norms(delta: Tensor, norm: str) -> Tensor:
    """(N, ...) -> (N,): each row's size in a norm of ``NORMS``."""
    return norms(delta) if norm == "l2" else delta.flatten(1).abs().amax(dim=1)


def project(delta: Tensor, norm: str, eps: float) -> Tensor:
    """(N, ...): of each row the nearest point in the ball of radius eps."""
    if norm == "linf":
        return delta.clamp(-eps, eps)
    shrink = (eps / norms(delta)).clamp(max=1)  # inf at 0, where there is nothing to shrink
    return delta * shrink.view(-1, *[1] * (delta.ndim - 1))


@dataclass(frozen=True)
class PGD:
    """Steps of projected gradient ascent on the cross-entropy, each of length step_size in the norm.

    Args:
        norm: "l2" or "linf".
        eps: radius of the ball, in units of pixels in [0, 1].
        steps: how many.
        step_size: None for 2.5 * eps / steps: the border can be reached from anywhere, and walked along.

    Raises:
        ValueError: on an unknown norm, or numbers that are not positive.
    """

    norm: str
    eps: float
    steps: int
    step_size: float | None = None

    def __post_init__(self):
        if self.norm not in NORMS:
            raise ValueError(f"unknown norm {self.norm!r}; there are {', '.join(NORMS)}")
        for name in ("eps", "steps", "step_size"):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise ValueError(f"{name} must be positive, got {value}")

    def random_start(self, images: Tensor, generator: Generators) -> Tensor:
        """Random points of the balls around images (N, ...) in [0, 1], cut to [0, 1].

        Uniform in l-infinity; in l2 a random direction with a uniform radius: almost all of a uniform ball's volume is
        at its border, where the cut to [0, 1] would leave little of the inside to start from.
        """
        normal = draw_normal(images, generator)
        if self.norm == "linf":
            delta = (2 * torch.special.ndtr(normal) - 1) * self.eps
        else:
            uniform = torch.special.ndtr(draw_normal(images.flatten(1)[:, :1], generator))
            delta = (normalize(normal.flatten(1)) * uniform * self.eps).view_as(images)
        return (images + delta).clamp(0, 1)

    def step(self, x: Tensor, images: Tensor, gradient: Tensor) -> Tensor:
        """x (N, ...) one step up the gradient, back in the balls around images and in [0, 1].

        The cut to [0, 1] comes last: it moves x towards the image in every pixel, so x stays in the ball.
        """
        gradient = gradient.nan_to_num(0, 0, 0)  # a pixel without a gradient stays where it is
        linf = self.norm == "linf"
        direction = gradient.sign() if linf else normalize(gradient.flatten(1)).view_as(gradient)
        step_size = 2.5 * self.eps / self.steps if self.step_size is None else self.step_size
        return (images + project(x + step_size * direction - images, self.norm, self.eps)).clamp(0, 1)


def adversarial_images(
    model: nn.Module, images: Tensor, labels: Tensor, attack: PGD, generator: Generators = None
) -> Tensor:
    """What adversarial training trains on: the end of one climb from a random start.

    Args:
        model: attacked in eval mode, and left in the mode it was in.
        images: (N, ...) pixels in [0, 1].
        labels: (N,) class indices.

    Returns:
        (N, ...) pixels in [0, 1], in the ball around images.
    """
    with frozen_in_eval(model):
        x = attack.random_start(images, generator)
        for _ in range(attack.steps):
            _, gradient = loss_gradient(model, x, labels)
            x = attack.step(x, images, gradient)
    return x


def adversarial_batches(model: nn.Module, batches: Iterable[Batch], attack: PGD) -> Iterator[Batch]:
    """The batches, each image moved against the model as it is by then.

    Random starts come from torch's global generator, which training seeds for each epoch.
    """
    for batch in batches:
        yield batch._replace(images=adversarial_images(model, batch.images, batch.labels, attack))


def loss_gradient(network: nn.Module | FoldedNetwork, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(N, classes) logits at x (N, ...), and the (N, ...) gradient of each example's cross-entropy."""
    return input_vector_jacobian_product(network, x, lambda logits: cross_entropy_gradient(logits, labels))


@torch.no_grad()
def strongest(
    network: nn.Module | FoldedNetwork,
    images: Tensor,
    labels: Tensor,
    attack: PGD,
    restarts: int = 1,
    generator: Generators = None,
) -> tuple[Tensor, Tensor]:
    """The worst points that some climbs of PGD pass, each from another random start.

    Args:
        network: frozen and in eval mode, see ``curvature.estimate.prepared``.
        images: (N, ...) pixels in [0, 1].
        labels: (N,) class indices.
        restarts: how many climbs.
        generator: what the random starts are drawn with.

    Returns:
        (N, ...): a point that is misclassified if one was seen (the image itself if it is), else the one of largest
        loss; and the (N,) mask of those misclassified.
    """
    worst = images.clone()
    logits = network(images.clone())  # a clone, as the model may work in place
    fooled, largest = logits.argmax(dim=1) != labels, cross_entropy(logits, labels)
    at_work = (~fooled).nonzero()[:, 0]
    for _ in range(restarts):
        if not len(at_work):
            break
        generators = [generator[i] for i in at_work.tolist()] if isinstance(generator, list) else generator
        x = attack.random_start(images[at_work], generators)
        rows = at_work
        for step in range(attack.steps + 1):
            logits, gradient = loss_gradient(network, x, labels[rows])
            loss = cross_entropy(logits, labels[rows])
            wrong = logits.argmax(dim=1) != labels[rows]
            better = wrong | (loss > largest[rows])
            worst[rows[better]], largest[rows[better]] = x[better], loss[better]
            fooled[rows[wrong]] = True
            # who is fooled needs no more
            x, rows, gradient = x[~wrong], rows[~wrong], gradient[~wrong]
            if step == attack.steps or not len(rows):
                break
            x = attack.step(x, images[rows], gradient)
        at_work = rows
    return worst, fooled


def import_auto_attack() -> Callable:
    """The class AutoAttack, silent.

    Raises:
        UserError: if no package that has it is installed.
    """
    # the authors' repository, which prints unless told not to; their package on PyPI, which does not
    for package, silent in (("autoattack", {"verbose": False}), ("pyautoattack", {})):
        try:
            return partial(importlib.import_module(package).AutoAttack, **silent)
        except ImportError:
            continue
    raise UserError("AutoAttack is not installed; pip install pyautoattack, or leave --autoattack out")


@torch.no_grad()
def auto_attack(
    network: nn.Module | FoldedNetwork, images: Tensor, labels: Tensor, norm: str, eps: float, seed: int
) -> Tensor:
    """What AutoAttack's standard version finds: APGD on the cross-entropy and targeted, FAB targeted, Square.

    With fewer than ten classes it has fewer targets; its targeted APGD needs four classes, and is left out below. It
    draws its random numbers for the batch as a whole: what it finds for an image depends a little on the others. It
    works in float32, whatever the network does.

    Args:
        network: frozen and in eval mode.
        images: (N, ...) pixels in [0, 1].
        labels: (N,) class indices.
        norm: "l2" or "linf".
        eps: the radius.

    Returns:
        (N, ...) pixels in [0, 1], in the ball; the images themselves where it found nothing.

    Raises:
        UserError: if AutoAttack is not installed.
    """
    make = import_auto_attack()
    with torch.random.fork_rng(devices=[images.device] if images.is_cuda else []):  # it seeds torch's generators
        attack = make(
            lambda x: network(x.to(images.dtype, copy=True)).float(),  # a copy, as the model may work in place
            norm={"l2": "L2", "linf": "Linf"}[norm],
            eps=eps,
            seed=seed,
            device=images.device,
        )
        num_classes = attack.model(images[:1]).shape[1]
        targets = min(attack.apgd_targeted.n_target_classes, num_classes - 1)
        attack.apgd_targeted.n_target_classes = attack.fab.n_target_classes = targets
        if num_classes < 4:
            attack.attacks_to_run = [name for name in attack.attacks_to_run if name != "apgd-t"]
        found = attack.run_standard_evaluation(images.float(), labels)
    found = found[0] if isinstance(found, tuple) else found  # the package on PyPI adds what they are taken for
    found = found.to(images.dtype)
    # its arithmetic may leave the ball by a rounding
    return (images + project(found - images, norm, eps)).clamp(0, 1)
