"""Evaluate how robust trained models are: the stability of their input gradients, and their accuracy under attack.

    python -m experiments.evaluate_robustness --model-filename saved_models/quick_start/*.pt

Several files are examined on the same examples.
"""

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pandas as pd
import torch

from curvature.estimate import prepared
from curvature.results import named, write_json, write_rows
from curvature.subjects import add_subject_flags, check_subject_flags, for_examples, load_subjects
from experiments.robustness import examine, format_summary, import_auto_attack, plot_robustness, summarize
from training.attacks import NORMS
from utils import cli, distributed
from utils.files import check_suffix, make_room


def build_parser() -> argparse.ArgumentParser:
    parser = cli.Parser(prog="evaluate_robustness", description=__doc__.splitlines()[0])
    add_subject_flags(parser.add_argument_group("what to examine"), default_split="test")

    flag = parser.add_argument_group("attacks, on images in [0, 1]").add_argument
    distances, radii = {"type": cli.pixel_distance, "metavar": "EPS", "nargs": "+"}, [1 / 255, 2 / 255, 4 / 255]
    flag("--norms", nargs="+", choices=NORMS, default=list(NORMS), help="of the perturbations")
    flag("--eps-l2", **distances, default=[0.05, 0.1, 0.15, 0.2], help="l2 radii")
    flag("--eps-linf", **distances, default=radii, help="l-infinity radii; may be fractions as 8/255")
    flag("--pgd-steps", type=cli.positive_int, default=20, help="gradient steps of PGD")
    flag("--pgd-step-size", type=cli.pixel_distance, help="length of a step (default: 2.5 eps / steps)")
    flag("--restarts", type=cli.positive_int, default=3, help="random starts of PGD")
    harder = "try AutoAttack on what PGD leaves; far slower, and its random starts depend on the batch (default: off)"
    flag("--autoattack", action=argparse.BooleanOptionalAction, default=False, help=harder)

    flag = parser.add_argument_group("gradient stability").add_argument
    changes = distances | {"metavar": "DELTA", "nargs": "*", "default": [0.05, 0.1, 0.15, 0.2]}
    flag("--deltas", **changes, help="l2 norms of the random changes; none given: not measured")
    flag("--draws", type=cli.positive_int, default=5, help="random changes of each norm an example")

    flag = parser.add_argument_group("output").add_argument
    flag("--output", type=Path, metavar="FILE.csv", help="write one row per example, and a summary to FILE.json")
    flag("--plot", type=Path, metavar="FILE.png", help="draw accuracy and stability by distance")
    parser.add_argument("--batch-size", type=cli.positive_int, default=64, help="examples at once; memory, not results")
    cli.add_shared_flags(parser)
    return parser


def evaluate(flags: argparse.Namespace) -> None:
    """Examine, print, write and draw."""
    check_subject_flags(flags)
    for path, suffix in ((flags.output, ".csv"), (flags.plot, ".png")):
        if path:
            check_suffix(path, suffix)
    if flags.autoattack:
        import_auto_attack()
    subjects = load_subjects(flags)
    report = flags.output and flags.output.with_suffix(".json")
    files = [path for path in (flags.output, report, flags.plot) if path]
    for path in files:
        make_room(path)

    settings = {**vars(flags), "torch": torch.__version__}
    first = distributed.rank() == 0
    tables, summaries = [], []
    for subject in subjects:
        print(f"{subject.name}: {subject.arch} on {subject.dataset}", flush=True)
        with prepared(subject.model) as network:
            for results in for_examples(subject, flags, partial(examine, network, flags)):
                tables.append(results)
                summaries.append(summarize(results))
                print(format_summary(summaries[-1]), flush=True)
                if flags.output and first:  # after each split, whatever happens later
                    write_rows(flags.output, pd.concat(tables))
                    write_json(report, {"settings": settings, "models": summaries})

    if not flags.autoattack:
        print("PGD alone can overstate robustness; --autoattack tries harder")
    if flags.plot and first:
        together = named(pd.concat(tables))
        plot_robustness(flags.plot, [(f"{name}, {rows['split'].iloc[0]}", rows) for name, rows in together])
    for path in files:
        print(f"saved {path}")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return cli.run(build_parser(), distributed.process_group()(evaluate), argv, shares_work=True)


if __name__ == "__main__":
    sys.exit(main())
