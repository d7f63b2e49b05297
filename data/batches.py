"""Batches of pixels in [0, 1] from a split in memory, made on its device."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Split:
    """Images (n, 3, H, H) uint8 and labels (n,) int64, on one device."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> "Split":
        return Split(self.images.to(device), self.labels.to(device))

    def fingerprint(self) -> str:
        """A hash of every pixel and label: equal for equal data, wherever it lies."""
        digest = hashlib.sha256(str(tuple(self.images.shape)).encode())
        for tensor in (self.images, self.labels):
            digest.update(tensor.cpu().contiguous().numpy())
        return digest.hexdigest()

    def __getitem__(self, indices: Tensor | slice) -> "Split":
        """The examples at an index tensor or slice, as a split of their own."""
        return Split(self.images[indices], self.labels[indices])


class Batch(NamedTuple):
    """A process's part of a training batch: pixels (n, 3, H, H) and labels (n,)."""

    images: Tensor
    labels: Tensor
    size: int  # examples of the whole batch, over all processes
    share: float  # this part of them; 0 for examples that stand in where a process would have none


def to_pixels(images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """uint8 images -> pixels in [0, 1], without normalization."""
    return images.to(dtype) / 255


def random_crop_and_flip(images: Tensor, padding: int, flip: bool, generator: torch.Generator) -> Tensor:
    """RandomCrop(H, padding) and, if ``flip``, RandomHorizontalFlip of images (N, C, H, W)."""
    n, _, height, width = images.shape
    device = images.device
    dy, dx = torch.randint(0, 2 * padding + 1, (2, n, 1), generator=generator, device=device)
    columns = torch.arange(width, device=device).expand(n, width)
    if flip:
        mirrored = torch.rand(n, 1, generator=generator, device=device) < 0.5
        columns = torch.where(mirrored, width - 1 - columns, columns)
    rows = torch.arange(height, device=device) + dy
    columns = columns + dx
    padded = F.pad(images, [padding] * 4)
    example = torch.arange(n, device=device)[:, None, None]
    # indices around the channel slice put the channels last; back to (N, C, H, W)
    return padded[example, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


def epoch_seed(seed: int, epoch: int) -> int:
    """Each epoch's own seed, so that a resumed run shuffles and augments as if it had never stopped."""
    return (seed * 1_000_003 + epoch) % 2**63


def training_batches(
    split: Split, batch_size: int, seed: int, epoch: int, augment=True, flip=True, rank=0, world_size=1
) -> Iterator[Batch]:
    """One epoch: every example once, in an order and with augmentations that only (seed, epoch) decide.

    Every process augments the whole batch and keeps its part: the images do not depend on the number of processes. A
    single last example joins the batch before: BatchNorm cannot train on one 1 x 1 image. The crop's padding is H / 8.
    """
    generator = torch.Generator(split.images.device).manual_seed(epoch_seed(seed, epoch))
    order = torch.randperm(len(split), generator=generator, device=split.images.device)
    parts = list(order.split(batch_size))
    if len(parts) > 1 and len(parts[-1]) == 1:
        parts[-2:] = [torch.cat(parts[-2:])]
    for indices in parts:
        batch = split[indices]
        images = batch.images
        if augment:
            images = random_crop_and_flip(images, images.shape[-1] // 8, flip, generator)
        # to as many processes as can have two examples, which BatchNorm may need; on the others two stand in
        active = max(1, min(world_size, len(indices) // 2))
        own = slice(rank, None, active) if rank < active else slice(2)
        images, labels = images[own].contiguous(), batch.labels[own].contiguous()
        share = len(labels) / len(indices) if rank < active else 0.0
        yield Batch(to_pixels(images), labels, len(indices), share)


def batches(split: Split, batch_size: int, dtype: torch.dtype = torch.float32) -> Iterator[tuple[Tensor, Tensor]]:
    """The split in order, not augmented: pixels (n, 3, H, H) and labels (n,)."""
    for images, labels in zip(split.images.split(batch_size), split.labels.split(batch_size), strict=True):
        yield to_pixels(images, dtype), labels
