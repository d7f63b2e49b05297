"""Checkpoints: what a run saves, and models read back from it or from the reference code's files.

A checkpoint is one torch file of plain tensors, dicts, lists, numbers and strings (loaded with weights_only=True):

    format "lcnn", version 1; model_arch, lcnn (whether --lcnn made that low-curvature), dataset, num_classes,
    image_size, class_names, flags (all of the run's); data (their fingerprint); epoch (the last one done), metrics (one
    dict per epoch), model (state_dict), and, until the run is finished, optimizer (state_dict).
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from models.model_selector import model_architecture
from utils.errors import UsageError, UserError, one_line
from utils.files import read_tensors, write_atomically
from utils.outside_model import build_outside_model, is_outside, load_weights
from utils.reference_checkpoint import convert_reference_checkpoint

FORMAT = {"format": "lcnn", "version": 1}
REQUIRED = {
    "model_arch": str,
    "dataset": str,
    "num_classes": int,
    "image_size": int,
    "flags": dict,
    "epoch": int,
    "metrics": list,
    "model": dict,
}


def plain(value):
    """Nested dicts and lists with every tensor detached on the CPU: readable on any machine without pickled classes."""
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


def save_checkpoint(path: Path, checkpoint: dict) -> None:
    """Write a checkpoint atomically; path keeps its old content if that fails."""
    write_atomically(path, lambda file: torch.save(plain(FORMAT | checkpoint), file))


def is_checkpoint(content) -> bool:
    """Whether a torch file's content is a checkpoint of this program."""
    return isinstance(content, dict) and content.get("format") == FORMAT["format"]


def read_checkpoint(path: str | Path) -> dict:
    """Read a checkpoint of ours, or a bare state_dict of the reference code as if it were one (without ``format``).

    Raises:
        UserError: if there is no such file, it is damaged, or it is another program's.
    """
    checkpoint = read_tensors(Path(path), "checkpoint", "use another copy of it")
    if is_checkpoint(checkpoint):
        if checkpoint.get("version") != FORMAT["version"]:
            raise UserError(f"{path}: checkpoint version {checkpoint.get('version')}; this program reads version 1")
        if missing := REQUIRED.keys() - checkpoint.keys():
            raise UserError(f"{path}: an incomplete checkpoint, without {', '.join(sorted(missing))}")
        for name, kind in REQUIRED.items():
            if type(checkpoint[name]) is not kind:
                raise UserError(f"{path}: not a checkpoint of this program: {name} is no {kind.__name__}")
        if checkpoint["image_size"] < 1:
            raise UserError(f"{path}: not a checkpoint of this program: its image size is {checkpoint['image_size']}")
        if not isinstance(data_dir := checkpoint["flags"].get("data_dir", ""), str) or "\0" in data_dir:
            raise UserError(f"{path}: not a checkpoint of this program: its data_dir is no folder's name")
        return checkpoint
    if not isinstance(checkpoint, dict) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in checkpoint.items()
    ):
        raise UserError(f"{path}: another program's file, not a checkpoint of this one or of the reference code")
    try:
        return convert_reference_checkpoint(checkpoint)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def check_architecture(checkpoint: dict, path: str | Path, model_arch: str | None) -> str:
    """The architecture to build: the checkpoint's own, which model_arch (if given) must agree with.

    A reference file does not record the activation's sharpness, so there "resnet18lowbeta" may stand for "resnet18".
    """
    own = checkpoint["model_arch"]
    if model_arch in (None, own) or ("format" not in checkpoint and model_arch == f"{own}lowbeta"):
        return model_arch or own
    raise UsageError(f"{path} holds a {own}, not a {model_arch}; leave --model-arch out")


def load_state(model: nn.Module, state: dict[str, Tensor], path: str | Path, arch: str) -> nn.Module:
    """The model with a checkpoint's weights, and in their dtype; UserError if they do not fit."""
    try:
        load_weights(model, state)
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"{path}: the weights do not fit a {arch} ({one_line(error)})") from error
    return model


def build_model(checkpoint: dict, path: str | Path, model_arch: str | None = None) -> nn.Module:
    """The network of a checkpoint, on the CPU, in eval mode, in the checkpoint's own dtype.

    Raises:
        UsageError: if model_arch is given and is another architecture; or is not given, and the checkpoint names code
            of another project, which a file must not run by itself.
        UserError: if the weights do not fit the architecture.
    """
    arch = check_architecture(checkpoint, path, model_arch)
    num_classes, image_size = checkpoint["num_classes"], checkpoint["image_size"]
    if is_outside(arch):
        if model_arch is None:
            raise UsageError(f"{path} is of a network that {arch} makes; if you trust that, give --model-arch {arch}")
        model = build_outside_model(arch, None, num_classes, image_size if checkpoint.get("lcnn") else None, quiet=True)
    elif arch in model_architecture:
        try:
            with torch.device("meta"):  # sizes that the weights turn out not to have take no memory
                model = model_architecture[arch](num_classes, image_size)
        except (RuntimeError, TypeError, ValueError) as error:
            raise UserError(
                f"{path}: its image size {image_size} and {num_classes} classes do not fit a {arch} ({one_line(error)})"
            ) from error
    else:
        raise UserError(f"{path}: unknown architecture {arch!r}; there are {', '.join(model_architecture)}")
    return load_state(model, checkpoint["model"], path, arch).eval()


def load_model(path: str | Path, model_arch: str | None = None) -> nn.Module:
    """The network saved in a checkpoint of ours or of the reference code, in eval mode, in its own dtype.

    Args:
        path: the checkpoint file.
        model_arch: its architecture, if you want that checked; needed where it is package.module:callable, which runs.

    Returns:
        A module mapping (N, 3, H, H) pixels in [0, 1] to (N, classes) logits, H the checkpoint's image size.

    Raises:
        UserError: if the file is missing, damaged or foreign, or disagrees with model_arch.
    """
    return build_model(read_checkpoint(path), path, model_arch)
