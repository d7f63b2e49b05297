"""The paper's ResNet-18 with its forward passes as the formulas are written, for train.py to compare with.

A residual block applies its two branches to the halves of [x, x] / sqrt 2, and adds them up. The spectral norm compares
sigma with epsilon on the host.
"""

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers import CenteredSoftplus, Layers, LipschitzBatchNorm2d, SpectralNormConv2d
from models.resnet import ResidualBlock, ResNet


class TextbookConv2d(SpectralNormConv2d):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            z = self._adjoint(self.u)
            self.v = z / max(float(z.norm()), 1e-12)
            z = self._operator(self.v)
            self.u = z / max(float(z.norm()), 1e-12)
        sigma = (self.u * self._operator(self.v)).sum()
        weight = self.weight if sigma < 1e-12 else self.weight / sigma
        return F.conv2d(x, weight, None, self.stride, self.padding)


class TextbookBatchNorm2d(LipschitzBatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        s = (self.running_var + self.eps).sqrt().min()
        return nn.BatchNorm2d.forward(self, x) * s * torch.minimum(1 / s, self.log_gamma.exp())


class TextbookSoftplus(CenteredSoftplus):
    def forward(self, x: Tensor) -> Tensor:
        b = self.log_beta.exp() + 1e-3
        return (F.softplus(b * x) - math.log(2)) / b


def plain_conv(*arguments, input_size: int, **keywords) -> nn.Conv2d:
    return nn.Conv2d(*arguments, **keywords)


STANDARD = Layers(plain_conv, partial(nn.BatchNorm2d, affine=False), partial(nn.Softplus, beta=1000))
LCNN = Layers(TextbookConv2d, TextbookBatchNorm2d, TextbookSoftplus)


def block_forward(block: ResidualBlock, x: Tensor) -> Tensor:
    a, b = (x.repeat(1, 2, 1, 1) / math.sqrt(2)).chunk(2, dim=1)
    same = nn.Identity()
    for first, second in ((block.conv1, block.shortcut), (block.activation1, same), (block.conv2, same)):
        a, b = torch.cat([first(a), second(b)], dim=1).chunk(2, dim=1)
    return block.activation2((a + b) / 2)


def resnet18(arch: str, num_classes: int, size: int) -> ResNet:
    """resnet18 or resnet18lcnn for (N, 3, size, size) pixels."""
    network = ResNet(LCNN if arch == "resnet18lcnn" else STANDARD, (2, 2, 2, 2), num_classes, size)
    for module in network.modules():
        if isinstance(module, ResidualBlock):
            module.forward = partial(block_forward, module)
    return network
