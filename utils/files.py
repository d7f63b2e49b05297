"""Files that are never half-written, and that are read with suspicion."""

import contextlib
import glob
import os
import tempfile
from pathlib import Path

from utils.errors import UsageError, UserError


def write_atomically(path: Path, content: bytes | memoryview) -> None:
    """Write a temporary neighbour of path, then put it in path's place in one step.

    Whoever reads path finds the old content or the new, never a part; if anything fails the old one stays.

    Raises:
        UserError: if the disk or the folder does not take it.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        remedy = "make room, or name another place that can be written"
        raise UserError(f"{path} could not be written ({error.strerror or error}); {remedy}") from error
    finally:
        with contextlib.suppress(OSError):  # what failed before is to be said, not this
            temporary.unlink(missing_ok=True)


def remove_leftovers(path: Path) -> None:
    """Delete what killed processes left beside path. None may be writing it now."""
    for temporary in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        temporary.unlink(missing_ok=True)


def check_suffix(path: Path, *suffixes: str) -> None:
    """Raise UsageError unless the name of a file to write ends in one of these."""
    if path.suffix not in suffixes:
        raise UsageError(f"{path} must end in {' or '.join(suffixes)}")


def make_room(path: Path) -> None:
    """Make path's folder; UserError unless path can be written, before the work it is to hold is done."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}); name another place") from error
    if path.is_dir():
        raise UserError(f"{path} is a folder; name a file")
