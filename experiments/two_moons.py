"""Decision boundaries of a standard and a low-curvature network on two moons, as in the paper's first figure.

python -m experiments.two_moons --output two_moons.png
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from sklearn.datasets import make_moons
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from curvature.estimate import estimate_curvature
from models.layers import CenteredSoftplus
from regularized_loss import CELoss, CurvatureAndGradientRegularizedLoss
from utils import cli
from utils.files import check_suffix, make_room
from utils.plots import new_figure, save_figure

NUM_TRAIN, NUM_TEST, NOISE = 100, 1000, 0.2  # few and noisy: enough to overfit to
WIDTH, STEPS, LEARNING_RATE = 32, 1000, 1e-2  # of the hidden layers; of Adam, on all training points at once
REG_CONSTANTS = (3e-4, 0.0, 1e-2)  # of beta, gamma (there is no BatchNorm) and the input gradient


class Result(NamedTuple):
    name: str
    model: nn.Module
    accuracy: float  # in percent of the test points
    curvature: float  # the mean of C over them


def two_moons(count: int, noise: float, seed: int) -> tuple[Tensor, Tensor]:
    """Points (count, 2) in float64, and classes (count,)."""
    return tuple(map(torch.from_numpy, make_moons(count, noise=noise, random_state=seed)))


def build_mlp(low_curvature: bool) -> nn.Sequential:
    """Two hidden layers, standard or low-curvature.

    The last layer is free. The moons are a few tenths apart: with Lipschitz constant 1 nothing would be sure.
    """
    layers = []
    for inputs in (2, WIDTH):
        linear = nn.Linear(inputs, WIDTH)
        layers += [spectral_norm(linear), CenteredSoftplus()] if low_curvature else [linear, nn.Softplus(beta=1000)]
    return nn.Sequential(*layers, nn.Linear(WIDTH, 2)).double()


def compare(noise: float, seed: int) -> list[Result]:
    """Train both networks on the same points, and test them on the same others."""
    points, classes = two_moons(NUM_TRAIN, noise, seed)
    test_points, test_classes = two_moons(NUM_TEST, noise, seed + 1)
    results = []
    for name in ("standard", "low-curvature"):
        torch.manual_seed(seed)
        model = build_mlp(name == "low-curvature")
        loss = CELoss(model) if name == "standard" else CurvatureAndGradientRegularizedLoss(model, REG_CONSTANTS)
        optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
        for _ in range(STEPS):
            optimizer.zero_grad()
            loss.compute_loss(points, classes).backward()
            optimizer.step()
        estimate = estimate_curvature(model.eval(), test_points, test_classes)
        accuracy = 100 * (estimate.predicted == test_classes).double().mean().item()
        results.append(Result(name, model, accuracy, estimate.curvature.mean().item()))
        print(f"two moons, {name}: test accuracy {accuracy:.1f} %, mean C {results[-1].curvature:.3g}")
    return results


def draw(path: Path, noise: float, seed: int) -> None:
    """A panel a network: the probability of class 1 as a map, 1/2 as a line, and the training points."""
    check_suffix(path, ".png")
    make_room(path)
    results = compare(noise, seed)
    points, classes = (tensor.numpy() for tensor in two_moons(NUM_TRAIN, noise, seed))
    figure, axes = new_figure(len(results))
    x, y = np.meshgrid(*np.linspace(points.min(0) - 0.5, points.max(0) + 0.5, 300).T)
    grid = torch.from_numpy(np.stack([x, y], axis=-1).reshape(-1, 2))
    for axis, result in zip(axes, results, strict=True):
        probability = result.model(grid).detach().softmax(dim=1)[:, 1].reshape(x.shape).numpy()
        axis.contourf(x, y, probability, levels=np.linspace(0, 1, 21), cmap="RdBu", alpha=0.7)
        axis.contour(x, y, probability, levels=[0.5], colors="black")
        axis.scatter(*points.T, c=classes, cmap="RdBu", edgecolors="black", s=18, linewidths=0.6)
        axis.set_title(f"{result.name}\ntest accuracy {result.accuracy:.1f} %, mean C {result.curvature:.3g}")
        axis.set(xticks=[], yticks=[])
    save_figure(figure, path)
    print(f"saved {path}")


def build_parser() -> argparse.ArgumentParser:
    parser = cli.Parser(prog="two_moons", description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("two_moons.png"), metavar="FILE.png", help="the picture")
    parser.add_argument("--noise", type=cli.nonnegative_float, default=NOISE, help="standard deviation of the points")
    cli.add_shared_flags(parser, cpu_only=True)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return cli.run(build_parser(), lambda flags: draw(flags.output, flags.noise, flags.prng_seed), argv)


if __name__ == "__main__":
    sys.exit(main())
