"""What a network calls on an example, and a module for each activation it calls.

Some forwards call an activation as a function, or one activation module several times. torch.fx traces such a forward,
and a GraphModule takes the module's place. Modules called there are not traced: they keep their class and hooks.
"""

import copy
import itertools
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

from models.layers import BatchNorm2d, CenteredSoftplus, Conv2d, LipschitzBatchNorm2d, SpectralNormConv2d
from utils.errors import one_line
from utils.numerics import RTOL, same, tensors

# A Softplus of at most the initial beta of CenteredSoftplus stays: its curvature is low, and its sign may matter.
# Sigmoid, Tanh and LogSigmoid (|s''| / |s'| at most 1, 2, 1) stay, too.
LOW_BETA = 5.0


class FunctionCall(nn.Module):
    """A call of an activation function as a module, which can be replaced."""

    def __init__(self, function: Callable, args: tuple, kwargs: dict):
        super().__init__()
        self.kind = kind_of_function(function)
        self.function, self.args, self.kwargs = function, args, kwargs
        self.inplace = function.__name__.endswith("_") or any(value is True for value in (*args, *kwargs.values()))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x.clone(), *self.args, **self.kwargs)  # a clone, as the function may work in place


ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish)
ACTIVATIONS += (nn.Softplus, nn.Hardsigmoid, FunctionCall)
ACTIVATION_FUNCTIONS = {"leaky_relu()", *(f"{kind.__name__.lower()}()" for kind in ACTIVATIONS)}
LEFT = {  # the modules of torch.nn and the functions that have no low-curvature version, by the reason
    "attention multiplies its input with itself: no bound on its Lipschitz constant": """
        MultiheadAttention scaled_dot_product_attention()""",
    "multiplies by weights that are not normalized": """
        Conv1d Conv3d ConvTranspose1d ConvTranspose2d ConvTranspose3d Bilinear RNNBase RNNCellBase conv1d() conv2d()
        conv3d() conv_transpose1d() conv_transpose2d() conv_transpose3d() linear() bilinear() addmm() addbmm()""",
    "divides by its input's own statistics: no bound on its Lipschitz constant": """
        InstanceNorm1d InstanceNorm2d InstanceNorm3d LayerNorm GroupNorm RMSNorm LocalResponseNorm layer_norm()
        group_norm() instance_norm() rms_norm() normalize() batch_norm() local_response_norm()""",
    "a product of tensors: not normalized": """
        GLU glu() mul() multiply() matmul() rmatmul() bmm() mm() einsum() baddbmm()""",
    "not an activation of one number": """
        Softmax Softmax2d Softmin LogSoftmax softmax() softmin() log_softmax()""",
    "not smooth, and no activation a CenteredSoftplus could stand for": """
        PReLU Hardtanh Threshold RReLU Hardshrink Softshrink Softsign prelu() hardtanh() threshold() rrelu()
        hardshrink() softshrink() softsign() clamp() clamp_min() clamp_max() clip() maximum() minimum() abs()""",
    "only BatchNorm2d has a low-curvature version": """
        BatchNorm1d BatchNorm3d SyncBatchNorm""",
}
REASONS = {kind: reason for reason, kinds in LEFT.items() for kind in kinds.split()}
LAYERS = (*ACTIVATIONS, CenteredSoftplus, SpectralNormConv2d, LipschitzBatchNorm2d, Conv2d, BatchNorm2d, nn.Conv2d)
LAYERS += (nn.Linear, nn.BatchNorm2d, *(getattr(nn, kind) for kind in REASONS if not kind.endswith("()")))


def kind_of_function(function: Callable | str) -> str:
    """The name of a function or tensor method as "relu()", the same for torch.relu_."""
    return getattr(function, "__name__", str(function)).strip("_") + "()"


def altered(module: nn.Module) -> str:
    """Why a module may compute something else than its class in torch or here does; "" if it does not."""
    base = next((kind for kind in LAYERS if isinstance(module, kind)), type(module))
    methods = [name for name in ("forward", "_conv_forward") if hasattr(base, name)]
    if "forward" in vars(module) or any(getattr(type(module), name) is not getattr(base, name) for name in methods):
        return f"{type(module).__name__} has a forward of its own"
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return "has hooks" if any(getattr(module, name) for name in hooks) else ""  # the old weight_norm works by one


def is_activation(module: nn.Module) -> bool:
    """Whether a module is to be replaced by CenteredSoftplus or Sigmoid."""
    low = isinstance(module, nn.Softplus) and module.beta <= LOW_BETA
    return isinstance(module, ACTIVATIONS) and not low and not altered(module)


def is_activation_call(function: Callable | str, args: tuple, kwargs: dict) -> bool:
    """Whether the call of a function or tensor method is."""
    kind, beta = kind_of_function(function), kwargs.get("beta", args[1] if len(args) > 1 else 1)
    low = kind == "softplus()" and not (isinstance(beta, int | float) and beta > LOW_BETA)
    return kind in ACTIVATION_FUNCTIONS and not low


def put(network: nn.Module, old: nn.Module, new: nn.Module) -> nn.Module:
    """The network with one of its modules, or itself, replaced wherever it occurs."""
    for parent in list(network.modules()):
        for name, child in parent._modules.items():  # named_children would leave out what occurs twice
            if child is old:
                parent._modules[name] = new
    return new if network is old else network


class Call(NamedTuple):
    """A call of a layer, or of a function of the tables above, on the example."""

    owner: str  # path of the module whose forward makes the call
    name: str  # path of the layer; of a function the owner's path and the kind, as "block.relu()"
    kind: str  # of a function, "" for a layer
    x: Tensor  # of the input's shape, dtype and device, without its values
    source: str | None  # path of the layer whose output, unchanged, is the input


class _Observer(TorchFunctionMode):
    """Notes the calls in order, but not those inside layers."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.names = {module: name for name, module in network.named_modules()}
        self.owners = [""]  # paths of the modules whose forwards are under way, None inside a layer
        self.calls: list[Call] = []

    def enter(self, module, args):
        name = self.names.get(module, self.owners[-1])  # a module that is not registered belongs to its caller
        inside = self.owners[-1] is None or self._is_layer(module)
        self.owners.append(None if inside else name)

    def leave(self, module, args, kwargs, output):
        self.owners.pop()
        if self._is_layer(module):
            self._note(self.names[module], "", (*args, *kwargs.values()))
            if isinstance(output, Tensor):  # the mark is void once the tensor is changed in place
                output._source = self.names[module], output._version

    def _is_layer(self, module):
        return isinstance(module, LAYERS) and module in self.names

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        output = function(*args, **kwargs)
        kind, inputs = kind_of_function(function), (*args, *kwargs.values())
        sizes = [value.numel() for value in inputs if isinstance(value, Tensor)]
        scaling = kind in ("mul()", "multiply()") and sum(size > 1 for size in sizes) < 2  # a number times a tensor
        if is_activation_call(function, args, kwargs) or (kind in REASONS and not scaling):
            self._note(f"{self.owners[-1]}.{kind}".lstrip("."), kind, inputs)
        return output

    def _note(self, name, kind, inputs):
        if self.owners[-1] is not None:
            x = next((value for value in inputs if isinstance(value, Tensor)), torch.empty(0))
            source, version = getattr(x, "_source", (None, None))
            source = source if version == x._version else None
            self.calls.append(Call(self.owners[-1], name, kind, x.new_empty(()).expand(x.shape), source))


def observe(network: nn.Module, example_input: Tensor) -> tuple[object, list[Call]]:
    """The network's output for the example, and the calls that led to it."""
    observer = _Observer(network)
    entering = register_module_forward_pre_hook(observer.enter)
    leaving = register_module_forward_hook(observer.leave, with_kwargs=True)
    with entering, leaving, observer:
        return network(example_input.clone()), observer.calls  # a clone: the first layer may work in place


def separate_activations(model: nn.Module, example_input: Tensor) -> tuple[nn.Module, list[Call], dict[str, str]]:
    """A copy in eval mode that computes the same by activation modules that are each called once, out of place.

    Also what it calls on the example, and why the forward of some modules, by path, could not be traced.
    """
    original = copy.deepcopy(model).eval()
    seen = set()
    for parent in list(original.modules()):
        for name, child in parent._modules.items():
            if is_activation(child):  # one in several places of the tree becomes several
                parent._modules[name] = copy.deepcopy(child) if child in seen else child
                seen.add(child)
    expected, calls = observe(original, example_input)
    network, reasons, taken = copy.deepcopy(original), {}, set()
    num_calls = Counter(call.name for call in calls)
    repeated = {name for name, module in original.named_modules() if num_calls[name] > 1 and is_activation(module)}
    owners = (call.owner for call in calls if call.kind in ACTIVATION_FUNCTIONS or call.name in repeated)
    for owner in dict.fromkeys(owners):
        module = network.get_submodule(owner)
        try:
            network = put(network, module, _as_graph(module, taken))
        except Exception as error:  # tracing runs the user's code on what are not tensors
            reasons[owner] = f"the forward that calls it cannot be traced ({one_line(error)})"
    for module in network.modules():
        if is_activation(module) and hasattr(module, "inplace"):
            module.inplace = False
    with suppress(Exception):  # what the trace took for fixed may make it fail
        found, new_calls = observe(network, example_input)
        if all(same(a, b, RTOL) for a, b in zip(tensors(found), tensors(expected), strict=True)):
            return network, new_calls, reasons
    # code that relies on an activation's changing a view of its input, say
    reason = "the network does something else on the example with modules for its activations"
    return original, calls, {name: reason for name, _ in original.named_modules()}


def _as_graph(module: nn.Module, taken: set[nn.Module]) -> nn.Module:
    """The module as a graph that calls a module of its own for each activation, none of them in place.

    Activations in ``taken`` have their one call already. If nothing is new, the module itself is returned. Raises any
    exception if the forward cannot be traced; the module is then unchanged.
    """
    graph = _own_graph(module)
    activations = {node: found for node in graph.nodes if (found := _activation(module, node))}
    if any(len(node.all_input_nodes) != 1 for node in activations):
        raise ValueError("an activation's parameters are computed")
    before = set(module.modules())
    for node, activation in activations.items():
        (x,) = node.all_input_nodes
        path = node.target if node.op == "call_module" else node.name
        if activation in taken or node.op != "call_module":
            path, activation = _free_path(module, path), copy.deepcopy(activation)
        taken.add(activation)
        module.set_submodule(path, activation)
        node.op, node.target, node.args, node.kwargs = "call_module", path, (x,), {}
        if getattr(activation, "inplace", False):  # from here on, the input was the result
            x.replace_all_uses_with(node, lambda user, node=node: user > node)
    if before == set(module.modules()):
        return module
    traced = fx.GraphModule(module, graph, type(module).__name__)
    for kind in ("_parameters", "_buffers", "_non_persistent_buffers_set", "_modules"):  # all, and in their order
        vars(traced)[kind] = vars(module)[kind]
    return traced


def _own_graph(module: nn.Module) -> fx.Graph:
    """The graph of the module's own forward, if that is the same in training and in eval mode."""
    if reason := altered(module):  # copies of a GraphModule would lack hooks
        raise ValueError(reason)
    tracer = fx.Tracer()
    tracer.is_leaf_module = lambda module, name: True
    training, evaluation = (tracer.trace(copy.copy(module.train(mode))) for mode in (True, False))
    if training.python_code("self").src != evaluation.python_code("self").src:
        raise ValueError("it depends on the training mode")
    if any(node.op == "get_attr" and "_tensor_constant" in node.target for node in evaluation.nodes):
        raise ValueError("it makes tensors of its own")
    return evaluation


def _activation(module: nn.Module, node: fx.Node) -> nn.Module | None:
    """The activation that a node of the module's graph calls; None if it calls none."""
    if node.op == "call_module":
        called = module.get_submodule(node.target)
        return called if is_activation(called) else None
    if node.op not in ("call_function", "call_method") or not is_activation_call(node.target, node.args, node.kwargs):
        return None
    function = getattr(Tensor, node.target) if node.op == "call_method" else node.target
    kwargs = {name: value for name, value in node.kwargs.items() if not isinstance(value, fx.Node)}
    return FunctionCall(function, node.args[1:], kwargs)


def _free_path(module: nn.Module, path: str) -> str:
    """The path, with a number if there is such an attribute already."""
    owner, _, name = path.rpartition(".")
    names = itertools.chain([name], (f"{name}_{i}" for i in itertools.count(1)))
    free = next(name for name in names if not hasattr(module.get_submodule(owner), name))
    return f"{owner}.{free}".lstrip(".")
