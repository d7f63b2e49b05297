"""What the curvature estimator costs and how near it comes, beside the textbook's way of doing it.

    python benchmarks/curvature.py --model-filename saved_models/resnet18_digits.pt

The textbook's way is the paper's: the network as it was trained, double backward, and power iteration
u <- H u / (||H u|| + 1e-6) that reports |u'Hu|. Everything runs in one process, the variants taking turns, so that
whatever else the machine does touches all of them; look at the ratios. Peak memory is each variant's own process's.
"""

import argparse
import copy
import subprocess
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.measure import PeakMemory, interleaved  # noqa: E402
from curvature.derivatives import DoubleBackwardHessian, InputHessian, input_hessian  # noqa: E402
from curvature.eigenvalues import methods  # noqa: E402
from curvature.estimate import estimate_curvature, starting_vectors  # noqa: E402
from curvature.folding import fold  # noqa: E402
from data.batches import to_pixels  # noqa: E402
from data.datasets import load_dataset  # noqa: E402
from models.checkpoint import build_model, read_checkpoint  # noqa: E402

TEXTBOOK_ITERATIONS = 10  # the reference code's default; with its last Rayleigh quotient 11 products
TRUTH = {"num_iterations": 300, "tol": 1e-5}


def textbook_gradient(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The input gradient (N, ...) with its graph, and the images it was taken at."""
    images = images.clone().requires_grad_()
    losses = F.cross_entropy(model(images), labels, reduction="none")
    return torch.autograd.grad(losses.sum(), images, create_graph=True)[0], images


def textbook_product(gradient: Tensor, images: Tensor, u: Tensor) -> Tensor:
    return torch.autograd.grad((gradient * u).sum(), images, retain_graph=True)[0]


def textbook_estimate(model: nn.Module, images: Tensor, labels: Tensor, start: Tensor, iterations: int) -> list[Tensor]:
    """(N,) |u'Hu| after 1, 2, ..., iterations + 1 products."""
    gradient, images = textbook_gradient(model, images, labels)
    u = start / start.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    found = []
    for _ in range(iterations + 1):
        product = textbook_product(gradient, images, u)
        found.append((product * u).flatten(1).sum(dim=1).abs())
        u = product / (product.flatten(1).norm(dim=1).view(-1, 1, 1, 1) + 1e-6)
    return found


class Remembered(InputHessian):
    """An input Hessian that computes its k-th product once: the steps of a shorter run are those of a longer one."""

    def __init__(self, hessian: InputHessian):
        self.hessian, self.products, self.calls = hessian, [], 0

    def product(self, v):
        if self.calls == len(self.products):
            self.products.append(self.hessian.product(v).clone())
        self.calls += 1
        return self.products[self.calls - 1].clone()

    def restrict(self, keep):
        raise RuntimeError("an example converged at a tolerance of 0")


def errors_by_products(hessian: InputHessian, method: str, start: Tensor, truth: Tensor, most: int) -> list[float]:
    """Mean relative error of the Hessian norm after 1, 2, ..., most products."""
    remembered, errors = Remembered(hessian), []
    for k in range(1, most + 1):
        remembered.calls = 0
        found = methods[method](remembered, start, k, tol=-1.0).values[:, 0].abs()
        errors.append(((found - truth).abs() / truth).mean().item())
    return errors


def load(path: str, flags: argparse.Namespace) -> tuple[nn.Module, Tensor, Tensor]:
    """The network of a checkpoint, and some random images of its test split with their labels."""
    checkpoint = read_checkpoint(path)
    model = build_model(checkpoint, path).to(flags.device)
    data_dir = flags.data_dir or checkpoint["flags"]["data_dir"]
    split = load_dataset(checkpoint["dataset"], data_dir, checkpoint["image_size"]).test
    chosen = torch.randperm(len(split), generator=torch.Generator().manual_seed(0))[: flags.batch_size]
    batch = split[chosen].to(flags.device)
    return model, to_pixels(batch.images, next(model.parameters()).dtype), batch.labels


def peak_memory(path: str, variant: str, arguments: list[str]) -> float:
    """MiB that a variant takes above the loaded model and images, in a process of its own."""
    command = [sys.executable, __file__, "--model-filename", path, "--memory-of", variant, *arguments]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def measure_memory(path: str, variant: str, flags: argparse.Namespace) -> float:
    model, images, labels = load(path, flags)
    start = torch.randn_like(images)
    with torch.no_grad():
        model(images[:1])  # what the libraries take for themselves

    memory = PeakMemory(images.device)
    if variant == "textbook":
        textbook_estimate(model, images, labels, start, TEXTBOOK_ITERATIONS)
    else:
        estimate_curvature(model, images, labels, variant, num_iterations=TEXTBOOK_ITERATIONS + 1, tol=0)
    return memory.taken()


def witnesses(model: nn.Module, image: Tensor, label: Tensor) -> dict[str, float]:
    """One example's eigenvalue of largest magnitude by other people's code: scipy's eigsh on operators at hand."""
    import numpy as np
    from scipy.sparse.linalg import LinearOperator, eigsh

    image, label = image[None], label[None]
    hessian = DoubleBackwardHessian(model, image, label)

    def matvec(v: np.ndarray) -> np.ndarray:
        return hessian.product(torch.from_numpy(v.astype(np.float32)).view_as(image).to(image)).flatten().cpu().numpy()

    operators = {"eigsh": LinearOperator((image.numel(), image.numel()), matvec=matvec, dtype=np.float32)}
    try:
        from curvlinops import HessianLinearOperator
    except ImportError:
        pass
    else:  # it differentiates with respect to parameters: the image becomes one

        class Pixels(nn.Module):
            def __init__(self):
                super().__init__()
                self.pixels = nn.Parameter(image.clone())

            def forward(self, anything):
                return model(self.pixels)

        pixels = Pixels()
        loss = nn.CrossEntropyLoss(reduction="sum")
        data = [(image, label)]
        operator = HessianLinearOperator(pixels, loss, list(pixels.parameters()), data, check_deterministic=False)
        operators["eigsh on curvlinops"] = operator.to_scipy()
    return {
        name: float(eigsh(op, k=1, which="LM", tol=1e-4, return_eigenvectors=False)[0])
        for name, op in operators.items()
    }


def report(path: str, flags: argparse.Namespace) -> None:
    model, images, labels = load(path, flags)
    folded = fold(model)
    reference = estimate_curvature(folded, images, labels, **TRUTH)
    truth = reference.hessian_norm
    print(f"\n{path}: {len(images)} images; converged values by Lanczos with {int(reference.products.max())} products,")
    print(
        f"worst relative residual {reference.residual.max():.1g}, so good to about {reference.residual.max() ** 2:.1g}"
    )

    gradient, at = textbook_gradient(model, images, labels)
    ours = input_hessian(folded, images, labels)
    frozen = copy.deepcopy(model).requires_grad_(False)
    plain = DoubleBackwardHessian(frozen, images, labels)
    starts = {  # from the same random numbers
        method: starting_vectors(method, ours.gradient, torch.Generator().manual_seed(1)) for method in methods
    }
    start = starts["power"]
    seconds = interleaved(
        {
            "textbook": lambda: textbook_product(gradient, at, start),
            "double backward": lambda: plain.product(start),
            "folded": lambda: ours.product(start),
        },
        flags.rounds,
    )
    print("\none Hessian-vector product      seconds   textbook / this")
    for name, s in seconds.items():
        print(f"  {name:<28} {s:>8.3f}   {seconds['textbook'] / s:>10.2f}")

    found = textbook_estimate(model, images, labels, start, 2 * TEXTBOOK_ITERATIONS)
    textbook = [((values - truth).abs() / truth).mean().item() for values in found]
    error = textbook[TEXTBOOK_ITERATIONS]
    most = 4 * (TEXTBOOK_ITERATIONS + 1)
    by_products = {method: errors_by_products(ours, method, starts[method], truth, most) for method in methods}
    enough = next(k for k, e in enumerate(by_products["lanczos"], start=1) if e <= error)
    variants = {
        "textbook": lambda: textbook_estimate(model, images, labels, start, TEXTBOOK_ITERATIONS),
        "lanczos": lambda: estimate_curvature(folded, images, labels, "lanczos", enough, tol=0),
    }
    whole = interleaved(variants, flags.rounds)
    affordable = min(most, enough + int((whole["textbook"] - whole["lanczos"]) / seconds["folded"]))
    at_same_time = by_products["lanczos"][affordable - 1]
    print("\nmean relative error after k products")
    ks = [2, 3, 4, 5, 6, 8, 11, 16, 21]
    print("  k                 " + "".join(f"{k:>9}" for k in ks))
    for method, values in {"textbook": textbook, **by_products}.items():
        print(f"  {method:<18}" + "".join(f"{values[k - 1]:>9.2g}" for k in ks))
    print(
        f"\nas near as the textbook ({error:.2g}) with {enough} products: {whole['lanczos']:.1f} s "
        f"against {whole['textbook']:.1f} s, 1/{whole['textbook'] / whole['lanczos']:.1f}\n"
        f"in the textbook's time, {affordable} products: error {at_same_time:.2g}, "
        f"1/{error / at_same_time:.0f} of the textbook's"
    )

    arguments = ["--batch-size", str(flags.batch_size), "--device", str(flags.device)]
    arguments += ["--data-dir", flags.data_dir] if flags.data_dir else []
    memory = {variant: peak_memory(path, variant, arguments) for variant in ("textbook", "lanczos")}
    print(
        f"peak memory above the model: textbook {memory['textbook']:.0f} MiB, ours {memory['lanczos']:.0f} MiB, "
        f"{memory['lanczos'] / memory['textbook']:.2f} of it"
    )
    for i in range(flags.witnesses):
        values = {"ours": reference.eigenvalue[i].item()} | witnesses(frozen, images[i], labels[i])
        print(f"image {i}: " + ", ".join(f"{name} {value:.6g}" for name, value in values.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-filename", nargs="+", required=True, help="checkpoints of train_models.py")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3, help="timings of each variant")
    parser.add_argument("--witnesses", type=int, default=2, help="images to check with scipy's eigsh")
    parser.add_argument("--data-dir", help="where the data set is (default: as in training)")
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--memory-of", choices=["textbook", *methods], help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.memory_of:
        print(measure_memory(flags.model_filename[0], flags.memory_of, flags))
        return
    threads = f"{torch.get_num_threads()} threads" if flags.device.type == "cpu" else torch.cuda.get_device_name()
    print(f"torch {torch.__version__}, {threads}, batches of {flags.batch_size}")
    for path in flags.model_filename:
        report(path, flags)


if __name__ == "__main__":
    main()
