"""The data sets by name, each loaded once into uint8 tensors."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
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
    """Two splits, and the names of the classes that the labels index."""

    train: Split
    test: Split
    class_names: list[str]
    flip: bool  # whether a mirrored image still shows its class

    def fingerprint(self) -> str:
        """A hash of every pixel and label of both splits."""
        return f"{self.train.fingerprint()} {self.test.fingerprint()}"

    def to(self, device: torch.device) -> "ImageData":
        return ImageData(self.train.to(device), self.test.to(device), self.class_names, self.flip)


def resize(images: torch.Tensor, size: int) -> torch.Tensor:
    """(n, 3, H, W) uint8 -> (n, 3, size, size) uint8, bilinear with antialiasing."""
    if images.shape[-2:] == (size, size):
        return images
    resized = images.new_empty(len(images), 3, size, size)  # at once: what does not fit into memory fails here
    at_once = max(1, 2**22 // size**2)  # in float32 they take four times as much
    for chunk, place in zip(images.split(at_once), resized.split(at_once), strict=True):
        values = F.interpolate(chunk.float(), (size, size), mode="bilinear", antialias=True, align_corners=False)
        place.copy_(values.round_().clamp_(0, 255))
    return resized


def as_split(images: np.ndarray, labels, size: int) -> Split:
    """(n, H, W, 3) uint8 images and n class indices as a Split of the given size."""
    images = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
    return Split(resize(images, size), torch.as_tensor(np.asarray(labels), dtype=torch.int64))


@contextlib.contextmanager
def explained(name: str, data_dir: Path, files: list[str], url: str, download: bool) -> Iterator[None]:
    """Turn whatever torchvision raises into one line: what is wrong, and how to get it."""
    try:
        yield
    except Exception as error:  # RuntimeError, URLError, UnpicklingError, MatReadError, ...
        missing = [data_dir / file for file in files if not (data_dir / file).is_file()]
        if download:
            problem = f"could not be downloaded ({error}); get it elsewhere and"
        elif missing:
            problem = f"{missing[0]} is missing; pass --download, or"
        else:
            problem = f"a file under {data_dir} is damaged ({error}); delete it and pass --download, or"
        raise UserError(f"{name}: {problem} unpack {url} under {data_dir}") from error


def load_cifar(class_name: str, data_dir: Path, size: int, download: bool) -> ImageData:
    """CIFAR-10 or CIFAR-100: 50,000 and 10,000 images of 32 x 32."""
    import torchvision

    dataset = getattr(torchvision.datasets, class_name)
    files = [f"{dataset.base_folder}/{file}" for file, _ in dataset.train_list + dataset.test_list]
    with explained(class_name.lower(), data_dir, files, dataset.url, download):
        train, test = (dataset(data_dir, train=split, download=download) for split in (True, False))
    splits = (as_split(split.data, split.targets, size) for split in (train, test))
    return ImageData(*splits, class_names=list(train.classes), flip=True)


def load_svhn(data_dir: Path, size: int, download: bool) -> ImageData:
    """SVHN, cropped digits: 73,257 and 26,032 images of 32 x 32."""
    import torchvision

    dataset = torchvision.datasets.SVHN
    urls, files, _ = zip(*(dataset.split_list[split] for split in ("train", "test")), strict=True)
    with explained("svhn", data_dir, files, " and ".join(urls), download):
        train, test = (dataset(data_dir, split=split, download=download) for split in ("train", "test"))
    splits = (as_split(split.data.transpose(0, 2, 3, 1), split.labels, size) for split in (train, test))
    # a mirrored digit is another symbol, but the reference flips SVHN too
    return ImageData(*splits, class_names=[str(digit) for digit in range(10)], flip=True)


def load_digits(data_dir: Path, size: int, download: bool) -> ImageData:
    """scikit-learn's 1,797 handwritten digits (8 x 8 grey), enlarged; a fixed stratified 80/20 split."""
    from sklearn.datasets import load_digits as load
    from sklearn.model_selection import train_test_split

    grey, labels = load(return_X_y=True)
    images = np.repeat((grey.reshape(-1, 8, 8, 1) / 16 * 255).round().astype(np.uint8), 3, axis=3)
    train, test = train_test_split(np.arange(len(labels)), test_size=0.2, stratify=labels, random_state=0)
    splits = (as_split(images[part], labels[part], size) for part in (train, test))
    return ImageData(*splits, class_names=[str(digit) for digit in range(10)], flip=False)


def read_image(path: str):
    """The image at path in RGB; of 16-bit greys the upper 8 bits, where PIL would clip to white."""
    from PIL import Image

    with Image.open(path) as image:
        if image.mode.startswith("I"):
            return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
        # through RGBA, as PIL warns of a palette with transparency otherwise
        return (image.convert("RGBA") if image.mode == "P" else image).convert("RGB")


def load_image_folder(root: Path, size: int) -> tuple[Split, list[str]]:
    """The images of root/<class>/..., and the names of the classes."""
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import functional

    try:
        folder = ImageFolder(root)
    except OSError as error:  # no such folder, or an empty class
        remedy = "add images: --data-dir must hold train/<class>/ and test/<class>/"
        problem = error.strerror or " ".join(str(error).split())
        raise UserError(f"imagefolder: {root}: {problem}; {remedy}") from error
    images = torch.empty(len(folder), size, size, 3, dtype=torch.uint8).numpy()  # numpy's own refusal is a ValueError
    for i, (path, _) in enumerate(progress(folder.samples, f"reading {root}", len(folder), "images")):
        try:
            image = read_image(path)
        except Exception as error:  # PIL raises OSError, SyntaxError, DecompressionBombError, ...
            raise UserError(f"imagefolder: {path} cannot be read as an image ({error}); remove it") from error
        images[i] = functional.center_crop(functional.resize(image, size), size)
    return as_split(images, folder.targets, size), folder.classes


def load_imagefolder(data_dir: Path, size: int, download: bool) -> ImageData:
    """Any images at data_dir/train/<class>/... and data_dir/test/<class>/...

    Each is made RGB, its shorter side scaled to ``size``, and cut to the central square.
    """
    train, train_classes = load_image_folder(data_dir / "train", size)
    test, test_classes = load_image_folder(data_dir / "test", size)
    if odd := sorted(set(train_classes) ^ set(test_classes)):
        raise UserError(f"imagefolder: train and test in {data_dir} must have the same classes; one lacks {odd[0]!r}")
    with contextlib.suppress(ValueError):  # the names are not all integers
        if train_classes != sorted(train_classes, key=int):
            print(f"imagefolder: the classes are in the order of their names as text: {', '.join(train_classes)}")
    return ImageData(train, test, train_classes, flip=True)


class DatasetEntry(NamedTuple):
    load: Callable[[Path, int, bool], ImageData]  # (data_dir, size, download)
    image_size: int  # the default for --image-size


datasets = {
    "cifar10": DatasetEntry(partial(load_cifar, "CIFAR10"), 32),
    "cifar100": DatasetEntry(partial(load_cifar, "CIFAR100"), 32),
    "svhn": DatasetEntry(load_svhn, 32),
    "digits": DatasetEntry(load_digits, 16),
    "imagefolder": DatasetEntry(load_imagefolder, 32),
}


def load_dataset(name: str, data_dir: str | Path, image_size: int | None = None, download: bool = False) -> ImageData:
    """Load a data set by its name in ``datasets``.

    Args:
        data_dir: where its files lie, or are put: in torchvision's layout, or train/ and test/.
        image_size: height and width of the images, in pixels; None for the data set's own default.
        download: fetch missing files (cifar10, cifar100, svhn).

    Raises:
        UserError: if files are missing or damaged; it says which, and how to get them.
    """
    entry = datasets[name]
    with distributed.first_of_machine_first() if download else contextlib.nullcontext():
        data = entry.load(Path(data_dir), image_size or entry.image_size, download)
    classes = len(data.class_names)
    for split_name, split in (("training", data.train), ("test", data.test)):
        low, high = int(split.labels.min()), int(split.labels.max())
        if low < 0 or high >= classes:
            found = f"the {split_name} labels under {data_dir} go from {low} to {high}"
            raise UserError(f"{name}: {found}, but there are {classes} classes; use another copy of it")
    return data
