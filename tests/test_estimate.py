"""estimate_curvature.py as a user runs it, on other people's models, alone and in company; experiments.label_errors."""

import json
import os
import socket
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT, assert_one_line_error, run_main

import estimate_curvature
from curvature.estimate import estimate_curvature as estimate
from curvature.results import COLUMNS, averaged, format_summary, named, read_results, summarize, write_results
from data.datasets import load_dataset
from experiments import label_errors

MY_MODELS = '''
import torch
import torch.nn.functional as F
from torch import nn


class Net(nn.Module):
    """Normalizes its pixels, and works in place behind a BatchNorm."""

    def __init__(self, num_classes=10):
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.49, 0.48, 0.45]).view(1, 3, 1, 1))
        self.conv, self.bn = nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, num_classes)

    def forward(self, x):
        x = F.relu(self.bn(self.conv((x - self.mean) / 0.25)), inplace=True)
        return self.fc(F.adaptive_avg_pool2d(F.softplus(x), 1).flatten(1))


class Noisy(Net):
    def forward(self, x):
        return super().forward(x) + 0.1 * torch.randn(1)


class Flat(nn.Module):
    """Logits that are constant but for a whisper: no gradient of the loss is left in float32."""

    def forward(self, x):
        return torch.stack([x.sum(dim=(1, 2, 3)) * 1e-3 + 500, torch.zeros(len(x))], dim=1)
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of a user's own: their model file, and weights in the ways people save them."""
    folder = tmp_path_factory.mktemp("user")
    (folder / "my_models.py").write_text(MY_MODELS)
    sys.path.insert(0, str(folder))
    import my_models

    torch.manual_seed(1)
    state = my_models.Net(num_classes=2).state_dict()
    torch.save(state, folder / "plain.pt")
    torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}}, folder / "wrapped.pt")
    for dtype in (torch.bfloat16, torch.float64):
        torch.save(my_models.Net(num_classes=2).to(dtype).state_dict(), folder / f"{dtype}.pt")
    yield folder
    sys.path.remove(str(folder))
    del sys.modules["my_models"]


@pytest.fixture
def run(folder, photographs, monkeypatch, capsys):
    """Run the script on the photographs, from the user's folder."""
    monkeypatch.chdir(folder)
    data = ["--dataset", "imagefolder", "--data-dir", photographs, "--image-size", 16]
    return lambda *flags: run_main(estimate_curvature, [*data, *flags], capsys)


@pytest.mark.draws
def test_a_users_own_model_is_measured_and_compared(folder, photographs, tmp_path, run, capsys):
    flags = ["--model-arch", "my_models:Net", "--model-filename", "plain.pt", "wrapped.pt", "--num-samples", 5]
    flags += ["--num-power-iter", 20, "--tol", 0.01, "--top-k", 2, "--trace-probes", 3]
    for name in ("a.csv", "a.json"):
        result = run(*flags, "--output", tmp_path / name)
        assert (result.returncode, result.stderr) == (0, "")
        assert result.stdout.count("train, 5 examples") == result.stdout.count("test, 5 examples") == 2
    results = read_results(tmp_path / "a.csv")
    pd.testing.assert_frame_equal(results, read_results(tmp_path / "a.json"), check_exact=True)
    assert len(results) == 20
    assert results["hessian_norm"][:10].tolist() == results["hessian_norm"][10:].tolist()  # the same weights
    expected = "model split index label predicted loss gradient_norm hessian_norm curvature eigenvalue residual "
    expected += "products converged eigenvalue_2 trace trace_error curvature_score curvature_score_error "
    assert list(results) == [*expected.split(), "frobenius_norm", "frobenius_norm_error"]
    content = json.loads((tmp_path / "a.json").read_text())
    assert content["settings"]["num_samples"] == 5
    summary = content["measurements"][1]["summary"]
    assert {"eigenvalue_2", "trace_error", "curvature_score", "frobenius_norm"} <= summary.keys()
    assert summary["curvature"].keys() == {"mean", "sd", "median", "q05", "q95"}

    # a row says what the function says
    import my_models

    model = my_models.Net(num_classes=2)
    model.load_state_dict(torch.load(folder / "plain.pt"))
    split, row = load_dataset("imagefolder", photographs, 16).test, results.iloc[5]
    image, label = split.images[row["index"]][None].float() / 255, split.labels[row["index"]][None]
    found = estimate(model, image, label, num_iterations=60, tol=1e-6, generator=torch.Generator().manual_seed(0))
    assert (row["label"], row["predicted"]) == (label.item(), found.predicted.item())
    assert row["gradient_norm"] == pytest.approx(found.gradient_norm.item(), rel=1e-4)
    assert row["curvature"] == pytest.approx(found.curvature.item(), rel=1e-3)
    assert results["converged"].tolist() == (results["residual"] <= 0.01).tolist()

    compared = ["--compare", tmp_path / "a.csv", tmp_path / "a.json", "--plot", tmp_path / "both.png"]
    lines = run_main(estimate_curvature, compared, capsys).stdout.splitlines()
    names = [f"{model} ({file})" for file in ("a.csv", "a.json") for model in ("plain", "wrapped") for _ in "tt"]
    assert [line.split("  ")[0] for line in lines[1:9]] == names
    assert len(lines) == 11  # a header, two splits four times, that they are at chance, the picture
    assert (tmp_path / "both.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        (["--model-arch", "my_models:Noisy"], 1, ["random in eval", "Noisy"]),
        (["--model-arch", "my_models:Net", "--output", "plain.pt/x.csv"], 1, ["x.csv", "cannot be written"]),
        (["--model-arch", "my_models:Net", "--top-k", 999, "--num-power-iter", 999], 2, ["--top-k 999", "768"]),
        (["--model-arch", "resnet99"], 2, ["resnet99", "package.module:callable"]),
        (["--model-filename", "x.pt", "--num-samples", "3", "--data-fraction", "0.5"], 2, ["--data-fraction"]),
        (["--model-filename", "x.pt", "--method", "power", "--top-k", "2"], 2, ["--top-k", "lanczos"]),
        (["--model-filename", "x.pt", "--top-k", "20"], 2, ["--top-k 20", "--num-power-iter"]),
        (["--model-filename", "x.pt", "--output", "x.txt"], 2, [".csv", ".json"]),
        (["--model-filename", "x.pt", "--output", "x.csv", "--compare", "x.csv"], 2, ["twice"]),
        (["--compare", "x.csv", "--output", "y.csv"], 2, ["--output", "--model-filename"]),
        (["--model-filename", "x.pt", "--trace-probes", "-1"], 2, ["--trace-probes"]),
        (["--compare", "absent.csv"], 1, ["absent.csv", "--output"]),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line_before_anything_is_measured(flags, code, words, run):
    result = run(*flags)
    assert_one_line_error(result, code, *words)
    assert result.stdout == ""


EARLIER = f"""{",".join(COLUMNS)}
a/1.pt,train,174,5,5,0.03254025802016258,nan,inf,2.5058276653289795,-0.12873376905918,4.3102285417262465e-05,5,True
a/1.pt,test,254,1,8,1.3180549144744873,2.3381364345550537,2.58,1.104467511177063,2.58,1e-05,10,False
"""


def test_files_are_read_back_and_written_again_as_they_were(tmp_path):
    path = tmp_path / "earlier.csv"
    path.write_text(EARLIER)
    results = read_results(path)
    assert {name: str(results[name].dtype) for name in list(COLUMNS)[2:]} == dict(list(COLUMNS.items())[2:])
    assert results.loc[0, "residual"] == 4.3102285417262465e-05
    write_results(tmp_path / "again.csv", results, {})
    assert (tmp_path / "again.csv").read_text() == EARLIER
    write_results(tmp_path / "again.json", results, {"path": tmp_path})
    content = json.loads((tmp_path / "again.json").read_text(), parse_constant=lambda constant: pytest.fail(constant))
    assert content["measurements"][0]["examples"][0]["hessian_norm"] is None  # inf is no JSON
    pd.testing.assert_frame_equal(read_results(tmp_path / "again.json"), results.replace(np.inf, np.nan))


def test_names_are_as_long_as_it_takes_to_tell_models_apart():
    for models, expected in (
        ([("a/x.pt", ""), ("a/y.pt", "1.csv")], ["x", "y"]),
        ([("a/x.pt", ""), ("b/x.pt", "1.csv")], ["a/x", "b/x"]),
        ([("/r/s/a/c/x.pt", ""), ("/r/s/b/c/x.pt", ""), ("/r/y.pt", "")], ["a/c/x", "b/c/x", "y"]),
        ([("x.pt", ""), ("a/x.pth", ""), ("./a/x.pt", "")], ["x.pt", "a/x.pth", "./a/x.pt"]),
        ([("m.nets:vgg", ""), ("m.nets:resnet", "")], ["m.nets:vgg", "m.nets:resnet"]),
        ([("a/x.pt", ""), ("a/x.pt", "r/1.csv")], ["x", "x (1.csv)"]),
        ([("a/x.pt", "r/1.csv"), ("a/x.pt", "s/1.csv")], ["x (r/1.csv)", "x (s/1.csv)"]),
    ):
        results = pd.DataFrame(models, columns=["model", "source"]).assign(split="test")
        assert [name for name, _ in named(results)] == expected


def table(**changes) -> pd.DataFrame:
    columns = dict.fromkeys(("gradient_norm", "hessian_norm", "curvature", "eigenvalue"), np.arange(1.0, 7))
    columns |= {"index": range(10, 16), "label": 0, "residual": 1e-4, "products": 7, "converged": True}
    columns |= {"model": "m", "split": "test", "predicted": [0, 0, 0, 1, 1, 1], "loss": 1.0}
    return pd.DataFrame(columns | changes)


def test_examples_without_a_meaningful_curvature_are_counted_and_left_out():
    gradient = np.array([1.0, 0.0, 3.0, np.nan, 5.0, 6.0])
    hessian = np.array([1.0, 0.0, 3.0, np.nan, 0.0, 6.0])
    results = table(gradient_norm=gradient, hessian_norm=hessian, curvature=hessian / (gradient + 1e-6))
    assert averaged(results).tolist() == [True, False, True, False, False, True]
    summary = summarize(results)
    assert (summary["examples"], summary["averaged"]) == (6, 3)
    assert summary["hessian_norm"]["mean"] == pytest.approx(10 / 3)
    for index, reason in ((13, "not finite"), (11, "zero gradient"), (14, "zero Hessian")):
        assert f"1 with {reason} (index {index})" in format_summary(results)
    assert "nothing is left to average" in format_summary(table(gradient_norm=0.0))


def test_the_summary_is_numpys():
    values = np.random.default_rng(0).lognormal(size=600)
    results = pd.concat([table()] * 100).assign(curvature=values)
    expected = dict(zip(("q05", "median", "q95"), np.percentile(values, [5, 50, 95]), strict=True))
    assert summarize(results)["curvature"] == pytest.approx(expected | {"mean": values.mean(), "sd": values.std()})
    assert "accuracy 50.00 %" in format_summary(results)
    assert "lower bounds" not in format_summary(results)
    text = format_summary(table(converged=[True] * 5 + [False]))
    assert "5 of 6 converged" in text
    assert "--num-power-iter" in text


def test_two_processes_find_what_one_does(photographs, tmp_path, run, monkeypatch):
    flags = ["--model-arch", "my_models:Net", "--num-samples", 6, "--batch-size", 2, "--output"]
    one = run(*flags, tmp_path / "one.csv")
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        group = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(probe.getsockname()[1])}
    for name, value in (group | {"RANK": "0"}).items():
        monkeypatch.setenv(name, value)  # this process is the first
    flags += [tmp_path / "two.csv", "--dataset", "imagefolder", "--data-dir", photographs, "--image-size", 16]
    command = [sys.executable, ROOT / "estimate_curvature.py", *flags, "--output", tmp_path / "second.csv"]
    command = list(map(str, command))
    with subprocess.Popen(command, env=os.environ | {"RANK": "1"}, stdout=subprocess.PIPE) as second:
        assert run(*flags).stdout.replace("two.csv", "one.csv") == one.stdout
        assert second.communicate(timeout=60)[0] == b""  # printed once, by the first process
    assert not (tmp_path / "second.csv").exists()  # written by the first, too
    assert (tmp_path / "one.csv").read_text() == (tmp_path / "two.csv").read_text()


def test_files_that_are_no_results_are_refused(tmp_path, capsys):
    for name, text in (
        ("head.csv", EARLIER.splitlines()[0]),
        ("part.csv", "model,split,index,label,gradient_norm,hessian_norm,curvature\nm,test,1,1,1,1,1\n"),
        ("cut.csv", EARLIER[:-12]),
        ("wide.csv", 'model,split\n"' + "x" * 200_000),
        ("deep.json", "[" * 100_000),
        ("list.json", "[1, 2]"),
    ):
        (tmp_path / name).write_text(text)
        result = run_main(estimate_curvature, ["--compare", tmp_path / name], capsys)
        assert_one_line_error(result, 1, name, "not a result file")


def test_a_users_packages_may_be_called_as_ours_are(tmp_path, run, monkeypatch):
    """models/ and utils.py are common names; what the user's file imports must be the user's, and ours stay ours."""
    (tmp_path / "models").mkdir()
    layers = "nn.Conv2d(3, WIDTH, 3, 8), nn.Tanh(), nn.Flatten(), nn.Linear(4 * WIDTH, 2)"
    text = f"from torch import nn\nfrom utils import WIDTH\n\ndef small(): return nn.Sequential({layers})\n"
    (tmp_path / "models" / "small.py").write_text(text)
    (tmp_path / "utils.py").write_text("WIDTH = 3\n")
    (tmp_path / "theirs.py").write_text("def net():\n    from models.small import small\n    return small()\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(ROOT), *sys.path])
    for arch in ("models.small:small", "theirs:net"):
        result = run("--model-arch", arch, "--num-samples", 1, "--num-power-iter", 1, "--split", "test")
        assert result.returncode == 0, result.stderr
    import models.layers
    import utils.cli

    assert all(module.__file__.startswith(str(ROOT)) for module in (models.layers, utils.cli))


def test_unusual_models(tmp_path, run):
    """Margins of 500, whose gradient underflows to 0 in float32; weights of 16 and 64 bits."""
    result = run("--model-arch", "my_models:Flat", "--split", "test")
    assert "my_models:Flat: its weights as the callable made them, on imagefolder" in result.stdout
    assert "with zero gradient" in result.stdout
    assert "train," not in result.stdout
    net = ["--model-arch", "my_models:Net", "--model-filename"]
    result = run(*net, "torch.bfloat16.pt", "--num-samples", 1000, "--num-power-iter", 1, "--method", "power")
    assert result.stdout != run(*net, "torch.bfloat16.pt", "--num-samples", 1000, "--num-power-iter", 1).stdout
    for words in ("measured in float32", "train, 24 examples", "test, 12 examples"):
        assert words in result.stdout
    # 90 products take the residual below float32's rounding
    flags = ["--split", "test", "--num-power-iter", 90, "--tol", 1e-10, "--output", tmp_path / "d.csv"]
    assert run(*net, "torch.float64.pt", *flags).returncode == 0
    assert read_results(tmp_path / "d.csv")["residual"].max() <= 1e-10


def test_labels_that_are_exchanged(tmp_path, capsys):
    labels = torch.arange(1000) % 10
    noisy, exchanged = label_errors.exchange_labels(labels, 0.05, 10, seed=1)
    assert exchanged.sum() == 50
    assert torch.equal(noisy != labels, exchanged)
    result = run_main(label_errors, ["--output", tmp_path / "found.png"], capsys)
    assert_one_line_error(result, 2, "found.png", "must end in .csv")


@pytest.mark.long
def test_the_rows_of_label_errors(thin_vgg, tmp_path, capsys):
    flags = ["--num-epochs", 1, "--trace-probes", 1, "--output", tmp_path / "found.csv"]
    result = run_main(label_errors, flags, capsys)
    assert result.returncode == 0, result.stderr
    assert "AUROC of finding them" in result.stdout
    rows = pd.read_csv(tmp_path / "found.csv")
    assert rows["exchanged"].sum() == 72  # of 1437
    assert (rows["curvature_score"] > 0).all()
    assert (tmp_path / "found.png").read_bytes().startswith(b"\x89PNG")
