"""Checkpoints: what they hold, and what happens to those that are not whole or not ours."""

import pytest
import torch
from conftest import assert_one_line_error, run_main

import estimate_curvature
from models.checkpoint import load_model, save_checkpoint
from models.model_selector import model_architecture
from utils.errors import UsageError, UserError


def checkpoint_of(model: torch.nn.Module, arch: str = "vgg11") -> dict:
    return {
        "model_arch": arch,
        "dataset": "digits",
        "num_classes": 10,
        "image_size": 16,
        "class_names": [str(i) for i in range(10)],
        "flags": {"data_dir": "datasets"},
        "epoch": 1,
        "metrics": [],
        "model": model.state_dict(),
    }


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return model_architecture["vgg11"](10, input_size=16).eval()


@pytest.fixture
def path(tmp_path, model):
    save_checkpoint(tmp_path / "model.pt", checkpoint_of(model))
    return tmp_path / "model.pt"


def test_load_model_gives_back_the_same_function_in_its_own_dtype(path, model, tmp_path):
    x = torch.rand(2, 3, 16, 16)
    assert torch.equal(load_model(path)(x), model(x))
    assert torch.equal(load_model(path, "vgg11")(x), model(x))
    assert not load_model(path).training
    double = model_architecture["vgg11lcnn"](10, input_size=16).double().eval()
    save_checkpoint(tmp_path / "double.pt", checkpoint_of(double, "vgg11lcnn"))
    assert torch.equal(load_model(tmp_path / "double.pt")(x.double()), double(x.double()))


def test_a_checkpoint_is_plain(path):
    """Nothing but dicts, lists, tensors, numbers and strings, so that weights_only loading needs no allowance."""
    kinds = set()

    def visit(value):
        kinds.add(type(value))
        if type(value) is dict:
            for item in value.values():
                visit(item)
        if type(value) is list:
            for item in value:
                visit(item)

    visit(torch.load(path, weights_only=True))
    assert kinds <= {dict, list, torch.Tensor, int, float, str, bool, type(None)}


def test_load_model_errors(path, tmp_path, model):
    with pytest.raises(UsageError, match="holds a vgg11, not a resnet18"):
        load_model(path, "resnet18")
    with pytest.raises(UserError, match="no such"):
        load_model(tmp_path / "absent.pt")
    for length in (0, 1, 1000, path.stat().st_size - 5000):
        (tmp_path / "cut.pt").write_bytes(path.read_bytes()[:length])
        with pytest.raises(UserError, match=r"cut\.pt: not readable weights"):
            load_model(tmp_path / "cut.pt")
    for foreign in ({0: torch.zeros(3)}, {"format": "lcnn", "version": 1}, {"format": "lcnn", "version": 2}):
        torch.save(foreign, tmp_path / "odd.pt")
        with pytest.raises(UserError, match=r"odd\.pt"):
            load_model(tmp_path / "odd.pt")
    for name, value in (("image_size", 20), ("model", {"classifier.bias": torch.zeros(2, dtype=torch.int64)})):
        save_checkpoint(tmp_path / "odd.pt", checkpoint_of(model) | {name: value})
        with pytest.raises(UserError, match=r"do not fit"):
            load_model(tmp_path / "odd.pt")
    torch.save({"weights": torch.zeros(3)}, tmp_path / "foreign.pt")
    with pytest.raises(UserError, match=r"foreign\.pt: neither"):
        load_model(tmp_path / "foreign.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(UserError, match="holds no state_dict"):
        load_model(tmp_path / "list.pt")
    save_checkpoint(tmp_path / "wrong.pt", checkpoint_of(model, "resnet18"))
    with pytest.raises(UserError, match="do not fit resnet18"):
        load_model(tmp_path / "wrong.pt")


def test_a_pickle_that_runs_code_is_not_run(tmp_path):
    class Payload:
        def __reduce__(self):
            return open, (str(tmp_path / "created"), "w")

    torch.save({"format": "lcnn", "model": Payload()}, tmp_path / "hostile.pt")
    with pytest.raises(UserError, match="not plain tensors"):
        load_model(tmp_path / "hostile.pt")
    assert not (tmp_path / "created").exists()


def test_estimate_refuses_files_in_one_line(path, tmp_path, capsys):
    (tmp_path / "cut.pt").write_bytes(path.read_bytes()[:1000])
    torch.save({"weights": torch.zeros(3)}, tmp_path / "foreign.pt")
    for name, code, words in (
        ("absent.pt", 1, ["absent.pt", "no such"]),
        ("cut.pt", 1, ["cut.pt", "damaged"]),
        ("foreign.pt", 1, ["foreign.pt", "neither"]),
    ):
        result = run_main(estimate_curvature, ["--model-filename", tmp_path / name], capsys)
        assert_one_line_error(result, code, *words)
    for flags, words in (
        (["--model-arch", "resnet18"], ["vgg11", "resnet18", "--model-arch"]),
        (["--dataset", "svhn"], ["digits", "svhn", "--dataset"]),
    ):
        result = run_main(estimate_curvature, ["--model-filename", path, *flags], capsys)
        assert_one_line_error(result, 2, *words)
