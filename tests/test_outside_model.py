"""Models of other people: named by module and function, with weights in files as training scripts leave them."""

import sys

import pytest
import torch
import torchvision
from torch import nn

from models.checkpoint import build_model, read_checkpoint
from models.model_selector import is_outside
from utils.errors import UsageError, UserError

USER_FILE = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)

    def forward(self, x):
        return torch.relu(x + self.bn(self.conv(x)))

class Small(nn.Sequential):
    def __init__(self, num_classes=7):
        head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes)
        super().__init__(nn.Conv2d(3, 8, 3), Block(8), Block(8), *head)

def ten():
    return Small(10)

def any_keyword(**keywords):
    return Small(**keywords)

def keywords_elsewhere(**keywords):
    return nn.Conv2d(3, 5, 1, **keywords)

def wide(num_classes, /):
    return Small(num_classes)

def failing():
    raise RuntimeError("no weights\\nanywhere " + "x" * 1000)

def exiting():
    raise SystemExit(3)

def no_model():
    return {"model": Small()}

class Factories:
    ten = staticmethod(ten)

class Holder(nn.Module):
    def __init__(self):
        super().__init__()
        self.module = Small(10)

instance = Small()
number = 3
"""


@pytest.fixture
def user_file(tmp_path, monkeypatch):
    """my_models.py in the current directory, as a user has it; forgotten again afterwards."""
    (tmp_path / "my_models.py").write_text(USER_FILE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    sys.modules.pop("my_models", None)


def build(arch: str, path, num_classes: int) -> nn.Module:
    """The network with the weights at path, or with those it comes with."""
    checkpoint = read_checkpoint(path, arch) if path else {"model_arch": arch}
    return build_model(checkpoint, path or arch, arch, num_classes, 32)


def save(path, content):
    torch.save(content, path)
    return path


def assert_one_line(error: pytest.ExceptionInfo) -> None:
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500


def test_a_colon_makes_it_an_outside_model():
    assert is_outside("my_models:rice2020")
    assert is_outside("torchvision.models:resnet18")
    assert not is_outside("resnet18lcnn")


@pytest.mark.parametrize(
    ("function", "classes"),
    [("Small", 4), ("ten", 10), ("any_keyword", 4), ("Factories.ten", 10)],
)
def test_num_classes_goes_to_whoever_takes_it(user_file, function, classes):
    model = build(f"my_models:{function}", None, 4)
    assert model(torch.rand(2, 3, 8, 8)).shape == (2, classes)
    assert not model.training


def test_keywords_that_are_handed_on_to_something_without_num_classes(user_file):
    assert isinstance(build("my_models:keywords_elsewhere", None, 4), nn.Conv2d)


def test_torchvision_model_with_a_plain_state_dict(tmp_path):
    torch.manual_seed(0)
    trained = torchvision.models.resnet18(num_classes=10).eval()
    trained.bn1.running_mean.uniform_()  # buffers count, too
    path = save(tmp_path / "weights.pt", trained.state_dict())
    x = torch.rand(2, 3, 32, 32)
    model = build("torchvision.models:resnet18", path, 10)
    assert torch.equal(model(x), trained(x))
    assert not any(module.training for module in model.modules())
    with pytest.raises(UserError, match=r"weights\.pt: the weights do not fit .*resnet18 with 100 classes") as error:
        build("torchvision.models:resnet18", path, 100)
    assert_one_line(error)


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model", "model_state_dict", "net"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_wrapped_state_dicts(user_file, wrapper, prefix):
    trained = build("my_models:ten", None, 10)
    state = {prefix + key: value for key, value in trained.state_dict().items()}
    path = save(user_file / "weights.pt", {wrapper: state, "epoch": 3, "best": 0.9} if wrapper else state)
    x = torch.rand(2, 3, 8, 8)
    assert torch.equal(build("my_models:ten", path, 10)(x), trained(x))


def test_a_layer_of_the_models_own_called_module_is_no_prefix(user_file):
    trained = build("my_models:Holder", None, 10)
    path = save(user_file / "weights.pt", trained.state_dict())
    model = build("my_models:Holder", path, 10)
    assert torch.equal(model.module[0].weight, trained.module[0].weight)


def test_the_model_takes_the_dtype_of_its_weights(user_file):
    trained = build("my_models:ten", None, 10).double()
    path = save(user_file / "weights.pt", trained.state_dict())
    x = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    assert torch.equal(build("my_models:ten", path, 10)(x), trained(x))


@pytest.mark.parametrize(
    ("arch", "words"),
    [
        ("no_such_module:resnet18", "cannot import 'no_such_module'"),
        (":resnet18", "cannot import ''"),
        ("broken:model", "cannot import 'broken'.*SyntaxError"),
        ("script:model", "cannot import 'script'.*SystemExit: 0"),
        ("my_models:absent", "my_models has no 'absent'"),
        ("my_models:", "my_models has no ''"),
        ("my_models:number", "of type int, not a function"),
        ("my_models:instance", "of type Small, not a function"),
        ("my_models:no_model", "returns a dict, not a torch.nn.Module"),
    ],
)
def test_names_of_nothing_that_builds_a_model(user_file, arch, words):
    (user_file / "broken.py").write_text("def model(:\n")
    (user_file / "script.py").write_text("import sys\nsys.exit(0)\n")
    with pytest.raises(UsageError, match=words) as error:
        build(arch, None, 10)
    assert_one_line(error)


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("failing", "failed to build the model .RuntimeError: no weights anywhere x"),
        ("exiting", "failed to build the model .SystemExit: 3"),
        ("wide", "failed to build the model .TypeError"),
    ],
)
def test_functions_that_fail(user_file, function, words):
    with pytest.raises(UserError, match=words) as error:
        build(f"my_models:{function}", None, 10)
    assert error.value.exit_code == 1
    assert_one_line(error)


def test_files_that_are_damaged_or_hold_no_fitting_weights(user_file):
    model = build("my_models:ten", None, 10)
    state = model.state_dict()
    whole = save(user_file / "whole.pt", state).read_bytes()

    def refused(path, words):
        with pytest.raises(UserError, match=words) as error:
            build("my_models:ten", path, 10)
        assert error.value.exit_code == 1
        assert_one_line(error)

    refused(user_file / "absent.pt", r"absent\.pt: no such file")
    for length in (0, 1, 1000, len(whole) - 500):
        (user_file / "cut.pt").write_bytes(whole[:length])
        refused(user_file / "cut.pt", r"cut\.pt: not readable weights.*state_dict\(\)")
    refused(save(user_file / "pickled.pt", model), "not plain tensors")
    for foreign in ([1, 2], {}, {"weights": 3}, {0: torch.zeros(3)}, {"model": {"net": {}}}):
        refused(save(user_file / "foreign.pt", foreign), r"foreign\.pt: holds no state_dict")
    head = "5.weight"
    for odd in (
        {key: value for key, value in state.items() if key != head},
        state | {"extra": torch.zeros(1)},
        state | {head: torch.zeros(4, 8)},
    ):
        refused(save(user_file / "odd.pt", odd), r"odd\.pt: the weights do not fit my_models:ten with 10 classes")


def test_a_pickle_that_runs_code_is_not_run(user_file):
    class Payload:
        def __reduce__(self):
            return open, (str(user_file / "created"), "w")

    with pytest.raises(UserError, match="not plain tensors"):
        build("my_models:ten", save(user_file / "hostile.pt", {"model": Payload()}), 10)
    assert not (user_file / "created").exists()
