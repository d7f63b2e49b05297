"""What a training step costs: ours beside the textbook's way, and every method of the paper beside Standard.

    python benchmarks/train.py

The textbook's way is benchmarks/textbook.py. A step is loss, gradients and optimizer on random images. Variants take
turns: look at the ratios. Convolutions by themselves are timed on every layer's shapes.
"""

import argparse
import sys
from collections.abc import Callable, Hashable
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import textbook
from benchmarks.measure import DEVICE, in_new_process, interleaved, machine, peak_memory, show
from experiments.compare_methods import METHODS
from models.model_selector import build_network
from train_models import build_loss, build_parser
from training.attacks import PGD, adversarial_images
from training.epoch import TrainingStep, build_optimizer
from utils import cli
from utils.precision import PRECISIONS, denormals_flushed, determinism, tf32_allowed

CLASSES, SIZE = 10, 32
# how often a step passes over the convolutions if not once: forward, for the input, for the weight
PASSES = {"cure": (4, 4, 4), "hessian": (4, 4, 5), "adversarial": (4, 4, 1)}
PASSES |= dict.fromkeys(["gnorm", "curvature_and_gnorm"], (2, 2, 2))


def training_flags(batch_size: int, **values) -> argparse.Namespace:
    """These values, and the defaults of train_models.py's other flags."""
    values = {"textbook": False, "strong_determinism_wanted": False, "batch_size": batch_size} | values
    return argparse.Namespace(**vars(build_parser().parse_args([])) | values)


def method_flags(batch_size: int, name: str, **values) -> argparse.Namespace:
    """A row of the paper's Table 1."""
    row = METHODS[name]
    return training_flags(batch_size, model_arch="resnet18" + row.arch_suffix, **row.training, **values)


class Training:
    """Ours, or the textbook's with flags.textbook, on random images."""

    def __init__(self, flags: argparse.Namespace, dtype: torch.dtype = torch.float32):
        torch.manual_seed(0)
        build = textbook.resnet18 if flags.textbook else build_network
        self.flags, self.model = flags, build(flags.model_arch, CLASSES, SIZE).to(flags.device, dtype).train()
        loss = build_loss(flags, self.model)
        self.training_step, self.optimizer = TrainingStep(loss), build_optimizer(loss, 1e-3, 0.9, 5e-4)
        if flags.textbook:
            self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3, momentum=0.9, weight_decay=5e-4)
        images = torch.rand(flags.batch_size, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
        self.images = images.to(flags.device, dtype)
        self.labels = (torch.arange(flags.batch_size) % CLASSES).to(flags.device)

    def step(self) -> None:
        flags, images = self.flags, self.images
        with tf32_allowed(flags.precision == "tf32"), determinism(flags.strong_determinism_wanted):
            self.optimizer.zero_grad()
            if flags.adversarial_training:
                images = adversarial_images(self.model, images, self.labels, PGD("l2", 0.1, steps=3, step_size=0.01))
            terms = self.training_step(images, self.labels)
            if flags.textbook:  # every term is read back
                list(map(float, terms.values()))
            self.optimizer.step()


def gradient(dtype: torch.dtype, flags: argparse.Namespace) -> Tensor:
    """Of the first step, over all parameters, in float64."""
    training = Training(flags, dtype)
    training.training_step(training.images, training.labels)
    return torch.cat([p.grad.flatten().double() for p in training.model.parameters()])


def step_memory(flags: argparse.Namespace) -> float:
    training = Training(flags)
    with denormals_flushed():
        return peak_memory(lambda: (training.step(), training.step()))


def convolutions(flags: argparse.Namespace) -> list[Callable[[], None]]:
    """A network's convolutions by themselves: forward, for the input, for the weight."""
    training, calls = Training(flags), []

    def record(conv: nn.Conv2d, inputs: tuple[Tensor], output: Tensor) -> None:
        geometry = (None, conv.stride, conv.padding, conv.dilation, False, [0, 0], 1)
        calls.append((torch.randn_like(output), torch.randn_like(inputs[0]), conv.weight.detach(), geometry))

    for module in training.model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(record)
    with torch.no_grad():
        training.model(training.images)

    def forward() -> None:
        for _, x, weight, geometry in calls:
            torch.ops.aten.convolution(x, weight, *geometry)

    def backward(*wanted: bool) -> None:
        for gradient, x, weight, geometry in calls:
            torch.ops.aten.convolution_backward(gradient, x, weight, *geometry, wanted)

    return [forward, partial(backward, True, False, False), partial(backward, False, True, False)]


def time_steps(rows: dict[Hashable, argparse.Namespace], rounds: int) -> pd.DataFrame:
    """Seconds of a step with each row's flags, and of its convolutions by themselves."""
    alone = dict(enumerate(convolutions(next(iter(rows.values())))))
    seconds = interleaved({row: Training(flags).step for row, flags in rows.items()} | alone, rounds)
    table = pd.DataFrame({"seconds": [seconds[row] for row in rows]}, index=pd.Index(list(rows)))
    names = ["adversarial" if flags.adversarial_training else flags.regularizer for flags in rows.values()]
    passes = np.array([PASSES.get(name, (1, 1, 1)) for name in names])
    return table.assign(convolutions=passes @ [seconds[kind] for kind in alone])


def compare_with_textbook(arch: str, losses: list[str], batch_size: int, rounds: int) -> None:
    """Print seconds and memory of a step with each loss."""
    rows = {}
    for loss, who in product(losses, ("textbook", "ours")):
        if "curvature" in loss and not arch.endswith("lcnn"):
            continue
        if (who, loss) != ("textbook", "hessian"):  # PyTorch's BatchNorm has no third derivative
            values = {"model_arch": arch, "regularizer": loss, "textbook": who == "textbook"}
            rows[who, loss] = training_flags(batch_size, **values)
    table = time_steps(rows, rounds)
    table["MiB"] = [in_new_process(step_memory, flags) for flags in rows.values()]
    table = table.unstack(0, sort=False)
    table["textbook / ours", ""] = table.seconds.textbook / table.seconds.ours
    table["ours / convolutions", ""] = table.seconds.ours / table.convolutions.ours
    print(f"\n{arch}: a step")
    show(table)


def compare_costs(batch_size: int, rounds: int) -> None:
    """Print seconds of a step of each method, and relative to Standard's."""
    table = time_steps({row.title: method_flags(batch_size, name) for name, row in METHODS.items()}, rounds)
    print("\nthe methods of the paper: a step, and its convolutions by themselves")
    show(table.join((table / table.loc["Standard"]).add_suffix(" / Standard's")))


def compare_precisions(batch_size: int, rounds: int) -> None:
    """Print the gradient's error and the seconds of a step in each precision, and with determinism."""
    precisions = [p for p in PRECISIONS if p != "tf32" or DEVICE.type == "cuda"]
    errors = {}
    for name in ("standard", "gradreg", "cure", "lcnn", "lcnn_gradreg"):
        truth = gradient(torch.float64, method_flags(batch_size, name))
        found = {p: gradient(torch.float32, method_flags(batch_size, name, precision=p)) for p in precisions}
        errors[METHODS[name].title] = {p: float((own - truth).norm() / truth.norm()) for p, own in found.items()}
    print("\nrelative error of the first step's gradient")
    show(pd.DataFrame(errors).T, "{:.1e}")
    for name in ("standard", "lcnn_gradreg"):
        rows = {precision: method_flags(batch_size, name, precision=precision) for precision in precisions}
        rows["fp32, deterministic"] = method_flags(batch_size, name, strong_determinism_wanted=True)
        print(f"\n{METHODS[name].title}: a step, and its convolutions in fp32 by themselves")
        show(time_steps(rows, rounds))


def main() -> None:
    parser = cli.Parser(description=__doc__.splitlines()[0])
    flag, archs = parser.add_argument, ["resnet18", "resnet18lcnn"]
    losses = ["none", "gnorm", "curvature", "curvature_and_gnorm", "cure", "hessian"]
    flag("--archs", nargs="*", default=archs, choices=archs, help="compared with the textbook's")
    flag("--regularizers", nargs="+", default=losses, help="of these comparisons")
    flag("--batch-size", type=int, default=64, help="images a step")
    flag("--rounds", type=int, default=5, help="timings of each variant")
    flags = parser.parse_args()
    print(f"{machine()}, batches of {flags.batch_size}, {flags.rounds} rounds")
    with denormals_flushed():  # as in training
        for arch in flags.archs:
            compare_with_textbook(arch, flags.regularizers, flags.batch_size, flags.rounds)
        compare_costs(flags.batch_size, flags.rounds)
        compare_precisions(flags.batch_size, flags.rounds)


if __name__ == "__main__":
    main()
