"""The models a script is to examine, each with its data, read and checked; and the loop over their examples."""

import argparse
import functools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor, nn

from curvature.self_check import check_model
from data.batches import epoch_seed, to_pixels
from data.datasets import ImageData, datasets, load_dataset
from models.checkpoint import build_model, read_checkpoint
from models.model_selector import add_architecture_flags, check_architecture_flags, model_architecture
from utils import cli
from utils.distributed import gather_shares, own_share
from utils.errors import UsageError, UserError
from utils.progress import progress

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
    add_architecture_flags(group, remark=". A checkpoint knows its own, and is checked against it")
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
    """Raise UsageError on flags of add_subject_flags that do not go together, or that name no model."""
    check_architecture_flags(flags)
    if not flags.model_filename and flags.model_arch in (None, *model_architecture):
        raise UsageError("nothing to measure: give --model-filename, or --model-arch package.module:callable")


def load_subjects(flags: argparse.Namespace) -> list[Subject]:
    """Read every checkpoint and data set the flags name, so that no mistake turns up after hours of measuring.

    Raises:
        UserError: if a file is missing or damaged, the flags disagree with it, or a model fails the self-check.
    """
    torch.manual_seed(flags.prng_seed)  # for a callable that draws its weights

    @functools.cache  # several models share one, on its device
    def load_data(name: str, data_dir: str, image_size: int | None) -> ImageData:
        return load_dataset(name, data_dir, image_size, flags.download).to(flags.device)

    paths = list(dict.fromkeys(flags.model_filename))
    if paths == sorted(paths):  # as the shell lists them: _epoch2 is to come before _epoch10
        paths.sort(key=lambda path: [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", path)])
    subjects = [load_subject(path, flags, load_data) for path in paths or [None]]
    for subject in subjects:
        if subject.dtype.itemsize < 4:
            print(f"{subject.name}: weights of {subject.dtype} are measured in float32")
            subject.model.float()
        images = to_pixels(subject.data.test.images[:EXAMPLES_TO_CHECK], subject.dtype)
        check_model(subject.model, images, len(subject.data.class_names), subject.name)
    return subjects


def load_subject(path: str | None, flags: argparse.Namespace, load_data: Callable[..., ImageData]) -> Subject:
    """The network of a weight file, or without one as its callable makes it, with the data set it is measured on."""
    name = path or flags.model_arch
    checkpoint = read_checkpoint(path, flags.model_arch) if path else {"model_arch": flags.model_arch}
    if "num_classes" in checkpoint:  # ours or the reference's; of another project's the flags tell all
        checkpoint.setdefault("lcnn", False)
    for key in ("dataset", "image_size", "lcnn"):
        own, wanted = checkpoint.get(key), getattr(flags, key)
        if wanted and own not in (None, wanted):
            flag = f"--{key.replace('_', '-')}"
            raise UsageError(f"{name} was trained with {flag} {own}, not {wanted}; leave {flag} out")
        checkpoint[key] = wanted if own is None else own
    if checkpoint["dataset"] is None and "num_classes" not in checkpoint:
        raise UsageError(f"{name} does not name its data set; give --dataset: {', '.join(datasets)}")
    dataset = checkpoint["dataset"] or DEFAULT_DATASET
    if dataset not in datasets:
        raise UserError(f"{name}: unknown data set {dataset!r}; there are {', '.join(datasets)}")
    data_dir = flags.data_dir or checkpoint.get("flags", {}).get("data_dir", "datasets")
    # before the data, which a damaged image size would blow up; another project's file needs them to say its sizes
    model = build_model(checkpoint, name, flags.model_arch) if "num_classes" in checkpoint else None
    data = load_data(dataset, data_dir, checkpoint["image_size"])
    image_size, num_classes = data.test.images.shape[-1], len(data.class_names)
    if model is None:
        model = build_model(checkpoint | {"image_size": image_size}, name, flags.model_arch, num_classes)
    elif checkpoint["num_classes"] != num_classes:
        raise UsageError(
            f"{path} tells {checkpoint['num_classes']} classes apart, but {dataset} has {num_classes}; "
            "give the --dataset (and --data-dir) it was trained on"
        )
    for theirs, own in zip(checkpoint.get("class_names", []), data.class_names, strict=False):
        if theirs != own:
            problem = f"{path} was trained with class {theirs!r} where {data_dir} has {own!r}"
            raise UsageError(f"{problem}: other classes, or another order; give the --data-dir it was trained on")
    arch = checkpoint["model_arch"] if path else "its weights as the callable made them,"
    return Subject(name, arch, model.to(flags.device), dataset, data)


def choose_examples(num_examples: int, count: int, seed: int) -> Tensor:
    """At most ``count`` of the examples at random: positions, each at most once, increasing."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(num_examples, generator=generator)[:count].sort().values


def for_examples(
    subject: Subject,
    flags: argparse.Namespace,
    measure: Callable[[Tensor, Tensor, list[torch.Generator]], dict[str, Tensor]],
) -> Iterator[pd.DataFrame]:
    """Measure the examples the flags ask for, batch by batch; every process does its share of the batches.

    Args:
        flags: those of ``add_subject_flags``, batch_size and prng_seed.
        measure: pixels (N, 3, H, H) in the model's dtype, labels (N,) and N generators -> named columns (N,). Only the
            seed and an example's position decide its generator, so no result depends on the batch or the process.

    Yields:
        For each split, on every process, a row an example: model, split, index, label and the columns, in float64.
    """
    for name in ("train", "test") if flags.split == "both" else (flags.split,):
        split = getattr(subject.data, name)
        count = flags.num_samples or max(1, round(flags.data_fraction * len(split)))
        parts = own_share(list(choose_examples(len(split), count, flags.prng_seed).split(flags.batch_size)))
        tables = []
        for part in progress(parts, f"{subject.name} {name}", sum(map(len, parts)), "examples", size=len):
            batch = split[part.to(split.images.device)]
            generators = [torch.Generator().manual_seed(epoch_seed(flags.prng_seed, i)) for i in part.tolist()]
            columns = {"index": part, "label": batch.labels}
            columns |= measure(to_pixels(batch.images, subject.dtype), batch.labels, generators)
            columns = {key: column.cpu().numpy() for key, column in columns.items()}
            tables.append(pd.DataFrame({"model": subject.name, "split": name, **columns}))
        results = pd.concat(gather_shares(tables), ignore_index=True)
        yield results.astype(dict.fromkeys(results.select_dtypes("floating"), "float64"))
