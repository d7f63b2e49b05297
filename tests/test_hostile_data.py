"""Data that is damaged, odd or malicious: a correct result, or one clear line."""

import pickle
import random

import numpy as np
import pytest
import torch
from conftest import assert_one_line_error, run_main, write_cifar
from PIL import Image
from scipy.io import savemat

import train_models
from data.batches import Split, training_batches
from data.datasets import load_dataset
from utils.errors import UserError


def write_images(root, **images) -> None:
    """The same images, by file name, in train and test of one class."""
    for split in ("train", "test"):
        folder = root / split / "only"
        folder.mkdir(parents=True)
        for name, image in images.items():
            image.save(folder / name.replace("__", "."))


def split_or_refusal(name, data_dir) -> tuple[Split | None, str]:
    """The test split, or the one line that says why not."""
    try:
        return load_dataset(name, data_dir).test, ""
    except UserError as error:
        assert len(str(error).splitlines()) == 1  # noqa: PT017
        return None, str(error)


def test_images_of_every_mode_and_size(tmp_path):
    grey16 = Image.fromarray(np.full((20, 20), 77 * 256 + 200, dtype=np.uint16))
    palette = Image.new("P", (16, 16), 1)
    palette.putpalette([0, 0, 0, 77, 77, 77])
    palette.info["transparency"] = b"\x00\x80"
    write_images(
        tmp_path,
        a__png=grey16,
        b__tiff=Image.fromarray(np.full((9, 9), 77 * 256, dtype=np.int32)),
        c__png=palette,
        d__png=Image.new("LA", (3, 40), (77, 128)),
        e__png=Image.new("RGBA", (1, 1), (77, 77, 77, 0)),
        f__jpg=Image.new("CMYK", (40, 40), (178, 178, 178, 0)),
        g__png=Image.new("RGB", (1, 1), (77, 77, 77)),
        h__png=Image.new("RGB", (8000, 8000), (77, 77, 77)),
        i__bmp=Image.new("L", (2, 300), 77),
    )
    split = load_dataset("imagefolder", tmp_path, 16).train
    assert len(split) == 9
    assert (split.images.int() - 77).abs().max() <= 2


def test_values_that_are_not_pixels_are_refused(tmp_path):
    for name, values in {"float": np.ones((8, 8), np.float32), "large": np.full((8, 8), 70_000, np.int32)}.items():
        write_images(tmp_path / name, x__tiff=Image.fromarray(values))
        with pytest.raises(UserError, match=r"x\.tiff cannot be read"):
            load_dataset("imagefolder", tmp_path / name, 16)


def test_names_in_any_script_and_files_that_are_no_images(photographs, tmp_path):
    patch = (photographs / "train" / "china" / "0.png").read_bytes()
    for split in ("train", "test"):
        for name in ("猫", "собака", "a b\n'c", "😀"):
            (tmp_path / split / name).mkdir(parents=True)
            (tmp_path / split / name / f"{name.strip()}.png").write_bytes(patch)
            (tmp_path / split / name / "notes.txt").write_text("no image")
            (tmp_path / split / name / "png").write_bytes(b"no image")
    data = load_dataset("imagefolder", tmp_path, 16)
    assert len(data.train) == 4
    assert set(data.class_names) == {"猫", "собака", "a b\n'c", "😀"}


def test_a_link_that_leads_back_is_refused_and_another_followed(photographs, tmp_path):
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        (tmp_path / split / "china").symlink_to(photographs / split / "china")
    assert len(load_dataset("imagefolder", tmp_path, 16).train) == 12
    (tmp_path / "train" / "china").unlink()
    (tmp_path / "train" / "china").mkdir()
    (tmp_path / "train" / "china" / "0.png").write_bytes((photographs / "train" / "china" / "0.png").read_bytes())
    (tmp_path / "train" / "china" / "again").symlink_to(tmp_path / "train")
    with pytest.raises(UserError, match="link to a folder that it lies in"):
        load_dataset("imagefolder", tmp_path, 16)


def test_links_in_a_circle_through_two_folders_are_refused(photographs, tmp_path):
    for split in ("train", "test"):
        for name in ("a", "b"):
            (tmp_path / split / name).mkdir(parents=True)
            (tmp_path / split / name / "0.png").write_bytes((photographs / "train/china/0.png").read_bytes())
    (tmp_path / "train/a/itself").symlink_to("itself")  # leads nowhere
    (tmp_path / "train/a/other").symlink_to("../b")
    assert len(load_dataset("imagefolder", tmp_path, 16).train) == 3
    (tmp_path / "train/b/other").symlink_to("../a")
    with pytest.raises(UserError, match="link to a folder that it lies in"):
        load_dataset("imagefolder", tmp_path, 16)


def test_a_name_of_two_lines_in_an_error_of_one(tmp_path, capsys):
    for split in ("train", "test"):
        (tmp_path / split / "a").mkdir(parents=True)
        (tmp_path / split / "a" / "two\nlines.png").write_bytes(b"no image")
    flags = ["--dataset", "imagefolder", "--data-dir", tmp_path, "--output-dir", tmp_path / "out"]
    assert_one_line_error(run_main(train_models, flags, capsys), 1, "two\\nlines.png cannot be read")


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_damaged_cifar_batches(name, tmp_path, monkeypatch):
    write_cifar(tmp_path, monkeypatch, name.upper())
    load_dataset(name, tmp_path)
    files = [file for file in sorted(tmp_path.rglob("*")) if file.is_file()]
    generator = random.Random(0)
    for file in files:
        whole = file.read_bytes()
        damaged = [whole[: len(whole) * i // 5] for i in range(5)]
        for _ in range(5):
            flipped = bytearray(whole)
            flipped[generator.randrange(len(whole))] ^= 1 << generator.randrange(8)
            damaged.append(bytes(flipped))
        for content in damaged:  # torchvision's checksums notice every one
            file.write_bytes(content)
            with pytest.raises(UserError, match=name) as error:
                load_dataset(name, tmp_path)
            assert "\n" not in str(error.value)
        file.write_bytes(whole)


def test_cifar_labels_out_of_range(tmp_path, monkeypatch):
    import hashlib

    import torchvision

    write_cifar(tmp_path, monkeypatch, "CIFAR10")
    dataset = torchvision.datasets.CIFAR10
    name = dataset.test_list[0][0]
    file = tmp_path / dataset.base_folder / name
    content = pickle.loads(file.read_bytes())
    for labels in ([0, 1, 10], [0, -1, 2]):
        file.write_bytes(pickle.dumps(content | {"labels": labels}))
        monkeypatch.setattr(dataset, "test_list", [[name, hashlib.md5(file.read_bytes()).hexdigest()]])
        with pytest.raises(UserError, match=r"cifar10: the test labels .* there are 10 classes"):
            load_dataset("cifar10", tmp_path)


def test_damaged_svhn(tmp_path, monkeypatch):
    import torchvision

    monkeypatch.setattr(torchvision.datasets.SVHN, "_check_integrity", lambda self: True)
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        images = rng.integers(0, 256, (32, 32, 3, 4), dtype=np.uint8)
        savemat(tmp_path / f"{split}_32x32.mat", {"X": images, "y": np.array([[1], [2], [10], [3]])})
    assert load_dataset("svhn", tmp_path).train.labels.tolist() == [1, 2, 0, 3]
    file = tmp_path / "test_32x32.mat"
    whole = file.read_bytes()
    for length in range(0, len(whole), len(whole) // 10):
        file.write_bytes(whole[:length])
        with pytest.raises(UserError, match="svhn") as error:
            load_dataset("svhn", tmp_path)
        assert "\n" not in str(error.value)
    generator = random.Random(0)
    for _ in range(20):  # where a flipped bit is one of a pixel's, the file is as good as another
        flipped = bytearray(whole)
        flipped[generator.randrange(len(whole))] ^= 1 << generator.randrange(8)
        file.write_bytes(bytes(flipped))
        split, refusal = split_or_refusal("svhn", tmp_path)
        assert split.images.shape[1:] == (3, 32, 32) if split else "svhn" in refusal


def test_damaged_images(photographs, tmp_path):
    whole = (photographs / "train" / "china" / "0.png").read_bytes()
    for split in ("train", "test"):
        (tmp_path / split / "a").mkdir(parents=True)
        (tmp_path / split / "a" / "0.png").write_bytes(whole)
    generator = random.Random(0)
    for i in range(40):
        damaged = bytearray(whole)
        damaged[generator.randrange(len(whole))] ^= 1 << generator.randrange(8)
        damaged = damaged[: len(whole) * i // 20] if i < 20 else damaged
        (tmp_path / "test" / "a" / "0.png").write_bytes(damaged)
        split, refusal = split_or_refusal("imagefolder", tmp_path)
        assert len(split) == 1 if split else "0.png" in refusal


@pytest.mark.parametrize(("count", "batch_size"), [(1, 4), (3, 8), (5, 2), (9, 8)])
def test_one_example_fewer_than_a_batch_and_a_last_batch_of_one(photographs, tmp_path, capsys, count, batch_size):
    for split in ("train", "test"):
        (tmp_path / split / "a").mkdir(parents=True)
        for i in range(count):
            content = (photographs / "train" / "china" / f"{i}.png").read_bytes()
            (tmp_path / split / "a" / f"{i}.png").write_bytes(content)
    split = load_dataset("imagefolder", tmp_path, 16).train
    sizes = [len(labels) for _, labels, *_ in training_batches(split, batch_size, 0, 1)]
    assert sum(sizes) == count
    flags = ["--dataset", "imagefolder", "--data-dir", tmp_path, "--image-size", 16, "--num-epochs", 1, "--lr", 0.001]
    flags += ["--model-arch", "vgg11", "--batch-size", batch_size, "--output-dir", tmp_path / "out"]
    result = run_main(train_models, flags, capsys)
    if count == 1:  # behind four poolings a 16 x 16 image is 1 x 1
        assert_one_line_error(result, 1, "one example", "--batch-size")
    else:
        assert result.returncode == 0, result.stderr


def test_train_and_test_of_different_classes(photographs, tmp_path, capsys):
    patch = (photographs / "train" / "china" / "0.png").read_bytes()
    for split, name in (("train", "a"), ("test", "b")):
        (tmp_path / split / name).mkdir(parents=True)
        (tmp_path / split / name / "0.png").write_bytes(patch)
    flags = ["--dataset", "imagefolder", "--data-dir", tmp_path, "--output-dir", tmp_path / "out"]
    assert_one_line_error(run_main(train_models, flags, capsys), 1, "same classes")
    assert torch.is_tensor(load_dataset("digits", tmp_path).train.labels)
