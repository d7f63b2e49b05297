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
    """Yield the items under a tqdm bar on a terminal; elsewhere print a plain line to stderr every 30 seconds.

    Both give the rate. ``size`` says how many of the ``total`` units an item is. Of several processes the first shows
    its progress.
    """
    if rank() > 0:
        yield from items
        return
    if sys.stderr.isatty():
        with tqdm(desc=description, total=total, unit=f" {unit}", leave=False) as bar:
            for item in items:
                yield item
                bar.update(size(item))
        return
    start = last_line = time.monotonic()
    done = 0
    for item in items:
        yield item
        done += size(item)
        if time.monotonic() - last_line > SECONDS_BETWEEN_LINES:
            last_line = time.monotonic()
            rate = done / (last_line - start)
            print(f"{description}: {done}/{total} {unit}, {rate:.3g} {unit}/s", file=sys.stderr, flush=True)
