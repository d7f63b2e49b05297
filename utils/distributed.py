"""Work shared between the processes that torchrun starts; alone, a process is number 0 of 1."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist


@contextmanager
def process_group() -> Iterator[None]:
    """Join the other processes, if torchrun started any. What they exchange is small: gloo carries it.

    One may wait long for another's share; a process that fails is noticed by torchrun, which ends the others.
    """
    if not {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys() or os.environ["WORLD_SIZE"] == "1":
        yield
        return
    dist.init_process_group("gloo", timeout=timedelta(days=7))
    try:
        yield
    finally:
        dist.destroy_process_group()


def rank() -> int:
    """This process's number; 0 is the one that prints and writes."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def own_share(items: list) -> list:
    """This process's part of a list that all processes have: every world_size-th item."""
    return items[rank() :: world_size()]


def gather_shares(own: list) -> list:
    """The whole list, in its order, from what every process made of each item of its own share; on every process."""
    if world_size() == 1:
        return own
    shares: list = [None] * world_size()
    dist.all_gather_object(shares, own)
    total = sum(map(len, shares))
    return [shares[i % world_size()][i // world_size()] for i in range(total)]
