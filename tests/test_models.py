"""The architectures: shapes, the block's formula, and what a forward must not do."""

import math
from functools import partial

import pytest
import torch
from conftest import TwoBlocks
from torch import nn

from models import layers as kinds
from models.layers import LCNN, STANDARD, SpectralNormConv2d
from models.model_selector import model_architecture
from models.resnet import ResidualBlock, ResNet


def test_the_default_input_size_is_32(thin_vgg):
    model = model_architecture["vgg11lcnn"](10)
    assert model.classifier.in_features == 64 * 4
    assert model.features[0].conv.v.shape == (1, 3, 32, 32)
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 10)
    with pytest.raises(ValueError, match="multiple of 16"):
        model_architecture["vgg11"](10, input_size=40)


PLAIN = (kinds.Conv2d, kinds.BatchNorm2d, nn.Softplus)


@pytest.mark.parametrize(
    ("name", "convolutions", "activations"), [("resnet18", 20, 17), ("resnet34", 36, 33), ("vgg11", 10, 10)]
)
@pytest.mark.parametrize(
    ("suffix", "types", "beta"),
    [
        ("", PLAIN, 1000),
        ("lowbeta", PLAIN, 10),
        ("softplus", (*PLAIN[:2], kinds.CenteredSoftplus), None),
        ("lcnn", (SpectralNormConv2d, kinds.LipschitzBatchNorm2d, kinds.CenteredSoftplus), None),
    ],
)
def test_layer_counts_types_and_logits(name, convolutions, activations, suffix, types, beta):
    model = model_architecture[name + suffix](7, 16).eval()
    with torch.no_grad():
        assert model(torch.rand(2, 3, 16, 16)).shape == (2, 7)
    modules = list(model.modules())
    counts = [sum(type(module) is kind for module in modules) for kind in types]
    assert counts == [convolutions, convolutions, activations]
    assert {module.beta for module in modules if isinstance(module, nn.Softplus)} == ({beta} if beta else set())
    assert all(module.weight is None for module in modules if isinstance(module, nn.BatchNorm2d))


def test_spectral_norms_follow_the_true_input_sizes(thin_vgg):
    """A hook sees what each convolution is really given."""
    for build, size, count in (
        (partial(ResNet, LCNN, (1, 1, 1, 1)), 21, 12),
        (model_architecture["vgg11lcnn"], 48, 10),
    ):
        model, seen = build(10, input_size=size).eval(), []

        def check(conv, inputs, output, seen=seen):
            assert conv.v.shape[1:] == inputs[0].shape[1:]
            assert conv.u.shape[1:] == output.shape[1:]
            seen.append(conv)

        for module in model.modules():
            if isinstance(module, SpectralNormConv2d):
                module.register_forward_hook(check)
        model(torch.rand(1, 3, size, size))
        assert len(seen) == count


@pytest.mark.parametrize("layers", [STANDARD, LCNN])
@pytest.mark.parametrize(("channels", "stride"), [(4, 1), (8, 2)])
def test_block_is_sum_halves_of_branch_and_shortcut(layers, channels, stride):
    block = ResidualBlock(layers, 4, channels, stride, input_size=8).double().eval()
    x = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    halves = torch.cat([x, x], dim=1) / math.sqrt(2)  # the textbook reading: repeat, two halves, sum of halves over 2
    first, second = halves[:, :4], halves[:, 4:]
    branch = block.conv2(block.activation1(block.conv1(first)))
    expected = block.activation2((branch + block.shortcut(second)) / 2)
    torch.testing.assert_close(block(x), expected, rtol=1e-12, atol=1e-12)
    assert isinstance(block.shortcut, nn.Identity) == (stride == 1)


@pytest.mark.parametrize("name", ["resnet18", "resnet18lcnn", "vgg11lcnn"])
@pytest.mark.parametrize("training", [True, False])
def test_a_forward_reads_no_number_back_from_the_device(thin_vgg, name, training):
    """On the meta device there are no numbers: float(), .item() or a branch on a tensor raises."""
    model = model_architecture[name](10, 16).train(training).to("meta")
    assert model(torch.rand(2, 3, 16, 16, device="meta")).shape == (2, 10)


@pytest.mark.parametrize("build", [TwoBlocks, model_architecture["vgg11lcnn"]])
def test_a_fresh_model_loads_a_trained_ones_state(thin_vgg, build):
    trained, fresh = (build(10, 16) for _ in range(2))
    x = torch.rand(4, 3, 16, 16)
    trained.train()(x)  # moves the statistics and the spectral norms' vectors
    fresh.load_state_dict(trained.state_dict())
    assert torch.equal(fresh.eval()(x), trained.eval()(x))
    before = {name: value.clone() for name, value in fresh.state_dict().items()}
    fresh(x)
    assert all(torch.equal(before[name], value) for name, value in fresh.state_dict().items())


def test_the_resnets_last_layer_has_spectral_norm_one():
    model = model_architecture["resnet18"](10, 16).train()
    for _ in range(300):
        model.classifier(torch.rand(2, 512))
    assert torch.linalg.matrix_norm(model.eval().classifier.weight, ord=2).item() == pytest.approx(1, rel=1e-4)
