"""The comparison of methods: killed, resumed and read back; and the two moons."""

import contextlib
import io
import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from conftest import ROOT, THIN, assert_one_line_error, run_main

import estimate_curvature
import train_models
from experiments import compare_methods, two_moons
from experiments.tables import write_tables

METHODS = {"standard": "Standard", "gradreg": "GradReg"}


def tiny_comparison(photographs, output, *flags) -> list[str]:
    """Two methods on 24 photographs of 16 x 16, 3 steps an epoch, 4 examples of each split, the weakest attack."""
    tiny = "--model-arch vgg11 --dataset imagefolder --image-size 16 --batch-size 10 --lr 0.01 --num-epochs 3"
    tiny += " --num-samples 4 --num-power-iter 8 --pgd-steps 1 --restarts 1 --methods"
    return [*tiny.split(), *METHODS, "--data-dir", str(photographs), "--output-dir", str(output), *flags]


def contents(folder: Path) -> dict:
    """Every file's bytes and time of change."""
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


# what python -m experiments.compare_methods does, with a narrow network
SCRIPT = f"""
import runpy, models.vgg
models.vgg.VGG11 = {THIN[1]}
runpy.run_module("experiments.compare_methods", run_name="__main__")
"""


@pytest.fixture(scope="module")
def comparison(photographs, tmp_path_factory) -> Path:
    """The folder of a comparison that was killed in its second training run, and finished by the same command."""
    folder = tmp_path_factory.mktemp("comparison")
    flags = tiny_comparison(photographs, folder)
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, *flags], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    for start in ("[2/2] gradreg seed 1729", "epoch 2/3"):
        next(line for line in process.stdout if line.startswith(start))
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert list((folder / "gradreg" / "seed1729").glob("*.unfinished.pt"))
    assert list(pd.read_csv(folder / "table.csv")["method"]) == ["Standard"] * 2  # as far as it is known
    finished = contents(folder / "standard")
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
        patch.setattr(*THIN)
        patch.setattr(two_moons, "STEPS", 1)
        assert compare_methods.main(flags) == 0
    assert contents(folder / "standard") == finished
    assert "resuming" in printed.getvalue()
    assert "epoch 1/3" not in printed.getvalue()
    return folder


@pytest.mark.long
def test_what_a_finished_comparison_leaves(comparison):
    rows = pd.read_csv(comparison / "table.csv")
    assert list(rows["method"] + rows["split"]) == ["Standardtest", "Standardtrain", "GradRegtest", "GradRegtrain"]
    text, robustness = ((comparison / f"{name}.md").read_text() for name in ("table", "robustness"))
    assert text.count("| Standard |") == text.count("| GradReg |") == 2
    assert "vgg11 on imagefolder (16 x 16), 3 epochs, 1 seed a method, torch " in text
    assert " ± " not in text.split("\n", 1)[1]
    titles = "under PGD, l2:", "under PGD, linf:", "the loss's gradient", "the true-class logit's gradient"
    assert all(title in robustness for title in titles)
    pictures = [comparison / f"{name}.png" for name in ("curvature", "robustness", "two_moons")]
    assert all(picture.read_bytes().startswith(b"\x89PNG") for picture in pictures)
    # but for what the kill may have caught half-written, under a name that begins with a dot
    assert not [path for path in comparison.rglob("*unfinished*") if not path.name.startswith(".")]


@pytest.mark.long
def test_the_tables_numbers_are_those_of_the_runs_files(comparison, tmp_path):
    """Against means over each run's files; a second seed is made of the first's, with three times its curvatures."""
    folder = shutil.copytree(comparison, tmp_path / "comparison")
    for method in METHODS:
        second = shutil.copytree(folder / method / "seed1729", folder / method / "seed1730")
        examples = pd.read_csv(second / "curvature.csv")
        examples.assign(curvature=3 * examples["curvature"]).to_csv(second / "curvature.csv", index=False)
        (path,) = second.glob("*_metrics.csv")
        epochs = pd.read_csv(path)
        epochs.assign(seconds=3 * epochs["seconds"]).to_csv(path, index=False)  # of all methods: costs are relative
    settings = json.loads((folder / "settings.json").read_text())["settings"]
    write_tables(folder, compare_methods.finished_runs(folder), settings)

    rows = pd.read_csv(folder / "table.csv").set_index(["method", "split"])
    found = pd.read_csv(folder / "robustness.csv", dtype={"size": str}).set_index(["method", "kind", "size"])["mean"]
    metrics = {method: pd.read_csv(*folder.glob(f"{method}/seed1729/*_metrics.csv")) for method in METHODS}
    seconds = {method: table["seconds"].median() for method, table in metrics.items()}
    assert len(rows) == 4
    for method, title in METHODS.items():
        for split, examples in pd.read_csv(folder / method / "seed1729" / "curvature.csv").groupby("split"):
            expected = dict(examples[["gradient_norm", "hessian_norm"]].mean())
            mean = examples["curvature"].mean()
            expected |= {"curvature": 2 * mean, "curvature_sd": 2**0.5 * mean, "hessian_norm_sd": 0}
            expected |= {"test_accuracy": metrics[method]["test_accuracy"].to_numpy()[-1], "test_accuracy_sd": 0}
            expected |= {"cost": seconds[method] / seconds["standard"], "cost_sd": 0}
            expected |= {"seeds": 2, "examples": 8, "converged": 2 * examples["converged"].sum()}
            assert dict(rows.loc[title, split][list(expected)]) == pytest.approx(expected, rel=1e-12, abs=1e-12)
        examples = pd.read_csv(folder / method / "seed1729" / "robustness.csv")
        assert found[title, "pgd_l2", "0"] == 100 * (examples["predicted"] == examples["label"]).mean()
        assert found[title, "pgd_l2", "0.1"] == 100 * examples["pgd_l2_0.1"].mean()
        assert found[title, "loss", "0.1"] == pytest.approx(examples["stability_loss_0.1"].mean(), rel=1e-6)
    text, row = (folder / "table.md").read_text(), rows.loc["Standard", "test"]
    assert f"| {row['curvature']:.4g} ± {row['curvature_sd']:.2g} |" in text
    assert "2 seeds a method" in text


REFUSED = {
    ("--lr", "0.02"): ["--lr 0.01, not 0.02", "train_models.py, standard"],
    ("--pgd-steps", "2"): ["--pgd-steps 1, not 2", "evaluate_robustness.py"],
    ("--regularizer", "cure"): ["--regularizer", "--methods"],
    ("--overwrite",): ["--overwrite", "--methods"],
    ("--num-epoch", "2"): ["--num-epoch", "train_models.py --help"],
}


@pytest.mark.long
def test_other_settings_and_data_are_refused(comparison, photographs, tmp_path, capsys, monkeypatch):
    before = contents(comparison)
    for flags, words in REFUSED.items():
        result = run_main(compare_methods, tiny_comparison(photographs, comparison, *flags), capsys)
        assert_one_line_error(result, 2, *words)
    moved, other = (shutil.copytree(photographs, tmp_path / name) for name in ("moved", "other"))
    shutil.copy(other / "train" / "china" / "0.png", other / "train" / "flower" / "0.png")
    result = run_main(compare_methods, tiny_comparison(other, comparison), capsys)
    assert_one_line_error(result, 2, "other data", "--output-dir")
    assert contents(comparison) == before
    # data that have moved are the same data
    monkeypatch.setattr(two_moons, "STEPS", 1)
    assert run_main(compare_methods, tiny_comparison(moved, comparison), capsys).stdout.count("is finished") == 2
    after = contents(comparison)
    assert all(after[path] == before[path] for path in before if path.parent != comparison)


def test_a_comparison_that_stops_says_why_or_how_to_go_on(photographs, tmp_path, monkeypatch, capsys):
    flags = tiny_comparison(photographs, tmp_path, "--batch-size", "1", "--num-seeds", "2")
    result = run_main(compare_methods, flags, capsys)
    assert_one_line_error(result, 1, "--batch-size")
    assert "[1/4] standard seed 1729" in result.stdout
    assert not compare_methods.finished_runs(tmp_path)

    monkeypatch.setattr(train_models, "evaluate", lambda *_: signal.raise_signal(signal.SIGINT))
    flags = tiny_comparison(photographs, tmp_path / "a folder", "--num-threads", "1")
    result = run_main(compare_methods, flags, capsys)
    assert (result.returncode, result.stderr) == (130, "compare_methods: interrupted\n")
    (line,) = (line for line in result.stdout.splitlines() if line.startswith("to "))
    assert shlex.split(line) == ["to", "go", "on:", sys.executable, "-m", "experiments.compare_methods", *flags]

    monkeypatch.setattr(train_models, "train", lambda flags: sys.exit(flags.prng_seed))
    with pytest.raises(SystemExit, match=r"^3$"):
        compare_methods.carry_out("standard", 3, compare_methods.build_parser().parse_args(flags))


def test_the_rows_of_table_1_and_quick():
    """Architecture and loss of every row; --quick's settings, which flags given beside it override."""

    def rows(*arguments: str) -> dict:
        flags = compare_methods.build_parser().parse_args(arguments)
        return {method: compare_methods.training_flags(flags, method) for method in compare_methods.METHODS}

    plain = rows("--model-arch", "resnet34")
    assert {m: (f.model_arch, f.regularizer, f.adversarial_training) for m, f in plain.items()} == {
        "standard": ("resnet34", "none", False),
        "lcnn": ("resnet34lcnn", "curvature", False),
        "gradreg": ("resnet34", "gnorm", False),
        "lcnn_gradreg": ("resnet34lcnn", "curvature_and_gnorm", False),
        "cure": ("resnet34", "cure", False),
        "softplus_wd": ("resnet34lowbeta", "none", False),
        "adversarial": ("resnet34", "none", True),
    }
    assert {(f.dataset, f.num_epochs, f.batch_size, f.lr) for f in plain.values()} == {("cifar100", 200, 128, 0.1)}
    assert {(f.reg_gnorm, f.reg_beta, f.reg_gamma) for f in plain.values()} == {(1e-3, 1e-3, 1e-3)}
    assert {(f.dataset, f.reg_gnorm, f.reg_warmup) for f in rows("--quick").values()} == {("digits", 3e-2, 2.0)}
    overridden = rows("--reg-gnorm", "0.5", "--quick", "--num-epochs", "1", "--no-calibrate-batchnorm")
    assert {(f.reg_gnorm, f.num_epochs, f.calibrate_batchnorm) for f in overridden.values()} == {(0.5, 1, False)}
    flags = compare_methods.build_parser().parse_args(["--num-samples", "7", "--quick"])
    measuring = compare_methods.measuring_flags(estimate_curvature, flags)
    assert (measuring.num_samples, measuring.split) == (7, "test")


@pytest.mark.long
def test_two_moons_are_told_apart_as_well_with_less_curvature(tmp_path, capsys):
    result = run_main(two_moons, ["--output", tmp_path / "moons.png"], capsys)
    assert (tmp_path / "moons.png").read_bytes().startswith(b"\x89PNG")
    found = re.findall(r"two moons, .*: test accuracy (.*) %, mean C (.*)", result.stdout)
    (accuracy, curvature), (low_accuracy, low_curvature) = (map(float, numbers) for numbers in found)
    assert low_curvature < curvature / 2  # 5.7 against 18.4
    assert low_accuracy > max(90, accuracy - 3)  # 95.3 against 95.6
