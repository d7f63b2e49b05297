"""Both scripts as a user runs them, on real photographs: in processes of their own, or where there are many cases
through main(), which is all that such a process calls."""

import re
import shutil

import pandas as pd
import pytest
import torch
from conftest import ROOT, TwoBlocks, assert_one_line_error, run_main, run_script, write_cifar

import estimate_curvature
import regularized_loss
import train_models
from models.model_selector import model_architecture


def tiny_run(photographs, output, *flags) -> list[str]:
    """Flags of a run that takes a second or two: 24 photographs of 16 x 16, 3 steps an epoch."""
    data = ["--dataset", "imagefolder", "--data-dir", photographs, "--image-size", 16]
    return [str(flag) for flag in (*data, "--batch-size", 10, "--output-dir", output, "--lr", 0.01, *flags)]


LARGE = "vgg11", "vgg11lcnn", "resnet18lcnn"
TERMS = {  # of the losses that are here; a user may have added another
    "none": [],
    "gnorm": ["gradnorm"],
    "curvature": ["beta_term", "gamma_term"],
    "curvature_and_gnorm": ["beta_term", "gamma_term", "gradnorm"],
    "cure": ["cure"],
    "curvature_bound": ["log_bound"],
    "hessian": ["hessian"],
}


@pytest.mark.parametrize("arch", ["two_blocks_lcnn", *(pytest.param(arch, marks=pytest.mark.long) for arch in LARGE)])
def test_train_and_estimate_every_regularizer(arch, thin_vgg, photographs, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(model_architecture, "two_blocks_lcnn", TwoBlocks)

    def progress(steps, description, total, unit):  # as many as it is told
        return (step for step, _ in zip(steps, range(total), strict=True))

    monkeypatch.setattr(train_models, "progress", progress)
    trained = []
    for regularizer, terms in TERMS.items():
        flags = ["--model-arch", arch, "--regularizer", regularizer, "--num-epochs", 1]
        result = run_main(train_models, tiny_run(photographs, tmp_path, *flags), capsys)
        if "curvature" in regularizer and "lcnn" not in arch:
            names = "such as resnet18lcnn" if "bound" in regularizer else "resnet18lcnn, resnet34lcnn or vgg11lcnn"
            assert_one_line_error(result, 2, "--regularizer", names)
            continue
        assert result.returncode == 0, result.stderr
        assert result.stderr == ""
        name = f"{arch}_imagefolder" if regularizer == "none" else f"{arch}_{regularizer}_imagefolder"
        rows = pd.read_csv(tmp_path / f"{name}_metrics.csv")
        expected = {"epoch", "learning_rate", "train_loss", "raw_loss", "test_loss", "test_accuracy", "seconds", *terms}
        assert (len(rows), set(rows)) == (1, expected | {"images_per_second"})
        assert (rows["images_per_second"] * rows["seconds"]).tolist() == pytest.approx([24])
        assert re.search(r"test_accuracy \d+\.\d\d ", result.stdout)
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert not list(tmp_path.glob("*unfinished*"))
        trained.append(tmp_path / f"{name}.pt")
    flags = ["--data-fraction", 0.25, "--num-power-iter", 2]
    flags += ["--output", tmp_path / "new" / "all.csv", "--plot", tmp_path / "all.png"]
    result = run_main(estimate_curvature, ["--model-filename", *trained, *flags], capsys)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("train, 6 examples") == result.stdout.count("test, 3 examples") == len(trained)
    assert len(pd.read_csv(tmp_path / "new" / "all.csv")) == 9 * len(trained)
    assert (tmp_path / "all.png").read_bytes().startswith(b"\x89PNG")


def states_equal(a, b) -> bool:
    """Two checkpoints bit for bit, but for the times and places they ran at."""
    if isinstance(a, dict):
        keys = [key for key in a if key not in ("seconds", "images_per_second", "data_dir")]
        return a.keys() == b.keys() and all(states_equal(a[key], b[key]) for key in keys)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(states_equal, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


REFERENCE_TRAIN = ["--model-arch=resnet18lcnn", "--regularizer=curvature_and_gnorm", "--dataset=cifar100"]


@pytest.mark.parametrize(
    ("script", "flags", "code", "words"),
    [
        (train_models, ["--model-arch", "resnet99"], 2, ["--model-arch", "resnet99", "resnet18lcnn"]),
        (train_models, ["--batch-size", "many"], 2, ["--batch-size", "many"]),
        (train_models, ["--lr", "nan"], 2, ["--lr", "more than 0"]),
        (train_models, ["--lr", "inf"], 2, ["--lr", "more than 0"]),
        (train_models, ["--lr", "0"], 2, ["--lr", "more than 0"]),
        (train_models, ["--reg-beta", "-1"], 2, ["--reg-beta", "at least 0"]),
        (train_models, ["--image-size", "20"], 2, ["--image-size", "multiple of 16"]),
        (train_models, ["--device", "abacus"], 2, ["--device", "abacus", "cpu"]),
        (train_models, ["--num-epoch", "3"], 2, ["--num-epoch"]),
        (train_models, ["--num-epochs", str(2**63)], 2, ["--num-epochs: must be less than 2^63"]),
        (train_models, ["--adv-step-size", "1e300"], 2, ["--adv-step-size: must be more than 0 and at most 1e9"]),
        (train_models, ["--resume", "--overwrite"], 2, ["--overwrite"]),
        (train_models, REFERENCE_TRAIN, 1, ["cifar-100-python", "missing", "--download"]),
        (estimate_curvature, ["--data-fraction", "1.5"], 2, ["--data-fraction", "at most 1"]),
    ],
)
def test_errors_are_named_before_anything_is_loaded(script, flags, code, words, tmp_path, capsys):
    """There are no data: a wrong flag that was seen later would end with that."""
    places = ["--data-dir", str(tmp_path)] + (["--output-dir", str(tmp_path / "out")] if script is train_models else [])
    assert_one_line_error(run_main(script, [*places, *flags], capsys), code, *words)
    assert not list(tmp_path.iterdir())


def test_an_error_in_a_process_of_its_own_and_help(capsys):
    assert_one_line_error(run_script("train_models.py", "--num-epochs", 0, check=None), 2, "--num-epochs", "--help")
    for script in (train_models, estimate_curvature):
        assert re.search(r"--prng-seed .*\(default:\s+1729\)", run_main(script, ["--help"], capsys).stdout, re.DOTALL)


@pytest.mark.draws
def test_the_references_own_commands(tmp_path, monkeypatch, capsys):
    """Its two commands, shortened; torchvision's layout with a few images stands for the data set."""
    monkeypatch.setitem(model_architecture, "resnet18lcnn", TwoBlocks)
    write_cifar(tmp_path, monkeypatch, "CIFAR100")
    places = ["--data-dir", tmp_path, "--output-dir", tmp_path]
    result = run_main(train_models, [*REFERENCE_TRAIN, *places, "--num-epochs", 1], capsys)
    assert result.returncode == 0, result.stderr
    path = tmp_path / "resnet18lcnn_curvature_and_gnorm_cifar100.pt"
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    flags = ["--dataset=cifar100", "--num-power-iter=10", "--data-fraction=0.1", "--data-dir", tmp_path]
    flags = ["--model-arch=resnet18lcnn", f"--model-filename={path}", *flags]
    result = run_main(estimate_curvature, flags, capsys)
    assert result.returncode == 0, result.stderr
    assert "train, 1 examples" in result.stdout
    # every file is checked before any is measured
    result = run_main(estimate_curvature, ["--model-filename", path, tmp_path / "absent.pt"], capsys)
    assert_one_line_error(result, 1, "absent.pt")
    assert result.stdout == ""


def test_a_run_is_not_resumed_on_other_data(thin_vgg, photographs, tmp_path, capsys):
    other = shutil.copytree(photographs, tmp_path / "other")
    shutil.copy(other / "train" / "china" / "0.png", other / "train" / "flower" / "0.png")
    flags = ["--model-arch", "vgg11", "--num-epochs", 1, "--resume"]
    assert run_main(train_models, tiny_run(photographs, tmp_path, *flags), capsys).returncode == 0
    result = run_main(train_models, tiny_run(other, tmp_path, *flags), capsys)
    assert_one_line_error(result, 2, "other data", "--data-dir", str(photographs))
    moved = shutil.copytree(photographs, tmp_path / "moved")  # the same data elsewhere is the same data
    assert "is finished" in run_main(train_models, tiny_run(moved, tmp_path, *flags), capsys).stdout


def test_reference_flag_spellings():
    parser = train_models.build_parser()
    flags = parser.parse_args(["--prng_seed", "3", "--no-strong_determinism_wanted"])
    assert (flags.prng_seed, flags.strong_determinism_wanted) == (3, False)
    assert parser.parse_args(["--seed", "4", "--strong_determinism_wanted"]).prng_seed == 4
    expected = {"model_arch": "resnet18", "regularizer": "none", "dataset": "cifar100", "num_epochs": 200, "lr": 0.1}
    expected |= {"batch_size": 128, "weight_decay": 5e-4, "momentum": 0.9, "reg_gnorm": 1e-3, "reg_beta": 1e-2}
    expected |= {"reg_gamma": 1e-2, "prng_seed": 1729, "strong_determinism_wanted": True}
    assert vars(parser.parse_args([])).items() >= expected.items()
    estimate = vars(estimate_curvature.build_parser().parse_args(["--model-filename", "x", "--prng_seed", "1"]))
    assert [estimate[name] for name in ("data_fraction", "batch_size", "num_power_iter", "tol")] == [0.1, 64, 10, 1e-3]


def test_the_readmes_own_loss(thin_vgg, photographs, tmp_path, monkeypatch, capsys):
    """README, "Writing your own loss": its class, its two lines and its loop, where it says they go."""
    section = (ROOT / "README.md").read_text().split("## Writing your own loss")[1].split("\n## ")[0]
    loss_class, weight, registry_line, loop = re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
    names = dict(vars(regularized_loss))
    exec(loss_class, names)
    ((flag, default),) = eval(f"{{{weight}}}", names).items()
    ((name, make),) = eval(f"{{{registry_line}}}", names).items()
    monkeypatch.setitem(regularized_loss.WEIGHTS, flag, default)
    monkeypatch.setitem(regularized_loss.regularizers, name, make)
    flags = ["--model-arch", "vgg11", "--regularizer", name, "--num-epochs", 1, f"--{flag.replace('_', '-')}", 0.5]
    result = run_main(train_models, tiny_run(photographs, tmp_path, *flags), capsys)
    assert result.returncode == 0, result.stderr
    row = pd.read_csv(tmp_path / f"vgg11_{name}_imagefolder_metrics.csv").iloc[0]
    assert set(row.index) > set(re.findall(r'"(\w+)":', loss_class))
    # the weight has grown to a fifth of its value in the first of five epochs
    assert row["train_loss"] == pytest.approx(row["raw_loss"] + 0.5 / 5 * row["sparsity"], rel=1e-5)
    exec(loop, {})
    assert capsys.readouterr().out.startswith("tensor(")
