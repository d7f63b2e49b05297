"""Weight files: what they hold; damaged, foreign or hostile ones end in one line, and no code in them runs."""

import gzip
import io
import random
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import assert_one_line_error, run_main
from PIL import Image

import estimate_curvature
import train_models
from models.checkpoint import FORMAT, load_model, read_checkpoint, save_checkpoint
from models.model_selector import model_architecture
from utils.errors import UserError

pytestmark = pytest.mark.usefixtures("thin_vgg")
BIAS = "classifier.bias"


def build(arch: str = "vgg11") -> torch.nn.Module:
    torch.manual_seed(0)
    return model_architecture[arch](10, 16).eval()


def contents(state, **changes) -> dict:
    """A checkpoint of a vgg11 with this state_dict."""
    checkpoint = {"model_arch": "vgg11", "dataset": "digits", "num_classes": 10, "image_size": 16, "epoch": 1}
    checkpoint |= {"class_names": [str(i) for i in range(10)], "flags": {"data_dir": "x"}, "metrics": []}
    return FORMAT | checkpoint | {"model": state} | changes


def state_of(**changes) -> dict:
    return dict(build().state_dict()) | changes


@pytest.fixture
def path(tmp_path) -> Path:
    save_checkpoint(tmp_path / "model.pt", contents(state_of()))
    return tmp_path / "model.pt"


def refusal(path: Path) -> str:
    """The one line with which load_model refuses a file."""
    with pytest.raises(UserError) as error:
        load_model(path)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)
    return str(error.value)


def estimated(capsys, *files, more=()):
    """estimate_curvature.py on one example, with the files and more flags."""
    few = ["--split", "test", "--num-samples", 1, "--num-power-iter", 1]
    return run_main(estimate_curvature, [*few, *more, "--model-filename", *files], capsys)


def test_load_model_gives_back_the_same_function(path):
    x = torch.rand(2, 3, 16, 16)
    assert torch.equal(load_model(path)(x), build()(x))
    assert not load_model(path, "vgg11").training
    save_checkpoint(path, contents(state_of(version=2)))  # a network's state may hold a number
    assert read_checkpoint(path)["model"]["version"] == 2


def test_weights_of_any_layout_and_precision_are_taken(path):
    """Also a tensor that is expanded, of which the file holds every number."""
    model = build("vgg11lcnn").to(memory_format=torch.channels_last)
    torch.nn.init.ones_(model.classifier.bias)
    state = model.state_dict() | {BIAS: torch.ones(1, dtype=torch.float64).expand(10)}
    save_checkpoint(path, contents(state, model_arch="vgg11lcnn"))
    loaded = load_model(path)
    for (name, tensor), own in zip(loaded.state_dict().items(), model.state_dict().values(), strict=True):
        assert tensor.dtype == (torch.float64 if own.is_floating_point() else own.dtype), name
        assert tensor.is_contiguous()
        assert torch.equal(tensor, own.to(tensor.dtype))
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    x = torch.rand(2, 3, 16, 16, dtype=torch.float64)
    torch.testing.assert_close(loaded(x), model.double()(x))


@pytest.mark.parametrize("wrap", [lambda payload: payload, lambda payload: {"format": "lcnn", "model": payload}])
def test_a_pickle_that_runs_code_is_not_run(wrap, tmp_path):
    class Payload:
        def __reduce__(self):
            return open, (str(tmp_path / "created"), "w")

    torch.save(wrap(Payload()), tmp_path / "hostile.pt")
    assert "the Python class or function" in refusal(tmp_path / "hostile.pt")
    assert not (tmp_path / "created").exists()


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: contents(state_of(**{BIAS: torch.zeros(11)})), "size mismatch for classifier.bias"),
        (lambda: contents(state_of(extra=torch.zeros(1))), "0 keys of the model missing, 1 unexpected; first"),
        (lambda: contents(state_of(**{BIAS: torch.zeros(10, dtype=torch.int32)})), "is of torch.int32"),
        (lambda: contents(state_of(**{BIAS: "zeros"})), "is of str"),
        (lambda: contents(state_of(**{BIAS: torch.zeros(10).to_sparse()})), "holds no state_dict"),
        (lambda: contents(state_of(**{BIAS: torch.zeros(10, device="meta")})), "holds no state_dict"),
        (lambda: contents(state_of(**{BIAS: torch.zeros(1).expand(10)})), "holds no state_dict"),  # of 4 bytes
        (lambda: contents(state_of(**{BIAS: torch.full((10,), torch.nan)})), "not all finite"),
        (lambda: contents([1, 2]), "model is no dict"),
        (lambda: contents(state_of(), model_arch="resnet17"), "unknown architecture"),
        (lambda: contents(state_of(), image_size=20), "do not fit a vgg11"),
        (lambda: contents(state_of(), image_size=0), "image size is 0"),
        (lambda: contents(state_of(), num_classes=True), "num_classes is no int"),
        (lambda: contents(state_of(), num_classes=10**12), "do not fit"),
        (lambda: contents(state_of(), flags={"data_dir": 7}), "data_dir"),
        (lambda: contents(state_of(), version=2), "checkpoint version 2"),
        (lambda: {"state": {0: {"momentum_buffer": torch.zeros(3)}}}, "holds no state_dict"),  # an optimizer's
        (lambda: {"fc.weight": torch.zeros(3, 3)}, "neither a checkpoint"),
    ],
)
def test_what_does_not_fit_is_refused(make, reason, tmp_path, capsys):
    torch.save(make(), tmp_path / "odd.pt")
    assert_one_line_error(estimated(capsys, tmp_path / "odd.pt"), 1, "odd.pt", reason)


def written(save, *arguments) -> bytes:
    file = io.BytesIO()
    save(file, *arguments)
    return file.getvalue()


NO_WEIGHTS = [
    ("truncated, damaged", b"", b"weights"),
    ("a table of results", b"model,split,index\n\xc3\xa4.pt,test,1\n", b'{\n "settings": {}}', b"model\tsplit\n"),
    ("a picture", b'<?xml version="1.0"?>\n<!DOCTYPE svg>\n<svg>'),
    ("a picture", *(written(Image.new("RGB", (8, 8)).save, k) for k in ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"))),
    ("a PDF document", b"%PDF-1.7\n"),
    ("a file of NumPy arrays", *(written(save, np.zeros(3)) for save in (np.save, np.savez, np.savez_compressed))),
    ("an HDF5 file", b"\x89HDF\r\n\x1a\n"),
    ("a compressed file", gzip.compress(b"weights", mtime=0)),
    ("a web page", b"\n<!DOCTYPE html><title>Not found, sorry</title>"),
    ("a pointer that git lfs pull replaces", b"version https://git-lfs.github.com/spec/v1\n"),
]


def test_files_that_are_no_weights_are_named_as_what_they_are(path, tmp_path, capsys):
    for kind, *files in NO_WEIGHTS:
        for content in files:
            (tmp_path / "x.pt").write_bytes(content)
            assert kind in (said := refusal(tmp_path / "x.pt")), content
            assert ("--compare" in said) == (kind == "a table of results")
    with zipfile.ZipFile(tmp_path / "zip.pt", "w") as file:
        file.writestr("hello", "world")
    damaged = bytearray(path.read_bytes())
    damaged[100_000] ^= 1
    (tmp_path / "flipped.pt").write_bytes(damaged)
    (tmp_path / "cut.pt").write_bytes(damaged[:1000])
    (tmp_path / "folder.pt").mkdir()
    for name in ("folder", "absent", "zip", "cut", "flipped"):
        words = {"absent": "no such file", "folder": "is a folder; give"}.get(name, "truncated, damaged")
        assert_one_line_error(estimated(capsys, tmp_path / f"{name}.pt"), 1, f"{name}.pt", words)


def test_flags_and_data_that_disagree_with_the_checkpoint(path, capsys):
    for flag, wanted, own in (("--model-arch", "resnet18", "vgg11"), ("--dataset", "svhn", "digits")):
        assert_one_line_error(estimated(capsys, path, more=[flag, wanted]), 2, f"{path} ", flag, wanted, own)
    checkpoint = contents(state_of())
    names = checkpoint.pop("class_names")
    torch.save(checkpoint, path)  # it may not tell them
    assert estimated(capsys, path).returncode == 0
    torch.save(checkpoint | {"class_names": names[::-1]}, path)  # or the same in another order
    assert_one_line_error(estimated(capsys, path), 2, "'9'", "'0'", "--data-dir")


@pytest.mark.parametrize(
    ("order", "expected"), [(["1", "10", "2"], ["1", "2", "10"]), (["2", "1", "10"], ["2", "1", "10"])]
)
def test_files_that_a_shell_lists_come_in_the_order_of_their_numbers(order, expected, path, capsys, monkeypatch):
    monkeypatch.chdir(path.parent)
    files = [path.rename(f"net_epoch{order[0]}.pt")]
    files += [Path(f"net_epoch{number}.pt") for number in order[1:]]
    for file in files[1:]:
        file.write_bytes(files[0].read_bytes())
    result = estimated(capsys, *files, more=["--output", "all.csv"])
    assert list(pd.read_csv("all.csv")["model"]) == [f"net_epoch{number}.pt" for number in expected], result.stderr
    table = [line.split()[0] for line in result.stdout.splitlines() if line.startswith("net_") and " test " in line]
    assert table == [f"net_epoch{number}" for number in expected]


def test_a_finished_run_says_so_without_its_data(photographs, tmp_path, monkeypatch, capsys):
    flags = ["--model-arch", "vgg11", "--dataset", "imagefolder", "--data-dir", photographs, "--image-size", 16]
    flags += ["--num-epochs", 1, "--batch-size", 12, "--lr", 0.01, "--no-augment", "--output-dir", tmp_path]
    assert run_main(train_models, flags, capsys).returncode == 0
    saved = torch.load(tmp_path / "vgg11_imagefolder.pt")
    saved["flags"]["reg_old"] = 0.5  # the weight of a loss that was removed later
    torch.save(saved, tmp_path / "vgg11_imagefolder.pt")
    before = {path: path.read_bytes() for path in tmp_path.glob("vgg11_imagefolder*")}
    for path in before:
        if path.suffix != ".pt":
            path.unlink()  # as a kill may have done
    monkeypatch.setattr(train_models, "load_dataset", None)
    result = run_main(train_models, [*flags, "--resume"], capsys)
    assert "is finished: learning_rate" in result.stdout, result.stderr
    assert {path: path.read_bytes() for path in tmp_path.glob("vgg11_imagefolder*")} == before
    result = run_main(train_models, [*flags, "--resume", "--augment"], capsys)
    assert_one_line_error(result, 2, "was started with --no-augment, not --augment;")


@pytest.mark.long
def test_truncated_at_every_percent(path, tmp_path):
    whole = path.read_bytes()
    for percent in range(100):
        (tmp_path / "cut.pt").write_bytes(whole[: len(whole) * percent // 100])
        refusal(tmp_path / "cut.pt")


@pytest.mark.long
def test_two_hundred_flipped_bits(path, tmp_path):
    """Every flip in a tensor or in the structure is noticed; what is let in is the same network."""
    whole, truth, generator, refused = path.read_bytes(), load_model(path).state_dict(), random.Random(0), 0
    records = [info.header_offset for info in zipfile.ZipFile(path).infolist()]
    for trial in range(200):
        # anywhere, which is nearly always in a weight; or in the headers, the pickle, or the directory at the end
        start = generator.choice([*records, len(whole) - 4000])
        position = generator.randrange(len(whole)) if trial % 2 else start + generator.randrange(300)
        damaged = bytearray(whole)
        damaged[min(position, len(whole) - 1)] ^= 1 << generator.randrange(8)
        (tmp_path / "flipped.pt").write_bytes(damaged)
        try:
            found = load_model(tmp_path / "flipped.pt").state_dict()
        except UserError:
            refused += 1
        else:
            assert all(torch.equal(found[name], tensor) for name, tensor in truth.items())
    assert refused > 100
