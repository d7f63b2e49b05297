"""Networks this project did not build, named as "package.module:callable"."""

import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from operator import attrgetter
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from models.conversion import low_curvature
from utils.errors import UsageError, UserError, one_line
from utils.numerics import frozen_in_eval

PROJECT = Path(__file__).resolve().parent.parent
# our packages, which a user's project may well have, too
OWN_NAMES = ("curvature", "data", "experiments", "models", "training", "utils")


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
        names = [name for name in sys.modules if name.split(".")[0] in clashing]
        return {name: sys.modules.pop(name) for name in names}

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
    try:
        builder = attrgetter(attribute)(importlib.import_module(module_name))
    except (Exception, SystemExit) as error:  # the user's code may raise anything, or be a script that exits
        what = f"cannot import {attribute!r} from {module_name!r} ({one_line(error)})"
        remedy = "give package.module:callable, installed or in the current directory"
        raise UsageError(f"{model_arch}: {what}; {remedy}") from error
    if isinstance(builder, nn.Module) or not callable(builder):  # a module is callable, but on images
        kind = type(builder).__name__
        raise UsageError(f"{model_arch}: of type {kind}, not a function; name a function that returns the model")
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


def build_outside_network(model_arch: str, num_classes: int, lcnn_size: int | None = None, quiet=False) -> nn.Module:
    """The network that package.module:callable returns, in eval mode.

    Args:
        model_arch: the module is installed, or a file in the current directory.
        num_classes: passed to the callable if it takes it.
        lcnn_size: height of the images for which the network is made low-curvature; None leaves it as it is.
        quiet: do not print what that replaced.

    Raises:
        UsageError: if model_arch names nothing that can be called, or that returns no nn.Module.
        UserError: if the callable, or making its network low-curvature, fails.
    """
    with users_modules():
        builder = import_callable(model_arch)
        try:
            model = call_with_num_classes(builder, num_classes)
        except (Exception, SystemExit) as error:
            raise UserError(f"{model_arch}: failed to build the model ({one_line(error)}); mend it") from error
    if not isinstance(model, nn.Module):
        raise UsageError(f"{model_arch}: returns a {type(model).__name__}, not a torch.nn.Module; return the model")
    if lcnn_size:
        like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
        try:
            model, report = low_curvature(model, like.new_zeros(1, 3, lcnn_size, lcnn_size))
        except Exception as error:  # the model's own code runs here
            message = f"{model_arch}: cannot be made low-curvature ({one_line(error)}); leave --lcnn out"
            raise UserError(message) from error
        if not quiet:
            print(f"{model_arch}, made low-curvature:\n{report}")
    return model.eval()


def try_forward(model: nn.Module, images: Tensor, num_classes: int, name: str) -> None:
    """``forward`` in eval mode, for its errors alone."""
    with frozen_in_eval(model), torch.no_grad():
        forward(model, images, num_classes, name)


def forward(model: nn.Module, images: Tensor, num_classes: int, name: str) -> Tensor:
    """The logits (N, num_classes) of the images, copied as a model may change its input in place.

    Raises:
        UserError: if the model fails or returns anything else.
    """
    shape, expected = tuple(images.shape), (len(images), num_classes)
    try:
        logits = model(images.clone())
    except Exception as error:  # the user's code may raise anything
        message = f"{name}: fails on images of shape {shape} ({one_line(error)}); mend it or give images of its size"
        raise UserError(message) from error
    if not isinstance(logits, Tensor):
        raise UserError(f"{name}: gives a {type(logits).__name__}; return the tensor of logits alone")
    found = tuple(logits.shape)
    if found != expected and logits.ndim == 2 and len(logits) == len(images):
        sizes = f"{found[1]} logits, the data set has {num_classes} classes"
        raise UserError(f"{name}: gives {sizes}; give the data set it was trained on")
    if found != expected or not logits.is_floating_point():
        what = f"{logits.dtype} {found} for images of shape {shape}"
        raise UserError(f"{name}: gives {what}; return floating point logits {expected}")
    return logits
