"""The estimator against dense Hessians in float64."""

import argparse
import copy
import itertools

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from test_eigenvalues import sorted_spectrum
from torch import nn

from curvature.eigenvalues import methods
from curvature.estimate import estimate_curvature, starting_vectors
from curvature.subjects import Subject, choose_examples, for_examples
from data.batches import Split
from data.datasets import ImageData
from models.layers import CenteredSoftplus
from models.model_selector import model_architecture


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def small_model(activation=nn.Tanh) -> nn.Module:
    torch.manual_seed(0)
    first = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), activation()
    return nn.Sequential(*first, nn.Flatten(), nn.Linear(64, 3)).double()


def examples(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.rand(n, 2, 4, 4, dtype=torch.float64, generator=seeded(1)), torch.arange(n) % 3


def dense_eigenvalues(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """(N, D) eigenvalues of each example's Hessian, from the matrix of torch.autograd.functional."""
    model, rows, size = copy.deepcopy(model).eval(), range(len(x)), x[0].numel()
    hessian = torch.autograd.functional.hessian(lambda x: F.cross_entropy(model(x), y, reduction="sum"), x)
    return sorted_spectrum(hessian.view(len(x), size, len(x), size)[rows, :, rows])


@pytest.mark.parametrize("method", methods)
@pytest.mark.parametrize("activation", [nn.Tanh, CenteredSoftplus, nn.ReLU])
def test_against_the_dense_hessian(activation, method):
    model, (x, y) = small_model(activation), examples(4)
    estimate = estimate_curvature(model, x, y, method, num_iterations=3000, tol=1e-6, generator=seeded())
    assert estimate.converged.all()
    torch.testing.assert_close(estimate.eigenvalue, dense_eigenvalues(model, x, y)[:, 0], rtol=1e-8, atol=0)
    logits = model.eval()(x.requires_grad_())
    loss = F.cross_entropy(logits, y, reduction="none")
    (gradient,) = torch.autograd.grad(loss.sum(), x)
    torch.testing.assert_close(estimate.gradient_norm, gradient.flatten(1).norm(dim=1), rtol=1e-10, atol=0)
    torch.testing.assert_close(estimate.loss, loss.detach(), rtol=1e-10, atol=0)
    assert torch.equal(estimate.predicted, logits.argmax(dim=1))
    assert torch.equal(estimate.hessian_norm, estimate.eigenvalue.abs())
    torch.testing.assert_close(estimate.curvature, estimate.hessian_norm / (estimate.gradient_norm + 1e-6))
    assert all(column.shape == (4,) for column in estimate.columns().values())
    few = estimate_curvature(model, x, y, method, num_iterations=2, tol=1e-9, generator=seeded())
    assert not few.converged.any()


def test_top_k_and_probes_against_the_dense_hessian():
    model, (x, y) = small_model(), examples(3)
    settings = {"num_iterations": 32, "tol": 1e-9, "generator": seeded(), "top_k": 4, "trace_probes": 200}
    estimate, dense = estimate_curvature(model, x, y, **settings), dense_eigenvalues(model, x, y)
    torch.testing.assert_close(estimate.eigenvalues, dense[:, :4], rtol=1e-8, atol=1e-12)
    assert torch.equal(estimate.columns()["eigenvalue_4"], estimate.eigenvalues[:, 3])
    assert ((estimate.trace - dense.sum(dim=1)).abs() < 4 * estimate.trace_error).all()
    assert ((estimate.frobenius_norm - dense.norm(dim=1)).abs() < 4 * estimate.frobenius_norm_error).all()
    assert (estimate.curvature_score <= estimate.frobenius_norm).all()
    few = estimate_curvature(model, x, y, num_iterations=3, top_k=4)
    assert few.residual.isinf().all()  # the largest, of the value that is missing


def test_one_pixel_is_enough():
    """In one dimension the gradient's direction and the random one are parallel: they must not cancel."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    x, y = torch.rand(8, 1, 1, 1, dtype=torch.float64), torch.arange(8) % 3
    estimate = estimate_curvature(model, x, y, generator=seeded(), trace_probes=2)
    for found in (estimate.eigenvalue, estimate.trace):  # of one number every sign tells the trace
        torch.testing.assert_close(found, dense_eigenvalues(model, x, y)[:, 0], rtol=1e-8, atol=0)


def test_the_lanczos_start_leans_on_the_gradient_but_is_not_it():
    gradient = examples(3)[0].flatten(1)
    cosine = F.cosine_similarity(starting_vectors("lanczos", gradient, seeded()), gradient)
    assert ((cosine > 0.4) & (cosine < 0.95)).all()


def test_a_start_that_leans_to_a_lesser_eigenvector_rarely_deceives():
    """Margin a x + k (b x)^2 / 2 with a and b orthogonal: the gradient is an eigenvector, and not the top one."""
    a, b = torch.linalg.qr(torch.randn(768, 2, dtype=torch.float64, generator=seeded())).Q.T

    class TwoDirections(nn.Module):
        def forward(self, x):
            x = x.flatten(1)
            margin = x @ a + 0.3 * (x @ b - (x @ b).detach()).square()
            return torch.stack([margin, torch.zeros_like(margin)], dim=1)

    x, y = torch.rand(100, 3, 16, 16, dtype=torch.float64, generator=seeded(1)), torch.ones(100, dtype=torch.int64)
    estimate = estimate_curvature(TwoDirections(), x, y, generator=seeded(2))
    p = torch.sigmoid(x.flatten(1) @ a)  # y = 1: l = softplus(margin)
    assert estimate.converged.all()
    torch.testing.assert_close(estimate.hessian_norm, torch.maximum(p * (1 - p), 0.6 * p), rtol=1e-3, atol=0)


def test_a_constant_loss_has_no_curvature_and_without_a_gradient_a_model_is_refused():
    x, y = examples(2)
    model = nn.Linear(4, 3).double()  # in no list of modules: nothing freezes it
    constant, blind, detached = nn.Identity(), nn.Identity(), nn.Identity()
    constant.forward = lambda x: torch.zeros(len(x), 3, dtype=x.dtype) + 0 * x.flatten(1).sum(dim=1, keepdim=True)
    rounded = nn.Identity()
    rounded.forward = lambda x: x.flatten(1)[:, :3].round()
    for model_without in (constant, rounded):
        estimate = estimate_curvature(model_without, x, y, tol=0)
        assert estimate.converged.all()
        assert estimate.hessian_norm.tolist() == estimate.curvature.tolist() == estimate.residual.tolist() == [0, 0]
    blind.forward = torch.no_grad()(constant.forward)
    detached.forward = lambda x: model(x.detach().mean(dim=(1, 2)))
    for refused in (blind, detached):
        with pytest.raises(ValueError, match="carry no gradient; remove any no_grad or detach"):
            estimate_curvature(refused, x, y)


def test_logits_of_fewer_bits_are_measured_in_the_pixels_dtype():
    model, narrow, (x, y) = small_model(), nn.Identity(), examples(2)
    narrow.forward = lambda x: model(x).bfloat16()
    assert estimate_curvature(narrow, x, y).loss.dtype == x.dtype


def test_folding_grad_modes_and_the_type_of_labels_do_not_matter(thin_vgg):
    """Also where the network itself was made."""
    x, y = torch.rand(2, 3, 16, 16, dtype=torch.float64), torch.tensor([0, 2])
    modes = (torch.enable_grad, torch.int64), (torch.no_grad, torch.uint8), (torch.inference_mode, torch.int32)
    truth = {}
    for (mode, dtype), use_folding in itertools.product(modes, (True, False)):
        with mode():
            torch.manual_seed(0)
            model = model_architecture["vgg11lcnn"](3, 16).double()
            found = estimate_curvature(model, x + 0, y.to(dtype), generator=seeded(), use_folding=use_folding)
        assert torch.equal(found.eigenvalue, truth.setdefault(use_folding, found.eigenvalue))
    torch.testing.assert_close(truth[True], truth[False], rtol=1e-7, atol=0)


def test_neither_the_batch_nor_the_order_changes_results():
    """With a generator for each example, though nothing has converged."""
    images = torch.randint(0, 256, (6, 2, 4, 4), dtype=torch.uint8, generator=seeded(1))
    split = Split(images, torch.arange(6) % 3)
    subject = Subject("m", "small", small_model(), "six", ImageData(split, split, ["a", "b", "c"], False))
    settings = {"num_iterations": 3, "tol": 0, "top_k": 2, "trace_probes": 2}
    tables = []
    for batch_size, direction in ((6, 1), (2, 1), (4, -1)):

        def columns(images, labels, generators, direction=direction):
            order = range(len(images))[::direction]
            generators = [generators[i] for i in order]
            found = estimate_curvature(subject.model, images[order], labels[order], generator=generators, **settings)
            return {name: column[order] for name, column in found.columns().items()}

        flags = argparse.Namespace(split="test", num_samples=6, batch_size=batch_size, prng_seed=3)
        tables += for_examples(subject, flags, columns)
        pd.testing.assert_frame_equal(tables[-1], tables[0], rtol=1e-9, atol=0)
    assert tables[0]["index"].tolist() == list(range(6))
    assert tables[0]["label"].tolist() == split.labels.tolist()


def test_examples_that_are_not_finite_are_nan_and_disturb_no_other():
    model, (x, y) = small_model(), examples(4)
    clean = estimate_curvature(model, x, y, generator=seeded())
    x[2, 0, 0, 0] = torch.nan
    estimate = estimate_curvature(model, x, y, generator=seeded())
    assert estimate.converged.tolist() == [True, True, False, True]
    clean.curvature[2] = torch.nan
    torch.testing.assert_close(estimate.curvature, clean.curvature, rtol=1e-3, atol=0, equal_nan=True)


def test_leaves_the_model_and_torch_as_they_were_even_when_it_fails():
    model, (x, y) = small_model(), examples(2)
    model[1].eval()
    model[0].weight.requires_grad_(False)
    model[4].weight.grad = torch.ones_like(model[4].weight)
    state, inside = copy.deepcopy(model.state_dict()), set()

    def tf32() -> tuple[bool, bool]:
        return torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32

    model.register_forward_hook(lambda *_: inside.add(tf32()))
    estimate_curvature(model, x, y)
    assert inside == {(False, False)}
    for _ in range(2):
        assert [m.training for m in model] == [True, False, True, True, True]
        assert [p.requires_grad for p in model.parameters()] == [False, True, True, True, True, True]
        assert torch.equal(model[4].weight.grad, torch.ones_like(model[4].weight))
        assert model[0].bias.grad is None
        assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
        assert tf32() == (True, False)  # torch's own
        with pytest.raises(RuntimeError):
            estimate_curvature(model, x[:, :1], y)
    assert not x.requires_grad


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "magic"}, "magic.*lanczos, power"),
        ({"labels": torch.tensor([0, 3])}, "has 3 classes"),
        ({"labels": torch.tensor([-1, 0])}, "has 3 classes"),
        ({"labels": torch.tensor([0])}, r"labels of shape \(1,\)"),
        ({"images": torch.zeros(2, 4, 4), "labels": torch.tensor(0)}, r"labels of shape \(\).*images\[None\]"),
        ({"labels": torch.rand(2)}, "labels of shape"),
        ({"labels": [0, 1]}, "types Tensor and list"),
        ({"images": torch.zeros(2, 2, 4, 4, dtype=torch.uint8)}, "of shape"),
        ({"images": torch.zeros(0, 2, 4, 4), "labels": torch.arange(0)}, "of shape"),
        ({"num_iterations": 0}, "num_iterations must be at least 1"),
        ({"top_k": 0}, "top_k must be at least 1"),
        ({"tol": float("nan")}, "tol must be at least 0"),
    ],
)
def test_arguments_are_checked(changes, message):
    x, y = examples(2)
    with pytest.raises(ValueError, match=message):
        estimate_curvature(small_model(), **({"images": x, "labels": y} | changes))


def test_the_chosen_examples_are_exactly_as_many_and_each_once():
    assert choose_examples(10, 11, seed=0).tolist() == list(range(10))
    chosen = choose_examples(1000, 100, seed=0).tolist()
    assert len(chosen) == 100
    assert chosen == sorted(set(chosen) & set(range(1000)))
    assert chosen != list(range(100))
