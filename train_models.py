"""Train a standard or a low-curvature network, with any of the regularized losses.

    python train_models.py --model-arch resnet18lcnn --regularizer curvature_and_gnorm --dataset cifar100

Writes <output-dir>/<arch>[_<regularizer>]_<dataset>.pt, and beside it ..._metrics.csv and ....png.
"""

import argparse
import contextlib
import os
import shlex
import sys
import time
import traceback
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import torch

from data.batches import epoch_seed, to_pixels, training_batches
from data.datasets import datasets, load_dataset
from models.checkpoint import load_weights, read_checkpoint, save_checkpoint
from models.layers import CenteredSoftplus
from models.model_selector import (
    add_architecture_flags,
    build_network,
    check_architecture_flags,
    is_outside,
    model_architecture,
)
from models.outside import forward
from regularized_loss import CELoss, regularizers
from training.attacks import NORMS, PGD, adversarial_batches
from training.epoch import (
    Gradients,
    NonFiniteStep,
    build_optimizer,
    calibrate_batchnorm,
    evaluate,
    is_finite,
    learning_rate,
    load_optimizer_state,
    set_batchnorm_momentum,
    train_epoch,
)
from training.report import count_parameters, format_metrics, write_report
from training.run_files import MACHINE_FLAGS, RunFiles, check_resumable, check_same_data, check_same_flags, only_run_of
from utils import cli, distributed
from utils.errors import UsageError, UserError, one_line
from utils.files import write_csv
from utils.precision import PRECISIONS, check_precision, precision_of_the_process, set_precision
from utils.progress import progress

CALIBRATION_IMAGES = 512


def build_parser() -> argparse.ArgumentParser:
    parser = cli.Parser(prog="train_models.py", description=__doc__.splitlines()[0])

    what = parser.add_argument_group("what to train")
    add_architecture_flags(what, default="resnet18")
    what.add_argument("--regularizer", choices=regularizers, default="none", help="the loss, see regularized_loss.py")
    what.add_argument("--dataset", choices=datasets, default="cifar100", help="digits needs no download")
    what.add_argument(
        "--image-size", type=cli.image_size, help="resize to this, a multiple of 16 (default: 32; digits 16)"
    )

    recipe = parser.add_argument_group("recipe")
    recipe.add_argument("--num-epochs", type=cli.positive_int, default=200, help="passes over the training split")
    recipe.add_argument("--batch-size", type=cli.positive_int, default=128, help="examples per step")
    recipe.add_argument(
        "--lr", type=cli.positive_float, default=0.1, help="initial learning rate; x 0.1 after 75%% and 87.5%%"
    )
    recipe.add_argument("--weight-decay", type=cli.nonnegative_float, default=5e-4, help="not on log beta, log gamma")
    recipe.add_argument("--momentum", type=cli.number(float, 0, 1), default=0.9, help="of SGD")
    recipe.add_argument("--reg-gnorm", type=cli.nonnegative_float, default=1e-3, help="weight of the gradient norm")
    recipe.add_argument("--reg-beta", type=cli.nonnegative_float, default=1e-2, help="weight of the sum of beta")
    recipe.add_argument(
        "--reg-gamma", type=cli.nonnegative_float, default=1e-2, help="weight of the sum of |log gamma|"
    )
    recipe.add_argument(
        "--reg-bound", type=cli.nonnegative_float, default=1e-2, help="weight of the log curvature bound"
    )
    recipe.add_argument(
        "--beta-weight-decay",
        type=cli.nonnegative_float,
        default=0.0,
        help="weight decay on beta, for the minimal recipe with gnorm and a ...softplus network",
    )
    recipe.add_argument(
        "--augment", action=argparse.BooleanOptionalAction, default=True, help="random crops and flips (default: on)"
    )
    recipe.add_argument(
        "--bn-momentum", type=cli.number(float, 0, 1, exclusive=True), default=0.1, help="of BatchNorm's statistics"
    )
    recipe.add_argument(
        "--calibrate-batchnorm",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="set BatchNorm statistics from one batch before the first step; helps short LCNN runs (default: off)",
    )

    adversarial = parser.add_argument_group("adversarial training")
    adversarial.add_argument(
        "--adversarial-training",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="train on images moved by PGD, with any loss (default: off)",
    )
    adversarial.add_argument("--adv-norm", choices=NORMS, default="l2", help="norm of the attack")
    adversarial.add_argument("--adv-eps", type=cli.pixel_distance, default=0.1, help="its radius; may be a fraction")
    adversarial.add_argument("--adv-steps", type=cli.positive_int, default=3, help="its gradient steps")
    adversarial.add_argument("--adv-step-size", type=cli.pixel_distance, default=0.01, help="length of a step")

    files = parser.add_argument_group("files")
    files.add_argument("--data-dir", default="datasets", help="where the data set's files are, or go")
    files.add_argument("--download", action="store_true", help="fetch cifar10, cifar100 or svhn if missing")
    files.add_argument("--output-dir", type=Path, default=Path("saved_models"), help="where the run's files go")
    existing = files.add_mutually_exclusive_group()
    existing.add_argument("--resume", action="store_true", help="continue the run of this name, if there is one")
    existing.add_argument("--overwrite", action="store_true", help="replace the run of this name, if there is one")

    machine = cli.add_shared_flags(parser)
    machine.add_argument(
        "--precision", choices=PRECISIONS, default="fp32", help="of convolutions and matrix products in training"
    )
    machine.add_argument(
        "--strong-determinism-wanted",
        "--strong_determinism_wanted",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="same bits every time on the same machine (default: on)",
    )
    return parser


def build_loss(flags: argparse.Namespace, model: torch.nn.Module) -> CELoss:
    """The loss that --regularizer names, for the model; UsageError if they do not go together."""
    try:
        if flags.beta_weight_decay and not any(isinstance(m, CenteredSoftplus) for m in model.modules()):
            raise ValueError("--beta-weight-decay needs a network with trainable beta: ...softplus, ...lcnn, or --lcnn")
        return regularizers[flags.regularizer](model, flags)
    except ValueError as error:
        raise UsageError(f"--regularizer {flags.regularizer} --model-arch {flags.model_arch}: {error}") from error


def check_flags(flags: argparse.Namespace) -> None:
    """Raise UsageError on flags that do not go together, as far as that can be told before anything is loaded."""
    check_architecture_flags(flags)
    check_precision(flags.precision, flags.device)
    if not is_outside(flags.model_arch):
        build_loss(flags, model_architecture[flags.model_arch](2, input_size=16))


def saved_run(flags: argparse.Namespace, files: RunFiles, recorded_flags: dict) -> tuple[Path, dict] | None:
    """The checkpoint to go on from with its path, if --resume finds one; UsageError if a run is in the way."""
    if flags.resume and (path := files.saved()):
        try:
            checkpoint = read_checkpoint(path)
        except UserError as error:
            raise UserError(f"{error}, or start again, with --overwrite") from error
        check_same_flags(path, checkpoint, recorded_flags, vars(build_parser().parse_args([])))
        check_resumable(path, checkpoint)
        return path, checkpoint
    if not flags.overwrite:
        files.refuse_to_overwrite()
    return None


def train(flags: argparse.Namespace) -> Path:
    """Train as the flags say, and return the path of the finished checkpoint.

    Of several processes all do the work, and the first reads and writes the run's files.

    Raises:
        UserError: on flags, files or data that do not do; what was saved before stays.
    """
    check_flags(flags)
    flags.image_size = flags.image_size or datasets[flags.dataset].image_size
    recorded_flags = {name: value for name, value in vars(flags).items() if name not in MACHINE_FLAGS}
    recorded_flags["data_dir"] = str(Path(flags.data_dir).resolve())
    files = RunFiles.named(flags)
    with contextlib.ExitStack() as stack:
        torch.set_flush_denormal(True)  # a smooth ReLU puts out many, and CPUs are slow with them
        stack.callback(torch.set_flush_denormal, False)  # what is measured later in this process needs them
        stack.enter_context(precision_of_the_process())
        distributed.from_first(lambda: stack.enter_context(only_run_of(files)))
        return train_run(flags, files, recorded_flags)


def train_run(flags: argparse.Namespace, files: RunFiles, recorded_flags: dict) -> Path:
    """``train``, once the flags are checked and no other process touches the run's files."""
    first = distributed.rank() == 0
    outside = is_outside(flags.model_arch)
    path, saved = distributed.from_first(lambda: saved_run(flags, files, recorded_flags)) or (None, None)

    cli.seed_everything(flags.prng_seed, flags.strong_determinism_wanted)
    data = load_dataset(flags.dataset, flags.data_dir, flags.image_size, flags.download).to(flags.device)
    num_classes = len(data.class_names)
    if saved:
        check_same_data(path, saved, data)
        if path == files.checkpoint:
            print(f"{path} is finished: {format_metrics(saved['metrics'][-1])}")
            model = build_network(flags.model_arch, num_classes, flags.image_size, flags.lcnn, quiet=True)
            load_weights(model, saved["model"], path, flags.model_arch)
            if first:
                write_report(files, saved["metrics"], model)  # a kill may have come before it
            return path

    model = build_network(flags.model_arch, num_classes, flags.image_size, flags.lcnn).to(flags.device)
    if outside:
        forward(model, to_pixels(data.train.images[:2]), num_classes, flags.model_arch)  # its mistakes in one line
    set_batchnorm_momentum(model, flags.bn_momentum)
    set_precision(model, flags.precision, flags.device)
    loss = build_loss(flags, model)
    optimizer = build_optimizer(model, flags.lr, flags.momentum, flags.weight_decay, flags.beta_weight_decay)
    print(
        f"{flags.model_arch} ({count_parameters(optimizer)}) with {type(loss).__name__} on {flags.dataset}: "
        f"{len(data.train)} training and {len(data.test)} test images of {flags.image_size} x {flags.image_size}, "
        f"{num_classes} classes; {flags.device}, {flags.precision}, torch {torch.__version__}"
        + (f"; {distributed.world_size()} processes" if distributed.world_size() > 1 else "")
    )

    metrics = []
    if saved:
        load_weights(model, saved["model"], path, flags.model_arch)
        load_optimizer_state(optimizer, saved.get("optimizer"), path)
        metrics = saved["metrics"]
        print(f"resuming {files.unfinished} after epoch {saved['epoch']}")
    elif flags.calibrate_batchnorm:
        order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(flags.prng_seed))
        calibrate_batchnorm(model, to_pixels(data.train.images[order[:CALIBRATION_IMAGES].to(flags.device)]))

    checkpoint = {
        "model_arch": flags.model_arch,
        "lcnn": flags.lcnn,
        "dataset": flags.dataset,
        "num_classes": num_classes,
        "image_size": flags.image_size,
        "class_names": data.class_names,
        "data": data.fingerprint(),
        "flags": recorded_flags,
    }
    attack = PGD(flags.adv_norm, flags.adv_eps, flags.adv_steps, flags.adv_step_size)
    gradients = Gradients(loss, model, find_unused=outside)
    num_steps = -(-len(data.train) // flags.batch_size)
    # without gradients a batch takes a fraction of the memory that it takes in training
    evaluation_batch = min(256, 4 * max(1, flags.batch_size // distributed.world_size()))
    for epoch in range(len(metrics) + 1, flags.num_epochs + 1):
        # a loss that draws random numbers resumes as exactly as the rest; each process draws its own
        torch.manual_seed(epoch_seed(flags.prng_seed, epoch + 1_000_000 * distributed.rank()))
        lr = learning_rate(flags.lr, epoch, flags.num_epochs)
        for group in optimizer.param_groups:
            group["lr"] = lr
        batches = training_batches(
            data.train,
            flags.batch_size,
            flags.prng_seed,
            epoch,
            flags.augment,
            data.flip,
            distributed.rank(),
            distributed.world_size(),
        )
        if flags.adversarial_training:
            batches = adversarial_batches(model, batches, attack)

        start = time.perf_counter()
        try:
            terms = train_epoch(model, gradients, optimizer, progress(batches, f"epoch {epoch}", num_steps, "steps"))
        except NonFiniteStep as error:
            remedy = f"a smaller --lr may help, or look at how {type(loss).__name__} computes it"
            raise UserError(f"epoch {epoch}, {error}; what was saved before it stays; {remedy}") from None
        except Exception as error:  # the user's own code may raise anything
            if not outside or isinstance(error, (UserError, torch.OutOfMemoryError)) or distributed.is_loss(error):
                raise
            if is_of_the_loss_itself(error):
                raise
            remedy = "use layers that can be differentiated as often as it needs, or --lcnn, which replaces some"
            if "deterministic" in str(error):
                remedy = "--no-strong-determinism-wanted may help"
            raise UserError(
                f"{flags.model_arch}: cannot be trained with {type(loss).__name__} ({one_line(error)}); {remedy}"
            ) from error
        seconds = time.perf_counter() - start
        test_loss, test_accuracy = evaluate(model, data.test, evaluation_batch)

        row = {"epoch": epoch, "learning_rate": lr, **terms, "test_loss": test_loss, "test_accuracy": test_accuracy}
        if not is_finite(row):
            raise UserError(
                f"epoch {epoch} ended with {format_metrics(row)}; nothing of it was saved. A smaller --lr may help"
            )
        metrics.append(row | {"seconds": seconds, "images_per_second": len(data.train) / seconds})
        if not first:
            continue
        progress_made = checkpoint | {"epoch": epoch, "metrics": metrics, "model": model.state_dict()}
        if epoch < flags.num_epochs:
            save_checkpoint(files.unfinished, progress_made | {"optimizer": optimizer.state_dict()})
            if flags.overwrite:  # the run it replaces goes only now that something is in its place
                files.checkpoint.unlink(missing_ok=True)
                files.picture.unlink(missing_ok=True)
        else:
            save_checkpoint(files.checkpoint, progress_made)
            files.unfinished.unlink(missing_ok=True)
        flags.overwrite = False  # from here on it would be this run that is lost
        write_csv(files.metrics, metrics)
        print(f"epoch {epoch}/{flags.num_epochs}  {format_metrics(metrics[-1])}", flush=True)
    if first:
        write_report(files, metrics, model)
    print(f"saved {files.checkpoint}, {files.metrics.name}, {files.picture.name}")
    return files.checkpoint


def is_of_the_loss_itself(error: Exception) -> bool:
    """Whether a line of regularized_loss.py is at fault, rather than the network or its derivatives: then whoever wrote
    it needs the traceback."""
    last = traceback.extract_tb(error.__traceback__)[-1].filename
    return not isinstance(error, RuntimeError) and Path(last).name == "regularized_loss.py"


def how_to_go_on(arguments: Sequence[str], flags: argparse.Namespace) -> str:
    """The command that continues an interrupted run; one that was to replace another and has saved nothing starts
    again."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    launcher = [sys.executable]
    if distributed.world_size() > 1:
        launcher += ["-m", "torch.distributed.run", f"--nproc-per-node={local}"]  # torchrun, found or not
    again = [argument for argument in arguments if argument not in ("--overwrite", "--resume")]
    aim, flag = (
        ("start again", "--overwrite") if flags.overwrite else ("go on after the last finished epoch", "--resume")
    )
    return f"to {aim}: {shlex.join([*launcher, str(Path(__file__)), *again, flag])}"


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)

    def command(flags: argparse.Namespace) -> None:
        with distributed.process_group(flags.device, timeout=timedelta(minutes=30)):
            try:
                train(flags)
            except KeyboardInterrupt:
                print(f"\n{how_to_go_on(arguments, flags)}")
                raise

    return cli.run(build_parser(), command, arguments)


if __name__ == "__main__":
    sys.exit(main())
