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
from models.layers import SpectralNormConv2d
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
    """(name, golden arrays, meta, x, y, {dtype: path of the checkpoint})"""
    golden = np.load(GOLDEN / f"{request.param}.npz")
    meta = json.loads(str(golden["meta"]))
    state = rebuild_state_dict(golden, meta)
    paths = {}
    for dtype in (torch.float64, torch.float32):
        paths[dtype] = tmp_path_factory.mktemp(request.param) / f"{dtype}.pt"
        torch.save({k: v.to(dtype) if v.is_floating_point() else v for k, v in state.items()}, paths[dtype])
    x = torch.from_numpy(np.random.RandomState(5000).random_sample((meta["n"], 3, 32, 32)))
    y = torch.from_numpy(np.random.RandomState(5001).randint(0, meta["num_classes"], meta["n"]))
    return request.param, golden, meta, x, y, paths


def golden_losses(model, n: int) -> dict:
    """The losses as recorded; the reference's gradnorm is (128/N)^2 times ours."""
    scale = (128 / n) ** 2
    losses = {"none": CELoss(model), "gnorm": GradNormRegularizedLoss(model, 1e-3 * scale)}
    if any("log_beta" in name for name, _ in model.named_parameters()):
        losses["curvature"] = CurvatureRegularizedLoss(model, (1e-2, 1e-2))
        losses["curvature_and_gnorm"] = CurvatureAndGradientRegularizedLoss(model, (1e-2, 1e-2, 1e-2 * scale))
    return losses


def recorded_gradient_norms(name: str, golden, loss_name: str, model) -> dict[str, tuple[float, float]]:
    """reference parameter -> (recorded norm, ours), for every parameter that plays a part in both."""
    ours = {key: parameter.grad.double() for key, parameter in model.named_parameters()}
    pairs = {}
    for recorded in golden.files:
        if not recorded.startswith(f"{loss_name}/param_grad_norm/"):
            continue
        key = recorded.split("/")[-1]
        if name.startswith("vgg") and "log_beta" in key:  # one beta there, one per activation here
            norm = sum(gradient for other, gradient in ours.items() if "log_beta" in other).norm()
        else:
            norm = ours[our_key(key, name)].norm()
        pairs[key] = float(golden[recorded]), norm.item()
    assert len(pairs) >= 20
    return pairs


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_logits_losses_and_gradients(reference, dtype):
    name, golden, meta, x, y, paths = reference
    x, n, rtol = x.to(dtype), meta["n"], 1e-8 if dtype == torch.float64 else 1e-4
    model = load_model(paths[dtype])
    assert not model.training
    assert next(model.parameters()).dtype == dtype
    # an entry's absolute error counts against the largest one: float32 rounding does not shrink with a small logit
    expected = torch.from_numpy(golden["logits"])
    torch.testing.assert_close(model(x).double(), expected, rtol=0, atol=rtol * expected.abs().max().item())

    # in float32 the second derivatives behind Softplus(beta=1000) are good to some 3e-3, for the reference too
    gnorm_rtol = 3e-3 if (name, dtype) == ("resnet18", torch.float32) else rtol
    losses = golden_losses(model, n)
    for loss_name, loss in losses.items():
        total = loss.compute_loss(x, y)
        loss_rtol = gnorm_rtol if "gnorm" in loss_name else rtol
        assert total.item() == pytest.approx(golden[f"{loss_name}/total"].item(), rel=loss_rtol), loss_name
        for term, value in loss.metadata.items():
            value *= (128 / n) ** 2 if term == "gradnorm" else 1
            assert value == pytest.approx(golden[f"{loss_name}/{term}"].item(), rel=loss_rtol), (loss_name, term)
    total.backward()  # the last loss has every term there is
    for key, (recorded, ours) in recorded_gradient_norms(name, golden, loss_name, model).items():
        # u and v of strided convolutions are recomputed on the true domain, so their weights' gradients differ
        strided = name == "resnet18lcnn" and any(f"{stage}.0.1.f" in key for stage in (2, 3, 4)) and "weight" in key
        assert ours == pytest.approx(recorded, rel=1e-3 if strided else gnorm_rtol), (loss_name, key)


def test_curvature(reference):
    """Through the folded network, converged; after fewer products than the reference's 11, closer than it comes."""
    _, golden, _, x, y, paths = reference
    model = load_model(paths[torch.float64])

    def estimate(num_iterations: int, tol: float = 0, n: int = 3, **settings):
        generator = torch.Generator().manual_seed(0)
        return estimate_curvature(
            model, x[:n], y[:n], num_iterations=num_iterations, tol=tol, generator=generator, **settings
        )

    converged = estimate(60, tol=1e-5)
    assert converged.converged.all()
    np.testing.assert_allclose(converged.gradient_norm, golden["gradient_norm"], rtol=1e-8)
    truth = golden["hessian_top_eigenvalue"]
    np.testing.assert_allclose(converged.eigenvalue, truth, rtol=1e-6)
    np.testing.assert_allclose(converged.curvature, golden["curvature"], rtol=1e-6)

    shortfall = 1 - estimate(6).hessian_norm.numpy() / np.abs(truth)
    assert (shortfall > -1e-6).all()
    reference_shortfall = 1 - golden["reference_power10_hessian_norm"] / np.abs(truth)
    assert shortfall.mean() < reference_shortfall.mean()

    # by double backward the steps are the same, so a few of them and one image suffice to tell
    folded, plain = (estimate(3, n=1, use_folding=use_folding) for use_folding in (True, False))
    np.testing.assert_allclose(plain.gradient_norm, golden["gradient_norm"][:1], rtol=1e-8)
    np.testing.assert_allclose(plain.eigenvalue, folded.eigenvalue, rtol=1e-6)


def test_what_the_reference_trained_is_recognized(reference, tmp_path):
    name, _, _, _, _, paths = reference
    path = paths[torch.float32]
    first, second = load_model(path, name).state_dict(), load_model(path).state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)  # reading is repeatable
    with pytest.raises(UsageError, match=name):
        load_model(path, "resnet34")
    state = torch.load(path)
    state.pop(next(key for key in state if "running_mean" in key))
    torch.save(state, tmp_path / "part.pt")
    with pytest.raises(UserError, match="running_mean"):
        load_model(tmp_path / "part.pt", name)


def reference_key(key: str, arch: str) -> str:
    """The reference's name for one of our keys; written down apart from the product's own translation."""
    path, name = key.rsplit(".", 1)
    if path.startswith("classifier"):
        return ("25." if arch.startswith("vgg") else "7.") + key.removeprefix("classifier.")
    if name in ("u", "v"):
        name = f"parametrizations.weight.0._{name}"
    elif name == "weight" and arch.endswith("lcnn"):
        name = "parametrizations.weight.original"
    name = {"log_gamma": "log_lipschitz"}.get(name, f"bn.{name}" if path.endswith(".norm") else name)
    name = f"conv.{name}" if path.endswith(".conv") else name
    path = re.sub(r"\.(conv|norm)$", "", path)
    path = {"stem": "0.0", "activation": "0.1"}.get(path, path).removeprefix("features.")
    if stage := re.fullmatch(r"stages\.(\d)\.(\d)\.(\w+)", path):
        part = {"conv1": "1.f1", "shortcut": "1.f2", "activation1": "2.f1", "conv2": "3.f1", "activation2": "5"}
        path = f"{int(stage[1]) + 1}.{stage[2]}.{part[stage[3]]}"
    return f"{path}.{name}"


@pytest.mark.parametrize("arch", ["vgg11", "resnet34", "resnet34lcnn"])
def test_the_other_architectures(arch, tmp_path):
    """A checkpoint with the reference's keys and domains, against the same network evaluated with its sigmas."""
    torch.manual_seed(0)
    ours = model_architecture[arch](10).eval()
    with torch.no_grad():
        for name, buffer in ours.named_buffers():
            if name.endswith("running_var"):
                buffer.uniform_(0.5, 1.5)
    state = {}
    for key, value in ours.state_dict().items():
        state[reference_key(key, arch)] = value.clone()
        if "lcnn" not in arch and key.endswith("running_mean"):  # there, standard networks carry an unused gamma
            state[reference_key(key, arch).replace("bn.running_mean", "log_lipschitz")] = torch.tensor(10.0).log()
    for name, layer in ours.named_modules():
        if isinstance(layer, SpectralNormConv2d) and layer.stride == (2, 2):
            weight, geometry = layer.weight.detach(), {"stride": 2, "padding": layer.padding}
            u = torch.randn(1, layer.out_channels, *layer.input_size)
            for _ in range(3):  # far from converged, as a reference's may be
                v = F.normalize(F.conv_transpose2d(u, weight, **geometry), dim=(1, 2, 3))
                u = F.normalize(F.conv2d(v, weight, **geometry), dim=(1, 2, 3))
            key = reference_key(f"{name}.weight", arch).removesuffix("original")
            state[f"{key}0._u"], state[f"{key}0._v"] = u, v
            sigma = (u * F.conv2d(v, weight, **geometry)).sum()
            layer.forward = lambda x, w=weight / sigma, g=geometry: F.conv2d(x, w, **g)
    torch.save(state, tmp_path / "reference.pt")
    x = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(load_model(tmp_path / "reference.pt", arch)(x), ours(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reference", ["vgg11lcnn"], indirect=True)
def test_the_command_line_measures_a_reference_checkpoint(reference, photographs, capsys):
    flags = ["--model-filename", reference[-1][torch.float32], "--num-power-iter", 1, "--data-fraction", 0.001]
    result = run_main(estimate_curvature_script, [*flags, "--dataset", "digits"], capsys)
    assert "vgg11lcnn on digits" in result.stdout
    assert "test, 1 examples" in result.stdout
    # the photographs have 2 classes, the checkpoint 10; the reference's default data set is CIFAR-100
    result = run_main(
        estimate_curvature_script, [*flags, "--dataset", "imagefolder", "--data-dir", photographs], capsys
    )
    assert_one_line_error(result, 2, "10 classes", "--dataset")
    result = run_main(estimate_curvature_script, [*flags, "--data-dir", "nowhere"], capsys)
    assert_one_line_error(result, 1, "cifar-100-python")
