"""Ours beside what people would use instead: the largest eigenvalue of each image's Hessian, its cost and its error.

    pip install -r requirements-benchmarks.txt
    python benchmarks/peers.py --num-threads 1 --num-samples 16 --model-filename saved_models/quick_start/resnet18*.pt

Every method gets the same images, the same frozen network in the same dtype, a random start, and a relative tolerance.
Ours and ARPACK (eigsh) stop at a residual ||H u - lambda u|| <= tol |lambda|, ours when it has seen that twice, and
PyHessian once its estimate changes by less than tol, which is weaker. All options are the peers' defaults, except that
curvlinops is spared its check for determinism. The truth is eigsh at 1e-8 in float64 on plain double backward, so an
error holds the rounding of the dtype, too. Our times include folding the network. docs/costs.md explains the rows.
"""

import argparse
import copy
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.measure import interleaved, machine, show
from curvature.estimate import estimate_curvature, prepared
from curvature.subjects import Subject, add_subject_flags, check_subject_flags, for_examples, load_subjects
from utils import cli
from utils.numerics import frozen_in_eval

MOST_PRODUCTS = 300  # of ours and of PyHessian: the tolerance ends them before
TOL, TRUE_TOL = 1e-3, 1e-8  # relative, of every method and of the truth
SMALL_BASIS = 5  # eigsh's ncv; 4 to 6 took the fewest products on the quick start's networks

Found = tuple[float, int]  # an eigenvalue of largest magnitude, and the Hessian-vector products spent on it


class Pixels(nn.Module):
    """A network at an image (1, 3, H, H), its only parameter: peers differentiate with respect to parameters."""

    def __init__(self, model: nn.Module, image: Tensor):
        super().__init__()
        self.pixels = nn.Parameter(image.clone())
        self.network = model.__call__  # no submodule, whose parameters the peers would go through

    def forward(self, _: Tensor) -> Tensor:
        return self.network(self.pixels)


def arpack(product: Callable[[np.ndarray], np.ndarray], image: Tensor, tol: float, seed: int, ncv=None) -> Found:
    """scipy's eigsh on v -> H v; ncv is the size of its basis, None for its default."""
    calls = []

    def matvec(v: np.ndarray) -> np.ndarray:
        calls.append(None)
        return product(v)

    start = torch.randn(image.numel(), generator=torch.Generator().manual_seed(seed), dtype=image.dtype).numpy()
    operator = LinearOperator((len(start), len(start)), matvec=matvec, dtype=start.dtype)
    (value,) = eigsh(operator, k=1, which="LM", tol=tol, v0=start, ncv=ncv, return_eigenvectors=False)
    return value, len(calls)


def double_backward(model: nn.Module, image: Tensor, label: Tensor, tol: float, seed: int, ncv=None) -> Found:
    image = image.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(model(image), label), image, create_graph=True)

    def product(v: np.ndarray) -> np.ndarray:
        v = torch.from_numpy(v).view_as(image).to(image)
        return torch.autograd.grad(gradient, image, v, retain_graph=True)[0].flatten().cpu().numpy()

    return arpack(product, image, tol, seed, ncv)


def curvlinops(model: nn.Module, image: Tensor, label: Tensor, tol: float, seed: int) -> Found:
    from curvlinops import HessianLinearOperator

    network, loss, more = Pixels(model, image), nn.CrossEntropyLoss(), {"check_deterministic": False, "num_data": 1}
    operator = HessianLinearOperator(network, loss, [network.pixels], [(image, label)], **more)
    return arpack(operator.to_scipy().matvec, image, tol, seed)


def pyhessian(model: nn.Module, image: Tensor, label: Tensor, tol: float, seed: int) -> Found:
    from pyhessian import hessian

    network, calls = Pixels(model, image), []
    network.pixels.register_hook(lambda _: calls.append(None))  # by the gradient once, then by each product
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of backward(create_graph=True)
        of_image = hessian(network, nn.CrossEntropyLoss(), (image, label), cuda=image.is_cuda)
        (value,), _ = of_image.eigenvalues(MOST_PRODUCTS, tol)
    return value, len(calls) - 1


def one_by_one(peer: Callable[..., Found], model: nn.Module, images: Tensor, labels: Tensor, tol: float) -> list[Found]:
    examples = zip(images.split(1), labels.split(1), strict=True)
    return [peer(model, *example, tol, seed) for seed, example in enumerate(examples)]


def ours(batch_size: int, model: nn.Module, images: Tensor, labels: Tensor, tol: float) -> list[Found]:
    found, generators = [], [torch.Generator().manual_seed(seed) for seed in range(len(images))]
    with prepared(model) as network:
        for start in range(0, len(images), batch_size):
            part = slice(start, start + batch_size)
            settings = {"num_iterations": MOST_PRODUCTS, "tol": tol, "generator": generators[part]}
            result = estimate_curvature(network, images[part], labels[part], **settings)
            found += zip(result.eigenvalue.tolist(), result.products.tolist(), strict=True)
    return found


def installed_methods(batch_size: int) -> dict[str, Callable[..., list[Found]]]:
    """(model, images, labels, tol) -> what was found for each image; a line for each peer that is not installed."""
    peers = {"eigsh, double backward": double_backward}
    peers[f"eigsh, double backward, ncv={SMALL_BASIS}"] = partial(double_backward, ncv=SMALL_BASIS)
    for name, peer in {"eigsh, curvlinops": curvlinops, "PyHessian": pyhessian}.items():
        if find_spec(peer.__name__):
            peers[name] = peer
        else:
            print(f"{name}: not installed, so left out; pip install -r requirements-benchmarks.txt")
    methods = {"ours": partial(ours, batch_size), "ours, one image at a time": partial(ours, 1)}
    return methods | {name: partial(one_by_one, peer) for name, peer in peers.items()}


def compare(subject: Subject, flags: argparse.Namespace) -> None:
    """Print what each method costs and how near it comes."""
    methods = installed_methods(flags.batch_size)
    true_model = copy.deepcopy(subject.model).double()

    def measure(images: Tensor, labels: Tensor, _) -> dict[str, Tensor]:
        found = {}

        def work(name: str) -> None:
            found[name] = methods[name](subject.model, images, labels, TOL)

        with frozen_in_eval(subject.model), frozen_in_eval(true_model):
            truth = torch.tensor(one_by_one(double_backward, true_model, images.double(), labels, TRUE_TOL))[:, 0].abs()
            seconds = interleaved({name: partial(work, name) for name in methods}, flags.rounds)
        columns = {}
        for name in methods:
            values, products = torch.tensor(found[name], dtype=torch.float64).unbind(dim=1)
            columns |= {f"{name}: error": (values.abs() - truth).abs() / truth, f"{name}: products": products}
            columns[f"{name}: seconds"] = torch.full_like(truth, seconds[name] / len(images))
        return columns

    print(f"\n{subject.name}: {subject.arch} on {subject.dataset}")
    results = pd.concat(for_examples(subject, flags, measure))
    rows = {}
    for name in methods:
        error, products, seconds = (results[f"{name}: {what}"] for what in ("error", "products", "seconds"))
        rows[name] = {"seconds an image": seconds.mean(), "products an image": products.mean()}
        rows[name] |= {"median error": error.median(), "largest error": error.max()}
    table = pd.DataFrame(rows).T
    table["seconds / ours"] = table["seconds an image"] / table.loc["ours", "seconds an image"]
    size = subject.data.test.images.shape[-1]
    print(f"{len(results)} images of {size} x {size}, tolerance {TOL:g}")
    show(table, "{:.3g}")


def benchmark(flags: argparse.Namespace) -> None:
    check_subject_flags(flags)
    print(f"{machine(flags.device)}, batches of {flags.batch_size}, {flags.rounds} rounds")
    for subject in load_subjects(flags):
        compare(subject, flags)


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.Parser(prog="peers.py", description=__doc__.splitlines()[0])
    add_subject_flags(parser, default_split="test")
    parser.add_argument("--batch-size", type=cli.positive_int, default=16, help="images at once, of ours")
    parser.add_argument("--rounds", type=cli.positive_int, default=3, help="timings of each variant")
    cli.add_shared_flags(parser)
    return cli.run(parser, benchmark, argv)


if __name__ == "__main__":
    sys.exit(main())
