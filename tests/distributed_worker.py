"""What tests/test_distributed.py starts as several processes."""

import argparse
import hashlib
import os
import sys
from pathlib import Path

import torch
from conftest import TwoBlocks
from torch import nn

import train_models
from data.batches import Split, training_batches
from models import model_selector
from regularized_loss import CELoss, regularizers
from training.epoch import FiniteSteps, NonFiniteStep, TrainingStep, build_optimizer
from utils import distributed

WEIGHTS = argparse.Namespace(reg_gnorm=1e-2, reg_beta=1e-2, reg_gamma=1e-2, reg_bound=1e-2)


class UnfreezingLoss(CELoss):
    """The first step trains the classifier, later ones the rest; ``offset`` counts on processes that have a label 0."""

    def __init__(self, model):
        super().__init__(model)
        self.offset = nn.Parameter(torch.zeros((), dtype=torch.float64))
        self.steps = 0

    def compute_loss(self, input, target):
        self.model.requires_grad_(self.steps > 0)
        self.model.classifier.requires_grad_(self.steps == 0)
        self.steps += 1
        raw_loss = super().compute_loss(input, target)
        return raw_loss + self.offset * (target == 0).sum() / len(target) if (target == 0).any() else raw_loss


def gradients_of_every_loss(path: str) -> None:
    """Save to ``path``, by regularizer and batch, the gradients of batches of 7 and 2 examples in float64 in eval."""
    torch.manual_seed(0)
    model = TwoBlocks(num_classes=4, input_size=8).double()
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_var.uniform_(0.5, 2)
            m.running_mean.normal_()
    images = torch.randint(0, 256, (9, 3, 8, 8), dtype=torch.uint8)
    split = Split(images, torch.arange(9) % 4)
    model.eval()
    found = {}
    with distributed.process_group():
        rank, world_size = distributed.rank(), distributed.world_size()
        for name, make in {**regularizers, "unfreezing": lambda model, flags: UnfreezingLoss(model)}.items():
            if name == "hessian":  # each process draws its own directions
                continue
            gradients = TrainingStep(make(model, WEIGHTS))
            for batch in training_batches(split, 7, 0, 1, rank=rank, world_size=world_size):
                gradients.loss.zero_grad()
                gradients(batch.images.double(), batch.labels, batch.share)
                grads = {n: p.grad.clone() for n, p in gradients.loss.named_parameters() if p.grad is not None}
                found[f"{name} {batch.size}"] = grads
        if rank == 0:
            torch.save(found, path)


def train_and_digest(folder: str, stop_after: str, arguments: list[str]) -> int:
    """Train TwoBlocks as the command line trains a resnet18lcnn; after each epoch's steps append a digest of the
    network's state to folder/rank, and after ``stop_after`` epochs be interrupted."""
    evaluate, epochs = train_models.evaluate, 0

    def digest(model, split, batch_size):
        nonlocal epochs
        state = hashlib.sha256(b"".join(t.numpy().tobytes() for t in model.state_dict().values())).hexdigest()
        with (Path(folder) / str(distributed.rank())).open("a") as file:
            file.write(state + "\n")
        if epochs == int(stop_after):
            raise KeyboardInterrupt
        epochs += 1
        return evaluate(model, split, batch_size)

    train_models.evaluate = digest
    model_selector.model_architecture["resnet18lcnn"] = TwoBlocks
    return train_models.main(arguments)


def step_that_is_bad_on_the_last() -> None:
    """Print on every process what FiniteSteps says of a step in which one term of the last process is not finite."""
    with distributed.process_group():
        model = nn.Linear(3, 2)
        optimizer = build_optimizer(CELoss(model), 0.1, 0.9, 0.0)
        model(torch.ones(1, 3)).sum().backward()
        bad = distributed.rank() == distributed.world_size() - 1
        try:
            FiniteSteps(CELoss(model), optimizer).check(
                {"a": torch.tensor(1.0), "b": torch.tensor(torch.nan if bad else 1.0)}
            )
        except NonFiniteStep as error:
            sys.stderr.write(str(error))
    threads = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
    assert not any("gloo" in name for name in threads)  # one that outlives its group may crash the interpreter's exit


def train_with_losses_of_others(folder: str, photographs: str) -> None:
    """Train with each of tests/test_cases_losses.py's; save the state each ends with to folder/loss/rank.pt."""
    from tests.test_cases_losses import LOSSES, train_whole_and_broken

    with distributed.process_group():
        for make in LOSSES:
            own = Path(folder) / make.__name__
            loss = train_whole_and_broken(make, photographs, own)
            torch.save(loss.state_dict(), own / f"{distributed.rank()}.pt")


if __name__ == "__main__":
    task, *rest = sys.argv[1:]
    if task == "gradients":
        gradients_of_every_loss(*rest)
    elif task == "losses":
        train_with_losses_of_others(*rest)
    elif task == "finite":
        step_that_is_bad_on_the_last()
    else:
        sys.exit(train_and_digest(os.environ["DIGESTS"], os.environ["STOP_AFTER"], rest))
