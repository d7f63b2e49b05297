"""What the curvature estimator costs and how near it comes, beside the textbook's way of doing it.

    python benchmarks/curvature.py --model-filename saved_models/resnet18_digits.pt

The textbook's way is the paper's: the network as it was trained, double backward, and power iteration
u <- H u / (||H u|| + 1e-6) that reports |u'Hu|. Variants take turns: look at the ratios.
"""

import argparse
import sys
from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.measure import in_new_process, interleaved, machine, peak_memory, show
from curvature.derivatives import DoubleBackwardHessian, input_hessian
from curvature.eigenvalues import methods
from curvature.estimate import estimate_curvature, starting_vectors
from curvature.folding import fold
from data.batches import to_pixels
from data.datasets import load_dataset
from models.checkpoint import build_model, read_checkpoint
from utils import cli
from utils.numerics import frozen_in_eval

PRODUCTS = 11  # the reference code's 10 iterations and a Rayleigh quotient
PRODUCTS_SHOWN = [2, 3, 4, 5, 6, 8, 11, 16, 21]


def textbook_estimates(model: nn.Module, images: Tensor, labels: Tensor) -> Iterator[Tensor]:
    """(N,) |u'Hu| after one product, after two, ..."""
    images = images.clone().requires_grad_()
    loss = F.cross_entropy(model(images), labels, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, images, create_graph=True)
    u = starting_vectors("power", images.detach(), torch.Generator().manual_seed(1))
    while True:
        (product,) = torch.autograd.grad((gradient * u).sum(), images, retain_graph=True)
        yield (product * u).flatten(1).sum(dim=1).abs()
        u = product / (product.flatten(1).norm(dim=1).view(-1, 1, 1, 1) + 1e-6)


def load(path: str, flags: argparse.Namespace) -> tuple[nn.Module, Tensor, Tensor]:
    """A checkpoint's network, and some images of its test split with their labels."""
    checkpoint = read_checkpoint(path)
    model = build_model(checkpoint, path).to(flags.device)
    data_dir = flags.data_dir or checkpoint["flags"]["data_dir"]
    split = load_dataset(checkpoint["dataset"], data_dir, checkpoint["image_size"]).test
    chosen = torch.randperm(len(split), generator=torch.Generator().manual_seed(0))[: flags.batch_size]
    batch = split[chosen].to(flags.device)
    return model, to_pixels(batch.images, next(model.parameters()).dtype), batch.labels


def memory(who: str, path: str, flags: argparse.Namespace) -> float:
    model, images, labels = load(path, flags)
    with torch.no_grad():
        model(images[:1])  # the libraries' own memory
    if who == "textbook":
        return peak_memory(images.device, lambda: list(islice(textbook_estimates(model, images, labels), PRODUCTS)))
    return peak_memory(images.device, lambda: estimate_curvature(model, images, labels, "lanczos", PRODUCTS, tol=0))


def compare_products(model: nn.Module, images: Tensor, labels: Tensor, rounds: int) -> float:
    """Print the seconds of a Hessian-vector product, and return ours."""
    v = torch.randn_like(images)
    textbook = textbook_estimates(model, images, labels)
    with frozen_in_eval(model):
        plain, folded = DoubleBackwardHessian(model, images, labels), input_hessian(fold(model), images, labels)
    variants = {
        "textbook": lambda: next(textbook),
        "double backward": lambda: plain.product(v),
        "folded": lambda: folded.product(v),
    }
    table = pd.DataFrame({"seconds": interleaved(variants, rounds)})
    print("\none Hessian-vector product")
    show(table.assign(**{"textbook / this": table.seconds["textbook"] / table.seconds}))
    return table.seconds["folded"]


def compare_errors(model: nn.Module, images: Tensor, labels: Tensor, rounds: int, seconds_a_product: float) -> None:
    """Print the error after so many products, and what it costs to come near."""
    folded = fold(model)
    reference = estimate_curvature(folded, images, labels, num_iterations=300, tol=1e-5)
    truth, residual = reference.hessian_norm, float(reference.residual.max())
    print(f"\nconverged values by Lanczos with {int(reference.products.max())} products")
    print(f"worst relative residual {residual:.1g}, so good to about {residual**2:.1g}")

    def textbook(products: int) -> list[Tensor]:
        return list(islice(textbook_estimates(model, images, labels), products))

    def ours(method: str, products: int) -> Tensor:
        seed = torch.Generator().manual_seed(1)
        return estimate_curvature(folded, images, labels, method, products, tol=0, generator=seed).hessian_norm

    def error(found: Tensor) -> float:
        return float(((found - truth).abs() / truth).mean())

    theirs = [error(found) for found in textbook(max(PRODUCTS_SHOWN))]
    errors = {"textbook": [theirs[k - 1] for k in PRODUCTS_SHOWN]}
    errors |= {method: [error(ours(method, k)) for k in PRODUCTS_SHOWN] for method in methods}
    print("\nmean relative error after k products")
    show(pd.DataFrame(errors, index=PRODUCTS_SHOWN).T, "{:.2g}")

    wanted = theirs[PRODUCTS - 1]
    enough = next(k for k in count(1) if error(ours("lanczos", k)) <= wanted)
    seconds = interleaved({"theirs": lambda: textbook(PRODUCTS), "ours": lambda: ours("lanczos", enough)}, rounds)
    affordable = enough + int((seconds["theirs"] - seconds["ours"]) / seconds_a_product)
    there = error(ours("lanczos", affordable))
    print(
        f"\nas near as the textbook ({wanted:.2g}) with {enough} products: {seconds['ours']:.1f} s against "
        f"{seconds['theirs']:.1f} s, 1/{seconds['theirs'] / seconds['ours']:.1f}\n"
        f"in the textbook's time, {affordable} products: error {there:.2g}, 1/{wanted / there:.0f} of the textbook's"
    )


def main() -> None:
    parser = cli.Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--model-filename", nargs="+", required=True, help="checkpoints of train_models.py")
    parser.add_argument("--batch-size", type=int, default=64, help="images at once")
    parser.add_argument("--rounds", type=int, default=3, help="timings of each variant")
    parser.add_argument("--data-dir", help="where the data set is (default: as in training)")
    parser.add_argument("--device", type=cli.device, default="auto", help="cpu, cuda, ...")
    flags = parser.parse_args()
    print(f"{machine(flags.device)}, batches of {flags.batch_size}")
    for path in flags.model_filename:
        model, images, labels = load(path, flags)
        print(f"\n{path}: {len(images)} images")
        seconds_a_product = compare_products(model, images, labels, flags.rounds)
        compare_errors(model, images, labels, flags.rounds, seconds_a_product)
        theirs, ours = (in_new_process(memory, who, path, flags) for who in ("textbook", "ours"))
        print(f"peak memory above the model: textbook {theirs:.0f} MiB, ours {ours:.0f} MiB, {ours / theirs:.2f} of it")


if __name__ == "__main__":
    main()
