"""Estimate the curvature of trained models: input-gradient norm, Hessian norm and normalized curvature by example.

    python estimate_curvature.py --model-filename saved_models/resnet18lcnn_curvature_and_gnorm_cifar100.pt

Several files are measured on the same examples and compared side by side. docs/measuring.md has the rest.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import pandas as pd
import torch

from curvature.eigenvalues import methods
from curvature.estimate import estimate_curvature as estimate_curvature
from curvature.estimate import prepared
from curvature.pictures import plot_layers, plot_results
from curvature.results import (
    averaged,
    comparison_table,
    format_summary,
    named,
    read_results,
    short_names,
    write_results,
)
from curvature.subjects import Subject, add_subject_flags, check_subject_flags, for_examples, load_subjects
from models.bound import LayerTable, format_layers, layer_table
from utils import cli, distributed
from utils.errors import UsageError
from utils.files import check_suffix, make_room


def build_parser() -> argparse.ArgumentParser:
    parser = cli.Parser(prog="estimate_curvature.py", description=__doc__.splitlines()[0])

    add_subject_flags(parser.add_argument_group("what to measure"), default_split="both")

    flag = parser.add_argument_group("how").add_argument
    flag("--method", choices=methods, default="lanczos", help="power is the paper's")
    flag("--num-power-iter", type=cli.positive_int, default=10, help="most Hessian-vector products")
    flag("--tol", type=cli.nonnegative_float, default=1e-3, help="relative residual at which one is done")
    flag("--batch-size", type=cli.positive_int, default=64, help="examples per Hessian-vector product")
    flag("--top-k", type=cli.positive_int, default=1, metavar="K", help="eigenvalues per example")
    flag("--trace-probes", type=cli.number(int, 0), default=0, metavar="M", help="products for the trace, and more")
    fold = "fold our networks' BatchNorm and spectral norm into the weights, faster (default: on)"
    flag("--fold", action=argparse.BooleanOptionalAction, default=True, help=fold)

    flag = parser.add_argument_group("output").add_argument
    rows = "write one row per example, in place of an earlier file; .csv or .json"
    flag("--output", type=Path, metavar="FILE", help=rows)
    flag("--plot", type=Path, metavar="FILE.png", help="draw the distributions over examples")
    flag("--compare", type=Path, nargs="+", default=[], metavar="FILE", help="earlier --output files to set beside")
    layers = "our low-curvature networks layer by layer, with the curvature bound; with a file also a picture"
    flag("--layers", nargs="?", type=Path, const=True, metavar="FILE.png", help=layers)

    cli.add_shared_flags(parser)
    return parser


def output_files(flags: argparse.Namespace) -> list[Path]:
    """The files the flags ask for, the results first; --layers may name none."""
    return [path for path in (flags.output, flags.plot, flags.layers) if isinstance(path, Path)]


def check_flags(flags: argparse.Namespace) -> None:
    """Raise UsageError on flags that do not go together."""
    if flags.model_filename or flags.model_arch or not flags.compare:
        check_subject_flags(flags)
    elif flags.output or flags.layers:
        raise UsageError("--output and --layers need a model to measure: give --model-filename")
    if flags.method == "power" and flags.top_k > 1:
        raise UsageError("--top-k needs --method lanczos; the power method finds one eigenvalue")
    if flags.top_k > flags.num_power_iter:
        raise UsageError(f"--top-k {flags.top_k} needs at least as many products: raise --num-power-iter")
    for path in output_files(flags):
        check_suffix(path, *((".csv", ".json") if path == flags.output else (".png",)))
    files = [path.resolve() for path in output_files(flags) + flags.compare]
    if len(set(files)) < len(files):
        raise UsageError("--output, --plot, --layers and --compare name the same file twice; each needs its own")


def measure(subject: Subject, flags: argparse.Namespace) -> Iterator[pd.DataFrame]:
    """The results of a model, split by split."""
    settings = {"method": flags.method, "num_iterations": flags.num_power_iter, "tol": flags.tol, "top_k": flags.top_k}
    settings |= {"trace_probes": flags.trace_probes, "use_folding": flags.fold}
    print(f"{subject.name}: {subject.arch} on {subject.dataset}", flush=True)
    with prepared(subject.model, flags.fold) as network:
        of_batch = partial(estimate_curvature, network, **settings)
        yield from for_examples(subject, flags, lambda x, y, generators: of_batch(x, y, generator=generators).columns())


def report_layers(subject: Subject, results: pd.DataFrame) -> LayerTable | None:
    """Print a low-curvature network layer by layer; returns its table, or None if it has none."""
    try:
        table = layer_table(subject.model)
    except ValueError as error:
        print(f"{subject.name}: no table of layers: {error}")
        return None
    largest = results["curvature"][averaged(results) & (results["model"] == subject.name)]
    print(f"{subject.name}, layer by layer:\n{format_layers(table, max(largest, default=0.0))}")
    return table


def estimate(flags: argparse.Namespace) -> None:
    """Do what the flags say: measure, print, write and draw."""
    check_flags(flags)
    earlier = [read_results(path).assign(source=str(path)) for path in flags.compare]
    subjects = load_subjects(flags) if flags.model_filename or flags.model_arch else []
    for subject in subjects:
        if flags.top_k > (pixels := subject.data.test.images[0].numel()):
            raise UsageError(f"--top-k {flags.top_k}: the Hessian of {pixels} pixel values has no more eigenvalues")
    for path in output_files(flags):
        make_room(path)

    first = distributed.rank() == 0
    measured, layers = [], []
    for subject in subjects:
        for results in measure(subject, flags):
            print(format_summary(results), flush=True)
            measured.append(results)
            if flags.output and first:  # after each split: whatever happens later, this much is there
                write_results(flags.output, pd.concat(measured), {**vars(flags), "torch": torch.__version__})
        if flags.layers and (table := report_layers(subject, pd.concat(measured))):
            layers.append((short_names(subject.name for subject in subjects)[subject.name], table))

    together = pd.concat(earlier + measured)
    if earlier or len(subjects) > 1:
        print(comparison_table(together))
    if not first:
        return
    if flags.plot:
        plot_results(flags.plot, named(together))
    if isinstance(flags.layers, Path) and layers:
        plot_layers(flags.layers, layers)
    for path in output_files(flags):
        if path != flags.layers or layers:
            print(f"saved {path}")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return cli.run(build_parser(), distributed.process_group()(estimate), argv, shares_work=True)


if __name__ == "__main__":
    sys.exit(main())
