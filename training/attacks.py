"""Adversarial training's attack: the worst pixels near an image, as far as gradients find them.

Projected gradient descent (PGD; Madry et al., ICLR 2018) climbs the cross-entropy inside the ball of radius eps around
the image, in the l2 or the l-infinity norm, and inside [0, 1].
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from curvature.derivatives import cross_entropy_gradient, input_vector_jacobian_product
from curvature.folding import FoldedNetwork
from data.batches import Batch
from utils.numerics import Generators, draw_normal, frozen_in_eval, normalize, norms

NORMS = ("l2", "linf")


def project(delta: Tensor, norm: str, eps: float) -> Tensor:
    """(N, ...): of each row the nearest point in the ball of radius eps."""
    if norm == "linf":
        return delta.clamp(-eps, eps)
    shrink = (eps / norms(delta)).clamp(max=1)  # inf at 0, where there is nothing to shrink
    return delta * shrink.view(-1, *[1] * (delta.ndim - 1))


@dataclass(frozen=True)
class PGD:
    """Steps of projected gradient ascent on the cross-entropy.

    Raises:
        ValueError: on an unknown norm, or numbers that are not positive.
    """

    norm: str  # of NORMS
    eps: float  # radius of the ball, in units of pixels in [0, 1]
    steps: int
    step_size: float | None = None  # in the norm; None: 2.5 * eps / steps, which reaches the border from anywhere

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
    """What adversarial training trains on: the end of one climb from a random start, (N, ...) pixels in [0, 1].

    Args:
        model: attacked in eval mode, and left in the mode it was in.
        images: (N, ...) pixels in [0, 1].
        labels: (N,) class indices.
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
