"""The conversion of outside networks: dense operators, the functions computed, a report that leaves nothing out."""

import copy
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import fx, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torchvision.ops import StochasticDepth

from curvature.estimate import estimate_curvature
from curvature.self_check import check_model
from models.conversion import ConversionReport, low_curvature
from models.layers import CenteredSoftplus, LipschitzBatchNorm2d, SpectralNormConv2d
from models.model_selector import model_architecture
from regularized_loss import CurvatureAndGradientRegularizedLoss
from tests.test_layers import dense_matrix
from training.epoch import calibrate_batchnorm


def images(size: int = 8, channels: int = 3, n: int = 2, dtype=torch.float32) -> torch.Tensor:
    return torch.rand(n, channels, size, size, generator=torch.Generator().manual_seed(3), dtype=dtype)


def convert(model: nn.Module, x: torch.Tensor | None = None, **parts) -> tuple[nn.Module, ConversionReport]:
    return low_curvature(model, images() if x is None else x, **parts)


def outside(name: str, **arguments) -> nn.Module:
    torch.manual_seed(0)
    return getattr(torchvision.models, name)(num_classes=10, weights=None, **arguments)


def of_kind(network: nn.Module, kind: type) -> list[nn.Module]:
    return [module for module in network.modules() if isinstance(module, kind)]


betas = partial(of_kind, kind=CenteredSoftplus)


def outcomes(entries) -> dict[str, str]:
    return {entry.name: entry.outcome for entry in entries}


HAS_A_VERSION = (
    nn.ReLU,
    nn.ReLU6,
    nn.GELU,
    nn.SiLU,
    nn.Hardswish,
    nn.Hardsigmoid,
    nn.Conv2d,
    nn.Linear,
    nn.BatchNorm2d,
)
HAS_NONE = (nn.Conv1d, nn.ConvTranspose2d, nn.BatchNorm1d, nn.LayerNorm, nn.GroupNorm, nn.Softmax, nn.PReLU)


def assert_nothing_left_unreported(network: nn.Module, report: ConversionReport) -> None:
    """Every module of torch.nn that has, or would need, a low-curvature version is in the report."""
    left = outcomes(report.left)
    for name, module in network.named_modules():
        assert type(module) not in HAS_A_VERSION + HAS_NONE or name in left, f"{name} is not in the report"


# layers against their dense operators


def operator_norm(layer: nn.Module, shape: tuple[int, ...]) -> float:
    """In float64, of a layer in eval mode without its bias."""
    layer = copy.deepcopy(layer).double().eval()
    layer.bias = None
    return torch.linalg.matrix_norm(dense_matrix(layer, shape), ord=2).item()


@pytest.mark.parametrize(
    ("arguments", "size"),
    [
        ({"kernel_size": 3, "stride": 2, "padding": 1}, 9),
        ({"kernel_size": 3, "stride": 2, "padding": 1, "bias": False}, 8),
        ({"kernel_size": 3, "padding": 1, "groups": 2}, 7),
        ({"kernel_size": 7, "padding": 3, "groups": 4}, 8),
        ({"kernel_size": (1, 3), "padding": "same", "dilation": 2}, 6),
        ({"kernel_size": 3, "padding": "valid", "stride": 2}, 8),
        ({"kernel_size": 1}, 1),
    ],
)
def test_convolutions_have_norm_1(arguments, size):
    torch.manual_seed(1)
    conv = nn.Conv2d(4, 8, **arguments).eval()
    x = images(size, 4)
    network, report = convert(nn.Sequential(conv), x)
    assert [entry.outcome for entry in report.replaced] == ["SpectralNormConv2d"]
    assert torch.equal(network[0].weight, conv.weight)
    bias = torch.zeros(8) if conv.bias is None else conv.bias
    assert (network[0].bias is None) == (conv.bias is None)
    bias = bias.view(-1, 1, 1)
    torch.testing.assert_close(network(x), (conv(x) - bias) / network[0].spectral_norm() + bias)
    assert operator_norm(network[0], (4, size, size)) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (1, 6), (6, 1), (40, 40)])
def test_linears_have_norm_1(shape):
    torch.manual_seed(1)
    linear = nn.Linear(*shape)
    network, report = convert(nn.Sequential(linear), torch.rand(2, shape[0]))
    assert [entry.kind for entry in report.replaced] == ["Linear"]
    assert torch.equal(network[0].parametrizations.weight.original, linear.weight)
    assert operator_norm(network[0], (shape[0],)) == pytest.approx(1, abs=1e-3)


def test_every_layer_of_a_network_has_norm_1():
    """Of torchvision's MobileNet, depthwise and dense; a narrow one, as dense operators are large."""
    network, _ = convert(outside("mobilenet_v3_small", width_mult=0.25), images(16))
    convolutions, linears = of_kind(network, SpectralNormConv2d), of_kind(network, nn.Linear)
    assert (len(convolutions), len(linears)) == (52, 2)
    shapes = [(conv, conv.v.shape[1:]) for conv in convolutions] + [(layer, (layer.in_features,)) for layer in linears]
    for layer, shape in shapes:
        assert operator_norm(layer, shape) <= 1 + 1e-3


def test_nearly_equal_singular_values_do_not_mislead():
    """Power iteration would take 1e4 steps to tell 1 from 0.9999; the norm is right all the same."""
    linear = nn.Linear(64, 64, bias=False)
    linear.weight.data = torch.linspace(0.99, 1, 64).diag()
    network, _ = convert(nn.Sequential(linear), torch.rand(1, 64))
    assert operator_norm(network[0], (64,)) <= 1 + 1e-4


@pytest.mark.parametrize("gamma", [0.5, 100.0])
def test_rescaled_batchnorm_undoes_the_normalization(gamma):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Conv2d(5, 4, 3, bias=False), nn.BatchNorm2d(4))
    model = model.double().eval()
    for norm in (model[1], model[3]):
        norm.eps = 0.0
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    x = images(dtype=torch.float64)
    network, _ = convert(model, x)
    for norm in (network[1], network[3]):
        norm.log_gamma.data.fill_(math.log(1e6))
    torch.testing.assert_close(network(x), model(x))
    # plain statistics behind a normalized convolution are rescaled as well
    torch.testing.assert_close(convert(model, x, batchnorms=False)[0](x), model(x))
    # with the clip active, the layer is Lipschitz by gamma
    network[1].log_gamma.data.fill_(math.log(gamma))
    offset = network[1](torch.zeros(1, 5, 2, 2, dtype=torch.float64))
    norm = torch.linalg.matrix_norm(dense_matrix(lambda z: network[1](z) - offset, (5, 2, 2)), ord=2).item()
    assert norm == pytest.approx(min((network[1].weight.abs() / network[1].running_var.sqrt()).max().item(), gamma))


def test_statistics_are_rescaled_only_right_behind_a_normalized_layer():
    class Between(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x):
            x = self.conv(x)
            x += 1  # the same tensor, but not the convolution's output any more
            return self.norm(x)

    network, _ = convert(Between())
    assert torch.equal(network.norm.running_var, torch.ones(4))


# activations


class Shared(nn.Module):
    """One activation module called three times, and one place where it is called as a function."""

    def __init__(self, inplace: bool = False):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.relu = nn.ReLU(inplace)
        self.head = nn.Linear(4, 10)

    def forward(self, x):
        x = self.relu(self.conv1(x))
        x = self.relu(self.conv2(x)) + x
        return self.head(F.relu(x - 1).mean(dim=(2, 3)) + self.relu(x - 0.1).mean(dim=(2, 3)))


class InPlace(nn.Module):
    """The results of the activations are not used, but what they do to their input is."""

    def __init__(self):
        super().__init__()
        self.conv, self.act = nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True)

    def forward(self, x):
        x = self.conv(x)
        self.act(x)
        y = x - 0.3
        y.relu_()
        z = y - 0.1
        F.relu(z, inplace=True)
        return (x + y + z).mean(dim=(2, 3))


class Recurrent(nn.Module):
    """One block called twice, and one activation at two places of the tree."""

    def __init__(self):
        super().__init__()
        act = nn.ReLU()
        self.block = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), act, nn.Conv2d(3, 3, 1), act)

    def forward(self, x):
        return self.block(self.block(x))


SHARED = ["relu", "relu_1", "relu_2", "relu_3"]


@pytest.mark.parametrize(
    ("kind", "names", "traced"),
    [
        (Shared, SHARED, [""]),
        (partial(Shared, inplace=True), SHARED, [""]),
        (partial(nn.Sequential, Shared()), [f"0.{name}" for name in SHARED], ["0"]),
        (InPlace, ["act", "relu_", "relu"], [""]),
        (Recurrent, ["block.1", "block.3"], []),
    ],
)
def test_sharp_activations_alone_leave_a_relu_network_as_it_was(kind, names, traced):
    torch.manual_seed(0)
    model = kind().double().eval()
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
    one_for_two_calls = {"CenteredSoftplus, one beta for 2 calls"} if kind is Recurrent else {"CenteredSoftplus"}
    assert set(outcomes(report.replaced).values()) == one_for_two_calls
    assert_nothing_left_unreported(network, report)


def test_resnet_stays_a_resnet_but_for_its_blocks():
    network, report = convert(outside("resnet18"), images(32))
    assert len(betas(network)) == 17  # the stem's and two for each of 8 blocks
    assert type(network) is torchvision.models.ResNet
    assert {entry.kind for entry in report.traced} == {"BasicBlock"}
    assert len(report.traced) == 8
    names = ("conv1", "bn1", "relu", "conv2", "bn2", "downsample.0", "downsample.1", "relu_1")
    assert [entry.name for entry in report.replaced if entry.name.startswith("layer2.0.")] == [
        f"layer2.0.{name}" for name in names
    ]
    assert not report.left
    seen = []
    network.layer2[0].register_forward_hook(lambda *_: seen.append(1))
    network(images(32))
    assert seen == [1]  # a block is still called


def test_all_activations_modules_and_functions():
    class Many(nn.Module):
        def __init__(self):
            super().__init__()
            self.acts = nn.Sequential(
                *(nn.ReLU(), nn.ReLU6(True), nn.LeakyReLU(), nn.ELU(), nn.CELU(), nn.SELU(), nn.GELU("tanh")),
                *(nn.SiLU(), nn.Mish(), nn.Hardswish(), nn.Softplus(beta=20), nn.Hardsigmoid(), nn.Softplus()),
                *(nn.Sigmoid(), nn.Tanh()),
            )

        def forward(self, x):
            x = self.acts(x)
            x = torch.relu(x) + x.relu() + F.relu6(x) + F.gelu(x, approximate="tanh") + F.silu(input=x)
            x = F.leaky_relu(x, 0.2, inplace=True) + F.elu(x, alpha=0.5) + F.mish(x) + F.hardswish(x) + torch.selu(x)
            return F.hardsigmoid(x) + F.softplus(x, beta=50) + F.softplus(x) + F.celu(x) + torch.sigmoid(x)

    network, report = convert(Many(), images() - 0.5)
    assert not report.left
    assert len(betas(network)) == 11 + 12
    assert list(outcomes(report.replaced).values()).count("Sigmoid") == 2
    assert isinstance(network.acts[12], nn.Softplus)
    x = images().requires_grad_()
    (gradient,) = torch.autograd.grad(network(x).sum(), x, create_graph=True)
    gradient.square().sum().backward()
    assert x.grad.isfinite().all()


# forwards that cannot be traced


class Changed(Shared):
    def __init__(self, change):
        super().__init__()
        self.change = change

    def forward(self, x):
        return super().forward(self.change(self, x))


CANNOT_BE_TRACED = {
    "control flow": lambda self, x: x if x.mean() > 0 else -x,
    "training mode": lambda self, x: F.dropout(x, 0.5, self.training),
    "tensors of its own": lambda self, x: x * torch.tensor([[[1.0]], [[2.0]], [[3.0]]]),
    "parameters are computed": lambda self, x: F.leaky_relu(x, x.shape[0]),
}


@pytest.mark.parametrize("reason", CANNOT_BE_TRACED)
def test_a_forward_that_cannot_be_traced_is_left_and_reported(reason):
    network, report = convert(Changed(CANNOT_BE_TRACED[reason]))
    assert type(network) is Changed
    assert not report.traced
    assert len(betas(network)) == 1
    replaced = outcomes(report.replaced)
    assert set(replaced) == {"conv1", "relu", "conv2", "head"}
    assert replaced["relu"].startswith("CenteredSoftplus, one beta for 3 calls")
    assert reason in replaced["relu"]
    assert reason in outcomes(report.left)["relu"]
    if reason == "training mode":  # and in training it still does
        assert not torch.equal(network.train()(images()), network(images()))


def test_in_place_activations_whose_effect_cannot_be_traced_stay():
    class View(nn.Module):
        def __init__(self):
            super().__init__()
            self.relu = nn.ReLU(inplace=True)

        def forward(self, x):
            self.relu(x[:, 0])
            x[:, 1].relu_()
            return x

    model, x = View(), images() - 0.5
    network, report = convert(model, x)
    assert torch.equal(network(x.clone()), model(x.clone()))
    assert {entry.kind for entry in report.left} == {"ReLU", "relu()"}
    assert "in place" in report.left[0].outcome
    assert "something else" in report.left[1].outcome


@pytest.mark.parametrize("training", [True, False])
def test_dropout_and_stochastic_depth_follow_the_mode_afterwards(training):
    depth = nn.Sequential(StochasticDepth(0.5, "row"), nn.Dropout(0.2))
    model = nn.Sequential(Changed(lambda self, x: self.depth(x) + F.relu(x)))
    model[0].depth = depth
    x = images(n=16)
    network, report = convert(model.train(training), x)
    assert not report.left
    assert [entry.name for entry in report.traced] == ["0"]
    assert all(module.training == training for module in network.modules())
    assert torch.equal(network.eval()(x), network(x))
    u = network[0].conv1.u.clone()
    assert not torch.equal(network.train()(x), network(x))
    assert not torch.equal(network[0].conv1.u, u)


# what is left


class Own(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) + 1


class Calls(nn.Module):
    """A function of the input and of the module's parts."""

    def __init__(self, function, **parts):
        super().__init__()
        self.function = function
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x):
        return self.function(self, x)


def exceptions(hook) -> dict[str, tuple[nn.Module, str]]:
    """One of everything that has no low-curvature version, by the path in the report, and why not."""
    conv = partial(nn.Conv2d, 4, 4, 1)
    tied, twin, hooked, zero = conv(), conv(), conv(), conv()
    twin.weight = tied.weight
    hooked.register_forward_hook(hook)
    nn.init.zeros_(zero.weight)
    return {
        "own": (Own(4, 4, 1), "Own has a forward of its own"),
        "reflect": (nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), "pads with 'reflect'"),
        "even": (nn.Conv2d(4, 4, 4, padding="same"), "not the same at both ends"),
        "parametrized": (spectral_norm(conv()), "parametrized already"),
        "weight_normed": (weight_norm(nn.Linear(8, 8)), "parametrized already"),
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
        "conv1d": (nn.Conv1d(4, 4, 1), "weights that are not normalized"),
        "norm1d": (nn.BatchNorm1d(4), "only BatchNorm2d"),
        "attention.a": (Calls(lambda self, x: self.a(x, x, x)[0], a=nn.MultiheadAttention(64, 2)), "attention"),
        "good": (nn.Linear(64, 4), ""),
        "unused.a": (Calls(lambda self, x: x, a=conv(), b=nn.ReLU()), "not called on the example"),
        "unused.b": (nn.Identity(), "not called on the example"),
    }


def test_what_is_left_is_in_the_report_in_order_and_with_its_reason():
    torch.manual_seed(0)
    hook_calls = []
    cases = exceptions(lambda *_: hook_calls.append(1))
    model = nn.Sequential()
    for name, (module, _) in cases.items():
        if not hasattr(model, name.split(".")[0]):
            model.add_module(name.split(".")[0], module)
    network, report = convert(model, images(8, 4))
    expected = {name: reason for name, (_, reason) in cases.items() if reason}
    found = outcomes(report.left)
    assert list(found) == list(expected)
    for name, reason in expected.items():
        assert reason in found[name], name
    assert outcomes(report.replaced) == {"good": "Linear with spectral_norm"}
    assert_nothing_left_unreported(network, report)
    text = str(report)
    assert "replaced 1\n     1 Linear -> Linear with spectral_norm (good)\n" in text
    assert f"left {len(expected)}\n" in text
    assert "has hooks (hooked)" in text
    assert max(map(len, text.splitlines())) < 200
    hook_calls.clear()
    network(images(8, 4))
    assert hook_calls == [1]  # the hook works still: it is the model's own function


PARTS = {
    "activations": CenteredSoftplus,
    "convolutions": SpectralNormConv2d,
    "linears": nn.utils.parametrizations._SpectralNorm,
    "batchnorms": LipschitzBatchNorm2d,
}


@pytest.mark.parametrize("part", PARTS)
def test_each_part_is_optional(part):
    model = nn.Sequential(Shared(), nn.BatchNorm1d(10))
    model[0].conv1 = nn.Sequential(model[0].conv1, nn.BatchNorm2d(4))
    x = images()
    network, report = convert(model, x, **{part: False})
    kinds = {type(module) for module in network.modules()}
    assert kinds & set(PARTS.values()) == set(PARTS.values()) - {PARTS[part]}
    assert f"{part}=False" in outcomes(report.left).values()
    assert_nothing_left_unreported(network, report)
    nothing, report = convert(model, x, **dict.fromkeys(PARTS, False))
    assert not report.replaced
    assert torch.equal(nothing.eval()(x), model.eval()(x))


# the network as a whole


def test_low_curvature_networks_are_left_alone_and_our_standard_ones_are_converted():
    _, report = convert(model_architecture["resnet18lcnn"](10), images(32))
    assert report == ConversionReport((), (), ())
    again, report = convert(convert(Shared())[0])
    assert (report.replaced, report.left) == ((), ())
    assert len(betas(again)) == 4
    network, _ = convert(model_architecture["vgg11"](4, 16), images(16))
    for kind in (CenteredSoftplus, SpectralNormConv2d, LipschitzBatchNorm2d):
        assert len(of_kind(network, kind)) == 10


def test_the_original_is_not_touched():
    model = nn.Sequential(Shared(inplace=True), nn.BatchNorm1d(10), nn.Linear(10, 3)).train()
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
    assert type(model[0]) is Shared
    assert model[0].relu.inplace
    # carried over
    assert [network[0].relu_1.training, network[1].training, network[2].training] == [True, False, True]
    assert list(network._forward_hooks) == list(model._forward_hooks) == [hook.id]
    assert not network[0].conv2.weight.requires_grad
    assert network[0].conv1.weight.requires_grad
    network(x).sum().backward()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_state_goes_into_a_fresh_conversion_and_a_copy():
    class Auxiliary(Shared):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm2d(4)
            self.aux = nn.Linear(4, 2)
            self.register_buffer("scale", torch.ones(3, 1, 1), persistent=False)

        def forward(self, x):
            return super().forward(x * self.scale)

    def fresh(seed: int, like=lambda model: model) -> nn.Module:
        torch.manual_seed(seed)
        return convert(like(Auxiliary()))[0]

    first = fresh(0)
    optimizer = torch.optim.SGD(first.parameters(), lr=0.1)
    first.train()(images()).square().sum().backward()
    optimizer.step()
    second, copied = fresh(1), copy.deepcopy(first)
    second.load_state_dict(first.state_dict())
    for network in (second, copied):
        assert torch.equal(network.eval()(images()), first.eval()(images()))
        assert list(network.state_dict()) == list(first.state_dict())
    names = [name.replace("parametrizations.weight.original", "weight") for name in first.state_dict()]
    plain = list(Auxiliary().state_dict())
    assert set(plain) <= set(names)
    plain, names = ([name for name in both if "conv" in name or "bn" in name] for both in (plain, names))
    assert plain == [name for name in names if name in plain]  # an optimizer's state counts on the order
    assert all(map(torch.equal, fresh(5).state_dict().values(), fresh(5).state_dict().values()))
    # a graph of the whole is converted like what it was traced from
    traced = fresh(0, fx.symbolic_trace)
    torch.testing.assert_close(traced(images()), fresh(0)(images()), rtol=1e-3, atol=1e-4)


def test_float64_and_layers_alone():
    network, _ = convert(Shared().double(), images(dtype=torch.float64))
    assert {p.dtype for p in network.state_dict().values()} == {torch.float64}
    for layer in (nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Linear(8, 4)):
        network, report = convert(layer.double(), images(dtype=torch.float64))
        assert [entry.name for entry in report.replaced] == [""]
        assert network(images(dtype=torch.float64)).dtype == torch.float64


# BatchNorm in training on few images whose last maps are of one pixel has gradients of 1e9: more images there
@pytest.mark.parametrize(
    ("name", "n"),
    [
        ("resnet18", 8),
        ("mobilenet_v3_small", 8),
        pytest.param("convnext_tiny", 2, marks=pytest.mark.long),
        pytest.param("vgg11_bn", 4, marks=pytest.mark.long),  # 130 million weights
    ],
)
def test_torchvisions_networks_train_and_are_measured(name, n):
    x, labels = images(32, n=n), torch.arange(n)
    network, report = convert(outside(name), x[:2])
    assert_nothing_left_unreported(network, report)
    assert set(outcomes(report.replaced).values()) >= {"SpectralNormConv2d", "CenteredSoftplus"}
    assert {entry.kind for entry in report.left} <= {"mul()", "LayerNorm", "LayerNorm2d"}
    calibrate_batchnorm(network, x)  # untrained, MobileNet's logits are 1e-10 in eval mode otherwise
    check_model(network, x[:2], 10, name)
    network.train()
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3)
    loss = CurvatureAndGradientRegularizedLoss(network).compute_loss(x, labels)
    loss.backward()
    optimizer.step()
    assert loss.isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())
    estimate = estimate_curvature(network, x[:2], labels[:2], num_iterations=2)
    assert estimate.curvature.isfinite().all()
    assert (estimate.gradient_norm > 0).all()
