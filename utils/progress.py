"""Progress of long work."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator

from tqdm import tqdm

from utils.distributed import rank

SECONDS_BETWEEN_LINES = 30


def progress(
    items: Iterable, description: str, total: int, unit: str = "it", size: Callable[..., int] = lambda item: 1
) -> Iterator:
    """Yield the items under a tqdm bar on a terminal; elsewhere print a line to stderr every 30 seconds.

    ``size`` says how many of the ``total`` units an item is. Of several processes the first shows its progress.
    """
    first = rank() == 0
    start = last_line = time.monotonic()
    done = 0
    with tqdm(desc=description, total=total, unit=f" {unit}", leave=False, disable=None if first else True) as bar:
        for item in items:
            yield item
            bar.update(size(item))
            done += size(item)
            if first and bar.disable and time.monotonic() - last_line > SECONDS_BETWEEN_LINES:
                last_line = time.monotonic()
                rate = done / (last_line - start)
                print(f"{description}: {done}/{total} {unit}, {rate:.3g} {unit}/s", file=sys.stderr, flush=True)
