"""The layer table against sums by hand and against the networks' true derivatives."""

import math
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from curvature.estimate import estimate_curvature
from curvature.pictures import plot_layers
from models.bound import LayerRow, LayerTable, format_layers, layer_table, log_curvature_bound
from models.layers import LCNN, CenteredSoftplus, LipschitzBatchNorm2d, SpectralNormConv2d
from models.model_selector import model_architecture
from models.resnet import ResNet


def of_type(model: nn.Module, layer_type: type) -> Iterator[nn.Module]:
    return (module for module in model.modules() if isinstance(module, layer_type))


def build(name: str, input_size: int | None = None) -> nn.Module:
    """An architecture, or "small": a stem, a block with an identity as its shortcut and three with a convolution."""
    torch.manual_seed(0)
    if name == "small":
        return ResNet(LCNN, (1, 1, 1, 1), 10, input_size or 8)
    return model_architecture[name](10, input_size or 16)


def set_all(model: nn.Module, beta: float, gamma: float, variance: float) -> None:
    for activation in of_type(model, CenteredSoftplus):
        activation.log_beta.data.fill_(math.log(beta))
    for norm in of_type(model, LipschitzBatchNorm2d):
        norm.log_gamma.data.fill_(math.log(gamma))
        norm.running_var.fill_(variance - norm.eps)


def test_closed_form_of_a_vgg_with_equal_layers():
    model = build("vgg11lcnn")
    set_all(model, beta=3.0, gamma=2.0, variance=0.04)
    with torch.no_grad():
        model.classifier.weight.copy_(7 * torch.eye(10, 512))  # of norm 7
    dimensions = [64 * 256] * 2 + [128 * 64] * 2 + [256 * 16] * 2 + [512 * 4] * 2 + [512] * 2
    expected = 3.001 * sum(n * 2**i for i, n in enumerate(dimensions, start=1)) + 2 * 7 * 2**10
    table = layer_table(model)
    assert table.bound == pytest.approx(expected, rel=1e-5)
    assert table.rows[-1].lipschitz == pytest.approx(math.sqrt(2) * 7 * 2**10, rel=1e-5)


def test_every_number_of_a_small_resnet_by_hand():
    model = build("small")
    root = math.sqrt(2)
    # each block: the larger path's constant over sqrt 2; first the identity's, then the shortcut's, then the branch's
    ends = [0.5]
    for path in (1, 4.5, 6.5 * 8.5, 10 * 12):
        ends.append(ends[-1] * path / root)
    # row, what feeds its activation, the BatchNorm's constant, the constant from the input on, dimension
    expected = [
        ("activation", "stem", 0.5, ends[0], 64 * 64),
        ("stages.0.0.activation1", "stages.0.0.conv1", 2, ends[0] * 2 / root, 64 * 64),
        ("stages.0.0.activation2", "stages.0.0.conv2", 0.25, ends[1], 64 * 64),
        ("stages.1.0.activation1", "stages.1.0.conv1", 4, ends[1] * 4 / root, 128 * 16),
        ("stages.1.0.shortcut", "stages.1.0.shortcut", 4.5, ends[1] * 4.5 / root, 128 * 16),
        ("stages.1.0.activation2", "stages.1.0.conv2", 0.5, ends[2], 128 * 16),
        ("stages.2.0.activation1", "stages.2.0.conv1", 6.5, ends[2] * 6.5 / root, 256 * 4),
        ("stages.2.0.shortcut", "stages.2.0.shortcut", 8, ends[2] * 8 / root, 256 * 4),
        ("stages.2.0.activation2", "stages.2.0.conv2", 8.5, ends[3], 256 * 4),
        ("stages.3.0.activation1", "stages.3.0.conv1", 10, ends[3] * 10 / root, 512),
        ("stages.3.0.shortcut", "stages.3.0.shortcut", 10.5, ends[3] * 10.5 / root, 512),
        ("stages.3.0.activation2", "stages.3.0.conv2", 12, ends[4], 512),
    ]
    for i, (name, feeding, constant, _, _) in enumerate(expected, start=1):
        conv, norm = model.get_submodule(feeding)
        # i times the identity; of norm i also where a stride skips pixels
        nn.init.dirac_(conv.weight).data.mul_(i)
        conv.power_iteration(10)
        norm.running_var.fill_(1.0)
        norm.running_var[1] = 1 / i**2 - norm.eps  # the smallest: i is the BatchNorm's own constant
        norm.log_gamma.data.fill_(math.log(i + 0.5 if constant == i else constant))
        if "shortcut" not in name:
            model.get_submodule(name).log_beta.data.fill_(math.log(10 * i))

    table = layer_table(model)
    assert [row.name for row in table.rows] == [name for name, *_ in expected] + ["classifier", "cross-entropy"]
    for i, (row, (name, _, constant, lipschitz, n)) in enumerate(zip(table.rows, expected, strict=False), start=1):
        assert (row.clip < 1) == (constant < i)
        assert row.gamma == pytest.approx(constant if (row.clip < 1) else i + 0.5)
        assert row.spectral_norm == pytest.approx(i)
        assert row.clip == pytest.approx(constant / i)
        assert row.norm_lipschitz == pytest.approx(constant, rel=1e-5)  # the variance is kept in float32
        assert row.lipschitz == pytest.approx(lipschitz, rel=1e-5)
        assert row.n == n
        if "shortcut" in name:
            assert row.beta is None
            assert row.term is None
        else:
            assert row.beta == pytest.approx(10 * i)
            assert row.term == pytest.approx(n * (10 * i + 1e-3) * lipschitz, rel=1e-5)
    classifier, cross_entropy = table.rows[-2:]
    assert classifier == LayerRow("classifier", classifier.lipschitz, n=10)
    assert cross_entropy.lipschitz == pytest.approx(classifier.lipschitz * root)
    assert table.bound == pytest.approx(sum(row.term or 0 for row in table.rows))


@pytest.mark.parametrize("name", ["small", "vgg11lcnn"])
def test_the_log_bound_is_that_of_the_table_where_every_batchnorm_is_clipped(name):
    model = build(name)
    generator = torch.Generator().manual_seed(2)
    for norm in of_type(model, LipschitzBatchNorm2d):
        norm.running_var.fill_(1e-4)  # a constant of 100 by itself: each gamma counts
        norm.log_gamma.data.uniform_(-1, 2, generator=generator)
    for activation in of_type(model, CenteredSoftplus):
        activation.log_beta.data.uniform_(-2, 3, generator=generator)
    model.double().eval()
    with torch.no_grad():  # a classifier of norm 1
        if name == "vgg11lcnn":
            model.classifier.weight.copy_(torch.eye(*model.classifier.weight.shape))
        else:
            original = model.classifier.parametrizations.weight.original
            original.copy_(torch.linalg.qr(original.T)[0].T)
            model.train()
            model.classifier.weight  # noqa: B018  a power iteration
            model.eval()
    log_bound = log_curvature_bound(model)
    assert log_bound.item() == pytest.approx(math.log(layer_table(model).bound), rel=1e-9)

    log_bound.backward()
    for parameter in (p for name, p in model.named_parameters() if name.endswith(("log_gamma", "log_beta"))):
        values = []
        for sign in (1, -1):
            parameter.data += sign * 1e-6
            values.append(log_curvature_bound(model).item())
            parameter.data -= sign * 1e-6
        assert (values[0] - values[1]) / 2e-6 == pytest.approx(parameter.grad.item(), abs=1e-8)


def test_the_log_bound_does_not_overflow():
    model = build("resnet34lcnn")
    for norm in of_type(model, LipschitzBatchNorm2d):
        norm.log_gamma.data.fill_(10.0)  # a bound of e^340, in float32
    assert log_curvature_bound(model).item() == pytest.approx(340, abs=30)


# mild layers, for the bound is the tighter the smaller beta and gamma are
@pytest.mark.parametrize(("beta", "gamma"), [(5.0, 10.0), (0.01, 0.8)])
def test_the_measured_curvature_stays_below_the_bound(beta, gamma):
    model = build("small")
    set_all(model, beta, gamma, variance=0.04)
    images = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    estimate = estimate_curvature(model, images, torch.tensor([0, 3, 5, 9]), num_iterations=40)
    assert (estimate.curvature > 0).all()
    assert estimate.curvature.max().item() <= layer_table(model).bound


@pytest.mark.parametrize("name", ["small", "vgg11lcnn"])
def test_lipschitz_constants_are_reached_where_the_network_is_linear(name):
    """Random directions stay far below the constants; here no smaller ones would do, up to the logits."""
    outputs = {}
    model = build(name, 16)
    set_all(model, beta=50.0, gamma=2.0, variance=0.04)
    for conv in of_type(model, SpectralNormConv2d):
        nn.init.dirac_(conv.weight)
        conv.power_iteration(10)
    for norm in of_type(model, LipschitzBatchNorm2d):
        norm.running_mean.fill_(-100.0)  # every unit is far on the activation's positive side, with slope 1
    if name == "small":  # the paths of a block agree: 2 * 0.5 and the identity's 1, 2 * 2 and the convolution's 4
        model.stages[0][0].conv2.norm.log_gamma.data.fill_(math.log(0.5))
        for stage in model.stages[1:]:
            stage[0].shortcut.norm.log_gamma.data.fill_(math.log(4))
    with torch.no_grad():
        weight = model.classifier.parametrizations.weight.original if name == "small" else model.classifier.weight
        weight.copy_(torch.eye(*weight.shape))
    model.double().eval()
    # the pixels that every stride keeps, and every pooling since they are the largest
    x = torch.zeros(1, 3, 16, 16, dtype=torch.float64)
    step = 8 if name == "small" else 16
    x[:, :, ::step, ::step] = 1
    rows = layer_table(model).rows[:-1]
    for row in rows:
        model.get_submodule(row.name).register_forward_hook(
            lambda module, inputs, output, name=row.name: outputs.update({name: output})
        )

    def every_output(x):
        model(x)
        return outputs

    _, derivatives = torch.func.jvp(every_output, (x,), (x / x.norm(),))
    for row in rows:
        assert derivatives[row.name].norm().item() == pytest.approx(row.lipschitz, rel=1e-5), row.name
        assert derivatives[row.name].numel() == row.n


def test_the_classifiers_norm_is_that_of_the_weight_in_use():
    model = build("small").eval()
    with torch.no_grad():  # the power iteration lags behind, as after a large step
        model.classifier.parametrizations.weight.original.add_(torch.randn(10, 512))
    norm = torch.linalg.svdvals(model.classifier.weight.detach())[0].item()
    assert abs(norm - 1) > 0.01
    *_, last, classifier, _ = layer_table(model).rows
    assert classifier.lipschitz == pytest.approx(last.lipschitz * norm, rel=1e-5)


@pytest.mark.parametrize(("name", "activations", "shortcuts"), [("resnet34lcnn", 33, 3), ("vgg11lcnn", 10, 0)])
def test_rows_follow_the_network_and_leave_it_alone(name, activations, shortcuts):
    model = build(name).train()
    next(of_type(model, SpectralNormConv2d)).eval()  # mixed modes
    modes = [module.training for module in model.modules()]
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    table = layer_table(model)
    assert len(table.rows) == activations + shortcuts + 2
    assert [row.name for row in table.rows if row.beta is not None] == [
        name for name, module in model.named_modules() if isinstance(module, CenteredSoftplus)
    ]
    assert [module.training for module in model.modules()] == modes
    after = model.state_dict()
    assert all(torch.equal(tensor, after[key]) for key, tensor in before.items())
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert table == layer_table(model.eval())  # what training mode would read is not what is reported
    text = format_layers(table)
    assert len(text.splitlines()) == len(table.rows) + 3
    assert max(map(len, text.splitlines())) <= 110
    assert math.isfinite(table.bound)


def test_refuses_other_networks():
    with pytest.raises(ValueError, match="not a low-curvature network"):
        layer_table(build("resnet18"))
    with pytest.raises(ValueError, match="Sequential"):
        log_curvature_bound(nn.Sequential(SpectralNormConv2d(3, 4, 3), LipschitzBatchNorm2d(4), CenteredSoftplus()))


def test_format():
    norm = {"gamma": 2.0, "spectral_norm": 3.25, "norm_lipschitz": 2.0}
    rows = (
        LayerRow("activation", 2.0, **norm, clip=0.4, beta=5.0, n=100, term=1000.2),
        LayerRow("shortcut", 1e9, **norm, clip=1.0, n=100),
        LayerRow("cross-entropy", 3.0, n=1, term=4.24),
    )
    table = LayerTable(rows)
    header, *lines, legend, bound = format_layers(table, 4.5612).splitlines()
    assert header.split() == ["layer", "beta", "gamma", "conv", "norm", "clip", "Lip", "BN", "Lip", "n", "term"]
    assert lines[0].split() == ["activation", "5", "2", "3.25", "0.4", "2", "2", "100", "1e+03"]
    assert lines[1].split() == ["shortcut", "-", "2", "3.25", "off", "2", "1e+09", "100", "-"]
    assert lines[2].split() == ["cross-entropy", "-", "-", "-", "-", "-", "3", "1", "4.24"]
    assert {len(line) for line in lines} == {len(header)}
    assert all(word in legend for word in ("Lip BN", "Lip:", "term"))
    assert bound == "sum of the terms, the bound: 1e+03; largest curvature measured 4.56"
    assert format_layers(table, None).splitlines()[-1] == "sum of the terms, the bound: 1e+03"


@pytest.mark.draws
def test_plot(tmp_path):
    tables = [(name, layer_table(build(name))) for name in ("small", "vgg11lcnn")]
    plot_layers(tmp_path / "layers.png", tables)
    content = (tmp_path / "layers.png").read_bytes()
    assert content.startswith(b"\x89PNG")
    assert [int.from_bytes(content[i : i + 4], "big") for i in (16, 20)] == [1080, 432 * 2]
