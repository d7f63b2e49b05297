"""Folded networks, and the parts of Hessian-vector products, against plain networks and closed forms in float64.

That double backward gives the dense Hessian is in test_curvature.py.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import TwoBlocks
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
from curvature.folding import fold
from models.layers import LCNN, CenteredSoftplus, LipschitzBatchNorm2d
from models.model_selector import model_architecture
from models.resnet import ResidualBlock, ResNet

pytestmark = pytest.mark.usefixtures("thin_vgg")


def thin_resnet(num_classes: int, input_size: int) -> ResNet:
    model = TwoBlocks(num_classes, input_size)
    model.__class__ = ResNet  # no network of another class is folded
    return model


def lively(arch: str, size: int) -> nn.Module:
    """A network of ours whose every constant differs from its initial value, BatchNorm clips both active and not."""
    torch.manual_seed(0)
    model = (model_architecture | {"resnetlcnn": thin_resnet})[arch](5, size).double()
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


def examples(n: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(n, 3, size, size, dtype=torch.float64, generator=generator), torch.arange(n) % 5


@pytest.mark.parametrize(
    ("arch", "size"), [("resnetlcnn", 7), ("resnetlcnn", 8), ("vgg11", 16), ("vgg11lcnn", 16), ("vgg11lowbeta", 16)]
)
def test_a_folded_network_is_the_network(arch, size):
    """Its function, its gradient and its Hessian-vector products, while examples drop out of the batch.

    At 7 x 7 the kernels with stride 2 read the last row, at 8 x 8 they do not.
    """
    model = lively(arch, size)
    before, (x, y) = copy.deepcopy(model.state_dict()), examples(5, size)
    with prepared(model) as folded, prepared(model, use_folding=False) as plain:
        fast, slow = input_hessian(folded, x, y), input_hessian(plain, x, y)
        assert [type(fast), type(slow)] == [FoldedHessian, DoubleBackwardHessian]
        torch.testing.assert_close(folded(x), plain(x), rtol=1e-10, atol=1e-10)
        for name in ("logits", "loss", "gradient"):
            torch.testing.assert_close(getattr(fast, name), getattr(slow, name), rtol=1e-8, atol=1e-12)
        for keep in ([1, 0, 1, 1, 1], [0, 1, 0, 1], [1, 0]):  # one of five drops out, two of four, one of two
            v = torch.randn(len(keep), *x.shape[1:], dtype=torch.float64)
            expected = slow.product(v)
            torch.testing.assert_close(fast.product(v), expected, rtol=1e-7, atol=1e-9 * expected.abs().max().item())
            for hessian in (slow, fast):
                hessian.restrict(torch.tensor(keep, dtype=torch.bool))
    assert all(module.training for module in model.modules())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    logits = folded(x)
    nn.init.ones_(model.classifier.bias)
    assert torch.equal(folded(x), logits)  # it holds copies
    v = torch.randn_like(x[:1])
    alone = FoldedHessian(folded, x[2:3], y[2:3]).product(v)  # 0 2 3 4, then 2 4, then 2
    torch.testing.assert_close(fast.product(v), alone, rtol=1e-7, atol=0)


def test_a_folded_networks_logits_can_be_differentiated_once():
    at = examples(2, 16)[0].requires_grad_()
    loss = fold(lively("vgg11lcnn", 16))(at).square().sum()
    first, second = (torch.autograd.grad(loss, at, create_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        second.sum().backward()


class Tanh5(nn.Linear):
    def forward(self, x):
        return 5 * torch.tanh(super().forward(x))


class OtherBlock(ResidualBlock):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    ("arch", "path", "module"),
    [
        ("vgg11lcnn", "features.1", nn.Tanh()),
        ("vgg11lowbeta", "features.1", nn.Softplus(10, threshold=5)),
        ("vgg11lowbeta", "features.0.norm", nn.BatchNorm2d(8)),
        ("vgg11lowbeta", "features.0.norm", nn.BatchNorm2d(8, affine=False, track_running_stats=False)),
        ("vgg11", "features.0.conv", nn.Conv2d(3, 8, 3, padding=2, dilation=2)),
        ("vgg11", "features.0.conv", nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect")),
        ("vgg11", "features.2.conv", nn.Conv2d(8, 8, 3, padding=1, groups=2)),
        ("vgg11", "features.2", nn.MaxPool2d(3, 2, 1)),
        ("vgg11", "classifier", Tanh5(64, 5)),
        ("vgg11", "classifier", nn.Linear(64, 5, bias=False)),
        ("resnetlcnn", "stages.0.0", OtherBlock(LCNN, 8, 8, 1, 16)),
        ("resnetlcnn", "stages.0.2", nn.Dropout2d()),  # one more
    ],
)
def test_a_network_that_was_changed_is_not_folded(arch, path, module):
    model = lively(arch, 16)
    handle = next(model.children()).register_forward_hook(lambda module, inputs, output: 2 * output)
    assert fold(model) is None
    handle.remove()
    model.classifier.forward = torch.tanh
    assert fold(model) is None
    del model.classifier.forward
    assert fold(model) is not None
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module.double())
    assert fold(model) is None
    assert fold(TwoBlocks(5)) is None  # of a class of its own


def test_the_cross_entropys_own_derivatives():
    rows = [[0.3, -1.2, 2.0], [30.0, -5.0, 0.0], [-40.0, 0.0, 3.0], [0.0, 0.0, 0.0]]
    logits, labels = torch.tensor(rows, dtype=torch.float64), torch.tensor([1, 0, 0, 2])
    z = logits.clone().requires_grad_()
    torch.testing.assert_close(cross_entropy(logits, labels), F.cross_entropy(z, labels, reduction="none"))
    (gradient,) = torch.autograd.grad(F.cross_entropy(z, labels, reduction="sum"), z, create_graph=True)
    torch.testing.assert_close(cross_entropy_gradient(logits, labels), gradient.detach(), rtol=1e-12, atol=1e-15)
    v = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    (product,) = torch.autograd.grad(gradient, z, v)
    torch.testing.assert_close(cross_entropy_hessian_product(logits, v), product, rtol=1e-10, atol=1e-15)


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


class Attention(nn.Linear):
    """Attention over the pixels, less 1/2 in place."""

    def forward(self, x):
        tokens = x.sub_(0.5).flatten(2).transpose(1, 2)[:, None].contiguous()  # else it would not be fused
        attended = F.scaled_dot_product_attention(tokens, tokens, tokens)
        return super().forward(F.relu(attended.mean(dim=(1, 2)), inplace=True))


def test_models_beyond_convolutions():
    """Fused attention has no second derivative: the plain one is taken. In-place layers and images stay harmless."""
    model, (x, y) = Attention(3, 5).double(), examples(2, size=4)
    before = x.clone()
    hessian = DoubleBackwardHessian(model, x, y)
    assert torch.equal(x, before)
    assert not x.requires_grad
    v, step = torch.randn_like(x), 1e-5
    ahead, behind = (DoubleBackwardHessian(model, x + s * v, y).gradient for s in (step, -step))
    # central differences: an error of step^2, and of eps / step = 1e-11 from rounding
    torch.testing.assert_close(hessian.product(v), (ahead - behind) / (2 * step), rtol=1e-6, atol=1e-9)
