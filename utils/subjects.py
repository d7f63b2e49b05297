"""The models a script is to examine, each with its data: read, checked, and on the device."""

import argparse
from dataclasses import dataclass

import torch
from torch import nn

from data.batches import to_pixels
from data.datasets import ImageData, datasets, load_dataset
from utils.checkpoint import build_model, check_architecture, read_checkpoint
from utils.errors import UsageError, UserError
from utils.outside_model import build_outside_model, is_outside
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

    if is_outside(flags.model_arch):
        data = load(flags.dataset, flags.data_dir or "datasets", flags.image_size)
        for path in flags.model_filename or [None]:
            model = build_outside_model(flags.model_arch, path, len(data.class_names)).to(flags.device)
            arch = flags.model_arch if path else "its weights as the callable made them,"
            subjects.append(Subject(path or flags.model_arch, arch, model, flags.dataset, data))
    else:
        for path in flags.model_filename:
            subjects.append(load_checkpoint_subject(path, flags, load))
    for subject in subjects:
        if subject.dtype.itemsize < 4:
            print(f"{subject.name}: weights of {subject.dtype} are measured in float32")
            subject.model.float()
        if flags.top_k > (pixels := subject.data.test.images[0].numel()):
            raise UsageError(f"--top-k {flags.top_k}: the Hessian of {pixels} pixel values has no more eigenvalues")
        images = to_pixels(subject.data.test.images[:EXAMPLES_TO_CHECK], subject.dtype)
        check_model(subject.model, images, len(subject.data.class_names), subject.name)
    return subjects


def load_checkpoint_subject(path: str, flags: argparse.Namespace, load) -> Subject:
    """A checkpoint of ours or of the reference code, with the data set it names; ``load`` is load_dataset, cached."""
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
    data = load(dataset, data_dir, checkpoint["image_size"])
    if len(data.class_names) != checkpoint["num_classes"]:
        raise UsageError(
            f"{path} tells {checkpoint['num_classes']} classes apart, but {dataset} has {len(data.class_names)}; "
            "give the --dataset (and --data-dir) it was trained on"
        )
    return Subject(path, arch, model, dataset, data)
