"""Progress of long work."""

import sys
import time
from collections.abc import Iterable, Iterator

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 30


def progress(items: Iterable, description: str, total: int, unit: str = "it") -> Iterator:
    """Yield the items under a tqdm bar on a terminal; elsewhere print a plain line to stderr every 30 seconds."""
    if sys.stderr.isatty():
        yield from tqdm(items, desc=description, total=total, unit=unit, leave=False)
        return
    last_line = time.monotonic()
    for count, item in enumerate(items, start=1):
        yield item
        if time.monotonic() - last_line > SECONDS_BETWEEN_LINES:
            print(f"{description}: {count}/{total} {unit}", file=sys.stderr, flush=True)
            last_line = time.monotonic()
