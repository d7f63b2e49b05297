"""Batches, augmentation and the data sets: of odd or damaged files a correct result, or one line that names them."""

import pickle
import random
import re
import shutil

import numpy as np
import pytest
import torch
import torchvision
from conftest import assert_one_line_error, run_main, write_cifar
from PIL import Image
from scipy.io import savemat

import train_models
from data.batches import Split, batches, random_crop_and_flip, to_pixels, training_batches
from data.datasets import DatasetEntry, ImageData, datasets, load_dataset, resize
from utils.errors import UserError


def split_of(n: int, size: int = 8) -> Split:
    images = torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return Split(images, torch.arange(n))


@pytest.mark.parametrize(
    ("batch_size", "n", "sizes"), [(4, 10, [4, 4, 2]), (4, 9, [4, 5]), (4, 1, [1]), (1, 3, [1, 2])]
)
def test_every_example_once_per_epoch_in_an_order_only_seed_and_epoch_decide(batch_size, n, sizes):
    """A last example alone joins the batch before: BatchNorm behind a 1 x 1 image cannot be trained on one."""

    def labels(seed, epoch):
        return [batch.tolist() for _, batch, *_ in training_batches(split_of(n), batch_size, seed, epoch)]

    assert [len(batch) for batch in labels(0, 1)] == sizes
    assert sorted(label for batch in labels(0, 1) for label in batch) == list(range(n))
    assert labels(0, 1) == labels(0, 1)
    assert n < 10 or len({str(labels(seed, epoch)) for seed in (0, 1) for epoch in (1, 2)}) == 4


def test_fingerprints_tell_data_apart():
    split = split_of(4)
    assert split.fingerprint() == split_of(4).fingerprint()
    changed = split.images.clone()
    changed[0, 0, 0, 0] ^= 1
    for other in (Split(changed, split.labels), Split(split.images, split.labels + 1)):
        assert other.fingerprint() != split.fingerprint()


def test_unaugmented_batches_are_the_images_over_255():
    split = split_of(10)
    for images, labels, *_ in training_batches(split, 4, seed=0, epoch=1, augment=False):
        assert images.dtype == torch.float32
        torch.testing.assert_close(images, split.images[labels].double().div(255).float())
    ordered = list(batches(split, 4))
    assert torch.equal(torch.cat([labels for _, labels in ordered]), split.labels)
    assert torch.equal(torch.cat([images for images, _ in ordered]), to_pixels(split.images))


@pytest.mark.parametrize("flip", [True, False])
def test_augmentation_makes_exactly_the_crops_and_flips(flip):
    """Every result is one of torchvision-style pad, crop, mirror, and every one of those occurs."""
    image = split_of(1, size=6).images
    padded = torch.nn.functional.pad(image, [2] * 4)
    crops = [padded[0, :, dy : dy + 6, dx : dx + 6] for dy in range(5) for dx in range(5)]
    crops += [crop.flip(2) for crop in crops] if flip else []
    possible = {crop.numpy().tobytes() for crop in crops}
    generator = torch.Generator().manual_seed(0)
    results = random_crop_and_flip(image.expand(3000, -1, -1, -1), 2, flip, generator)
    assert results.shape == (3000, 3, 6, 6)
    assert {result.numpy().tobytes() for result in results.contiguous()} == possible


def test_the_crop_is_by_an_eighth_of_the_size():
    """4 at 32 x 32: in a white image, no more than 4 rows or columns of zeros come in, and 4 do."""
    white = Split(torch.full((200, 3, 32, 32), 255, dtype=torch.uint8), torch.zeros(200, dtype=torch.int64))
    (images, *_), *_ = training_batches(white, 200, seed=0, epoch=1)
    zero_rows = (images[:, 0].amax(dim=2) == 0).sum(dim=1)
    assert zero_rows.max() == 4


def test_digits():
    data = load_dataset("digits", "nowhere")
    assert data.train.images.shape == (1437, 3, 16, 16)
    assert data.test.images.shape == (360, 3, 16, 16)
    assert data.train.images.dtype == torch.uint8
    assert data.train.images.max() == 255
    assert data.test.labels.bincount().min() >= 34  # stratified
    assert not data.flip
    assert load_dataset("digits", "nowhere", 32).test.images.shape == (360, 3, 32, 32)
    together = torch.cat([data.train.images, data.test.images]).flatten(1)
    assert len(together.unique(dim=0)) > 1790  # the two splits do not share images


def test_imagefolder(photographs):
    data = load_dataset("imagefolder", photographs, 16)
    assert data.class_names == ["china", "flower"]
    assert data.train.images.shape == (24, 3, 16, 16)
    assert data.test.labels.tolist() == [0] * 6 + [1] * 6
    native = np.array(Image.open(photographs / "test" / "china" / "0.png"))
    means = torch.from_numpy(native).double().mean(dim=(0, 1))
    torch.testing.assert_close(data.test.images[0].double().mean(dim=(1, 2)), means, rtol=0, atol=3)


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
        "собака\n😀.bmp": Image.new("L", (2, 300), 77),
        "notes.txt": b"not an image",
    }
    files = {f"a b\n'c 猫/{name}": image for name, image in images.items()}
    data = load_dataset("imagefolder", image_folder(tmp_path, files), 16)
    assert data.class_names == ["a b\n'c 猫"]
    assert len(data.train) == 8
    assert (data.train.images.int() - 77).abs().max() <= 2


@pytest.mark.parametrize(
    ("names", "printed"), [("0 1 10 2", True), ("-1 -10", True), ("00 01 10", False), ("0 1 a 10 2", False)]
)
def test_numbered_classes_in_another_order_are_printed(tmp_path, capsys, names, printed):
    patch = Image.new("L", (4, 4))
    data = load_dataset("imagefolder", image_folder(tmp_path, {f"{name}/0.png": patch for name in names.split()}), 16)
    assert data.class_names == sorted(names.split())
    assert (", ".join(data.class_names) in capsys.readouterr().out) == printed


def test_imagefolder_errors_name_the_file(photographs, tmp_path, capsys):
    patch = (photographs / "train/china/0.png").read_bytes()

    def refused(words: str) -> None:
        with pytest.raises(UserError, match=words):
            load_dataset("imagefolder", tmp_path)

    refused(r"train.*train/<class>")
    for split in ("train", "test"):
        (tmp_path / split / "a").mkdir(parents=True)
    refused(r"classes a\..*; add images")  # an empty class
    image_folder(tmp_path, {"a/0.png": patch, "b/0.png": patch})
    shutil.rmtree(tmp_path / "train/b")
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


@pytest.mark.parametrize(("name", "class_name", "count"), [("cifar10", "CIFAR10", 15), ("cifar100", "CIFAR100", 3)])
def test_cifar_through_torchvision(name, class_name, count, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=rf"{name}: .* is missing; pass --download, or unpack http"):
        load_dataset(name, tmp_path)
    write_cifar(tmp_path, monkeypatch, class_name)
    data = load_dataset(name, tmp_path)
    assert data.train.images.shape == (count, 3, 32, 32)
    assert data.test.labels.tolist() == [0, 1, 2]
    assert len(data.class_names) == (100 if name == "cifar100" else 10)
    test_file = next(tmp_path.glob("*/test*"))
    whole = test_file.read_bytes()
    raw = pickle.loads(whole)["data"].reshape(3, 3, 32, 32)
    assert torch.equal(data.test.images, torch.from_numpy(raw))
    assert load_dataset(name, tmp_path, 16).train.images.shape == (count, 3, 16, 16)
    for damaged in (b"", whole[:-100], whole[:-1] + bytes([whole[-1] ^ 1])):  # torchvision's checksums notice
        test_file.write_bytes(damaged)
        with pytest.raises(UserError, match=f"{name}: a file under .* is damaged"):
            load_dataset(name, tmp_path)


@pytest.mark.parametrize("labels", [[0, 1, 10], [0, -1, 2]])
def test_labels_out_of_range(labels, monkeypatch):
    test = Split(split_of(3).images, torch.tensor(labels))
    data = ImageData(split_of(3), test, [str(i) for i in range(10)], flip=True)
    monkeypatch.setitem(datasets, "cifar10", DatasetEntry(lambda *arguments: data, 8))
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
    images = split_of(70, 8).images  # 64 are a part
    whole = torch.nn.functional.interpolate(images.float(), (256, 256), mode="bilinear", antialias=True)
    assert torch.equal(resize(images, 256), whole.round().clamp(0, 255).byte())
    assert resize(images, 8) is images


@pytest.mark.parametrize("name", ["digits", "imagefolder"])
def test_images_larger_than_the_machines_memory_are_refused(name, photographs, tmp_path, capsys):
    flags = ["--dataset", name, "--data-dir", photographs, "--image-size", 2**24, "--output-dir", tmp_path]
    assert_one_line_error(run_main(train_models, flags, capsys), 1, "out of memory", "smaller", "--image-size")


@pytest.mark.parametrize(("count", "batch_size"), [(1, 4), (3, 1), (9, 8)])
def test_batches_of_one(count, batch_size, thin_vgg, photographs, tmp_path, capsys):
    patches = {f"a/{i}.png": (photographs / f"train/china/{i}.png").read_bytes() for i in range(count)}
    flags = ["--model-arch", "vgg11", "--dataset", "imagefolder", "--image-size", 16, "--num-epochs", 1, "--lr", 0.001]
    flags += ["--data-dir", image_folder(tmp_path, patches), "--batch-size", batch_size]
    result = run_main(train_models, [*flags, "--output-dir", tmp_path / "out"], capsys)
    if count == 9:  # one is left over
        assert result.returncode == 0, result.stderr
    else:  # behind four poolings a 16 x 16 image is 1 x 1
        assert_one_line_error(result, 1, "one example", "BatchNorm", "--batch-size")
