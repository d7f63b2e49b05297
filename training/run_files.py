"""The files of one training run, and the rules that keep one run from overwriting another."""

import argparse
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from data.datasets import ImageData
from utils.errors import UsageError, UserError
from utils.files import make_room, remove_leftovers

# flags that say where and how to run, not what: they are not recorded, and may differ when a run is resumed
MACHINE_FLAGS = {"device", "output_dir", "download", "resume", "overwrite"}


@dataclass(frozen=True)
class RunFiles:
    """Paths of a run: <arch>[_<regularizer>][_adversarial]_<dataset>.pt at its end, ....unfinished.pt after each epoch
    until then. <arch> of package.module:callable has a dot for the colon, and "lcnn" at its end with --lcnn."""

    checkpoint: Path
    unfinished: Path
    metrics: Path
    picture: Path

    @staticmethod
    def named(flags: argparse.Namespace) -> "RunFiles":
        """The files of the run that train_models.py's flags describe; makes the output directory."""
        parts = [flags.model_arch.replace(":", ".") + ("lcnn" if flags.lcnn else "")]
        parts += [flags.regularizer] if flags.regularizer != "none" else []
        parts += ["adversarial"] if flags.adversarial_training else []
        name = "_".join([*parts, flags.dataset])
        directory = flags.output_dir
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"--output-dir {directory} cannot be made a folder ({error.strerror}); name another"
            ) from error
        return RunFiles(
            *(directory / f"{name}{suffix}" for suffix in (".pt", ".unfinished.pt", "_metrics.csv", ".png"))
        )

    def saved(self) -> Path | None:
        """What there is to resume: the unfinished checkpoint, else the finished one, else None.

        Both are there if the run was killed just as it finished; its last epoch is then simply done again.
        """
        return next((path for path in (self.unfinished, self.checkpoint) if path.exists()), None)

    def refuse_to_overwrite(self) -> None:
        """Raise UsageError if a run of this name is there, or a part of one."""
        if path := self.saved():
            raise UsageError(
                f"{path} exists; pass --resume to continue that run, --overwrite to replace it, or another --output-dir"
            )
        for path in (self.metrics, self.picture):
            if path.exists():
                raise UsageError(
                    f"{path} exists, without its checkpoint; pass --overwrite to replace it, or another --output-dir"
                )


@contextmanager
def only_run_of(files: RunFiles) -> Iterator[None]:
    """Hold the run's lock, which a process that dies lets go of; what one left half-written is removed.

    Raises:
        UserError: if another process holds it, or the folder cannot be written.
    """
    path = files.checkpoint.with_name(f".{files.checkpoint.name}.lock")
    while True:
        try:
            lock = open(path, "w")  # noqa: SIM115
        except OSError as error:
            raise UserError(f"{path.parent} cannot be written ({error.strerror}); give another --output-dir") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            lock.close()
            if isinstance(error, BlockingIOError):
                problem = f"another process is training {files.checkpoint}; wait for it, or"
            else:  # some network file systems
                problem = f"{path} cannot be locked ({error.strerror});"
            raise UserError(f"{problem} give another --output-dir") from error
        # one that ended meanwhile may have removed the file that was opened
        if path.exists() and os.fstat(lock.fileno()).st_ino == path.stat().st_ino:
            break
        lock.close()
    try:
        for file in (files.checkpoint, files.unfinished, files.metrics, files.picture):
            remove_leftovers(file)
        make_room(files.checkpoint)
        yield
    finally:
        with suppress(OSError):  # the folder may not be writable any more; what went wrong then is said by others
            path.unlink(missing_ok=True)
        lock.close()


def check_same_flags(path: Path, checkpoint: dict, flags: dict, defaults: dict) -> None:
    """Raise UsageError unless the run at ``path`` was started with these flags; data_dir may have moved.

    A flag that did not exist when the run was started had, in effect, its value in ``defaults``.
    """
    theirs = checkpoint.get("flags")
    if theirs is None:
        raise UsageError(f"{path} was not written by train_models.py and cannot be resumed")
    for name in sorted(theirs.keys() | flags.keys()):
        its_value = theirs.get(name, defaults.get(name))
        if name != "data_dir" and its_value != flags.get(name):
            flag = "--" + name.replace("_", "-")
            raise UsageError(
                f"--resume: {path} was started with {flag} {its_value}, not {flags.get(name)}; "
                "give the same flags, or another --output-dir"
            )


def check_resumable(path: Path, checkpoint: dict) -> None:
    """Raise UserError unless the checkpoint at ``path`` has a row of metrics for every epoch, to go on from."""
    rows, epoch = checkpoint["metrics"], checkpoint["epoch"]
    whole = len(rows) == epoch > 0 and all(isinstance(row, dict) and row.keys() == rows[0].keys() for row in rows)
    if not whole or not all(isinstance(value, (int, float)) for row in rows for value in row.values()):
        raise UserError(f"{path}: its metrics are not those of {epoch} epochs; start again, with --overwrite")


def check_same_data(path: Path, checkpoint: dict, data: ImageData) -> None:
    """Raise UsageError unless the run at ``path`` was trained on these very images, classes and labels."""
    if checkpoint.get("class_names") != data.class_names or checkpoint.get("data") != data.fingerprint():
        raise UsageError(
            f"--resume: {path} was started on other data, at {checkpoint['flags'].get('data_dir')}; "
            "give that as --data-dir, or another --output-dir"
        )
