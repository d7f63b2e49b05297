"""Checkpoints from strangers: one line and exit code 1, at once, without running code or filling memory."""

import random
import re
import time
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import assert_one_line_error, run_main

import estimate_curvature
from models.checkpoint import load_model, save_checkpoint
from models.model_selector import model_architecture
from utils.errors import UserError

SECONDS, MIB = 2, 200


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """A checkpoint of a vgg11."""
    model = model_architecture["vgg11"](10, 16)
    path = tmp_path_factory.mktemp("checkpoint") / "model.pt"
    save_checkpoint(path, contents(model.state_dict()))
    return path


def contents(state: dict, **more) -> dict:
    checkpoint = {"model_arch": "vgg11", "dataset": "digits", "num_classes": 10, "image_size": 16, "epoch": 1}
    checkpoint |= {"class_names": [str(i) for i in range(10)], "flags": {"data_dir": "x"}, "metrics": []}
    return checkpoint | {"model": state} | more


def peak_mib() -> float:
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


def refusal(path: Path) -> str | None:
    """The one line with which a checkpoint is refused, quickly and in little memory; None if it is taken."""
    Path("/proc/self/clear_refs").write_text("5")
    before, began = peak_mib(), time.process_time()
    try:
        load_model(path)
        message = None
    except UserError as error:
        message = str(error)
    assert time.process_time() - began < SECONDS  # of work: what else the machine does is not counted
    assert peak_mib() - before < MIB + (path.stat().st_size if path.is_file() else 0) / 2**20 * 3
    assert message is None or (len(message.splitlines()) == 1 and str(path) in message), message
    return message


@pytest.mark.long
def test_truncated_at_every_percent(small, tmp_path):
    whole = small.read_bytes()
    for percent in range(100):
        (tmp_path / "cut.pt").write_bytes(whole[: len(whole) * percent // 100])
        assert refusal(tmp_path / "cut.pt"), percent


@pytest.mark.long
def test_two_hundred_flipped_bits(small, tmp_path):
    """Every flip in a tensor or in the structure is noticed; what is let in is the same network."""
    whole = small.read_bytes()
    truth = load_model(small).state_dict()
    generator = random.Random(0)
    records = [info.header_offset for info in zipfile.ZipFile(small).infolist()]
    refused = 0
    for trial in range(200):
        if trial % 2:  # anywhere: nearly always in a weight
            position = generator.randrange(len(whole))
        else:  # in the headers, the pickle, or the directory at the end
            start = generator.choice([*records, len(whole) - 4000])
            position = min(start + generator.randrange(300), len(whole) - 1)
        damaged = bytearray(whole)
        damaged[position] ^= 1 << generator.randrange(8)
        (tmp_path / "flipped.pt").write_bytes(damaged)
        if refusal(tmp_path / "flipped.pt"):
            refused += 1
        else:
            found = load_model(tmp_path / "flipped.pt").state_dict()
            assert all(torch.equal(found[name], tensor) for name, tensor in truth.items())
    assert refused > 100


BIAS = "classifier.bias"


def state_of(**changes) -> dict:
    return dict(model_architecture["vgg11"](10, 16).state_dict()) | changes


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: contents(state_of(**{BIAS: torch.zeros(11)})), "size mismatch for classifier.bias"),
        (lambda: contents(state_of(**{BIAS: torch.zeros(())})), "size mismatch for classifier.bias"),
        (lambda: contents({k: v for k, v in state_of().items() if k != BIAS}), "Missing key"),
        (lambda: contents(state_of(extra=torch.zeros(1))), "Unexpected key"),
        (lambda: contents({k: v.to(torch.int32) for k, v in state_of().items()}), "is of torch.int32"),
        (lambda: contents(state_of(**{BIAS: torch.zeros(10, dtype=torch.complex64)})), "is of torch.complex64"),
        (lambda: contents(state_of(**{BIAS: "zeros"})), "holds no state_dict"),
        (lambda: contents([1, 2]), "model is no dict"),
        (lambda: contents(state_of(**{BIAS: torch.zeros(10).to_sparse()})), "holds no state_dict"),
        (lambda: contents(state_of(**{BIAS: torch.zeros(10, device="meta")})), "holds no state_dict"),
        (lambda: contents(state_of(**{BIAS: torch.full((10,), torch.nan)})), "not all finite"),
        (lambda: contents(state_of(**{BIAS: torch.full((10,), torch.inf)})), "not all finite"),
        (lambda: contents(state_of(), image_size=-16), "image size is -16"),
        (lambda: contents(state_of(), image_size=16 * 10**6), "do not fit"),
        (lambda: contents(state_of(), num_classes=10**12), "do not fit"),
        (lambda: contents(state_of(), num_classes=-1), "do not fit"),
        (lambda: contents(state_of(), num_classes="ten"), "num_classes is no int"),
        (lambda: contents(state_of(), num_classes=2.5), "num_classes is no int"),
        (lambda: contents(state_of(), model_arch=["vgg11"]), "model_arch is no str"),
        (lambda: contents(state_of(), flags=7), "flags is no dict"),
        (lambda: contents(state_of(), flags={"data_dir": 7}), "data_dir"),
        (lambda: contents(state_of(), flags={"data_dir": "a\0b"}), "data_dir"),
        (lambda: contents(state_of(), metrics=7), "metrics is no list"),
        (lambda: [1, 2], "holds no state_dict"),
        (lambda: torch.zeros(3), "holds no state_dict"),
        (lambda: {"state": {"weights": torch.zeros(3)}}, "holds no state_dict"),
        (lambda: {"fc.weight": torch.zeros(3, 3)}, "neither a checkpoint"),
    ],
)
def test_what_does_not_fit_is_refused(make, reason, tmp_path, capsys):
    content, path = make(), tmp_path / "odd.pt"
    if isinstance(content, dict) and "model_arch" in content:
        content |= {"format": "lcnn", "version": 1}
    torch.save(content, path)
    assert_one_line_error(run_main(estimate_curvature, ["--model-filename", path], capsys), 1, "odd.pt", reason)


def test_no_file_of_ours_at_all(tmp_path, capsys):
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "folder.pt").mkdir()
    (tmp_path / "text.pt").write_text("weights")
    with zipfile.ZipFile(tmp_path / "zip.pt", "w") as file:
        file.writestr("hello", "world")
    for name in ("empty", "folder", "text", "zip", "absent"):
        result = run_main(estimate_curvature, ["--model-filename", tmp_path / f"{name}.pt"], capsys)
        assert_one_line_error(result, 1, f"{name}.pt")


def test_a_view_that_is_larger_than_its_storage(tmp_path):
    """A tensor of stride 0 takes a few bytes in the file; its copies would take what its shape says."""
    state = state_of(**{"classifier.weight": torch.zeros(1).expand(10, 10**9)})
    torch.save({"format": "lcnn", "version": 1} | contents(state), tmp_path / "view.pt")
    assert refusal(tmp_path / "view.pt")


@pytest.mark.parametrize("size", [2048, 16 * 10**6])
def test_an_image_size_that_would_take_buffers_the_file_does_not_have(size, tmp_path):
    state = model_architecture["vgg11lcnn"](10, 16).state_dict()
    checkpoint = contents(state, model_arch="vgg11lcnn", image_size=size)
    save_checkpoint(tmp_path / "size.pt", checkpoint)
    assert "do not fit" in refusal(tmp_path / "size.pt")


def test_weights_of_any_layout_and_precision_are_taken(tmp_path):
    model = model_architecture["vgg11lcnn"](10, 16).to(memory_format=torch.channels_last).eval()
    state = model.state_dict() | {"classifier.bias": model.classifier.bias.detach().double()}
    save_checkpoint(tmp_path / "mixed.pt", contents(state, model_arch="vgg11lcnn"))
    loaded = load_model(tmp_path / "mixed.pt")
    for (name, tensor), own in zip(loaded.state_dict().items(), model.state_dict().values(), strict=True):
        assert tensor.dtype == (torch.float64 if own.is_floating_point() else own.dtype), name
        assert tensor.is_contiguous()
        assert torch.equal(tensor, own.to(tensor.dtype))
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    x = torch.rand(2, 3, 16, 16, dtype=torch.float64)
    torch.testing.assert_close(loaded(x), model.double()(x))


def test_weights_that_are_fine_are_taken(small, tmp_path):
    assert refusal(small) is None
