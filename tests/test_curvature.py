"""The estimator against dense Hessians in float64."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from estimate_curvature import estimate_curvature
from models.layers import CenteredSoftplus
from utils.curvature import methods, power_method
from utils.measurement import choose_examples


def small_model(activation=nn.Tanh) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), activation(), nn.Flatten(), nn.Linear(64, 3)
    ).double()


def examples(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(n, 2, 4, 4, dtype=torch.float64, generator=generator), torch.arange(n) % 3


def dense_eigenvalues(model: nn.Module, image: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """All eigenvalues of one example's Hessian, by torch.autograd.functional on the whole matrix."""
    model = copy.deepcopy(model).eval()

    def loss(flat):
        return F.cross_entropy(model(flat.view(1, *image.shape)), label[None])

    return torch.linalg.eigvalsh(torch.autograd.functional.hessian(loss, image.flatten()))


@pytest.mark.parametrize("activation", [nn.Tanh, CenteredSoftplus, nn.ReLU])
def test_against_the_dense_hessian(activation):
    model = small_model(activation)
    x, y = examples(4)
    estimate = estimate_curvature(model, x, y, num_iterations=1500, generator=torch.Generator().manual_seed(0))
    for i in range(len(x)):
        norm = dense_eigenvalues(model, x[i], y[i]).abs().max()
        assert estimate.hessian_norm[i].item() == pytest.approx(norm.item(), rel=1e-6)
        flat = x[i : i + 1].clone().requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(model.eval()(flat), y[i : i + 1]), flat)
        assert estimate.gradient_norm[i].item() == pytest.approx(gradient.norm().item(), rel=1e-10)
    torch.testing.assert_close(estimate.curvature, estimate.hessian_norm / (estimate.gradient_norm + 1e-6))
    assert estimate.hessian_norm.shape == estimate.residual.shape == (4,)


def test_never_above_the_norm_and_the_residual_says_how_far():
    model, (x, y) = small_model(), examples(6)
    for k in (1, 2, 5, 20):
        estimate = estimate_curvature(model, x, y, num_iterations=k, generator=torch.Generator().manual_seed(0))
        for i in range(len(x)):
            eigenvalues = dense_eigenvalues(model, x[i], y[i])
            assert estimate.hessian_norm[i] <= eigenvalues.abs().max() * (1 + 1e-12)
    # wherever the residual is small, some eigenvalue is that close to the one reported
    distance = (eigenvalues.abs() - estimate.hessian_norm[-1]).abs().min() / estimate.hessian_norm[-1]
    assert distance <= estimate.residual[-1]


def diagonal(*entries: float):
    """H v for a diagonal H, on a batch of one."""
    values = torch.tensor([entries], dtype=torch.float64)
    return lambda v: values * v


def test_an_indefinite_hessian_is_not_underestimated():
    """H = diag(1, -1): u'Hu of a random u may be 0, ||Hu|| is 1 at once; the residual says u is no eigenvector."""
    norm, residual = power_method(diagonal(1, -1), torch.tensor([[1.0, 1.0]], dtype=torch.float64), 10)
    assert norm.item() == pytest.approx(1)
    assert residual.item() > 1e6


def test_repeated_zero_and_negative_eigenvalues():
    start = torch.tensor([[0.3, 0.5, 0.7]], dtype=torch.float64)
    norm, residual = power_method(diagonal(2, 2, 0.1), start, 30)
    assert (norm.item(), residual.item()) == (pytest.approx(2), pytest.approx(0, abs=1e-12))
    norm, residual = power_method(diagonal(-3, 1, 0), start, 60)
    assert (norm.item(), residual.item()) == (pytest.approx(3), pytest.approx(0, abs=1e-12))
    norm, residual = power_method(diagonal(0, 0, 0), start, 5)
    assert (norm.item(), residual.item()) == (0, 0)


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_scale_free(scale):
    """The reference's u / (||Hu|| + 1e-6) returns almost 0 for a Hessian of 1e-7."""
    start = torch.tensor([[0.3, 0.5, 0.7]], dtype=torch.float64)
    norm, residual = power_method(diagonal(3, 1, -2), start, 8)
    scaled_norm, scaled_residual = power_method(diagonal(3 * scale, scale, -2 * scale), start, 8)
    torch.testing.assert_close(scaled_norm, norm * scale, rtol=1e-10, atol=0)
    torch.testing.assert_close(scaled_residual, residual, rtol=1e-8, atol=0)


def test_a_model_whose_loss_is_linear_or_constant_has_no_curvature():
    class Constant(nn.Module):
        def forward(self, x):
            return torch.zeros(len(x), 3, dtype=x.dtype) + 0 * x.flatten(1).sum(dim=1, keepdim=True)

    estimate = estimate_curvature(Constant(), *examples(2))
    assert estimate.hessian_norm.tolist() == estimate.curvature.tolist() == estimate.residual.tolist() == [0, 0]


def test_batching_does_not_change_results():
    model, (x, y) = small_model(), examples(6)
    whole = estimate_curvature(model, x, y, generator=torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(3)
    parts = [estimate_curvature(model, x[i : i + 2], y[i : i + 2], generator=generator) for i in (0, 2, 4)]
    torch.testing.assert_close(whole.hessian_norm, torch.cat([part.hessian_norm for part in parts]))


def test_leaves_the_model_as_it_was_even_when_it_fails():
    model, (x, y) = small_model(), examples(2)
    model.train()
    model[1].eval()
    model[0].weight.requires_grad_(False)
    model[4].weight.grad = torch.ones_like(model[4].weight)
    state = copy.deepcopy(model.state_dict())

    def check():
        assert [m.training for m in model] == [True, False, True, True, True]
        assert [p.requires_grad for p in model.parameters()] == [False, True, True, True, True, True]
        assert torch.equal(model[4].weight.grad, torch.ones_like(model[4].weight))
        assert model[0].bias.grad is None
        assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())

    estimate_curvature(model, x, y)
    check()
    with pytest.raises(RuntimeError):
        estimate_curvature(model, x[:, :1], y)
    check()
    assert not x.requires_grad


def test_arguments_are_checked():
    model, (x, y) = small_model(), examples(2)
    assert "power" in methods
    with pytest.raises(ValueError, match="magic"):
        estimate_curvature(model, x, y, method="magic")
    with pytest.raises(ValueError, match="at least 1"):
        estimate_curvature(model, x, y, num_iterations=0)
    with pytest.raises(ValueError, match="1 labels"):
        estimate_curvature(model, x, y[:1])


@pytest.mark.parametrize(("n", "fraction", "count"), [(1000, 0.1, 100), (7, 0.01, 1), (7, 1.0, 7), (10, 0.25, 2)])
def test_the_chosen_examples_are_exactly_as_many_and_each_once(n, fraction, count):
    chosen = choose_examples(n, fraction, torch.Generator().manual_seed(0))
    assert len(chosen) == len(set(chosen.tolist())) == count
    assert chosen.tolist() == sorted(chosen.tolist())
    assert chosen.min() >= 0
    assert chosen.max() < n
    if 1 < count < n:
        assert chosen.tolist() != list(range(count))  # not just the first ones
