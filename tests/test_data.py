"""Batches, augmentation and the data sets: of odd or damaged files a correct result, or one line that names them."""

import pickle
import random
import re
import shutil
from itertools import product

import numpy as np
import pytest
import torch
import torchvision
from conftest import assert_one_line_error, run_main, write_cifar
from PIL import Image
from scipy.io import savemat

import train_models
from data.batches import Split, batches, to_pixels, training_batches
from data.datasets import DatasetEntry, ImageData, datasets, load_dataset, resize
from utils.errors import UserError


def split_of(n: int, size: int = 8) -> Split:
    images = torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return Split(images, torch.arange(n))


def test_every_example_once_per_epoch_in_an_order_only_seed_and_epoch_decide():
    """A last example alone joins the batch before: BatchNorm behind a 1 x 1 image cannot be trained on one."""

    def labels(n, batch_size, seed=0, epoch=1):
        return [batch.tolist() for _, batch, *_ in training_batches(split_of(n), batch_size, seed, epoch)]

    for n, batch_size, sizes in ((10, 4, [4, 4, 2]), (9, 4, [4, 5]), (1, 4, [1]), (3, 1, [1, 2])):
        assert [len(batch) for batch in labels(n, batch_size)] == sizes
        assert sorted(label for batch in labels(n, batch_size) for label in batch) == list(range(n))
    assert labels(10, 4) == labels(10, 4)
    assert len({str(labels(10, 4, seed, epoch)) for seed in (0, 1) for epoch in (1, 2)}) == 4


def test_fingerprints_tell_data_apart():
    split, changed = split_of(4), split_of(4)
    assert split.fingerprint() == changed.fingerprint()
    changed.images[0, 0, 0, 0] ^= 1
    for other in (changed, Split(split.images, split.labels + 1)):
        assert other.fingerprint() != split.fingerprint()


def test_unaugmented_batches_are_the_images_over_255():
    split = split_of(10)
    for images, labels, *_ in training_batches(split, 4, seed=0, epoch=1, augment=False):
        assert images.dtype == torch.float32
        torch.testing.assert_close(images, split.images[labels].double().div(255).float())
    images, labels = map(torch.cat, zip(*batches(split, 4), strict=True))
    assert torch.equal(labels, split.labels)
    assert torch.equal(images, to_pixels(split.images))


@pytest.mark.parametrize("flip", [True, False])
def test_augmentation_makes_exactly_the_crops_and_flips(flip):
    """Every result is one of torchvision-style pad by an eighth, crop, mirror, and every one of those occurs."""
    image = split_of(1, size=16).images
    padded = torch.nn.functional.pad(image, [2] * 4)
    crops = [padded[0, :, dy : dy + 16, dx : dx + 16] for dy in range(5) for dx in range(5)]
    crops += [crop.flip(2) for crop in crops] if flip else []
    split = Split(image.expand(1000, -1, -1, -1), torch.zeros(1000, dtype=torch.int64))
    (batch,) = training_batches(split, 1000, seed=0, epoch=1, flip=flip)
    assert {image.numpy().tobytes() for image in batch.images} == {to_pixels(crop).numpy().tobytes() for crop in crops}


def test_digits():
    data = load_dataset("digits", "nowhere")
    assert (data.train.images.shape, data.test.images.shape) == ((1437, 3, 16, 16), (360, 3, 16, 16))
    assert (data.train.images.dtype, data.train.images.max(), data.flip) == (torch.uint8, 255, False)
    assert data.test.labels.bincount().min() >= 34  # stratified
    assert load_dataset("digits", "nowhere", 32).test.images.shape == (360, 3, 32, 32)
    together = torch.cat([data.train.images, data.test.images]).flatten(1)
    assert len(together.unique(dim=0)) > 1790  # the two splits do not share images


def image_folder(root, files: dict[str, bytes | Image.Image]):
    """root/train and root/test with these files, images or their content by path, in both; returns root."""
    for name, content in files.items():
        for split in ("train", "test"):
            path = root / split / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content) if isinstance(content, bytes) else content.save(path)
    return root


@pytest.mark.filterwarnings("error:Palette")
def test_images_of_every_mode_size_and_name(tmp_path):
    palette = Image.new("P", (16, 16), 1)
    palette.putpalette([0, 0, 0, 77, 77, 77])
    palette.info["transparency"] = b"\x00\x80"
    images = {
        "a.png": Image.fromarray(np.full((20, 20), 77 * 256 + 200, dtype=np.uint16)),
        "b.tiff": Image.fromarray(np.full((9, 9), 77 * 256, dtype=np.int32)),
        "c.png": palette,
        "d.png": Image.new("LA", (3, 40), (77, 128)),
        "e.png": Image.new("RGBA", (1, 1), (77, 77, 77, 0)),
        "f.jpg": Image.new("CMYK", (40, 40), (178, 178, 178, 0)),
        "g.png": Image.new("RGB", (2000, 2000), (77, 77, 77)),
        "h.png": Image.fromarray(np.pad(np.full((16, 16), 77, dtype=np.uint8), [(0, 0), (9, 9)])),  # the square counts
        "собака\n😀.bmp": Image.new("L", (2, 300), 77),
        "notes.txt": b"not an image",
    }
    files = {f"a b\n'c 猫/{name}": image for name, image in images.items()}
    data = load_dataset("imagefolder", image_folder(tmp_path, files), 16)
    assert data.class_names == ["a b\n'c 猫"]
    assert len(data.train) == 9
    assert (data.train.images.int() - 77).abs().max() <= 2


@pytest.mark.parametrize(("names", "printed"), [("0 1 10 2", True), ("00 01 10", False), ("0 1 a 10 2", False)])
def test_numbered_classes_in_another_order_are_printed(tmp_path, capsys, names, printed):
    patch = Image.new("RGB", (4, 4), (10, 20, 30))
    data = load_dataset("imagefolder", image_folder(tmp_path, {f"{name}/0.png": patch for name in names.split()}), 16)
    assert data.class_names == sorted(names.split())
    assert (", ".join(data.class_names) in capsys.readouterr().out) == printed
    assert data.test.labels.tolist() == list(range(len(data.class_names)))
    assert data.test.images.amax((0, 2, 3)).tolist() == data.test.images.amin((0, 2, 3)).tolist() == [10, 20, 30]


def test_imagefolder_errors_name_the_file(photographs, tmp_path, capsys):
    patch = (photographs / "train/china/0.png").read_bytes()

    def refused(words: str) -> None:
        with pytest.raises(UserError, match=words):
            load_dataset("imagefolder", tmp_path)

    refused(r"train.*train/<class>")
    for split in ("train", "test"):
        (tmp_path / split / "a").mkdir(parents=True)
    refused(r"classes a\..*; add images")  # an empty class
    for split in ("test", "train"):
        image_folder(tmp_path, {"a/0.png": patch, "b/0.png": patch})
        shutil.rmtree(tmp_path / split / "b")
        refused(r"same classes.*'b'")
    (tmp_path / "train/a/two\nlines.png").write_bytes(patch[:100])
    flags = ["--dataset", "imagefolder", "--data-dir", tmp_path, "--output-dir", tmp_path / "out"]
    assert_one_line_error(run_main(train_models, flags, capsys), 1, "two\\nlines.png cannot be read")


def test_damaged_images(photographs, tmp_path):
    whole = (photographs / "train/china/0.png").read_bytes()
    generator = random.Random(0)
    for i in range(40):
        damaged = bytearray(whole)
        damaged[generator.randrange(len(whole))] ^= 1 << generator.randrange(8)
        image_folder(tmp_path, {"a/0.png": bytes(damaged[: len(whole) * i // 20])})  # the later half is whole
        try:
            assert len(load_dataset("imagefolder", tmp_path, 16).test) == 1
            assert i >= 10
        except UserError as error:
            assert re.search(r"^[^\n]*0\.png[^\n]*$", str(error))  # noqa: PT017


def test_cifar_through_torchvision(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"cifar10: .* is missing; pass --download, or unpack http"):
        load_dataset("cifar10", tmp_path)
    write_cifar(tmp_path, monkeypatch, "CIFAR10")
    data = load_dataset("cifar10", tmp_path)
    assert data.train.images.shape == (15, 3, 32, 32)
    assert data.test.labels.tolist() == [0, 1, 2]
    assert len(data.class_names) == 10
    (test_file,) = tmp_path.glob("*/test*")
    whole = test_file.read_bytes()
    assert torch.equal(data.test.images.flatten(1), torch.from_numpy(pickle.loads(whole)["data"]))
    assert load_dataset("cifar10", tmp_path, 16).train.images.shape == (15, 3, 16, 16)
    for damaged in (b"", whole[:-100], whole[:-1] + bytes([whole[-1] ^ 1])):  # torchvision's checksums notice
        test_file.write_bytes(damaged)
        with pytest.raises(UserError, match=r"cifar10: a file under .* is damaged"):
            load_dataset("cifar10", tmp_path)


def test_labels_out_of_range(monkeypatch):
    for labels in ([0, 1, 10], [0, -1, 2]):
        data = ImageData(split_of(3), Split(split_of(3).images, torch.tensor(labels)), ["a"] * 10, flip=True)
        monkeypatch.setitem(datasets, "cifar10", DatasetEntry(lambda *_, data=data: data, 8))
        with pytest.raises(UserError, match=rf"cifar10: the test labels .* from {min(labels)} .* there are 10 classes"):
            load_dataset("cifar10", "nowhere")


def test_svhn_through_torchvision(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"train_32x32\.mat is missing"):
        load_dataset("svhn", tmp_path)
    images = np.random.default_rng(0).integers(0, 256, (32, 32, 3, 4), dtype=np.uint8)
    for name in ("train_32x32.mat", "test_32x32.mat"):
        savemat(tmp_path / name, {"X": images, "y": np.array([[10], [1], [2], [9]])})
    monkeypatch.setattr(torchvision.datasets.SVHN, "_check_integrity", lambda self: True)
    data = load_dataset("svhn", tmp_path)
    assert data.test.labels.tolist() == [0, 1, 2, 9]  # SVHN writes 0 as 10
    assert torch.equal(data.train.images, torch.from_numpy(images.transpose(3, 2, 0, 1).copy()))
    whole = (tmp_path / name).read_bytes()
    for length in range(0, len(whole), len(whole) // 10):
        (tmp_path / name).write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"svhn: a file under .* is damaged"):
            load_dataset("svhn", tmp_path)


def test_resizing_in_parts_is_resizing_at_once():
    images = split_of(17, 8).images
    for size in (512, 4):  # of the large ones 16 are a part
        whole = torch.nn.functional.interpolate(images.float(), (size, size), mode="bilinear", antialias=True)
        assert torch.equal(resize(images, size), whole.round().clamp(0, 255).byte())
    assert resize(images, 8) is images


def test_images_larger_than_the_machines_memory_are_refused(photographs, tmp_path, capsys):
    for name, size in product(("digits", "imagefolder"), (2**24, 2**31)):
        flags = ["--data-dir", photographs, "--image-size", size, "--output-dir", tmp_path]
        result = run_main(train_models, [*flags, "--dataset", name], capsys)
        assert_one_line_error(result, 1, "out of memory", "smaller", "--image-size")


def test_a_single_example_is_too_few_for_batchnorm(thin_vgg, photographs, tmp_path, capsys):
    """Behind four poolings a 16 x 16 image is 1 x 1."""
    patch = (photographs / "train/china/0.png").read_bytes()
    flags = ["--model-arch", "vgg11", "--dataset", "imagefolder", "--image-size", 16, "--output-dir", tmp_path / "out"]
    flags += ["--data-dir", image_folder(tmp_path, {"a/0.png": patch})]
    assert_one_line_error(run_main(train_models, flags, capsys), 1, "one example", "BatchNorm", "--batch-size")
