"""estimate_curvature.py as a user runs it: on its own checkpoints and other people's models, alone and in company."""

import csv
import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, SHARED, assert_one_line_error, run_main, run_script

import estimate_curvature
from curvature.estimate import estimate_curvature as estimate
from curvature.results import Measurement, format_measurement, read_measurements, summarize, write_measurements
from tests.test_distributed import finish, launch

OUTSIDE = '''
import torch
import torch.nn.functional as F
from torch import nn


class Block(nn.Module):
    """A pre-activation block with ReLU, as a WideResNet has it."""

    def __init__(self, n_in, n_out, stride):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(n_in), nn.Conv2d(n_in, n_out, 3, stride, 1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(n_out), nn.Conv2d(n_out, n_out, 3, 1, 1, bias=False)
        self.short = nn.Conv2d(n_in, n_out, 1, stride, bias=False)

    def forward(self, x):
        x = F.relu(self.bn1(x), inplace=True)
        return self.conv2(F.relu(self.bn2(self.conv1(x)))) + self.short(x)


class WideResNet(nn.Module):
    def __init__(self, num_classes=10, widen_factor=2):
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.49, 0.48, 0.45]).view(1, 3, 1, 1))
        self.conv = nn.Conv2d(3, 8, 3, 1, 1, bias=False)
        self.blocks = nn.Sequential(Block(8, 8 * widen_factor, 1), Block(8 * widen_factor, 16 * widen_factor, 2))
        self.bn, self.fc = nn.BatchNorm2d(16 * widen_factor), nn.Linear(16 * widen_factor, num_classes)

    def forward(self, x):
        x = F.relu(self.bn(self.blocks(self.conv((x - self.mean) / 0.25))))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


def ready():
    torch.manual_seed(0)
    return WideResNet(num_classes=2)


class Noisy(nn.Module):
    def forward(self, x):
        return x + 0.1 * torch.randn_like(x)


def noisy():
    return nn.Sequential(ready(), Noisy())


def flat():
    """Logits that are constant but for a whisper: no gradient of the loss is left in float32."""
    class Flat(nn.Module):
        def forward(self, x):
            return torch.stack([x.sum(dim=(1, 2, 3)) * 1e-3 + 500, torch.zeros(len(x))], dim=1)

    return Flat()
'''


@pytest.fixture(scope="module")
def folder(photographs, tmp_path_factory):
    """A folder of a user's own: their model file, and weights in the ways people save them."""
    folder = tmp_path_factory.mktemp("user")
    (folder / "my_models.py").write_text(OUTSIDE)
    sys.path.insert(0, str(folder))
    import my_models

    torch.manual_seed(1)
    model = my_models.WideResNet(num_classes=2)
    torch.save(model.state_dict(), folder / "plain.pt")
    torch.save({"state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}, folder / "wrapped.pt")
    yield folder
    sys.path.remove(str(folder))
    del sys.modules["my_models"]


SMALL = """
def small():
    return nn.Sequential(nn.Conv2d(3, WIDTH, 3, 8), nn.Tanh(), nn.Flatten(), nn.Linear(4 * WIDTH, 2))
"""


def in_folder(folder, *flags, check: int | None = 0) -> subprocess.CompletedProcess:
    """The script run from the user's folder, as its documentation shows it."""
    command = [sys.executable, str(ROOT / "estimate_curvature.py"), *map(str, flags)]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert check is None or result.returncode == check, result.stdout + result.stderr
    return result


def data_flags(photographs) -> list:
    return ["--dataset", "imagefolder", "--data-dir", photographs, "--image-size", 16]


def rows_of(path) -> list[dict]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_a_users_own_model(folder, photographs, tmp_path):
    flags = ["--model-arch", "my_models:WideResNet", "--model-filename", "plain.pt", "wrapped.pt"]
    flags += [*data_flags(photographs), "--num-samples", 5, "--num-power-iter", 12]
    result = in_folder(folder, *flags, "--output", tmp_path / "a.csv", "--plot", tmp_path / "a.png")
    assert result.stderr == ""
    assert result.stdout.count("train, 5 examples") == result.stdout.count("test, 5 examples") == 2
    rows = rows_of(tmp_path / "a.csv")
    assert len(rows) == 20
    assert [r["hessian_norm"] for r in rows[:10]] == [r["hessian_norm"] for r in rows[10:]]  # the same weights
    expected = "model split index label predicted loss gradient_norm hessian_norm curvature eigenvalue residual"
    assert list(rows[0]) == [*expected.split(), "products", "converged"]

    # a row says what the function says
    import my_models

    from data.datasets import load_dataset

    model = my_models.WideResNet(num_classes=2)
    model.load_state_dict(torch.load(folder / "plain.pt"))
    split = load_dataset("imagefolder", photographs, 16).test
    row = rows[5]
    image = split.images[int(row["index"])][None].float() / 255
    label = split.labels[int(row["index"])][None]
    found = estimate(model, image, label, num_iterations=60, tol=1e-6, generator=torch.Generator().manual_seed(0))
    assert int(row["label"]) == label.item()
    assert int(row["predicted"]) == model(image).argmax().item() == found.predicted.item()
    assert float(row["gradient_norm"]) == pytest.approx(found.gradient_norm.item(), rel=1e-4)
    assert float(row["curvature"]) == pytest.approx(found.curvature.item(), rel=1e-3)
    assert row["converged"] == "True"


def test_a_model_that_comes_with_its_weights_and_no_file(folder, photographs):
    result = in_folder(folder, "--model-arch", "my_models:ready", *data_flags(photographs), "--split", "test")
    assert "my_models:ready: its weights as the callable made them, on imagefolder" in result.stdout
    assert "train," not in result.stdout


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        (["--model-arch", "my_models:noisy"], 1, ["random in eval", "Noisy"]),
        (["--model-arch", "my_models:absent"], 2, ["my_models:absent"]),
        (["--model-arch", "no_such_file:f"], 2, ["no_such_file"]),
        (["--model-arch", "torchvision.models:resnet18", "--model-filename", "plain.pt"], 1, ["do not fit"]),
        (["--model-arch", "my_models:ready", "--image-size", "0"], 2, ["--image-size"]),
    ],
)
def test_outside_models_are_refused_in_one_line(folder, photographs, flags, code, words, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    result = run_main(estimate_curvature, [*data_flags(photographs), *flags], capsys)
    assert_one_line_error(result, code, *words)
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        (["--model-arch", "my_models:ready"], 2, ["--dataset"]),
        (["--model-arch", "resnet99"], 2, ["resnet99", "package.module:callable"]),
        (["--model-filename", "x.pt", "--num-samples", "3", "--data-fraction", "0.5"], 2, ["--data-fraction"]),
        (["--model-filename", "x.pt", "--method", "magic"], 2, ["magic", "lanczos"]),
        (["--model-filename", "x.pt", "--method", "power", "--top-k", "2"], 2, ["--top-k", "lanczos"]),
        (["--model-filename", "x.pt", "--top-k", "20"], 2, ["--top-k 20", "--num-power-iter"]),
        (["--model-filename", "x.pt", "--output", "x.txt"], 2, [".csv", ".json"]),
        (["--model-filename", "x.pt", "--plot", "x.pdf"], 2, [".png"]),
        (["--model-filename", "x.pt", "--layers", "x.jpg"], 2, [".png"]),
        (["--model-filename", "x.pt", "--output", "x.csv", "--compare", "x.csv"], 2, ["x.csv", "twice"][1:]),
        (["--model-filename", "x.pt", "--plot", "x.png", "--layers", "x.png"], 2, ["twice"]),
        (["--compare", "x.csv", "--output", "y.csv"], 2, ["--output", "--model-filename"]),
        (["--model-filename", "x.pt", "--trace-probes", "-1"], 2, ["--trace-probes"]),
        (["--model-filename", "x.pt", "--tol", "-1"], 2, ["--tol"]),
        (["--compare", "absent.csv"], 1, ["absent.csv", "--output"]),
        (["--compare", "README.md"], 1, ["README.md", "not a result file"]),
    ],
)
def test_errors(flags, code, words, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert_one_line_error(run_main(estimate_curvature, flags, capsys), code, *words)


def test_earlier_results_are_compared_in_one_table_and_picture(folder, photographs, tmp_path, capsys):
    flags = ["--model-arch", "my_models:ready", *data_flags(photographs), "--num-samples", 4, "--top-k", 2]
    flags += ["--trace-probes", 3, "--num-power-iter", 20]
    for name in ("a.csv", "a.json"):
        assert run_main(estimate_curvature, [*flags, "--output", tmp_path / name], capsys).returncode == 0
    from_csv, from_json = read_measurements(tmp_path / "a.csv"), read_measurements(tmp_path / "a.json")
    assert [m.split for m in from_csv] == [m.split for m in from_json] == ["train", "test"]
    for one, other in zip(from_csv, from_json, strict=True):
        assert list(one.columns) == list(other.columns)
        assert list(one.columns)[-3:] == ["eigenvalue_2", "trace", "trace_error"]
        for name, column in one.columns.items():
            np.testing.assert_array_equal(column, other.columns[name])
    content = json.loads((tmp_path / "a.json").read_text())
    assert content["settings"]["num_samples"] == 4
    assert content["measurements"][1]["summary"]["curvature"].keys() == {"mean", "sd", "median", "q05", "q95"}
    compared = ["--compare", tmp_path / "a.csv", tmp_path / "a.json", "--plot", tmp_path / "both.png"]
    result = run_main(estimate_curvature, compared, capsys)
    assert result.returncode == 0
    lines = result.stdout.splitlines()
    assert [line.split("  ")[0] for line in lines[1:5]] == [
        f"my_models:ready ({name})" for name in ("a.csv", "a.json") for _ in "tt"
    ]
    assert len(lines) == 6  # a header, two splits twice, the picture
    assert (tmp_path / "both.png").read_bytes().startswith(b"\x89PNG")


def columns(**changes) -> dict[str, np.ndarray]:
    n = 6
    plain = {name: np.arange(1.0, n + 1) for name in ("gradient_norm", "hessian_norm", "curvature", "eigenvalue")}
    plain |= {"index": np.arange(10, 10 + n), "label": np.zeros(n, dtype=np.int64), "residual": np.full(n, 1e-4)}
    plain |= {"products": np.full(n, 7), "converged": np.ones(n, dtype=bool)}
    plain |= {"predicted": np.array([0, 0, 0, 1, 1, 1]), "loss": np.ones(n)}
    return plain | changes


def test_examples_without_a_meaningful_curvature_are_counted_and_left_out(tmp_path):
    gradient = np.array([1.0, 0.0, 3.0, np.nan, 5.0, 6.0])
    hessian = np.array([1.0, 0.0, 3.0, np.nan, 0.0, 6.0])
    m = Measurement(
        "m", "test", columns(gradient_norm=gradient, hessian_norm=hessian, curvature=hessian / (gradient + 1e-6))
    )
    summary = summarize(m)
    assert summary["left_out"] == {"not finite": 1, "zero gradient": 1, "zero Hessian": 1}
    assert (summary["examples"], summary["averaged"]) == (6, 3)
    assert summary["hessian_norm"]["mean"] == pytest.approx(10 / 3)
    text = format_measurement(m)
    assert "1 with not finite (index 13)" in text
    assert "1 with zero gradient (index 11)" in text
    assert "1 with zero Hessian (index 14)" in text
    write_measurements(tmp_path / "m.json", [m], {})  # NaN is no JSON
    json.loads((tmp_path / "m.json").read_text(), parse_constant=lambda constant: pytest.fail(constant))
    assert math.isnan(read_measurements(tmp_path / "m.json")[0].columns["hessian_norm"][3])


def test_the_summary_is_numpys():
    values = np.random.default_rng(0).lognormal(size=600)
    n = len(values)
    m = Measurement("m", "test", {name: np.resize(column, n) for name, column in columns(curvature=values).items()})
    found = summarize(m)["curvature"]
    assert found["mean"] == pytest.approx(values.mean())
    assert found["sd"] == pytest.approx(values.std())
    assert [found[q] for q in ("q05", "median", "q95")] == pytest.approx(np.percentile(values, [5, 50, 95]))
    assert summarize(m)["accuracy"] == 50
    assert "accuracy 50.00 %" in format_measurement(m)
    assert "lower bounds" not in format_measurement(m)
    unconverged = Measurement("m", "test", columns(converged=np.array([True] * 5 + [False])))
    assert "5 of 6 converged" in format_measurement(unconverged)
    assert "--num-power-iter" in format_measurement(unconverged)


def test_saturated_examples_are_reported(folder, photographs, capsys):
    """Margins of 500: the loss and its gradient underflow to 0 in float32."""
    result = run_main(
        estimate_curvature, ["--model-arch", "my_models:flat", *data_flags(photographs), "--split", "test"], capsys
    )
    assert result.returncode == 0, result.stderr
    assert "with zero gradient" in result.stdout


def test_two_processes_find_what_one_does(folder, photographs, tmp_path, monkeypatch, capsys):
    flags = ["--model-arch", "my_models:ready", *data_flags(photographs), "--num-samples", 6, "--batch-size", 2]
    monkeypatch.chdir(folder)
    one = run_main(estimate_curvature, [*flags, "--output", tmp_path / "one.csv"], capsys)
    first, second = finish(launch(2, ROOT / "estimate_curvature.py", *flags, "--output", tmp_path / "two.csv"))
    assert first.replace("two.csv", "one.csv") == one.stdout
    assert second == ""  # printed once, by the first process
    assert rows_of(tmp_path / "one.csv") == rows_of(tmp_path / "two.csv")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("head.csv", "model,split,index\n"),
        ("part.csv", "model,split,index,label,gradient_norm,hessian_norm,curvature\nm,test,1,1,1,1,1\n"),
        ("wide.csv", 'model,split\n"' + "x" * 200_000),
        ("deep.json", "[" * 100_000),
        ("list.json", "[1, 2]"),
        ("text.json", "curvature"),
    ],
)
def test_files_that_are_no_results_are_refused(name, text, tmp_path, capsys):
    (tmp_path / name).write_text(text)
    result = run_main(estimate_curvature, ["--compare", tmp_path / name], capsys)
    assert_one_line_error(result, 1, name, "not a result file")


def test_what_cannot_be_done_is_said_before_anything_is_measured(folder, photographs, tmp_path, capsys):
    flags = ["--model-arch", "my_models:ready", *data_flags(photographs)]
    (tmp_path / "file").write_text("")
    for more, code, words in (
        (["--output", tmp_path / "file" / "x.csv"], 1, ["x.csv", "cannot be written"]),
        (["--top-k", 5000, "--num-power-iter", 5000], 2, ["--top-k 5000", "768"]),
    ):
        result = run_main(estimate_curvature, [*flags, *more], capsys)
        assert_one_line_error(result, code, *words)
        assert result.stdout == ""


def test_a_users_packages_may_be_called_as_ours_are(photographs, tmp_path, monkeypatch, capsys):
    """models/ and utils.py are common names; what the user's file imports must be the user's, and ours stay ours."""
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "small.py").write_text("from torch import nn\nfrom utils import WIDTH\n" + SMALL)
    (tmp_path / "utils.py").write_text("WIDTH = 3\n")
    (tmp_path / "theirs.py").write_text("def net():\n    from models.small import small\n    return small()\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(ROOT), *sys.path])
    for arch in ("models.small:small", "theirs:net"):
        few = ["--num-samples", 1, "--num-power-iter", 1, "--split", "test"]
        result = run_main(estimate_curvature, ["--model-arch", arch, *data_flags(photographs), *few], capsys)
        assert result.returncode == 0, result.stderr
    import models.layers
    import utils.cli

    assert models.layers.__file__.startswith(str(ROOT))
    assert utils.cli.__file__.startswith(str(ROOT))


def test_sixteen_bit_weights_are_measured_in_float32(folder, photographs, tmp_path, capsys):
    state = {k: v.bfloat16() if v.is_floating_point() else v for k, v in torch.load(folder / "plain.pt").items()}
    torch.save(state, tmp_path / "half.pt")
    flags = ["--model-arch", "my_models:WideResNet", "--model-filename", tmp_path / "half.pt", "--num-samples", 2]
    result = run_main(estimate_curvature, [*flags, *data_flags(photographs)], capsys)
    assert result.returncode == 0, result.stderr
    assert "measured in float32" in result.stdout


def test_samples_beyond_the_split_are_the_split(folder, photographs, capsys):
    flags = ["--model-arch", "my_models:ready", *data_flags(photographs), "--num-samples", 1000, "--num-power-iter", 1]
    result = run_main(estimate_curvature, [*flags, "--method", "power"], capsys)
    assert "train, 24 examples" in result.stdout
    assert "test, 12 examples" in result.stdout


@pytest.mark.skipif(not SHARED.exists(), reason="needs CIFAR-10's images")
def test_torchvisions_resnet18_on_cifar10(tmp_path):
    import torchvision

    unpack = [sys.executable, SHARED / "data" / "unpack_cifar10.py", tmp_path / "data", "--train", "1", "--test", "1"]
    subprocess.run(list(map(str, unpack)), check=True, capture_output=True)
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=10)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    flags = ["--model-arch", "torchvision.models:resnet18", "--model-filename", tmp_path / "weights.pt"]
    flags += ["--dataset", "imagefolder", "--data-dir", tmp_path / "data", "--split", "test"]
    result = run_script("estimate_curvature.py", *flags, "--num-samples", 4, "--output", tmp_path / "r.json")
    assert "torchvision.models:resnet18 on imagefolder" in result.stdout
    (m,) = read_measurements(tmp_path / "r.json")
    assert np.isfinite(m.columns["curvature"]).all()
    assert (m.columns["hessian_norm"] > 0).all()


def test_a_model_is_measured_in_its_own_precision(folder, photographs, tmp_path, capsys):
    """float64 weights are measured in float64: 30 products take the residual below float32's rounding."""
    state = {k: v.double() if v.is_floating_point() else v for k, v in torch.load(folder / "plain.pt").items()}
    torch.save(state, tmp_path / "double.pt")
    flags = ["--model-arch", "my_models:WideResNet", "--model-filename", tmp_path / "double.pt", "--split", "test"]
    flags += [*data_flags(photographs), "--num-power-iter", 30, "--tol", 1e-10, "--output", tmp_path / "d.csv"]
    assert run_main(estimate_curvature, flags, capsys).returncode == 0
    assert max(float(row["residual"]) for row in rows_of(tmp_path / "d.csv")) <= 1e-10
