"""Networks this project did not build, named as "package.module:callable"."""

import importlib
import inspect
import io
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from operator import attrgetter
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from models.conversion import low_curvature
from utils.errors import UsageError, UserError, one_line
from utils.numerics import frozen_in_eval

PROJECT = Path(__file__).resolve().parent.parent
# our packages, which a user's project may well have, too
OWN_NAMES = ("curvature", "data", "experiments", "models", "training", "utils")


@contextmanager
def explained(problem: str, remedy: str, kind: type[UserError] = UserError) -> Iterator[None]:
    """One line for whatever is raised in the block: the user's code may raise anything, or be a script that exits."""
    try:
        yield
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        raise kind(f"{problem} ({one_line(error)}); {remedy}") from error


@contextmanager
def users_modules() -> Iterator[None]:
    """Imports look into the current directory first, also for packages named as ours, which are put back.

    sys.path keeps the directory: the model's code may import more from it later.
    """
    here = Path.cwd()
    if sys.path[0] != str(here):
        sys.path.insert(0, str(here))
    path = list(sys.path)
    theirs = [name for name in OWN_NAMES if (here / name).is_dir() or (here / f"{name}.py").is_file()]
    clashing = [] if here == PROJECT else theirs

    def take() -> dict[str, ModuleType]:
        return {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] in clashing}

    ours = take()
    if clashing:  # or our package would win over a folder of theirs without __init__.py
        sys.path[:] = [entry for entry in path if Path(entry).resolve() != PROJECT]
    try:
        yield
    finally:
        sys.path[:] = path
        take()
        sys.modules.update(ours)


def import_callable(model_arch: str) -> Callable[..., nn.Module]:
    """What "package.module:callable" names; UsageError if that cannot be imported or called."""
    module_name, _, attribute = model_arch.partition(":")
    problem = f"{model_arch}: cannot import {attribute!r} from {module_name!r}"
    remedy = "give package.module:callable, installed or in the current directory"
    if module_name.endswith(".py") or "/" in module_name:
        remedy = f"give {Path(module_name).stem}:{attribute}, in the folder that this file is in"
    with explained(problem, remedy, UsageError):
        builder = attrgetter(attribute)(importlib.import_module(module_name))
    if isinstance(builder, nn.Module) or not callable(builder):  # a module is callable, but on images
        what = f"of type {type(builder).__name__}, not a function"
        raise UsageError(f"{model_arch}: {what}; name a function that returns the model")
    return builder


def call_with_num_classes(builder: Callable[..., nn.Module], num_classes: int):
    """builder(num_classes=num_classes) if it takes that, else builder()."""
    signature = inspect.signature(builder)
    try:
        signature.bind(num_classes=num_classes)
        return builder(num_classes=num_classes)
    except TypeError:
        if "num_classes" in signature.parameters:
            raise
        return builder()  # or it hands its keywords on to something that has no num_classes


@contextmanager
def torch_settings_kept() -> Iterator[None]:
    """What a module of the user's sets when it is imported, for its own scripts, is put back."""
    device, threads, cudnn = torch.get_default_device(), torch.get_num_threads(), torch.backends.cudnn
    with ExitStack() as put_back:
        put_back.callback(torch.set_grad_enabled, torch.is_grad_enabled())
        put_back.callback(torch.set_default_dtype, torch.get_default_dtype())
        put_back.callback(torch.set_deterministic_debug_mode, torch.get_deterministic_debug_mode())
        for name in ("benchmark", "allow_tf32"):
            put_back.callback(setattr, cudnn, name, getattr(cudnn, name))
        with suppress(RuntimeError):  # settings made through torch's newer fp32_precision stay as they are
            put_back.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
        try:
            yield
        finally:
            if torch.get_default_device() != device:  # merely to set it slows every later call
                torch.set_default_device(device)
            if torch.get_num_threads() != threads:
                torch.set_num_threads(threads)


def uncompiled(model: nn.Module) -> nn.Module:
    """The network without torch.compile, which cannot be differentiated twice; its parts likewise."""
    for module in list(model.modules()):
        module._compiled_call_impl = None  # of module.compile()
        for name, child in module._modules.items():
            module._modules[name] = getattr(child, "_orig_mod", child)
    return getattr(model, "_orig_mod", model)


def build_outside_network(
    model_arch: str, num_classes: int, image_size: int, lcnn: bool = False, quiet: bool = False
) -> nn.Module:
    """The network that package.module:callable returns, in eval mode and not compiled, its lazy layers initialized.

    Args:
        model_arch: the module is installed, or a file in the current directory.
        num_classes: passed to the callable if it takes it.
        image_size: height of the images, for lazy layers and for lcnn.
        lcnn: make the network low-curvature.
        quiet: do not print what that replaced.

    Raises:
        UsageError: if model_arch names nothing that can be called, or that returns no nn.Module.
        UserError: if the callable, or making its network low-curvature, fails.
    """
    with users_modules(), torch_settings_kept():
        builder = import_callable(model_arch)
        with explained(f"{model_arch}: failed to build the model", "mend it"):
            model = call_with_num_classes(builder, num_classes)
    if not isinstance(model, nn.Module):
        raise UsageError(f"{model_arch}: returns a {type(model).__name__}, not a torch.nn.Module; return the model")
    if isinstance(model, torch.jit.ScriptModule):
        raise UsageError(f"{model_arch}: returns TorchScript, which cannot be trained or measured; return the model")
    with explained(f"{model_arch}: has no eval mode", "return the model itself"):  # as an exported program
        model = uncompiled(model).eval()
    if any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()]):
        raise UserError(f"{model_arch}: has weights on the meta device, without values; build it on the CPU")
    if lcnn or any(map(is_lazy, [*model.parameters(), *model.buffers()])):
        like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
        example = torch.zeros(1, 3, image_size, image_size, dtype=like.dtype, device=like.device)
        with torch.no_grad():  # old weight_norm computes its weight here: one that carries no gradient can be copied
            forward(model, example, None, model_arch)
        lazy = [n for n, tensor in [*model.named_parameters(), *model.named_buffers()] if is_lazy(tensor)]
        if lazy:
            problem = f"its forward in eval mode does not initialize the lazy {lazy[0]}"
            raise UserError(f"{model_arch}: {problem}; give that layer its sizes, or remove it")
    if lcnn:
        with explained(f"{model_arch}: cannot be made low-curvature", "leave --lcnn out"):
            model, report = low_curvature(model, example)
        if not quiet:
            print(f"{model_arch}, made low-curvature:\n{report}")
    return model


def try_forward(model: nn.Module, images: Tensor, num_classes: int, name: str) -> None:
    """Run the model once in eval mode, only to raise the errors of ``forward``."""
    with frozen_in_eval(model), torch.no_grad():
        forward(model, images, num_classes, name)


def check_training(model: nn.Module, images: Tensor, num_classes: int, name: str) -> None:
    """Refuse a network that cannot be trained, before the first epoch; it is left as it was, in eval mode.

    In training mode it must give one tensor, with a gradient. Its state must survive a save and a load.

    Args:
        images: (N, 3, H, W) pixels, two or more for BatchNorm.

    Raises:
        UserError: naming the model, what is wrong and the remedy.
    """
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError(f"{name}: nothing is trainable; set requires_grad of the parameters that are to be trained")
    file = io.BytesIO()
    try:
        torch.save(model.state_dict(), file)
        file.seek(0)
        state = torch.load(file, map_location=images.device, weights_only=True)
    except Exception as error:
        problem = f"its state cannot be saved and loaded ({type(error).__name__})"
        raise UserError(f"{name}: {problem}; keep plain numbers, text and tensors in it") from error
    buffers = [(module, *item) for module in model.modules() for item in module._buffers.items()]
    unsaved = [(m, key, None) for m, key, buffer in buffers if buffer is None]  # filled by the first batch
    unsaved += [(m, key, b.clone()) for m, key, b in buffers if b is not None and key in m._non_persistent_buffers_set]
    try:
        with torch.random.fork_rng([images.device] if images.is_cuda else []):
            logits = forward(model.train(), images, num_classes, name)
        if logits.requires_grad:
            try:
                logits.sum().backward()
            except Exception:  # the first step says it, with the remedy
                return
        if all(parameter.grad is None for parameter in model.parameters()):
            raise UserError(f"{name}: gives logits without gradient in training; remove any no_grad or detach")
    finally:
        model.zero_grad()
        # the old weight_norm keeps a weight with a graph, which could not be copied; this gives it one without
        try_forward(model, images, num_classes, name)
        for module, key, buffer in unsaved:
            module._buffers[key] = buffer
        with explained(f"{name}: its state cannot be loaded again", "mend its state_dict or load_state_dict"):
            model.eval().load_state_dict(state)  # the statistics as they were


def forward(model: nn.Module, images: Tensor, num_classes: int | None, name: str) -> Tensor:
    """The logits (N, num_classes) of the images, copied as a model may change its input in place.

    Args:
        num_classes: None if it is not to be checked yet.

    Raises:
        UserError: if the model fails or returns anything else.
    """
    mode = " in training mode" if model.training else ""
    shape, expected = tuple(images.shape), (len(images), num_classes)
    with explained(f"{name}: fails on images of shape {shape}{mode}", "mend it or give images of its size"):
        logits = model(images.clone())
    if not isinstance(logits, Tensor):
        number = f" of {len(logits)} outputs" if isinstance(logits, (tuple, list, dict)) and model.training else ""
        raise UserError(f"{name}: gives a {type(logits).__name__}{number}{mode}; return the tensor of logits alone")
    found = tuple(logits.shape)
    if num_classes is None or (found == expected and logits.is_floating_point()):
        return logits
    what, remedy = f"{logits.dtype} {found} for images of shape {shape}", f"return floating point logits {expected}"
    if found != expected and logits.ndim == 2 and len(logits) == len(images):
        what = f"{found[1]} logits, the data set has {num_classes} classes"
        remedy = "give the data set it was trained on"
    raise UserError(f"{name}: gives {what}; {remedy}")
