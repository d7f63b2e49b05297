"""A trained network of ours folded to plain convolutions and activations, with its derivatives written out.

In eval mode the spectral norm, BatchNorm with its clip, and the factors of the residual blocks are constants: they go
into weights and biases, once. What is left is affine maps and elementwise softplus activations s: a Hessian-vector
product needs no autograd. With z the input of an activation and a = dl/d(its output),

    the backward pass      dl/dz = s'(z) a        changes along a direction by      s''(z) a dz + s'(z) da.

s'(z) and s''(z) a are the same for every direction: they are kept. A product is then one tangent pass forward for dz
and one backward for da (Pearlmutter, "Fast exact multiplication by the Hessian", 1994).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.utils.parametrize import is_parametrized

from models.layers import BatchNorm2d, CenteredSoftplus, Conv2d, LipschitzBatchNorm2d, SpectralNormConv2d
from models.resnet import ResidualBlock, ResNet
from models.vgg import VGG

# What each layer keeps of a batch for the derivatives: tensors of one row per example, or a torch.Size.
Kept = dict["Layer", tuple[Tensor | torch.Size, ...]]


class Layer:
    """A map of batches (n, ...) without state: what it keeps of a batch goes into ``kept``.

    ``forward`` gives the output, then ``backward`` dl/d(input) from a = dl/d(output). After them, any number of times,
    ``tangent`` gives the change of the output along a change dx of the input, then ``tangent_backward`` that of
    dl/d(input), from the change da of dl/d(output). For an affine layer both ways back are the adjoint of its
    ``tangent``; a linear one is its own tangent. ``through`` calls one of the four by its name: layers of layers have
    it alone.

    An activation may overwrite what it is given: it comes from an affine layer, and nothing else reads that.
    """

    def forward(self, x: Tensor, kept: Kept) -> Tensor:
        kept[self] = (x.shape[1:],)
        return self.tangent(x, kept)

    def tangent_backward(self, da: Tensor, kept: Kept) -> Tensor:
        return self.backward(da, kept)

    def through(self, method: str, x: Tensor, kept: Kept) -> Tensor:
        return getattr(self, method)(x, kept)


class Convolution(Layer):
    """conv(x) + bias."""

    def __init__(self, weight: Tensor, bias: Tensor, stride: tuple[int, int], padding: tuple[int, int]):
        self.weight, self.bias, self.stride, self.padding = weight, bias, stride, padding

    def forward(self, x, kept):
        kept[self] = (x.shape[2:],)
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding)

    def tangent(self, dx, kept):
        return F.conv2d(dx, self.weight, None, self.stride, self.padding)

    def backward(self, a, kept):
        (input_size,) = kept[self]
        geometry = zip(input_size, self.weight.shape[2:], self.padding, self.stride, strict=True)
        # rows and columns at the far edge that the stride leaves out
        rest = [(size + 2 * padding - kernel) % stride for size, kernel, padding, stride in geometry]
        return F.conv_transpose2d(a, self.weight, None, self.stride, self.padding, rest)


class Softplus(Layer):
    """s(z) = softplus(b z) / b - shift, elementwise; the identity for b z > 20, as in torch."""

    THRESHOLD = 20

    def __init__(self, b: float, shift: float):
        self.b, self.shift = b, shift

    def forward(self, z, kept):
        kept[self] = (z,)
        y = F.softplus(z, self.b, self.THRESHOLD)
        return y.sub_(self.shift) if self.shift else y

    def backward(self, a, kept):
        (z,) = kept[self]
        one = z.new_ones(()).expand_as(z)
        slope = torch.ops.aten.softplus_backward(one, z, self.b, self.THRESHOLD)  # s' = sigmoid(b z), 1 where linear
        bend = torch.addcmul(slope, slope, slope, value=-1).mul_(self.b).mul_(a)  # s'' a, s'' = b (s' - s'^2)
        kept[self] = slope, bend, z  # z's memory is for s'' a dz: fresh memory costs as much as the product
        return slope * a

    def tangent(self, dz, kept):
        slope, bend, bend_dz = kept[self]
        torch.mul(bend, dz, out=bend_dz)
        return dz.mul_(slope)

    def tangent_backward(self, da, kept):
        slope, _, bend_dz = kept[self]
        return bend_dz.addcmul_(slope, da)


class MaxPool(Layer):
    """The maximum of each 2 x 2 square; near the images at hand, a linear choice of pixels."""

    def forward(self, x, kept):
        y, picked = F.max_pool2d(x, 2, return_indices=True)
        kept[self] = (x.shape[2:], picked)
        return y

    def tangent(self, dx, kept):
        _, picked = kept[self]
        return dx.flatten(2).gather(2, picked.flatten(2)).view(picked.shape)

    def backward(self, a, kept):
        size, picked = kept[self]
        flat = a.new_zeros(*a.shape[:2], size.numel()).scatter_(2, picked.flatten(2), a.flatten(2))
        return flat.view(*a.shape[:2], *size)


class MeanPool(Layer):
    """The mean over the pixels: (n, c, H, W) -> (n, c)."""

    def tangent(self, dx, kept):
        return dx.mean(dim=(2, 3))

    def backward(self, a, kept):
        ((_, *size),) = kept[self]
        return (a / math.prod(size))[:, :, None, None].expand(-1, -1, *size)


class Flatten(Layer):
    """(n, c, H, W) -> (n, c H W)."""

    def tangent(self, dx, kept):
        return dx.flatten(1)

    def backward(self, a, kept):
        (shape,) = kept[self]
        return a.view(-1, *shape)


class Linear(Layer):
    """x W' + bias."""

    def __init__(self, weight: Tensor, bias: Tensor):
        self.weight, self.bias = weight, bias

    def forward(self, x, kept):
        return F.linear(x, self.weight, self.bias)

    def tangent(self, dx, kept):
        return F.linear(dx, self.weight)

    def backward(self, a, kept):
        return a @ self.weight


class Chain(Layer):
    """One layer after the other."""

    def __init__(self, *layers: Layer):
        self.layers = layers

    def through(self, method: str, x: Tensor, kept: Kept) -> Tensor:
        for layer in reversed(self.layers) if method.endswith("backward") else self.layers:
            x = layer.through(method, x, kept)
        return x


class Residual(Layer):
    """branch(x) + shortcut(x), the shortcut a layer or a factor."""

    def __init__(self, branch: Layer, shortcut: Layer | float):
        self.branch, self.shortcut = branch, shortcut

    def through(self, method: str, x: Tensor, kept: Kept) -> Tensor:
        y = self.branch.through(method, x, kept)
        if isinstance(self.shortcut, Layer):
            return y.add_(self.shortcut.through(method, x, kept))
        return y.add_(x, alpha=self.shortcut)


class NotFoldable(ValueError):
    """The network has a part that folding does not know."""


def require(known: bool) -> None:
    if not known:
        raise NotFoldable


class FoldedLogits(torch.autograd.Function):
    """A network's logits as a function of the images that autograd can differentiate, once."""

    @staticmethod
    def forward(ctx, images, network):
        ctx.network, ctx.kept = network, {}
        return network.through("forward", images, ctx.kept)

    @staticmethod
    @once_differentiable
    def backward(ctx, a):
        return ctx.network.through("backward", a, dict(ctx.kept)), None  # a copy, for more gradients of it


class FoldedNetwork(Chain):
    """What ``fold`` makes of a network: the same map from images (N, 3, H, H) to logits (N, classes).

    Autograd differentiates the logits once; second derivatives go ``through`` it. It holds copies: fold again when the
    network's weights have changed.
    """

    def __call__(self, images: Tensor) -> Tensor:
        return FoldedLogits.apply(images, self)


def fold_conv_norm(pair: nn.Sequential, before: float = 1.0, after: float = 1.0) -> Convolution:
    """x -> after * norm(conv(before * x)) as one plain convolution."""
    require(list(dict(pair.named_children())) == ["conv", "norm"])
    conv, norm = pair.conv, pair.norm
    require(type(conv) in (nn.Conv2d, Conv2d, SpectralNormConv2d))
    require(type(norm) in (nn.BatchNorm2d, BatchNorm2d, LipschitzBatchNorm2d))
    require(conv.groups == 1 and conv.dilation == (1, 1) and conv.padding_mode == "zeros")
    require(not isinstance(conv.padding, str) and not norm.affine and norm.running_var is not None)
    scale = after * (norm.running_var + norm.eps).rsqrt()
    if isinstance(norm, LipschitzBatchNorm2d):
        scale = scale * norm.clip()
    bias = scale * ((0 if conv.bias is None else conv.bias) - norm.running_mean)
    if isinstance(conv, SpectralNormConv2d):
        scale = scale / conv.spectral_norm().clamp_min(conv.EPS)
    weight = before * scale.view(-1, 1, 1, 1) * conv.weight
    # the layout in which a CPU convolves fastest; what it puts out has the same
    layout = torch.channels_last if weight.device.type == "cpu" else torch.contiguous_format
    return Convolution(weight.contiguous(memory_format=layout), bias, conv.stride, conv.padding)


def fold_activation(activation: nn.Module) -> Softplus:
    if type(activation) is CenteredSoftplus:
        b = (activation.beta + activation.BETA_OFFSET).item()
        return Softplus(b, math.log(2) / b)
    require(type(activation) is nn.Softplus and activation.threshold == Softplus.THRESHOLD)
    return Softplus(activation.beta, 0.0)


def fold_linear(linear: nn.Linear) -> Linear:
    # a spectrally normalized one is of a class of its own, made by torch.nn.utils.parametrize
    require(type(linear) is nn.Linear or (isinstance(linear, nn.Linear) and is_parametrized(linear, "weight")))
    require(linear.bias is not None)
    return Linear(linear.weight.detach().clone(), linear.bias.detach().clone())


def fold_resnet(model: ResNet) -> FoldedNetwork:
    root_half = math.sqrt(0.5)
    layers: list[Layer] = [fold_conv_norm(model.stem), fold_activation(model.activation)]
    for block in (block for stage in model.stages for block in stage):
        require(type(block) is ResidualBlock)
        # out = act((conv2(act(conv1(x / sqrt 2))) + shortcut(x / sqrt 2)) / 2)
        conv1 = fold_conv_norm(block.conv1, before=root_half)
        branch = Chain(conv1, fold_activation(block.activation1), fold_conv_norm(block.conv2, after=0.5))
        plain = type(block.shortcut) is nn.Identity
        shortcut = root_half * 0.5 if plain else fold_conv_norm(block.shortcut, before=root_half, after=0.5)
        layers += [Residual(branch, shortcut), fold_activation(block.activation2)]
    return FoldedNetwork(*layers, MeanPool(), fold_linear(model.classifier))


def fold_vgg(model: VGG) -> FoldedNetwork:
    layers: list[Layer] = []
    for module in model.features:
        if type(module) is nn.MaxPool2d:
            require((module.kernel_size, module.stride, module.padding, module.dilation) == (2, 2, 0, 1))
            layers.append(MaxPool())
        elif type(module) is nn.Sequential:
            layers.append(fold_conv_norm(module))
        else:
            layers.append(fold_activation(module))
    return FoldedNetwork(*layers, Flatten(), fold_linear(model.classifier))


@torch.no_grad()
def fold(model: nn.Module) -> FoldedNetwork | None:
    """A ResNet or VGG of ours, in eval mode, as a FoldedNetwork; None for any other network.

    One that was changed after it was built, with hooks, other layers or another forward, is another network.
    """
    folders = {ResNet: fold_resnet, VGG: fold_vgg}
    try:
        require(type(model) in folders)
        for module in model.modules():
            require(not (module._forward_hooks or module._forward_pre_hooks or module._backward_hooks))
            require("forward" not in vars(module))
        return folders[type(model)](model)
    except NotFoldable:
        return None
