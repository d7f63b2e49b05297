"""What a training step costs: ours beside the textbook's way, and every method of the paper beside Standard.

    python benchmarks/train.py

The textbook's way (benchmarks/textbook.py) is the paper's formulas as they are written. A step is loss, gradients and
optimizer, in training mode, on random images. Everything runs in one process, the variants taking turns, so that
whatever else the machine does touches all of them; look at the ratios. The floor is the time of a step's convolutions
by themselves, each kind (forward, for the input, for the weight) timed on every layer's own shapes. Peak memory is
above the model and its images, on a CPU in a process of its own.
"""

import argparse
import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


from benchmarks import textbook  # noqa: E402
from benchmarks.measure import PeakMemory, interleaved  # noqa: E402
from experiments import compare_methods  # noqa: E402
from models.model_selector import model_architecture  # noqa: E402
from regularized_loss import regularizers  # noqa: E402
from train_models import build_parser  # noqa: E402
from training.attacks import PGD, adversarial_images  # noqa: E402
from training.epoch import Gradients, build_optimizer  # noqa: E402
from utils import cli  # noqa: E402
from utils.precision import PRECISIONS, set_precision, set_tf32  # noqa: E402

CLASSES, SIZE = 10, 32
# convolution passes over the network in a step: forward, gradient for the input, gradient for the weight
PASSES = {"plain": (1, 1, 1), "gradient norm": (2, 2, 2), "cure": (4, 4, 4), "pgd": (4, 4, 1)}
PASSES_OF = {
    "none": "plain",
    "curvature": "plain",
    "curvature_bound": "plain",
    "gnorm": "gradient norm",
    "curvature_and_gnorm": "gradient norm",
    "cure": "cure",
}
# the rows of the paper's Table 1: architecture, regularizer, adversarial training
DEFAULTS = compare_methods.build_parser().parse_args([])
METHODS = {
    method.title: (flags.model_arch, flags.regularizer, flags.adversarial_training)
    for name, method in compare_methods.METHODS.items()
    for flags in [compare_methods.training_flags(DEFAULTS, name)]
}
STEPS_FOR_MEMORY = 2


def batch(flags: argparse.Namespace) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(flags.batch_size, 3, SIZE, SIZE, generator=generator)
    return images.to(flags.device), (torch.arange(flags.batch_size) % CLASSES).to(flags.device)


def textbook_step(arch: str, regularizer: str, flags: argparse.Namespace) -> Callable[[], None]:
    torch.manual_seed(0)
    model = textbook.resnet18(arch.endswith("lcnn"), CLASSES, SIZE).to(flags.device).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=5e-4)
    images, labels = batch(flags)

    def step() -> None:
        optimizer.zero_grad()
        textbook.compute_loss(model, images.clone(), labels, regularizer).backward()
        optimizer.step()

    return step


def our_model(arch: str, flags: argparse.Namespace) -> nn.Module:
    torch.manual_seed(0)
    model = model_architecture[arch](CLASSES, SIZE).to(flags.device, memory_format=torch.channels_last)
    return model.train()


def our_step(
    arch: str, regularizer: str, flags: argparse.Namespace, adversarial=False, precision="fp32"
) -> Callable[[], None]:
    model = our_model(arch, flags)
    set_precision(model, precision, flags.device)
    gradients = Gradients(regularizers[regularizer](model, build_parser().parse_args([])), model)
    optimizer = build_optimizer(model, 1e-3, 0.9, 5e-4)
    images, labels = batch(flags)

    def step() -> None:
        set_tf32(precision)  # the variants take turns
        optimizer.zero_grad()
        at = adversarial_images(model, images, labels, PGD("l2", 0.1, 3, 0.01)) if adversarial else images
        gradients(at, labels, 1.0)
        optimizer.step()

    return step


def convolutions(arch: str, flags: argparse.Namespace) -> tuple[dict[str, Callable[[], None]], float]:
    """All of a network's convolutions by themselves, by kind, and the operations of one pass in GFLOP."""
    model, calls = our_model(arch, flags), []

    def record(conv: nn.Conv2d, inputs: tuple[Tensor], output: Tensor) -> None:
        weight = conv.weight.detach()
        arguments = (None, conv.stride, conv.padding, conv.dilation, False, [0, 0], 1)
        calls.append((torch.randn_like(output), torch.randn_like(inputs[0]), weight, arguments))

    hooks = [m.register_forward_hook(record) for m in model.modules() if isinstance(m, nn.Conv2d)]
    with torch.no_grad():
        model(batch(flags)[0])
    for hook in hooks:
        hook.remove()

    def forward() -> None:
        for _, x, weight, arguments in calls:
            torch.conv2d(x, weight, None, *arguments[1:3])

    def backward(wanted: list[bool]) -> Callable[[], None]:
        def run() -> None:
            for g, x, weight, arguments in calls:
                torch.ops.aten.convolution_backward(g, x, weight, *arguments, wanted)

        return run

    operations = sum(2 * g.numel() * weight[0].numel() for g, _, weight, _ in calls)
    kinds = {
        "forward": forward,
        "for the input": backward([True, False, False]),
        "for the weight": backward([False, True, False]),
    }
    return kinds, operations / 1e9


def floor(kind: str, seconds: dict[str, float]) -> float:
    """Seconds that a step's convolutions take by themselves."""
    passes = zip(PASSES[kind], ("forward", "for the input", "for the weight"), strict=True)
    return sum(times * seconds[name] for times, name in passes)


def compare_with_textbook(arch: str, flags: argparse.Namespace) -> None:
    chosen = [name for name in flags.regularizers if arch.endswith("lcnn") or "curvature" not in name]
    variants: dict[str, Callable[[], None]] = {}
    for name in chosen:
        variants[f"textbook {name}"] = textbook_step(arch, name, flags)
        variants[f"ours {name}"] = our_step(arch, name, flags)
    alone, operations = convolutions(arch, flags)
    seconds = interleaved(variants | alone, flags.rounds)
    print(f"\n{arch}: one pass of its convolutions over {flags.batch_size} images is {operations:.1f} GFLOP")
    print(f"{'':<22}{'seconds a step':>24}{'':>9}{'images/s':>9}{'floor':>8}{'ours /':>8}{'peak MiB':>18}")
    columns = ("textbook", "ours", "ratio", "ours", "s", "floor", "textbook", "ours")
    print(f"{'':<22}" + "".join(f"{c:>{w}}" for c, w in zip(columns, (12, 12, 9, 9, 8, 8, 10, 8), strict=True)))
    for name in chosen:
        theirs, ours = seconds[f"textbook {name}"], seconds[f"ours {name}"]
        least = floor(PASSES_OF[name], seconds)
        memory = [peak_memory(who, arch, name, flags) for who in ("textbook", "ours")]
        print(
            f"  {name:<20}{theirs:>12.4g}{ours:>12.4g}{theirs / ours:>9.2f}{flags.batch_size / ours:>9.0f}"
            f"{least:>8.3g}{ours / least:>8.2f}{memory[0]:>10.0f}{memory[1]:>8.0f}",
            flush=True,
        )


def compare_costs(flags: argparse.Namespace) -> None:
    steps = {name: our_step(arch, loss, flags, attack) for name, (arch, loss, attack) in METHODS.items()}
    alone, _ = convolutions("resnet18", flags)
    seconds = interleaved(steps | alone, flags.rounds)
    print(f"\n{'the methods of the paper':<28}{'seconds a step':>15}{'Standard = 1':>14}{'floor':>8}")
    standard, least = seconds["Standard"], floor("plain", seconds)
    for name, (_, loss, attack) in METHODS.items():
        relative = floor("pgd" if attack else PASSES_OF[loss], seconds) / least
        print(f"  {name:<26}{seconds[name]:>15.4g}{seconds[name] / standard:>14.2f}{relative:>8.2f}")


def compare_precisions(flags: argparse.Namespace) -> None:
    """The gradient's error in every precision, and seconds a step: as a graph on CUDA, and deterministically."""
    cuda = flags.device.type == "cuda"
    precisions = [p for p in PRECISIONS if cuda or p != "tf32"]
    print(f"\n{'relative error of the gradient':<44}" + "".join(f"{p:>10}" for p in precisions))
    for arch, loss, _ in (METHODS[name] for name in ("Standard", "GradReg", "CURE", "LCNN", "LCNN + GradReg")):
        errors = gradient_errors(arch, loss, precisions, flags)
        print(f"  {arch + ' ' + loss:<42}" + "".join(f"{error:>10.1e}" for error in errors))
    for arch, loss in (("resnet18", "none"), ("resnet18lcnn", "curvature_and_gnorm")):
        variants = {precision: our_step(arch, loss, flags, False, precision) for precision in precisions}
        variants["fp32, deterministic"] = deterministically(our_step(arch, loss, flags))
        seconds = interleaved(variants, flags.rounds, warm_up=5 if cuda else 1)
        print(f"\n{arch} {loss}: seconds a step, images/s")
        for name, s in seconds.items():
            print(f"  {name:<26}{s:>10.4g}{flags.batch_size / s:>10.0f}")


def deterministically(step: Callable[[], None]) -> Callable[[], None]:
    def run() -> None:
        benchmark = torch.backends.cudnn.benchmark
        cli.seed_everything(0, strong_determinism=True)
        step()
        torch.set_deterministic_debug_mode("default")  # the variants take turns
        torch.backends.cudnn.benchmark = benchmark

    return run


def gradient_errors(arch: str, loss: str, precisions: list[str], flags: argparse.Namespace) -> list[float]:
    """||gradient - gradient in float64|| / ||gradient in float64|| over all parameters, at the first step."""
    original, (images, labels) = our_model(arch, flags), batch(flags)

    def gradient(precision: str, dtype: torch.dtype) -> Tensor:
        model = copy.deepcopy(original).to(dtype)
        set_precision(model, precision, flags.device)
        Gradients(regularizers[loss](model, build_parser().parse_args([])), model)(images.to(dtype), labels)
        return torch.cat([p.grad.flatten().double() for p in model.parameters()])

    truth = gradient("fp32", torch.float64)
    return [((gradient(p, torch.float32) - truth).norm() / truth.norm()).item() for p in precisions]


def measured_memory(who: str, arch: str, regularizer: str, flags: argparse.Namespace) -> float:
    step = {"textbook": textbook_step, "ours": our_step}[who](arch, regularizer, flags)
    memory = PeakMemory(flags.device)
    for _ in range(STEPS_FOR_MEMORY):
        step()
    return memory.taken()


def peak_memory(who: str, arch: str, regularizer: str, flags: argparse.Namespace) -> float:
    if flags.device.type == "cuda":
        return measured_memory(who, arch, regularizer, flags)
    command = [sys.executable, __file__, "--memory-of", who, arch, regularizer, "--batch-size", str(flags.batch_size)]
    command += ["--device", str(flags.device)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    archs = ["resnet18", "resnet18lcnn"]
    parser.add_argument("--archs", nargs="*", default=archs, choices=archs)
    parser.add_argument(
        "--regularizers", nargs="+", default=["none", "gnorm", "curvature", "curvature_and_gnorm", "cure"]
    )
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5, help="timings of each variant")
    parser.add_argument("--device", type=cli.device, default="auto")
    parser.add_argument("--memory-of", nargs=3, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    torch.set_flush_denormal(True)  # as in training
    if flags.memory_of:
        print(measured_memory(*flags.memory_of, flags))
        return
    cli.seed_everything(0, strong_determinism=False)
    where = torch.cuda.get_device_name() if flags.device.type == "cuda" else f"{torch.get_num_threads()} threads"
    print(f"torch {torch.__version__}, {where}, batches of {flags.batch_size}, {flags.rounds} rounds")
    for arch in flags.archs:
        compare_with_textbook(arch, flags)
    compare_costs(flags)
    compare_precisions(flags)


if __name__ == "__main__":
    main()
