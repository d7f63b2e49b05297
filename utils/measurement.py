"""Measuring the curvature of a split's examples in batches, on one process or several."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from data.batches import Split, epoch_seed, to_pixels
from models.folding import FoldedNetwork
from utils.curvature import CurvatureEstimate, estimate_curvature
from utils.distributed import gather_shares, own_share
from utils.progress import progress
from utils.results import COLUMNS, Measurement


def example_generators(indices: Tensor, seed: int) -> list[torch.Generator]:
    """A random generator for each example, which only the seed and its position in the split decide: what is estimated
    does not depend on the batch, the order, or the process an example comes in."""
    return [torch.Generator().manual_seed(epoch_seed(seed, index)) for index in indices.tolist()]


def measure_split(
    model: nn.Module | FoldedNetwork,
    split: Split,
    indices: Tensor,
    dtype: torch.dtype,
    batch_size: int,
    seed: int,
    description: str = "",
    **settings,
) -> CurvatureEstimate:
    """estimate_curvature at some examples of a split, batch by batch; every process does its share of the batches.

    Args:
        model: measured as it is: see ``measurable``.
        indices: (n,) the examples' positions in the split.
        dtype: of the model.
        settings: passed on to ``estimate_curvature``.

    Returns:
        The estimate of all n examples in the order of ``indices``, on the CPU, on every process.
    """
    parts = own_share(list(indices.split(batch_size)))
    estimates = []
    for part in progress(parts, description, sum(map(len, parts)), "examples", size=len):
        batch = split[part.to(split.images.device)]
        generators = example_generators(part, seed)
        images = to_pixels(batch.images, dtype)
        estimates.append(estimate_curvature(model, images, batch.labels, generator=generators, **settings).to("cpu"))
    return CurvatureEstimate.concatenate(gather_shares(estimates))


def as_measurement(
    model: str | Path, split: str, indices: Tensor, labels: Tensor, estimate: CurvatureEstimate
) -> Measurement:
    """The columns of a result file, one row per example."""
    columns = {"index": indices, "label": labels}
    columns |= {name: getattr(estimate, name) for name in COLUMNS if name not in columns}
    for k in range(1, estimate.eigenvalues.shape[1]):
        columns[f"eigenvalue_{k + 1}"] = estimate.eigenvalues[:, k]
    if estimate.trace is not None:
        columns |= {"trace": estimate.trace, "trace_error": estimate.trace_error}
    return Measurement(str(model), split, {name: np.asarray(tensor) for name, tensor in columns.items()})
