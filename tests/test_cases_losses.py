"""Losses as people write them: what one may own is trained, saved and resumed, by one process and by several."""

import copy
import math
import random
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import assert_one_line_error, run_main
from torch import nn

import train_models
from data.batches import Batch
from models.checkpoint import read_checkpoint
from models.model_selector import model_architecture
from regularized_loss import CELoss, gradnorm_penalty, regularizers, with_input_gradient
from tests.test_command_line import states_equal
from tests.test_distributed import WORKER, finish, launch
from training.epoch import TrainingStep, build_optimizer, train_epoch, unregistered
from training.report import count_parameters


def network(num_classes: int, input_size: int) -> nn.Module:
    body = nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.BatchNorm2d(4), nn.Softplus(), nn.AdaptiveAvgPool2d(4), nn.Flatten())
    return nn.Sequential(OrderedDict(body=body, head=nn.Linear(64, num_classes)))


class UncertaintyLoss(CELoss):
    """Two learned weights, and a schedule for the second term."""

    def __init__(self, model):
        super().__init__(model)
        self.log_vars = nn.ParameterList([nn.Parameter(torch.zeros(())) for _ in range(2)])

    def compute_loss(self, input, target):
        input = with_input_gradient(input)
        losses = self.losses(input, target)
        raw_loss, gradnorm = losses.mean(), gradnorm_penalty(losses, input)
        s, weight = self.log_vars, 1e-3 * min(1, 2 * self.epoch / self.num_epochs)
        self.metadata = {"raw_loss": raw_loss, "gradnorm": gradnorm, "s0": s[0], "weight": weight}
        return (-s[0]).exp() * raw_loss + s[0] + (-s[1]).exp() * weight * gradnorm + s[1]


class CombinedLoss(CELoss):
    """Another loss, with its schedule, and the distance to the network's first weights."""

    def __init__(self, model):
        super().__init__(model)
        self.part = UncertaintyLoss(model)
        self.first = [parameter.detach().clone() for parameter in model.parameters()]

    def compute_loss(self, input, target):
        total = self.part.compute_loss(input, target)
        distance = sum((p - f).square().sum() for p, f in zip(self.model.parameters(), self.first, strict=True))
        self.metadata = {**self.part.metadata, "distance": distance}
        return total + 0.1 * distance


class TeacherLoss(CELoss):
    """A frozen teacher in eval mode, features taken by hooks, and class weights counted so far on each process."""

    def __init__(self, model):
        super().__init__(model)
        self.teacher = copy.deepcopy(model).requires_grad_(False).eval()
        self.features = {}
        for name, part in (("own", self.model.body), ("teacher", self.teacher.body)):
            part.register_forward_hook(lambda module, inputs, output, name=name: self.features.update({name: output}))
        self.register_buffer("seen", torch.zeros(model.head.out_features))
        self.register_buffer("limit", torch.full((2,), torch.inf))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def compute_loss(self, input, target):
        assert not any(module.training for module in self.teacher.modules())
        self.steps += 1
        self.seen += F.one_hot(target, len(self.seen)).sum(0)
        raw_loss = F.cross_entropy(self.model(input), target, 1 / (1 + self.seen), reduction="none").mean()
        self.teacher(input)
        self.metadata = {"raw_loss": raw_loss}
        return raw_loss + F.mse_loss(self.features["own"], self.features["teacher"])


class AverageLoss(CELoss):
    """A moving average of the network, buffers too, that the network is drawn to; mixup; a head of its own; and a
    buffer that is None until the first batch."""

    def __init__(self, model):
        super().__init__(model)
        self.average = copy.deepcopy(model).eval()
        self.head = nn.Sequential(nn.BatchNorm1d(64), nn.Linear(64, 2))
        self.register_buffer("usual", None)

    def compute_loss(self, input, target):
        input = torch.lerp(input, input.flip(0), np.random.beta(0.5, 0.5) * random.random())
        logits = self.model(input)
        with torch.no_grad():
            for own, new in zip(self.average.state_dict().values(), self.model.state_dict().values(), strict=True):
                own.copy_(own.lerp(new, 0.5) if own.is_floating_point() else new)
            aim = self.average(input)
        raw_loss = F.cross_entropy(logits, target) + F.cross_entropy(self.head(self.model.body(input)), target)
        self.usual = raw_loss.detach() if self.usual is None else self.usual.lerp(raw_loss.detach(), 0.1)
        self.metadata = {"raw_loss": raw_loss}
        return raw_loss + (raw_loss - self.usual).square() + F.mse_loss(logits, aim)


class UnfreezingLoss(CELoss):
    """The body is trained from the second epoch on, the head until the second. One term is only logged."""

    def compute_loss(self, input, target):
        self.model.body.requires_grad_(self.epoch >= 2)
        self.model.head.requires_grad_(self.epoch <= 2)
        raw_loss = super().compute_loss(input, target)
        self.metadata = {"raw_loss": raw_loss, "spread": self.model(input + 0.1).std()}
        return raw_loss


LOSSES = [TeacherLoss, AverageLoss]  # their states are other ones on each process, until an epoch ends
NAME = "resnet18_gnorm_imagefolder.pt"


def train_whole_and_broken(make: type[CELoss], photographs: Path, folder: Path) -> CELoss:
    """Train in folder/whole, and, interrupted in the second epoch and resumed, in folder/broken; returns the last."""
    losses, build_loss, evaluate = [], train_models.build_loss, train_models.evaluate
    flags = ["--model-arch", "resnet18", "--regularizer", "gnorm", "--dataset", "imagefolder", "--device", "cpu"]
    flags += ["--image-size", 16, "--batch-size", 9, "--num-epochs", 3, "--lr", 0.01, "--data-dir", photographs]

    def interrupted_evaluate(model, *rest):
        if losses[-1].epoch == 2:
            raise KeyboardInterrupt
        return evaluate(model, *rest)

    def train(place: str, *more: str) -> None:
        arguments = map(str, [*flags, "--output-dir", folder / place, *more])
        train_models.train(train_models.build_parser().parse_args(arguments))

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(model_architecture, "resnet18", network)
        patch.setitem(regularizers, "gnorm", lambda model, flags: make(model))
        patch.setattr(train_models, "plot_training", lambda *_: None)  # takes longer than the training
        patch.setattr(train_models, "build_loss", lambda *given: losses.append(build_loss(*given)) or losses[-1])
        train("whole")
        patch.setattr(train_models, "evaluate", interrupted_evaluate)
        with pytest.raises(KeyboardInterrupt):
            train("broken")
        patch.setattr(train_models, "evaluate", evaluate)
        train("broken", "--resume")
    return losses[-1]


def checkpoint_of_both(folder: Path) -> dict:
    """What the two runs saved, which must be the same bits."""
    whole, broken = (read_checkpoint(folder / place / NAME) for place in ("whole", "broken"))
    assert states_equal(whole, broken)
    return whole


@pytest.mark.parametrize("make", [CombinedLoss, UnfreezingLoss, *LOSSES])
def test_a_resumed_run_is_bit_identical(make, photographs, tmp_path):
    loss = train_whole_and_broken(make, photographs, tmp_path)
    found, model = checkpoint_of_both(tmp_path), loss.model
    own, rows = found["loss"], found["metrics"]
    torch.manual_seed(1729)
    first = network(2, 16).state_dict()
    if make is CombinedLoss:
        assert own.keys() == {"part.log_vars.0", "part.log_vars.1"}  # not the part's network
        assert own["part.log_vars.0"] * own["part.log_vars.1"] != 0
        assert [row["weight"] for row in rows] == pytest.approx([1e-3 * 2 / 3, 1e-3, 1e-3])
    elif make is TeacherLoss:
        assert all(torch.equal(value, own[f"teacher.{name}"]) for name, value in first.items())
        assert "of the loss" not in count_parameters(loss)  # none is trained
        assert own["seen"].tolist() == [36, 36]  # 12 images, 3 epochs
        assert own["steps"] == 9
    elif make is AverageLoss:
        heads = own["average.head.weight"], first["head.weight"]
        distances = [(model.head.weight - head).norm() for head in heads]
        assert 0 < distances[0] < distances[1] / 2
    elif make is UnfreezingLoss:
        assert not torch.equal(model.body[0].weight, first["body.0.weight"])


def test_several_processes_end_alike_and_resume_bit_identical(photographs, tmp_path):
    finish(launch(2, WORKER, "losses", tmp_path, photographs))
    for make in LOSSES:
        found = checkpoint_of_both(tmp_path / make.__name__)
        states = [torch.load(tmp_path / make.__name__ / f"{rank}.pt") for rank in range(2)]
        assert states_equal(*states)
        if make is TeacherLoss:
            assert found["loss"]["seen"].tolist() == [18, 18]  # the mean over the processes
            assert found["loss"]["limit"].tolist() == [torch.inf] * 2


def test_one_step_of_a_losss_own_parameter():
    """It follows its gradient, without weight decay; and a term is what the step computed with."""
    loss, images, labels = UncertaintyLoss(network(2, 16)), torch.rand(8, 3, 16, 16), torch.arange(8) % 2
    loss.log_vars[0].data.fill_(1.0)
    loss.model.eval()  # as an evaluation leaves it
    optimizer, step = build_optimizer(loss, lr=0.1, momentum=0.9, weight_decay=0.5), TrainingStep(loss)
    terms = train_epoch(step, optimizer, [Batch(images, labels, 8, 1.0)])
    assert loss.model.training
    assert terms["s0"] == 1  # a view of the parameter, until the step
    slope = 1 - terms["raw_loss"] / math.e  # d/ds of exp(-s) L + s
    assert loss.log_vars[0].item() == pytest.approx(1 - 0.1 * slope)
    # the graph of a term that is only logged would stay in memory
    assert not any(term.requires_grad for term in step(images, labels).values())


def test_what_would_be_neither_trained_nor_saved():
    loss, leaf = CELoss(network(2, 16)), torch.ones(2, requires_grad=True)
    loss.leaf, loss.list = leaf, [torch.zeros(2), leaf * 2, nn.Parameter(torch.zeros(2))]
    loss.dict = {"weights": torch.zeros(2), "teacher": (nn.Linear(2, 2).requires_grad_(False),)}
    loss.part = nn.Linear(2, 2)
    loss.part.hidden, loss.part.product = [leaf], leaf * 2  # the old weight_norm has such a product
    loss.layers, loss.own = list(loss.model.modules()), dict(loss.model.named_parameters())
    loss.parameter_list = nn.ParameterList([torch.zeros(2)])
    assert unregistered(loss).keys() == {"leaf", "list[1]", "list[2]", "dict['teacher'][0]", "part.hidden[0]"}


class HiddenLoss(CELoss):
    def __init__(self, model):
        super().__init__(model)
        self.s = torch.ones(1, requires_grad=True)


class LateLoss(CELoss):
    """An average of the network that is made in the first step."""

    def compute_loss(self, input, target):
        if not hasattr(self, "average"):
            self.average = copy.deepcopy(self.model)
        return super().compute_loss(input, target)


class LateWeightLoss(CELoss):
    """Its weights, as many as the images, are made in the first step; images and what is made of them may be kept."""

    def compute_loss(self, input, target):
        self.kept = {"input": with_input_gradient(input), "c": nn.MSELoss()}
        self.kept["delta"] = torch.zeros(1, requires_grad=True)
        self.kept["logits"] = self.model(self.kept["input"])
        self.weights = getattr(self, "weights", [torch.ones(len(input), requires_grad=True)])
        return super().compute_loss(input, target) + self.weights[0].sum() * self.kept["logits"].square().mean()


class ConstantLoss(CELoss):
    def compute_loss(self, input, target):
        self.metadata = {}
        return with_input_gradient(input).mean()


@pytest.mark.parametrize(
    ("make", "code", "words"),
    [
        (lambda model: nn.CrossEntropyLoss(), 2, ["CrossEntropyLoss must extend CELoss"]),
        (HiddenLoss, 2, ["HiddenLoss", " s;", "nn.Parameter"]),
        (LateLoss, 1, ["LateLoss.compute_loss creates average.body.0.bias", "constructor"]),
        (LateWeightLoss, 1, ["LateWeightLoss.compute_loss creates weights[0], neither trained nor resumed"]),
        (ConstantLoss, 1, ["ConstantLoss.compute_loss returned a tensor that depends on no parameter"]),
    ],
)
def test_refused_by_name(make, code, words, photographs, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(model_architecture, "resnet18", network)
    monkeypatch.setitem(regularizers, "none", lambda model, flags: make(model))
    flags = ["--dataset", "imagefolder", "--data-dir", photographs, "--image-size", 16, "--output-dir", tmp_path]
    result = run_main(train_models, [*flags, "--device", "cpu", "--batch-size", 12], capsys)
    assert_one_line_error(result, code, *words)
    assert not list(tmp_path.glob("*.pt"))
