"""Every network by name: ours, or ``package.module:callable``; and the flags that name one."""

import argparse
from functools import partial

import torch
from torch import nn

from models.layers import LCNN, LOWBETA, SOFTPLUS, STANDARD
from models.outside import build_outside_network
from models.resnet import ResNet
from models.vgg import VGG
from utils.errors import UsageError

# name -> callable(num_classes, input_size=32) -> module: (N, 3, H, H) pixels in [0, 1] -> (N, num_classes) logits
model_architecture = {}
for suffix, layers in {"": STANDARD, "lcnn": LCNN, "softplus": SOFTPLUS, "lowbeta": LOWBETA}.items():
    model_architecture |= {
        f"resnet18{suffix}": partial(ResNet, layers, (2, 2, 2, 2)),
        f"resnet34{suffix}": partial(ResNet, layers, (3, 4, 6, 3)),
        f"vgg11{suffix}": partial(VGG, layers),
    }
OURS = ", ".join(model_architecture)
OUR_NETWORKS = (ResNet, VGG)  # what the table above makes; any other network is its user's own code


def is_outside(model_arch: str | None) -> bool:
    """Whether model_arch is a "package.module:callable"."""
    return model_arch is not None and ":" in model_arch


def build_network(model_arch: str, num_classes: int, image_size: int, lcnn=False, quiet=False) -> nn.Module:
    """The network that --model-arch and --lcnn describe, on the CPU, with initial weights.

    Args:
        model_arch: a key of ``model_architecture``, or package.module:callable.
        num_classes: passed to a callable that takes it.
        image_size: height and width of the images, in pixels.
        lcnn: make a package.module:callable's network low-curvature.
        quiet: do not print what that replaced.

    Raises:
        UserError: if the callable cannot be found, fails, or returns no network.
    """
    if is_outside(model_arch):
        return build_outside_network(model_arch, num_classes, image_size, lcnn, quiet)
    model = model_architecture[model_arch](num_classes, image_size)
    return model.to(memory_format=torch.channels_last)  # convolutions are fastest in this layout


def architecture(text: str) -> str:
    """An argparse type: one of ours by name, or package.module:callable."""
    if text not in model_architecture and not is_outside(text):
        raise argparse.ArgumentTypeError(f"{text!r} is neither package.module:callable nor one of {OURS}")
    return text


def add_architecture_flags(group, default: str | None = None, remark: str = "") -> None:
    """--model-arch and --lcnn, the same in every script."""
    group.add_argument(
        "--model-arch",
        type=architecture,
        metavar="NAME",
        default=default,
        help=f"{OURS}; or package.module:callable, any function that returns a network{remark}",
    )
    group.add_argument(
        "--lcnn",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="make the network of a package.module:callable low-curvature, see models/conversion.py (default: off)",
    )


def check_architecture_flags(flags: argparse.Namespace) -> None:
    """Raise UsageError if --lcnn or --image-size does not go with the architecture."""
    if flags.model_arch in model_architecture and (flags.image_size or 16) % 16:
        problem = f"--image-size {flags.image_size}: {flags.model_arch} needs a multiple of 16"
        raise UsageError(f"{problem}; give one, or name a network of your own, package.module:callable")
    if flags.lcnn and not is_outside(flags.model_arch):
        raise UsageError("--lcnn is for --model-arch package.module:callable; ours are named, such as resnet18lcnn")
