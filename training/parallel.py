"""Training on several processes: gradients and running statistics of the whole batch."""

import warnings

import torch
import torch.distributed as dist
from torch import nn

from models.model_selector import OUR_NETWORKS
from utils.distributed import world_size


def data_parallel(loss: nn.Module) -> nn.Module:
    """The loss; with several processes one whose backward pass averages the gradients over them.

    The parameters and buffers of all processes become the first one's. Because the loss is wrapped, not the network,
    compute_loss may apply that more than once.
    """
    if world_size() == 1:
        return loss
    equalize_buffers(loss)
    # ours use every parameter in every step; to look for unused ones takes time
    own = len(list(loss.parameters())) - len(list(loss.model.parameters()))
    find_unused = own > 0 or not isinstance(loss.model, OUR_NETWORKS)
    with warnings.catch_warnings():  # newer versions of torch call broadcast_buffers forward_sync_buffers
        warnings.simplefilter("ignore", FutureWarning)
        return nn.parallel.DistributedDataParallel(
            loss, broadcast_buffers=False, gradient_as_bucket_view=True, find_unused_parameters=find_unused
        )


@torch.no_grad()
def average_statistics(model: nn.Module, share: float) -> None:
    """Average the running statistics of every BatchNorm over the processes, weighted by their shares of the batch."""
    if world_size() == 1:
        return
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    statistics = [buffer for norm in norms for buffer in (norm.running_mean, norm.running_var)]
    if not statistics:
        return
    flat = torch.cat([buffer.flatten() for buffer in statistics]) * share
    dist.all_reduce(flat)
    for buffer, mean in zip(statistics, flat.split([buffer.numel() for buffer in statistics]), strict=True):
        buffer.copy_(mean.view_as(buffer))


@torch.no_grad()
def equalize_buffers(loss: nn.Module) -> None:
    """Every buffer becomes the first process's: what each computed from the same numbers may differ by a rounding."""
    if world_size() > 1:
        for buffer in loss.buffers():
            dist.broadcast(buffer, 0)
