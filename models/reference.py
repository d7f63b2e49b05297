"""The state_dicts that the authors' reference code (kylematoba/lcnn) saves, read as exactly its function.

Its keys are paths of numbers, as its modules are nested nn.Sequentials: 0.0 is the stem, 1.0.1.f1 the first block's
first convolution, 25 a VGG's last layer.
"""

import re
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from models.layers import SpectralNormConv2d
from models.model_selector import model_architecture
from models.outside import explained
from utils.errors import UserError

# the reference's names -> ours: of modules,
BLOCK = {r"1\.f1": "conv1", r"1\.f2": "shortcut", r"2\.f1": "activation1", r"3\.f1": "conv2", "5": "activation2"}
RESNET_MODULES = [(r"^0\.0\.", "stem."), (r"^0\.1\.", "activation."), (r"^7\.", "classifier.")] + [
    (rf"^{stage + 1}\.(\d+)\.{theirs}\.", rf"stages.{stage}.\1.{ours}.")
    for stage in range(4)
    for theirs, ours in BLOCK.items()
]
VGG_MODULES = [(r"^25\.", "classifier."), (r"^(\d+)\.", r"features.\1.")]
# and inside a convolution with its BatchNorm
CONV_NORM_NAMES = [
    (r"\.conv\.parametrizations\.weight\.original$", ".conv.weight"),
    (r"\.conv\.parametrizations\.weight\.0\._([uv])$", r".conv.\1"),
    (r"\.bn\.", ".norm."),
    (r"\.log_lipschitz$", ".norm.log_gamma"),
]


def reference_architecture(state: dict[str, Tensor]) -> str | None:
    """The architecture of a state_dict, by its keys; None if it is not the reference's."""
    if "7.parametrizations.weight.original" in state:
        blocks = sum(1 for key in state if re.fullmatch(r"[1-4]\.\d+\.1\.f1\.bn\.running_var", key))
        name = {8: "resnet18", 16: "resnet34"}.get(blocks)
    else:
        name = "vgg11" if "25.weight" in state and "22.bn.running_var" in state else None
    is_lcnn = any(key.endswith("conv.parametrizations.weight.original") for key in state)
    return name + "lcnn" * is_lcnn if name else None


def our_key(key: str, arch: str) -> str:
    """Our name for a key of the reference's state_dict."""
    modules = RESNET_MODULES if arch.startswith("resnet") else VGG_MODULES
    for pattern, replacement in modules + CONV_NORM_NAMES:
        key = re.sub(pattern, replacement, key)
    return key


@torch.no_grad()
def adapt_strided_vectors(state: dict[str, Tensor], arch: str, num_classes: int, input_size: int) -> None:
    """Bring u and v of the strided convolutions to our sizes, in place, keeping the network's function.

    For stride 2 the reference's v is (2H-1) x (2H-1), and sigma_reference the norm on that larger domain. We recompute
    u and v on the true domain, and scale u by sigma_reference / sigma. So in eval the layer divides by
    <u, conv(v)> = sigma_reference, as there; the first training forward normalizes u. (In the BatchNorm behind, the
    factor would change the gamma penalty.)
    """
    model = model_architecture[arch](num_classes, input_size).to(state["classifier.bias"].dtype)
    for name, layer in model.named_modules():
        if isinstance(layer, SpectralNormConv2d) and layer.stride != (1, 1):
            weight, u, v = (state[f"{name}.{key}"] for key in ("weight", "u", "v"))
            sigma_reference = (u * F.conv2d(v, weight, None, layer.stride, layer.padding)).sum()
            layer.weight.copy_(weight)
            layer.u.copy_(F.interpolate(u, layer.u.shape[-2:], mode="bilinear"))
            layer.power_iteration(30)
            state[f"{name}.u"] = layer.u * (sigma_reference / layer.eval().spectral_norm())
            state[f"{name}.v"] = layer.v


def convert_reference_checkpoint(state: dict[str, Tensor], path: str | Path) -> dict:
    """A state_dict of the reference as a checkpoint of ours: architecture, sizes and model state.

    The VGGs there share one activation, saved under several names; each of ours gets its beta.

    Raises:
        UserError: if the keys are not those of any of the reference's architectures.
    """
    arch = reference_architecture(state)
    if arch is None:
        what = "neither a checkpoint of this program nor a state_dict of the reference code's networks"
        raise UserError(f"{path}: {what}; for any other network give --model-arch package.module:callable")
    converted = {our_key(key, arch): value for key, value in state.items()}
    if not arch.endswith("lcnn"):  # the reference's standard networks carry a gamma that nothing uses
        converted = {key: value for key, value in converted.items() if not key.endswith("log_gamma")}
    input_size = 32
    with explained(f"{path}: not a complete state_dict of the reference's {arch}", "use another copy of it"):
        num_classes = len(converted["classifier.bias"])
        if arch.endswith("lcnn"):
            adapt_strided_vectors(converted, arch, num_classes, input_size)
    return {"model_arch": arch, "num_classes": num_classes, "image_size": input_size, "model": converted}
