"""Networks as people bring them: each is trained, resumed and measured, or one line says what is wrong."""

import copy
import sys

import pandas as pd
import pytest
import torch
from conftest import assert_one_line_error, run_main

import estimate_curvature
import train_models
from curvature.estimate import estimate_curvature as estimate
from experiments import evaluate_robustness
from models.checkpoint import load_model
from models.outside import build_outside_network, check_training
from regularized_loss import CELoss, regularizers

USER_FILE = """
import torch
import torch.nn.functional as F
from torch import nn

torch.set_grad_enabled(False)  # as scripts do that only evaluate
torch.set_default_dtype(torch.float64)
torch.set_float32_matmul_precision("medium")
torch.backends.cudnn.benchmark = True

class Tiny(nn.Module):
    def __init__(self, num_classes=10):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, momentum=0.3), nn.Softplus(beta=8))
        self.classifier = nn.Linear(8, num_classes)

    def forward(self, x):
        return self.classifier(self.features(x).mean(dim=(2, 3)))

def tiny(num_classes):  # in float64, the default here
    return Tiny(num_classes)

class Autocast(Tiny):
    def forward(self, x):
        with torch.autocast(x.device.type, dtype=torch.bfloat16):
            return super().forward(x)

class AutocastThenFloat(Autocast):
    def forward(self, x):
        return super().forward(x).float()

class Extra(Tiny):
    steps = 0

    def forward(self, x):
        self.steps += self.training
        return super().forward(x)

    def get_extra_state(self):
        return {"steps": self.steps}

    def set_extra_state(self, state):
        self.steps = state["steps"]

class Unsavable(Tiny):
    def get_extra_state(self):
        return {"config": Unsavable}

    def set_extra_state(self, state):
        pass

class Attention(Tiny):
    def __init__(self, num_classes):
        super().__init__(num_classes)
        self.qkv = nn.Linear(8, 24)

    def forward(self, x):
        q, k, v = self.qkv(self.features(x)[:, :, ::2, ::2].flatten(2).transpose(1, 2))[:, None].chunk(3, dim=-1)
        return self.classifier(F.scaled_dot_product_attention(q, k, v)[:, 0].mean(dim=1))

class Auxiliary(Tiny):
    def forward(self, x):
        logits = super().forward(x)
        return (logits, logits) if self.training else logits

class WithoutGradient(Tiny):
    @torch.no_grad()
    def forward(self, x):
        return super().forward(x)

class Exits(Tiny):
    def forward(self, x):
        raise SystemExit(3)

class Unconnected(Tiny):  # as quantized layers are: a gradient, but not of the parameters
    def forward(self, x):
        return super().forward(x).detach().requires_grad_()

class NoModes(Tiny):  # as torch.export's
    def train(self, mode=True):
        raise NotImplementedError("no train()")

class LazyInTraining(Tiny):
    def __init__(self, num_classes):
        super().__init__(num_classes)
        self.auxiliary = nn.LazyLinear(num_classes)

class CompiledForward(Tiny):
    @torch.compile(backend="aot_eager")
    def forward(self, x):
        return super().forward(x)

class CompiledPart(Tiny):
    def forward(self, x):
        return super().forward(torch.compile(F.softplus, backend="aot_eager")(x))

def frozen(num_classes):
    return Tiny(num_classes).requires_grad_(False)

def meta():
    with torch.device("meta"):
        return Tiny()

def inplace():
    return nn.Sequential(nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(768, 10))  # torch's layers alone

def lazy():
    head = nn.Flatten(), nn.LazyLinear(10)
    return nn.Sequential(nn.LazyConv2d(8, 3), nn.LazyBatchNorm2d(), nn.ReLU(), nn.AvgPool2d(7), *head)

def old_weight_norm():
    model = Tiny()
    nn.utils.weight_norm(model.features[0])
    return model

def compiled():
    return torch.compile(Tiny(), backend="aot_eager")

def compiled_parts():
    model = Tiny()
    model.features = torch.compile(model.features, backend="aot_eager")
    model.compile(backend="aot_eager")
    return model

def scripted():
    return torch.jit.script(Tiny())

def for_28():
    return nn.Sequential(nn.Conv2d(3, 6, 5, 4), nn.Tanh(), nn.Flatten(), nn.Linear(6 * 6 * 6, 10))
"""


@pytest.fixture
def brought(users_file):
    """The current directory, with brought.py in it."""
    return users_file("brought", USER_FILE)


def train(name: str, capsys, *flags):
    sys.modules.pop("brought", None)  # every process imports it anew
    given = ["--model-arch", f"brought:{name}", "--dataset", "digits", "--batch-size", 256, "--num-epochs", 2]
    return run_main(train_models, [*given, "--output-dir", "runs", *flags], capsys)


WORKING = [("Autocast", "none"), ("AutocastThenFloat", "gnorm"), ("Extra", "none"), ("Attention", "gnorm")]
WORKING += [
    ("tiny", "gnorm"),
    ("lazy", "gnorm"),
    ("compiled", "gnorm"),
    ("compiled_parts", "cure"),
    ("for_28", "gnorm"),
]
WORKING += [("lazy", "curvature"), ("old_weight_norm", "curvature")]


@pytest.mark.filterwarnings("ignore")  # torch's own, of lazy layers and old weight_norm
@pytest.mark.parametrize(("name", "regularizer"), WORKING)
def test_trained_and_measured(brought, capsys, name, regularizer):
    size = ["--image-size", 28] if name == "for_28" else []
    lcnn = ["--lcnn"] if regularizer == "curvature" else []
    result = train(name, capsys, "--regularizer", regularizer, *size, *lcnn)
    assert result.returncode == 0, result.stderr
    assert torch.is_grad_enabled()
    assert torch.get_default_dtype() == torch.float32
    (path,) = (brought / "runs").glob("*.pt")
    subject = ["--model-arch", f"brought:{name}", "--model-filename", path, "--split", "test", "--num-samples", 4]
    measuring = [*subject, "--num-power-iter", 60, "--output", "curvature.csv"]
    result = run_main(estimate_curvature, measuring, capsys)
    assert result.returncode == 0, result.stderr
    rows = pd.read_csv("curvature.csv")
    assert (rows["curvature"] > 0).all()
    # bfloat16 rounds to 1/256: what is computed in it cannot be known to 1e-3
    assert rows["converged"].all() != name.startswith("Autocast")
    if name == "Autocast":
        few = ["--pgd-steps", 1, "--restarts", 1, "--deltas", 0.1, "--draws", 1, "--output", "robustness.csv"]
        assert run_main(evaluate_robustness, [*subject, *few], capsys).returncode == 0


class CopyingLoss(CELoss):
    """It keeps the network's first weights."""

    def __init__(self, model):
        super().__init__(model)
        self.first = copy.deepcopy(model).requires_grad_(False)


@pytest.mark.filterwarnings("ignore")
def test_a_loss_may_copy_a_network_with_the_old_weight_norm(brought, capsys, monkeypatch):
    monkeypatch.setitem(regularizers, "none", lambda model, flags: CopyingLoss(model))
    result = train("old_weight_norm", capsys)
    assert result.returncode == 0, result.stderr


REFUSED = {
    "Auxiliary": "gives a tuple of 2 outputs in training mode; return the tensor of logits alone",
    "frozen": "nothing is trainable; set requires_grad",
    "WithoutGradient": "gives logits without gradient in training; remove any no_grad or detach",
    "Unsavable": "its state cannot be saved and loaded",
    "scripted": "returns TorchScript",
    "Exits": "fails on images of shape (2, 3, 16, 16) (SystemExit: 3)",
    "Unconnected": "gives logits without gradient in training",
    "NoModes": "has no eval mode",
    "LazyInTraining": "does not initialize the lazy auxiliary.weight; give that layer its sizes",
    "meta": "meta device",
    "inplace": "inplace=False",
    "CompiledPart": "leave torch.compile out of it",
    "CompiledForward": "leave torch.compile out of it",
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "words"), REFUSED.items())
def test_refused_before_the_first_epoch(brought, capsys, name, words):
    result = train(name, capsys, "--regularizer", "gnorm")
    assert_one_line_error(result, 2 if name == "scripted" else 1, f"brought:{name}", words)
    assert not (brought / "runs").exists()


def test_what_an_import_sets_in_torch_is_put_back(brought):
    def settings():
        cudnn = torch.backends.cudnn
        precision = torch.get_float32_matmul_precision(), cudnn.benchmark, cudnn.allow_tf32
        return torch.is_grad_enabled(), torch.get_default_dtype(), *precision

    before = settings()
    build_outside_network("brought:tiny", 10, 16)
    assert settings() == before


def test_the_check_leaves_the_network_as_it_was(brought):
    model = build_outside_network("brought:tiny", 10, 16).float()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    check_training(model, torch.rand(2, 3, 16, 16), 10, "tiny")
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert not model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    random, dropout = torch.get_rng_state(), torch.nn.Sequential(torch.nn.Dropout(), model)
    dropout.register_buffer("unsaved", torch.zeros(1), persistent=False)
    dropout.register_forward_pre_hook(lambda module, _: setattr(module, "unsaved", module.unsaved + 1))
    check_training(dropout, torch.rand(2, 3, 16, 16, generator=torch.Generator()), 10, "dropout")
    assert torch.equal(torch.get_rng_state(), random)
    assert not dropout.unsaved
    model = build_outside_network("brought:Extra", 10, 16).float()
    check_training(model, torch.rand(2, 3, 16, 16), 10, "Extra")
    assert model.steps == 0


def test_extra_state_is_resumed_and_the_networks_own_momentum_stays(brought, capsys, monkeypatch):
    """An interrupted run ends with the bits of one that was not."""
    evaluations = iter([train_models.evaluate])
    with monkeypatch.context() as patched:  # the second epoch has no evaluation: StopIteration stands for Ctrl-C
        patched.setattr(train_models, "evaluate", lambda *a: next(evaluations)(*a))
        with pytest.raises(StopIteration):
            train("Extra", capsys)
    assert train("Extra", capsys, "--resume").returncode == 0
    assert train("Extra", capsys, "--output-dir", "whole").returncode == 0
    resumed, whole = (load_model(brought / f / "brought.Extra_digits.pt", "brought:Extra") for f in ("runs", "whole"))
    assert resumed.steps == whole.steps == 12  # 6 batches, 2 epochs
    assert resumed.features[1].momentum == 0.3
    assert all(torch.equal(a, b) for a, b in zip(resumed.parameters(), whole.parameters(), strict=True))


def test_losses_computed_under_autocast_are_summed_in_float32(brought, capsys):
    """Almost without learning, train and test loss are near ln 10; a sum of 180 terms in bfloat16 is 16 % off."""
    flags = ["--lr", 1e-6, "--batch-size", 8, "--num-epochs", 1, "--measure-curvature", 4]
    assert train("Autocast", capsys, *flags).returncode == 0
    (row,) = pd.read_csv(brought / "runs" / "brought.Autocast_digits_metrics.csv").to_dict("records")
    assert row["train_loss"] == pytest.approx(row["test_loss"], rel=0.02)


def test_our_networks_keep_their_multiple_of_16(capsys, tmp_path):
    flags = ["--dataset", "digits", "--image-size", 28, "--output-dir", tmp_path]
    assert_one_line_error(run_main(train_models, flags, capsys), 2, "--image-size 28", "resnet18", "multiple of 16")


def test_an_autocast_estimate_is_near_that_in_float32(brought):
    torch.manual_seed(0)
    model = build_outside_network("brought:Autocast", 10, 16).float()
    plain = build_outside_network("brought:tiny", 10, 16).float()
    plain.load_state_dict(model.state_dict())
    images, labels = torch.rand(3, 3, 16, 16), torch.tensor([0, 4, 9])
    low, full = (estimate(network, images, labels, num_iterations=30) for network in (model, plain))
    torch.testing.assert_close(low.hessian_norm, full.hessian_norm, rtol=0.05, atol=0)
    assert full.converged.all()
    assert not low.converged.any()
