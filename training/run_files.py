"""The files of one training run, and the rules that keep one run from overwriting another."""

import argparse
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import filelock
import pandas as pd
import torch

from data.datasets import ImageData, datasets
from models.checkpoint import fill_buffers, load_weights, read_checkpoint, save_checkpoint
from regularized_loss import CELoss
from training.epoch import load_optimizer_state, own_state
from utils import distributed
from utils.errors import UsageError, UserError, one_line
from utils.files import make_room, remove_leftovers, write_atomically

# flags that say where and how to run, not what: they may differ when a run is resumed
MACHINE_FLAGS = {"device", "num_threads", "output_dir", "save_every", "download", "resume", "overwrite"}


@dataclass
class Run:
    """A run's files, which docs/training.md describes, and what --resume found in them."""

    checkpoint: Path
    unfinished: Path
    metrics: Path
    picture: Path
    flags: dict  # what the checkpoint records of them
    save_every: int | None = None  # the checkpoint of every so many-th epoch is kept
    resumed_from: Path | None = None  # the checkpoint to go on from
    saved: dict | None = None  # its content
    replaces: bool = False  # with --overwrite, the files are an old run's until the first epoch is saved
    data: dict | None = None  # what the checkpoint records of the data

    @property
    def is_finished(self) -> bool:
        """Whether the run was finished before it was opened."""
        return self.resumed_from == self.checkpoint

    @property
    def data_moved(self) -> bool:
        """Whether the data are elsewhere than where the run that goes on was started."""
        return self.saved["flags"].get("data_dir") != self.flags["data_dir"]

    def epoch_files(self) -> list[Path]:
        """The epochs' checkpoints that are there, this run's or a replaced one's."""
        name = re.compile(re.escape(self.checkpoint.stem) + r"_epoch\d+\.pt")
        return [path for path in self.checkpoint.parent.iterdir() if name.fullmatch(path.name)]

    def check_data(self, data: ImageData) -> None:
        """Note the data; UsageError if the run that goes on was started on others."""
        names = data.class_names
        self.data = {"num_classes": len(names), "class_names": names, "data": data.fingerprint()}
        if self.saved and any(self.saved.get(entry) != self.data[entry] for entry in ("class_names", "data")):
            raise UsageError(
                f"--resume: {self.resumed_from} was started on other data, at {self.saved['flags'].get('data_dir')}; "
                "give that as --data-dir, or another --output-dir"
            )

    def record(self, metrics: list[dict], loss: CELoss, optimizer: torch.optim.SGD, remark: str | None) -> None:
        """Save the epochs done so far. What the run replaces goes only now, when something is in its place."""
        epoch, kept = len(metrics), None
        # models/checkpoint.py says what each entry is
        trained = {name: self.flags[name] for name in ("model_arch", "lcnn", "dataset", "image_size")} | self.data
        trained |= {"model": loss.model.state_dict(), "loss": own_state(loss)}
        trained |= {"flags": self.flags, "epoch": epoch, "metrics": metrics, "remark": remark}
        if self.save_every and epoch % self.save_every == 0:
            # before the epoch counts as done: a killed run keeps it, too
            kept = self.checkpoint.with_name(f"{self.checkpoint.stem}_epoch{epoch}.pt")
            remove_leftovers(kept)
            save_checkpoint(kept, trained)
        finished = epoch == self.flags["num_epochs"]
        new = self.checkpoint if finished else self.unfinished
        save_checkpoint(new, trained if finished else trained | {"optimizer": optimizer.state_dict()})
        old = {self.checkpoint, self.picture, *self.epoch_files()} if self.replaces else set()
        for path in (old | {self.unfinished}) - {new, kept}:
            path.unlink(missing_ok=True)
        self.replaces = False
        self.write_metrics(metrics)

    def write_metrics(self, metrics: list[dict]) -> None:
        """A row for each epoch, as CSV."""
        write_atomically(self.metrics, pd.DataFrame(metrics).to_csv(index=False).encode())


@contextmanager
def open_run(flags: argparse.Namespace, defaults: argparse.Namespace) -> Iterator[Run]:
    """The run that train_models.py's flags describe, with no other process at its files.

    Of several processes all have it, and the first reads and writes the files. A flag that a checkpoint does not record
    is taken to have had its default.

    Raises:
        UserError: if another process trains the run, or its files cannot be written or resumed.
        UsageError: if a run is in the way, or was started with other flags.
    """
    parts = [flags.model_arch.replace(":", ".") + ("lcnn" if flags.lcnn else "")]
    parts += [flags.regularizer] if flags.regularizer != "none" else []
    parts += ["adversarial"] if flags.adversarial_training else []
    name = "_".join([*parts, flags.dataset])
    paths = [flags.output_dir / f"{name}{end}" for end in (".pt", ".unfinished.pt", "_metrics.csv", ".png")]
    recorded = {name: value for name, value in vars(flags).items() if name not in MACHINE_FLAGS}
    recorded["image_size"] = flags.image_size or datasets[flags.dataset].image_size
    recorded["data_dir"] = str(Path(flags.data_dir).resolve())
    run = Run(*paths, recorded, flags.save_every)
    with ExitStack() as stack:
        distributed.from_first(lambda: stack.enter_context(only_process_of(run)))
        run.resumed_from, run.saved = distributed.from_first(lambda: find_saved(run, flags, vars(defaults)))
        run.replaces = flags.overwrite
        yield run


@contextmanager
def only_process_of(run: Run) -> Iterator[None]:
    """Hold the run's lock, which a dying process lets go of; what one left half-written is removed."""
    folder = run.checkpoint.parent
    is_new = not folder.exists()
    make_room(run.checkpoint)
    lock = filelock.FileLock(run.checkpoint.with_name(f".{run.checkpoint.name}.lock"), timeout=0)
    try:
        lock.acquire()
    except (OSError, NotImplementedError) as error:  # from a held lock, or from some network file systems
        problem = f"{lock.lock_file} cannot be locked ({one_line(error)});"
        if isinstance(error, filelock.Timeout):
            problem = f"another process is training {run.checkpoint}; wait for it, or"
        raise UserError(f"{problem} give another --output-dir") from error
    try:
        for file in (run.checkpoint, run.unfinished, run.metrics, run.picture):
            remove_leftovers(file)
        yield
    finally:
        with suppress(OSError):  # the folder may not be writable any more; what went wrong then is said by others
            Path(lock.lock_file).unlink(missing_ok=True)
            if is_new:
                folder.rmdir()  # of a run that was refused; fails unless the folder is empty
        lock.release()


def find_saved(run: Run, flags: argparse.Namespace, defaults: dict) -> tuple[Path | None, dict | None]:
    """Path and content of what --resume finds, or None twice; UsageError if a run is in the way."""
    # both are there if the run was killed just as it finished; its last epoch is then done again
    path = next((path for path in (run.unfinished, run.checkpoint) if path.exists()), None)
    if flags.resume and path:
        try:
            saved = read_checkpoint(path, flags.model_arch)
        except UserError as error:
            raise type(error)(f"{error}, or start again, with --overwrite") from error
        check_resumable(path, saved, run.flags, defaults)
        return path, saved
    if not flags.overwrite:
        if path:
            remedy = "pass --resume to continue that run, --overwrite to replace it, or another --output-dir"
            raise UsageError(f"{path} exists; {remedy}")
        # a kill in the first epoch may leave its own file alone
        for path in (run.metrics, run.picture, *([] if flags.resume else run.epoch_files())):
            if path.exists():
                remedy = "pass --overwrite to replace it, or another --output-dir"
                raise UsageError(f"{path} exists, without its checkpoint; {remedy}")
    return None, None


def check_resumable(path: Path, saved: dict, flags: dict, defaults: dict) -> None:
    """Raise UserError unless the run at ``path`` has these flags, and a row of metrics an epoch.

    Its data_dir may have moved. A flag that is gone, such as a removed loss's weight, is no obstacle.
    """
    theirs = saved.get("flags")
    if theirs is None:
        raise UsageError(f"{path} was not written by train_models.py and cannot be resumed")
    for name, value in sorted(flags.items()):
        its_value = theirs.get(name, defaults.get(name))
        if name != "data_dir" and its_value != value:
            flag = "--" + name.replace("_", "-")
            how, its, own = "with", f"{flag} {its_value}", "without" if value is None else value
            if isinstance(value, bool):
                its, own = (flag if on else f"--no-{flag[2:]}" for on in (its_value, value))
            elif its_value is None:
                how, its, own = "without", flag, f"with {value}"
            raise UsageError(
                f"--resume: {path} was started {how} {its}, not {own}; give the same flags, or another --output-dir"
            )
    rows, epoch = saved["metrics"], saved["epoch"]
    whole = len(rows) == epoch > 0 and all(isinstance(row, dict) and row.keys() == rows[0].keys() for row in rows)
    if not whole or not all(isinstance(value, (int, float)) for row in rows for value in row.values()):
        raise UserError(f"{path}: its metrics are not those of {epoch} epochs; start again, with --overwrite")


def restore(run: Run, loss: CELoss, optimizer: torch.optim.SGD) -> list[dict]:
    """Put back what the run that goes on has saved; returns its metrics, one dict per epoch."""
    if not run.saved:
        return []
    fill_buffers(loss.model, run.saved["model"])
    load_weights(loss.model, run.saved["model"], run.resumed_from, run.saved["model_arch"])
    own = run.saved.get("loss", {})
    try:
        fill_buffers(loss, own)
        state, of_loss = loss.state_dict(), own_state(loss)
        loss.load_state_dict({name: state[name] for name in state.keys() - of_loss.keys()} | own)
        load_optimizer_state(optimizer, run.saved["optimizer"])
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError) as error:
        problem = f"{run.resumed_from}: the state of its loss or optimizer does not fit ({one_line(error)})"
        raise UserError(f"{problem}; start again, with --overwrite") from error
    return run.saved["metrics"]
