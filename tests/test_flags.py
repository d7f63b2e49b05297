"""Random and boundary values of every flag of the three scripts: a finite result, or one line and exit code 2."""

import argparse
import math
import sys
from subprocess import CompletedProcess

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import run_main
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import estimate_curvature
import train_models
from experiments import compare_methods, evaluate_robustness, label_errors, two_moons
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


def assert_sane(result: CompletedProcess) -> None:
    """Success without a word, or one line that says what is wrong; exit code 1 only where it is the numbers' fault."""
    lines = [line for line in result.stderr.split("\n") if line and not line.startswith("epoch")]
    if result.returncode:
        remedies = ("smaller --lr", "raise --batch-size", "smaller --image-size")
        assert result.returncode == 2 or any(remedy in result.stderr for remedy in remedies), result
        assert len(lines) == 1, result
    assert "Traceback" not in result.stderr


@pytest.mark.long
@pytest.mark.parametrize("script", [train_models, estimate_curvature, evaluate_robustness])
def test_any_flags(script, thin_vgg, photographs, tmp_path_factory, capsys):
    """What was asked for is written, and nothing else."""
    training = ["--dataset", "imagefolder", "--data-dir", photographs, "--num-epochs", 1, "--device", "cpu"]
    folder = tmp_path_factory.mktemp("checkpoint")
    flags = ["--model-arch", "vgg11", "--image-size", 16, "--lr", 0.01, *training, "--output-dir", folder]
    assert run_main(train_models, flags, capsys).returncode == 0
    measuring = ["--model-filename", folder / "vgg11_imagefolder.pt", "--device", "cpu"]
    fixed = {
        train_models: [*training, "--output-dir"],
        estimate_curvature: [*measuring, "--num-power-iter", 2, "--output"],
        evaluate_robustness: [*measuring, "--pgd-steps", 1, "--output"],
    }

    @settings(max_examples=100, derandomize=True, deadline=None, database=None, suppress_health_check=HealthCheck)
    @given(st.sampled_from(["vgg11", "vgg11lcnn", "vgg11softplus"]), flags_of(script.build_parser()))
    def examine(arch, flags):
        output = tmp_path_factory.mktemp("run") / "out.csv"
        if script is train_models:
            output, flags = output.parent, ["--image-size", 16, *flags, "--model-arch", arch]
        result = run_main(script, [*flags, *fixed[script], output], capsys)
        assert_sane(result)
        written = list(output.glob("*.pt") if script is train_models else output.parent.glob("out.csv"))
        assert len(written) == (result.returncode == 0)
        if written and script is train_models:
            assert all(map(math.isfinite, torch.load(written[0])["metrics"][-1].values())), flags
        elif written and script is estimate_curvature:
            assert np.isfinite(pd.read_csv(written[0])["curvature"]).all(), flags

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
        assert script.main(more) == 0
    assert seen == [before, before + 1]
    assert torch.get_num_threads() == before
