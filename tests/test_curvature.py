"""The estimator against dense Hessians in float64."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from curvature.eigenvalues import methods
from curvature.estimate import CurvatureEstimate, estimate_curvature, starting_vectors
from curvature.results import example_generators
from curvature.subjects import choose_examples
from models.layers import CenteredSoftplus
from models.model_selector import model_architecture


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


@pytest.mark.parametrize("method", methods)
@pytest.mark.parametrize("activation", [nn.Tanh, CenteredSoftplus, nn.ReLU])
def test_against_the_dense_hessian(activation, method):
    model, (x, y) = small_model(activation), examples(4)
    generator = torch.Generator().manual_seed(0)
    estimate = estimate_curvature(model, x, y, method, num_iterations=3000, tol=1e-6, generator=generator)
    assert estimate.converged.all()
    for i in range(len(x)):
        eigenvalues = dense_eigenvalues(model, x[i], y[i])
        top = eigenvalues[eigenvalues.abs().argmax()]
        assert estimate.eigenvalue[i].item() == pytest.approx(top.item(), rel=1e-8)
        flat = x[i : i + 1].clone().requires_grad_()
        loss = F.cross_entropy(model.eval()(flat), y[i : i + 1])
        (gradient,) = torch.autograd.grad(loss, flat)
        assert estimate.gradient_norm[i].item() == pytest.approx(gradient.norm().item(), rel=1e-10)
        assert estimate.loss[i].item() == pytest.approx(loss.item(), rel=1e-10)
        assert estimate.predicted[i] == model(flat).argmax()
    assert torch.equal(estimate.hessian_norm, estimate.eigenvalue.abs())
    torch.testing.assert_close(estimate.curvature, estimate.hessian_norm / (estimate.gradient_norm + 1e-6))
    assert all(getattr(estimate, name).shape == (4,) for name in ("hessian_norm", "residual", "products", "converged"))


def test_top_k_and_trace_against_the_dense_hessian():
    model, (x, y) = small_model(), examples(3)
    generator = torch.Generator().manual_seed(0)
    estimate = estimate_curvature(
        model, x, y, num_iterations=32, tol=1e-9, generator=generator, top_k=4, trace_probes=200
    )
    for i in range(len(x)):
        eigenvalues = dense_eigenvalues(model, x[i], y[i])
        expected = eigenvalues[eigenvalues.abs().argsort(descending=True)][:4]
        torch.testing.assert_close(estimate.eigenvalues[i], expected, rtol=1e-8, atol=1e-12)
        assert (estimate.trace[i] - eigenvalues.sum()).abs() < 4 * estimate.trace_error[i]
    assert torch.equal(estimate.eigenvalues[:, 0], estimate.eigenvalue)


@pytest.mark.parametrize("method", methods)
def test_stops_at_tol_or_at_the_number_of_products(method):
    model, (x, y) = small_model(), examples(6)
    generator = torch.Generator().manual_seed(0)
    loose = estimate_curvature(model, x, y, method, num_iterations=1000, tol=0.1, generator=generator)
    assert loose.converged.all()
    assert (loose.residual <= 0.1).all()
    assert loose.products.max() < 200
    few = estimate_curvature(model, x, y, method, num_iterations=2, tol=1e-9, generator=generator)
    assert few.products.tolist() == [2] * 6
    assert not few.converged.any()


def test_one_pixel_is_enough():
    """In one dimension the gradient's direction and the random one are parallel: they must not cancel."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    x, y = torch.rand(8, 1, 1, 1, dtype=torch.float64), torch.arange(8) % 3
    estimate = estimate_curvature(model, x, y, generator=torch.Generator().manual_seed(0))
    for i in range(8):
        assert estimate.eigenvalue[i].item() == pytest.approx(dense_eigenvalues(model, x[i], y[i]).item(), rel=1e-8)


def test_a_start_that_leans_to_a_lesser_eigenvector_rarely_deceives():
    """Margin a x + k (b x)^2 / 2 with a and b orthogonal: the gradient is an eigenvector, and not the top one."""

    class TwoDirections(nn.Module):
        def __init__(self):
            super().__init__()
            q, _ = torch.linalg.qr(torch.randn(768, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
            self.a, self.b = q.T

        def forward(self, x):
            x = x.flatten(1)
            margin = x @ self.a + 0.3 * (x @ self.b - (x @ self.b).detach()).square()
            return torch.stack([margin, torch.zeros_like(margin)], dim=1)

    x, y = torch.rand(100, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1)), torch.ones(100)
    estimate = estimate_curvature(TwoDirections(), x, y.long(), generator=torch.Generator().manual_seed(2))
    p = torch.sigmoid(x.flatten(1) @ TwoDirections().a)  # y = 1: l = softplus(margin)
    truth = torch.maximum(p * (1 - p), 0.6 * p)
    wrong = (estimate.hessian_norm / truth - 1).abs() > 1e-3
    assert estimate.converged.all()
    assert not wrong.any()


def test_tf32_is_off_while_measuring_and_back_afterwards():
    seen = []

    class Spy(nn.Linear):
        def forward(self, x):
            seen.append((torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32))
            return super().forward(x.flatten(1))

    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    estimate_curvature(Spy(32, 3).double(), *examples(2))
    assert seen == [(False, False)]
    assert (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32) == before == (True, False)


def test_the_lanczos_start_leans_on_the_gradient_but_is_not_it():
    gradient = examples(3)[0]
    start = starting_vectors("lanczos", gradient, torch.Generator().manual_seed(0)).flatten(1)
    cosine = F.cosine_similarity(start, gradient.flatten(1))
    assert ((cosine > 0.4) & (cosine < 0.95)).all()
    power = starting_vectors("power", gradient, torch.Generator().manual_seed(0))
    assert torch.equal(power, starting_vectors("power", 2 - gradient, torch.Generator().manual_seed(0)))
    torch.testing.assert_close(  # a zero gradient leaves the random half
        starting_vectors("lanczos", 0 * gradient, torch.Generator().manual_seed(0)), power
    )


def test_a_model_whose_loss_is_constant_has_no_curvature():
    class Constant(nn.Module):
        def forward(self, x):
            return torch.zeros(len(x), 3, dtype=x.dtype) + 0 * x.flatten(1).sum(dim=1, keepdim=True)

    class Detached(nn.Module):
        def forward(self, x):
            return torch.zeros(len(x), 3, dtype=x.dtype)

    assert estimate_curvature(Detached(), *examples(2)).hessian_norm.tolist() == [0, 0]
    estimate = estimate_curvature(Constant(), *examples(2))
    assert estimate.hessian_norm.tolist() == estimate.curvature.tolist() == estimate.residual.tolist() == [0, 0]


def test_neither_the_batch_nor_the_order_changes_results():
    """With a generator for each example, though nothing has converged."""
    model, (x, y) = small_model(), examples(6)

    def estimate(*rows) -> CurvatureEstimate:
        rows = torch.tensor(rows)
        generators = example_generators(rows, seed=3)
        return estimate_curvature(
            model, x[rows], y[rows], num_iterations=3, tol=0, generator=generators, top_k=2, trace_probes=2
        )

    whole = estimate(0, 1, 2, 3, 4, 5)
    parts = CurvatureEstimate.concatenate([estimate(0, 1), estimate(2, 3), estimate(4, 5)])
    backwards = estimate(5, 4, 3, 2, 1, 0)[torch.arange(5, -1, -1)]
    for name in ("hessian_norm", "residual", "eigenvalues", "trace", "trace_error", "loss"):
        torch.testing.assert_close(getattr(whole, name), getattr(parts, name), rtol=1e-9, atol=0)
        torch.testing.assert_close(getattr(whole, name), getattr(backwards, name), rtol=1e-9, atol=0)
    generator = torch.Generator().manual_seed(3)  # one generator for all: in the order of the examples
    one = estimate_curvature(model, x, y, generator=torch.Generator().manual_seed(3), tol=0)
    parts = [estimate_curvature(model, x[i : i + 2], y[i : i + 2], generator=generator, tol=0) for i in (0, 2, 4)]
    torch.testing.assert_close(one.hessian_norm, torch.cat([part.hessian_norm for part in parts]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_examples_that_are_not_finite_are_nan_and_disturb_no_other(dtype):
    model, (x, y) = small_model().to(dtype), examples(4)
    x = x.to(dtype)
    clean = estimate_curvature(model, x, y, generator=torch.Generator().manual_seed(0))
    x[2, 0, 0, 0] = torch.nan
    estimate = estimate_curvature(model, x, y, generator=torch.Generator().manual_seed(0))
    assert estimate.curvature.isnan().tolist() == [False, False, True, False]
    assert estimate.converged.tolist() == [True, True, False, True]
    others = torch.tensor([0, 1, 3])
    torch.testing.assert_close(estimate.curvature[others], clean.curvature[others], rtol=1e-3, atol=0)


@pytest.mark.parametrize("use_folding", [True, False])
def test_our_networks_with_and_without_folding(use_folding):
    torch.manual_seed(0)
    model = model_architecture["vgg11lcnn"](3, 16).double()
    x = torch.rand(2, 3, 16, 16, dtype=torch.float64)
    modes = [module.training for module in model.modules()]
    estimate = estimate_curvature(
        model, x, torch.tensor([0, 2]), generator=torch.Generator().manual_seed(0), use_folding=use_folding
    )
    assert [module.training for module in model.modules()] == modes
    again = estimate_curvature(model, x, torch.tensor([0, 2]), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(estimate.eigenvalue, again.eigenvalue, rtol=1e-7, atol=0)


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
    assert list(methods) == ["lanczos", "power"]
    with pytest.raises(ValueError, match="magic"):
        estimate_curvature(model, x, y, method="magic")
    for labels in (torch.tensor([0, 3]), torch.tensor([-1, 0])):
        with pytest.raises(ValueError, match="has 3 classes"):
            estimate_curvature(model, x, labels)
    for images, labels in ((x.byte(), y), (x[:0], y[:0]), (x, y.double())):
        with pytest.raises(ValueError, match="of shape"):
            estimate_curvature(model, images, labels)
    for wrong in ({"num_iterations": 0}, {"top_k": 0}, {"tol": -1.0}, {"tol": float("nan")}, {"trace_probes": -1}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be at least"):
            estimate_curvature(model, x, y, **wrong)
    with pytest.raises(ValueError, match=r"labels of shape \(1,\)"):
        estimate_curvature(model, x, y[:1])


@pytest.mark.parametrize(("n", "count"), [(1000, 100), (7, 1), (7, 7), (10, 2), (10, 11)])
def test_the_chosen_examples_are_exactly_as_many_and_each_once(n, count):
    chosen = choose_examples(n, count, seed=0)
    assert len(chosen) == len(set(chosen.tolist())) == min(n, count)
    assert chosen.tolist() == sorted(chosen.tolist())
    assert chosen.min() >= 0
    assert chosen.max() < n
    if 1 < count < n:
        assert chosen.tolist() != list(range(count))  # not just the first ones
