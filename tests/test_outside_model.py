"""Models of other people: named by module and function, with weights in files as training scripts leave them."""

import sys
from argparse import Namespace

import numpy as np
import pytest
import torch
from torch import nn

from models.checkpoint import align, build_model, read_checkpoint
from utils.errors import UserError

ONE = torch.ones(())

USER_FILE = """
from torch import nn

class Small(nn.Sequential):
    def __init__(self, num_classes=7):
        head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes)
        super().__init__(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), *head)

def ten():
    return Small(10)

def any_keyword(**keywords):
    return Small(**keywords)

def keywords_elsewhere(**keywords):
    return nn.Conv2d(3, 5, 1, **keywords)

def failing(num_classes):
    raise TypeError("no weights\\nanywhere " + "x" * 1000)

def no_model():
    return {"model": Small()}

class Holder(nn.Module):
    def __init__(self):
        super().__init__()
        self.module = Small(10)

class Named(nn.Module):
    # layers that are called as wrappers are
    def __init__(self):
        super().__init__()
        self.net, self.model = nn.Conv2d(3, 8, 3), nn.Sequential(nn.Flatten(), nn.Linear(9, 10))
        self.module = nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 10))

instance = Small()
"""


@pytest.fixture
def user_file(users_file):
    """The current directory, with my_models.py in it."""
    return users_file("my_models", USER_FILE)


def build(arch: str, path=None, num_classes: int = 10) -> nn.Module:
    """The network with the weights at path, or with those it comes with."""
    checkpoint = read_checkpoint(path, arch) if path else {"model_arch": arch}
    return build_model(checkpoint, path or arch, arch, num_classes, 32)


def save(path, content):
    content.save(path) if isinstance(content, torch.jit.ScriptModule) else torch.save(content, path)
    return path


def refused(words: str, *arguments) -> int:
    """Building ends in one short line with these words; returns the exit code."""
    with pytest.raises(UserError, match=words) as error:
        build(*arguments)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500
    return error.value.exit_code


def test_num_classes_goes_to_whoever_takes_it(user_file):
    expected = {"Small": 4, "ten": 10, "any_keyword": 4, "keywords_elsewhere": 5, "nn.Flatten": 192}
    for function, classes in expected.items():
        model = build(f"my_models:{function}", None, 4)
        assert model(torch.rand(2, 3, 8, 8)).shape[:2] == (2, classes), function
        assert not any(module.training for module in model.modules())


WRAPPERS = "_forward_module.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_module._orig_mod."
FRONT = *WRAPPERS, "_orig_mod.", "_orig_mod.module.", "1.module.", "module._orig_mod.1.0."
FRONT += "backbone.", "network.", "encoder.", "ema_model.module.", "module.backbone."
INSIDE = *WRAPPERS, "module."


def under(prefix: str, state: dict) -> dict:
    return {prefix + key: value for key, value in state.items()}


def inside(wrapper: str, state: dict) -> dict:
    return {key.replace(".", f".{wrapper}", 1): value for key, value in state.items()}


@pytest.mark.parametrize(
    ("layout", "said"),
    [
        (lambda state: state, ""),
        (lambda state: {"state_dict": state, "epoch": 3, "best": 0.9}, ""),
        (lambda state: {"model": {"state_dict": state}}, ""),
        (lambda state: {"state_dict_ema": state, "epoch": 3}, ""),
        (lambda state: {k: nn.Parameter(v) if v.is_floating_point() else v for k, v in state.items()}, ""),
        (lambda state: {k: v for k, v in state.items() if "num_batches" not in k}, ""),  # an old file
        (lambda state: {"net": under("module.", state)}, "module.0.weight read"),
        (lambda state: under("module.", state) | {"n_averaged": torch.tensor(3)}, "module.0.weight read"),
        (lambda state: {"ema": under("model.module.", state) | {"model.n_averaged": 3 * ONE}}, "0.weight read as 0."),
        (lambda state: {"state_dict": under("model.", state), "hyper_parameters": {"lr": 0.1}}, "model.0.weight read"),
        *((lambda state, wrapper=wrapper: under(wrapper, state), wrapper + "0.weight read") for wrapper in FRONT),
        *((lambda state, inner=inner: inside(inner, state), f"0.{inner}weight read") for inner in INSIDE),
        (lambda state: {"teacher": state, "epoch": 3}, "the weights under 'teacher' are taken\n"),
        (lambda state: {"ema": dict.fromkeys(state, ONE), "model": state}, "'model' are taken, not those under 'ema'"),
        (lambda state: {"best": dict.fromkeys(state, ONE), "net": {"ema": state}}, "'net.ema' are taken, not those"),
        (lambda state: state | {"epoch": 3, "num_updates": 1000}, "passed over, as no tensor: epoch, num_updates\n"),
        (lambda state: under("encoder.", state) | {"epoch": 3, "args": {"lr": 0.1}}, "as no tensor: epoch, args\n"),
        (lambda state: {"best": 0 * ONE, "model": state | {"arch": "x", "ema": None}}, "as no tensor: arch, ema\n"),
        (lambda state: {"model": state | {"epoch": 3}, "ema": state}, "'model' are taken, not those under 'ema'\n"),
    ],
)
def test_weights_in_the_layouts_that_training_code_leaves(user_file, layout, said, capsys):
    """What of a file is taken, and how its names were read, is said."""
    trained = build("my_models:ten").double()
    trained[1].running_mean.uniform_()  # buffers count, too
    path = save(user_file / "weights.pt", layout(trained.state_dict()))
    x = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    assert torch.equal(build("my_models:ten", path)(x), trained(x))
    printed = capsys.readouterr().out
    assert said in printed if said else printed == ""
    # and the other way round: the model has the wrapper
    holder = build("my_models:Holder", path)
    assert torch.equal(holder.module(x), trained(x))


def test_layers_called_as_wrappers_are(user_file, capsys):
    state = build("my_models:Named").state_dict()
    for prefix in ("", "module.", "_orig_mod.module.", "net.", "model.", "1.", "0.module."):
        model = build("my_models:Named", save(user_file / "weights.pt", under(prefix, state)))
        assert all(map(torch.equal, model.state_dict().values(), state.values()))
        assert ("read as" in capsys.readouterr().out) == (prefix != ""), prefix


def test_the_parameters_decide_the_dtype(user_file, capsys):
    for key, dtype, expected in (
        ("1.running_mean", torch.float64, torch.float32),
        ("0.weight", torch.float16, torch.float32),
        ("0.weight", torch.float64, torch.float64),
    ):
        state = build("my_models:ten").state_dict()
        state[key] = state[key].to(dtype)
        model = build("my_models:ten", save(user_file / "weights.pt", state))
        assert model[0].weight.dtype == model[1].running_mean.dtype == expected
        assert torch.equal(model[0].weight, state["0.weight"].to(expected))
        assert ("torch.float16 are measured in float32" in capsys.readouterr().out) == (dtype == torch.float16)


def test_safetensors(user_file, monkeypatch):
    safetensors = pytest.importorskip("safetensors.torch")
    trained = build("my_models:ten")
    safetensors.save_file(trained.state_dict(), user_file / "weights.safetensors")
    assert torch.equal(build("my_models:ten", user_file / "weights.safetensors")[0].weight, trained[0].weight)
    (user_file / "cut.safetensors").write_bytes((user_file / "weights.safetensors").read_bytes()[:-1])
    refused("cut.safetensors: not readable weights .SafetensorError", "my_models:ten", user_file / "cut.safetensors")
    renamed = (user_file / "weights.safetensors").rename("renamed.pt")
    assert torch.equal(build("my_models:ten", renamed)[0].weight, trained[0].weight)
    monkeypatch.setitem(sys.modules, "safetensors", None)  # as where the package is missing
    refused("pip install safetensors", "my_models:ten", renamed)


@pytest.mark.parametrize(
    ("arch", "code", "words"),
    [
        ("no_such_module:resnet18", 2, "cannot import 'resnet18' from 'no_such_module'"),
        ("broken:model", 2, "cannot import .*SyntaxError"),
        ("script:model", 2, "cannot import .*SystemExit: 0"),
        ("my_models:absent", 2, "has no attribute 'absent'"),
        ("./my_models.py:Small", 2, "; give my_models:Small, in the folder that this file is in"),
        ("my_models:instance", 2, "of type Small, not a function"),
        ("my_models:no_model", 2, "returns a dict, not a torch.nn.Module"),
        ("my_models:failing", 1, "failed to build the model .TypeError: no weights anywhere x"),
    ],
)
def test_names_of_nothing_that_builds_a_model(user_file, arch, code, words):
    (user_file / "broken.py").write_text("def model(:\n")
    (user_file / "script.py").write_text("import sys\nsys.exit(0)\n")
    assert refused(words, arch) == code


def test_files_that_hold_no_fitting_weights(user_file):
    state = build("my_models:ten").state_dict()
    normalized = {"0.mean": ONE, "0.std": ONE} | under("1.module.", state)
    odd_one = under("a.", {"5.x" if key == "5.weight" else key: value for key, value in state.items()})
    fitting = r"odd\.pt: the weights do not fit my_models:ten with 10 classes"
    for words, content in (
        ("holds no state_dict", {}),
        ("holds weights under 'student' and 'teacher'; save", {"student": state, "teacher": state}),
        ("the Python class or function argparse.Namespace.*weights alone", {"state_dict": state, "args": Namespace()}),
        ("function numpy.*scalar, which is not loaded", {"state_dict": state, "best": np.float64(0.9)}),
        ("the Python class or function my_models.Small", build("my_models:Small")),
        ("a TorchScript archive.*torch.jit.load", torch.jit.script(build("my_models:ten"))),
        (
            "0 keys of the model missing, 2 unexpected; first unexpected 0.mean.; give the model.*, or delete",
            normalized,
        ),
        ("1 keys of the model missing, 1 unexpected; first missing 5.weight; first unexpected a.5.x", odd_one),
        ("size mismatch", under("backbone.", state | {"5.weight": torch.zeros(10, 9)})),
        ("1 unexpected; first unexpected module._extra_state", under("module.", state | {"_extra_state": None})),
        (fitting, state | {"extra": torch.zeros(1)}),
    ):
        assert refused(words, "my_models:ten", save(user_file / "odd.pt", content)) == 1
    # a prefix that every key has is taken off one side, not off both
    teacher, student = ({f"{name}.{key}": ONE for key in "ab"} for name in ("teacher", "student"))
    assert align({"a": ONE, "b": ONE}, student, "file", "net").keys() == student.keys()
    with pytest.raises(UserError, match="2 keys of the model missing, 2 unexpected"):
        align(teacher, student, "file", "net")
