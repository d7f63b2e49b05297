"""The arithmetic of training: float32, or convolutions in TF32 or bfloat16, which a GPU's tensor cores do faster."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import wraps

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from utils.errors import UsageError

PRECISIONS = ("fp32", "tf32", "bf16")
BACKENDS = (torch.backends.cuda.matmul, torch.backends.cudnn)  # where TF32 may be allowed


def check_precision(precision: str, device: torch.device) -> None:
    """Raise UsageError for tf32 where there is none."""
    if precision == "tf32" and device.type != "cuda":
        raise UsageError(f"--precision tf32 is for CUDA devices, not {device.type}; give fp32 or bf16")


@contextmanager
def precision_of_the_process() -> Iterator[None]:
    """Put back afterwards what ``set_precision`` changes for the whole process."""
    allowed = [backend.allow_tf32 for backend in BACKENDS]
    try:
        yield
    finally:
        for backend, was in zip(BACKENDS, allowed, strict=True):
            backend.allow_tf32 = was


@contextmanager
def float32_proper() -> Iterator[None]:
    """Arithmetic on a GPU in float32: TF32, torch's default for convolutions, has three digits, too few for second
    derivatives.

    Settings made through torch's newer fp32_precision, which these must not be mixed with, stay as they are.
    """
    with ExitStack() as stack:
        with suppress(RuntimeError):
            stack.enter_context(precision_of_the_process())
            set_tf32("fp32")
        yield


def set_precision(model: nn.Module, precision: str, device: torch.device) -> None:
    """Make training compute in one of ``PRECISIONS``; weights, losses and penalties stay in float32 in each.

    tf32: matrix products and convolutions read their float32 inputs to 10 bits. bf16: autocast of the model's forward
    wherever gradients are taken; spectral norms and what is evaluated without gradients stay in float32.
    """
    set_tf32(precision)
    if precision == "bf16":
        autocast_to_bfloat16(model, device.type)


def set_tf32(precision: str) -> None:
    """The part of ``set_precision`` that is the process's, not the model's."""
    for backend in BACKENDS:
        backend.allow_tf32 = precision == "tf32"


def autocast_to_bfloat16(model: nn.Module, device_type: str) -> None:
    """Wrap the model's forward: (N, ...) -> float32 logits, computed under autocast while gradients are recorded."""
    forward = model.forward

    @wraps(forward)
    def autocast_forward(x: Tensor) -> Tensor:
        # without the cache of cast weights: a CUDA graph must not keep one, and each weight is used once
        with torch.autocast(device_type, torch.bfloat16, enabled=torch.is_grad_enabled(), cache_enabled=False):
            logits = forward(x)
        return logits.float() if logits.dtype == torch.bfloat16 else logits

    model.forward = autocast_forward
    for module in model.modules():  # torch's spectral_norm
        for parametrizations in module.parametrizations.values() if is_parametrized(module) else ():
            for parametrization in parametrizations:
                parametrization.forward = torch.autocast(device_type, enabled=False)(parametrization.forward)
