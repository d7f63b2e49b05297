"""Files that are never half-written."""

import csv
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from utils.errors import UserError


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


def write_csv(path: Path, rows: list[dict]) -> None:
    """Rows with the same keys as a CSV with one header; written atomically."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, lambda file: file.write(text.getvalue().encode()))
