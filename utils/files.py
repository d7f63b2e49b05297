"""Files that are never half-written, and that are read with suspicion."""

import contextlib
import csv
import glob
import io
import os
import tempfile
import zipfile
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
        check_archive(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
        check_tensors(content)
        return content
    except Exception as error:  # of a damaged file torch raises RuntimeError, UnpicklingError, EOFError, KeyError, ...
        readable = f"readable {kind}" if kind.endswith("s") else f"a readable {kind}"
        raise UserError(
            f"{path}: not {readable}: truncated, damaged, or not plain tensors ({type(error).__name__}); {remedy}"
        ) from error


def check_archive(path: Path) -> None:
    """Raise ValueError if a zip file, which torch.save writes, is damaged or unpacks to more than it holds.

    torch itself lets flipped bits in tensors pass, and unpacks what is compressed, zeros a thousandfold.
    """
    if not zipfile.is_zipfile(path):  # as older versions of torch wrote
        return
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
        if any(record.compress_type != zipfile.ZIP_STORED for record in records):
            raise ValueError("compressed")
        if sum(record.file_size for record in records) > path.stat().st_size:
            raise ValueError("records that overlap")
        if damaged := archive.testzip():
            raise ValueError(f"{damaged} has another checksum")


def check_tensors(content) -> None:
    """Raise ValueError unless every tensor in nested dicts and lists is plain: dense, with its numbers in the file.

    Each is looked into once: of forty lists that hold the next one twice the last would be met 2^40 times.
    """
    to_do, seen = [content], set()
    while to_do:
        item = to_do.pop()
        if isinstance(item, torch.Tensor):
            if item.layout != torch.strided or item.device.type != "cpu":
                raise ValueError(f"a tensor of {item.layout} on {item.device}")
            if item.numel() * item.itemsize > item.untyped_storage().nbytes():
                raise ValueError(f"a tensor of shape {tuple(item.shape)} that is larger than its storage")
        elif isinstance(item, (dict, list, tuple)) and id(item) not in seen:
            seen.add(id(item))
            to_do += item.values() if isinstance(item, dict) else item


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Call write(binary file) on a temporary neighbour of path, then put it in path's place in one step.

    Whoever reads path finds the old content or the new, never a part; if anything fails the old one stays.

    Raises:
        UserError: if the disk or the folder does not take it.
    """
    temporary = path.with_name(temporary_name(path, str(os.getpid())))
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        reason = error
        while isinstance(reason, RuntimeError):  # torch.save stumbles over its own end of file after a failed write,
            reason = reason.__context__  # and after Ctrl-C
        if isinstance(reason, KeyboardInterrupt):
            raise reason from None
        if not isinstance(reason, OSError):
            raise
        remedy = "make room, or name another place that can be written"
        raise UserError(f"{path} could not be written ({reason.strerror or reason}); {remedy}") from error
    finally:
        with contextlib.suppress(OSError):  # what failed before is to be said, not this
            temporary.unlink(missing_ok=True)


def temporary_name(path: Path, process: str) -> str:
    return f".{path.name}.{process}.tmp"


def remove_leftovers(path: Path) -> None:
    """Delete what processes that were killed while they wrote path left beside it. None may be writing it now."""
    for temporary in path.parent.glob(temporary_name(Path(glob.escape(path.name)), "*")):
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
