"""The models a script is to examine, each with its data, read, checked and on the device; and on which examples."""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from data.batches import Split, to_pixels
from data.datasets import ImageData, datasets, load_dataset
from utils import cli
from utils.checkpoint import build_model, check_architecture, is_checkpoint, read_checkpoint
from utils.errors import UsageError, UserError
from utils.files import read_tensors
from utils.outside_model import REMEDY, build_outside_model, is_outside
from utils.self_check import check_model

DEFAULT_DATASET = "cifar100"  # for the reference's checkpoints, which do not name theirs
EXAMPLES_TO_CHECK = 4  # enough for the self-checks, which run before anything is measured


@dataclass(frozen=True)
class Subject:
    """A model that has passed every check, and the data it is measured on."""

    name: str  # the checkpoint's path; of a model without one, what made it
    arch: str
    model: nn.Module
    dataset: str
    data: ImageData

    @property
    def dtype(self) -> torch.dtype:
        """The floating-point type of its weights."""
        return next((p.dtype for p in self.model.parameters() if p.is_floating_point()), torch.float32)


def add_subject_flags(group, default_split: str) -> None:
    """The flags that say which models are examined, and on which examples."""
    group.add_argument("--model-filename", nargs="+", metavar="FILE", default=[], help="checkpoints, or state_dicts")
    cli.add_architecture_flags(group, remark=". A checkpoint knows its own, and is checked against it")
    group.add_argument(
        "--dataset",
        choices=datasets,
        help=f"checked against the checkpoint; for the reference's, which do not name it, default {DEFAULT_DATASET}",
    )
    group.add_argument("--data-dir", help="where the data set's files are (default: as in training, else datasets)")
    group.add_argument("--download", action="store_true", help="fetch cifar10, cifar100 or svhn if missing")
    group.add_argument(
        "--image-size", type=cli.positive_int, help="for a package.module:callable (default: the data set's)"
    )
    group.add_argument("--split", choices=("train", "test", "both"), default=default_split, help="which examples")
    how_many = group.add_mutually_exclusive_group()
    how_many.add_argument("--data-fraction", type=cli.fraction, default=0.1, help="of each split; a random subset")
    how_many.add_argument("--num-samples", type=cli.positive_int, help="of each split, instead of a fraction")


def check_subject_flags(flags: argparse.Namespace) -> None:
    """Raise UsageError on flags of add_subject_flags that do not go together."""
    cli.check_architecture_flags(flags)
    outside = is_outside(flags.model_arch)
    if outside and not (flags.dataset or flags.model_filename):
        raise UsageError(f"--model-arch {flags.model_arch} needs a --dataset: {', '.join(datasets)}")
    if flags.image_size and not outside:
        raise UsageError("--image-size is for --model-arch package.module:callable; a checkpoint of ours knows its own")


def chosen_splits(subject: "Subject", flags: argparse.Namespace) -> Iterator[tuple[str, Split, Tensor]]:
    """The name, the examples, and the (n,) positions of those to examine, of every split the flags ask for."""
    for name, split in {"train": subject.data.train, "test": subject.data.test}.items():
        if flags.split in (name, "both"):
            count = flags.num_samples or max(1, round(flags.data_fraction * len(split)))
            yield name, split, choose_examples(len(split), count, flags.prng_seed)


def choose_examples(num_examples: int, count: int, seed: int) -> Tensor:
    """At most ``count`` of the examples at random: positions, each at most once, increasing."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(num_examples, generator=generator)[:count].sort().values


def load_subjects(flags: argparse.Namespace) -> list[Subject]:
    """Read every checkpoint and data set the flags name, so that no mistake turns up after hours of measuring.

    Raises:
        UserError: if a file is missing or damaged, the flags disagree with it, or a model fails the self-check.
    """
    subjects, loaded = [], {}

    def load(*key) -> ImageData:
        if key not in loaded:  # several models share one
            loaded[key] = load_dataset(*key, flags.download).to(flags.device)
        return loaded[key]

    for path in flags.model_filename or [None]:
        if is_outside(flags.model_arch) and not (path and is_checkpoint(read_tensors(Path(path), "weights", REMEDY))):
            subjects.append(load_outside_subject(path, flags, load))
        elif path:
            subjects.append(load_checkpoint_subject(path, flags, load))
    for subject in subjects:
        if subject.dtype.itemsize < 4:
            print(f"{subject.name}: weights of {subject.dtype} are measured in float32")
            subject.model.float()
        images = to_pixels(subject.data.test.images[:EXAMPLES_TO_CHECK], subject.dtype)
        check_model(subject.model, images, len(subject.data.class_names), subject.name)
    return subjects


def load_outside_subject(path: str | None, flags: argparse.Namespace, load) -> Subject:
    """The network of a package.module:callable with the state_dict at path, or with the weights it comes with."""
    if not flags.dataset:
        raise UsageError(f"{path} does not name its data set; --model-arch {flags.model_arch} needs a --dataset")
    data = load(flags.dataset, flags.data_dir or "datasets", flags.image_size)
    image_size = data.test.images.shape[-1]
    model = build_outside_model(flags.model_arch, path, len(data.class_names), image_size if flags.lcnn else None)
    arch = flags.model_arch if path else "its weights as the callable made them,"
    return Subject(path or flags.model_arch, arch, model.to(flags.device), flags.dataset, data)


def load_checkpoint_subject(path: str, flags: argparse.Namespace, load) -> Subject:
    """A checkpoint of ours or of the reference code, with the data set it names; ``load`` is load_dataset, cached."""
    checkpoint = read_checkpoint(path)
    arch = check_architecture(checkpoint, path, flags.model_arch)
    if flags.lcnn and not checkpoint.get("lcnn"):
        raise UsageError(f"{path} was trained without --lcnn; leave it out")
    if flags.image_size not in (None, checkpoint["image_size"]):
        raise UsageError(f"{path} is for images of {checkpoint['image_size']} pixels; leave --image-size out")
    model = build_model(checkpoint, path, flags.model_arch).to(flags.device)
    own_dataset = checkpoint.get("dataset")
    if flags.dataset and own_dataset and flags.dataset != own_dataset:
        raise UsageError(f"{path} was trained on {own_dataset}, not {flags.dataset}; leave --dataset out")
    dataset = flags.dataset or own_dataset or DEFAULT_DATASET
    if dataset not in datasets:
        raise UserError(f"{path}: unknown data set {dataset!r}; there are {', '.join(datasets)}")
    data_dir = flags.data_dir or checkpoint.get("flags", {}).get("data_dir", "datasets")
    data = load(dataset, data_dir, checkpoint["image_size"])
    if len(data.class_names) != checkpoint["num_classes"]:
        raise UsageError(
            f"{path} tells {checkpoint['num_classes']} classes apart, but {dataset} has {len(data.class_names)}; "
            "give the --dataset (and --data-dir) it was trained on"
        )
    return Subject(path, arch, model, dataset, data)
