"""Any convolutional network turned into its low-curvature version (paper, section 4).

Each layer is replaced in its parent; all else stays: classes, hooks, parameter names, what depends on the training
mode. An example input shows which layers are called, at what sizes and in what order. Activations that are called as
functions become modules first (models/tracing.py).
"""

import copy
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor, fx, nn
from torch.nn.utils.parametrizations import _SpectralNorm, spectral_norm
from torch.nn.utils.parametrize import is_parametrized

from models import tracing
from models.layers import CenteredSoftplus, LipschitzBatchNorm2d, SpectralNormConv2d
from models.tracing import ACTIVATIONS, LAYERS, LOW_BETA, REASONS, Call, FunctionCall, put

# relative, of sigma^2: a weight divided by sigma has a norm of at most 1 + 5e-5. Float32 allows it.
EIGENVALUE_TOLERANCE = 1e-4


class Entry(NamedTuple):
    """A layer, an activation or a function of the network, in the report."""

    name: str  # dotted module path; of a function that of the module whose forward calls it, and the function
    kind: str  # what it was: a class, or a function as "relu()"
    outcome: str  # the class it is now, or why it was left


class ConversionReport(NamedTuple):
    """What low_curvature did, in the order of the calls; what the example did not reach is last."""

    replaced: tuple[Entry, ...]  # has a low-curvature version now
    left: tuple[Entry, ...]  # has curvature, or a Lipschitz constant of its own, and stays as it was
    traced: tuple[Entry, ...]  # modules whose forward is a graph now (models/tracing.py)

    def __str__(self) -> str:
        """Equal entries in one line: their number, what became of them, and where."""
        lines = []
        for title, entries in self._asdict().items():
            lines.append(f"{title} {len(entries)}")
            arrow = ": " if title == "left" else " -> "
            names = defaultdict(list)
            for name, kind, outcome in entries:
                names[kind + arrow + outcome].append(name or "the network itself")
            for change, group in names.items():
                more = f", and {len(group) - 3} more" if len(group) > 3 else ""
                lines.append(f"  {len(group):4} {change} ({', '.join(group[:3])}{more})")
        return "\n".join(lines)


def low_curvature(
    model: nn.Module,
    example_input: Tensor,
    activations: bool = True,
    convolutions: bool = True,
    linears: bool = True,
    batchnorms: bool = True,
) -> tuple[nn.Module, ConversionReport]:
    """A low-curvature copy of a network, its weights, statistics, dtype, device and training mode kept.

    - Each call of an activation gets a CenteredSoftplus; Hardsigmoid, a gate, becomes Sigmoid (curvature at most 1).
    - Conv2d becomes SpectralNormConv2d for its input size on the example.
    - Linear gets torch's spectral_norm, and with it the parameter name ``parametrizations.weight.original``.
    - BatchNorm2d becomes LipschitzBatchNorm2d.
    - Running statistics right behind a normalized layer are rescaled with its output.

    The network computes another function, and is meant to be trained. To evaluate it untrained, or to start well, call
    training.epoch.calibrate_batchnorm first, as most statistics do not fit any more. Its state_dict can be loaded into
    another conversion of the same architecture at the same input size.

    Args:
        model: the network, not changed by this.
        example_input: (N, C, H, W) in the model's dtype and on its device; run in eval mode, without gradients.
        activations, convolutions, linears, batchnorms: which parts to convert.

    Returns:
        The network, and what was replaced, and what was not and why. Torch's random state is left as it was.
    """
    enabled = {"activations": activations, "convolutions": convolutions, "linears": linears, "batchnorms": batchnorms}
    devices = [example_input.device] if example_input.is_cuda else []
    with torch.random.fork_rng(devices), torch.no_grad():
        if activations:
            network, calls, reasons = tracing.separate_activations(model, example_input)
        else:
            network = copy.deepcopy(model).eval()
            calls, reasons = tracing.observe(network, example_input)[1], {}
        network, replaced, left = _replace(network, calls, enabled, reasons)
    for name, module in model.named_modules():  # parents first: what was added to one is in its mode
        network.get_submodule(name).train(module.training)
    graphs = ((name, module) for name, module in network.named_modules() if isinstance(module, fx.GraphModule))
    traced = tuple(Entry(name, type(module).__name__, "torch.fx.GraphModule") for name, module in graphs)
    return network, ConversionReport(tuple(replaced), tuple(left), traced)


def _replace(
    network: nn.Module, calls: list[Call], enabled: dict[str, bool], reasons: dict[str, str]
) -> tuple[nn.Module, list[Entry], list[Entry]]:
    """Replace the layers of a network in eval mode, in the order of their calls."""
    num_owners = Counter(id(parameter) for module in network.modules() for parameter in module._parameters.values())
    uses = defaultdict(list)
    for call in calls:
        uses[call.name].append(call)
    layers = [name for name, module in network.named_modules() if isinstance(module, LAYERS)]
    inside_layers = tuple(f"{name}." for name in layers)
    for name in layers:  # what the example did not reach
        if not name.startswith(inside_layers):
            uses.setdefault(name, [])
    replaced, left = [], []
    normalized = {}  # the layers that are now, by their paths
    for name, its_calls in uses.items():
        if its_calls and (kind := its_calls[0].kind):
            reason = REASONS.get(kind) or reasons.get(its_calls[0].owner, "activations=False")
            left.append(Entry(name.removesuffix("()"), kind, reason))
            continue
        module = network.get_submodule(name)
        sources = {call.source for call in its_calls}
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and len(sources) == 1:
            _rescale(module, normalized.get(sources.pop()))
        kind = module.kind if isinstance(module, FunctionCall) else type(module).__name__
        tied = any(num_owners[id(parameter)] > 1 for parameter in module.parameters(recurse=False))
        new = _converted(module, its_calls, enabled, tied)
        if new is None:
            continue
        if isinstance(new, str):
            left.append(Entry(name, kind, new))
            continue
        if isinstance(new, SpectralNormConv2d | nn.Linear):
            normalized[name] = new
        outcome = "Linear with spectral_norm" if isinstance(new, nn.Linear) else type(new).__name__
        if isinstance(new, CenteredSoftplus) and len(its_calls) > 1:
            because = next((f", as {reasons[call.owner]}" for call in its_calls if call.owner in reasons), "")
            outcome += f", one beta for {len(its_calls)} calls{because}"
        replaced.append(Entry(name, kind, outcome))
        network = put(network, module, new)
    return network, replaced, left


def _converted(layer: nn.Module, calls: list[Call], enabled: dict[str, bool], tied: bool) -> nn.Module | str | None:
    """What replaces a layer, or the reason to leave it; None if its curvature is low already."""
    if isinstance(layer, CenteredSoftplus | SpectralNormConv2d | LipschitzBatchNorm2d):
        return None
    if isinstance(layer, nn.Softplus) and layer.beta <= LOW_BETA:
        return None
    parametrizations = layer.parametrizations.weight if is_parametrized(layer, "weight") else []
    if isinstance(layer, nn.Linear) and [type(one) for one in parametrizations] == [_SpectralNorm]:
        return None
    for kinds, part, convert in CONVERSIONS:
        if not isinstance(layer, kinds):
            continue
        if not enabled[part]:
            return f"{part}=False"
        if not calls:
            return "not called on the example"
        computed = isinstance(getattr(layer, "weight", None), Tensor) and "weight" not in layer._parameters
        if is_parametrized(layer) or computed:  # by hooks: the older weight_norm and spectral_norm
            return "parametrized already"
        if tied:
            return "shares its weights with another module"
        return tracing.altered(layer) or convert(layer, calls)
    return next(REASONS[kind.__name__] for kind in type(layer).__mro__ if kind.__name__ in REASONS)


def _convert_activation(module: nn.Module, calls: list[Call]) -> nn.Module | str:
    if getattr(module, "inplace", False):
        return "the network's output on the example changes when it does not work in place"
    if isinstance(module, nn.Hardsigmoid) or getattr(module, "kind", None) == "hardsigmoid()":
        return nn.Sigmoid()  # a gate, of values from 0 to 1
    return CenteredSoftplus().to(calls[0].x)


def _convert_conv(conv: nn.Conv2d, calls: list[Call]) -> nn.Module | str:
    sizes = {tuple(call.x.shape[-2:]) for call in calls}
    left, right, top, bottom = conv._reversed_padding_repeated_twice  # by name, too
    if len(sizes) > 1:
        return "called with inputs of several sizes: no single norm"
    if conv.padding_mode != "zeros":
        return f"pads with {conv.padding_mode!r}, not with zeros"
    if left != right or top != bottom:
        return "padding='same' of an even kernel is not the same at both ends"
    if not conv.weight.any():
        return "its weight is zero"
    names = ("in_channels", "out_channels", "kernel_size", "stride", "dilation", "groups")
    arguments = {name: getattr(conv, name) for name in names} | {"padding": (top, left), "input_size": sizes.pop()}
    new = SpectralNormConv2d(**arguments, bias=False, device=conv.weight.device, dtype=conv.weight.dtype).eval()
    new.weight, new.bias = conv.weight, conv.bias
    exact = copy.deepcopy(new).to(torch.promote_types(conv.weight.dtype, torch.float32))
    _set_singular_vectors(exact._operator, exact._adjoint, new.u, new.v)
    return new


def _convert_linear(linear: nn.Linear, calls: list[Call]) -> nn.Module | str:
    if not linear.weight.any():
        return "its weight is zero"  # torch's spectral_norm divides by the norm
    spectral_norm(linear).eval()
    norm = linear.parametrizations.weight[0]
    weight = linear.parametrizations.weight.original
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    _set_singular_vectors(lambda z: weight @ z, lambda z: weight.T @ z, norm._u, norm._v)
    return linear


def _convert_batchnorm(norm: nn.BatchNorm2d, calls: list[Call]) -> nn.Module | str:
    if norm.running_var is None:
        return "has no running statistics: no bound on its Lipschitz constant"
    new = LipschitzBatchNorm2d(norm.num_features, eps=norm.eps, momentum=norm.momentum, affine=norm.affine)
    new.to(norm.running_var)
    for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
        setattr(new, name, getattr(norm, name))
    return new


CONVERSIONS = (
    (ACTIVATIONS, "activations", _convert_activation),
    (nn.Conv2d, "convolutions", _convert_conv),
    (nn.Linear, "linears", _convert_linear),
    (nn.BatchNorm2d, "batchnorms", _convert_batchnorm),
)


def _set_singular_vectors(operator: Callable, adjoint: Callable, u: Tensor, v: Tensor) -> None:
    """Set unit u and v so that operator(v) = sigma u for the largest sigma, by Lanczos iteration of adjoint * operator.

    Where the largest singular values lie close together, as in depthwise convolutions, power iteration takes thousands
    of steps. The start is random: where a power iteration has been, whole directions may be missing.
    """
    top = torch.randn_like(v, dtype=torch.promote_types(v.dtype, torch.float32))

    def tensor(z: np.ndarray) -> Tensor:
        return torch.from_numpy(z.copy()).to(top).view_as(v)

    def gram(z: np.ndarray) -> np.ndarray:
        return adjoint(operator(tensor(z))).flatten().cpu().numpy()

    if (size := top.numel()) > 1:  # eigsh needs two dimensions
        start = top.flatten().cpu().numpy()
        matrix = LinearOperator((size, size), matvec=gram, dtype=start.dtype)
        _, vectors = eigsh(matrix, k=1, which="LA", v0=start, tol=EIGENVALUE_TOLERANCE)
        top = tensor(vectors[:, 0])
    top = top / top.norm()
    image = operator(top)
    u.copy_(image / image.norm())
    v.copy_(top)


def _rescale(norm: nn.modules.batchnorm._BatchNorm, layer: SpectralNormConv2d | nn.Linear | None) -> None:
    """Fit running statistics to the output W z / sigma + b of the layer before, where they were those of W z + b."""
    if norm.running_var is None or layer is None:
        return
    if isinstance(layer, SpectralNormConv2d):
        sigma = layer.spectral_norm()
    else:
        spectral = layer.parametrizations.weight[0]
        sigma = spectral._u @ layer.parametrizations.weight.original @ spectral._v
    bias = 0 if layer.bias is None else layer.bias
    norm.running_mean.sub_(bias).div_(sigma).add_(bias)
    norm.running_var.div_(sigma.square())
