"""Training on several processes: gradients, statistics and the loss's state, the same on all."""

from itertools import chain

import torch
import torch.distributed as dist
from torch import Tensor, nn

from utils.distributed import world_size


@torch.no_grad()
def sum_gradients(loss: nn.Module) -> None:
    """Each gradient becomes its sum over the processes. A parameter that has none on any of them keeps none.

    A loss may freeze and unfreeze parameters at any step, which DistributedDataParallel does not allow.
    """
    if world_size() == 1:
        return
    parameters = list(loss.parameters())
    used = torch.tensor([p.grad is not None for p in parameters], dtype=torch.uint8)  # on the CPU: no GPU has to wait
    dist.all_reduce(used, dist.ReduceOp.MAX)
    parameters = [p for p, is_used in zip(parameters, used.tolist(), strict=True) if is_used]
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    sum_together([parameter.grad for parameter in parameters])


@torch.no_grad()
def average_statistics(loss: nn.Module, share: float) -> None:
    """Average BatchNorms' running statistics over the processes, weighted by their shares of the batch."""
    if world_size() == 1:
        return
    norms = [m for m in loss.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    statistics = [buffer for m in norms if m.training for buffer in (m.running_mean, m.running_var)]
    for buffer in statistics:
        buffer *= share
    sum_together(statistics)


def sum_together(tensors: list[Tensor]) -> None:
    """Each tensor becomes its sum over the processes, all of them sent at once; nothing waits for a GPU."""
    if tensors and world_size() > 1:
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        for tensor, total in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(total.view_as(tensor))


@torch.no_grad()
def equalize(loss: nn.Module, average: bool = False) -> None:
    """Every parameter and buffer becomes the first process's, or, with ``average``, the mean over the processes.

    The mean is for what each process computed from its own part of the batches, a running mean say. What is equal on
    all processes keeps its bits. Integers, such as counters, become the first process's in either case.
    """
    if world_size() == 1:
        return
    for tensor in chain(loss.parameters(), loss.buffers()):
        new = tensor.clone(memory_format=torch.contiguous_format)
        dist.broadcast(new, 0)
        if average and tensor.is_floating_point():
            difference = torch.where(tensor == new, 0, tensor - new)  # 0 of equal infinities, too
            dist.all_reduce(difference)
            new += difference / world_size()
        if not torch.equal(tensor, new):
            tensor.copy_(new)
