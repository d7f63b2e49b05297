"""Files that are never half-written, and that are read with suspicion."""

import csv
import io
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import torch

from utils.errors import UserError


def read_tensors(path: Path, kind: str, remedy: str):
    """What torch.save wrote at path, on the CPU; nothing but tensors and plain values is let in.

    Args:
        kind: what the file is to hold, for messages: "checkpoint", "weights".
        remedy: what to do about a damaged one.

    Raises:
        UserError: if there is no such file, or it is damaged or holds something else.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such {kind} file")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (
        Exception
    ) as error:  # a damaged file makes torch raise RuntimeError, UnpicklingError, EOFError, KeyError, ...
        readable = f"readable {kind}" if kind.endswith("s") else f"a readable {kind}"
        raise UserError(
            f"{path}: not {readable}: truncated, damaged, or not plain tensors ({type(error).__name__}); {remedy}"
        ) from error


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Call write(binary file) on a temporary neighbour of path, then put it in path's place in one step.

    Whoever reads path finds the old content or the new, never a part; if anything fails the old one stays.

    Raises:
        UserError: if the disk or the folder does not take it.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        remedy = "make room, or name another place that can be written"
        raise UserError(f"{path} could not be written ({error.strerror or error}); {remedy}") from error
    finally:
        temporary.unlink(missing_ok=True)


def make_room(path: Path) -> None:
    """Raise UserError unless path can be written, before the work it is to hold is done; its folder is made."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}); name another place") from error
    if path.is_dir():
        raise UserError(f"{path} is a folder; name a file")


def write_csv(path: Path, rows: list[dict]) -> None:
    """Rows with the same keys as a CSV with one header; written atomically."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, lambda file: file.write(text.getvalue().encode()))
