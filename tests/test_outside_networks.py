"""Networks of other projects, as people bring them: each is trained, resumed and measured by the scripts, as it is or
made low-curvature by --lcnn, or one line says what is wrong."""

import copy
import sys

import pandas as pd
import pytest
import torch
import torchvision
from conftest import assert_one_line_error, run_main
from torch import nn

import estimate_curvature
import train_models
from curvature.estimate import estimate_curvature as estimate
from experiments import evaluate_robustness
from models.checkpoint import load_model, read_checkpoint
from models.layers import CenteredSoftplus
from models.outside import build_outside_network, check_training
from regularized_loss import GradNormRegularizedLoss, regularizers
from tests.test_command_line import states_equal

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

class Autocast(Tiny):
    def forward(self, x):
        with torch.autocast(x.device.type, dtype=torch.bfloat16):
            return super().forward(x)

class AutocastThenFloat(Autocast):
    def forward(self, x):
        return super().forward(x).float()

class Remembers(Tiny):
    # extra state, and buffers: in float64 for its own reasons, None until the first batch, and not saved
    steps = 0

    def __init__(self, num_classes):
        super().__init__(num_classes)
        self.float().register_buffer("seen", torch.zeros((), dtype=torch.float64))
        self.register_buffer("mean", None)
        self.register_buffer("unsaved", torch.zeros(()), persistent=False)

    def forward(self, x):
        if self.training:
            self.steps += 1
            self.seen += len(x)
            self.unsaved += 1
            new = F.dropout(x.detach()).mean((0, 2, 3))[:, None, None]
            self.mean = new if self.mean is None else self.mean.lerp(new, 0.5)
        return super().forward(x if self.mean is None else x - self.mean)

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
        q, k, v = self.qkv(self.features(x)[:, :, ::4, ::4].flatten(2).transpose(1, 2))[:, None].chunk(3, dim=-1)
        return self.classifier(F.scaled_dot_product_attention(q, k, v)[:, 0].mean(dim=1))

class Auxiliary(Tiny):
    def forward(self, x):
        logits = super().forward(x)
        return (logits, logits) if self.training else logits

class WithoutGradient(Tiny):
    @torch.no_grad()
    def forward(self, x):
        return super().forward(x)

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

def hard():  # torch has no second derivative for it
    return nn.Sequential(nn.Conv2d(3, 4, 3, 4), nn.Hardsigmoid(), nn.Flatten(), nn.Linear(64, 10))

def lazy():
    head = nn.Flatten(), nn.LazyLinear(10)
    return nn.Sequential(nn.LazyConv2d(8, 3), nn.LazyBatchNorm2d(), nn.ReLU(), nn.AvgPool2d(7), *head)

def old_weight_norm():
    model = Tiny()
    nn.utils.weight_norm(model.features[0])
    return model

def compiled():
    model = Tiny()
    model.features = torch.compile(model.features, backend="aot_eager")
    model.compile(backend="aot_eager")
    return torch.compile(model, backend="aot_eager")

def scripted():
    return torch.jit.script(Tiny())
"""


@pytest.fixture
def brought(users_file):
    """The current directory, with brought.py in it."""
    return users_file("brought", USER_FILE)


def train(arch: str, capsys, *flags):
    sys.modules.pop("brought", None)  # every process imports it anew
    given = ["--model-arch", arch, "--dataset", "digits", "--batch-size", 256, "--num-epochs", 1]
    return run_main(train_models, [*given, "--output-dir", "runs", *flags], capsys)


class CopyingLoss(GradNormRegularizedLoss):
    """It keeps the network's first weights."""

    def __init__(self, model):
        super().__init__(model)
        self.first = copy.deepcopy(model).requires_grad_(False)


WORKING = [("AutocastThenFloat", "copying"), ("Attention", "gnorm"), ("compiled", "cure"), ("hard", "gnorm", "--lcnn")]
WORKING += [("lazy", "gnorm", "--image-size", 28), ("old_weight_norm", "copying"), ("Remembers", "none", "--augment")]
WORKING += [("old_weight_norm", "curvature", "--lcnn")]


@pytest.mark.filterwarnings("ignore")  # torch's own, of lazy layers and old weight_norm
@pytest.mark.parametrize(("name", "regularizer", "flags"), [(name, loss, flags) for name, loss, *flags in WORKING])
def test_trained_and_measured(brought, capsys, monkeypatch, name, regularizer, flags):
    monkeypatch.setitem(regularizers, "copying", lambda model, flags: CopyingLoss(model))
    result = train(f"brought:{name}", capsys, "--regularizer", regularizer, *flags)
    assert result.returncode == 0, result.stderr
    assert ("Hardsigmoid -> Sigmoid" in result.stdout) == (name == "hard")
    (path,) = (brought / "runs").glob("*.pt")
    subject = ["--model-arch", f"brought:{name}", "--model-filename", path, "--split", "test", "--num-samples", 2]
    measuring = [*subject, "--num-power-iter", 60, "--output", "curvature.csv"]
    result = run_main(estimate_curvature, measuring, capsys)
    assert result.returncode == 0, result.stderr
    rows = pd.read_csv("curvature.csv")
    assert (rows["curvature"] > 0).all()
    # bfloat16 rounds to 1/256: what is computed in it cannot be known to 1e-3
    assert rows["converged"].all() != name.startswith("Autocast")


def test_autocast_inside(brought, capsys):
    """Almost without learning, train and test loss are near ln 10; a sum of 180 terms in bfloat16 is 16 % off."""
    flags = ["--lr", 1e-6, "--batch-size", 8, "--measure-curvature", 4]
    assert train("brought:Autocast", capsys, *flags).returncode == 0
    (row,) = pd.read_csv(brought / "runs" / "brought.Autocast_digits_metrics.csv").to_dict("records")
    assert row["train_loss"] == pytest.approx(row["test_loss"], rel=0.02)
    flags = ["--model-arch", "brought:Autocast", "--model-filename", "runs/brought.Autocast_digits.pt"]
    flags += ["--num-samples", 2, "--pgd-steps", 1, "--restarts", 1, "--deltas", 0.1, "--draws", 1]
    assert run_main(evaluate_robustness, [*flags, "--output", "robustness.csv"], capsys).returncode == 0
    low, full = (build_outside_network(f"brought:{name}", 10, 16).float() for name in ("Autocast", "Tiny"))
    full.load_state_dict(low.state_dict())
    images, labels = torch.rand(3, 3, 16, 16), torch.tensor([0, 4, 9])
    found, expected = (estimate(network, images, labels, num_iterations=30) for network in (low, full))
    torch.testing.assert_close(found.hessian_norm, expected.hessian_norm, rtol=0.05, atol=0)
    assert expected.converged.all()
    assert not found.converged.any()


REFUSED = [
    ("brought:Auxiliary", [], 1, "gives a tuple of 2 outputs in training mode; return the tensor of logits alone"),
    ("brought:frozen", [], 1, "nothing is trainable; set requires_grad"),
    ("brought:WithoutGradient", [], 1, "gives logits without gradient in training; remove any no_grad or detach"),
    ("brought:Unsavable", [], 1, "its state cannot be saved and loaded"),
    ("brought:scripted", [], 2, "returns TorchScript"),
    ("brought:Unconnected", [], 1, "gives logits without gradient in training"),
    ("brought:NoModes", [], 1, "has no eval mode"),
    ("brought:LazyInTraining", [], 1, "does not initialize the lazy auxiliary.weight; give that layer its sizes"),
    ("brought:meta", [], 1, "meta device"),
    ("brought:inplace", [], 1, "inplace=False"),
    ("brought:CompiledPart", [], 1, "leave torch.compile out of it"),
    ("brought:CompiledForward", [], 1, "leave torch.compile out of it"),
    ("brought:hard", [], 1, "cannot be trained with GradNormRegularizedLoss"),
    ("brought:Tiny", ["--regularizer", "curvature"], 2, "trainable beta or gamma"),
    ("brought:Tiny", ["--regularizer", "curvature_and_gnorm"], 2, "trainable beta or gamma"),
    ("brought:Tiny", ["--regularizer", "hessian"], 2, "PyTorch's BatchNorm, InstanceNorm and LayerNorm cannot be"),
    ("brought:Tiny", ["--lcnn", "--regularizer", "curvature_bound"], 2, "not a low-curvature network of"),
    ("torch.nn:Identity", [], 1, "gives torch.float32 (2, 3, 16, 16)"),
    ("resnet18", ["--lcnn"], 2, "--lcnn is for"),
    ("resnet18", ["--beta-weight-decay", "0.1"], 2, "--beta-weight-decay needs"),
    ("no_such_net", [], 2, "neither package.module:callable nor one of resnet18"),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("arch", "flags", "code", "words"), REFUSED)
def test_refused_before_the_first_epoch(brought, capsys, arch, flags, code, words):
    assert_one_line_error(train(arch, capsys, "--regularizer", "gnorm", *flags), code, words)
    assert not (brought / "runs").exists()


def test_what_an_import_sets_in_torch_is_put_back(brought):
    def settings():
        cudnn = torch.backends.cudnn
        precision = torch.get_float32_matmul_precision(), cudnn.benchmark, cudnn.allow_tf32
        return torch.is_grad_enabled(), torch.get_default_dtype(), *precision

    before = settings()
    build_outside_network("brought:Tiny", 10, 16)
    assert settings() == before


def test_the_check_leaves_the_network_as_it_was(brought):
    model = build_outside_network("brought:Remembers", 10, 16)
    images, before, numbers = torch.rand(2, 3, 16, 16), copy.deepcopy(model.state_dict()), torch.get_rng_state()
    check_training(model, images, 10, "Remembers")
    assert states_equal(dict(model.state_dict()), dict(before))
    assert torch.equal(torch.get_rng_state(), numbers)
    assert model.mean is None
    assert not model.unsaved
    assert not model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_extra_state_and_buffers_are_resumed_and_the_networks_own_momentum_stays(brought, capsys, monkeypatch):
    """An interrupted run ends with the bits of one that was not."""
    evaluations = iter([train_models.evaluate])
    flags = ["brought:Remembers", capsys, "--num-epochs", 2]
    with monkeypatch.context() as patched:  # the second epoch has no evaluation: StopIteration stands for Ctrl-C
        patched.setattr(train_models, "evaluate", lambda *a: next(evaluations)(*a))
        with pytest.raises(StopIteration):
            train(*flags)
    assert train(*flags, "--resume").returncode == 0
    assert train(*flags, "--output-dir", "whole").returncode == 0
    paths = [brought / folder / "brought.Remembers_digits.pt" for folder in ("runs", "whole")]
    assert states_equal(*map(read_checkpoint, paths))
    resumed = load_model(paths[0], "brought:Remembers")
    assert resumed.steps == 12  # 6 batches, 2 epochs
    assert resumed.seen.dtype == torch.float64
    assert resumed.seen == 2 * 1437
    assert resumed.mean.shape == (3, 1, 1)
    assert resumed.features[1].momentum == 0.3


RESNET = "test_outside_networks:short_resnet"


def short_resnet(num_classes: int) -> nn.Module:
    """torchvision's resnet18 without its two widest stages."""
    model = torchvision.models.resnet18()
    model.layer3 = model.layer4 = nn.Identity()
    model.fc = nn.Linear(128, num_classes)
    return model


def test_torchvisions_resnet_made_low_curvature(photographs, tmp_path, capsys):
    """With the paper's loss; and whose code a file may run."""
    name = "test_outside_networks.short_resnetlcnn_curvature_and_gnorm_imagefolder"
    path, weights = tmp_path / f"{name}.pt", tmp_path / "weights.pt"
    data = ["--dataset", "imagefolder", "--data-dir", photographs, "--image-size", 32]
    flags = ["--regularizer", "curvature_and_gnorm", "--calibrate-batchnorm", "--bn-momentum", 0.9, "--lr", 0.001]
    flags += [*data, "--batch-size", 12, "--num-epochs", 1, "--output-dir", tmp_path, "--model-arch", RESNET, "--lcnn"]
    result = run_main(train_models, flags, capsys)
    assert result.returncode == 0, result.stderr
    (row,) = pd.read_csv(tmp_path / f"{name}_metrics.csv").to_dict("records")
    assert {"beta_term", "gamma_term", "gradnorm"} <= row.keys()
    assert row["beta_term"] == pytest.approx(9 * 5, rel=0.05)  # 9 activations, each with its own beta near 5
    assert "is finished" in run_main(train_models, [*flags, "--resume"], capsys).stdout

    def estimated(file, *more):
        few = ["--split", "test", "--num-samples", 2, "--num-power-iter", 2]
        return run_main(estimate_curvature, ["--model-filename", file, *few, *more], capsys)

    for more, *words in (
        ([], "if you trust that", f"--model-arch {RESNET}"),
        (["--model-arch", "torchvision.models:vgg11"], f"holds a {RESNET}"),
        (["--model-arch", RESNET, "--image-size", 64], "--image-size 32, not 64"),
    ):
        assert_one_line_error(estimated(path, *more), 2, *words)
    model = load_model(path, RESNET)
    assert sum(isinstance(module, CenteredSoftplus) for module in model.modules()) == 9
    assert not model.training
    result = estimated(path, "--model-arch", RESNET)
    assert result.returncode == 0, result.stderr

    # the weights alone go into the low-curvature version, and only into that
    torch.save(torch.load(path)["model"], weights)
    given = ["--model-arch", RESNET, "--image-size", 32]
    assert_one_line_error(estimated(weights, *given, "--lcnn"), 2, "give --dataset")
    assert_one_line_error(estimated(weights, *given, *data), 1, "do not fit")
    result = estimated(weights, *given, *data, "--lcnn")
    assert result.returncode == 0, result.stderr
    assert "ReLU -> CenteredSoftplus" in result.stdout
