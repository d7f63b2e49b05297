"""Curvature of a classifier's loss at single examples (paper, equation 1), through Hessian-vector products."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GRADIENT_EPS = 1e-6  # C = h / (g + 1e-6), the reference's definition


@dataclass(frozen=True)
class CurvatureEstimate:
    """What estimate_curvature found, one entry per example: four (N,) tensors."""

    hessian_norm: Tensor  # h = ||Hessian of the loss||_2, its largest-magnitude eigenvalue
    gradient_norm: Tensor  # g = ||gradient of the loss||_2
    curvature: Tensor  # C = h / (g + 1e-6)
    residual: Tensor  # ||H u - lambda u|| / |lambda|: relative, 0 when u is an eigenvector

    def __len__(self) -> int:
        return len(self.hessian_norm)

    def to(self, device: torch.device | str) -> "CurvatureEstimate":
        return CurvatureEstimate(*(getattr(self, field.name).to(device) for field in fields(self)))

    @staticmethod
    def concatenate(estimates: list["CurvatureEstimate"]) -> "CurvatureEstimate":
        return CurvatureEstimate(
            *(torch.cat([getattr(e, field.name) for e in estimates]) for field in fields(CurvatureEstimate))
        )


@contextmanager
def frozen_in_eval(model: nn.Module) -> Iterator[None]:
    """The model in eval mode with no parameter requiring a gradient; every module's and parameter's state restored."""
    training = [(module, module.training) for module in model.modules()]
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        model.eval()
        for parameter in trainable:
            parameter.requires_grad_(False)
        yield
    finally:
        for module, mode in training:
            module.training = mode
        for parameter in trainable:
            parameter.requires_grad_(True)


def input_derivatives(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Each example's input gradient (N, ...), and the function v (N, ...) -> H v (N, ...) of its Hessian.

    In eval the examples do not mix, so the Hessian of the summed loss is block diagonal and one product with it serves
    every example. Double backward: the gradient's graph is kept and differentiated once per product.
    """
    images = images.detach().requires_grad_()
    with torch.enable_grad():
        loss = F.cross_entropy(model(images), labels, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, images, create_graph=True)

    def hessian_vector_product(v: Tensor) -> Tensor:
        if not gradient.requires_grad:  # a loss that is linear in the pixels
            return torch.zeros_like(v)
        (product,) = torch.autograd.grad(gradient, images, v, retain_graph=True, materialize_grads=True)
        return product

    return gradient.detach(), hessian_vector_product


def norms(x: Tensor) -> Tensor:
    """(N, ...) -> (N, 1, ...): the 2-norm of each example, shaped to broadcast against x."""
    return torch.linalg.vector_norm(x, dim=tuple(range(1, x.ndim)), keepdim=True)


def normalize(x: Tensor) -> Tensor:
    """Each example over its 2-norm, at any scale; zero stays zero."""
    norm = norms(x)
    return x / torch.where(norm > 0, norm, 1)


def power_method(
    hessian_vector_product: Callable[[Tensor], Tensor], start: Tensor, num_iterations: int
) -> tuple[Tensor, Tensor]:
    """The largest-magnitude eigenvalue of each example's symmetric H by power iteration, and how converged it is.

    u <- H u / ||H u||, num_iterations products in all. Reports ||H u|| of the last one: it is at most ||H||, and closer
    to it than the Rayleigh quotient |u'Hu|, which an indefinite H (eigenvalues of both signs) can make far too small.

    Args:
        start: (N, ...), the first u up to scale.

    Returns:
        hessian_norm (N,) and residual (N,) = ||H u - lambda u|| / |lambda| with lambda = u'Hu, 0 where H u = 0.
    """
    u = normalize(start)
    for _ in range(num_iterations - 1):
        u = normalize(hessian_vector_product(u))
    product = hessian_vector_product(u)
    rayleigh = (u * product).flatten(1).sum(dim=1)
    norm, error = norms(product).flatten(), norms(product - rayleigh.view(-1, *[1] * (u.ndim - 1)) * u).flatten()
    return norm, torch.where(norm == 0, 0, error / rayleigh.abs())


methods = {"power": power_method}


def estimate_curvature(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    method: str = "power",
    num_iterations: int = 10,
    generator: torch.Generator | None = None,
) -> CurvatureEstimate:
    """Gradient norm, Hessian norm and normalized curvature of the cross-entropy at each example.

    Args:
        model: maps images (N, ...) to logits (N, classes), its examples independent in eval mode. It is evaluated in
            eval mode and left as it was found.
        images: (N, ...) pixels in the model's dtype, on its device.
        labels: (N,) class indices.
        method: a key of ``methods``. "power" is power iteration, the paper's.
        num_iterations: Hessian-vector products per example.
        generator: draws the starting vectors; None for torch's global one.

    Raises:
        ValueError: on an unknown method, no iterations, or as many labels as do not fit the images.
    """
    if method not in methods:
        raise ValueError(f"unknown method {method!r}; there are {', '.join(methods)}")
    if num_iterations < 1:
        raise ValueError(f"num_iterations must be at least 1, got {num_iterations}")
    if len(images) != len(labels):
        raise ValueError(f"{len(images)} images, but {len(labels)} labels")
    with frozen_in_eval(model):
        gradient, hessian_vector_product = input_derivatives(model, images, labels)
        device = generator.device if generator is not None else images.device
        start = torch.randn(images.shape, generator=generator, dtype=images.dtype, device=device).to(images.device)
        hessian_norm, residual = methods[method](hessian_vector_product, start, num_iterations)
    gradient_norm = norms(gradient).flatten()
    return CurvatureEstimate(hessian_norm, gradient_norm, hessian_norm / (gradient_norm + GRADIENT_EPS), residual)
