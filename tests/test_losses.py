"""The losses against finite differences in float64, on a network with all three kinds of low-curvature layer."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from data.batches import Batch
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
from training.epoch import TrainingStep, build_optimizer, train_epoch


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


LOSSES = {
    "none": lambda model: CELoss(model),
    "gnorm": lambda model: GradNormRegularizedLoss(model, 0.3),
    "curvature": lambda model: CurvatureRegularizedLoss(model, (0.1, 0.2)),
    "curvature_and_gnorm": lambda model: CurvatureAndGradientRegularizedLoss(model, (0.1, 0.2, 0.3)),
    "cure": lambda model: CURELoss(model, 0.4),
}


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
    x, y = batch(5)
    with torch.no_grad():
        expected = expected_terms(model, x, y)
    loss = LOSSES[name](model)
    total = loss.compute_loss(x, y).item()
    weights = {"raw_loss": 1.0}
    if "curvature" in name:
        weights |= {"beta_term": 0.1, "gamma_term": 0.2}
    if "gnorm" in name:
        weights["gradnorm"] = 0.3
    if name == "cure":
        weights["cure"] = 0.4
    assert loss.metadata.keys() == weights.keys()
    assert all(type(value) is float for value in loss.metadata.values())
    for term, value in loss.metadata.items():
        assert value == pytest.approx(expected[term], rel=1e-7), term
    assert total == pytest.approx(sum(weight * expected[term] for term, weight in weights.items()), rel=1e-7)


@pytest.mark.parametrize("name", LOSSES)
def test_parameter_gradients(model, name):
    """Central differences of the loss along each parameter's own gradient direction: error ~ step^2, 1e-6 relative.

    In eval, where the network is one fixed function; u and v are constants there, and CURE's z does not change with
    small changes of the parameters.
    """
    x, y = batch(4)
    loss = LOSSES[name](model)
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


def test_cure_trains_with_batchnorm_in_training_mode(model):
    """Two forward passes before the backward one: nothing that autograd kept may have been overwritten."""
    x, y = batch(6)
    CURELoss(model.train(), 1.0).compute_loss(x, y).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_gradient_norm_penalty_does_not_depend_on_the_batch_size(model):
    """Repeating every example leaves each mean as it is; the reference's penalty would fall by 4."""
    x, y = batch(3)
    loss = GradNormRegularizedLoss(model, 1.0)
    loss.compute_loss(x, y)
    once = loss.metadata["gradnorm"]
    loss.compute_loss(x.repeat(2, 1, 1, 1), y.repeat(2))
    assert loss.metadata["gradnorm"] == pytest.approx(once, rel=1e-12)


def test_a_batch_mean_is_no_loss_of_each_example(model):
    x, y = batch(3)
    x.requires_grad_()
    with pytest.raises(ValueError, match=r"losses of shape \(\) for 3 examples; give one for each"):
        gradnorm_penalty(F.cross_entropy(model(x), y), x)
    for losses in ([1.0, 2.0, 3.0], 1.0):
        with pytest.raises(ValueError, match=rf"losses of type {type(losses).__name__}; give a tensor"):
            gradnorm_penalty(losses, x)


def test_gradient_norm_on_a_linear_model_is_known():
    """logits = W x: grad_x l = W^T (p - e_y)."""
    torch.manual_seed(0)
    linear = nn.Linear(6, 4).double()
    x, y = torch.rand(7, 6, dtype=torch.float64), torch.randint(0, 4, (7,))
    error = linear(x).softmax(dim=1) - F.one_hot(y, 4)
    expected = 1e5 / 128**2 * (error @ linear.weight).square().sum(dim=1).mean()
    loss = GradNormRegularizedLoss(linear, 0.0)
    loss.compute_loss(x, y)
    assert loss.metadata["gradnorm"] == pytest.approx(expected.item(), rel=1e-12)
    assert x.grad is None
    assert not x.requires_grad  # the caller's tensor is left alone


def test_curvature_bound_loss():
    model = model_architecture["vgg11lcnn"](3, 16)
    x, y = torch.rand(2, 3, 16, 16), torch.tensor([0, 2])
    loss = CurvatureBoundRegularizedLoss(model.eval(), 0.5)
    total = loss.compute_loss(x, y).item()
    assert loss.metadata.keys() == {"raw_loss", "log_bound"}
    assert loss.metadata["log_bound"] == pytest.approx(log_curvature_bound(model).item())
    assert total == pytest.approx(loss.metadata["raw_loss"] + 0.5 * loss.metadata["log_bound"])
    with pytest.raises(ValueError, match="not a low-curvature network"):
        CurvatureBoundRegularizedLoss(nn.Linear(2, 2))


@pytest.mark.parametrize("name", [*list(LOSSES)[1:], "hessian"])
def test_warmup_scales_the_penalties_and_not_the_cross_entropy(model, name):
    loss, (x, y) = {**LOSSES, "hessian": HessianLoss}[name](model), batch(4)
    torch.manual_seed(0)  # of hessian's directions
    full = loss.compute_loss(x, y).item() - loss.metadata["raw_loss"]
    loss.warmup_epochs = 2.0
    for loss.epoch, share in ((1, 0.0), (2, 0.5), (3, 1.0), (4, 1.0)):
        torch.manual_seed(0)
        penalty = loss.compute_loss(x, y).item() - loss.metadata["raw_loss"]
        assert penalty == pytest.approx(share * full, rel=1e-9, abs=1e-12)


def test_curvature_losses_refuse_a_network_without_beta_and_gamma():
    for loss in (CurvatureRegularizedLoss, CurvatureAndGradientRegularizedLoss):
        with pytest.raises(ValueError, match="resnet18lcnn"):
            loss(nn.Linear(2, 2))


class Uncertainty(CELoss):
    """A learned weight, a number, a counter and a frozen teacher."""

    def __init__(self, model):
        super().__init__(model)
        self.log_variance = nn.Parameter(torch.zeros(()))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.teacher = nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(32, 3)).double().requires_grad_(False).eval()

    def compute_loss(self, input, target):
        self.steps += 1
        raw_loss = self.losses(input, target).mean()
        distance = (self.model(input) - self.teacher(input)).square().mean()
        self.metadata = {"raw_loss": raw_loss, "epoch_seen": self.epoch / self.num_epochs}
        return (-self.log_variance).exp() * raw_loss + self.log_variance + distance


def test_a_loss_may_own_parameters_buffers_and_networks(model):
    """One step without momentum changes the loss's parameter as its gradient says, and leaves the teacher as it is."""
    loss, (x, y) = Uncertainty(model), batch(4)
    slope = 1 - F.cross_entropy(model.train()(x), y).item()  # d/ds of exp(-s) L + s at s = 0
    before = [p.clone() for p in loss.teacher.parameters()]
    optimizer = build_optimizer(loss, lr=0.1, momentum=0.0, weight_decay=5e-4)
    loss.epoch, loss.num_epochs = 3, 4
    terms = train_epoch(TrainingStep(loss), optimizer, [Batch(x, y, 4, 1.0)])
    assert loss.log_variance.item() == pytest.approx(-0.1 * slope, rel=0.05)  # the power iteration goes on
    assert terms["epoch_seen"] == 0.75
    assert loss.steps == 1
    assert not loss.teacher.training
    assert all(map(torch.equal, before, loss.teacher.parameters()))


def test_the_registry_names_the_references_regularizers():
    assert list(regularizers)[:4] == ["none", "gnorm", "curvature", "curvature_and_gnorm"]


def test_the_help_of_a_weight_may_have_any_character(monkeypatch):
    monkeypatch.setitem(WEIGHTS, "reg_new", (0.5, "100 % of it"))
    assert "100 % of it (default: 0.5)" in " ".join(build_parser().format_help().split())
