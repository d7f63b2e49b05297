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
from torch.overrides import TorchFunctionMode
from torchvision.ops import StochasticDepth

from curvature.estimate import estimate_curvature
from curvature.self_check import check_model
from models.conversion import ConversionReport, low_curvature
from models.layers import CenteredSoftplus, LipschitzBatchNorm2d, SpectralNormConv2d
from models.model_selector import model_architecture
from regularized_loss import CurvatureAndGradientRegularizedLoss
from tests.test_layers import dense_matrix
from training.epoch import calibrate_batchnorm

ONLY_ACTIVATIONS = {"convolutions": False, "linears": False, "batchnorms": False}


def images(size: int = 8, channels: int = 3, n: int = 2, dtype=torch.float32) -> torch.Tensor:
    return torch.rand(n, channels, size, size, generator=torch.Generator().manual_seed(3), dtype=dtype)


def convert(model: nn.Module, x: torch.Tensor | None = None, **parts) -> tuple[nn.Module, ConversionReport]:
    return low_curvature(model, images() if x is None else x, **parts)


def outside(name: str) -> nn.Module:
    torch.manual_seed(0)
    return getattr(torchvision.models, name)(num_classes=10, weights=None)


def betas(network: nn.Module) -> list[CenteredSoftplus]:
    return [module for module in network.modules() if isinstance(module, CenteredSoftplus)]


def make_sharp(network: nn.Module) -> None:
    """beta so large that every centered softplus is a ReLU to 1e-7."""
    for module in betas(network):
        module.log_beta.data.fill_(math.log(1e7))


def reasons(report: ConversionReport) -> dict[str, str]:
    return {entry.name: entry.reason for entry in report.left}


# a check of the report that shares nothing with the conversion

CONVERTIBLE_MODULES = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish, nn.Hardsigmoid),
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.Linear, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d),
    *(nn.LayerNorm, nn.GroupNorm, nn.InstanceNorm2d, nn.Softmax, nn.MultiheadAttention, nn.Hardtanh),
)
CONVERTIBLE_FUNCTIONS = {"relu", "gelu", "silu", "hardswish", "hardsigmoid", "leaky_relu", "softmax", "layer_norm"}
CONVERTIBLE_FUNCTIONS |= {"conv2d", "linear", "matmul", "clamp", "scaled_dot_product_attention"}


class FunctionNames(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.names, self.depth = set(), 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if not self.depth:
            self.names.add(function.__name__.strip("_"))
        return function(*args, **(kwargs or {}))


def assert_nothing_left_unreported(network: nn.Module, report: ConversionReport, x: torch.Tensor) -> None:
    """Every convertible module that is there, and every function called outside of layers, is in the report."""
    left = {entry.name for entry in report.left}
    functions = FunctionNames()
    hooks = []
    for name, module in network.named_modules():
        normalized = nn.utils.parametrize.is_parametrized(module) and name not in left
        low = isinstance(module, (CenteredSoftplus, SpectralNormConv2d, LipschitzBatchNorm2d)) or normalized
        inside = any(name.startswith(f"{entry.name}.") for entry in report.left if entry.kind == "MultiheadAttention")
        if not low and not inside and isinstance(module, CONVERTIBLE_MODULES):
            assert name in left, f"{name} is not in the report"
        if low or isinstance(module, CONVERTIBLE_MODULES):

            def enter(*_):
                functions.depth += 1

            def leave(*_):
                functions.depth -= 1

            hooks += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    was_training = network.training
    with torch.no_grad(), functions:
        network.eval()(x)
    network.train(was_training)
    for hook in hooks:
        hook.remove()
    reported = {entry.kind.removesuffix("()") for entry in report.left if entry.kind.endswith("()")}
    assert functions.names & CONVERTIBLE_FUNCTIONS <= reported


# layers against their dense operators

CONVOLUTIONS = [
    ({"kernel_size": 3, "stride": 2, "padding": 1}, 9),
    ({"kernel_size": 3, "stride": 2, "padding": 1, "bias": False}, 8),
    ({"kernel_size": 3, "padding": 1, "groups": 2}, 7),
    ({"kernel_size": 7, "padding": 3, "groups": 4}, 8),
    ({"kernel_size": 3, "padding": 2, "dilation": 2}, 7),
    ({"kernel_size": 3, "padding": "same", "dilation": 2}, 6),
    ({"kernel_size": (1, 3), "padding": "same"}, 5),
    ({"kernel_size": 3, "padding": "valid", "stride": 2}, 8),
    ({"kernel_size": 1}, 1),
]


@pytest.mark.parametrize(("arguments", "size"), CONVOLUTIONS)
def test_convolutions_have_norm_1(arguments, size):
    torch.manual_seed(1)
    conv = nn.Conv2d(4, 8, **arguments).eval()
    x = images(size, 4)
    network, report = convert(nn.Sequential(conv), x)
    assert [entry.by for entry in report.replaced] == ["SpectralNormConv2d"]
    assert torch.equal(network[0].weight, conv.weight)
    assert (network[0].bias is None) == (conv.bias is None)
    sigma = network[0].spectral_norm()
    expected = (conv(x) - (0 if conv.bias is None else conv.bias.view(-1, 1, 1))) / sigma
    if conv.bias is not None:
        expected += conv.bias.view(-1, 1, 1)
    torch.testing.assert_close(network(x), expected)
    assert operator_norm(network[0], (4, size, size)) == pytest.approx(1, abs=1e-3)


def operator_norm(layer: nn.Module, shape: tuple[int, ...]) -> float:
    """In float64, of a layer in eval mode without its bias."""
    layer = copy.deepcopy(layer).double().eval()
    layer.bias = None
    return torch.linalg.matrix_norm(dense_matrix(layer, shape), ord=2).item()


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
    torch.manual_seed(0)
    model = torchvision.models.mobilenet_v3_small(num_classes=10, width_mult=0.25)
    network, _ = convert(model, images(16))
    convolutions = [module for module in network.modules() if isinstance(module, SpectralNormConv2d)]
    linears = [module for module in network.modules() if isinstance(module, nn.Linear)]
    assert (len(convolutions), len(linears)) == (52, 2)
    for conv in convolutions:
        assert operator_norm(conv, conv.v.shape[1:]) <= 1 + 1e-3
    for linear in linears:
        assert operator_norm(linear, (linear.in_features,)) <= 1 + 1e-3


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
    model = model.double()
    for norm in (model[1], model[3]):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    x = images(dtype=torch.float64)
    network, _ = convert(model, x)
    network.eval()
    for start in (0, 2):
        for i in (start, start + 1):
            network[i].eps = model[i].eps = 0.0
        network[start + 1].log_gamma.data.fill_(math.log(1e6))
    torch.testing.assert_close(network(x), model.eval()(x))
    # plain statistics behind a normalized convolution are rescaled as well
    plain, _ = convert(model, x, batchnorms=False)
    torch.testing.assert_close(plain.eval()(x), model(x))
    # with the clip active, the layer is Lipschitz by gamma
    network[1].log_gamma.data.fill_(math.log(gamma))
    offset = network[1](torch.zeros(1, 5, 2, 2, dtype=torch.float64))
    norm = torch.linalg.matrix_norm(dense_matrix(lambda z: network[1](z) - offset, (5, 2, 2)), ord=2).item()
    own = (network[1].weight.abs() / network[1].running_var.sqrt()).max().item()
    assert norm == pytest.approx(min(own, gamma))


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
        self.conv = nn.Conv2d(3, 4, 3)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        x = self.conv(x)
        self.act(x)
        y = x - 0.3
        y.relu_()
        z = y - 0.1
        F.relu(z, inplace=True)
        return (x + y + z).mean(dim=(2, 3))


class InPlaceModule(nn.Module):
    """The same, by a module alone."""

    def __init__(self):
        super().__init__()
        self.conv, self.act = nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True)

    def forward(self, x):
        x = self.conv(x)
        self.act(x)
        return x.mean(dim=(2, 3))


@pytest.mark.parametrize(
    ("kind", "num_activations"), [(Shared, 4), (partial(Shared, inplace=True), 4), (InPlace, 3), (InPlaceModule, 1)]
)
def test_sharp_activations_alone_leave_a_relu_network_as_it_was(kind, num_activations):
    torch.manual_seed(0)
    model = kind().double().eval()
    x = images(dtype=torch.float64)
    network, report = convert(model, x, **ONLY_ACTIVATIONS)
    make_sharp(network)
    torch.testing.assert_close(network(x), model(x), rtol=0, atol=1e-6)
    assert len(betas(network)) == len(report.replaced) == num_activations
    assert {entry.by for entry in report.replaced} == {"CenteredSoftplus"}
    assert_nothing_left_unreported(network, report, x)


def test_every_call_has_its_own_beta():
    torch.manual_seed(0)
    network, report = convert(Shared())
    assert [entry.name for entry in report.replaced] == [
        *("conv1", "relu", "conv2", "relu_1", "relu_2", "relu_3", "head")
    ]
    assert [entry.kind for entry in report.replaced if "relu" in entry.name] == ["ReLU", "ReLU", "relu()", "ReLU"]
    network(images()).sum().backward()
    gradients = [module.log_beta.grad.item() for module in betas(network)]
    assert len(set(gradients)) == 4
    assert 0 not in gradients


def test_resnet_blocks_have_two_betas_each_and_stay_what_they_are():
    network, report = convert(outside("resnet18"), images(32))
    assert len(betas(network)) == 17  # the stem's and two for each of 8 blocks
    assert type(network) is torchvision.models.ResNet
    block = network.layer2[0]
    assert isinstance(block, torchvision.models.resnet.BasicBlock)
    assert block.stride == 2
    assert [entry.name for entry in report.replaced if entry.name.startswith("layer2.0.")] == [
        f"layer2.0.{name}"
        for name in ("conv1", "bn1", "relu", "conv2", "bn2", "downsample.0", "downsample.1", "relu_1")
    ]
    assert not report.left


def test_one_activation_at_several_places_of_the_tree():
    act = nn.SiLU()
    network, report = convert(nn.Sequential(nn.Conv2d(3, 3, 1), act, nn.Conv2d(3, 3, 1), act))
    assert len(betas(network)) == 2
    assert [entry.name for entry in report.replaced] == ["0", "1", "2", "3"]


def test_a_block_that_is_called_twice_has_one_beta_and_the_report_says_so():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.ReLU())

        def forward(self, x):
            return self.block(self.block(x))

    network, report = convert(Recurrent())
    assert len(betas(network)) == 1
    assert {entry.name: entry.note for entry in report.replaced} == {
        "block.0": "",
        "block.1": "called 2 times: one beta for all",
    }


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
    assert [entry.by for entry in report.replaced].count("Sigmoid") == 2
    assert isinstance(network.acts[12], nn.Softplus)
    x = images().requires_grad_()
    (gradient,) = torch.autograd.grad(network(x).sum(), x, create_graph=True)
    gradient.square().sum().backward()
    assert x.grad.isfinite().all()


# forwards that cannot be rewritten


class DataDependent(Shared):
    def forward(self, x):
        return super().forward(x if x.mean() > 0 else -x)


class DropsByFunction(Shared):
    def forward(self, x):
        return super().forward(F.dropout(x, 0.5, self.training))


class MakesTensors(Shared):
    def forward(self, x):
        return super().forward(x * torch.tensor([[[1.0]], [[2.0]], [[3.0]]]))


class ComputedSlope(Shared):
    def forward(self, x):
        return super().forward(F.leaky_relu(x, x.shape[0]))


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (DataDependent, "control flow"),
        (DropsByFunction, "training mode"),
        (MakesTensors, "tensors of its own"),
        (ComputedSlope, "parameters are computed"),
    ],
)
def test_a_forward_that_cannot_be_rewritten_is_left_and_reported(kind, reason):
    network, report = convert(kind())
    assert type(network) is kind
    assert len(betas(network)) == 1
    (shared,) = (entry for entry in report.replaced if entry.kind == "ReLU")
    assert shared.note.startswith("called 3 times: one beta for all")
    assert reason in shared.note
    assert reason in reasons(report)["relu"]
    assert {"conv1", "conv2", "head"} <= {entry.name for entry in report.replaced}
    assert_nothing_left_unreported(network, report, images())
    if kind is DropsByFunction:  # and in training it still does
        assert not torch.equal(network.train()(images()), network(images()))


def test_an_in_place_activation_whose_effect_cannot_be_traced_stays():
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
    assert all("changes" in entry.reason for entry in report.left)


@pytest.mark.parametrize("training", [True, False])
def test_dropout_and_stochastic_depth_follow_the_mode_afterwards(training):
    class Dropping(Shared):
        def __init__(self):
            super().__init__()
            self.depth = nn.Sequential(StochasticDepth(0.5, "row"), nn.Dropout(0.2))

        def forward(self, x):
            return super().forward(self.depth(x) + F.relu(x))

    network, report = convert(Dropping().train(training), images(n=16))
    assert not report.left
    assert all(module.training == training for module in network.modules())
    x = images(n=16)
    for _ in range(2):
        assert torch.equal(network.eval()(x), network(x))
        u = network.conv1.u.clone()
        assert not torch.equal(network.train()(x), network(x))
        assert not torch.equal(network.conv1.u, u)


# what is left


class Exceptions(nn.Module):
    """One of everything that has no low-curvature version."""

    def __init__(self):
        super().__init__()

        class OwnConv(nn.Conv2d):
            def forward(self, x):
                return super().forward(x) + 1

        self.own = OwnConv(3, 4, 1)
        self.reflect = nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")
        self.even = nn.Conv2d(4, 4, 4, padding="same")
        self.parametrized = spectral_norm(nn.Conv2d(4, 4, 1))
        self.weight_normed = weight_norm(nn.Linear(4, 4))
        self.hooked = nn.Conv2d(4, 4, 1)
        self.hook_calls = []
        self.hooked.register_forward_hook(lambda *_: self.hook_calls.append(1))
        self.hooked_relu = nn.ReLU()
        self.hooked_relu.register_forward_hook(lambda module, args, output: output * 2)
        self.two_sizes = nn.Conv2d(4, 4, 1)
        self.one_size = nn.Conv2d(4, 4, 1)
        self.tied1, self.tied2 = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.tied2.weight = self.tied1.weight
        self.zero = nn.Conv2d(4, 4, 1)
        nn.init.zeros_(self.zero.weight)
        self.up = nn.ConvTranspose2d(4, 4, 1)
        self.aux = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), nn.LayerNorm(4))
        self.norms = nn.Sequential(nn.BatchNorm2d(4, track_running_stats=False), nn.GroupNorm(2, 4))
        self.norms.append(nn.InstanceNorm2d(4))
        self.prelu = nn.PReLU()
        self.conv1d = nn.Sequential(nn.Conv1d(4, 4, 1), nn.BatchNorm1d(4), nn.Softmax(dim=-1))
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.gate = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Sigmoid())
        self.kernel = nn.Parameter(torch.randn(4, 4, 1, 1))

    def forward(self, x):
        x = self.hooked_relu(self.hooked(self.parametrized(self.even(self.reflect(self.own(x))))))
        x = self.two_sizes(x) + self.one_size(self.one_size(x)) + self.two_sizes(x[:, :, 1:]).mean()
        x = self.up(self.zero(self.tied2(self.tied1(x)))) + x
        x = self.prelu(self.norms(x))
        x = x * self.gate(x)
        x = F.conv2d(x, self.kernel).clamp(min=-1)
        x = self.conv1d(x.flatten(2)).transpose(1, 2)
        x, _ = self.attention(x, x, x)
        return self.weight_normed(x).mean(dim=1)


def test_what_is_left_is_in_the_report_in_order_and_with_its_reason():
    torch.manual_seed(0)
    model = Exceptions()
    network, report = convert(model)
    expected = {
        "own": "OwnConv has a forward of its own",
        "reflect": "pads with 'reflect'",
        "even": "not the same at both ends",
        "parametrized": "parametrized already",
        "hooked": "has hooks",
        "hooked_relu": "has hooks",
        "two_sizes": "several sizes",
        "tied1": "shares its weights",
        "tied2": "shares its weights",
        "zero": "its weight is zero",
        "up": "linear map without",
        "norms.0": "no running statistics",
        "norms.1": "statistics",
        "norms.2": "statistics",
        "prelu": "its slope is trained",
        "mul": "product of tensors",
        "conv2d": "linear map without",
        "clamp": "not smooth",
        "conv1d.0": "linear map without",
        "conv1d.1": "only BatchNorm2d",
        "conv1d.2": "not an activation",
        "attention": "attention",
        "weight_normed": "parametrized already",
        "aux.0": "not called",
        "aux.1": "not called",
        "aux.2": "input's own statistics",
    }
    found = reasons(report)
    assert list(found) == list(expected)
    for name, reason in expected.items():
        assert reason in found[name], name
    assert [entry.name for entry in report.replaced] == ["one_size", "gate.0"]
    assert_nothing_left_unreported(network, report, images())
    text = str(report)
    assert "replaced 2\n     2 Conv2d -> SpectralNormConv2d\n" in text
    assert f"left {len(expected)}\n" in text
    assert "has hooks (hooked)" in text
    assert max(map(len, text.splitlines())) < 200
    model.hook_calls.clear()
    network(images())
    assert model.hook_calls == [1]  # the hook works still: it is the model's own function


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
    assert f"{part}=False" in {entry.reason for entry in report.left}
    assert_nothing_left_unreported(network, report, x)
    nothing, report = convert(model, x, **dict.fromkeys(PARTS, False))
    assert not report.replaced
    assert torch.equal(nothing.eval()(x), model.eval()(x))


def test_low_curvature_networks_are_left_alone():
    torch.manual_seed(0)
    model = model_architecture["resnet18lcnn"](10)
    _, report = convert(model, images(32))
    assert report == ConversionReport((), ())
    again, report = convert(convert(Shared())[0])
    assert report == ConversionReport((), ())
    assert len(betas(again)) == 4


# the network as a whole


def test_the_original_is_not_touched():
    model = nn.Sequential(Shared(inplace=True), nn.BatchNorm1d(10), nn.Linear(10, 3)).train()
    model[1].eval()
    model[0].conv2.weight.requires_grad_(False)
    hook = model[0].register_forward_hook(lambda *_: None)
    state, modes = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    x = images()
    pixels, random_state = x.clone(), torch.get_rng_state()
    network, _ = convert(model, x)
    assert torch.equal(random_state, torch.get_rng_state())
    assert torch.equal(pixels, x)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert list(model[0]._forward_hooks) == [hook.id]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model[0].children())
    assert type(model[0]) is Shared
    assert model[0].relu.inplace
    # carried over
    assert not network[1].training
    assert network[2].training
    assert network[0].relu_1.training
    assert list(network[0]._forward_hooks) == [hook.id]
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

    def fresh(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return Auxiliary()

    first, _ = convert(fresh(0))
    optimizer = torch.optim.SGD(first.parameters(), lr=0.1)
    first.train()(images()).square().sum().backward()
    optimizer.step()
    second, _ = convert(fresh(1))
    second.load_state_dict(first.state_dict())
    copied = copy.deepcopy(first)
    for network in (second, copied):
        assert torch.equal(network.eval()(images()), first.eval()(images()))
    names = {name.replace("parametrizations.weight.original", "weight") for name in first.state_dict()}
    assert set(fresh(0).state_dict()) <= names
    # the same seed, the same numbers
    torch.manual_seed(5)
    third, _ = convert(fresh(0))
    torch.manual_seed(5)
    fourth, _ = convert(fresh(0))
    assert all(
        torch.equal(a, b) for a, b in zip(third.state_dict().values(), fourth.state_dict().values(), strict=True)
    )


def test_float64_and_layers_alone():
    network, _ = convert(Shared().double(), images(dtype=torch.float64))
    assert {p.dtype for p in network.state_dict().values()} == {torch.float64}
    for layer in (nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Linear(8, 4)):
        network, report = convert(layer.double(), images(dtype=torch.float64))
        assert [entry.name for entry in report.replaced] == [""]
        assert network(images(dtype=torch.float64)).dtype == torch.float64


def test_a_graph_module_is_converted_like_what_it_was_traced_from():
    torch.manual_seed(0)
    model = Shared()
    network, report = convert(fx.symbolic_trace(model))
    expected, _ = convert(model)
    assert len(report.replaced) == 7
    x = images()
    for converted in (network, copy.deepcopy(network)):
        torch.testing.assert_close(converted.eval()(x), expected.eval()(x), rtol=1e-3, atol=1e-4)


# BatchNorm in training on few images whose last maps are of one pixel has gradients of 1e9: more images there
def test_our_own_standard_network_becomes_low_curvature():
    network, _ = convert(model_architecture["vgg11"](4, 16), torch.rand(2, 3, 16, 16))
    for kind in (CenteredSoftplus, SpectralNormConv2d, LipschitzBatchNorm2d):
        assert sum(isinstance(module, kind) for module in network.modules()) == 10


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
    assert_nothing_left_unreported(network, report, x[:2])
    assert {entry.by for entry in report.replaced} >= {"SpectralNormConv2d", "CenteredSoftplus"}
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
