"""Any convolutional network turned into its low-curvature version (paper, section 4).

A layer is replaced by setting it in its parent. The rest of the network stays as it is: classes, hooks, parameter
names, what depends on the training mode. An example shows which layers are called, at what sizes and in what order.
Activations that are called as functions become modules first (models/tracing.py).
"""

import copy
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
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

# |eigenvalue - found| <= tolerance * eigenvalue for sigma^2, so sigma, found from below, is right to half of this: a
# weight divided by it has a norm of at most 1 + 5e-5, and float32 can do it. One training step changes more.
EIGENVALUE_TOLERANCE = 1e-4


class Entry(NamedTuple):
    """A layer, an activation or a function of the network, in the report."""

    name: str  # dotted module path; of a function that of the module whose forward calls it, and the function
    kind: str  # what it was: a class, or a function as "relu()"
    outcome: str  # the class it is now, or why it was left


class ConversionReport(NamedTuple):
    """What low_curvature did, in the order in which the network applies it; what the example did not reach is last."""

    replaced: tuple[Entry, ...]  # what has a low-curvature version now
    left: tuple[Entry, ...]  # what has curvature, or a Lipschitz constant of its own, and stays as it was
    traced: tuple[Entry, ...]  # modules whose forward is a graph now (models/tracing.py)

    def __str__(self) -> str:
        """How many of what were replaced by what, or left for which reason, and where."""
        lines = []
        for title, entries in self._asdict().items():
            lines.append(f"{title} {len(entries)}")
            names = defaultdict(list)
            for name, kind, outcome in entries:
                names[f"{kind}: {outcome}" if title == "left" else f"{kind} -> {outcome}"].append(name)
            for change, group in names.items():
                shown = ", ".join(name or "the network itself" for name in group[:3])
                more = f", and {len(group) - 3} more" if len(group) > 3 else ""
                lines.append(f"  {len(group):4} {change} ({shown}{more})")
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

    Activations become CenteredSoftplus, one for each call (Hardsigmoid, a gate, becomes Sigmoid: curvature at most 1);
    Conv2d becomes SpectralNormConv2d for the input size it has here; Linear gets torch's spectral_norm; BatchNorm2d
    becomes LipschitzBatchNorm2d. Running statistics right behind a normalized layer are rescaled with its output.
    Parameters keep their names, but for spectral_norm's own ``parametrizations.weight.original``.

    Trained weights are a start, not a solution: the network computes another function, and is meant to be trained. To
    evaluate it as it is, or to start well, call training.epoch.calibrate_batchnorm first: behind other activations and
    normalized layers most statistics do not fit any more. Save its state_dict; another conversion of the same
    architecture at the same input size loads it.

    Args:
        model: the network, not changed by this.
        example_input: (N, C, H, W) in the model's dtype and on its device; it is run in eval mode, without gradients.
        activations, convolutions, linears, batchnorms: which parts to convert.

    Returns:
        The network, and what was replaced and what was not and why. Of torch's random numbers none are used up.
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
        uses[call.layer or tracing.join(call.owner, call.function)].append(call)
    for name in _layers(network):  # what the example did not reach
        uses[name] += []
    replaced, left = [], []
    normalized = {}  # path of a normalized layer -> its spectral norm and bias
    for name, its_calls in uses.items():
        if its_calls and (kind := its_calls[0].function):
            reason = REASONS.get(kind) or reasons.get(its_calls[0].owner, "activations=False")
            left.append(Entry(name.removesuffix("()"), kind, reason))
            continue
        module = network.get_submodule(name)
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and len({call.source for call in its_calls}) == 1:
            _rescale(module, normalized.get(its_calls[0].source))
        if _has_low_curvature(module):
            continue
        kind = module.kind if isinstance(module, FunctionCall) else type(module).__name__
        tied = any(num_owners[id(parameter)] > 1 for parameter in module.parameters(recurse=False))
        new = _converted(module, its_calls, enabled, tied)
        if isinstance(new, str):
            left.append(Entry(name, kind, new))
            continue
        if isinstance(new, SpectralNormConv2d | nn.Linear):
            normalized[name] = _sigma(new), new.bias
        outcome = "Linear with spectral_norm" if isinstance(new, nn.Linear) else type(new).__name__
        if isinstance(new, CenteredSoftplus) and len(its_calls) > 1:
            because = next((f", as {reasons[call.owner]}" for call in its_calls if call.owner in reasons), "")
            outcome += f", one beta for {len(its_calls)} calls{because}"
        replaced.append(Entry(name, kind, outcome))
        network = put(network, module, new)
    return network, replaced, left


def _layers(module: nn.Module, name: str = "") -> Iterator[str]:
    """The paths of the layers in the module tree, but not of layers inside layers, in order."""
    if isinstance(module, LAYERS):
        yield name
        return
    for child_name, child in module.named_children():
        yield from _layers(child, tracing.join(name, child_name))


def _has_low_curvature(layer: nn.Module) -> bool:
    """Whether there is nothing to convert."""
    if isinstance(layer, nn.Softplus):
        return layer.beta <= LOW_BETA
    if isinstance(layer, nn.Linear) and is_parametrized(layer, "weight"):
        return [type(parametrization) for parametrization in layer.parametrizations.weight] == [_SpectralNorm]
    return isinstance(layer, CenteredSoftplus | SpectralNormConv2d | LipschitzBatchNorm2d)


def _converted(layer: nn.Module, calls: list[Call], enabled: dict[str, bool], tied: bool) -> nn.Module | str:
    """What to put in the place of a layer, or the reason to leave it."""
    for kinds, part, convert in CONVERSIONS:
        if not isinstance(layer, kinds):
            continue
        if not enabled[part]:
            return f"{part}=False"
        if not calls:
            return "not called on the example"
        if is_parametrized(layer):
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
    geometry = {"stride": conv.stride, "padding": (top, left), "dilation": conv.dilation, "groups": conv.groups}
    like = {"device": conv.weight.device, "dtype": conv.weight.dtype}
    channels = conv.in_channels, conv.out_channels
    new = SpectralNormConv2d(*channels, conv.kernel_size, bias=False, input_size=sizes.pop(), **geometry, **like).eval()
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
    start = torch.randn_like(v, dtype=torch.promote_types(v.dtype, torch.float32))

    def gram(z: np.ndarray) -> np.ndarray:
        z = torch.from_numpy(z.copy()).to(start).view_as(start)
        return adjoint(operator(z)).flatten().cpu().numpy()

    top = start
    if (size := start.numel()) > 1:  # eigsh needs two dimensions
        first = start.flatten().cpu().numpy()
        matrix = LinearOperator((size, size), matvec=gram, dtype=first.dtype)
        _, vectors = eigsh(matrix, k=1, which="LA", v0=first, tol=EIGENVALUE_TOLERANCE)
        top = torch.from_numpy(vectors[:, 0].copy()).to(start).view_as(start)
    top = top / top.norm()
    image = operator(top)
    u.copy_(image / image.norm())
    v.copy_(top)


def _sigma(layer: SpectralNormConv2d | nn.Linear) -> Tensor:
    """What a normalized layer divides its weight by, in eval mode."""
    if isinstance(layer, SpectralNormConv2d):
        return layer.spectral_norm()
    norm = layer.parametrizations.weight[0]
    return norm._u @ layer.parametrizations.weight.original @ norm._v


def _rescale(norm: nn.modules.batchnorm._BatchNorm, source: tuple[Tensor, Tensor | None] | None) -> None:
    """Fit running statistics of W z + b to W z / sigma + b; source is (sigma, b) of the layer right before, if any."""
    if norm.running_var is None or source is None:
        return
    sigma, bias = source
    bias = 0 if bias is None else bias
    norm.running_mean.sub_(bias).div_(sigma).add_(bias)
    norm.running_var.div_(sigma.square())
