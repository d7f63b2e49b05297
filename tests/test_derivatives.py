"""Folded networks, and both ways to Hessian-vector products, against plain networks and dense Hessians in float64."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from curvature.derivatives import (
    DoubleBackwardHessian,
    FoldedHessian,
    cross_entropy,
    cross_entropy_gradient,
    cross_entropy_hessian_product,
    input_hessian,
)
from curvature.estimate import prepared
from curvature.folding import FoldedNetwork, fold
from models.layers import LCNN, STANDARD, CenteredSoftplus, LipschitzBatchNorm2d
from models.model_selector import model_architecture
from models.resnet import ResidualBlock, ResNet

pytestmark = pytest.mark.usefixtures("thin_vgg")
SMALL = {"resnet": partial(ResNet, STANDARD, (2, 1, 1, 1)), "resnetlcnn": partial(ResNet, LCNN, (2, 1, 1, 1))}


def size(arch: str) -> int:
    return 8 if arch in SMALL else 16


def lively(arch: str, input_size: int | None = None) -> nn.Module:
    """A network of ours whose every constant differs from its initial value, BatchNorm clips both active and not."""
    torch.manual_seed(0)
    model = (SMALL | model_architecture)[arch](5, input_size or size(arch)).double().eval()
    with torch.no_grad():
        for i, module in enumerate(model.modules()):
            if isinstance(module, nn.BatchNorm2d):
                module.running_var.uniform_(0.5, 1.5).mul_(1e-3 if arch.endswith("lcnn") else 1)
                module.running_mean.normal_(0, 0.02)
            if isinstance(module, LipschitzBatchNorm2d):
                module.log_gamma.fill_(4.0 if i % 2 else 2.0)  # s is about 0.02: clipped from gamma < 50 on
            if isinstance(module, CenteredSoftplus):
                module.log_beta.fill_(0.1 * i)
            if isinstance(module, nn.Conv2d) and module.bias is not None:
                module.bias.normal_(0, 0.1)
    return model


def examples(n: int, size: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(n, 3, size, size, dtype=torch.float64, generator=generator), torch.arange(n) % 5


@pytest.mark.parametrize("arch", [*SMALL, "vgg11", "vgg11lcnn", "vgg11lowbeta"])
def test_a_folded_network_is_the_network(arch):
    """Its function, its gradient and its Hessian-vector products, while examples drop out of the batch."""
    model = lively(arch)
    folded = fold(model)
    x, y = examples(5, size(arch))
    with torch.no_grad():
        torch.testing.assert_close(folded(x), model(x), rtol=1e-10, atol=1e-10)
    with prepared(model, use_folding=False) as plain:
        slow, fast = DoubleBackwardHessian(plain, x, y), FoldedHessian(folded, x, y)
        assert isinstance(input_hessian(folded, x, y), FoldedHessian)
        assert isinstance(input_hessian(plain, x, y), DoubleBackwardHessian)
    for name in ("logits", "loss", "gradient"):
        torch.testing.assert_close(getattr(fast, name), getattr(slow, name), rtol=1e-8, atol=1e-12)
    for keep in ([1, 0, 1, 1, 1], [0, 1, 0, 1], [1, 0]):  # examples drop out: one of five, two of four, one of two
        v = torch.randn(len(keep), *x.shape[1:], dtype=torch.float64)
        expected = slow.product(v)
        torch.testing.assert_close(fast.product(v), expected, rtol=1e-7, atol=1e-9 * expected.abs().max().item())
        for hessian in (slow, fast):
            hessian.restrict(torch.tensor(keep, dtype=torch.bool))
    v = torch.randn_like(x[:1])
    alone = FoldedHessian(folded, x[2:3], y[2:3]).product(v)  # 0 2 3 4, then 2 4, then 2
    torch.testing.assert_close(fast.product(v), alone, rtol=1e-7, atol=0)


def test_strides_that_do_not_divide_the_image():
    """7 x 7 images: behind the stride 2 a kernel reads the last row, at 8 x 8 it does not."""
    model = lively("resnetlcnn", input_size=7)
    x, y = examples(2, size=7)
    with prepared(model, use_folding=False) as plain:
        slow, fast = DoubleBackwardHessian(plain, x, y), FoldedHessian(fold(model), x, y)
    v = torch.randn_like(x)
    torch.testing.assert_close(fast.gradient, slow.gradient, rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(fast.product(v), slow.product(v), rtol=1e-7, atol=1e-10)


def test_the_products_are_the_dense_hessian():
    """Both against torch.autograd.functional.hessian of the unfolded network along 20 unit directions."""
    model = lively("vgg11lcnn")
    x, y = examples(1)
    directions = torch.randperm(x[0].numel(), generator=torch.Generator().manual_seed(0))[:20]
    with prepared(model, use_folding=False) as plain:

        def gradient_along(t):  # of the loss at x + t, t in the span of the directions
            moved = x.flatten(1).index_add(1, directions, t[None]).view_as(x)
            return F.cross_entropy(plain(moved), y)

        dense = torch.autograd.functional.hessian(gradient_along, torch.zeros(20, dtype=torch.float64))
        for hessian in (DoubleBackwardHessian(plain, x, y), FoldedHessian(fold(model), x, y)):
            units = torch.zeros(20, x[0].numel(), dtype=torch.float64)
            units[range(20), directions] = 1
            columns = torch.cat([hessian.product(unit.view_as(x)).flatten(1)[:, directions] for unit in units])
            torch.testing.assert_close(columns, dense, rtol=1e-7, atol=1e-9 * dense.abs().max().item())


def test_folding_leaves_the_network_alone_and_knows_its_limits():
    model = lively("resnetlcnn").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with prepared(model) as network:
        assert isinstance(network, FoldedNetwork)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert fold(nn.Sequential(nn.Conv2d(3, 4, 3))) is None
    hooked = lively("vgg11lcnn")
    handle = hooked.features[1].register_forward_hook(lambda module, inputs, output: 2 * output)
    assert fold(hooked) is None
    handle.remove()
    assert fold(hooked) is not None


class Tanh5(nn.Linear):
    def forward(self, x):
        return 5 * torch.tanh(super().forward(x))


class OtherBlock(ResidualBlock):
    def forward(self, x):
        return 2 * super().forward(x)


CHANGES = {
    "activation": ("vgg11lcnn", "features.1", nn.Tanh()),
    "affine BatchNorm": ("vgg11lowbeta", "features.0.norm", nn.BatchNorm2d(8)),
    "no statistics": ("vgg11lowbeta", "features.0.norm", nn.BatchNorm2d(8, affine=False, track_running_stats=False)),
    "dilation": ("vgg11", "features.0.conv", nn.Conv2d(3, 8, 3, padding=2, dilation=2)),
    "reflection": ("vgg11", "features.0.conv", nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect")),
    "classifier": ("vgg11", "classifier", Tanh5(64, 5)),
    "dropout": ("resnetlcnn", "classifier", nn.Sequential(nn.Dropout(), nn.Linear(512, 5))),
    "a layer more": ("resnetlcnn", "stages.0.2", nn.Dropout2d()),
    "pooling": ("vgg11", "features.2", nn.MaxPool2d(3, 2, 1)),
    "another block": ("resnet", "stages.0.0", OtherBlock(STANDARD, 64, 64, 1, 8)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_network_that_was_changed_is_not_folded(change):
    arch, path, module = CHANGES[change]
    model = lively(arch)
    assert fold(model) is not None
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module.double().eval())
    assert fold(model) is None


LOGITS = torch.tensor([[0.3, -1.2, 2.0], [30.0, -5.0, 0.0], [-40.0, 0.0, 3.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
LABELS = torch.tensor([1, 0, 0, 2])


def test_the_cross_entropys_own_derivatives():
    z = LOGITS.clone().requires_grad_()
    torch.testing.assert_close(cross_entropy(LOGITS, LABELS), F.cross_entropy(z, LABELS, reduction="none"))
    (gradient,) = torch.autograd.grad(F.cross_entropy(z, LABELS, reduction="sum"), z, create_graph=True)
    torch.testing.assert_close(cross_entropy_gradient(LOGITS, LABELS), gradient.detach(), rtol=1e-12, atol=1e-15)
    v = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    (product,) = torch.autograd.grad(gradient, z, v)
    torch.testing.assert_close(cross_entropy_hessian_product(LOGITS, v), product, rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize("margin", [5.0, 20.0, 60.0])
def test_a_confident_example_keeps_its_digits_in_float32(margin):
    """torch's float32 cross-entropy has no gradient at all from a margin of 17 on."""
    y, v = torch.tensor([0]), torch.tensor([[0.2, -0.7, 0.4]], dtype=torch.float64)
    others = torch.tensor([-margin, -margin - 1], dtype=torch.float64).exp()  # exp(z_j - z_0) for z = margin, 0, -1
    q = torch.cat([torch.ones(1), others]).double() / (1 + others.sum())
    centered = v[0] - v[0, 0]  # H v = (diag q - q q') v by hand, relative to the certain class
    z = torch.tensor([[margin, 0.0, -1.0]])
    for found, expected in (
        (cross_entropy(z, y), others.sum().log1p()),
        (cross_entropy_gradient(z, y), torch.stack([-q[1:].sum(), *q[1:]])),
        (cross_entropy_hessian_product(z, v.float()), q * (centered - (q * centered).sum())),
    ):
        torch.testing.assert_close(found[0].double(), expected, rtol=1e-5, atol=0)


def test_models_beyond_convolutions():
    """Fused attention has no second derivative: the plain one is taken. In-place layers and images stay harmless."""

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 5)

        def forward(self, x):
            x.sub_(0.5)
            tokens = x.flatten(2).transpose(1, 2)[:, None]
            attended = F.scaled_dot_product_attention(tokens, tokens, tokens)
            return self.linear(F.relu(attended.mean(dim=(1, 2)), inplace=True))

    model = Attention().double()
    x, y = examples(2, size=4)
    before = x.clone()
    hessian = DoubleBackwardHessian(model, x, y)
    assert torch.equal(x, before)
    assert not x.requires_grad
    v, step = torch.randn_like(x), 1e-5
    ahead, behind = (DoubleBackwardHessian(model, x + s * v, y).gradient for s in (step, -step))
    # central differences: an error of step^2, and of eps / step = 1e-11 from rounding
    torch.testing.assert_close(hessian.product(v), (ahead - behind) / (2 * step), rtol=1e-6, atol=1e-9)


def test_a_gradient_that_is_not_of_the_pixels_is_none():
    """A layer behind a detach that is in a plain list, so that nothing freezes it."""
    layers, model = [nn.Linear(48, 5).double()], nn.Identity()
    model.forward = lambda x: layers[0](x.detach().flatten(1))
    with pytest.raises(ValueError, match="carry no gradient; remove any no_grad or detach"):
        DoubleBackwardHessian(model, *examples(2, size=4))


@pytest.mark.parametrize("use_folding", [True, False])
def test_a_network_made_in_inference_mode_is_measured_as_any_other(use_folding):
    with torch.inference_mode():
        model = lively("resnetlcnn")
    x, y = examples(2, size=8)
    with prepared(model, use_folding) as network, prepared(lively("resnetlcnn"), use_folding) as expected:
        found, expected = (input_hessian(each, x, y).product(x) for each in (network, expected))
    assert torch.equal(found, expected)
