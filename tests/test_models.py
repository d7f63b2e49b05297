"""The architectures: shapes, the block's formula, and what a forward must not do."""

import math

import pytest
import torch
from conftest import TwoBlocks
from torch import nn

from models import layers as kinds
from models.layers import LCNN, STANDARD, SpectralNormConv2d
from models.model_selector import model_architecture
from models.resnet import ResidualBlock

PLAIN = (kinds.Conv2d, kinds.BatchNorm2d, nn.Softplus)


@pytest.mark.parametrize(
    ("name", "size", "convolutions", "activations"),
    [("resnet18", 21, 20, 17), ("resnet34", 32, 36, 33), ("vgg11", 48, 10, 10)],
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
def test_layers_and_shapes(name, size, convolutions, activations, suffix, types, beta):
    """On the meta device there are no numbers: float(), .item() or a branch on a tensor raises, where a GPU waits."""
    with torch.device("meta"):
        model = model_architecture[name + suffix](7, size)
        x = torch.rand(2, 3, size, size)
    modules = list(model.modules())
    counts = [sum(type(module) is kind for module in modules) for kind in types]
    assert counts == [convolutions, convolutions, activations]
    assert {module.beta for module in modules if isinstance(module, nn.Softplus)} == ({beta} if beta else set())
    assert all(module.weight is None for module in modules if isinstance(module, nn.BatchNorm2d))
    seen = []

    def check(conv, inputs, output):
        assert conv.v.shape[1:] == inputs[0].shape[1:]
        assert conv.u.shape[1:] == output.shape[1:]
        seen.append(conv)

    for module in modules:
        if isinstance(module, SpectralNormConv2d):
            module.register_forward_hook(check)
    for training in (True, False):
        assert model.train(training)(x).shape == (2, 7)
    assert len(seen) == (2 * convolutions if suffix == "lcnn" else 0)


def test_input_sizes():
    with torch.device("meta"):
        for suffix in ("", "lcnn"):
            assert model_architecture[f"vgg11{suffix}"](10)(torch.rand(2, 3, 32, 32)).shape == (2, 10)
    with pytest.raises(ValueError, match="multiple of 16"):
        model_architecture["vgg11"](10, input_size=40)


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


@pytest.mark.parametrize("build", [TwoBlocks, model_architecture["vgg11lcnn"]])
def test_a_fresh_model_loads_a_trained_ones_state(thin_vgg, build):
    trained, fresh = (build(10, 16) for _ in range(2))
    x = torch.rand(4, 3, 16, 16)
    trained.train()(x)  # moves the statistics and the spectral norms' vectors
    fresh.load_state_dict(trained.state_dict())
    for _ in range(2):  # in eval mode nothing moves
        assert torch.equal(fresh.eval()(x), trained.eval()(x))
    assert all(map(torch.equal, fresh.state_dict().values(), trained.state_dict().values()))
