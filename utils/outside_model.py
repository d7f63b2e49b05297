"""Models this project did not build: named as "package.module:callable", with weights in a plain state_dict."""

import functools
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
from utils.files import read_tensors

WRAPPERS = ("state_dict", "model", "model_state_dict", "net")  # keys under which training scripts save a state_dict
REMEDY = "use another copy of it, or save it with torch.save(model.state_dict(), file)"
PARALLEL = "module."  # DataParallel's prefix to every key
PROJECT = Path(__file__).resolve().parent.parent


def is_outside(model_arch: str | None) -> bool:
    """Whether model_arch names a callable, "package.module:callable", rather than one of our architectures or none."""
    return model_arch is not None and ":" in model_arch


OWN_NAMES = ("models", "utils", "data")  # our packages, which a user's project may well have, too


@contextmanager
def users_modules() -> Iterator[None]:
    """The current directory first in the search for modules; where it has a package named as one of ours, that one.

    Ours are put back afterwards. sys.path keeps the directory: the model's code may import more from it later.
    """
    here = Path.cwd()
    if sys.path[0] != str(here):
        sys.path.insert(0, str(here))
    path = list(sys.path)
    clashing = [] if here == PROJECT else [n for n in OWN_NAMES if (here / n).is_dir() or (here / f"{n}.py").is_file()]

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
    """What "package.module:callable" names; the module may be a file in the current directory.

    Raises:
        UsageError: if the module cannot be imported, has no such attribute, or that is not something to call.
    """
    module_name, _, attribute = model_arch.partition(":")
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # it is the user's code: it may raise anything, or be a script that exits
        raise UsageError(
            f"{model_arch}: cannot import {module_name!r} ({one_line(error)}); "
            "give package.module:callable, installed or in the current directory"
        ) from error
    try:
        builder = attrgetter(attribute)(module)
    except AttributeError as error:
        raise UsageError(
            f"{model_arch}: {module_name} has no {attribute!r}; name a function that returns it"
        ) from error
    if isinstance(builder, nn.Module) or not callable(builder):  # a module is callable, but on images
        raise UsageError(
            f"{model_arch}: of type {type(builder).__name__}, not a function; name a function that returns the model"
        )
    return builder


def call_with_num_classes(builder: Callable[..., nn.Module], num_classes: int):
    """builder(num_classes=num_classes) if it has such a parameter or takes any keyword, else builder()."""
    try:
        parameters = inspect.signature(builder).parameters
    except (TypeError, ValueError):  # compiled code may not tell its signature
        parameters = {}
    named = parameters.get("num_classes")
    if named is not None and named.kind in (named.KEYWORD_ONLY, named.POSITIONAL_OR_KEYWORD):
        return builder(num_classes=num_classes)
    if any(parameter.kind == parameter.VAR_KEYWORD for parameter in parameters.values()):
        try:
            return builder(num_classes=num_classes)
        except TypeError:  # it hands its keywords on to something that has no num_classes
            return builder()
    return builder()


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """The state_dict in a file, bare or under one of ``WRAPPERS``.

    Raises:
        UserError: if there is no such file, it is damaged, or it holds no state_dict.
    """
    content = read_tensors(Path(path), "weights", REMEDY)
    if isinstance(content, dict):
        content = next((content[key] for key in WRAPPERS if isinstance(content.get(key), dict)), content)
    if (
        not isinstance(content, dict)
        or not content
        or not all(isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items())
    ):
        raise UserError(f"{path}: holds no state_dict; {REMEDY}")
    return content


def load_weights(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Copy a state_dict into the model, whose floating point dtype becomes the state_dict's (its widest).

    A model on the "meta" device takes over the state_dict's tensors themselves.

    Raises:
        RuntimeError, TypeError: if a key is missing, left over, or has another shape or an impossible dtype.
    """
    if all(key.startswith(PARALLEL) for key in state) and not state.keys() & model.state_dict().keys():
        state = {key.removeprefix(PARALLEL): value for key, value in state.items()}
    for key, own in model.state_dict().items():
        if key in state and isinstance(own, Tensor) and own.is_floating_point() != state[key].is_floating_point():
            raise TypeError(f"{key} is of {state[key].dtype}")
    dtypes = {value.dtype for value in state.values() if value.is_floating_point()}
    dtype = functools.reduce(torch.promote_types, dtypes) if dtypes else None
    if any(parameter.is_meta for parameter in model.parameters()):
        model.load_state_dict(state, assign=True)
        model.to(dtype=dtype, memory_format=torch.contiguous_format)
    else:
        model.to(dtype=dtype).load_state_dict(state)


def as_low_curvature(model: nn.Module, name: str, image_size: int, quiet: bool) -> nn.Module:
    """The low-curvature version for square images of that size; what was replaced is printed unless ``quiet``."""
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    try:
        model, report = low_curvature(model, like.new_zeros(1, 3, image_size, image_size))
    except Exception as error:  # the model's own code runs here
        raise UserError(f"{name}: cannot be made low-curvature ({one_line(error)}); leave --lcnn out") from error
    if not quiet:
        print(f"{name}, made low-curvature:\n{report}")
    return model


def build_outside_model(
    model_arch: str, path: str | Path | None, num_classes: int, lcnn_size: int | None = None, quiet: bool = False
) -> nn.Module:
    """Call what model_arch names, and load the weights at path into the model it returns.

    Args:
        model_arch: "package.module:callable"; the module is installed or a file in the current directory.
        path: a file with the model's state_dict, bare or wrapped as training scripts do; None if the callable
            returns the model with its weights.
        num_classes: passed to the callable if it has such a parameter.
        lcnn_size: height and width of the images for which the model is made low-curvature, before the weights are
            loaded; what was replaced is printed unless ``quiet``. None for the model as it is.

    Returns:
        The model in eval mode, in the dtype of its weights.

    Raises:
        UsageError: if model_arch names nothing that can be called, or that returns no nn.Module.
        UserError: if the callable fails, the file is missing or damaged, or its weights do not fit the model.
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
        model = as_low_curvature(model, model_arch, lcnn_size, quiet)
    if path is not None:
        state = read_state_dict(path)
        try:
            load_weights(model, state)
        except Exception as error:  # the model's own code runs here, too
            raise UserError(
                f"{path}: the weights do not fit {model_arch} with {num_classes} classes ({one_line(error)}); "
                "give the model or the data set they were trained for"
            ) from error
    model.eval()
    return model
