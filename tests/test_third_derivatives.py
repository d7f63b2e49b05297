"""A penalty on the input Hessian, and the third derivatives that its gradient takes, against differences in float64."""

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import TwoBlocks
from torch import nn
from torch.autograd import grad, gradgradcheck

from models.functional import AffineBatchNorm, ScaledBatchNorm, centered_softplus, conv2d
from models.layers import BatchNorm2d, LipschitzBatchNorm2d, SpectralNormConv2d
from regularized_loss import HessianLoss
from utils.errors import UsageError


def scaled(x, scale):
    return ScaledBatchNorm.apply(x, scale, None, None, 0.1, 0.5)


def affine(x, weight, bias):
    return AffineBatchNorm.apply(x, weight, bias, None, None, 0.1, 0.5)


def strided(x, weight, bias):
    return conv2d(x, weight, bias, (2, 1), (1, 0))


FUNCTIONS = {
    "scaled BatchNorm": (scaled, [0.7]),
    "affine BatchNorm, one weight 0": (affine, [[0.0, 2.0], [0.3, -0.1]]),
    "centered softplus, up to b x = 30": (centered_softplus, [8.0]),
    "convolution": (strided, [torch.linspace(-1, 1, 36).reshape(2, 2, 3, 3).tolist(), [0.1, 0.2]]),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_third_derivatives_in_every_argument(name):
    """The second derivative of the first: of all mixed ones, too."""
    function, parameters = FUNCTIONS[name]
    x = torch.randn(2, 2, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x[0, 0, 0, 0] = 3.75
    arguments = [x, *(torch.tensor(p, dtype=torch.float64) for p in parameters)]

    def first(*arguments):
        return grad(function(*arguments).pow(3).sum(), arguments, create_graph=True)

    assert gradgradcheck(first, [argument.requires_grad_() for argument in arguments])
    total = sum(gradient.square().sum() for gradient in first(*arguments))
    plain, recorded = (grad(total, arguments, retain_graph=True, create_graph=mode) for mode in (False, True))
    torch.testing.assert_close(recorded, plain)  # test_layers.py checks the plain one


def lively_network() -> nn.Module:
    """TwoBlocks and the norms it lacks, PyTorch's too that are accepted, in training mode with active clips."""
    torch.manual_seed(0)
    model = TwoBlocks(num_classes=3, input_size=4)
    model.stages.append(nn.Sequential(nn.GroupNorm(4, 16), nn.RMSNorm(2), LipschitzBatchNorm2d(16, affine=True)))
    model.stages[-1][-1].weight.data[0] = 0
    model.double().train()
    for module in model.modules():
        if isinstance(module, LipschitzBatchNorm2d):
            module.running_var.copy_(torch.rand(module.num_features) + 0.1)
            module.log_gamma.data.fill_(-1)
        if isinstance(module, SpectralNormConv2d):
            module.power_iteration(2000)  # sigma's gradient holds u and v constant, which is right once they converged
    for _ in range(200):
        model.classifier(torch.zeros(1, 16, dtype=torch.float64))  # each call is one of torch's power iterations
    return model


def test_the_penaltys_gradient():
    """Central differences along a random direction of each parameter: some 1e-5 off by step^2, 1e-11 by rounding.

    Each evaluation starts from the same running statistics and singular vectors, and draws the same directions v.
    """
    model = lively_network()
    x, y = torch.rand(4, 3, 4, 4, dtype=torch.float64), torch.arange(4) % 3
    buffers = copy.deepcopy(dict(model.named_buffers()))
    loss = HessianLoss(model, reg_constant=100.0)

    def value() -> torch.Tensor:
        model.load_state_dict(buffers, strict=False)
        torch.manual_seed(1)
        return loss.compute_loss(x, y)

    total = value()
    total.backward()
    assert 100 * loss.metadata["hessian"] > 0.01 * loss.metadata["raw_loss"]
    for parameter_name, parameter in model.named_parameters():
        direction, step, values = torch.randn_like(parameter), 1e-5, []
        before = parameter.detach().clone()
        for sign in (1, -1):
            parameter.data = before + sign * step * direction
            values.append(value().item())
        parameter.data = before
        slope = (values[0] - values[1]) / (2 * step)
        expected = (parameter.grad * direction).sum().item()
        assert slope == pytest.approx(expected, rel=1e-4, abs=1e-9 * total.item()), parameter_name


def test_the_term_is_that_of_dense_hessians():
    model = lively_network().eval()
    x, y = torch.rand(2, 3, 4, 4, dtype=torch.float64), torch.tensor([0, 2])
    loss = HessianLoss(model, reg_constant=0.1)
    torch.manual_seed(1)
    total = loss.compute_loss(x, y)
    torch.manual_seed(1)
    v = torch.randn_like(x)
    v /= v.flatten(1).norm(dim=1)[:, None, None, None]
    dense = torch.autograd.functional.hessian(lambda z: F.cross_entropy(model(z), y, reduction="sum"), x)
    expected = (dense.reshape(96, 96) @ v.flatten()).square().sum().item() / 2  # examples do not mix in eval mode
    assert loss.metadata["hessian"] == pytest.approx(expected, rel=1e-9)
    assert total.item() == pytest.approx(F.cross_entropy(model(x), y).item() + 0.1 * expected, rel=1e-9)


class Function(nn.Module):
    """A layer that is no module of PyTorch's, as networks of others have it."""

    def __init__(self, function, *arguments):
        super().__init__()
        self.function, self.arguments = function, arguments

    def forward(self, x):
        return self.function(x, *self.arguments)


def test_layers_of_pytorchs_that_hold_statistics_constant_are_refused():
    """PyTorch refuses the third derivative of some of them, or gives a wrong one, depending on the version."""

    def loss_through(layer: nn.Module) -> None:
        model = nn.Sequential(nn.Conv2d(3, 3, 1), layer, nn.Flatten(), nn.Linear(48, 3))
        HessianLoss(model).compute_loss(torch.rand(2, 3, 4, 4), torch.tensor([0, 2]))

    for layer in (
        nn.BatchNorm2d(3),
        nn.InstanceNorm2d(3),
        nn.LayerNorm(4),
        Function(F.layer_norm, [3, 4, 4]),
        Function(F.instance_norm),
        Function(F.batch_norm, None, None, None, None, True),
    ):
        with pytest.raises(UsageError, match=r"Norm cannot be differentiated three times in training; .*--lcnn"):
            loss_through(layer)
    for layer in (BatchNorm2d(3), Function(F.batch_norm, torch.zeros(3), torch.ones(3))):
        loss_through(layer)  # accepted, as are the layers above
