"""Train a standard or a low-curvature network, with any of the regularized losses.

python train_models.py --model-arch resnet18lcnn --regularizer curvature_and_gnorm --dataset cifar100
"""

import argparse
import math
import os
import shlex
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import torch
from torch import nn

from curvature.results import QUANTITIES
from curvature.self_check import check_model
from curvature.subjects import EXAMPLES_TO_CHECK
from data.batches import epoch_seed, to_pixels, training_batches
from data.datasets import ImageData, datasets, load_dataset
from models.checkpoint import build_model
from models.layers import CenteredSoftplus
from models.model_selector import OUR_NETWORKS, add_architecture_flags, build_network, check_architecture_flags
from models.outside import check_training, try_forward
from regularized_loss import WEIGHTS, CELoss, regularizers
from training.attacks import NORMS, PGD, adversarial_batches
from training.epoch import (
    TrainingStep,
    build_optimizer,
    calibrate_batchnorm,
    evaluate,
    failures_in_one_line,
    learning_rate,
    train_epoch,
    unregistered,
)
from training.report import describe, format_metrics, mean_curvature, plot_training, remark_on_chance
from training.run_files import Run, open_run, restore
from utils import cli, distributed
from utils.errors import UsageError, UserError
from utils.numerics import seed_everything
from utils.precision import PRECISIONS, autocast_to_bfloat16, check_precision, training_settings
from utils.progress import progress

CALIBRATION_IMAGES = 512


def build_parser() -> argparse.ArgumentParser:
    parser = cli.Parser(prog="train_models.py", description=__doc__.splitlines()[0])
    on_off = argparse.BooleanOptionalAction

    group = parser.add_argument_group("what to train")
    add_architecture_flags(group, default="resnet18")
    flag = group.add_argument
    flag("--regularizer", choices=regularizers, default="none", help="the loss, see regularized_loss.py")
    flag("--dataset", choices=datasets, default="cifar100", help="digits needs no download")
    flag("--image-size", type=cli.positive_int, help="resize to this; ours: a multiple of 16 (default: 32; digits 16)")

    flag = parser.add_argument_group("recipe").add_argument
    flag("--num-epochs", type=cli.positive_int, default=200, help="passes over the training split")
    flag("--batch-size", type=cli.positive_int, default=128, help="examples per step")
    flag("--lr", type=cli.positive_float, default=0.1, help="initial learning rate; x 0.1 after 75%% and 87.5%%")
    flag("--weight-decay", type=cli.nonnegative_float, default=5e-4, help="not on log beta, log gamma, a loss's own")
    flag("--momentum", type=cli.number(float, 0, 1), default=0.9, help="of SGD")
    for name, (default, explanation) in WEIGHTS.items():
        explanation = explanation.replace("%", "%%")  # or argparse would format it
        flag(f"--{name.replace('_', '-')}", type=cli.nonnegative_float, default=default, help=explanation)
    growing = "the penalties' weights grow from 0 in the first epoch to their full size after so many"
    flag("--reg-warmup", type=cli.nonnegative_float, default=0.0, metavar="EPOCHS", help=growing)
    minimal = "weight decay on beta, for the minimal recipe with gnorm and a ...softplus network"
    flag("--beta-weight-decay", type=cli.nonnegative_float, default=0.0, help=minimal)
    flag("--augment", action=on_off, default=True, help="random crops and flips (default: on)")
    flag("--bn-momentum", type=cli.fraction, help="of BatchNorm's statistics (default: the network's; ours have 0.1)")
    first = "set BatchNorm statistics from one batch first; helps short LCNN runs (default: off)"
    flag("--calibrate-batchnorm", action=on_off, default=False, help=first)

    flag = parser.add_argument_group("adversarial training").add_argument
    flag("--adversarial-training", action=on_off, default=False, help="on images moved by PGD (default: off)")
    flag("--adv-norm", choices=NORMS, default="l2", help="norm of the attack")
    flag("--adv-eps", type=cli.pixel_distance, default=0.1, help="its radius; may be a fraction")
    flag("--adv-steps", type=cli.positive_int, default=3, help="its gradient steps")
    flag("--adv-step-size", type=cli.pixel_distance, default=0.01, help="length of a step")

    flag = parser.add_argument_group("watching").add_argument
    measuring = "add the mean curvature of N test images to each epoch's metrics"
    flag("--measure-curvature", type=cli.positive_int, metavar="N", help=measuring)
    flag("--save-every", type=cli.positive_int, metavar="K", help="keep every K-th epoch, as ..._epoch<k>.pt")

    group = parser.add_argument_group("files")
    flag, existing = group.add_argument, group.add_mutually_exclusive_group().add_argument
    flag("--data-dir", default="datasets", help="where the data set's files are, or go")
    flag("--download", action="store_true", help="fetch cifar10, cifar100 or svhn if missing")
    flag("--output-dir", type=Path, default=Path("saved_models"), help="where the run's files go")
    existing("--resume", action="store_true", help="continue the run of this name, if there is one")
    existing("--overwrite", action="store_true", help="replace the run of this name, if there is one")

    flag = cli.add_shared_flags(parser).add_argument
    flag("--precision", choices=PRECISIONS, default="fp32", help="of convolutions and matrix products in training")
    names = "--strong-determinism-wanted", "--strong_determinism_wanted"
    flag(*names, action=on_off, default=True, help="same bits every time on the same machine (default: on)")
    return parser


def check_flags(flags: argparse.Namespace) -> None:
    """Raise UsageError on flags that do not go together, before anything is loaded."""
    check_architecture_flags(flags)
    check_precision(flags.precision, flags.device)


def train(flags: argparse.Namespace, arguments: Sequence[str] | None = None) -> Path:
    """Train as the flags say, and return the path of the finished checkpoint.

    Args:
        arguments: the command line, if train_models.py is it; an interruption prints the one that goes on.

    Raises:
        UserError: on flags, files or data that do not do; what was saved before stays.
    """
    check_flags(flags)
    settings = training_settings(flags.precision, flags.strong_determinism_wanted)
    with settings, open_run(flags, defaults=build_parser().parse_args([])) as run:
        try:
            if not run.is_finished or run.data_moved:
                size = run.flags["image_size"]
                data = load_dataset(flags.dataset, flags.data_dir, size, flags.download).to(flags.device)
                run.check_data(data)
            if run.is_finished:
                print(f"{run.checkpoint} is finished: {format_metrics(run.saved['metrics'][-1])}")
                if remark := run.saved.get("remark"):
                    print(remark)
                if distributed.rank() == 0:  # a kill may have come before them
                    run.write_metrics(run.saved["metrics"])
                    plot_training(run, run.saved["metrics"], build_model(run.saved, run.resumed_from, flags.model_arch))
            else:
                train_run(flags, run, data, build_loss(flags, build_trained_network(flags, data)))
        except KeyboardInterrupt:
            if arguments is not None:
                print(f"\n{how_to_go_on(arguments, start_again=run.replaces)}")
            raise
    return run.checkpoint


def build_trained_network(flags: argparse.Namespace, data: ImageData) -> nn.Module:
    """The network to train, on its device, with its first weights."""
    seed_everything(flags.prng_seed)
    num_classes = len(data.class_names)
    network = build_network(flags.model_arch, num_classes, data.train.images.shape[-1], flags.lcnn)
    if (dtype := next(network.parameters(), torch.empty(0)).dtype) != torch.float32:
        print(f"{flags.model_arch}: weights of {dtype} are trained in float32")
        network.float()
    network = network.to(flags.device)
    images = to_pixels(data.train.images[:2])
    try_forward(network, images, num_classes, flags.model_arch)
    if not isinstance(network, OUR_NETWORKS):
        check_training(network, images, num_classes, flags.model_arch)
    if flags.measure_curvature:
        check_model(network, to_pixels(data.test.images[:EXAMPLES_TO_CHECK]), num_classes, flags.model_arch)
    if not isinstance(network, OUR_NETWORKS):  # after check_model, to which the logits' dtype tells their rounding
        network.register_forward_hook(lambda module, inputs, logits: logits.float())  # it may have autocast inside
    for module in network.modules() if flags.bn_momentum else ():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = flags.bn_momentum
    if flags.calibrate_batchnorm:
        order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(flags.prng_seed))
        calibrate_batchnorm(network, to_pixels(data.train.images[order[:CALIBRATION_IMAGES].to(flags.device)]))
    return network


def build_loss(flags: argparse.Namespace, network: nn.Module) -> CELoss:
    """The loss that --regularizer names, on the network; UsageError if they do not go together."""
    try:
        if flags.beta_weight_decay and not any(isinstance(m, CenteredSoftplus) for m in network.modules()):
            raise ValueError("--beta-weight-decay needs a network with trainable beta: ...softplus, ...lcnn, or --lcnn")
        if flags.precision == "bf16":
            autocast_to_bfloat16(network, flags.device.type)  # before the loss makes copies of it
        loss = regularizers[flags.regularizer](network, flags)
    except ValueError as error:
        raise UsageError(f"--regularizer {flags.regularizer} --model-arch {flags.model_arch}: {error}") from error
    name = f"--regularizer {flags.regularizer}: {type(loss).__name__}"
    if not isinstance(loss, CELoss):
        raise UsageError(f"{name} must extend CELoss to be trained")
    if hidden := unregistered(loss):
        remedy = "use nn.Parameter or nn.ParameterList for tensors, a submodule or nn.ModuleList for networks"
        raise UsageError(f"{name} would neither train nor save {min(hidden)}; {remedy}")
    return loss.to(flags.device)


def train_run(flags: argparse.Namespace, run: Run, data: ImageData, loss: CELoss) -> None:
    """The epochs that are left, each saved when it is done; then the report."""
    optimizer = build_optimizer(loss, flags.lr, flags.momentum, flags.weight_decay, flags.beta_weight_decay)
    metrics = restore(run, loss, optimizer)
    print(describe(flags, run, data, loss))
    step = TrainingStep(loss)
    for epoch in range(len(metrics) + 1, flags.num_epochs + 1):
        metrics.append(train_one_epoch(flags, epoch, data, step, optimizer))
        if distributed.rank() == 0:
            # after three epochs it had time to learn something, and time is left to stop it if it did not
            remark = remark_on_chance(metrics[-1], data, flags, loss) if epoch in (3, flags.num_epochs) else None
            run.record(metrics, loss, optimizer, remark)
            print(f"epoch {epoch}/{flags.num_epochs}  {format_metrics(metrics[-1])}", flush=True)
            if remark:
                print(remark, flush=True)
    if distributed.rank() == 0:
        plot_training(run, metrics, loss.model)
    print(f"saved {run.checkpoint}, {run.metrics.name}, {run.picture.name}")


def train_one_epoch(
    flags: argparse.Namespace, epoch: int, data: ImageData, step: TrainingStep, optimizer: torch.optim.SGD
) -> dict[str, float]:
    """Train on every training image once, and evaluate on the test images; returns a row of the metrics."""
    loss, world_size = step.loss, distributed.world_size()
    for part in loss.modules():
        if isinstance(part, CELoss):  # a loss may be made of others
            part.epoch, part.num_epochs, part.warmup_epochs = epoch, flags.num_epochs, flags.reg_warmup
    # what a loss draws at random resumes exactly, too; each process draws its own
    seed_everything(epoch_seed(flags.prng_seed, epoch + 1_000_000 * distributed.rank()))
    lr = learning_rate(flags.lr, epoch, flags.num_epochs)
    for group in optimizer.param_groups:
        group["lr"] = lr
    part = {"rank": distributed.rank(), "world_size": world_size}
    batches = training_batches(data.train, flags.batch_size, flags.prng_seed, epoch, flags.augment, data.flip, **part)
    if flags.adversarial_training:
        attack = PGD(flags.adv_norm, flags.adv_eps, flags.adv_steps, flags.adv_step_size)
        batches = adversarial_batches(loss.model, batches, attack)
    num_steps = -(-(len(data.train) - 1) // flags.batch_size)  # a single last example joins the batch before
    start = time.perf_counter()
    with failures_in_one_line(flags.model_arch, loss, epoch):
        terms = train_epoch(step, optimizer, progress(batches, f"epoch {epoch}", num_steps, "steps"))
    seconds = time.perf_counter() - start
    # without gradients a batch takes a fraction of the memory
    evaluation_batch = min(256, 4 * max(1, flags.batch_size // world_size))
    test_loss, test_accuracy = evaluate(loss.model, data.test, evaluation_batch)
    row = {"epoch": epoch, "learning_rate": lr, **terms, "test_loss": test_loss, "test_accuracy": test_accuracy}
    if not all(math.isfinite(value) for value in row.values()):
        raise UserError(f"epoch {epoch} ended with {format_metrics(row)}; it was not saved. A smaller --lr may help")
    if flags.measure_curvature:
        if taken := terms.keys() & QUANTITIES.keys():
            raise UsageError(f"{type(loss).__name__} has a term {min(taken)!r}, as --measure-curvature has; rename it")
        row |= mean_curvature(loss.model, data, flags)
    return row | {"seconds": seconds, "images_per_second": len(data.train) / seconds}


def how_to_go_on(arguments: Sequence[str], start_again: bool) -> str:
    """The command that continues an interrupted run, or starts one again that has saved nothing."""
    launcher = [sys.executable]
    if distributed.world_size() > 1:  # torchrun, found or not
        launcher += ["-m", "torch.distributed.run", f"--nproc-per-node={os.environ.get('LOCAL_WORLD_SIZE', 1)}"]
    again = [argument for argument in arguments if argument not in ("--overwrite", "--resume")]
    aim, flag = ("start again", "--overwrite") if start_again else ("go on after the last finished epoch", "--resume")
    return f"to {aim}: {shlex.join(launcher)} {cli.own_command(how_to_go_on, [*again, flag])}"


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)

    def command(flags: argparse.Namespace) -> None:
        with distributed.process_group(flags.device, timeout=timedelta(minutes=30)):
            train(flags, arguments)

    return cli.run(build_parser(), command, arguments, shares_work=True)


if __name__ == "__main__":
    sys.exit(main())
