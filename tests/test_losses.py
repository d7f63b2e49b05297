"""The losses against finite differences in float64, on a network with all three kinds of low-curvature layer."""

import argparse
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models.bound import log_curvature_bound
from models.layers import CenteredSoftplus, LipschitzBatchNorm2d, SpectralNormConv2d
from models.model_selector import model_architecture
from regularized_loss import (
    WEIGHTS,
    CELoss,
    CURELoss,
    CurvatureAndGradientRegularizedLoss,
    CurvatureBoundRegularizedLoss,
    CurvatureRegularizedLoss,
    GradNormRegularizedLoss,
    HessianLoss,
    gradnorm_penalty,
    regularizers,
)
from train_models import build_parser


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        SpectralNormConv2d(2, 3, 3, padding=1, input_size=4),
        LipschitzBatchNorm2d(3),
        CenteredSoftplus(3.0),
        SpectralNormConv2d(3, 3, 3, stride=2, padding=1, input_size=4),
        LipschitzBatchNorm2d(3, init_gamma=0.5),
        CenteredSoftplus(2.0),
        nn.Flatten(),
        nn.Linear(12, 3),
    ).double()
    for module in model:
        if isinstance(module, LipschitzBatchNorm2d):
            module.running_var.copy_(torch.rand(3) + 0.1)
    return model.eval()


def batch(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(n)
    x = torch.rand(n, 2, 4, 4, dtype=torch.float64, generator=generator)
    return x, torch.randint(0, 3, (n,), generator=generator)


def gradients_by_differences(model, x, y, step=1e-5) -> torch.Tensor:
    """(N, ...) grad_x l_i by central differences; error about step^2 * third derivative, 1e-9 relative here."""
    gradient = torch.zeros_like(x)
    for k in range(x[0].numel()):
        shift = torch.zeros_like(x).flatten(1)
        shift[:, k] = step
        shift = shift.view_as(x)
        up, down = (F.cross_entropy(model(x + s * shift), y, reduction="none") for s in (1, -1))
        gradient.view(len(x), -1)[:, k] = ((up - down) / (2 * step)).detach()
    return gradient


def mean_square(x: torch.Tensor) -> torch.Tensor:
    return x.flatten(1).square().sum(dim=1).mean()


# each with the weights of its penalties
LOSSES = {
    "none": (CELoss, {}),
    "gnorm": (lambda model: GradNormRegularizedLoss(model, 0.3), {"gradnorm": 0.3}),
    "curvature": (lambda model: CurvatureRegularizedLoss(model, (0.1, 0.2)), {"beta_term": 0.1, "gamma_term": 0.2}),
    "curvature_and_gnorm": (
        lambda model: CurvatureAndGradientRegularizedLoss(model, (0.1, 0.2, 0.3)),
        {"beta_term": 0.1, "gamma_term": 0.2, "gradnorm": 0.3},
    ),
    "cure": (lambda model: CURELoss(model, 0.4), {"cure": 0.4}),
}
WARMUP = (1, 0.0), (2, 0.5), (3, 1.0), (4, 1.0)  # of 2 epochs: epoch, share of the penalties


def expected_terms(model, x, y) -> dict[str, float]:
    betas = [math.exp(m.log_beta) for m in model if isinstance(m, CenteredSoftplus)]
    gammas = [abs(float(m.log_gamma)) for m in model if isinstance(m, LipschitzBatchNorm2d)]
    gradient = gradients_by_differences(model, x, y)
    z = torch.where(gradient > 0, 1.0, -1.0) / math.sqrt(x[0].numel())
    change = gradients_by_differences(model, x + z, y) - gradient
    return {
        "raw_loss": F.cross_entropy(model(x), y).item(),
        "beta_term": sum(betas),
        "gamma_term": sum(gammas),
        "gradnorm": 1e5 / 128**2 * mean_square(gradient).item(),
        "cure": 1e3 / 128**2 * mean_square(change).item(),
    }


@pytest.mark.parametrize("name", LOSSES)
def test_value_and_terms(model, name):
    """The terms against differences; the warmup scales the penalties and not the cross-entropy."""
    (make, weights), (x, y) = LOSSES[name], batch(5)
    with torch.no_grad():
        expected = expected_terms(model, x, y)
    loss = make(model)
    penalty = sum(weight * expected[term] for term, weight in weights.items())
    assert loss.compute_loss(x, y).item() == pytest.approx(expected["raw_loss"] + penalty, rel=1e-7)
    assert loss.metadata.keys() == {"raw_loss", *weights}
    for term, value in loss.metadata.items():
        assert type(value) is float
        assert value == pytest.approx(expected[term], rel=1e-7), term
        assert not loss.terms[term].requires_grad  # or it would keep the graph
    assert not x.requires_grad  # the caller's tensor is left alone
    loss.warmup_epochs = 2.0
    for loss.epoch, share in WARMUP:
        assert loss.compute_loss(x, y).item() == pytest.approx(expected["raw_loss"] + share * penalty, rel=1e-7)


@pytest.mark.parametrize("name", LOSSES)
def test_parameter_gradients(model, name):
    """Central differences of the loss along each parameter's own gradient direction: error ~ step^2, 1e-6 relative.

    In eval, where the network is one fixed function; u and v are constants there, and CURE's z does not change with
    small changes of the parameters.
    """
    x, y = batch(4)
    loss = LOSSES[name][0](model)
    loss.compute_loss(x, y).backward()
    for parameter_name, parameter in model.named_parameters():
        gradient = parameter.grad
        if gradient is None or gradient.norm() == 0:
            assert "log_gamma" in parameter_name, parameter_name  # an inactive clip has no gradient
            continue
        direction, step, values = gradient / gradient.norm(), 1e-5, []
        for sign in (1, -1):
            with torch.no_grad():
                parameter += sign * step * direction
            values.append(loss.compute_loss(x, y).item())
            with torch.no_grad():
                parameter -= sign * step * direction
        slope = (values[0] - values[1]) / (2 * step)
        assert slope == pytest.approx(gradient.norm().item(), rel=1e-5, abs=1e-9), parameter_name


def test_cure_on_a_quadratic_loss_is_known():
    """A zero gradient has no sign: z = 0. Otherwise, where dl/dx = sigmoid(w x) w, as with label 1 and logits (w x, 0),
    the gradient's change along z = sign(w) / sqrt(d) is (sigmoid(w (x + z)) - sigmoid(w x)) w."""
    w = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
    model = nn.Linear(3, 2, bias=False).double()
    x, y = torch.rand(5, 3, dtype=torch.float64), torch.ones(5, dtype=torch.int64)
    for rows, expected in (
        (torch.zeros(2, 3, dtype=torch.float64), 0.0),
        (
            torch.stack([w, torch.zeros_like(w)]),
            ((x @ w + w.abs().sum() / math.sqrt(3)).sigmoid() - (x @ w).sigmoid()).square().mean() * w.square().sum(),
        ),
    ):
        model.weight.data.copy_(rows)
        loss = CURELoss(model, 1.0)
        loss.compute_loss(x, y).backward()
        assert loss.metadata["cure"] == pytest.approx(1e3 / 128**2 * float(expected), rel=1e-10)
        assert model.weight.grad.isfinite().all()
        model.weight.grad = None


def test_a_batch_mean_is_no_loss_of_each_example(model):
    x, y = batch(3)
    x.requires_grad_()
    with pytest.raises(ValueError, match=r"losses of shape \(\) for 3 examples; give one for each"):
        gradnorm_penalty(F.cross_entropy(model(x), y), x)
    for losses in ([1.0, 2.0, 3.0], 1.0):
        with pytest.raises(ValueError, match=rf"losses of type {type(losses).__name__}; give a tensor"):
            gradnorm_penalty(losses, x)


def test_the_losses_of_the_bound_and_of_the_hessian(model, thin_vgg):
    """How they weigh their terms; the Hessian's own value is in test_third_derivatives.py."""
    vgg = model_architecture["vgg11lcnn"](3, 16).double().eval()
    bound, hessian = CurvatureBoundRegularizedLoss(vgg, 0.5), HessianLoss(model, 0.5)
    photographs = torch.rand(4, 3, 16, 16, dtype=torch.float64), batch(4)[1]
    for loss, term, (x, y) in ((bound, "log_bound", photographs), (hessian, "hessian", batch(4))):
        loss.warmup_epochs = 2.0
        for loss.epoch, share in WARMUP:
            penalty = loss.compute_loss(x, y).item() - loss.metadata["raw_loss"]
            assert loss.metadata.keys() == {"raw_loss", term}
            assert penalty == pytest.approx(share * 0.5 * loss.metadata[term], rel=1e-6, abs=1e-12)
    assert bound.metadata["log_bound"] == pytest.approx(log_curvature_bound(vgg).item())
    assert hessian.metadata["hessian"] > 1e-8


def test_every_flag_weighs_its_own_term(thin_vgg):
    flags = argparse.Namespace(reg_gnorm=1, reg_beta=2, reg_gamma=3, reg_bound=4, reg_hessian=5)
    losses = [make(model_architecture["vgg11lcnn"](3, 16), flags) for make in regularizers.values()]
    found = [getattr(loss, "reg_constants", getattr(loss, "reg_constant", None)) for loss in losses]
    assert found == [None, 1, (2, 3), (2, 3, 1), 1, 4, 5]


def test_beta_or_gamma_alone_will_do():
    for layer, terms in ((CenteredSoftplus(5.0), (5, 0)), (LipschitzBatchNorm2d(3, init_gamma=math.e), (0, 1))):
        loss = CurvatureRegularizedLoss(nn.Sequential(layer, nn.Flatten()).eval())
        loss.compute_loss(torch.rand(2, 3, 2, 2), torch.tensor([0, 1]))
        assert tuple(loss.metadata.values())[1:] == pytest.approx(terms)


def test_the_help_of_a_weight_may_have_any_character(monkeypatch):
    monkeypatch.setitem(WEIGHTS, "reg_new", (0.5, "100 % of it"))
    assert "100 % of it (default: 0.5)" in " ".join(build_parser().format_help().split())
