"""Train and measure the seven methods of the paper's Table 1, and write its tables and figures.

    python -m experiments.compare_methods --quick
    python -m experiments.compare_methods --dataset cifar100 --download --num-epochs 200 --num-seeds 3

Every run has a folder, <output-dir>/<method>/seed<k>/; beside them lie table.md, robustness.md, their CSVs and the
pictures. The same command goes on after an interruption, and repeats no finished run.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

import estimate_curvature
import train_models
from data.datasets import load_dataset
from experiments import evaluate_robustness, two_moons
from experiments.robustness import import_auto_attack
from experiments.tables import Run, draw_figures, write_tables
from training.run_files import MACHINE_FLAGS
from utils import cli
from utils.errors import UsageError, UserError
from utils.files import write_atomically


class Method(NamedTuple):
    """A row of Table 1."""

    title: str
    arch_suffix: str  # of the name in models/model_selector.py
    training: str  # flags of train_models.py


METHODS = {
    "standard": Method("Standard", "", ""),
    "lcnn": Method("LCNN", "lcnn", "--regularizer curvature"),
    "gradreg": Method("GradReg", "", "--regularizer gnorm"),
    "lcnn_gradreg": Method("LCNN + GradReg", "lcnn", "--regularizer curvature_and_gnorm"),
    "cure": Method("CURE", "", "--regularizer cure"),
    "softplus_wd": Method("Softplus + weight decay", "lowbeta", ""),
    "adversarial": Method("Adversarial training", "", "--adversarial-training"),
}

# What --quick stands for; flags given beside it come later, and win.
QUICK = {
    "comparison": "--num-samples 64 --split test --pgd-steps 10 --restarts 1",
    # so few steps need BatchNorm statistics that follow them, see README, "Short low-curvature runs"
    "training": "--dataset digits --num-epochs 5 --batch-size 32 --lr 0.05 --bn-momentum 0.5 --calibrate-batchnorm",
    # flags of evaluate_robustness.py: on these images larger distances tell more
    "robustness": "--eps-l2 0.2 0.5 1 --eps-linf 4/255 16/255 --deltas 0.1 0.5 --draws 2",
    # training flags of single methods: a low-curvature network bears a weight of the gradient norm at which a standard
    # one has not learnt much after so few epochs; CURE's factor is a hundredth of G's
    "gradreg": "--reg-gnorm 3e-4",
    "lcnn_gradreg": "--reg-gnorm 1e-2",
    "cure": "--reg-gnorm 1e-2",
}

# flags of train_models.py that make the methods or are the driver's own affair
RESERVED = ("--regularizer", "--adversarial-training", "--no-adversarial-training", "--resume", "--overwrite")
# settings of a comparison are the flags of its scripts, except where it runs, and what it reads and writes there
NOT_SETTINGS = MACHINE_FLAGS | {"data_dir", "model_filename", "output", "plot", "layers", "compare"}


class Parser(cli.Parser):
    """Leaves the flags it does not know in ``flags.training``, for train_models.py; --quick's come before all."""

    def parse_args(self, args=None, namespace=None):
        arguments = list(sys.argv[1:] if args is None else args)
        flags, training = self.parse_known_args(arguments, namespace)
        if flags.quick:
            flags, _ = self.parse_known_args([*QUICK["comparison"].split(), *arguments])
        flags.training = training
        return flags


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="compare_methods",
        description=__doc__.splitlines()[0],
        epilog="Every other flag is one of train_models.py's and goes to every training run: --dataset, --data-dir, "
        "--download, --image-size, --num-epochs, --batch-size, --lr, --reg-gnorm, --reg-beta, --reg-gamma, "
        "--bn-momentum, --calibrate-batchnorm, ...; see its --help.",
    )
    what = parser.add_argument_group("what to compare")
    what.add_argument("--quick", action="store_true", help="all methods on the digits, in half an hour at most")
    what.add_argument(
        "--methods",
        nargs="+",
        choices=METHODS,
        metavar="METHOD",
        help=f"of {', '.join(METHODS)} (default: all)",
    )
    what.add_argument("--model-arch", choices=("resnet18", "resnet34", "vgg11"), default="resnet18", help="the network")
    what.add_argument(
        "--num-seeds", type=cli.positive_int, default=1, help="runs of each method, of consecutive seeds from --seed on"
    )
    how = parser.add_argument_group("how to measure")
    how.add_argument("--split", choices=("test", "both"), default="both", help="which examples' curvature")
    how.add_argument("--num-samples", type=cli.positive_int, help="examples of each split (default: 0.1 of it)")
    how.add_argument(
        "--num-power-iter",
        type=cli.positive_int,
        default=40,
        help="most Hessian-vector products; low-curvature networks need 20 to 40",
    )
    how.add_argument("--pgd-steps", type=cli.positive_int, default=20, help="gradient steps of the attack")
    how.add_argument("--restarts", type=cli.positive_int, default=3, help="its random starts")
    how.add_argument("--autoattack", action="store_true", help="attack with AutoAttack too; far slower")
    parser.add_argument("--output-dir", type=Path, default=Path("comparison"), help="where everything goes")
    cli.add_shared_flags(parser)
    return parser


def training_flags(flags: argparse.Namespace, method: str, *more: str) -> argparse.Namespace:
    """The flags of train_models.py for a method, as its own command line would have them."""
    arguments = ["--model-arch", flags.model_arch + METHODS[method].arch_suffix, *METHODS[method].training.split()]
    if flags.quick:
        arguments += [*QUICK["training"].split(), *QUICK.get(method, "").split()]
    arguments += ["--prng-seed", str(flags.prng_seed), "--device", str(flags.device), *flags.training]
    return train_models.build_parser().parse_args([*arguments, *more])


def measuring_arguments(flags: argparse.Namespace) -> list[str]:
    """What estimate_curvature.py and evaluate_robustness.py are both told: the same examples for every run."""
    arguments = ["--prng-seed", str(flags.prng_seed), "--device", str(flags.device)]
    return arguments + (["--num-samples", str(flags.num_samples)] if flags.num_samples else [])


def curvature_flags(flags: argparse.Namespace, *more: str) -> argparse.Namespace:
    """The flags of estimate_curvature.py."""
    arguments = ["--split", flags.split, "--num-power-iter", str(flags.num_power_iter), *measuring_arguments(flags)]
    return estimate_curvature.build_parser().parse_args([*arguments, *more])


def robustness_flags(flags: argparse.Namespace, *more: str) -> argparse.Namespace:
    """The flags of evaluate_robustness.py."""
    arguments = QUICK["robustness"].split() if flags.quick else []
    arguments += ["--pgd-steps", str(flags.pgd_steps), "--restarts", str(flags.restarts), *measuring_arguments(flags)]
    arguments += ["--autoattack"] if flags.autoattack else []
    return evaluate_robustness.build_parser().parse_args([*arguments, *more])


def comparison_settings(flags: argparse.Namespace) -> dict:
    """Everything that makes the numbers: the flags of every script, and which data.

    Which methods and how many seeds is left open: they may be added to a comparison later.
    """
    scripts = {f"train_models.py, {method}": training_flags(flags, method) for method in METHODS}
    scripts["estimate_curvature.py"] = curvature_flags(flags)
    scripts["evaluate_robustness.py"] = robustness_flags(flags)
    settings = {
        script: {name: value for name, value in vars(chosen).items() if name not in NOT_SETTINGS}
        for script, chosen in scripts.items()
    }
    chosen = scripts["train_models.py, standard"]
    data = load_dataset(chosen.dataset, chosen.data_dir, chosen.image_size, chosen.download)
    settings["data"] = {"fingerprint": data.fingerprint(), "image_size": data.test.images.shape[-1]}
    return json.loads(json.dumps(settings, default=str))  # as they will be read back


def check_same_settings(path: Path, settings: dict) -> None:
    """Raise UsageError unless the comparison recorded at ``path`` has these settings."""
    try:
        recorded = json.loads(path.read_text())["settings"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read as a comparison's settings; name another --output-dir") from error
    remedy = "give the same flags, or another --output-dir"
    for script, flags in settings.items():
        theirs = recorded.get(script, {})
        for name in sorted(theirs.keys() | flags.keys()):
            if theirs.get(name) == flags.get(name):
                continue
            if script == "data":
                raise UsageError(f"{path}: this comparison was started on other data; {remedy}")
            flag = "--" + name.replace("_", "-")
            raise UsageError(
                f"{path}: this comparison was started with {flag} {theirs.get(name)}, not {flags.get(name)} "
                f"({script}); {remedy}"
            )


def carry_out(run: Run, method: str, seed: int, flags: argparse.Namespace) -> None:
    """Train and measure, as far as it has not been done."""
    if run.is_finished():
        print(f"{run.folder} is finished")
        return
    training = training_flags(flags, method, "--prng-seed", str(seed), "--output-dir", str(run.folder), "--resume")
    where = ["--model-filename", str(train_models.train(training)), "--data-dir", training.data_dir]
    torch.set_deterministic_debug_mode("default")  # as the other scripts have it, where training has set it
    if not run.curvature.exists():
        # written after each split: it gets its name when it is whole
        unfinished = run.curvature.with_name("curvature.unfinished.csv")
        estimate_curvature.estimate(curvature_flags(flags, *where, "--output", str(unfinished)))
        os.replace(unfinished, run.curvature)
    if not run.robustness.exists():
        output = str(run.robustness.with_suffix(".csv"))
        evaluate_robustness.evaluate(robustness_flags(flags, *where, "--output", output))


def all_runs(output_dir: Path) -> dict[str, list[Run]]:
    """Title of a method -> its finished runs, those of earlier calls included."""
    folders = {method.title: sorted((output_dir / name).glob("seed*")) for name, method in METHODS.items()}
    runs = {title: [Run(folder) for folder in found if Run(folder).is_finished()] for title, found in folders.items()}
    return {title: found for title, found in runs.items() if found}


def compare(flags: argparse.Namespace) -> None:
    """Do what the flags say: every run, then the tables and figures of all there are."""
    for argument in flags.training:
        if (flag := argument.split("=")[0]) in RESERVED:
            raise UsageError(f"{flag} is up to the comparison; choose among its rows with --methods")
    if flags.autoattack:
        import_auto_attack()  # is it there? before hours of training
    for method in flags.methods or METHODS:
        train_models.check_flags(training_flags(flags, method))  # before the settings are written down
    settings = comparison_settings(flags)
    recorded = flags.output_dir / "settings.json"
    if recorded.exists():
        check_same_settings(recorded, settings)
    else:
        flags.output_dir.mkdir(parents=True, exist_ok=True)
        content = json.dumps({"torch": torch.__version__, "settings": settings}, indent=1)
        write_atomically(recorded, content.encode())

    seeds = range(flags.prng_seed, flags.prng_seed + flags.num_seeds)
    todo = [(method, seed) for seed in seeds for method in METHODS if method in (flags.methods or METHODS)]
    for number, (method, seed) in enumerate(todo, start=1):
        print(f"[{number}/{len(todo)}] {method} seed {seed}", flush=True)
        carry_out(Run(flags.output_dir / method / f"seed{seed}"), method, seed, flags)
        write_tables(flags.output_dir, all_runs(flags.output_dir), settings)
    draw_figures(flags.output_dir, all_runs(flags.output_dir))
    two_moons.draw(flags.output_dir / "two_moons.png", two_moons.NOISE, flags.prng_seed)
    print(f"\n{(flags.output_dir / 'table.md').read_text()}\nsaved in {flags.output_dir}")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return cli.run(build_parser(), compare, argv)


if __name__ == "__main__":
    sys.exit(main())
