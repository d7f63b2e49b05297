"""What the curvature estimator costs and how near it comes, beside the textbook's way of doing it.

    python benchmarks/curvature.py --model-filename saved_models/resnet18_digits.pt

The textbook's way is the paper's: the network as it was trained, double backward, and power iteration
u <- H u / (||H u|| + 1e-6) that reports |u'Hu|. Variants take turns: look at the ratios.
"""

import sys
from collections.abc import Callable, Iterator
from itertools import count, islice
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.measure import DEVICE, in_new_process, interleaved, machine, peak_memory, show
from curvature.derivatives import DoubleBackwardHessian, input_hessian
from curvature.eigenvalues import methods
from curvature.estimate import estimate_curvature, starting_vectors
from curvature.folding import fold
from data.batches import to_pixels
from data.datasets import load_dataset
from models.checkpoint import build_model, read_checkpoint
from utils import cli
from utils.numerics import frozen_in_eval

BATCH_SIZE, ROUNDS = 64, 3
PRODUCTS = 11  # the reference code's 10 iterations and a Rayleigh quotient
PRODUCTS_SHOWN = [2, 3, 4, 5, 6, 8, 11, 16, 21]


Example = tuple[nn.Module, Tensor, Tensor]  # a network, images (N, 3, H, H) and labels (N,)


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


def textbook(example: Example, products: int) -> list[Tensor]:
    return list(islice(textbook_estimates(*example), products))


def ours(example: Example, products: int, method: str = "lanczos") -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return estimate_curvature(*example, method, products, tol=0, generator=generator).hessian_norm


def load(path: str) -> Example:
    """A checkpoint's network, and some images of its test split with their labels."""
    checkpoint = read_checkpoint(path)
    split = load_dataset(checkpoint["dataset"], checkpoint["flags"]["data_dir"], checkpoint["image_size"]).test
    batch = split[torch.randperm(len(split), generator=torch.Generator().manual_seed(0))[:BATCH_SIZE]].to(DEVICE)
    return build_model(checkpoint, path).to(DEVICE), to_pixels(batch.images), batch.labels


def memory(method: Callable[[Example, int], object], path: str) -> float:
    model, images, _ = example = load(path)
    with torch.no_grad():
        model(images[:1])  # the libraries' own memory
    return peak_memory(lambda: method(example, PRODUCTS))


def compare_products(example: Example) -> float:
    """Print the seconds of a Hessian-vector product, and return ours."""
    model, images, labels = example
    v, theirs = torch.randn_like(images), textbook_estimates(*example)
    with frozen_in_eval(model):
        plain, folded = DoubleBackwardHessian(*example), input_hessian(fold(model), images, labels)
    variants = {
        "textbook": lambda: next(theirs),
        "double backward": lambda: plain.product(v),
        "folded": lambda: folded.product(v),
    }
    table = pd.DataFrame({"seconds": interleaved(variants, ROUNDS)})
    print("\none Hessian-vector product")
    show(table.assign(**{"textbook / this": table.seconds["textbook"] / table.seconds}))
    return table.seconds["folded"]


def compare_errors(example: Example, seconds_a_product: float) -> None:
    """Print the error after so many products, and what it costs to come near."""
    model, images, labels = example
    folded = fold(model), images, labels
    reference = estimate_curvature(*folded, num_iterations=300, tol=1e-5)
    truth, residual = reference.hessian_norm, float(reference.residual.max())
    print(f"\nconverged values by Lanczos with {int(reference.products.max())} products")
    print(f"worst relative residual {residual:.1g}, so good to about {residual**2:.1g}")

    def error(found: Tensor) -> float:
        return float(((found - truth).abs() / truth).mean())

    theirs = [error(found) for found in textbook(example, max(PRODUCTS_SHOWN))]
    errors = {"textbook": [theirs[k - 1] for k in PRODUCTS_SHOWN]}
    errors |= {method: [error(ours(folded, k, method)) for k in PRODUCTS_SHOWN] for method in methods}
    print("\nmean relative error after k products")
    show(pd.DataFrame(errors, index=PRODUCTS_SHOWN).T, "{:.2g}")

    wanted = theirs[PRODUCTS - 1]
    enough = next(k for k in count(1) if error(ours(folded, k)) <= wanted)
    variants = {"theirs": lambda: textbook(example, PRODUCTS), "ours": lambda: ours(folded, enough)}
    seconds = interleaved(variants, ROUNDS)
    affordable = enough + int((seconds["theirs"] - seconds["ours"]) / seconds_a_product)
    there = error(ours(folded, affordable))
    print(
        f"\nas near as the textbook ({wanted:.2g}) with {enough} products: {seconds['ours']:.1f} s against "
        f"{seconds['theirs']:.1f} s, 1/{seconds['theirs'] / seconds['ours']:.1f}\n"
        f"in the textbook's time, {affordable} products: error {there:.2g}, 1/{wanted / there:.0f} of the textbook's"
    )


def main() -> None:
    parser = cli.Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--model-filename", nargs="+", required=True, help="checkpoints of train_models.py")
    flags = parser.parse_args()
    print(f"{machine()}, batches of {BATCH_SIZE}")
    for path in flags.model_filename:
        example = load(path)
        print(f"\n{path}: {len(example[1])} images")
        compare_errors(example, compare_products(example))
        theirs, own = (in_new_process(memory, method, path) for method in (textbook, ours))
        print(f"peak memory above the model: textbook {theirs:.0f} MiB, ours {own:.0f} MiB, {own / theirs:.2f} of it")


if __name__ == "__main__":
    main()
