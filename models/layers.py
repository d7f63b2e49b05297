"""The layers of a low-curvature network, each for one factor of the bound (paper, Theorem 1).

The activation has normalized curvature at most beta, the convolution Lipschitz constant 1, the BatchNorm at most gamma.
"""

import math
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight
from torch.nn.modules.utils import _pair

from models.functional import AffineBatchNorm, ScaledBatchNorm, centered_softplus, conv2d, full_precision


class CenteredSoftplus(nn.Module):
    """Softplus through the origin with a trainable sharpness beta (paper, section 4.1).

    s0(x) = (softplus(b x) - log 2) / b with b = beta + 1e-3, elementwise on a tensor of any shape.
    s0(0) = 0, s0' = sigmoid(b x) <= 1 and |s0''| / |s0'| = b (1 - sigmoid(b x)) <= b.
    beta -> infinity gives ReLU, beta -> 0 gives x / 2.

    Args:
        init_beta: initial beta; ValueError unless positive. 5 is the reference code's.
    """

    BETA_OFFSET = 1e-3  # keeps the division by b safe as beta -> 0

    def __init__(self, init_beta: float = 5.0):
        super().__init__()
        if not init_beta > 0:
            raise ValueError(f"init_beta must be positive, got {init_beta}")
        self.log_beta = nn.Parameter(torch.tensor(math.log(init_beta)))  # so that beta stays positive

    @property
    def beta(self) -> Tensor:
        """The scalar that the curvature penalty sums: b without the 1e-3."""
        return self.log_beta.exp()

    def forward(self, input: Tensor) -> Tensor:
        b = self.beta + self.BETA_OFFSET
        x = input.to(b.dtype)  # softplus(b x) - log 2 needs all the bits, under autocast too
        if self.training:  # cheaper to differentiate twice
            return centered_softplus(x, b)
        return (F.softplus(b * x) - math.log(2)) / b  # F.softplus is the identity above 20


class Conv2d(nn.Conv2d):
    """``torch.nn.Conv2d`` with a cheaper second derivative in training."""

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        plain = self.groups == 1 and self.dilation == (1, 1) and self.padding_mode == "zeros"
        if self.training and plain and x.ndim == 4 and not isinstance(self.padding, str):
            return conv2d(x, weight, bias, self.stride, self.padding)
        return super()._conv_forward(x, weight, bias)


class SpectralNormConv2d(Conv2d):
    """Convolution whose weight is divided by the spectral norm of the convolution *operator* (Ryu et al., ICML 2019).

    Power iteration estimates the norm on inputs of ``input_size``, without the bias:
        v = conv_transpose(u) / ||.||,  u = conv(v) / ||.||,  sigma = <u, conv(v)>,
    15 steps at construction, one per forward in training, none in eval. u (1, out_channels, *output) and
    v (1, in_channels, *input) are buffers, held constant in the gradient of sigma.

    Args:
        input_size: height and width (int or pair) of the inputs the norm is exact for.
        Others as in ``torch.nn.Conv2d``, by name from stride on.

    Raises:
        ValueError: if padding_mode is not "zeros", padding has a name, or the output would be empty.
    """

    INITIAL_ITERATIONS = 15
    EPS = 1e-12

    def __init__(self, in_channels, out_channels, kernel_size, *, input_size=32, **conv_arguments):
        super().__init__(in_channels, out_channels, kernel_size, **conv_arguments)
        if self.padding_mode != "zeros" or isinstance(self.padding, str):
            raise ValueError(f"needs zero padding given as numbers, got {self.padding!r}, {self.padding_mode!r}")
        self.input_size = _pair(input_size)
        output_size, self._output_padding = [], []
        geometry = (self.input_size, self.kernel_size, self.dilation, self.padding, self.stride)
        for size, kernel, dilation, padding, stride in zip(*geometry, strict=True):
            room = size + 2 * padding - dilation * (kernel - 1) - 1
            output_size.append(room // stride + 1)
            self._output_padding.append(room % stride)  # brings conv_transpose back to the true input size
        if min(output_size) < 1:
            raise ValueError(f"a {self.kernel_size} kernel does not fit an input of {self.input_size}")
        self.register_buffer("u", self.weight.new_empty(1, out_channels, *output_size))
        self.register_buffer("v", self.weight.new_zeros(1, in_channels, *self.input_size))
        if not self.weight.is_meta:  # which would have no numbers
            self.u.normal_()
            self.power_iteration(self.INITIAL_ITERATIONS)

    def _operator(self, z: Tensor) -> Tensor:
        return F.conv2d(z, self.weight, None, self.stride, self.padding, self.dilation, self.groups)

    def _adjoint(self, z: Tensor) -> Tensor:
        geometry = (self.stride, self.padding, self._output_padding, self.groups, self.dilation)
        return F.conv_transpose2d(z, self.weight, None, *geometry)

    def _normalize(self, z: Tensor) -> Tensor:
        return z / z.norm().clamp_min(self.EPS)  # an "if" would wait for the device

    @torch.no_grad()
    def power_iteration(self, num_iterations: int) -> None:
        """Improve u and v in place by num_iterations steps."""
        for _ in range(num_iterations):
            self.v.copy_(self._normalize(self._adjoint(self.u)))
            self.u.copy_(self._normalize(self._operator(self.v)))

    def spectral_norm(self) -> Tensor:
        """sigma = <u, conv(v)>, a scalar; in training after one power iteration.

        It is linear in the weight, and computed as <weight, d sigma / d weight>: a convolution's backward would be in
        TF32.
        """
        with torch.no_grad(), full_precision(self.weight.device):
            if self.training:
                self.power_iteration(1)
            geometry = (self.stride, self.padding, self.dilation, self.groups)
            gradient = conv2d_weight(self.v, self.weight.shape, self.u, *geometry)
        return (self.weight * gradient).sum()

    def forward(self, input: Tensor) -> Tensor:
        sigma = self.spectral_norm().clamp_min(self.EPS)
        # the derivative of weight / sigma takes twice as many passes over the weights
        return self._conv_forward(input, self.weight * (1 / sigma), self.bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, input_size={self.input_size}"


class BatchNorm2d(nn.BatchNorm2d):
    """``torch.nn.BatchNorm2d`` without affine part, with a cheaper second derivative."""

    def __init__(self, num_features: int):
        super().__init__(num_features, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        return scaled_batch_norm(self, x, x.new_ones((), dtype=self.running_var.dtype))


def scaled_batch_norm(norm: nn.BatchNorm2d, x: Tensor, scale: Tensor) -> Tensor:
    """scale * norm(x) for a scalar tensor scale, without a pass over the activations for it.

    Raises:
        ValueError: in training mode, on one value per channel.
    """
    if norm.affine:
        weight, bias = norm.weight * scale, norm.bias * scale
    else:
        weight, bias = scale.repeat(norm.num_features), None
    if not norm.training:
        return F.batch_norm(x, norm.running_mean, norm.running_var, weight, bias, False, 0.0, norm.eps)
    norm.num_batches_tracked.add_(1)
    momentum = 1 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
    if x.numel() == x.shape[1]:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {tuple(x.shape)}")
    if norm.affine:
        return AffineBatchNorm.apply(x, weight, bias, norm.running_mean, norm.running_var, momentum, norm.eps)
    return ScaledBatchNorm.apply(x, scale, norm.running_mean, norm.running_var, momentum, norm.eps)


class LipschitzBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm whose Lipschitz constant is clipped to a trainable gamma (paper, section 4.2).

    BatchNorm's own constant is 1 / s with s = min over channels of sqrt(running_var + eps) (over |weight|, if affine).
    So y = bn(x) * s * min(1/s, gamma) has min(1/s, gamma).

    Args:
        init_gamma: initial gamma; ValueError unless positive. 10 is the reference code's.
        affine: whether to scale and shift each channel. False is the paper's.
        Others as in ``torch.nn.BatchNorm2d``.
    """

    def __init__(self, num_features: int, init_gamma=10.0, eps=1e-5, momentum=0.1, *, affine=False):
        super().__init__(num_features, eps=eps, momentum=momentum, affine=affine)
        if not init_gamma > 0:
            raise ValueError(f"init_gamma must be positive, got {init_gamma}")
        self.log_gamma = nn.Parameter(torch.tensor(math.log(init_gamma)))

    def clip(self) -> Tensor:
        """min(1, s * gamma), the scalar that multiplies the plain BatchNorm's output."""
        gamma = self.log_gamma.exp()
        if self.affine:  # s would be infinite where all weights are zero, as they often start
            lipschitz = (self.weight.abs() / (self.running_var + self.eps).sqrt()).max()
            return gamma / torch.maximum(lipschitz, gamma)
        s = (self.running_var.min() + self.eps).sqrt()
        return (s * gamma).clamp(max=1)

    def forward(self, input: Tensor) -> Tensor:
        return scaled_batch_norm(self, input, self.clip())  # of the running variance before this batch


class Layers(NamedTuple):
    """The layer types of an architecture: standard, low-beta or low-curvature."""

    conv: Callable[..., nn.Conv2d]
    norm: Callable[[int], nn.BatchNorm2d]
    activation: Callable[[], nn.Module]


def plain_conv(*arguments, input_size, **keywords) -> Conv2d:
    """``Conv2d`` behind SpectralNormConv2d's signature."""
    return Conv2d(*arguments, **keywords)


# Softplus(beta=1000) is ReLU to a thousandth, but twice differentiable
STANDARD = Layers(plain_conv, BatchNorm2d, partial(nn.Softplus, beta=1000))
LOWBETA = STANDARD._replace(activation=partial(nn.Softplus, beta=10))  # the paper's "Softplus + weight decay"
SOFTPLUS = STANDARD._replace(activation=CenteredSoftplus)  # the reference's "minimal recipe", with --beta-weight-decay
LCNN = Layers(SpectralNormConv2d, LipschitzBatchNorm2d, CenteredSoftplus)


def conv_norm(layers: Layers, in_channels: int, out_channels: int, kernel_size: int, **conv_arguments) -> nn.Sequential:
    """A convolution and its BatchNorm, as children ``conv`` and ``norm``."""
    conv = layers.conv(in_channels, out_channels, kernel_size, **conv_arguments)
    return nn.Sequential(OrderedDict(conv=conv, norm=layers.norm(out_channels)))
