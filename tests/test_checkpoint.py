"""Weight files: what they hold; damaged, foreign or hostile ones end in one line, and no code in them runs."""

import random
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import assert_one_line_error, run_main

import estimate_curvature
from models.checkpoint import FORMAT, align, load_model, read_checkpoint, save_checkpoint
from models.model_selector import model_architecture
from utils.errors import UserError

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


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "model.pt"
    save_checkpoint(path, contents(build().state_dict()))
    return path


def refusal(path: Path) -> str:
    """The one line with which load_model refuses a file."""
    with pytest.raises(UserError) as error:
        load_model(path)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)
    return str(error.value)


def test_load_model_gives_back_the_same_function(path):
    x = torch.rand(2, 3, 16, 16)
    assert torch.equal(load_model(path)(x), build()(x))
    assert not load_model(path, "vgg11").training


def test_weights_of_any_layout_and_precision_are_taken(tmp_path):
    """Also a tensor that is expanded, of which the file holds every number."""
    model = build("vgg11lcnn").to(memory_format=torch.channels_last)
    torch.nn.init.ones_(model.classifier.bias)
    state = model.state_dict() | {BIAS: torch.ones(1, dtype=torch.float64).expand(10)}
    save_checkpoint(tmp_path / "mixed.pt", contents(state, model_arch="vgg11lcnn"))
    loaded = load_model(tmp_path / "mixed.pt")
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
        (lambda: contents(state_of(), image_size=-16), "image size is -16"),
        (lambda: contents(state_of(), num_classes=10**12), "do not fit"),
        (lambda: contents(state_of(), flags={"data_dir": 7}), "data_dir"),
        (lambda: contents(state_of(), version=2), "checkpoint version 2"),
        (lambda: FORMAT, "an incomplete checkpoint"),
        (lambda: {"state": {0: {"momentum_buffer": torch.zeros(3)}}}, "holds no state_dict"),  # an optimizer's
        (lambda: {"fc.weight": torch.zeros(3, 3)}, "neither a checkpoint"),
    ],
)
def test_what_does_not_fit_is_refused(make, reason, tmp_path, capsys):
    torch.save(make(), tmp_path / "odd.pt")
    result = run_main(estimate_curvature, ["--model-filename", tmp_path / "odd.pt"], capsys)
    assert_one_line_error(result, 1, "odd.pt", reason)


def test_files_that_are_no_weights(path, tmp_path, capsys):
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "folder.pt").mkdir()
    (tmp_path / "text.pt").write_text("weights")
    with zipfile.ZipFile(tmp_path / "zip.pt", "w") as file:
        file.writestr("hello", "world")
    damaged = bytearray(path.read_bytes())
    damaged[100_000] ^= 1
    (tmp_path / "flipped.pt").write_bytes(damaged)
    (tmp_path / "cut.pt").write_bytes(damaged[:1000])
    for name in ("folder", "absent", "empty", "text", "zip", "cut", "flipped"):
        result = run_main(estimate_curvature, ["--model-filename", tmp_path / f"{name}.pt"], capsys)
        words = {"absent": "no such file", "folder": "is a folder; give"}.get(name, "truncated, damaged")
        assert_one_line_error(result, 1, f"{name}.pt", words)


def test_flags_that_disagree_with_the_checkpoint(path, capsys):
    for flag, wanted, own in (("--model-arch", "resnet18", "vgg11"), ("--dataset", "svhn", "digits")):
        result = run_main(estimate_curvature, ["--model-filename", path, flag, wanted], capsys)
        assert_one_line_error(result, 2, f"{path} ", flag, wanted, own)


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


def test_a_networks_state_may_hold_a_number(tmp_path):
    save_checkpoint(tmp_path / "run.pt", contents(state_of(version=2)))
    assert read_checkpoint(tmp_path / "run.pt")["model"]["version"] == 2


def test_only_one_sides_prefix_is_stripped():
    theirs, own = ({f"{name}.{key}": torch.zeros(2) for key in "ab"} for name in ("teacher", "student"))
    bare = {"a": torch.zeros(2), "b": torch.zeros(2)}
    assert align(theirs, bare, "file", "net").keys() == bare.keys()
    assert align(bare, own, "file", "net").keys() == own.keys()
    with pytest.raises(UserError, match="2 keys of the model missing, 2 unexpected"):
        align(theirs, own, "file", "net")
