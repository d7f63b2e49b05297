"""Work shared between the processes that torchrun starts; alone, a process is number 0 of 1."""

import contextlib
import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

# Imported now, because its default arguments hold the group there is at that moment, and an optimizer imports it later.
# The group would outlive its end, and a thread of gloo that frees tensors while the interpreter exits may abort that.
import torch.distributed.nn.functional

from utils.errors import UsageError, UserError, one_line

T = TypeVar("T")
CPU = torch.device("cpu")
# what gloo and NCCL say when another process is gone or does not answer
LOST = ("Connection closed by peer", "Connection reset by peer", "Timed out waiting", "Broken pipe", "pair closure")
LOST += ("remote process exited", "ncclRemoteError", "Watchdog")


@contextmanager
def process_group(device: torch.device = CPU, timeout: timedelta = timedelta(days=7)) -> Iterator[None]:
    """Join the other processes, if torchrun started any; of what is printed, the first process's is shown.

    gloo carries what lies on the CPU, NCCL what lies on GPUs. torchrun ends the others if one fails.

    Raises:
        UserError: if another process has ended, or did not answer for the timeout.
        UsageError: if this machine's processes would share a GPU.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)  # for what names no device: streams, graphs
    if os.environ.get("WORLD_SIZE", "1") == "1" or not {"RANK", "MASTER_ADDR"} <= os.environ.keys():
        yield
        return
    if device.type == "cuda" and device.index != int(os.environ.get("LOCAL_RANK", 0)):
        raise UsageError(
            f"each process needs a GPU of its own, of {torch.cuda.device_count()} here; "
            "start no more processes than that, and leave --device out"
        )
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=timeout)
    try:
        with contextlib.redirect_stdout(io.StringIO()) if rank() > 0 else contextlib.nullcontext():
            yield
        dist.destroy_process_group()
    except BaseException as error:
        message = f"process {rank()} of {world_size()}: another one has ended or does not answer ({one_line(error)})"
        lost = is_lost_process(error)
        # After an error, destroying an NCCL group deadlocks. Let the exit of the process do it.
        if dist.get_backend() == "gloo":
            dist.destroy_process_group()
        if lost:
            raise UserError(message) from None
        raise


def is_lost_process(error: BaseException) -> bool:
    """Whether the error says that another process is gone."""
    return dist.is_initialized() and isinstance(error, RuntimeError) and any(word in str(error) for word in LOST)


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
    """On every process the whole list, in its order, from what each made of its own share."""
    if world_size() == 1:
        return own
    shares: list = [None] * world_size()
    dist.all_gather_object(shares, own)
    total = sum(map(len, shares))
    return [shares[i % world_size()][i // world_size()] for i in range(total)]


def from_first(make: Callable[[], T]) -> T:
    """On every process what make() returns on the first: for files that only the first need have.

    A UserError that make() raises is raised on the first process; the others end without a word.
    """
    if world_size() == 1:
        return make()
    outcome: list = [None]
    if rank() == 0:
        try:
            outcome = [make()]
        except UserError as error:
            outcome = [error]
    dist.broadcast_object_list(outcome)
    if isinstance(outcome[0], UserError):
        raise outcome[0] if rank() == 0 else SystemExit(outcome[0].exit_code)
    return outcome[0]


@contextmanager
def first_of_machine_first() -> Iterator[None]:
    """Do something, such as a download, on one process of each machine before the others do it."""
    later = world_size() > 1 and os.environ.get("LOCAL_RANK", "0") != "0"
    if later:
        dist.barrier()
    yield
    if world_size() > 1 and not later:
        dist.barrier()


def summed(values: list[float]) -> list[float]:
    """Each value summed over the processes, the same on all of them."""
    if world_size() == 1:
        return values
    sums = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(sums)
    return sums.tolist()
