"""First and second derivatives of each example's cross-entropy with respect to its own pixels.

In eval mode examples do not mix, so the Hessian of the summed loss is block diagonal: one product serves every example.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from curvature.folding import FoldedNetwork, Kept


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """(N,) losses, relatively accurate however small: log(1 + sum over j != y of exp(z_j - z_y))."""
    others = logits - logits.gather(1, labels[:, None])
    return F.softplus(others.scatter(1, labels[:, None], -torch.inf).logsumexp(dim=1))


def cross_entropy_gradient(logits: Tensor, labels: Tensor) -> Tensor:
    """(N, classes) dl/dz = p - e_y, with p_y - 1 as minus the sum of the others.

    The subtraction would leave 0 of a confident example: in float32 p_y is 1 from a margin of 17 on, while the other
    probabilities, and h and g which are proportional to them, are still accurate.
    """
    own = labels[:, None] == torch.arange(logits.shape[1], device=labels.device)
    others = logits.softmax(dim=1).masked_fill(own, 0.0)
    # not a scatter of the sums: on a GPU its deterministic version waits for the host
    return torch.where(own, -others.sum(dim=1, keepdim=True), others)


def cross_entropy_hessian_product(logits: Tensor, dz: Tensor) -> Tensor:
    """(N, classes) (diag(p) - p p') dz, free of cancellation: with dz relative to the most probable class."""
    p = logits.softmax(dim=1)
    dz = dz - dz.gather(1, p.argmax(dim=1, keepdim=True))
    return p * (dz - (p * dz).sum(dim=1, keepdim=True))


class CrossEntropyGradient(torch.autograd.Function):
    """cross_entropy_gradient, differentiable once more through cross_entropy_hessian_product."""

    @staticmethod
    def forward(ctx, logits, labels):
        ctx.save_for_backward(logits)
        return cross_entropy_gradient(logits, labels)

    @staticmethod
    def backward(ctx, dz):
        (logits,) = ctx.saved_tensors
        return cross_entropy_hessian_product(logits, dz), None


def input_vector_jacobian_product(
    network: nn.Module | FoldedNetwork, images: Tensor, cotangent: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """(N, classes) logits z at images (N, ...), and the (N, ...) gradient of <cotangent(z), z>, cotangent(z) constant.

    The network is frozen and in eval mode. The cotangent dl/dz of a loss l gives the input gradient of l, a one-hot row
    that of a logit.
    """
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        at = images.detach().clone().requires_grad_()
        # a clone, for models that begin with something in place; a dtype, for those with autocast inside
        logits = network(at.clone()).to(at.dtype)
    (gradient,) = torch.autograd.grad(logits, at, cotangent(logits.detach()))
    return logits.detach(), gradient


def check_labels(labels: Tensor, logits: Tensor) -> None:
    """Raise ValueError unless every label is a class: on a GPU a wrong index would end the process."""
    if labels.min() < 0 or labels.max() >= logits.shape[1]:
        raise ValueError(f"labels from {labels.min()} to {labels.max()}, but the model has {logits.shape[1]} classes")


class LowestPrecision(TorchFunctionMode):
    """Notes the coarsest ``eps`` of all that is computed: a model may have autocast inside."""

    eps = 0.0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.is_floating_point():
            self.eps = max(self.eps, torch.finfo(result.dtype).eps)
        return result


class InputHessian(ABC):
    """The Hessian H of each example's loss with respect to its pixels, as an operator."""

    eps: float = 0.0  # relative rounding of the products, where it is coarser than that of the images' dtype
    logits: Tensor  # (N, classes)
    loss: Tensor  # (N,) cross-entropies
    gradient: Tensor  # (N, ...) input gradients

    @abstractmethod
    def product(self, v: Tensor) -> Tensor:
        """(n, ...) H v, row by row for the examples at hand: all N, or those ``restrict`` left."""

    @abstractmethod
    def restrict(self, keep: Tensor) -> None:
        """From now on work for the examples alone that the (n,) boolean mask keeps."""


class DoubleBackwardHessian(InputHessian):
    """For any model: the graph of the input gradient is kept, and differentiated once per product."""

    def __init__(self, model: nn.Module, images: Tensor, labels: Tensor):
        self._model = model
        self.logits = self._build_graph(images, labels)
        self.gradient = self._gradient.detach()
        self.loss = cross_entropy(self.logits, labels)

    @torch.enable_grad()
    def _build_graph(self, images: Tensor, labels: Tensor) -> Tensor:
        self._gradient = None  # an old graph goes before the new one comes
        self._at = images.detach().clone().requires_grad_()
        # fused attention has no second derivative; clone and dtype as above
        with sdpa_kernel(SDPBackend.MATH), LowestPrecision() as precision:
            logits = self._model(self._at.clone()).to(self._at.dtype)
        self.eps, self._labels = precision.eps, labels
        check_labels(labels, logits)
        if logits.requires_grad:  # maybe that of a layer of no module, behind a detach
            residual = CrossEntropyGradient.apply(logits, labels)
            (self._gradient,) = torch.autograd.grad(logits, self._at, residual, create_graph=True, allow_unused=True)
        if self._gradient is None:
            raise ValueError("the logits carry no gradient; remove any no_grad or detach from the model's forward")
        self._rows = torch.arange(len(images), device=images.device)
        return logits.detach()

    def product(self, v):
        if not self._gradient.requires_grad:  # of logits that are rounded, say
            return torch.zeros_like(v)
        if len(v) < len(self._at):
            v = torch.zeros_like(self._at).index_copy_(0, self._rows, v)
        (product,) = torch.autograd.grad(self._gradient, self._at, v, retain_graph=True, materialize_grads=True)
        return product[self._rows]

    def restrict(self, keep):
        self._rows = self._rows[keep]
        # a new graph costs about a product: worth it once a quarter of the old one is idle
        if 0 < len(self._rows) <= 0.75 * len(self._at):
            self._build_graph(self._at[self._rows], self._labels[self._rows])


class FoldedHessian(InputHessian):
    """For our networks, folded: the derivatives written out in curvature/folding.py."""

    @torch.no_grad()
    def __init__(self, network: FoldedNetwork, images: Tensor, labels: Tensor):
        self._network = network
        self._kept: Kept = {}
        self.logits = self._logits = network.through("forward", images, self._kept)
        check_labels(labels, self.logits)
        self.loss = cross_entropy(self.logits, labels)
        self.gradient = network.through("backward", cross_entropy_gradient(self.logits, labels), self._kept)

    @torch.no_grad()
    def product(self, v):
        dz = self._network.through("tangent", v, self._kept)
        da = cross_entropy_hessian_product(self._logits, dz)
        return self._network.through("tangent_backward", da, self._kept)

    def restrict(self, keep):
        self._logits = self._logits[keep]
        for layer, tensors in self._kept.items():
            self._kept[layer] = tuple(t[keep] if isinstance(t, Tensor) else t for t in tensors)


def input_hessian(model: nn.Module | FoldedNetwork, images: Tensor, labels: Tensor) -> InputHessian:
    """The input Hessian of a batch of images (N, ...) with class indices (N,); the model is frozen and in eval mode."""
    kind = FoldedHessian if isinstance(model, FoldedNetwork) else DoubleBackwardHessian
    return kind(model, images, labels)
