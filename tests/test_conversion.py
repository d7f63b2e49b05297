"""The conversion of outside networks: dense operators, the functions computed, a report that leaves nothing out."""

import copy
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import TwoBlocks
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm
from torchvision.ops import StochasticDepth

from models.conversion import ConversionReport, low_curvature
from models.layers import CenteredSoftplus, LipschitzBatchNorm2d, SpectralNormConv2d
from models.model_selector import model_architecture
from tests.test_layers import dense_matrix

PARTS = {
    "activations": CenteredSoftplus,
    "convolutions": SpectralNormConv2d,
    "linears": nn.utils.parametrizations._SpectralNorm,
    "batchnorms": LipschitzBatchNorm2d,
}


class Calls(nn.Module):
    """A network whose forward is a function of itself and the input."""

    def __init__(self, function, **parts):
        super().__init__()
        self.function = function
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x):
        return self.function(self, x)


def shared(change=lambda self, x: x, inplace: bool = False, **parts) -> Calls:
    """One activation module called three times, and one place where it is called as a function."""

    def forward(self, x):
        x = self.relu(self.conv1(change(self, x)))
        x = self.relu(input=self.conv2(input=x)) + x
        return self.head(F.relu(x - 1).mean(dim=(2, 3)) + self.relu(x - 0.1).mean(dim=(2, 3)))

    parts |= {"conv1": nn.Conv2d(3, 4, 3, padding=1), "conv2": nn.Conv2d(4, 4, 3, padding=1)}
    return Calls(forward, relu=nn.ReLU(inplace), head=nn.Linear(4, 10), **parts)


def images(size: int = 8, channels: int = 3, n: int = 2, dtype=torch.float32) -> torch.Tensor:
    return torch.rand(n, channels, size, size, generator=torch.Generator().manual_seed(3), dtype=dtype)


def convert(model: nn.Module, x: torch.Tensor | None = None, **parts) -> tuple[nn.Module, ConversionReport]:
    return low_curvature(model, images() if x is None else x, **parts)


def betas(network: nn.Module) -> list[CenteredSoftplus]:
    return [module for module in network.modules() if isinstance(module, CenteredSoftplus)]


def outcomes(entries) -> dict[str, str]:
    return {entry.name: entry.outcome for entry in entries}


def operator_norm(layer: nn.Module, shape: tuple[int, ...]) -> float:
    """In float64, of a layer in eval mode without its bias."""
    layer = copy.deepcopy(layer).double().eval()
    layer.bias = None
    return torch.linalg.matrix_norm(dense_matrix(layer, shape), ord=2).item()


def nearly_equal_singular_values() -> nn.Linear:
    """Power iteration would take 1e4 steps to tell 1 from 0.9999."""
    linear = nn.Linear(64, 64, bias=False)
    linear.weight.data = torch.linspace(0.99, 1, 64).diag()
    return linear


@pytest.mark.parametrize(
    ("build", "shape"),
    [
        (partial(nn.Conv2d, 4, 8, 3, stride=2, padding=1), (4, 9, 9)),
        (partial(nn.Conv2d, 4, 8, 3, stride=2, padding="valid", bias=False), (4, 8, 8)),
        (partial(nn.Conv2d, 4, 8, 7, padding=3, groups=4), (4, 8, 8)),
        (partial(nn.Conv2d, 4, 8, (1, 3), padding="same", dilation=2), (4, 6, 6)),
        (partial(nn.Conv2d, 4, 8, 1), (4, 1, 1)),
        *((partial(nn.Linear, *sizes), sizes[:1]) for sizes in [(5, 9), (1, 6), (6, 1)]),
        (nearly_equal_singular_values, (64,)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_layer_alone_has_norm_1(build, shape, dtype):
    torch.manual_seed(1)
    layer, x = build().to(dtype).eval(), torch.rand(2, *shape, dtype=dtype)
    network, report = convert(layer, x)
    by = "SpectralNormConv2d" if len(shape) == 3 else "Linear with spectral_norm"
    assert report.replaced == (("", type(layer).__name__, by),)
    weight = network.weight if len(shape) == 3 else network.parametrizations.weight.original
    assert torch.equal(weight, layer.weight)
    at_zero = layer(torch.zeros_like(x))
    torch.testing.assert_close(network(torch.zeros_like(x)), at_zero)
    expected = at_zero + (layer(x) - at_zero) / operator_norm(layer, shape)
    torch.testing.assert_close(network(x), expected, rtol=1e-3, atol=1e-4)
    tolerance = 1e-4 if build is nearly_equal_singular_values else 1e-3
    assert operator_norm(network, shape) == pytest.approx(1, abs=tolerance)


def test_every_layer_of_mobilenet_is_converted_and_has_norm_1():
    """torchvision's, depthwise and dense; a narrow one, as dense operators are large."""
    torch.manual_seed(0)
    network, report = convert(torchvision.models.mobilenet_v3_small(num_classes=10, width_mult=0.25), images(16))
    assert {entry.kind for entry in report.left} == {"mul()"}
    assert ", and 49 more)" in str(report)  # of 52 convolutions
    convertible = {nn.ReLU, nn.Hardswish, nn.Hardsigmoid, nn.Conv2d, nn.BatchNorm2d}
    assert not convertible & {type(module) for module in network.modules()}
    norms = [
        *(operator_norm(conv, conv.v.shape[1:]) for conv in network.modules() if isinstance(conv, SpectralNormConv2d)),
        *(operator_norm(layer, (layer.in_features,)) for layer in network.modules() if isinstance(layer, nn.Linear)),
    ]
    assert len(norms) == 52 + 2
    assert max(norms) <= 1 + 1e-3


def test_rescaled_batchnorm_undoes_the_normalization():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Conv2d(5, 4, 3, bias=False), nn.BatchNorm2d(4))
    model = model.double().eval()
    for norm in (model[1], model[3]):
        norm.eps, norm.momentum = 0.0, None
        norm.num_batches_tracked.fill_(7)
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    x = images(dtype=torch.float64)
    network, _ = convert(model, x)
    for norm in (network[1], network[3]):
        assert (norm.momentum, norm.num_batches_tracked) == (None, 7)
        norm.log_gamma.data.fill_(math.log(1e6))
    torch.testing.assert_close(network(x), model(x))
    # plain statistics behind a normalized convolution are rescaled as well
    torch.testing.assert_close(convert(model, x, batchnorms=False)[0](x), model(x))
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 5), nn.BatchNorm1d(5, eps=0)).double().eval()
    torch.testing.assert_close(convert(model, x)[0](x), model(x))
    # with the clip active, the layer is Lipschitz by gamma
    norm = network[1]
    for gamma in (0.5, 100.0):
        norm.log_gamma.data.fill_(math.log(gamma))
        offset = norm(torch.zeros(1, 5, 2, 2, dtype=torch.float64))
        lipschitz = torch.linalg.matrix_norm(dense_matrix(lambda z, y=offset: norm(z) - y, (5, 2, 2)), ord=2).item()
        assert lipschitz == pytest.approx(min((norm.weight.abs() / norm.running_var.sqrt()).max().item(), gamma))


def test_statistics_are_rescaled_only_right_behind_a_normalized_layer():
    """x.add_(1) is the same tensor, but not the convolution's output any more; nor do two layers scale alike."""
    for function in (
        lambda self, x: self.norm(self.conv(x).add_(1)),
        lambda self, x: self.norm(self.conv(x)) + self.norm(self.other(x)),
    ):
        model = Calls(function, conv=nn.Conv2d(3, 4, 3), other=nn.Conv2d(3, 4, 3), norm=nn.BatchNorm2d(4))
        assert torch.equal(convert(model)[0].norm.running_var, torch.ones(4))


def in_place(self, x):
    """The results of the activations are not used, but what they do to their input is."""
    x = self.conv(x)
    self.act(x)
    y = x - 0.3
    y.relu_()
    z = y - 0.1
    F.relu(z, inplace=True)
    return (x + y + z).mean(dim=(2, 3))


def recurrent() -> Calls:
    """One block called twice, and in it one activation at two places of the tree."""
    act = nn.ReLU()
    block = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), act, nn.Conv2d(3, 3, 1), act)
    return Calls(lambda self, x: self.block(self.block(x)), block=block)


@pytest.mark.parametrize(
    ("build", "names", "traced"),
    [
        (lambda: nn.Sequential(shared(inplace=True)), ["0.relu", "0.relu_1", "0.relu_2", "0.relu_3"], ["0"]),
        (lambda: Calls(in_place, conv=nn.Conv2d(3, 4, 3), act=nn.ReLU(True)), ["act", "relu_", "relu"], [""]),
        (recurrent, ["block.1", "block.3"], []),
    ],
)
def test_sharp_activations_alone_leave_a_relu_network_as_it_was(build, names, traced):
    torch.manual_seed(0)
    model = build().double().eval()
    x = images(dtype=torch.float64)
    network, report = convert(model, x, convolutions=False, linears=False, batchnorms=False)
    network(x).sum().backward()
    gradients = [module.log_beta.grad.item() for module in betas(network)]
    assert len(set(gradients)) == len(names)  # each is called at another place
    assert 0 not in gradients
    for module in betas(network):
        module.log_beta.data.fill_(math.log(1e7))
    torch.testing.assert_close(network(x), model(x), rtol=0, atol=1e-6)
    assert [entry.name for entry in report.replaced] == names
    assert [entry.name for entry in report.traced] == traced
    assert set(network.state_dict()) == set(model.state_dict()) | {f"{name}.log_beta" for name in names}
    by = "CenteredSoftplus, one beta for 2 calls" if build is recurrent else "CenteredSoftplus"
    assert set(outcomes(report.replaced).values()) == {by}


def test_resnet_stays_a_resnet_but_for_its_blocks():
    network, report = convert(torchvision.models.resnet18(), images(32))
    assert len(betas(network)) == 17  # the stem's and two for each of 8 blocks
    assert type(network) is torchvision.models.ResNet
    assert [entry.kind for entry in report.traced] == ["BasicBlock"] * 8
    names = [entry.name.removeprefix("layer2.0.") for entry in report.replaced if "layer2.0." in entry.name]
    assert names == ["conv1", "bn1", "relu", "conv2", "bn2", "downsample.0", "downsample.1", "relu_1"]
    assert not report.left
    seen = []
    network.layer2[0].register_forward_hook(lambda *_: seen.append(1))
    network(images(32))
    assert seen == [1]  # a block is still called


def test_all_activations_modules_and_functions():
    acts = nn.Sequential(
        *(nn.ReLU(), nn.ReLU6(True), nn.LeakyReLU(), nn.ELU(), nn.CELU(), nn.SELU(), nn.GELU("tanh"), nn.SiLU()),
        *(nn.Mish(), nn.Hardswish(), nn.Softplus(20), nn.Hardsigmoid(), nn.Softplus(5), nn.Sigmoid(), nn.Tanh()),
    )

    def many(self, x):
        x = self.acts(x)
        x = torch.relu(x) + x.relu() + F.relu6(x) + F.gelu(x, approximate="tanh") + F.silu(input=x)
        x = F.leaky_relu(x, 0.2, inplace=True) + F.elu(x, alpha=0.5) + F.mish(x) + F.hardswish(x) + torch.selu(x)
        return F.hardsigmoid(x) + F.softplus(x, beta=50) + F.softplus(x, 5) + F.celu(x) + torch.sigmoid(x)

    network, report = convert(Calls(many, acts=acts), images() - 0.5)
    assert not report.left
    assert len(betas(network)) == 11 + 12
    assert list(outcomes(report.replaced).values()).count("Sigmoid") == 2
    assert isinstance(network.acts[12], nn.Softplus)
    x = images().requires_grad_()
    (gradient,) = torch.autograd.grad(network(x).sum(), x, create_graph=True)
    gradient.square().sum().backward()
    assert x.grad.isfinite().all()


CANNOT_BE_TRACED = {
    "control flow": lambda self, x: x if x.mean() > 0 else -x,
    "training mode": lambda self, x: F.dropout(x, 0.5, self.training),
    "tensors of its own": lambda self, x: x * torch.tensor([[[1.0]], [[2.0]], [[3.0]]]),
    "parameters are computed": lambda self, x: F.leaky_relu(x, x.shape[0]),
}


@pytest.mark.parametrize("reason", CANNOT_BE_TRACED)
def test_a_forward_that_cannot_be_traced_is_left_and_reported(reason):
    network, report = convert(shared(CANNOT_BE_TRACED[reason]))
    assert type(network) is Calls
    assert not report.traced
    replaced = outcomes(report.replaced)
    assert replaced["relu"].startswith("CenteredSoftplus, one beta for 3 calls")
    assert reason in replaced["relu"]
    assert reason in outcomes(report.left)["relu"]


def test_in_place_activations_whose_effect_cannot_be_traced_stay():
    def views(self, x):
        self.relu(x[:, 0])
        x[:, 1].relu_()
        return x

    model, x = Calls(views, relu=nn.ReLU(inplace=True)), images() - 0.5
    network, report = convert(model, x)
    assert torch.equal(network(x.clone()), model(x.clone()))
    assert [entry.kind for entry in report.left] == ["ReLU", "relu()"]
    assert "in place" in report.left[0].outcome
    assert "something else" in report.left[1].outcome


def test_dropout_and_stochastic_depth_follow_the_mode_afterwards():
    depth = nn.Sequential(StochasticDepth(0.5, "row"), nn.Dropout(0.2))
    model, x = shared(lambda self, x: self.depth(x) + F.relu(x), depth=depth), images(n=16)
    for training in (True, False):
        network, report = convert(model.train(training), x)
        assert report.traced
        assert all(module.training == training for module in network.modules())
    assert torch.equal(network(x), network(x))
    u = network.conv1.u.clone()
    assert not torch.equal(network.train()(x), network(x))
    assert not torch.equal(network.conv1.u, u)


class Own(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) + 1


def test_what_is_left_is_in_the_report_in_order_and_with_its_reason():
    """One of everything that has no low-curvature version, by the path in the report, and why not."""
    conv = partial(nn.Conv2d, 4, 4, 1)
    tied, twin, hooked, zero, zeros, hook_calls = conv(), conv(), conv(), conv(), nn.Linear(64, 64), []
    twin.weight = tied.weight
    hooked.register_forward_hook(lambda *_: hook_calls.append(1))
    nn.init.zeros_(zero.weight)
    nn.init.zeros_(zeros.weight)
    cases = {
        "own": (Own(4, 4, 1), "Own has a forward of its own"),
        "reflect": (nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), "pads with 'reflect'"),
        "wide": (nn.Conv2d(4, 4, (1, 4), padding="same"), "not the same at both ends"),
        "high": (nn.Conv2d(4, 4, (4, 1), padding="same"), "not the same at both ends"),
        "parametrized": (spectral_norm(conv()), "parametrized already"),
        "hooked": (hooked, "has hooks"),
        "sizes.a": (Calls(lambda self, x: self.a(x) + self.a(x[..., 1:]).mean(), a=conv()), "several sizes"),
        "tied": (tied, "shares its weights"),
        "twin": (twin, "shares its weights"),
        "zero": (zero, "its weight is zero"),
        "up": (nn.ConvTranspose2d(4, 4, 1), "weights that are not normalized"),
        "no_statistics": (nn.BatchNorm2d(4, track_running_stats=False), "no running statistics"),
        "norm": (nn.GroupNorm(2, 4), "divides by its input's own statistics"),
        "prelu": (nn.PReLU(), "not smooth"),
        "gate.mul": (Calls(lambda self, x: 2 * x * x.sigmoid()), "product of tensors"),
        "kernel.conv2d": (Calls(lambda self, x: F.conv2d(x, tied.weight)), "weights that are not normalized"),
        "clamp.clamp": (Calls(lambda self, x: x.clamp(min=-1)), "not smooth"),
        "softmax": (nn.Softmax(dim=-1), "not an activation"),
        "flat": (nn.Flatten(2), ""),
        "norm1d": (nn.BatchNorm1d(4), "only BatchNorm2d"),
        "attention.a": (Calls(lambda self, x: self.a(x, x, x)[0], a=nn.MultiheadAttention(64, 2)), "attention"),
        "zeros": (zeros, "its weight is zero"),
        "good": (nn.Linear(64, 4), ""),
        "unused.a": (Calls(lambda self, x: x, a=conv()), "not called on the example"),
    }
    model = nn.Sequential()
    for path, (module, _) in cases.items():
        model.add_module(path.split(".")[0], module)
    network, report = convert(model, images(8, 4))
    found, expected = outcomes(report.left), {path: reason for path, (_, reason) in cases.items() if reason}
    assert list(found) == list(expected)
    assert all(reason in found[path] for path, reason in expected.items()), found
    text = str(report)
    assert "replaced 1\n     1 Linear -> Linear with spectral_norm (good)\n" in text
    assert f"left {len(expected)}\n" in text
    assert "has hooks (hooked)" in text
    hook_calls.clear()
    network(images(8, 4))
    assert hook_calls == [1]  # the hook works still: it is the model's own function


def test_a_layer_in_two_places_stays_one():
    conv = nn.Conv2d(3, 3, 1)
    network, _ = convert(nn.Sequential(conv, nn.Flatten(2), nn.Unflatten(2, (8, 8)), conv))
    assert network[0] is network[3]
    assert type(network[0]) is SpectralNormConv2d


def test_weights_of_16_bits():
    x = images(dtype=torch.bfloat16)
    network, _ = convert(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 3)).bfloat16(), x)
    assert network(x).dtype == torch.bfloat16
    assert operator_norm(network[0], (3, 8, 8)) == pytest.approx(1, abs=0.02)


def test_each_part_is_optional():
    model = shared(lambda self, x: self.norm(x), norm=nn.BatchNorm2d(3))
    for part, kind in PARTS.items():
        network, report = convert(model, **{part: False})
        assert {type(module) for module in network.modules()} & set(PARTS.values()) == set(PARTS.values()) - {kind}
        assert f"{part}=False" in outcomes(report.left).values()
    nothing, report = convert(model, **dict.fromkeys(PARTS, False))
    assert not report.replaced
    assert torch.equal(nothing.eval()(images()), model.eval()(images()))


def test_low_curvature_networks_are_left_alone_and_our_standard_ones_are_converted(thin_vgg):
    _, report = convert(TwoBlocks(10, 8))
    assert report == ConversionReport((), (), ())
    again, report = convert(convert(shared())[0])
    assert (report.replaced, report.left) == ((), ())
    assert len(betas(again)) == 4
    network, _ = convert(model_architecture["vgg11"](4, 16), images(16))
    kinds = [type(module) for module in network.modules()]
    assert [kinds.count(kind) for kind in (CenteredSoftplus, SpectralNormConv2d, LipschitzBatchNorm2d)] == [10] * 3


def test_the_original_is_not_touched():
    model = nn.Sequential(shared(inplace=True), nn.BatchNorm1d(10), nn.Linear(10, 3)).train()
    model[1].eval()
    model[0].conv2.weight.requires_grad_(False)
    hook = model.register_forward_hook(lambda *_: None)
    state, modes = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    x = images()
    pixels, random_state = x.clone(), torch.get_rng_state()
    network, _ = convert(model, x)
    assert torch.equal(random_state, torch.get_rng_state())
    assert torch.equal(pixels, x)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.children())
    assert type(model[0]) is Calls
    assert model[0].relu.inplace
    # carried over
    assert [network[0].relu_1.training, network[1].training, network[2].training] == [True, False, True]
    assert list(network._forward_hooks) == list(model._forward_hooks) == [hook.id]
    assert [network[0].conv1.weight.requires_grad, network[0].conv2.weight.requires_grad] == [True, False]
    network(x).sum().backward()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_state_goes_into_a_fresh_conversion_and_a_copy():
    def plain() -> nn.Module:
        model = shared(lambda self, x: x * self.scale, norm=nn.BatchNorm2d(4))
        model.register_buffer("scale", torch.ones(3, 1, 1), persistent=False)
        return model

    first, second = (convert(plain())[0] for _ in range(2))
    first.train()(images())  # moves the singular vectors
    second.load_state_dict(first.state_dict())
    for network in (second, copy.deepcopy(first)):
        assert torch.equal(network.eval()(images()), first.eval()(images()))
        assert list(network.state_dict()) == list(first.state_dict())
    before, after = list(plain().state_dict()), list(convert(plain(), linears=False)[0].state_dict())
    assert before == [name for name in after if name in before]  # an optimizer's state counts on the order
