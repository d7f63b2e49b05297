"""Any convolutional network turned into its low-curvature version (paper, section 4).

A module is replaced by setting it in its parent, which leaves everything else of the network as it is: classes, hooks,
parameter names, what depends on the training mode. Only where a forward calls an activation as a function, or one
activation module several times, does it have to be rewritten: torch.fx traces that single forward, its submodules
uncalled, and the class of that one module gets the traced forward in place of its own. What is there to replace, at
what input sizes and in what order, is seen by running an example.
"""

import copy
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor, fx, nn
from torch.nn.utils.parametrizations import _SpectralNorm, spectral_norm
from torch.nn.utils.parametrize import is_parametrized
from torch.overrides import TorchFunctionMode

from models.layers import BatchNorm2d, CenteredSoftplus, Conv2d, LipschitzBatchNorm2d, SpectralNormConv2d
from utils.errors import one_line
from utils.numerics import RTOL, same, tensors

# A Softplus up to the sharpness a CenteredSoftplus starts with has low curvature already, and may be needed as it is:
# it is positive, the centered one is not. Sigmoid, Tanh and LogSigmoid (|s''| / |s'| at most 1, 2, 1) stay, too.
LOW_BETA = 5.0

# |eigenvalue - found| <= tolerance * eigenvalue for sigma^2, so sigma, found from below, is right to half of this: a
# weight divided by it has a norm of at most 1 + 5e-5, and float32 can do it. One training step changes more.
EIGENVALUE_TOLERANCE = 1e-4


class FunctionCall(nn.Module):
    """A call of an activation function as a module: a place for what replaces it."""

    def __init__(self, name: str, function: Callable, args: tuple, kwargs: dict):
        super().__init__()
        self.name, self.function, self.args, self.kwargs = name, function, args, kwargs

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x.clone(), *self.args, **self.kwargs)  # a clone, as the function may work in place


LOW_CURVATURE = (CenteredSoftplus, SpectralNormConv2d, LipschitzBatchNorm2d)
ACTIVATIONS = (
    FunctionCall,
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU),
    *(nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish, nn.Softplus, nn.Hardsigmoid),
)
ACTIVATION_FUNCTIONS = {"relu", "relu6", "leaky_relu", "elu", "celu", "selu"}
ACTIVATION_FUNCTIONS |= {"gelu", "silu", "mish", "hardswish", "softplus", "hardsigmoid"}

# what has no low-curvature version, and why
KINK = "not smooth, and no activation a CenteredSoftplus could stand for"
STATISTICS = "divides by its input's own statistics: no bound on its Lipschitz constant"
PRODUCT = "a product of tensors: not normalized"
SOFTMAX = "not an activation of one number"
WEIGHTS = "a linear map without a low-curvature version: its norm is not normalized"
MODULES_LEFT = {
    nn.MultiheadAttention: "attention multiplies its input with itself: no bound on its Lipschitz constant",
    nn.modules.conv._ConvNd: WEIGHTS,
    (nn.Bilinear, nn.RNNBase, nn.RNNCellBase): "multiplies by weights that are not normalized",
    nn.modules.batchnorm._BatchNorm: "only BatchNorm2d has a low-curvature version",
    (nn.modules.instancenorm._InstanceNorm, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm): STATISTICS,
    (nn.Softmax, nn.Softmax2d, nn.Softmin, nn.LogSoftmax): SOFTMAX,
    nn.PReLU: "its slope is trained",
    (nn.Hardtanh, nn.Threshold, nn.RReLU, nn.Hardshrink, nn.Softshrink, nn.Softsign): KINK,
    nn.GLU: PRODUCT,
    torch.jit.ScriptModule: "compiled: its parts cannot be replaced",
}
FUNCTIONS_LEFT = {
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "linear", "bilinear", "addmm", "addbmm"), WEIGHTS),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), WEIGHTS),
    **dict.fromkeys(("layer_norm", "group_norm", "instance_norm", "rms_norm", "normalize"), STATISTICS),
    **dict.fromkeys(("batch_norm", "local_response_norm"), STATISTICS),
    **dict.fromkeys(("scaled_dot_product_attention", "multi_head_attention_forward"), PRODUCT),
    **dict.fromkeys(("mul", "multiply", "matmul", "rmatmul", "bmm", "mm", "einsum", "baddbmm", "glu"), PRODUCT),
    **dict.fromkeys(("softmax", "softmin", "log_softmax"), SOFTMAX),
    **dict.fromkeys(("prelu", "rrelu", "hardtanh", "threshold", "hardshrink", "softshrink", "softsign"), KINK),
    **dict.fromkeys(("clamp", "clamp_min", "clamp_max", "clip", "maximum", "minimum", "abs"), KINK),
}
LAYERS = (*LOW_CURVATURE, *ACTIVATIONS, Conv2d, BatchNorm2d, nn.Conv2d, nn.Linear, nn.BatchNorm2d)
LAYERS += tuple(kind for kinds in MODULES_LEFT for kind in (kinds if isinstance(kinds, tuple) else (kinds,)))


@dataclass(frozen=True)
class Replaced:
    """A layer or an activation that has a low-curvature version now."""

    name: str  # dotted module path in the converted network
    kind: str  # what it was: a class, or a function as "relu()"
    by: str  # the class it is now
    note: str = ""


@dataclass(frozen=True)
class Left:
    """Something with curvature, or a Lipschitz constant of its own, that stays as it was."""

    name: str  # dotted module path; of a function that of the module whose forward calls it, and the function
    kind: str
    reason: str


@dataclass(frozen=True)
class ConversionReport:
    """What low_curvature did, in the order in which the network applies it; what the example did not reach is last."""

    replaced: tuple[Replaced, ...]
    left: tuple[Left, ...]

    def __str__(self) -> str:
        """How many of what were replaced, remarks on some, and what was left for which reason."""
        counts = Counter(f"{entry.kind} -> {entry.by}" for entry in self.replaced)
        lines = [f"replaced {len(self.replaced)}", *(f"  {count:4} {change}" for change, count in counts.items())]
        lines += [f"  {entry.name}: {entry.note}" for entry in self.replaced if entry.note]
        names = defaultdict(list)
        for entry in self.left:
            names[entry.kind, entry.reason].append(entry.name or "the network itself")
        lines.append(f"left {len(self.left)}")
        for (kind, reason), group in names.items():
            shown = ", ".join(group[:3]) + (f", and {len(group) - 3} more" if len(group) > 3 else "")
            lines.append(f"  {len(group):4} {kind}: {reason} ({shown})")
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
        network, reasons = _separate_activations(model, example_input) if activations else (_copy(model), {})
        _, calls = _observe(network, example_input)
        network, report = _replace(network, calls, enabled, reasons)
    modes = {name: module.training for name, module in model.named_modules(remove_duplicate=False)}
    for name, module in network.named_modules(remove_duplicate=False):
        while name not in modes:  # a part the conversion added is in the mode of the module it was added to
            name = name.rpartition(".")[0]
        module.training = modes[name]
    return network, report


# seeing what a network does


class Call(NamedTuple):
    """A call of a layer, or of a function of the tables above, that the example led to."""

    name: str  # module path, or function name
    is_function: bool
    owner: str  # path of the module whose forward makes the call
    invocation: int  # which of all forwards
    in_place: bool
    replaceable: bool  # of a function: whether it is an activation
    size: torch.Size
    dtype: torch.dtype
    device: torch.device
    source: str | None  # path of the layer whose output, unchanged, is the input


class _Observer(TorchFunctionMode):
    """Notes the calls in order. What a layer does inside is its own business."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.names = {module: name for name, module in network.named_modules()}
        self.stack: list[tuple[nn.Module, int]] = []  # the forwards under way, and their numbers
        self.num_forwards = 0
        self.calls: list[Call] = []

    def enter(self, module, args, kwargs):
        self.stack.append((module, self.num_forwards))
        self.num_forwards += 1

    def leave(self, module, args, kwargs, output):
        self.stack.pop()
        if isinstance(module, LAYERS):
            self._note(self.names[module], False, args, kwargs, output)
            if isinstance(output, Tensor):  # the mark is void once the tensor is changed in place
                output._source = self.names[module], output._version

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        output = function(*args, **kwargs)
        name = _function_name(function)
        if _is_activation_call(name, args, kwargs) or _has_no_version(name, args, kwargs):
            self._note(name, True, args, kwargs, output)
        return output

    def _note(self, name, is_function, args, kwargs, output):
        if any(isinstance(module, LAYERS) for module, _ in self.stack):
            return
        owner, invocation = self.stack[-1] if self.stack else (None, -1)
        x = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), torch.empty(0))
        source, version = getattr(x, "_source", (None, None))
        self.calls.append(
            Call(
                name,
                is_function,
                self.names[owner] if owner is not None else "",
                invocation,
                in_place=output is x,
                replaceable=is_function and _is_activation_call(name, args, kwargs),
                size=x.shape,
                dtype=x.dtype,
                device=x.device,
                source=source if version == x._version else None,
            )
        )


def _observe(network: nn.Module, example_input: Tensor) -> tuple[object, list[Call]]:
    """The network's output for the example, and the calls that led to it."""
    observer = _Observer(network)
    hooks = []
    try:
        for module in observer.names:
            hooks.append(module.register_forward_pre_hook(observer.enter, prepend=True, with_kwargs=True))
            hooks.append(module.register_forward_hook(observer.leave, with_kwargs=True))
        with observer:
            output = network(example_input.clone())  # its first layer may work in place
    finally:
        for hook in hooks:
            hook.remove()
    return output, observer.calls


def _function_name(function: Callable | str) -> str:
    """The name of a function or tensor method, the same for all its spellings: relu_ and relu."""
    return getattr(function, "__name__", str(function)).strip("_")


def _is_activation_call(name: str, args: tuple, kwargs: dict) -> bool:
    if name == "softplus":
        beta = kwargs.get("beta", args[1] if len(args) > 1 else 1)
        return isinstance(beta, int | float) and beta > LOW_BETA
    return name in ACTIVATION_FUNCTIONS


def _has_no_version(name: str, args: tuple, kwargs: dict) -> bool:
    """Whether a function is one to report. A number times a tensor is not, nor is the size of something clamped."""
    tensor_arguments = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    if name in ("mul", "multiply"):
        return sum(tensor.numel() > 1 for tensor in tensor_arguments) > 1
    return name in FUNCTIONS_LEFT


def _is_activation(module: nn.Module) -> bool:
    """Whether a module is to be replaced by CenteredSoftplus or Sigmoid, if nothing forbids it."""
    if isinstance(module, nn.Softplus) and module.beta <= LOW_BETA:
        return False
    return isinstance(module, ACTIVATIONS) and _own_forward(module) is None and not _has_hooks(module)


def _own_forward(module: nn.Module) -> type | None:
    """The class of this module if it overrides the forward of the layer of torch's that it extends."""
    base = next(kind for kind in LAYERS if isinstance(module, kind))
    methods = ("forward", "_conv_forward") if issubclass(base, nn.Conv2d) else ("forward",)
    inherited = all(getattr(type(module), method) is getattr(base, method) for method in methods)
    return None if inherited and "forward" not in vars(module) else type(module)


def _has_hooks(module: nn.Module) -> bool:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, kind) for kind in kinds)


# a module of its own for every call of an activation


def _copy(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).eval()


def _separate_activations(model: nn.Module, example_input: Tensor) -> tuple[nn.Module, dict[str, str]]:
    """A copy in eval mode that computes the same by activation modules that each are called once, out of place.

    Whether it does compute the same is tried on the example. If it does not, some code relies on an activation's
    changing its input: then every forward that calls one in place is rewritten, too, so that it uses the result.

    Returns:
        The copy, and why the forwards of some modules (by path) could not be rewritten.
    """
    for thoroughly in (False, True):
        network = _copy(model)
        _unshare(network)
        expected, calls = _observe(network, example_input)
        reasons = _rewrite(network, calls, thoroughly)
        for module in network.modules():
            if _is_activation(module) and getattr(module, "inplace", False):
                module.inplace = False
        found, _ = _observe(network, example_input)
        pairs = zip(tensors(found), tensors(expected), strict=True)
        if all(same(a, b, RTOL) for a, b in pairs):
            return network, reasons
    network = _copy(model)
    _unshare(network)
    reason = "not replaced, as the network's output on the example changes when it is given a module of its own"
    return network, dict.fromkeys((name for name, _ in network.named_modules()), reason)


def _unshare(network: nn.Module) -> None:
    """Give every place in the module tree an activation of its own."""
    seen = set()
    for parent in list(network.modules()):
        for name, child in parent._modules.items():  # named_children would leave out what occurs twice
            if isinstance(child, ACTIVATIONS) and _is_activation(child):
                if child in seen:
                    parent._modules[name] = child = copy.deepcopy(child)
                seen.add(child)


def _rewrite(network: nn.Module, calls: list[Call], thoroughly: bool) -> dict[str, str]:
    """Rewrite the forwards that call an activation function, or an activation module that is called elsewhere, too.

    Args:
        thoroughly: rewrite those that call any activation in place as well.

    Returns:
        For each that could not be rewritten, by module path, the reason.
    """
    forwards = defaultdict(list)
    for call in calls:
        if call.replaceable or (not call.is_function and _is_activation(network.get_submodule(call.name))):
            forwards[call.owner, call.invocation].append((call.name, call.is_function, call.in_place))
    ways = defaultdict(set)  # the activations that a module's forward calls, for each way it was seen to go
    for (owner, _), sites in forwards.items():
        ways[owner].add(tuple(sites))
    num_sites = Counter(name for owner in ways for name, is_function, _ in max(ways[owner], key=len) if not is_function)
    reasons, taken = {}, set()
    for owner, (sites, *others) in ways.items():
        if not any(is_function or num_sites[name] > 1 or (thoroughly and at) for name, is_function, at in sites):
            continue
        try:
            if others:
                raise ValueError("it does not call the same activations each time")
            _rewrite_forward(network, owner, sites, taken)
        except Exception as error:  # tracing runs the user's code on what are not tensors
            reasons[owner] = f"the forward of {owner or 'the network'} cannot be rewritten ({one_line(error)})"
    return reasons


def _rewrite_forward(network: nn.Module, owner_name: str, sites: tuple, taken: set[str]) -> None:
    """Give the module a forward that calls a module of its own for each activation; none of them works in place.

    Args:
        sites: (path or function name, whether it is a function, whether it worked in place) of each, in order.
        taken: paths of activations that have their one call already.

    Raises:
        Exception: if the forward cannot be traced, or not as it ran; the module is then unchanged.
    """
    owner = network.get_submodule(owner_name)
    graph = _trace(owner)
    nodes = []
    for node in graph.nodes:
        if node.op == "call_module" and _is_activation(owner.get_submodule(node.target)):
            nodes.append((node, _join(owner_name, node.target)))
        elif node.op in ("call_function", "call_method"):
            name = _function_name(node.target)
            if _is_activation_call(name, node.args, node.kwargs):
                nodes.append((node, name))
    if [name for _, name in nodes] != [name for name, _, _ in sites]:
        raise ValueError("traced, it calls other activations than in the example")
    if any(len(node.all_input_nodes) != 1 for node, _ in nodes):
        raise ValueError("an activation's parameters are computed")

    for (node, name), (_, is_function, in_place) in zip(nodes, sites, strict=True):
        (x,) = node.all_input_nodes
        if is_function:
            function = getattr(Tensor, node.target) if node.op == "call_method" else node.target
            kwargs = {key: value for key, value in node.kwargs.items() if value is not x}
            target = _new_path(owner, node.name)
            owner.set_submodule(target, FunctionCall(name, function, node.args[1:], kwargs))
        elif name in taken:
            target = _new_path(owner, node.target)
            owner.set_submodule(target, copy.deepcopy(owner.get_submodule(node.target)))
        else:
            target = node.target
            taken.add(name)
        with graph.inserting_after(node):
            result = graph.call_module(target, (x,))
        node.replace_all_uses_with(result)
        graph.erase_node(node)
        if in_place:  # from here on, the input was the result
            order = {node: i for i, node in enumerate(graph.nodes)}
            x.replace_all_uses_with(result, lambda user, order=order, at=order[result]: order[user] > at)

    if isinstance(owner, fx.GraphModule):
        owner.graph = graph
    else:  # only the forward changes: a GraphModule in its place would lack the attributes, methods and hooks
        kind = type(owner)
        forward = type(fx.GraphModule(owner, graph)).forward
        owner.__class__ = type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})


class _Tracer(fx.Tracer):
    """Traces one forward: what the modules it calls do is not looked at."""

    def is_leaf_module(self, module, name):
        return True


def _trace(owner: nn.Module) -> fx.Graph:
    """The graph of the module's own forward, if that is the same in training and in eval mode."""
    if "forward" in vars(owner):
        raise ValueError("it is not its class's")
    graphs = []
    for mode in (True, False):
        stand_in = copy.copy(owner.train(mode))  # tracing puts the tensors that a forward makes into its module
        graphs.append(_Tracer().trace(stand_in))
        if set(vars(stand_in)) - set(vars(owner)):
            raise ValueError("it makes tensors of its own")
    training, evaluation = (graph.python_code("self").src for graph in graphs)
    if training != evaluation:  # tracing would freeze the mode, of a dropout for example
        raise ValueError("it depends on the training mode")
    return graphs[-1]


def _join(owner: str, name: str) -> str:
    return f"{owner}.{name}" if owner else name


def _new_path(owner: nn.Module, path: str) -> str:
    """The path, with a number if there is such an attribute already."""
    prefix, _, name = path.rpartition(".")
    parent = owner.get_submodule(prefix)
    names = [name, *(f"{name}_{i}" for i in range(1, 1 + len(dir(parent))))]
    return _join(prefix, next(name for name in names if not hasattr(parent, name)))


# layers


def _replace(
    network: nn.Module, calls: list[Call], enabled: dict[str, bool], reasons: dict[str, str]
) -> tuple[nn.Module, ConversionReport]:
    """Replace the layers of a network in eval mode, in the order of their calls.

    Args:
        calls: what the network does on the example.
        enabled: which parts to replace.
        reasons: why some modules' forwards could not be rewritten.
    """
    paths = defaultdict(list)
    for path, module in network.named_modules(remove_duplicate=False):
        paths[module].append(path)
    num_owners = Counter(id(parameter) for module in paths for parameter in module._parameters.values())
    uses = {(call.owner if call.is_function else None, call.name): [] for call in calls}
    for call in calls:
        uses[call.owner if call.is_function else None, call.name].append(call)
    uses |= {(None, name): uses.get((None, name), []) for name in _layers(network)}  # what the example did not reach

    replaced, left = [], []
    normalized = {}  # path of a normalized layer -> its spectral norm and bias
    for (owner, name), its_calls in uses.items():
        if owner is not None:
            reason = FUNCTIONS_LEFT.get(name)
            if its_calls[0].replaceable:
                reason = reasons.get(owner, "not seen by the trace") if enabled["activations"] else "activations=False"
            left.append(Left(_join(owner, name), f"{name}()", reason))
            continue
        module = network.get_submodule(name)
        tied = any(num_owners[id(p)] > 1 for p in module._parameters.values() if p is not None)
        new = _low_curvature_layer(module, its_calls, enabled, tied)
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            _rescale(module, [normalized.get(call.source) for call in its_calls])
        kind = f"{module.name}()" if isinstance(module, FunctionCall) else type(module).__name__
        if isinstance(new, str):
            left.append(Left(name, kind, new))
        if not isinstance(new, nn.Module):
            continue
        note, by = "", type(new).__name__
        if isinstance(new, nn.Linear):
            kind, by = "Linear", "Linear with spectral_norm"
        if isinstance(new, CenteredSoftplus) and len(its_calls) > 1:
            because = next((f", as {reasons[call.owner]}" for call in its_calls if call.owner in reasons), "")
            note = f"called {len(its_calls)} times: one beta for all{because}"
        replaced.append(Replaced(name, kind, by, note))
        if isinstance(new, SpectralNormConv2d | nn.Linear):
            normalized[name] = _sigma(new), new.bias
        for path in paths[module]:
            if path:
                network.set_submodule(path, new)
            else:
                network = new
    return network, ConversionReport(tuple(replaced), tuple(left))


def _layers(module: nn.Module, name: str = "") -> Iterator[str]:
    """The paths of the layers in the module tree, but not of layers inside layers, in order."""
    if isinstance(module, LAYERS):
        yield name
        return
    for child_name, child in module.named_children():
        yield from _layers(child, _join(name, child_name))


def _low_curvature_layer(
    module: nn.Module, calls: list[Call], enabled: dict[str, bool], tied: bool
) -> nn.Module | str | None:
    """What to put in the place of a layer, or the reason to leave it, or None if it has low curvature as it is."""
    if isinstance(module, LOW_CURVATURE) or _is_normalized_linear(module):
        return None
    if isinstance(module, nn.Softplus) and module.beta <= LOW_BETA:
        return None
    conversion = next((conversion for conversion in CONVERSIONS if isinstance(module, conversion[0])), None)
    if conversion is None:
        return next(reason for kinds, reason in MODULES_LEFT.items() if isinstance(module, kinds))
    _, part, convert = conversion
    if not enabled[part]:
        return f"{part}=False"
    if not calls:
        return "not called on the example"
    if is_parametrized(module):
        return "parametrized already"
    if own := _own_forward(module):
        return f"{own.__name__} has a forward of its own"
    if _has_hooks(module):  # weight_norm in its old form works by one
        return "has hooks"
    if tied:
        return "shares its weights with another module"
    return convert(module, calls)


def _is_normalized_linear(module: nn.Module) -> bool:
    if not isinstance(module, nn.Linear) or not is_parametrized(module, "weight"):
        return False
    return [type(parametrization) for parametrization in module.parametrizations.weight] == [_SpectralNorm]


def _convert_activation(module: nn.Module, calls: list[Call]) -> nn.Module | str:
    if getattr(module, "inplace", False):
        return "the network's output on the example changes when it does not work in place"
    if isinstance(module, nn.Hardsigmoid) or getattr(module, "name", None) == "hardsigmoid":
        return nn.Sigmoid()  # a gate, of values from 0 to 1
    return CenteredSoftplus().to(calls[0].device, calls[0].dtype)


def _convert_conv(conv: nn.Conv2d, calls: list[Call]) -> nn.Module | str:
    sizes = {tuple(call.size[-2:]) for call in calls}
    padding = conv.padding
    if len(sizes) > 1:
        return "called with inputs of several sizes: no single norm"
    if conv.padding_mode != "zeros":
        return f"pads with {conv.padding_mode!r}, not with zeros"
    if isinstance(padding, str):
        total = [d * (k - 1) if padding == "same" else 0 for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        if any(rows % 2 for rows in total):
            return "padding='same' of an even kernel is not the same at both ends"
        padding = tuple(rows // 2 for rows in total)
    if not conv.weight.any():
        return "its weight is zero"
    new = SpectralNormConv2d(
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,
        stride=conv.stride,
        padding=padding,
        dilation=conv.dilation,
        groups=conv.groups,
        bias=False,
        input_size=sizes.pop(),
        device=conv.weight.device,
        dtype=conv.weight.dtype,
    ).eval()
    new.weight, new.bias = conv.weight, conv.bias
    exact = copy.deepcopy(new).to(torch.promote_types(conv.weight.dtype, torch.float32))
    u, v = _top_singular_vectors(exact._operator, exact._adjoint, torch.randn_like(exact.v))
    new.u.copy_(u)
    new.v.copy_(v)
    return new


def _convert_linear(linear: nn.Linear, calls: list[Call]) -> nn.Module | str:
    if not linear.weight.any():
        return "its weight is zero"  # torch's spectral_norm divides by the norm
    spectral_norm(linear).eval()
    norm = linear.parametrizations.weight[0]
    weight = linear.parametrizations.weight.original
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    u, v = _top_singular_vectors(lambda z: weight @ z, lambda z: weight.T @ z, torch.randn_like(weight[0]))
    norm._u.copy_(u)
    norm._v.copy_(v)
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


def _top_singular_vectors(
    operator: Callable[[Tensor], Tensor], adjoint: Callable[[Tensor], Tensor], start: Tensor
) -> tuple[Tensor, Tensor]:
    """u and v, unit, with operator(v) = sigma u for the largest sigma, by Lanczos iteration of adjoint * operator.

    Where the largest singular values lie close together, as in depthwise convolutions, power iteration takes thousands
    of steps. ``start`` is a random v: where a power iteration has been, whole directions may be missing.
    """

    def gram(z: np.ndarray) -> np.ndarray:
        z = torch.from_numpy(z.copy()).to(start).view_as(start)
        return adjoint(operator(z)).flatten().cpu().numpy()

    v = start
    if (size := start.numel()) > 1:  # eigsh needs two dimensions
        first = start.flatten().cpu().numpy()
        matrix = LinearOperator((size, size), matvec=gram, dtype=first.dtype)
        _, vectors = eigsh(matrix, k=1, which="LA", v0=first, tol=EIGENVALUE_TOLERANCE)
        v = torch.from_numpy(vectors[:, 0].copy()).to(start).view_as(start)
    v = v / v.norm()
    u = operator(v)
    return u / u.norm(), v


def _sigma(layer: SpectralNormConv2d | nn.Linear) -> Tensor:
    """What a normalized layer divides its weight by, in eval mode."""
    if isinstance(layer, SpectralNormConv2d):
        return layer.spectral_norm()
    norm = layer.parametrizations.weight[0]
    return norm._u @ layer.parametrizations.weight.original @ norm._v


def _rescale(norm: nn.modules.batchnorm._BatchNorm, sources: list[tuple[Tensor, Tensor | None] | None]) -> None:
    """Fit running statistics to the output W z / sigma + b of the layer before, where they were those of W z + b.

    Args:
        sources: sigma and b for each call of the norm; None where no normalized layer is right before it.
    """
    if norm.running_var is None or not sources or any(source is not sources[0] for source in sources) or not sources[0]:
        return
    sigma, bias = sources[0]
    bias = 0 if bias is None else bias
    norm.running_mean.sub_(bias).div_(sigma).add_(bias)
    norm.running_var.div_(sigma.square())
