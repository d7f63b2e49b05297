"""Estimate the curvature of trained models: input-gradient norm, Hessian norm and normalized curvature by example.

    python estimate_curvature.py --model-filename saved_models/resnet18lcnn_curvature_and_gnorm_cifar100.pt

Several files are measured on the same examples and compared side by side. From Python:

    from estimate_curvature import estimate_curvature
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from data.datasets import ImageData, datasets, load_dataset
from models.model_selector import model_architecture
from utils import cli
from utils.checkpoint import build_model, check_architecture, read_checkpoint
from utils.curvature import estimate_curvature as estimate_curvature  # part of this module's interface
from utils.errors import UsageError, UserError
from utils.measurement import (
    Measurement,
    choose_examples,
    comparison_table,
    format_measurement,
    labelled_curvatures,
    measure_split,
    write_measurements,
)
from utils.plots import plot_curvature
from utils.training import evaluate

DEFAULT_DATASET = "cifar100"  # for the reference's checkpoints, which do not name theirs


def build_parser() -> argparse.ArgumentParser:
    parser = cli.Parser(prog="estimate_curvature.py", description=__doc__.splitlines()[0])

    what = parser.add_argument_group("what to measure")
    what.add_argument("--model-filename", nargs="+", required=True, metavar="FILE", help="checkpoints to measure")
    what.add_argument("--model-arch", choices=model_architecture, help="checked against the checkpoint, if given")
    what.add_argument(
        "--dataset",
        choices=datasets,
        help=f"checked against the checkpoint; for the reference's, which do not name it, default {DEFAULT_DATASET}",
    )
    what.add_argument("--data-dir", help="where the data set's files are (default: as in training, else datasets)")
    what.add_argument("--download", action="store_true", help="fetch cifar10, cifar100 or svhn if missing")
    what.add_argument("--data-fraction", type=cli.fraction, default=0.1, help="of each split; a seeded random subset")

    how = parser.add_argument_group("how")
    how.add_argument("--batch-size", type=cli.positive_int, default=64, help="examples per Hessian-vector product")
    how.add_argument("--num-power-iter", type=cli.positive_int, default=10, help="Hessian-vector products per example")

    output = parser.add_argument_group("output")
    output.add_argument("--output", type=Path, metavar="FILE.csv", help="write one row per example")
    output.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the distribution of curvature")

    cli.add_shared_flags(parser)
    return parser


@dataclass(frozen=True)
class Subject:
    """A checkpoint that has passed every check, and the data it is measured on."""

    path: str
    arch: str
    model: torch.nn.Module
    dataset: str
    data: ImageData


def load_subjects(flags: argparse.Namespace) -> list[Subject]:
    """Read every checkpoint and data set the flags name, so that no mistake turns up after hours of measuring.

    Raises:
        UserError: if a file is missing or damaged, or the flags disagree with it.
    """
    subjects, loaded = [], {}
    for path in flags.model_filename:
        checkpoint = read_checkpoint(path)
        arch = check_architecture(checkpoint, path, flags.model_arch)
        model = build_model(checkpoint, path, arch).to(flags.device)
        own_dataset = checkpoint.get("dataset")
        if flags.dataset and own_dataset and flags.dataset != own_dataset:
            raise UsageError(f"{path} was trained on {own_dataset}, not {flags.dataset}; leave --dataset out")
        dataset = flags.dataset or own_dataset or DEFAULT_DATASET
        if dataset not in datasets:
            raise UserError(f"{path}: unknown data set {dataset!r}; there are {', '.join(datasets)}")
        data_dir = flags.data_dir or checkpoint.get("flags", {}).get("data_dir", "datasets")
        key = dataset, data_dir, checkpoint["image_size"]
        if key not in loaded:  # several models share one
            loaded[key] = load_dataset(*key, flags.download).to(flags.device)
        data = loaded[key]
        if len(data.class_names) != checkpoint["num_classes"]:
            raise UsageError(
                f"{path} tells {checkpoint['num_classes']} classes apart, but {dataset} has {len(data.class_names)}; "
                "give the --dataset (and --data-dir) it was trained on"
            )
        subjects.append(Subject(path, arch, model, dataset, data))
    return subjects


def measure(subject: Subject, flags: argparse.Namespace) -> Iterator[Measurement]:
    """Measure one model on a subset of each of its data set's two splits."""
    accuracy = evaluate(subject.model, subject.data.test)[1]
    print(f"{subject.path}: {subject.arch} on {subject.dataset}, test accuracy {accuracy:.2f} %")
    for name, split in (("train", subject.data.train), ("test", subject.data.test)):
        # the same examples and starting vectors for every model
        generator = torch.Generator().manual_seed(flags.prng_seed)
        indices = choose_examples(len(split), flags.data_fraction, generator)
        chosen = split[indices.to(flags.device)]
        estimate = measure_split(
            subject.model, chosen, flags.batch_size, flags.num_power_iter, generator, f"{subject.path} {name}"
        )
        yield Measurement(subject.path, name, accuracy, indices, chosen.labels.cpu(), estimate)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""

    def command(flags: argparse.Namespace) -> None:
        for path in (flags.output, flags.plot):
            if path:
                path.parent.mkdir(parents=True, exist_ok=True)
        measurements = []
        for subject in load_subjects(flags):
            for measurement in measure(subject, flags):
                print(format_measurement(measurement), flush=True)
                measurements.append(measurement)
                if flags.output:  # after each split: whatever happens later, this much is there
                    write_measurements(flags.output, measurements)
        if len(flags.model_filename) > 1:
            print(comparison_table(measurements))
        if flags.plot:
            plot_curvature(flags.plot, labelled_curvatures(measurements))
        for path in (flags.output, flags.plot):
            if path:
                print(f"saved {path}")

    return cli.run(build_parser(), command, argv)


if __name__ == "__main__":
    sys.exit(main())
