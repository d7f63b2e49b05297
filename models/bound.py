"""The curvature bound of a trained low-curvature network, layer by layer (paper, Theorem 1).

For f = f_L o ... o f_1 with n_i the output dimension of f_i,
    C_f <= sum_i n_i * max C_{f_i} * prod_{j <= i} Lip(f_j).
The centered softplus (C <= b = beta + 1e-3, Lip <= 1) and the cross-entropy have curvature; linear layers only enter
the product. It is no certificate: where contributions to the gradient cancel, the curvature can exceed the bound.
"""

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from models.layers import CenteredSoftplus, LipschitzBatchNorm2d, SpectralNormConv2d
from models.resnet import ResidualBlock, ResNet
from models.vgg import VGG

# of the logits: the norm of p - e_y is at most sqrt 2, and so is lambda_max(diag p - p p^T) / ||p - e_y||
# (sqrt 2 * p_y for two classes; found by search to be no larger for more)
CROSS_ENTROPY_LIPSCHITZ = CROSS_ENTROPY_CURVATURE = math.sqrt(2)


@dataclass(frozen=True)
class LayerRow:
    """An activation with its convolution and BatchNorm; None for what the layer lacks."""

    name: str  # dotted module path of the activation, shortcut or classifier
    lipschitz: float  # of the map from the network's input to this layer's output
    gamma: float | None = None
    spectral_norm: float | None = None  # of the convolution before its weight is divided by it
    clip: float | None = None  # min(1, s * gamma); below 1 gamma limits the BatchNorm
    norm_lipschitz: float | None = None  # min(1/s, gamma), of the BatchNorm
    beta: float | None = None  # without the 1e-3
    n: int | None = None  # dimension of the layer's output: channels * height * width
    term: float | None = None  # n * max C * lipschitz; None where there is no curvature


@dataclass(frozen=True)
class LayerTable:
    """The layers of one network, from input to loss."""

    rows: tuple[LayerRow, ...]

    @property
    def bound(self) -> float:
        """The right-hand side of Theorem 1 for the loss as a function of the input."""
        return sum(row.term for row in self.rows if row.term is not None)


def walk(model: ResNet | VGG, log_constant: Callable[[nn.Sequential], Tensor]) -> Iterator[tuple]:
    """Yield (name, layer, activation, log_lipschitz) for every convolution, from input to output.

    A layer is a convolution with its BatchNorm, and has log Lipschitz constant ``log_constant(layer)``. log_lipschitz
    is that of the map from the input to the activation's output, or to that of a shortcut, which has no activation.
    Of a residual block's two paths the larger counts. Last comes the classifier, with that of the map to its input.
    """
    needed = {SpectralNormConv2d, LipschitzBatchNorm2d, CenteredSoftplus}
    if not isinstance(model, ResNet | VGG) or not needed <= {type(module) for module in model.modules()}:
        name = type(model).__name__
        raise ValueError(f"not a low-curvature network of this program (such as resnet18lcnn): {name}")
    total = torch.zeros((), device=next(model.parameters()).device)
    if isinstance(model, VGG):
        for (_, layer), (name, activation) in pairwise(model.features.named_children()):
            if isinstance(activation, CenteredSoftplus):  # poolings have Lipschitz constant 1
                total = total + log_constant(layer)
                yield f"features.{name}", layer, activation, total
    else:
        total = total + log_constant(model.stem)
        yield "activation", model.stem, model.activation, total
        blocks = [(name, module) for name, module in model.named_modules() if isinstance(module, ResidualBlock)]
        for name, block in blocks:
            total = total - math.log(2) / 2  # the block divides its input by sqrt 2
            first, shortcut = log_constant(block.conv1), torch.zeros_like(total)
            yield f"{name}.activation1", block.conv1, block.activation1, total + first
            if not isinstance(block.shortcut, nn.Identity):
                shortcut = log_constant(block.shortcut)
                yield f"{name}.shortcut", block.shortcut, None, total + shortcut
            total = total + torch.maximum(first + log_constant(block.conv2), shortcut)
            yield f"{name}.activation2", block.conv2, block.activation2, total
        pixels = block.conv2.conv.u[0, 0].numel()
        total = total - math.log(pixels) / 2  # the mean over the pixels of each channel
    yield "classifier", None, None, total


@torch.no_grad()
def layer_table(model: ResNet | VGG) -> LayerTable:
    """beta, gamma and the terms of the curvature bound in eval mode; the model is not changed.

    A normalized convolution counts with Lipschitz constant 1, which it has up to its power iteration.

    Raises:
        ValueError: if the model is not a low-curvature ResNet or VGG of this program.
    """

    def log_constant(layer: nn.Sequential) -> Tensor:
        s = (layer.norm.running_var.min() + layer.norm.eps).sqrt()
        return torch.minimum(-s.log(), layer.norm.log_gamma)

    # a copy: in training mode, reading the classifier's weight would change it
    network = copy.deepcopy(model).cpu().double().eval()
    rows = []
    *layers, (*_, to_classifier) = walk(network, log_constant)
    for name, layer, activation, log_lipschitz in layers:
        lipschitz = log_lipschitz.exp().item()
        n = layer.conv.u.numel()  # u has the shape of the convolution's output
        sigma, clip = layer.conv.spectral_norm().item(), layer.norm.clip().item()
        gamma, norm_lipschitz = layer.norm.log_gamma.exp().item(), log_constant(layer).exp().item()
        beta = None if activation is None else activation.beta.item()
        term = None if activation is None else n * (beta + activation.BETA_OFFSET) * lipschitz
        rows.append(LayerRow(name, lipschitz, gamma, sigma, clip, norm_lipschitz, beta, n, term))
    lipschitz = to_classifier.exp().item() * torch.linalg.matrix_norm(network.classifier.weight, ord=2).item()
    rows.append(LayerRow("classifier", lipschitz, n=network.classifier.out_features))
    lipschitz *= CROSS_ENTROPY_LIPSCHITZ
    rows.append(LayerRow("cross-entropy", lipschitz, n=1, term=CROSS_ENTROPY_CURVATURE * lipschitz))
    return LayerTable(tuple(rows))


def log_curvature_bound(model: ResNet | VGG) -> Tensor:
    """log of Theorem 1's bound from beta and gamma alone: a scalar to minimize, differentiable in both.

    Unlike in ``layer_table``, every BatchNorm counts with gamma, clipped or not, and every linear layer with 1. It is
    the logsumexp of the terms' logarithms, as the terms overflow.

    Raises:
        ValueError: if the model is not a low-curvature ResNet or VGG of this program.
    """
    log_terms = []
    for _, layer, activation, log_lipschitz in walk(model, lambda layer: layer.norm.log_gamma):
        if activation is not None:
            b = activation.beta + activation.BETA_OFFSET
            log_terms.append(math.log(layer.conv.u.numel()) + b.log() + log_lipschitz)
    log_terms.append(math.log(CROSS_ENTROPY_CURVATURE * CROSS_ENTROPY_LIPSCHITZ) + log_lipschitz)
    return torch.stack(log_terms).logsumexp(dim=0)


def format_layers(table: LayerTable, measured_maximum: float | None = None) -> str:
    """The table in at most 110 columns, and the bound; "clip" is off where gamma does not limit the BatchNorm."""

    def cell(value: float | str | None) -> str:
        return "-" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)

    width = max(len(row.name) for row in table.rows)
    titles = ("beta", "gamma", "conv norm", "clip", "Lip BN", "Lip", "n", "term")
    lines = [f"{'layer':<{width}}" + "".join(f"{title:>10}" for title in titles)]
    for row in table.rows:
        clip = "off" if row.clip == 1 else row.clip
        values = (row.beta, row.gamma, row.spectral_norm, clip, row.norm_lipschitz, row.lipschitz, row.n, row.term)
        lines.append(f"{row.name:<{width}}" + "".join(f"{cell(value):>10}" for value in values))
    measured = "" if measured_maximum is None else f"; largest curvature measured {measured_maximum:.3g}"
    legend = "Lip BN: of the BatchNorm, min(1/s, gamma); Lip: from the pixels to here; term: n * (beta + 1e-3) * Lip"
    return "\n".join([*lines, legend, f"sum of the terms, the bound: {table.bound:.3g}{measured}"])
