"""The process's settings while it trains or measures: determinism, denormals, precision."""

import ctypes
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.parametrize import is_parametrized

from utils.errors import UsageError

PRECISIONS = ("fp32", "tf32", "bf16")
BACKENDS = (torch.backends.cuda.matmul, torch.backends.cudnn)  # where TF32 may be allowed
PAUSE_SOFT = 1  # omp_pause_soft of OpenMP 5


def check_precision(precision: str, device: torch.device) -> None:
    """Raise UsageError for tf32 where there is none; say so where bf16 will be slow."""
    if precision == "tf32" and device.type != "cuda":
        raise UsageError(f"--precision tf32 is for CUDA devices, not {device.type}; give fp32 or bf16")
    # measured on x86 alone; a CPU with amx_bf16 has avx512_bf16, too
    x86 = device.type == "cpu" and platform.machine() == "x86_64"
    if precision == "bf16" and x86 and not torch.cpu._is_avx512_bf16_supported():
        print("--precision bf16: this CPU has no bf16 arithmetic (avx512_bf16), so a step takes some 16 times as long")


@contextmanager
def training_settings(precision: str = "fp32", deterministic: bool = True) -> Iterator[None]:
    """All that training sets for the whole process, put back afterwards.

    Args:
        precision: with "tf32", matrix products and convolutions read their float32 inputs to 10 bits.
        deterministic: forbid operations whose result can differ between runs.
    """
    attention = sdpa_kernel(SDPBackend.MATH)  # as it is measured; fused attention cannot be differentiated twice
    with tf32_allowed(precision == "tf32"), determinism(deterministic), denormals_flushed(), attention:
        yield


@contextmanager
def tf32_allowed(allowed: bool) -> Iterator[None]:
    """Whether a GPU may read float32 to 10 bits; torch's default lets convolutions do so."""
    before = [backend.allow_tf32 for backend in BACKENDS]
    try:
        for backend in BACKENDS:
            backend.allow_tf32 = allowed
        yield
    finally:
        for backend, was in zip(BACKENDS, before, strict=True):
            backend.allow_tf32 = was


@contextmanager
def determinism(wanted: bool) -> Iterator[None]:
    """Operations whose result is the same in every run, or the fastest kernels."""
    memory = torch.utils.deterministic
    before = torch.get_deterministic_debug_mode(), memory.fill_uninitialized_memory, torch.backends.cudnn.benchmark
    try:
        # use_deterministic_algorithms without its import of torch's compiler, which takes seconds
        torch.set_deterministic_debug_mode("error" if wanted else "default")
        if wanted:
            # cuBLAS reads it when it starts: https://docs.nvidia.com/cuda/cublas/index.html#results-reproducibility
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":16:8")
            memory.fill_uninitialized_memory = False  # it guards against reading unset memory, and costs 12-15 %
        torch.backends.cudnn.benchmark = not wanted  # it picks kernels by their time
        yield
    finally:
        mode, memory.fill_uninitialized_memory, torch.backends.cudnn.benchmark = before
        torch.set_deterministic_debug_mode(mode)


@contextmanager
def denormals_flushed(flushed: bool = True) -> Iterator[None]:
    """Numbers below 1e-38 become 0. A smooth ReLU puts out many, and CPUs are slow with them.

    Within this context, denormals_flushed(False) keeps them for a while. A thread inherits the setting from the one
    that starts it. So both changes end torch's worker threads: the next operation starts others.
    """
    try:
        torch.set_flush_denormal(flushed)
        end_worker_threads()
        yield
    finally:
        torch.set_flush_denormal(not flushed)  # what is measured later in this process needs them
        end_worker_threads()


def end_worker_threads() -> None:
    """Let OpenMP end its idle threads; where torch is built on another library they stay as they are."""
    with suppress(AttributeError):
        ctypes.CDLL(None).omp_pause_resource_all(PAUSE_SOFT)


@contextmanager
def autocast_taken_off(model: nn.Module) -> Iterator[None]:
    """The model as it was before autocast_to_bfloat16; wrapped again afterwards."""
    ours = (forward_in_bfloat16, forward_in_float32)
    wrapped = [m for m in model.modules() if getattr(vars(m).get("forward"), "func", None) in ours]
    forwards = [module.forward for module in wrapped]
    try:
        for module, forward in zip(wrapped, forwards, strict=True):
            del module.forward
            if module.forward != forward.args[0]:  # one that the instance had of its own
                module.forward = forward.args[0]
        yield
    finally:
        for module, forward in zip(wrapped, forwards, strict=True):
            module.forward = forward


@contextmanager
def float32_proper() -> Iterator[None]:
    """Arithmetic on a GPU in float32: TF32 has three digits, too few for second derivatives."""
    with ExitStack() as stack:
        with suppress(RuntimeError):  # settings made through torch's newer fp32_precision stay as they are
            stack.enter_context(tf32_allowed(False))
        yield


def autocast_to_bfloat16(model: nn.Module, device_type: str) -> None:
    """Wrap the model's forward: float32 logits, computed in bfloat16 wherever gradients are recorded.

    Weights, losses, penalties and spectral norms stay in float32, and so does what is evaluated without gradients.
    """
    model.forward = partial(forward_in_bfloat16, model.forward, device_type)
    for module in model.modules():  # torch's spectral_norm
        for parametrizations in module.parametrizations.values() if is_parametrized(module) else ():
            for parametrization in parametrizations:
                parametrization.forward = partial(forward_in_float32, parametrization.forward, device_type)


# A partial of a bound method, unlike a closure, is copied with its module by copy.deepcopy.
def forward_in_bfloat16(forward: Callable, device_type: str, *inputs, **keywords):
    """forward(*inputs, **keywords) under autocast, if gradients are recorded, with float32 logits."""
    # without the cache of cast weights: each is used once
    with torch.autocast(device_type, torch.bfloat16, enabled=torch.is_grad_enabled(), cache_enabled=False):
        logits = forward(*inputs, **keywords)
    return logits.float() if getattr(logits, "dtype", None) == torch.bfloat16 else logits


def forward_in_float32(forward: Callable, device_type: str, *inputs):
    """forward(*inputs) without autocast."""
    with torch.autocast(device_type, enabled=False):
        return forward(*inputs)
