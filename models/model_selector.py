"""The architectures by name. ``--model-arch`` and its help come from this dictionary."""

from functools import partial

from torch import nn

from models.layers import LCNN, LOWBETA, SOFTPLUS, STANDARD, Layers
from models.resnet import ResNet
from models.vgg import VGG


def resnet18(num_classes: int, input_size: int = 32, *, layers: Layers) -> nn.Module:
    """ResNet-18: two residual blocks in each of the four stages."""
    return ResNet(layers, (2, 2, 2, 2), num_classes, input_size)


def resnet34(num_classes: int, input_size: int = 32, *, layers: Layers) -> nn.Module:
    """ResNet-34: 3, 4, 6 and 3 residual blocks."""
    return ResNet(layers, (3, 4, 6, 3), num_classes, input_size)


def vgg11(num_classes: int, input_size: int = 32, *, layers: Layers) -> nn.Module:
    """VGG-11 with BatchNorm."""
    return VGG(layers, num_classes, input_size)


# name -> callable(num_classes, input_size=32) -> module: (N, 3, H, H) pixels in [0, 1] -> (N, num_classes) logits
model_architecture = {
    "resnet18": partial(resnet18, layers=STANDARD),
    "resnet34": partial(resnet34, layers=STANDARD),
    "vgg11": partial(vgg11, layers=STANDARD),
    "resnet18lcnn": partial(resnet18, layers=LCNN),
    "resnet34lcnn": partial(resnet34, layers=LCNN),
    "vgg11lcnn": partial(vgg11, layers=LCNN),
    "resnet18softplus": partial(resnet18, layers=SOFTPLUS),
    "resnet34softplus": partial(resnet34, layers=SOFTPLUS),
    "vgg11softplus": partial(vgg11, layers=SOFTPLUS),
    "resnet18lowbeta": partial(resnet18, layers=LOWBETA),
    "resnet34lowbeta": partial(resnet34, layers=LOWBETA),
    "vgg11lowbeta": partial(vgg11, layers=LOWBETA),
}
