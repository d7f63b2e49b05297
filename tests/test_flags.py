"""Random and boundary values of every flag of the three scripts: a finite result, or one line and exit code 2."""

import argparse
import contextlib
import io
import math
import sys
from collections import OrderedDict
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import estimate_curvature
import train_models
from data import datasets as data_module
from data.batches import Split
from data.datasets import DatasetEntry, ImageData, resize
from experiments import compare_methods, evaluate_robustness, label_errors, two_moons
from models import model_selector
from models.layers import LCNN, SOFTPLUS, STANDARD, Layers, conv_norm
from models.outside import build_outside_network

NUMBERS = ["0", "-0", "1", "2", "3", "-1", "0.5", "1e-300", "1e300", "1e-3", "1e400", "2147483648"]
NUMBERS += ["nan", "inf", "-inf"]
ODD = ["", " ", "x", "--", "8/255", "1/0", "0x10", "1_0", "\u0661", "😀", "9" * 40, "1" * 400, "1" * 5000, "None", "-"]
# what names a place, or needs a package of its own
SKIPPED = {"help", "output", "plot", "layers", "compare", "output_dir", "data_dir", "autoattack"}
# where a large number is right and takes long; small ones, and what is wrong, all the same
LONG = {"num_epochs", "num_power_iter", "pgd_steps", "restarts", "adv_steps", "trace_probes", "top_k", "probes"}
LARGE = {"2147483648"}
SCRIPTS = {train_models: "train", estimate_curvature: "estimate", evaluate_robustness: "evaluate"}  # their commands
SCRIPTS |= {compare_methods: "compare", label_errors: "find", two_moons: "draw"}


def tiny(layers: Layers, num_classes: int, input_size: int = 32) -> nn.Sequential:
    """A network of one block."""
    pair = conv_norm(layers, 3, 4, 3, padding=1, bias=False, input_size=input_size)
    parts = OrderedDict(block=pair, activation=layers.activation(), pool=nn.AdaptiveAvgPool2d(2), flat=nn.Flatten())
    return nn.Sequential(OrderedDict(**parts, classifier=nn.Linear(16, num_classes)))


@pytest.fixture(scope="module", autouse=True)
def small_world():
    """Two tiny architectures and a data set of 16 images, under names of ours."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (16, 3, 16, 16), dtype=torch.uint8, generator=generator)

    def load(data_dir, size, download) -> ImageData:
        split = Split(resize(images, size), torch.arange(16) % 2)
        return ImageData(split, split, ["a", "b"], True)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(data_module.datasets, "digits", DatasetEntry(load, 16))
        for name, layers in (("resnet18", STANDARD), ("resnet18lcnn", LCNN), ("resnet18softplus", SOFTPLUS)):
            patch.setitem(model_selector.model_architecture, name, partial(tiny, layers))
        yield


RUN = ["--dataset", "digits", "--num-epochs", "1", "--lr", "0.01", "--batch-size", "4", "--device", "cpu"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, small_world):
    folder = tmp_path_factory.mktemp("checkpoint")
    assert train_models.main([*RUN, "--output-dir", str(folder)]) == 0
    return folder / "resnet18_digits.pt"


def flags_of(parser: argparse.ArgumentParser) -> st.SearchStrategy[list[str]]:
    """Some of the parser's flags, each in one of its spellings and with a value that may be right."""
    one = []
    for action in parser._actions:
        if action.dest in SKIPPED:
            continue
        spelling = st.sampled_from(action.option_strings)
        if action.nargs == 0 or isinstance(action, argparse.BooleanOptionalAction):
            one.append(spelling.map(lambda text: [text]))
            continue
        right = [str(choice) for choice in action.choices or NUMBERS]
        right += ["16", "48"] if action.dest == "image_size" else []
        numbers = NUMBERS + ODD
        if action.dest in LONG:
            right, numbers = (sorted(set(values) - LARGE) for values in (right, numbers))
        text = st.text(st.characters(exclude_categories=["Nd"]) if action.dest in LONG else st.characters())
        value = st.one_of(st.sampled_from(right), st.sampled_from(right), st.sampled_from(numbers), text)
        count = st.integers(0, 3) if action.nargs in ("+", "*") else st.just(1)
        values = count.flatmap(lambda n, value=value: st.lists(value, min_size=n, max_size=n))
        one.append(st.tuples(spelling, values).map(lambda pair: [pair[0], *pair[1]]))
    return st.lists(st.one_of(one), max_size=4).map(lambda lists: [text for words in lists for text in words])


def call(script, arguments: list[str]) -> tuple[int, str, str]:
    """The exit code of script.main(arguments), and what it wrote to stdout and stderr."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        code = script.main(arguments)
    return code, out.getvalue(), err.getvalue()


def assert_sane(code: int, errors: str, arguments: list[str]) -> None:
    """Success without a word, or one line that says what is wrong; exit code 1 only where it is the numbers' fault."""
    lines = [line for line in errors.split("\n") if line and not line.startswith("epoch")]
    if code:
        remedies = ("smaller --lr", "raise --batch-size", "smaller --image-size")
        assert code == 2 or any(remedy in errors for remedy in remedies), (arguments, errors)
        assert len(lines) == 1, (arguments, errors)
    assert "Traceback" not in errors


quiet = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
thorough = settings(max_examples=100, derandomize=True, **quiet)


@pytest.mark.long
@thorough
@given(st.sampled_from(["resnet18", "resnet18lcnn", "resnet18softplus"]), flags_of(train_models.build_parser()))
def test_train(tmp_path_factory, arch, flags):
    folder = tmp_path_factory.mktemp("run")
    fixed = ["--model-arch", arch, "--dataset", "digits", "--num-epochs", "1", "--device", "cpu"]
    code, _, errors = call(train_models, [*flags, *fixed, "--output-dir", str(folder)])
    assert_sane(code, errors, flags)
    finished = list(folder.glob("*.pt"))
    assert len(finished) == (code == 0)
    if finished:
        metrics = torch.load(finished[0], weights_only=True)["metrics"][-1]
        assert all(math.isfinite(value) for value in metrics.values()), flags


@pytest.mark.long
@pytest.mark.parametrize(
    ("script", "few"), [(estimate_curvature, ["--num-power-iter", "2"]), (evaluate_robustness, ["--pgd-steps", "1"])]
)
def test_measure(script, few, tmp_path_factory, checkpoint):
    """What was examined is written, and nothing else."""

    @thorough
    @given(flags_of(script.build_parser()))
    def examine(flags):
        output = tmp_path_factory.mktemp("out") / "out.csv"
        fixed = ["--model-filename", str(checkpoint), "--device", "cpu", "--output", str(output)]
        code, _, errors = call(script, [*flags, *few, *fixed])
        assert_sane(code, errors, flags)
        assert output.exists() == (code == 0)
        if script is estimate_curvature and code == 0:
            assert np.isfinite(pd.read_csv(output)["curvature"]).all()

    examine()


@pytest.mark.parametrize(("script", "command"), SCRIPTS.items())
def test_the_number_of_threads_is_set_and_put_back(script, command, monkeypatch, users_file):
    """Whatever number the user's module sets when it is imported, for its own scripts."""
    users_file("threads", "import torch\ntorch.set_num_threads(7)\ndef build(): return torch.nn.Flatten()\n")
    before, seen = torch.get_num_threads(), []

    def work(*_):
        sys.modules.pop("threads", None)
        build_outside_network("threads:build", 10, 16)
        seen.append(torch.get_num_threads())

    monkeypatch.setattr(script, command, work)
    for more in ([], ["--num-threads", str(before + 1)]):
        assert call(script, more)[0] == 0
    assert seen == [before, before + 1]
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(("precision", "fast", "lines"), [("bf16", False, 1), ("bf16", True, 0), ("fp32", False, 0)])
def test_bf16_is_said_to_be_slow_where_the_cpu_has_none(precision, fast, lines, tmp_path, monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: fast)
    code, printed, errors = call(train_models, [*RUN, "--output-dir", str(tmp_path), "--precision", precision])
    assert code == 0, errors
    assert printed.count("16 times as long") == lines
