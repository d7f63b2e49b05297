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
from regularized_loss import CELoss, regularizers
from training.epoch import FiniteSteps, NonFiniteStep, TrainingStep, build_optimizer, evaluate, train_epoch
from training.run_files import Run
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


def gradients_of_every_loss() -> dict[str, dict]:
    """By regularizer and batch, the gradients of batches of 7 and 2 examples in float64 in eval."""
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
    part = {"rank": distributed.rank(), "world_size": distributed.world_size()}
    for name, make in {**regularizers, "unfreezing": lambda model, flags: UnfreezingLoss(model)}.items():
        if name == "hessian":  # each process draws its own directions
            continue
        gradients = TrainingStep(make(model, WEIGHTS))
        for batch in training_batches(split, 7, 0, 1, **part):
            gradients.loss.zero_grad()
            gradients(batch.images.double(), batch.labels, batch.share)
            grads = {n: p.grad.clone() for n, p in gradients.loss.named_parameters() if p.grad is not None}
            found[f"{name} {batch.size}"] = grads
    return found | {"an epoch": numbers_of_an_epoch(split, part)}


def numbers_of_an_epoch(split: Split, part: dict) -> dict[str, torch.Tensor]:
    """Means over its examples, and the statistics of a BatchNorm beside a network that has none."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 4).double())
    loss = CELoss(model)
    loss.norm = norm = nn.BatchNorm1d(192, affine=False).double()

    def watch(module, inputs, output) -> None:
        if model.training:
            norm(output)

    model[0].register_forward_hook(watch)
    whole = (batch._replace(images=batch.images.double()) for batch in training_batches(split, 7, 0, 1, **part))
    means = train_epoch(TrainingStep(loss), build_optimizer(loss, 0.1, 0.9, 0.0), whole)
    means["test_loss"], means["test_accuracy"] = evaluate(model, split, 2)
    return {name: torch.tensor(round(mean, 4)) for name, mean in means.items()} | {"norm": norm.running_mean}


def refusal_of_a_step_that_is_bad_on_the_last() -> str:
    """What FiniteSteps says of a step in which a term and the gradient of the last process are not finite."""
    model = nn.Linear(3, 2)
    optimizer = build_optimizer(CELoss(model), 0.1, 0.9, 5e-4)
    before = [p.detach().clone() for p in model.parameters()]
    model(torch.ones(1, 3)).sum().backward()
    term = torch.tensor(1.0)
    if distributed.rank() == distributed.world_size() - 1:
        term, model.bias.grad[1] = torch.tensor(torch.nan), torch.inf
    try:
        FiniteSteps(CELoss(model), optimizer).check({"a": torch.tensor(1.0), "b": term})
    except NonFiniteStep as error:
        optimizer.step()  # what a GPU goes on to do until the epoch ends
        assert all(map(torch.equal, before, model.parameters()))
        return str(error)


def single_steps(path: str) -> None:
    """Save the gradients to ``path``, and write on every process why the bad step was not taken."""
    with distributed.process_group():
        gradients = gradients_of_every_loss()
        if distributed.rank() == 0:
            torch.save(gradients, path)
        sys.stderr.write(refusal_of_a_step_that_is_bad_on_the_last())
    threads = [file.read_text() for file in Path("/proc/self/task").glob("*/comm")]
    assert not any("gloo" in name for name in threads)  # one that outlives its group may crash the interpreter's exit


def train_and_digest(folder: str, *arguments: str) -> None:
    """Train as the command line does; after each epoch append a digest of the network's state to folder/rank."""
    evaluate = train_models.evaluate

    def digest(model, *rest):
        state = hashlib.sha256(b"".join(t.numpy().tobytes() for t in model.state_dict().values())).hexdigest()
        with (Path(folder) / str(distributed.rank())).open("a") as file:
            file.write(f"{state}\n")
        (Path(folder) / f"seed {torch.initial_seed()}").touch()
        return evaluate(model, *rest)

    train_models.evaluate = digest
    if os.environ["RANK"] != "0":
        Run.record = train_models.plot_training = None  # the first writes
    sys.exit(train_models.main(arguments))


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
    {"steps": single_steps, "train": train_and_digest, "losses": train_with_losses_of_others}[task](*rest)
