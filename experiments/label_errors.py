"""Find wrong labels by the curvature of the loss: digits, some of whose training labels are exchanged at random.

    python -m experiments.label_errors --output label_errors.csv

An example whose label contradicts its neighbours is memorized: the loss bends much around it (Garg and Roy, "Samples
with Low Loss Curvature Improve Data Efficiency", CVPR 2023; Ravikumar et al., "Unveiling Privacy, Memorization, and
Input Curvature Links", ICML 2024). As there, the score is averaged over the epochs.
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

import train_models
from curvature.estimate import estimate_curvature, prepared
from curvature.results import write_rows
from data.batches import Split, batches, epoch_seed
from data.datasets import load_dataset
from models.model_selector import build_network, model_architecture
from regularized_loss import CELoss
from training.epoch import TrainingStep, build_optimizer
from utils import cli
from utils.files import check_suffix, make_room
from utils.numerics import seed_everything
from utils.plots import new_figure, save_figure
from utils.precision import training_settings
from utils.progress import progress

RECIPE = {"batch_size": 64, "lr": 0.05, "augment": False}  # beside the defaults of train_models.py
SCORES = ["curvature_score", "curvature", "loss", "gradient_norm"]


def exchange_labels(labels: Tensor, fraction: float, num_classes: int, seed: int) -> tuple[Tensor, Tensor]:
    """(n,) labels of which round(fraction n) are those of another class, and (n,) booleans: which."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(labels), generator=generator)[: round(fraction * len(labels))]
    shift = torch.randint(1, num_classes, (len(chosen),), generator=generator)
    noisy = labels.clone()
    noisy[chosen] = (labels[chosen] + shift) % num_classes
    return noisy, noisy != labels


def measure(model: nn.Module, split: Split, flags: argparse.Namespace, epoch: int) -> pd.DataFrame:
    """``SCORES`` of every example, a row each, with respect to the label it is trained with."""
    generator = torch.Generator().manual_seed(epoch_seed(flags.prng_seed, epoch))
    settings = {"num_iterations": 3, "trace_probes": flags.trace_probes, "generator": generator}
    parts, tables = list(batches(split, RECIPE["batch_size"])), []
    with prepared(model) as network:
        for images, labels in progress(parts, "measuring", len(parts), "batches"):
            tables.append(pd.DataFrame(estimate_curvature(network, images, labels, **settings).columns())[SCORES])
    return pd.concat(tables, ignore_index=True)


def score(flags: argparse.Namespace) -> pd.DataFrame:
    """Train with some labels exchanged; a row a training example: label, exchanged, and the means of its scores."""
    training = argparse.Namespace(**vars(train_models.build_parser().parse_args([])) | RECIPE | vars(flags))
    data = load_dataset("digits", "")
    labels, exchanged = exchange_labels(data.train.labels, flags.fraction, len(data.class_names), flags.prng_seed)
    data = dataclasses.replace(data, train=Split(data.train.images, labels))
    seed_everything(flags.prng_seed)
    loss = CELoss(build_network(flags.model_arch, len(data.class_names), 16))
    optimizer = build_optimizer(loss, training.lr, training.momentum, training.weight_decay)
    step, means = TrainingStep(loss), 0.0
    for epoch in range(1, flags.num_epochs + 1):
        with training_settings():
            trained = train_models.train_one_epoch(training, epoch, data, step, optimizer)
        scores = measure(loss.model, data.train, flags, epoch)
        means += scores / flags.num_epochs
        aucs = "  ".join(f"{name} {roc_auc_score(exchanged, values):.3f}" for name, values in scores.items())
        print(f"epoch {epoch}/{flags.num_epochs}  train_loss {trained['train_loss']:.4f}  AUROC: {aucs}", flush=True)
    return pd.DataFrame({"label": labels, "exchanged": exchanged}).join(means)


def find(flags: argparse.Namespace) -> None:
    """Score, report, and write the rows and the picture."""
    check_suffix(flags.output, ".csv")  # the picture goes beside it
    picture = flags.output.with_suffix(".png")
    for path in (flags.output, picture):
        make_room(path)
    rows = score(flags)
    write_rows(flags.output, rows)
    print(f"{rows['exchanged'].sum()} of {len(rows)} labels are exchanged. AUROC of finding them, over all epochs:")
    for name in SCORES:
        print(f"  {name:<16} {roc_auc_score(rows['exchanged'], rows[name]):.3f}")
    figure, (axis,) = new_figure(1)
    logarithms = np.log10(rows["curvature_score"])
    for exchanged, values in logarithms.groupby(rows["exchanged"]):
        name = "exchanged label" if exchanged else "own label"
        axis.hist(values, bins=40, density=True, alpha=0.6, label=name)
    axis.set(title="training examples", xlabel="log10 of the curvature score", ylabel="density")
    axis.legend()
    save_figure(figure, picture)
    print(f"saved {flags.output}, {picture}")


def build_parser() -> argparse.ArgumentParser:
    parser = cli.Parser(prog="label_errors", description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("label_errors.csv"), help="the rows; the picture is beside")
    parser.add_argument("--model-arch", choices=model_architecture, default="vgg11", help="the network")
    parser.add_argument("--num-epochs", type=cli.positive_int, default=10, help="passes over the training split")
    parser.add_argument("--fraction", type=cli.fraction, default=0.05, help="of the labels are exchanged")
    parser.add_argument("--trace-probes", type=cli.positive_int, default=3, help="products an example and epoch")
    cli.add_shared_flags(parser, cpu_only=True)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return cli.run(build_parser(), find, argv)


if __name__ == "__main__":
    sys.exit(main())
