"""Training on several processes: gradients and running statistics of the whole batch."""

import warnings
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from utils.distributed import world_size


@torch.no_grad()
def average_statistics(model: nn.Module, share: float) -> None:
    """Every BatchNorm's running statistics become their mean over the processes, weighted by their shares, which sum
    to 1: those of the whole batch's parts."""
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
def equalize_buffers(model: nn.Module) -> None:
    """Every buffer becomes the first process's: what each computed from the same numbers may differ by a rounding."""
    if world_size() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


class ComputeLoss(nn.Module):
    """A loss as a module whose forward is compute_loss, for DistributedDataParallel.

    To wrap the loss rather than the model leaves ``loss.model`` the network it is, and lets compute_loss apply it as
    often as it likes before the one backward pass that DistributedDataParallel expects.
    """

    def __init__(self, loss, model: nn.Module):
        super().__init__()
        self.loss, self.model = loss, model

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        return self.loss.compute_loss(images, labels)


def data_parallel(loss, model: nn.Module, find_unused: bool = False) -> Callable[[Tensor, Tensor], Tensor]:
    """loss.compute_loss; with several processes one whose backward pass averages the model's gradients over them.

    The parameters and buffers of all processes become the first one's. find_unused is for a model with parameters that
    the loss may not depend on.
    """
    if world_size() == 1:
        return loss.compute_loss
    equalize_buffers(model)
    with warnings.catch_warnings():  # newer versions of torch call broadcast_buffers forward_sync_buffers
        warnings.simplefilter("ignore", FutureWarning)
        return nn.parallel.DistributedDataParallel(
            ComputeLoss(loss, model),
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
            find_unused_parameters=find_unused,
        )
