"""The low-curvature ResNet-18 and its losses as the paper writes them down, for benchmarks/train.py to compare with.

A residual block repeats its input's channels, x -> [x, x] / sqrt 2, applies its two branches to the halves, and adds
them up; activations and BatchNorm are their formulas; the spectral norm iterates a forward's power step, then computes
sigma from the result, and is compared with epsilon on the host; a penalty's pieces are read back after every step.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from regularized_loss import CURE_SCALE, GRADNORM_SCALE


class SpectralConv2d(nn.Conv2d):
    def __init__(self, *arguments, input_size: int, **keywords):
        super().__init__(*arguments, **keywords)
        output_size = (input_size - 1) // self.stride[0] + 1
        u = torch.randn(1, self.out_channels, output_size, output_size)
        self.register_buffer("u", u / u.norm())
        self.register_buffer("v", torch.zeros(1, self.in_channels, input_size, input_size))
        self.output_padding_needed = input_size - (
            (output_size - 1) * self.stride[0] - 2 * self.padding[0] + self.kernel_size[0]
        )

    def operator(self, z: Tensor) -> Tensor:
        return F.conv2d(z, self.weight, None, self.stride, self.padding)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            z = F.conv_transpose2d(self.u, self.weight, None, self.stride, self.padding, self.output_padding_needed)
            self.v = z / max(float(z.norm()), 1e-12)
            z = self.operator(self.v)
            self.u = z / max(float(z.norm()), 1e-12)
        sigma = (self.u * self.operator(self.v)).sum()
        weight = self.weight if sigma < 1e-12 else self.weight / sigma
        return F.conv2d(x, weight, None, self.stride, self.padding)


class ConvNorm(nn.Module):
    def __init__(self, lcnn: bool, *arguments, input_size: int, **keywords):
        super().__init__()
        more = {"input_size": input_size} if lcnn else {}
        self.conv = (SpectralConv2d if lcnn else nn.Conv2d)(*arguments, bias=False, **keywords, **more)
        self.norm = nn.BatchNorm2d(self.conv.out_channels, affine=False)
        self.log_gamma = nn.Parameter(torch.tensor(math.log(10.0))) if lcnn else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if self.log_gamma is None:
            return self.norm(x)
        s = (self.norm.running_var + self.norm.eps).sqrt().min()
        return self.norm(x) * s * torch.minimum(1 / s, self.log_gamma.exp())


class CenteredSoftplus(nn.Module):
    def __init__(self):
        super().__init__()
        self.log_beta = nn.Parameter(torch.tensor(math.log(5.0)))

    def forward(self, x: Tensor) -> Tensor:
        b = self.log_beta.exp() + 1e-3
        return (F.softplus(b * x) - math.log(2)) / b


def activation(lcnn: bool) -> nn.Module:
    return CenteredSoftplus() if lcnn else nn.Softplus(beta=1000)


class OverHalves(nn.Module):
    def __init__(self, first: nn.Module, second: nn.Module):
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=1)
        return torch.cat([self.first(a), self.second(b)], dim=1)


class Block(nn.Module):
    def __init__(self, lcnn: bool, inputs: int, outputs: int, stride: int, size: int):
        super().__init__()
        shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            shortcut = ConvNorm(lcnn, inputs, outputs, 1, stride=stride, input_size=size)
        self.halves = nn.Sequential(
            OverHalves(ConvNorm(lcnn, inputs, outputs, 3, stride=stride, padding=1, input_size=size), shortcut),
            OverHalves(activation(lcnn), nn.Identity()),
            OverHalves(ConvNorm(lcnn, outputs, outputs, 3, padding=1, input_size=size // stride), nn.Identity()),
        )
        self.activation = activation(lcnn)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.halves(x.repeat(1, 2, 1, 1) / math.sqrt(2)).chunk(2, dim=1)
        return self.activation((a + b) / 2)


def resnet18(lcnn: bool, num_classes: int, size: int) -> nn.Sequential:
    layers: list[nn.Module] = [ConvNorm(lcnn, 3, 64, 3, padding=1, input_size=size), activation(lcnn)]
    inputs = 64
    for outputs, first_stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        for stride in (first_stride, 1):
            layers.append(Block(lcnn, inputs, outputs, stride, size))
            inputs, size = outputs, size // stride
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), spectral_norm(nn.Linear(512, num_classes)))


def compute_loss(model: nn.Module, images: Tensor, labels: Tensor, regularizer: str) -> Tensor:
    """The loss that --regularizer names, with train_models.py's default weights."""
    images.requires_grad_()
    losses = F.cross_entropy(model(images), labels, reduction="none")
    terms = {"raw": losses.mean()}
    if regularizer in ("gnorm", "curvature_and_gnorm", "cure"):
        gradient = torch.autograd.grad(losses.sum(), images, create_graph=True)[0]
    if regularizer in ("gnorm", "curvature_and_gnorm"):
        terms["gradnorm"] = 1e-3 * GRADNORM_SCALE * gradient.pow(2).sum() / len(images)
    if regularizer == "cure":
        z = gradient.detach().sign()
        z = z / z.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        moved = (images + z).detach().requires_grad_()
        moved_losses = F.cross_entropy(model(moved), labels, reduction="none")
        moved_gradient = torch.autograd.grad(moved_losses.sum(), moved, create_graph=True)[0]
        terms["cure"] = 1e-3 * CURE_SCALE * (gradient - moved_gradient).pow(2).sum() / len(images)
    if regularizer in ("curvature", "curvature_and_gnorm"):
        terms["beta"] = 1e-2 * sum(p.exp() for name, p in model.named_parameters() if name.endswith("log_beta"))
        terms["gamma"] = 1e-2 * sum(p.abs() for name, p in model.named_parameters() if name.endswith("log_gamma"))
    for term in terms.values():
        term.item()
    return sum(terms.values())
