"""Train and measure the seven methods of the paper's Table 1, and write its tables and figures.

    python -m experiments.compare_methods --quick
    python -m experiments.compare_methods --dataset cifar100 --download --num-epochs 200 --num-seeds 3

Each run has a folder, <output-dir>/<method>/seed<k>/. After an interruption the same command goes on.
"""

import argparse
import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch

import estimate_curvature
import train_models
from curvature.results import write_json
from data.datasets import load_dataset
from experiments import evaluate_robustness, two_moons
from experiments.robustness import import_auto_attack
from experiments.tables import Run, draw_figures, write_tables
from training.run_files import MACHINE_FLAGS
from utils import cli
from utils.errors import UsageError, UserError


class Method(NamedTuple):
    """A row of Table 1."""

    title: str
    arch_suffix: str  # of the name in models/model_selector.py
    training: dict  # values of train_models.py's flags


# What made the paper's Table 1, see docs/fidelity.md; train_models.py has the reference's last defaults, 1e-2.
TABLE_1 = {"reg_beta": 1e-3, "reg_gamma": 1e-3}

METHODS = {
    "standard": Method("Standard", "", {}),
    "lcnn": Method("LCNN", "lcnn", {"regularizer": "curvature"}),
    "gradreg": Method("GradReg", "", {"regularizer": "gnorm"}),
    "lcnn_gradreg": Method("LCNN + GradReg", "lcnn", {"regularizer": "curvature_and_gnorm"}),
    "cure": Method("CURE", "", {"regularizer": "cure"}),
    "softplus_wd": Method("Softplus + weight decay", "lowbeta", {}),
    "adversarial": Method("Adversarial training", "", {"adversarial_training": True}),
}

# defaults with --quick: BatchNorm must follow the few steps, a network learns something before penalties weigh on it,
# and on these images larger distances tell more
QUICK_TRAINING = {"dataset": "digits", "num_epochs": 5, "batch_size": 32, "lr": 0.05}
QUICK_TRAINING |= {"bn_momentum": 0.5, "calibrate_batchnorm": True, "reg_gnorm": 3e-2, "reg_warmup": 2.0}
QUICK_MEASURING = {"num_samples": 64, "split": "test", "pgd_steps": 10, "restarts": 1, "draws": 2}
QUICK_MEASURING |= {"eps_l2": [0.2, 0.5, 1.0], "eps_linf": [4 / 255, 16 / 255], "deltas": [0.1, 0.5]}

RESERVED = ("--regularizer", "--adversarial-training", "--no-adversarial-training", "--resume", "--overwrite")
# flags that do not change the numbers: a comparison may go on with others
NOT_SETTINGS = MACHINE_FLAGS | {"data_dir", "model_filename", "output", "plot", "layers", "compare"}


class Parser(cli.Parser):
    """Leaves what it does not know in ``flags.training``, for train_models.py, and everything in flags.arguments."""

    def parse_args(self, args=None, namespace=None):
        flags, training = self.parse_known_args(args, namespace)
        if flags.quick:
            self.set_defaults(**QUICK_MEASURING)
            flags, training = self.parse_known_args(args, namespace)
        return argparse.Namespace(**vars(flags), training=training, arguments=args)


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="compare_methods",
        description=__doc__.splitlines()[0],
        epilog="Every other flag is one of train_models.py's and goes to every training run; see its --help.",
    )
    flag = parser.add_argument_group("what to compare").add_argument
    flag("--quick", action="store_true", help="all methods on the digits, in half an hour at most")
    flag("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="rows of the table, all by default")
    flag("--model-arch", choices=("resnet18", "resnet34", "vgg11"), default="resnet18", help="the network")
    flag("--num-seeds", type=cli.positive_int, default=1, help="runs of each method; seeds from --seed on")
    flag = parser.add_argument_group("how to measure").add_argument
    flag("--split", choices=("test", "both"), default="both", help="which examples' curvature")
    flag("--num-samples", type=cli.positive_int, help="examples of each split (default: 0.1 of it)")
    flag("--num-power-iter", type=cli.positive_int, default=40, help="most Hessian-vector products")
    flag("--pgd-steps", type=cli.positive_int, default=20, help="gradient steps of the attack")
    flag("--restarts", type=cli.positive_int, default=3, help="its random starts")
    flag("--autoattack", action="store_true", help="attack with AutoAttack too; far slower")
    parser.add_argument("--output-dir", type=Path, default=Path("comparison"), help="where everything goes")
    cli.add_shared_flags(parser)
    return parser


def training_flags(flags: argparse.Namespace, method: str, **values) -> argparse.Namespace:
    """The flags of train_models.py: ``values``, the method's, those given, --quick's, Table 1's, or the defaults."""
    row = METHODS[method]
    parser = train_models.build_parser()
    parser.set_defaults(**TABLE_1)
    if flags.quick:
        parser.set_defaults(**QUICK_TRAINING)
    own = {"model_arch": flags.model_arch + row.arch_suffix, "prng_seed": flags.prng_seed, "device": flags.device}
    return argparse.Namespace(**vars(parser.parse_args(flags.training)) | own | row.training | values)


def measuring_flags(script: ModuleType, flags: argparse.Namespace, **values) -> argparse.Namespace:
    """The flags of a script: ``values``, the comparison's of the same name, or the defaults."""
    defaults = vars(script.build_parser().parse_args([]))
    shared = {name: value for name, value in vars(flags).items() if name in defaults and name != "model_arch"}
    return argparse.Namespace(**defaults | shared | values)


def comparison_settings(flags: argparse.Namespace) -> dict:
    """Everything that makes the numbers: the flags of every script, and which data. Methods and seeds may be added."""
    scripts = {f"train_models.py, {method}": training_flags(flags, method) for method in METHODS}
    scripts["estimate_curvature.py"] = measuring_flags(estimate_curvature, flags)
    scripts["evaluate_robustness.py"] = measuring_flags(evaluate_robustness, flags, split="test")
    settings = {
        script: {name: value for name, value in vars(own).items() if name not in NOT_SETTINGS}
        for script, own in scripts.items()
    }
    standard = scripts["train_models.py, standard"]
    data = load_dataset(standard.dataset, standard.data_dir, standard.image_size, standard.download)
    settings["data"] = {"fingerprint": data.fingerprint(), "image_size": data.test.images.shape[-1]}
    return json.loads(json.dumps(settings, default=str))  # as read back


def check_same_settings(path: Path, settings: dict) -> None:
    """Raise UsageError unless the comparison recorded at ``path`` has these settings."""
    try:
        recorded = dict(json.loads(path.read_text())["settings"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read as a comparison's settings; name another --output-dir") from error
    for script, flags in settings.items():
        for name, value in flags.items():
            if (theirs := recorded.get(script, {}).get(name)) != value:
                how = f"with --{name.replace('_', '-')} {theirs}, not {value} ({script})"
                problem = f"{path}: this comparison was started {'on other data' if script == 'data' else how}"
                raise UsageError(f"{problem}; give the same flags, or another --output-dir")


def carry_out(method: str, seed: int, flags: argparse.Namespace) -> None:
    """Train and measure, as far as it has not been done."""
    run = Run(METHODS[method].title, flags.output_dir / method / f"seed{seed}")
    if run.is_finished():
        print(f"{run.folder} is finished")
        return
    training = training_flags(flags, method, prng_seed=seed, output_dir=run.folder, resume=True)
    subject = {"model_filename": [str(train_models.train(training))], "data_dir": training.data_dir}
    if not run.curvature.exists():
        # it is written after each split, and gets its name when it is whole
        unfinished = run.curvature.with_name("curvature.unfinished.csv")
        estimate_curvature.estimate(measuring_flags(estimate_curvature, flags, output=unfinished, **subject))
        os.replace(unfinished, run.curvature)
    subject |= {"split": "test", "output": run.robustness.with_suffix(".csv")}
    evaluate_robustness.evaluate(measuring_flags(evaluate_robustness, flags, **subject))


def finished_runs(output_dir: Path) -> list[Run]:
    """The finished runs of this call and of earlier ones."""
    runs = [Run(m.title, path) for name, m in METHODS.items() for path in sorted(output_dir.glob(f"{name}/seed*"))]
    return [run for run in runs if run.is_finished()]


def compare(flags: argparse.Namespace) -> None:
    """Carry out every run, then write the tables and draw the figures."""
    for argument in flags.training:
        if (flag := argument.split("=")[0]) in RESERVED:
            raise UsageError(f"{flag} is up to the comparison; choose among its rows with --methods")
    if flags.autoattack:
        import_auto_attack()  # an error comes before hours of training
    for method in flags.methods:
        train_models.check_flags(training_flags(flags, method))  # before the settings are written down
    settings = comparison_settings(flags)
    recorded = flags.output_dir / "settings.json"
    if not recorded.exists():
        flags.output_dir.mkdir(parents=True, exist_ok=True)
        write_json(recorded, {"torch": torch.__version__, "settings": settings})
    check_same_settings(recorded, settings)

    seeds = range(flags.prng_seed, flags.prng_seed + flags.num_seeds)
    todo = [(method, seed) for seed in seeds for method in METHODS if method in flags.methods]
    try:
        for number, (method, seed) in enumerate(todo, start=1):
            print(f"[{number}/{len(todo)}] {method} seed {seed}", flush=True)
            carry_out(method, seed, flags)
            write_tables(flags.output_dir, finished_runs(flags.output_dir), settings)
        draw_figures(flags.output_dir, finished_runs(flags.output_dir))
        two_moons.draw(flags.output_dir / "two_moons.png", two_moons.NOISE, flags.prng_seed)
    except KeyboardInterrupt:
        print(f"\nto go on: {shlex.quote(sys.executable)} {cli.own_command(compare, flags.arguments)}")
        raise
    print(f"\n{(flags.output_dir / 'table.md').read_text()}\nsaved in {flags.output_dir}")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return cli.run(build_parser(), compare, argv)


if __name__ == "__main__":
    sys.exit(main())
