"""The data sets by name, each loaded once into uint8 tensors. ``--dataset`` and its help come from ``datasets``."""

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from data.batches import Split
from utils import distributed
from utils.errors import UserError
from utils.progress import progress


@dataclass(frozen=True)
class ImageData:
    """A data set in memory: two splits of the same image size, and the names of the classes the labels index."""

    train: Split
    test: Split
    class_names: list[str]
    flip: bool  # whether a mirrored image still shows its class

    def fingerprint(self) -> str:
        """A hash of every pixel and label of both splits."""
        return f"{self.train.fingerprint()} {self.test.fingerprint()}"

    def to(self, device: torch.device) -> "ImageData":
        return ImageData(self.train.to(device), self.test.to(device), self.class_names, self.flip)


def check_room(count: int, size: int) -> None:
    """Raise UserError if so many images of size x size are more than the machine's memory: all are kept there."""
    needed, there = count * 3 * size**2, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        raise UserError(
            f"{count} images of {size} x {size} take {needed / 2**30:.3g} GiB, and this machine has "
            f"{there / 2**30:.3g} GiB of memory; give a smaller --image-size"
        )


def resize(images: torch.Tensor, size: int) -> torch.Tensor:
    """(n, 3, H, W) uint8 -> (n, 3, size, size) uint8, bilinear with antialiasing; unchanged where the size is right.

    Raises:
        UserError: if the machine has not that much memory.
    """
    if images.shape[-2:] == (size, size):
        return images
    check_room(len(images), size)
    resized = images.new_empty(len(images), 3, size, size)
    at_once = max(1, 2**22 // size**2)  # in float32 they take four times as much
    for chunk, place in zip(images.split(at_once), resized.split(at_once), strict=True):
        values = F.interpolate(chunk.float(), (size, size), mode="bilinear", antialias=True, align_corners=False)
        place.copy_(values.round_().clamp_(0, 255))
    return resized


def as_split(images: np.ndarray, labels, size: int) -> Split:
    """(n, H, W, 3) uint8 images and n class indices, as torchvision keeps them, as a Split of the given size."""
    images = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
    return Split(resize(images, size), torch.as_tensor(np.asarray(labels), dtype=torch.int64))


def explain_torchvision_failure(
    name: str, data_dir: Path, files: list[str], url: str, download: bool, error: Exception
) -> UserError:
    """The one line for a torchvision data set that could not be loaded: which file, and how to get it."""
    missing = [file for file in files if not (data_dir / file).is_file()]
    how = f"unpack {url} under {data_dir}"
    if download:
        return UserError(f"{name} could not be downloaded ({error}); get it elsewhere and {how}")
    if missing:
        return UserError(f"{name}: {data_dir / missing[0]} is missing; pass --download, or {how}")
    return UserError(
        f"{name}: a file under {data_dir} is damaged ({error}); delete it and pass --download, or {how} again"
    )


def load_cifar(class_name: str, data_dir: Path, size: int, download: bool) -> ImageData:
    """CIFAR-10 or CIFAR-100 through torchvision's class of that name; 50,000 and 10,000 images of 32 x 32."""
    import torchvision

    dataset = getattr(torchvision.datasets, class_name)
    try:
        train, test = (dataset(str(data_dir), train=split, download=download) for split in (True, False))
    except Exception as error:  # torchvision raises RuntimeError, URLError, EOFError, UnpicklingError, ...
        files = [f"{dataset.base_folder}/{file}" for file, _ in dataset.train_list + dataset.test_list]
        raise explain_torchvision_failure(class_name.lower(), data_dir, files, dataset.url, download, error) from error
    splits = (as_split(split.data, split.targets, size) for split in (train, test))
    return ImageData(*splits, class_names=list(train.classes), flip=True)


def load_svhn(data_dir: Path, size: int, download: bool) -> ImageData:
    """SVHN (cropped digits) through torchvision; 73,257 and 26,032 images of 32 x 32."""
    import torchvision

    dataset = torchvision.datasets.SVHN
    try:
        train, test = (dataset(str(data_dir), split=split, download=download) for split in ("train", "test"))
    except Exception as error:  # torchvision raises RuntimeError, URLError, scipy's MatReadError, ...
        files = [dataset.split_list[split][1] for split in ("train", "test")]
        url = " and ".join(dataset.split_list[split][0] for split in ("train", "test"))
        raise explain_torchvision_failure("svhn", data_dir, files, url, download, error) from error
    splits = (as_split(split.data.transpose(0, 2, 3, 1), split.labels, size) for split in (train, test))
    # a mirrored digit is another symbol, but the reference flips SVHN too
    return ImageData(*splits, class_names=[str(digit) for digit in range(10)], flip=True)


def load_digits(data_dir: Path, size: int, download: bool) -> ImageData:
    """scikit-learn's 1,797 real handwritten digits (8 x 8 grey), enlarged; a fixed stratified 80/20 split.

    They come with scikit-learn, so data_dir and download play no part.
    """
    from sklearn.datasets import load_digits as load
    from sklearn.model_selection import train_test_split

    grey, labels = load(return_X_y=True)
    images = np.repeat((grey.reshape(-1, 8, 8, 1) / 16 * 255).round().astype(np.uint8), 3, axis=3)
    train, test = train_test_split(np.arange(len(labels)), test_size=0.2, stratify=labels, random_state=0)
    splits = (as_split(images[part], labels[part], size) for part in (train, test))
    return ImageData(*splits, class_names=[str(digit) for digit in range(10)], flip=False)


def read_image(path: str):
    """The image at path as PIL's RGB; 16-bit greys keep their upper 8 bits, where PIL itself would clip them to white.

    Raises:
        ValueError: on values that are not those of pixels: floating-point numbers, or integers of more than 16 bits.
        OSError, SyntaxError, ...: PIL's, on what it cannot read.
    """
    from PIL import Image

    with Image.open(path) as image:
        if image.mode.startswith("I"):
            grey = np.asarray(image)
            if grey.min() < 0 or grey.max() >= 2**16:
                raise ValueError(f"values from {grey.min()} to {grey.max()}")
            return Image.fromarray((grey >> 8).astype(np.uint8)).convert("RGB")
        if image.mode == "F":
            raise ValueError("floating-point values")
        # through RGBA, as PIL warns of a palette with transparency otherwise
        return (image.convert("RGBA") if image.mode == "P" else image).convert("RGB")


def refuse_link_loops(root: Path) -> None:
    """Raise UserError if a link leads back to a folder it lies in: its images would be found again and again."""
    to_do: list[tuple[Path, frozenset[Path]]] = [(root, frozenset())]  # a folder, and those on the way to it
    while to_do:
        folder, above = to_do.pop()
        own = folder.resolve()
        if own in above:
            raise UserError(f"imagefolder: {folder} is a link to a folder that it lies in; remove it")
        to_do += [(Path(entry), above | {own}) for entry in os.scandir(folder) if os.path.isdir(entry)]


def load_imagefolder(data_dir: Path, size: int, download: bool) -> ImageData:
    """Any images at data_dir/train/<class>/... and data_dir/test/<class>/..., through torchvision's ImageFolder.

    Each is made RGB, its shorter side scaled to ``size``, and cut to the central square.
    """
    from torchvision.datasets import ImageFolder
    from torchvision.transforms.functional import center_crop
    from torchvision.transforms.functional import resize as resize_image

    def load(split: str) -> tuple[Split, list[str]]:
        root = data_dir / split
        if not root.is_dir():
            raise UserError(f"imagefolder: no folder {root}; --data-dir must hold train/<class>/ and test/<class>/")
        try:
            refuse_link_loops(root)
            folder = ImageFolder(str(root), loader=read_image)
        except OSError as error:
            raise UserError(f"imagefolder: {root}: {' '.join(str(error).split())}; add images, or mend it") from error
        check_room(len(folder), size)
        images = np.empty((len(folder), size, size, 3), dtype=np.uint8)
        samples = progress(folder.samples, f"reading {root}", len(folder), "images")
        for i, (path, _) in enumerate(samples):
            try:
                image = folder.loader(path)
            except Exception as error:  # PIL raises OSError, SyntaxError, DecompressionBombError, ...
                raise UserError(f"imagefolder: {path} cannot be read as an image ({error}); remove it") from error
            images[i] = center_crop(resize_image(image, size), size) if image.size != (size, size) else image
        return as_split(images, folder.targets, size), folder.classes

    train, train_classes = load("train")
    test, test_classes = load("test")
    if train_classes != test_classes:
        odd = sorted(set(train_classes) ^ set(test_classes))
        raise UserError(
            f"imagefolder: train and test under {data_dir} must have the same classes; only one has {odd[0]!r}"
        )
    return ImageData(train, test, train_classes, flip=True)


class DatasetEntry(NamedTuple):
    load: Callable[[Path, int, bool], ImageData]  # (data_dir, size, download)
    image_size: int  # the default for --image-size


def load_cifar10(data_dir: Path, size: int, download: bool) -> ImageData:
    return load_cifar("CIFAR10", data_dir, size, download)


def load_cifar100(data_dir: Path, size: int, download: bool) -> ImageData:
    return load_cifar("CIFAR100", data_dir, size, download)


datasets = {
    "cifar10": DatasetEntry(load_cifar10, 32),
    "cifar100": DatasetEntry(load_cifar100, 32),
    "svhn": DatasetEntry(load_svhn, 32),
    "digits": DatasetEntry(load_digits, 16),
    "imagefolder": DatasetEntry(load_imagefolder, 32),
}


def load_dataset(name: str, data_dir: str | Path, image_size: int | None = None, download: bool = False) -> ImageData:
    """Load a data set by its name in ``datasets``.

    Args:
        name: a key of ``datasets``.
        data_dir: where its files lie, or go with ``download``. torchvision's own layout; for imagefolder the folder
            that holds train/ and test/.
        image_size: height and width of the images, in pixels; None for the data set's own default.
        download: fetch missing files (cifar10, cifar100, svhn).

    Raises:
        UserError: if files are missing or damaged; the message says which, and how to get them.
    """
    entry = datasets[name]
    with distributed.first_of_machine_first() if download else contextlib.nullcontext():
        data = entry.load(Path(data_dir), image_size or entry.image_size, download)
    for split_name, split in (("training", data.train), ("test", data.test)):
        if not len(split):
            raise UserError(f"{name}: {data_dir} has no {split_name} images; use another copy of it")
        if split.labels.min() < 0 or split.labels.max() >= len(data.class_names):
            raise UserError(
                f"{name}: the {split_name} labels under {data_dir} go from {split.labels.min()} to "
                f"{split.labels.max()}, but there are {len(data.class_names)} classes; use another copy of it"
            )
    return data
