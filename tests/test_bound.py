"""The layer table against numbers by hand and against what the networks do to their input."""

import math
from collections.abc import Iterator

import pytest
import torch
from conftest import TwoBlocks
from torch import nn

from curvature.pictures import plot_layers
from models.bound import LayerRow, LayerTable, format_layers, layer_table, log_curvature_bound
from models.layers import CenteredSoftplus, LipschitzBatchNorm2d, SpectralNormConv2d
from models.model_selector import model_architecture

pytestmark = pytest.mark.usefixtures("thin_vgg")
VGG = model_architecture["vgg11lcnn"]
both = pytest.mark.parametrize("architecture", [TwoBlocks, VGG])


def of_type(model: nn.Module, layer_type: type) -> Iterator[nn.Module]:
    return (module for module in model.modules() if isinstance(module, layer_type))


def build(architecture) -> nn.Module:
    """For 16 x 16 pixels, with a classifier of norm 1: the identity."""
    torch.manual_seed(0)
    model = architecture(10, 16)
    model.classifier = nn.Linear(model.classifier.in_features, 10)
    nn.init.eye_(model.classifier.weight)
    return model


# of the second block's two paths the shortcut has the larger constant, then the branch
@pytest.mark.parametrize(("last", "path"), [(0.5, 4.5), (6, 4 * 6)])
def test_every_number_of_a_small_resnet_by_hand(last, path):
    model = TwoBlocks(10, 8).double().eval()
    root, stem = math.sqrt(2), 0.5
    first = stem / root  # the identity's constant is the larger one
    # row, what feeds its activation, the BatchNorm's constant, the constant from the input on, dimension
    expected = [
        ("activation", "stem", 0.5, stem, 8 * 64),
        ("stages.0.0.activation1", "stages.0.0.conv1", 2, stem * 2 / root, 8 * 64),
        ("stages.0.0.activation2", "stages.0.0.conv2", 0.25, first, 8 * 64),
        ("stages.0.1.activation1", "stages.0.1.conv1", 4, first * 4 / root, 16 * 16),
        ("stages.0.1.shortcut", "stages.0.1.shortcut", 4.5, first * 4.5 / root, 16 * 16),
        ("stages.0.1.activation2", "stages.0.1.conv2", last, first * path / root, 16 * 16),
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
    # the classifier's power iteration lags behind, as after a large step
    model.classifier.parametrizations.weight.original.data.normal_()

    table = layer_table(model)
    assert [row.name for row in table.rows] == [name for name, *_ in expected] + ["classifier", "cross-entropy"]
    for i, (row, (name, _, constant, lipschitz, n)) in enumerate(zip(table.rows, expected, strict=False), start=1):
        gamma = constant if constant < i else i + 0.5
        found = (row.gamma, row.spectral_norm, row.clip, row.norm_lipschitz, row.lipschitz, row.n)
        assert found == pytest.approx((gamma, i, constant / i, constant, lipschitz, n))
        if "shortcut" in name:
            assert (row.beta, row.term) == (None, None)
        else:
            assert (row.beta, row.term) == pytest.approx((10 * i, n * (10 * i + 1e-3) * lipschitz))
    classifier, cross_entropy = table.rows[-2:]
    assert classifier == LayerRow("classifier", classifier.lipschitz, n=10)
    norm = torch.linalg.svdvals(model.classifier.weight.detach())[0].item()
    assert abs(norm - 1) > 0.01
    mean = 1 / math.sqrt(16)  # over the pixels of each channel
    assert classifier.lipschitz == pytest.approx(first * path / root * mean * norm)
    assert cross_entropy.lipschitz == pytest.approx(classifier.lipschitz * root)
    assert table.bound == pytest.approx(sum(row.term or 0 for row in table.rows))


@both
def test_the_log_bound_is_that_of_the_table_where_every_batchnorm_is_clipped(architecture):
    model = build(architecture).double().eval()
    for norm in of_type(model, LipschitzBatchNorm2d):
        norm.running_var.fill_(1e-4)  # a constant of 100 by itself: each gamma counts
        norm.log_gamma.data.uniform_(-1, 2)
    for activation in of_type(model, CenteredSoftplus):
        activation.log_beta.data.uniform_(-2, 3)
    log_bound = log_curvature_bound(model)
    assert log_bound.item() == pytest.approx(math.log(layer_table(model).bound), rel=1e-9)

    log_bound.backward()
    assert all(activation.log_beta.grad > 0 for activation in of_type(model, CenteredSoftplus))
    first = next(of_type(model, LipschitzBatchNorm2d))
    assert first.log_gamma.grad.item() == pytest.approx(1)  # a factor of every term

    for norm in of_type(model, LipschitzBatchNorm2d):
        norm.log_gamma.data.fill_(200.0)  # e^200 for each layer would overflow
    depth = 5 if architecture is TwoBlocks else 10
    assert log_curvature_bound(model).item() == pytest.approx(depth * 200, abs=30)


@both
def test_lipschitz_constants_are_reached_where_the_network_is_linear(architecture):
    """Random directions stay far below the constants; here no smaller ones would do, up to the logits."""
    outputs = {}
    model = build(architecture)
    for conv in of_type(model, SpectralNormConv2d):
        nn.init.dirac_(conv.weight)
        conv.power_iteration(10)
    for norm in of_type(model, LipschitzBatchNorm2d):
        norm.running_mean.fill_(-100.0)  # every unit is far on the activation's positive side, with slope 1
        norm.running_var.fill_(0.04)
        norm.log_gamma.data.fill_(math.log(2))
    if architecture is TwoBlocks:  # a block's paths agree: 2 * 0.5 and the identity's 1, 2 * 2 and the shortcut's 4
        model.stages[0][0].conv2.norm.log_gamma.data.fill_(math.log(0.5))
        model.stages[0][1].shortcut.norm.log_gamma.data.fill_(math.log(4))
    model.double().eval()
    # the pixels that every stride keeps, and every pooling since they are the largest
    x = torch.zeros(1, 3, 16, 16, dtype=torch.float64)
    step = 2 if architecture is TwoBlocks else 16
    x[:, :, ::step, ::step] = 1
    rows = layer_table(model).rows[:-1]
    for row in rows:
        model.get_submodule(row.name).register_forward_hook(
            lambda module, inputs, output, name=row.name: outputs.setdefault(name, []).append(output)
        )
    model(x)
    model(x + x / x.norm())
    for row in rows:
        before, after = outputs[row.name]
        assert (after - before).norm().item() == pytest.approx(row.lipschitz, rel=1e-5), row.name
        assert after.numel() == row.n


@both
def test_the_table_leaves_the_network_alone(architecture):
    model = architecture(10, 16).train()
    next(of_type(model, SpectralNormConv2d)).eval()  # mixed modes
    modes = [module.training for module in model.modules()]
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    table = layer_table(model)
    activations = [name for name, module in model.named_modules() if isinstance(module, CenteredSoftplus)]
    assert [row.name for row in table.rows if row.beta is not None] == activations
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert table == layer_table(model.eval())  # what training mode would read is not what is reported


def test_refuses_other_networks():
    with pytest.raises(ValueError, match="not a low-curvature network"):
        layer_table(model_architecture["vgg11"](10, 16))
    with pytest.raises(ValueError, match="Sequential"):
        log_curvature_bound(nn.Sequential(SpectralNormConv2d(3, 4, 3), LipschitzBatchNorm2d(4), CenteredSoftplus()))


@pytest.mark.draws
def test_as_text_and_as_a_picture(tmp_path):
    norm = {"gamma": 2.0, "spectral_norm": 3.25, "norm_lipschitz": 2.0}
    rows = (
        LayerRow("stages.3.2.activation1", 2.0, **norm, clip=0.4, beta=5.0, n=100, term=1000.2),
        LayerRow("shortcut", 1e9, **norm, clip=1.0, n=100),
        LayerRow("cross-entropy", 3.0, n=1, term=4.24),
    )
    table = LayerTable(rows)
    header, *lines, legend, bound = format_layers(table, 4.5612).splitlines()
    assert header.split() == ["layer", "beta", "gamma", "conv", "norm", "clip", "Lip", "BN", "Lip", "n", "term"]
    assert lines[0].split() == ["stages.3.2.activation1", "5", "2", "3.25", "0.4", "2", "2", "100", "1e+03"]
    assert lines[1].split() == ["shortcut", "-", "2", "3.25", "off", "2", "1e+09", "100", "-"]
    assert lines[2].split() == ["cross-entropy", "-", "-", "-", "-", "-", "3", "1", "4.24"]
    assert {len(line) for line in lines} == {len(header)}
    assert max(map(len, (header, legend))) <= 110
    assert all(word in legend for word in ("Lip BN", "Lip:", "term"))
    assert bound == "sum of the terms, the bound: 1e+03; largest curvature measured 4.56"
    assert format_layers(table, None).splitlines()[-1] == "sum of the terms, the bound: 1e+03"

    plot_layers(tmp_path / "layers.png", [("one", table), ("two", table)])
    content = (tmp_path / "layers.png").read_bytes()
    assert content.startswith(b"\x89PNG")
    assert [int.from_bytes(content[i : i + 4], "big") for i in (16, 20)] == [1080, 432 * 2]
