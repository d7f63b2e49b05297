"""What several test files share: real images on disk, a small network, and the scripts run as a user runs them."""

import functools
import hashlib
import multiprocessing
import os
import pickle
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from models.layers import LCNN, conv_norm
from models.resnet import ResidualBlock, ResNet
from models.vgg import VGG11

ROOT = Path(__file__).resolve().parent.parent

torch.set_num_threads(1)  # two tests run at a time, see pyproject.toml
os.environ["OMP_NUM_THREADS"] = "1"  # and for the processes they start
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's jobs in the background ignore it


class TwoBlocks(ResNet):
    """A low-curvature ResNet of a few channels."""

    def __init__(self, num_classes: int, input_size: int = 16):
        nn.Module.__init__(self)
        self.stem = conv_norm(LCNN, 3, 8, 3, padding=1, bias=False, input_size=input_size)
        self.activation = LCNN.activation()
        blocks = [ResidualBlock(LCNN, 8, 8, 1, input_size), ResidualBlock(LCNN, 8, 16, 2, input_size)]
        self.stages = nn.Sequential(nn.Sequential(*blocks))
        self.classifier = spectral_norm(nn.Linear(16, num_classes))


THIN = "models.vgg.VGG11", tuple(entry if entry == "M" else entry // 8 for entry in VGG11)


@pytest.fixture
def thin_vgg(monkeypatch) -> None:
    """VGG-11 with an eighth of its channels."""
    monkeypatch.setattr(*THIN)


@pytest.fixture(autouse=True)
def _pictures(request, monkeypatch):
    """To draw a picture takes as long as to train a small network: only tests marked ``draws`` do."""
    if "draws" not in request.keywords:
        monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda self, file, **_: file.write(b"\x89PNG"))


@pytest.fixture(scope="session")
def photographs(tmp_path_factory) -> Path:
    """20 x 20 patches of two real photographs (scikit-learn's): classes china and flower, 12 train and 6 test each."""
    from sklearn.datasets import load_sample_images  # here, as not every process that imports this file needs it

    root = tmp_path_factory.mktemp("photographs")
    sample = load_sample_images()
    rng = np.random.default_rng(0)
    for photograph, filename in zip(sample.images, sample.filenames, strict=True):
        name = Path(filename).stem
        for split, count in (("train", 12), ("test", 6)):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                top, left = rng.integers(0, [photograph.shape[0] - 20, photograph.shape[1] - 20])
                Image.fromarray(photograph[top : top + 20, left : left + 20]).save(folder / f"{i}.png")
    return root


@pytest.fixture
def users_file(tmp_path, monkeypatch):
    """users_file(name, text) writes name.py into the current directory, as a user has it, and returns that folder;
    the module is forgotten again afterwards."""
    names = []

    def write(name: str, text: str) -> Path:
        (tmp_path / f"{name}.py").write_text(text)
        names.append(name)
        return tmp_path

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield write
    for name in names:
        sys.modules.pop(name, None)


def run_script(script: str, *arguments, check: int | None = 0) -> subprocess.CompletedProcess:
    """Run an entry script, or a module by its dotted name, in a process of its own; unless check is None, insist on
    that exit code."""
    what = [str(ROOT / script)] if script.endswith(".py") else ["-m", script]
    command = [sys.executable, *what, *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert check is None or result.returncode == check, result.stdout + result.stderr
    return result


def run_main(script, arguments: list, capsys) -> subprocess.CompletedProcess:
    """script.main(arguments), which is all a process of its own would call: what it printed, the code it returned."""
    returned = script.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return subprocess.CompletedProcess(arguments, returned, captured.out, captured.err)


def assert_one_line_error(result: subprocess.CompletedProcess, code: int, *words: str) -> None:
    """The exit code, exactly one line on stderr, no traceback, and the words that name the problem and the remedy."""
    assert result.returncode == code, result.stderr
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    assert "Traceback" not in result.stderr + result.stdout
    for word in words:
        assert word in result.stderr, result.stderr


def write_cifar(root, monkeypatch, class_name: str) -> None:
    """torchvision's own file layout with a few random images, and its checksums told about them."""
    import torchvision

    dataset = getattr(torchvision.datasets, class_name)
    folder = root / dataset.base_folder
    folder.mkdir(parents=True)
    label_key = "fine_labels" if class_name == "CIFAR100" else "labels"
    names = [f"class{i}" for i in range(100 if class_name == "CIFAR100" else 10)]
    rng = np.random.default_rng(0)

    def write(name: str, content: dict) -> str:
        (folder / name).write_bytes(pickle.dumps(content))
        return hashlib.md5((folder / name).read_bytes()).hexdigest()

    for attribute in ("train_list", "test_list"):
        names_and_sums = []
        for name, _ in getattr(dataset, attribute):
            images = rng.integers(0, 256, (3, 3072), dtype=np.uint8)
            names_and_sums.append([name, write(name, {"data": images, label_key: [0, 1, 2]})])
        monkeypatch.setattr(dataset, attribute, names_and_sums)
    checksum = write(dataset.meta["filename"], {dataset.meta["key"]: names})
    monkeypatch.setattr(dataset, "meta", {**dataset.meta, "md5": checksum})


FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["torch", "torchvision", "pandas", "matplotlib.pyplot", "sklearn.datasets", "pytest"])
outputs = functools.cache(tempfile.TemporaryDirectory)


class Script(FORKS.Process):
    """A script as Python would run it, started in a process that has torch imported; what it prints is in two files."""

    def __init__(self, script: str | Path, *arguments, **variables):
        super().__init__(daemon=True)
        self.arguments = [str(ROOT / script), *map(str, arguments)]
        self.variables = {name: str(value) for name, value in variables.items()}
        self.folder, self.printed = os.getcwd(), Path(tempfile.mkdtemp(dir=outputs().name))
        for name in ("stdout", "stderr"):
            (self.printed / name).touch()
        self.start()

    def run(self) -> None:
        os.chdir(self.folder)
        os.environ.update(self.variables)
        for descriptor, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(self.printed / name, os.O_WRONLY), descriptor)
        sys.argv = self.arguments
        runpy.run_path(self.arguments[0], run_name="__main__")

    stdout = property(lambda self: (self.printed / "stdout").read_text())
    stderr = property(lambda self: (self.printed / "stderr").read_text())

    def wait_for(self, text: str) -> None:
        """Until it has printed this."""
        while text not in self.stdout:
            assert self.is_alive(), self.stdout + self.stderr
            time.sleep(0.002)

    def end(self, how: signal.Signals | None = None) -> int:
        """Send it the signal, if any, and wait; returns the exit code."""
        if how:
            os.kill(self.pid, how)
        self.join(120)
        return self.exitcode
