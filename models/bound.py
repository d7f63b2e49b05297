"""The curvature bound of a trained low-curvature network, layer by layer (paper, Theorem 1).

For f = f_L o ... o f_1 with n_i the output dimension of f_i,
    C_f <= sum_i n_i * max C_{f_i} * prod_{j <= i} Lip(f_j).
Here the f_i with curvature are the centered softplus (C <= b = beta + 1e-3, Lip <= 1) and the cross-entropy; linear
layers only enter the product. Of a residual block's two paths the larger constant counts (see ResidualBlock).

This is the theorem's right-hand side. It shows which layers matter; it is not a certificate for every input: where the
contributions of several units to the gradient cancel, the curvature, a ratio to that gradient, can exceed it.
"""

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor, nn

from models.layers import CenteredSoftplus, LipschitzBatchNorm2d, SpectralNormConv2d
from models.resnet import ResidualBlock, ResNet
from models.vgg import VGG

# of the cross-entropy as a function of the logits: the norm of p - e_y is at most sqrt 2, and so is
# lambda_max(diag p - p p^T) / ||p - e_y|| (sqrt 2 * p_y for two classes; found by search to be no larger for more)
CROSS_ENTROPY_LIPSCHITZ = CROSS_ENTROPY_CURVATURE = math.sqrt(2)


@dataclass(frozen=True)
class LayerRow:
    """An activation with the convolution and BatchNorm that feed it; None for what the layer lacks.

    A shortcut's convolution has no activation of its own, the classifier and the cross-entropy have no BatchNorm.
    """

    name: str  # dotted module path of the activation, shortcut or classifier
    lipschitz: float  # of the map from the network's input to this layer's output
    gamma: float | None = None
    spectral_norm: float | None = None  # of the convolution before its weight is divided by it
    clip: float | None = None  # min(1, s * gamma), see LipschitzBatchNorm2d
    norm_lipschitz: float | None = None  # min(1/s, gamma), of the BatchNorm
    beta: float | None = None  # without the 1e-3
    n: int | None = None  # dimension of the layer's output: channels * height * width
    term: float | None = None  # n * max C * lipschitz; None where there is no curvature

    @property
    def clipped(self) -> bool:
        """Whether gamma limits the BatchNorm; otherwise its own constant 1/s is below gamma."""
        return self.clip is not None and self.clip < 1


@dataclass(frozen=True)
class LayerTable:
    """The layers of one network, from input to loss."""

    rows: tuple[LayerRow, ...]

    @property
    def bound(self) -> float:
        """The right-hand side of Theorem 1 for the loss as a function of the input."""
        return sum(row.term for row in self.rows if row.term is not None)


def require_low_curvature(model: nn.Module) -> None:
    """Raise ValueError unless the model is a low-curvature ResNet or VGG of this program."""
    low_curvature = {SpectralNormConv2d, LipschitzBatchNorm2d, CenteredSoftplus} <= {type(m) for m in model.modules()}
    if not isinstance(model, ResNet | VGG) or not low_curvature:
        raise ValueError(f"not a low-curvature network of this program (such as resnet18lcnn): {type(model).__name__}")


@torch.no_grad()
def layer_table(model: ResNet | VGG) -> LayerTable:
    """beta, gamma and the terms of the curvature bound, as the network has them in eval mode.

    The spectrally normalized convolutions count as Lipschitz constant 1, which they have up to their power iteration.
    The model may be in any mode and on any device; it is not changed.

    Raises:
        ValueError: if the model is not a low-curvature ResNet or VGG of this program.
    """
    require_low_curvature(model)
    # a copy, since in training mode merely reading the classifier's normalized weight changes its power iteration; on
    # the CPU in float64, so that the numbers do not depend on the device
    network = copy.deepcopy(model).cpu().double().eval()
    rows = list(_resnet_rows(network) if isinstance(network, ResNet) else _vgg_rows(network))
    lipschitz = rows[-1].lipschitz
    if isinstance(network, ResNet):
        height, width = network.stages[-1][-1].conv2.conv.u.shape[2:]
        lipschitz /= math.sqrt(height * width)  # the mean over the pixels of each channel
    lipschitz *= torch.linalg.matrix_norm(network.classifier.weight, ord=2).item()
    rows.append(LayerRow("classifier", lipschitz, n=network.classifier.out_features))
    lipschitz *= CROSS_ENTROPY_LIPSCHITZ
    rows.append(LayerRow("cross-entropy", lipschitz, n=1, term=CROSS_ENTROPY_CURVATURE * lipschitz))
    return LayerTable(tuple(rows))


def _resnet_rows(network: ResNet) -> Iterator[LayerRow]:
    lipschitz = _lipschitz(network.stem)
    yield _row("activation", lipschitz, network.stem, network.activation)
    for name, block in network.named_modules():
        if not isinstance(block, ResidualBlock):
            continue
        lipschitz /= math.sqrt(2)  # the block divides its input by sqrt 2
        first = _lipschitz(block.conv1)
        yield _row(f"{name}.activation1", lipschitz * first, block.conv1, block.activation1)
        shortcut = 1.0
        if not isinstance(block.shortcut, nn.Identity):
            shortcut = _lipschitz(block.shortcut)
            yield _row(f"{name}.shortcut", lipschitz * shortcut, block.shortcut)
        lipschitz *= max(first * _lipschitz(block.conv2), shortcut)
        yield _row(f"{name}.activation2", lipschitz, block.conv2, block.activation2)


def _vgg_rows(network: VGG) -> Iterator[LayerRow]:
    lipschitz = 1.0
    for (_, layer), (name, activation) in pairwise(network.features.named_children()):
        if isinstance(activation, CenteredSoftplus):  # the poolings in between have Lipschitz constant 1
            lipschitz *= _lipschitz(layer)
            yield _row(f"features.{name}", lipschitz, layer, activation)


def log_curvature_bound(model: ResNet | VGG) -> Tensor:
    """log of the right-hand side of Theorem 1 from beta and gamma alone: a scalar to minimize, differentiable in both.

    As ``layer_table`` has it, but every BatchNorm counts with gamma, whether it is clipped or not, and every linear
    layer with 1 (in a VGG the classifier too). A logsumexp of the terms' logarithms: the terms themselves overflow.

    Raises:
        ValueError: if the model is not a low-curvature ResNet or VGG of this program.
    """
    require_low_curvature(model)
    log_terms, log_lipschitz = [], torch.zeros((), device=next(model.parameters()).device)

    def add_term(layer: nn.Sequential, activation: CenteredSoftplus, log_lipschitz: Tensor) -> None:
        n = layer.conv.u.numel()
        log_terms.append(math.log(n) + (activation.beta + activation.BETA_OFFSET).log() + log_lipschitz)

    if isinstance(model, ResNet):
        log_lipschitz = log_lipschitz + model.stem.norm.log_gamma
        add_term(model.stem, model.activation, log_lipschitz)
        for block in (module for module in model.modules() if isinstance(module, ResidualBlock)):
            log_lipschitz = log_lipschitz - math.log(2) / 2
            first, second = block.conv1.norm.log_gamma, block.conv2.norm.log_gamma
            add_term(block.conv1, block.activation1, log_lipschitz + first)
            identity = isinstance(block.shortcut, nn.Identity)
            shortcut = torch.zeros_like(first) if identity else block.shortcut.norm.log_gamma
            log_lipschitz = log_lipschitz + torch.maximum(first + second, shortcut)
            add_term(block.conv2, block.activation2, log_lipschitz)
        pooled_pixels = model.stages[-1][-1].conv2.conv.u[0, 0].numel()
        log_lipschitz = log_lipschitz - math.log(pooled_pixels) / 2
    else:
        for layer, activation in pairwise(model.features):
            if isinstance(activation, CenteredSoftplus):
                log_lipschitz = log_lipschitz + layer.norm.log_gamma
                add_term(layer, activation, log_lipschitz)
    log_terms.append(math.log(CROSS_ENTROPY_CURVATURE * CROSS_ENTROPY_LIPSCHITZ) + log_lipschitz)
    return torch.stack(log_terms).logsumexp(dim=0)


def _lipschitz(layer: nn.Sequential) -> float:
    """min(1/s, gamma), the Lipschitz constant of a convolution of norm 1 and its BatchNorm."""
    s = (layer.norm.running_var.min() + layer.norm.eps).sqrt()
    return min(1 / s.item(), layer.norm.log_gamma.exp().item())


def _row(name: str, lipschitz: float, layer: nn.Sequential, activation: CenteredSoftplus | None = None) -> LayerRow:
    """The row of a convolution and BatchNorm, and of the activation behind them if there is one."""
    row = LayerRow(
        name,
        lipschitz,
        gamma=layer.norm.log_gamma.exp().item(),
        spectral_norm=layer.conv.spectral_norm().item(),
        clip=layer.norm.clip().item(),
        norm_lipschitz=_lipschitz(layer),
        n=layer.conv.u.numel(),  # u has the shape of the convolution's output
    )
    if activation is None:
        return row
    beta = activation.beta.item()
    return replace(row, beta=beta, term=row.n * (beta + activation.BETA_OFFSET) * lipschitz)


def format_layers(table: LayerTable, measured_maximum: float | None = None) -> str:
    """The table for a terminal, at most 110 columns, and the bound below it.

    "Lip BN" is the BatchNorm's Lipschitz constant, "Lip" that of the whole map from the input up to the layer; "clip"
    is off where gamma does not limit the BatchNorm, and "-" stands for what a layer lacks.

    Args:
        measured_maximum: the largest normalized curvature measured for the same network, if any was.
    """
    width = max(len(row.name) for row in table.rows)
    titles = ("beta", "gamma", "conv norm", "clip", "Lip BN", "Lip", "n", "term")
    lines = [f"{'layer':<{width}}" + "".join(f"{title:>10}" for title in titles)]
    for row in table.rows:
        clip = row.clip if row.clipped or row.clip is None else "off"
        values = (row.beta, row.gamma, row.spectral_norm, clip, row.norm_lipschitz, row.lipschitz, row.n, row.term)
        lines.append(f"{row.name:<{width}}" + "".join(f"{_cell(value):>10}" for value in values))
    measured = "" if measured_maximum is None else f"; largest curvature measured {measured_maximum:.3g}"
    legend = "Lip BN: of the BatchNorm, min(1/s, gamma); Lip: from the pixels to here; term: n * (beta + 1e-3) * Lip"
    return "\n".join([*lines, legend, f"sum of the terms, the bound: {table.bound:.3g}{measured}"])


def _cell(value: float | str | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else str(value)
