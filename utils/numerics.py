"""Small numerics: random numbers by example, norms, comparing tensors, a model held still."""

import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

RTOL = 1e-4  # of the largest logit: what the order of a sum, which varies on a GPU, may change
# one generator for all examples, one for each, or torch's global one
Generators = torch.Generator | Sequence[torch.Generator] | None


def seed_everything(seed: int) -> None:
    """Seed the global generators of torch, numpy and Python: others' losses draw from any of them."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def draw_normal(like: Tensor, generator: Generators) -> Tensor:
    """Standard normal numbers in the shape, dtype and device of like (N, ...)."""
    if isinstance(generator, Sequence):
        return torch.stack([draw_normal(row, own) for row, own in zip(like, generator, strict=True)])
    device = like.device if generator is None else generator.device
    return torch.randn(like.shape, generator=generator, dtype=like.dtype, device=device).to(like.device)


@contextmanager
def frozen_in_eval(model: nn.Module) -> Iterator[None]:
    """The model in eval mode with no parameter requiring a gradient; restored afterwards."""
    training = [module for module in model.modules() if module.training]
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        model.eval().requires_grad_(False)
        yield
    finally:
        for module in training:
            module.training = True
        for parameter in trainable:
            parameter.requires_grad_(True)


def norms(x: Tensor) -> Tensor:
    """(N, ...) -> (N,): the 2-norm of each row, at any scale: squares of very small numbers would be lost."""
    x = x.flatten(1)
    largest = x.abs().amax(dim=1, keepdim=True)
    return torch.linalg.vector_norm(x / torch.where(largest > 0, largest, 1), dim=1) * largest[:, 0]


def normalize(x: Tensor) -> Tensor:
    """(N, D): each row over its 2-norm; zero stays zero."""
    norm = norms(x)[:, None]
    return x / torch.where(norm > 0, norm, 1)


def same(a: Tensor, b: Tensor, rtol: float) -> bool:
    """Whether two tensors have one shape and agree to rtol of b's largest magnitude."""
    if a.shape != b.shape:
        return False
    a, b = a.float(), b.float()
    scale = float(b[b.isfinite()].abs().max()) if b.isfinite().any() else 0
    return torch.allclose(a, b, rtol=0, atol=rtol * scale, equal_nan=True)


def at_chance(accuracy: float, labels: Iterable[int]) -> bool:
    """Whether an accuracy in percent is no better, within two standard errors, than the most frequent label's share.

    A network that has learned nothing always answers that label. A perfect one never counts as such.
    """
    counts = Counter(labels)
    share = max(counts.values()) / counts.total()
    error = (share * (1 - share) / counts.total()) ** 0.5
    return accuracy < 100 and accuracy / 100 <= share + 2 * error


def tensors(value) -> Iterator[Tensor]:
    """Copies of the tensors and floats in nested tuples, lists and dicts."""
    if isinstance(value, (Tensor, float)):
        yield torch.as_tensor(value).detach().clone()
    elif isinstance(value, (tuple, list, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from tensors(item)
