"""The reference code's own numbers, reached by reading its checkpoints. Weights and inputs are rebuilt from seeds."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import assert_one_line_error, run_main

import estimate_curvature as estimate_curvature_script
from curvature.estimate import estimate_curvature
from models.checkpoint import load_model
from models.model_selector import model_architecture
from models.reference import our_key
from regularized_loss import (
    CELoss,
    CurvatureAndGradientRegularizedLoss,
    CurvatureRegularizedLoss,
    GradNormRegularizedLoss,
)
from utils.errors import UsageError, UserError

GOLDEN = Path(__file__).parent / "golden"
NAMES = ["resnet18", "resnet18lcnn", "vgg11lcnn"]


def rebuild_state_dict(golden, meta: dict) -> dict[str, torch.Tensor]:
    """The reference's state_dict. ``rules`` has its keys in order, with how to make each value: drawn from a seeded
    RandomState, stored, zero, or (power) the vectors of a spectral norm, iterated 60 times on the reference's domain.
    """
    state = {}
    for key, shape, kind, *arguments in meta["rules"]:
        if kind == "normal":
            state[key] = torch.from_numpy(np.random.RandomState(arguments[0]).standard_normal(shape) * arguments[1])
        elif kind == "uniform":
            value = np.random.RandomState(arguments[0]).uniform(*arguments[1:])
            state[key] = torch.tensor(value, dtype=torch.float64)
        elif kind == "stored":
            state[key] = torch.from_numpy(golden[f"state/{key}"])
        else:
            state[key] = torch.zeros(shape, dtype=torch.int64 if kind == "zero" else torch.float64)
    for k, (module, power) in enumerate(meta["power"].items()):
        weight = state[module.removesuffix(".0") + ".original"]
        geometry = {"stride": power["stride"], "padding": power["padding"]}
        u = torch.from_numpy(np.random.RandomState(9000 + k).standard_normal(power["u"]))
        u /= u.norm()
        for _ in range(60):
            v = F.conv_transpose2d(u, weight, **geometry)
            v /= v.norm()
            u = F.conv2d(v, weight, **geometry)
            u /= u.norm()
        state[f"{module}._u"], state[f"{module}._v"] = u, v
    if "7.parametrizations.weight.original" in state:
        left, _, right = torch.linalg.svd(state["7.parametrizations.weight.original"], full_matrices=False)
        state["7.parametrizations.weight.0._u"], state["7.parametrizations.weight.0._v"] = left[:, 0], right[0]
    return state


@pytest.fixture(scope="module", params=NAMES)
def reference(request, tmp_path_factory):
    """(name, golden arrays, meta, x, y, path of the checkpoint in float32, {dtype: the model it is read as})"""
    golden = np.load(GOLDEN / f"{request.param}.npz")
    meta = json.loads(str(golden["meta"]))
    state = rebuild_state_dict(golden, meta)
    path, models = tmp_path_factory.mktemp(request.param) / "reference.pt", {}
    for dtype in (torch.float64, torch.float32):
        torch.save({k: v.to(dtype) if v.is_floating_point() else v for k, v in state.items()}, path)
        models[dtype] = load_model(path)
    x = torch.from_numpy(np.random.RandomState(5000).random_sample((meta["n"], 3, 32, 32)))
    y = torch.from_numpy(np.random.RandomState(5001).randint(0, meta["num_classes"], meta["n"]))
    return request.param, golden, meta, x, y, path, models


def golden_losses(model, n: int) -> dict:
    """The losses as recorded; the reference's gradnorm is (128/N)^2 times ours."""
    scale = (128 / n) ** 2
    losses = {"none": CELoss(model), "gnorm": GradNormRegularizedLoss(model, 1e-3 * scale)}
    if any("log_beta" in name for name, _ in model.named_parameters()):
        losses["curvature"] = CurvatureRegularizedLoss(model, (1e-2, 1e-2))
        losses["curvature_and_gnorm"] = CurvatureAndGradientRegularizedLoss(model, (1e-2, 1e-2, 1e-2 * scale))
    return losses


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_logits_losses_and_gradients(reference, dtype):
    name, golden, meta, x, y, _, models = reference
    x, n, rtol = x.to(dtype), meta["n"], 1e-8 if dtype == torch.float64 else 1e-4
    model = models[dtype]
    assert not model.training
    assert next(model.parameters()).dtype == dtype
    # an entry's absolute error counts against the largest one: float32 rounding does not shrink with a small logit
    expected = torch.from_numpy(golden["logits"])
    torch.testing.assert_close(model(x).double(), expected, rtol=0, atol=rtol * expected.abs().max().item())

    # in float32 the second derivatives behind Softplus(beta=1000) are good to some 3e-3, for the reference too
    gnorm_rtol = 3e-3 if (name, dtype) == ("resnet18", torch.float32) else rtol
    for loss_name, loss in golden_losses(model, n).items():
        total = loss.compute_loss(x, y)
        loss_rtol = gnorm_rtol if "gnorm" in loss_name else rtol
        assert total.item() == pytest.approx(golden[f"{loss_name}/total"].item(), rel=loss_rtol), loss_name
        for term, value in loss.metadata.items():
            value *= (128 / n) ** 2 if term == "gradnorm" else 1
            assert value == pytest.approx(golden[f"{loss_name}/{term}"].item(), rel=loss_rtol), (loss_name, term)
    total.backward()  # the last loss has every term there is
    gradients = {key: parameter.grad.double() for key, parameter in model.named_parameters()}
    recorded = [file for file in golden.files if file.startswith(f"{loss_name}/param_grad_norm/")]
    assert len(recorded) >= 20
    for file in recorded:
        key = file.split("/")[-1]
        if name.startswith("vgg") and "log_beta" in key:  # one beta there, one per activation here
            ours = sum(gradient for other, gradient in gradients.items() if "log_beta" in other)
        else:
            ours = gradients[our_key(key, name)]
        # u and v of strided convolutions are recomputed on the true domain, so their weights' gradients differ
        strided = name == "resnet18lcnn" and any(f"{stage}.0.1.f" in key for stage in (2, 3, 4)) and "weight" in key
        assert ours.norm().item() == pytest.approx(golden[file].item(), rel=1e-3 if strided else gnorm_rtol), file


def test_reading_is_repeatable(reference):
    name, *_, path, models = reference
    again = load_model(path, name).state_dict()
    assert all(torch.equal(again[key], value) for key, value in models[torch.float32].state_dict().items())


def test_curvature(reference):
    """Converged; and after fewer products than the reference's 11, closer than it comes."""
    _, golden, _, x, y, _, models = reference
    model, x, y, truth = models[torch.float64], x[:2], y[:2], golden["hessian_top_eigenvalue"][:2]

    def estimate(num_iterations: int, tol: float):
        generator = torch.Generator().manual_seed(0)
        return estimate_curvature(model, x, y, num_iterations=num_iterations, tol=tol, generator=generator)

    converged = estimate(60, tol=1e-4)
    assert converged.converged.all()
    np.testing.assert_allclose(converged.gradient_norm, golden["gradient_norm"][:2], rtol=1e-8)
    np.testing.assert_allclose(converged.eigenvalue, truth, rtol=1e-6)
    np.testing.assert_allclose(converged.curvature, golden["curvature"][:2], rtol=1e-6)

    shortfall = 1 - estimate(6, tol=0).hessian_norm.numpy() / np.abs(truth)
    assert (shortfall > -1e-6).all()
    reference_shortfall = 1 - golden["reference_power10_hessian_norm"][:2] / np.abs(truth)
    assert shortfall.mean() < reference_shortfall.mean()


def reference_key(key: str, arch: str) -> str:
    """The reference's name for a standard network's key; written down apart from the product's own translation."""
    if key.startswith("classifier"):
        return ("25." if arch == "vgg11" else "7.") + key.removeprefix("classifier.")
    path, kind, name = key.rsplit(".", 2)
    path = path.removeprefix("features.").replace("stem", "0.0")
    if stage := re.fullmatch(r"stages\.(\d)\.(\d)\.(\w+)", path):
        part = {"conv1": "1.f1", "shortcut": "1.f2", "conv2": "3.f1"}
        path = f"{int(stage[1]) + 1}.{stage[2]}.{part[stage[3]]}"
    return f"{path}.{kind.replace('norm', 'bn')}.{name}"


@pytest.mark.parametrize("arch", ["vgg11", "resnet34"])
def test_the_other_architectures_are_recognized(arch, tmp_path):
    ours = model_architecture[arch](10).state_dict()
    state = {}
    for key, value in ours.items():
        if value.is_floating_point():
            value.uniform_()
        state[reference_key(key, arch)] = value
        if key.endswith("running_mean"):  # there, standard networks carry an unused gamma
            state[reference_key(key, arch).replace("bn.running_mean", "log_lipschitz")] = torch.tensor(10.0).log()
    path = tmp_path / "reference.pt"
    torch.save(state, path)
    found = load_model(path).state_dict()
    assert found.keys() == ours.keys()
    assert all(torch.equal(found[key], value) for key, value in ours.items())
    with pytest.raises(UsageError, match=arch):
        load_model(path, "resnet18")
    state.pop(next(key for key in state if "running_mean" in key))
    torch.save(state, path)
    with pytest.raises(UserError, match="running_mean"):
        load_model(path, arch)


@pytest.mark.parametrize("reference", ["vgg11lcnn"], indirect=True)
def test_the_command_line_measures_a_reference_checkpoint(reference, photographs, capsys):
    flags = ["--model-filename", reference[-2], "--num-power-iter", 1, "--data-fraction", 0.001]

    def run(*more):
        return run_main(estimate_curvature_script, [*flags, *more], capsys)

    result = run("--dataset", "digits", "--layers")
    assert all(words in result.stdout for words in ("vgg11lcnn on digits", "test, 1 examples", "layer by layer"))
    # the photographs have 2 classes, the checkpoint 10; the reference's default data set is CIFAR-100
    refused = run("--dataset", "imagefolder", "--data-dir", photographs)
    assert_one_line_error(refused, 2, "10 classes", "--dataset")
    assert_one_line_error(run("--data-dir", "nowhere"), 1, "cifar-100-python")
