"""Curvature of a classifier's loss at single examples (paper, equation 1), through Hessian-vector products.

Here the parts come together: derivatives.py has the products, eigenvalues.py what is done with them.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from curvature.derivatives import input_hessian
from curvature.eigenvalues import methods, probe
from curvature.folding import FoldedNetwork, fold
from utils.numerics import Generators, draw_normal, frozen_in_eval, normalize, norms
from utils.precision import float32_proper

GRADIENT_EPS = 1e-6  # C = h / (g + 1e-6), the reference's definition


@dataclass(frozen=True)
class CurvatureEstimate:
    """What estimate_curvature found: (N,) tensors, one entry per example, on the images' device; in their dtype unless
    another is named."""

    predicted: Tensor  # the class with the largest logit, int64
    loss: Tensor  # cross-entropy
    gradient_norm: Tensor  # g = ||gradient of the loss||_2
    hessian_norm: Tensor  # h = ||Hessian of the loss||_2, the magnitude of its largest eigenvalue
    curvature: Tensor  # C = h / (g + 1e-6)
    eigenvalue: Tensor  # h with the eigenvalue's sign
    residual: Tensor  # ||H u - lambda u|| / |lambda|: relative, 0 when u is an eigenvector
    products: Tensor  # Hessian-vector products spent, int64
    converged: Tensor  # residual <= tol, bool
    eigenvalues: Tensor  # (N, top_k) signed, largest magnitude first
    # with trace_probes, see curvature/eigenvalues.py:ProbeEstimates; each with its standard error
    trace: Tensor | None = None  # of the Hessian
    trace_error: Tensor | None = None
    curvature_score: Tensor | None = None  # E ||H v|| over random signs v
    curvature_score_error: Tensor | None = None
    frobenius_norm: Tensor | None = None
    frobenius_norm_error: Tensor | None = None

    def columns(self) -> dict[str, Tensor]:
        """The (N,) columns of a table of results; of eigenvalues all but the first, as eigenvalue_2, ..."""
        columns = {}
        for name, value in vars(self).items():
            if name == "eigenvalues":
                columns |= {f"eigenvalue_{k + 1}": value[:, k] for k in range(1, value.shape[1])}
            elif value is not None:
                columns[name] = value
        return columns


@contextmanager
def prepared(model: nn.Module | FoldedNetwork, use_folding: bool = True) -> Iterator[nn.Module | FoldedNetwork]:
    """The model as it is measured: in eval mode and frozen, and folded if it is a network of ours."""
    with float32_proper():
        if isinstance(model, FoldedNetwork):
            yield model
            return
        if any(tensor.is_inference() for tensor in (*model.parameters(), *model.buffers())):
            model = copy.deepcopy(model)  # as made in torch.inference_mode, see estimate_curvature
        with frozen_in_eval(model):
            yield (fold(model) if use_folding else None) or model


def starting_vectors(method: str, gradient: Tensor, generator: Generators) -> Tensor:
    """Random directions for the power method, as in the paper; the Lanczos method adds the input gradient to them.

    The gradient leans towards the top eigenvectors (both are made of the logits' gradients): it saves a product or so.
    The random half keeps the method from being blind to what is orthogonal to the gradient; it is turned to the
    gradient's side, so that the two do not cancel.
    """
    start = normalize(draw_normal(gradient, generator).flatten(1))
    if method == "lanczos":
        direction = normalize(gradient.flatten(1))
        start = torch.where((start * direction).sum(dim=1, keepdim=True) < 0, -start, start) + direction
    return start.view_as(gradient)


def estimate_curvature(
    model: nn.Module | FoldedNetwork,
    images: Tensor,
    labels: Tensor,
    method: str = "lanczos",
    num_iterations: int = 20,
    tol: float = 1e-3,
    generator: Generators = None,
    *,
    top_k: int = 1,
    trace_probes: int = 0,
    use_folding: bool = True,
) -> CurvatureEstimate:
    """Gradient norm, Hessian norm and normalized curvature of the cross-entropy at each example.

    Args:
        model: maps images (N, ...) to logits (N, classes), its examples independent in eval mode. It is evaluated in
            eval mode and left as it was found. Networks of this project are folded first (curvature/folding.py), once
            for many calls if the model is already a FoldedNetwork.
        images: (N, ...) pixels in the model's dtype, on its device.
        labels: (N,) class indices, of any integer type.
        method: a key of ``methods``: "lanczos", or "power" for power iteration, the paper's.
        num_iterations: the most Hessian-vector products to spend on an example.
        tol: an example is done when its relative residual is this small: some eigenvalue is then within tol of the one
            found, usually within tol^2, and only by a rare accident is it not the largest.
        generator: draws the starting vectors. One for every example makes its result independent of its batch.
        top_k: how many eigenvalues to find; the residual is then the largest of theirs, each relative to its own
            magnitude or, for those smaller than that, to a thousandth of the first's.
        trace_probes: Hessian-vector products with random signs per example, for the trace of its Hessian, its
            Frobenius norm and the curvature score; 0 for none of them.
        use_folding: False differentiates our networks by double backward like any other; a FoldedNetwork stays one.

    Raises:
        ValueError: on an unknown method, counts below their minimum, arguments that are not tensors, labels that do not
            fit the images, or logits that carry no gradient.
    """
    if method not in methods:
        raise ValueError(f"unknown method {method!r}; there are {', '.join(methods)}")
    numbers = {"num_iterations": num_iterations, "top_k": top_k, "tol": tol, "trace_probes": trace_probes}
    for name, number in numbers.items():
        least = 1 if name in ("num_iterations", "top_k") else 0
        if not number >= least:
            raise ValueError(f"{name} must be at least {least}, got {number}")
    if not (isinstance(images, Tensor) and isinstance(labels, Tensor)):
        kinds = f"images and labels of types {type(images).__name__} and {type(labels).__name__}"
        raise ValueError(f"{kinds}; give tensors, made by torch.as_tensor say")
    if not images.is_floating_point() or not images.ndim or not len(images):
        raise ValueError(f"images of shape {tuple(images.shape)} and {images.dtype}; give one or more, floating point")
    if labels.shape != images.shape[:1] or labels.is_floating_point():
        problem = f"{len(images)} images, but labels of shape {tuple(labels.shape)} and {labels.dtype}"
        raise ValueError(f"{problem}; give a class index for each; of one image images[None] makes a batch")
    # tensors of torch.inference_mode cannot be differentiated, but their copies outside it can
    with torch.inference_mode(False), prepared(model, use_folding) as network:
        images, labels = images.clone(), labels.to(torch.int64, copy=True)
        hessian = input_hessian(network, images, labels)
        probes = {}
        if trace_probes:  # while every example is still in the batch
            probes = probe(hessian, trace_probes, draw=lambda: draw_normal(images, generator).sign())._asdict()
        start = starting_vectors(method, hessian.gradient, generator)
        found = methods[method](hessian, start, num_iterations, tol, top_k)
    residual = found.residuals.amax(dim=1)
    hessian_norm, gradient_norm = found.values[:, 0].abs(), norms(hessian.gradient)
    return CurvatureEstimate(
        predicted=hessian.logits.argmax(dim=1),
        loss=hessian.loss,
        gradient_norm=gradient_norm,
        hessian_norm=hessian_norm,
        curvature=hessian_norm / (gradient_norm + GRADIENT_EPS),
        eigenvalue=found.values[:, 0],
        residual=residual,
        products=found.products,
        converged=residual <= tol,
        eigenvalues=found.values,
        **probes,
    )
