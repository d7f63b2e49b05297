"""ResNets for small images, standard and low-curvature (paper, section 5)."""

import math
from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from models.layers import Layers, conv_norm


class ResidualBlock(nn.Module):
    """out = act((conv2(act(conv1(x / sqrt 2))) + shortcut(x / sqrt 2)) / 2), a BatchNorm behind every conv.

    Before the last activation, which has 1, the Lipschitz constant is at most
    max(Lip(branch), Lip(shortcut)) / sqrt 2: the sum is (a + b) / 2 of [a, b] = [x, x] / sqrt 2.
    Maps (N, in_channels, H, H) to (N, out_channels, H / stride, H / stride); ``input_size`` is H.
    """

    def __init__(self, layers: Layers, in_channels: int, out_channels: int, stride: int, input_size: int):
        super().__init__()
        output_size = (input_size - 1) // stride + 1
        first = {"stride": stride, "bias": False, "input_size": input_size}
        self.conv1 = conv_norm(layers, in_channels, out_channels, 3, padding=1, **first)
        self.activation1 = layers.activation()
        self.conv2 = conv_norm(layers, out_channels, out_channels, 3, padding=1, bias=False, input_size=output_size)
        self.shortcut = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = conv_norm(layers, in_channels, out_channels, 1, **first)
        self.activation2 = layers.activation()

    def forward(self, x: Tensor) -> Tensor:
        x = x * math.sqrt(0.5)
        branch = self.conv2(self.activation1(self.conv1(x)))
        return self.activation2((branch + self.shortcut(x)) * 0.5)


class ResNet(nn.Module):
    """(N, 3, input_size, input_size) pixels in [0, 1] -> (N, num_classes) logits."""

    def __init__(self, layers: Layers, num_blocks: Sequence[int], num_classes: int, input_size: int = 32):
        super().__init__()
        self.stem = conv_norm(layers, 3, 64, 3, padding=1, bias=False, input_size=input_size)
        self.activation = layers.activation()
        in_channels, size = 64, input_size
        self.stages = nn.Sequential()
        for channels, first_stride, blocks in zip((64, 128, 256, 512), (1, 2, 2, 2), num_blocks, strict=True):
            stage = nn.Sequential()
            for stride in [first_stride] + [1] * (blocks - 1):
                stage.append(ResidualBlock(layers, in_channels, channels, stride, size))
                in_channels, size = channels, (size - 1) // stride + 1
            self.stages.append(stage)
        # normalized in the standard networks too, as in the reference
        self.classifier = spectral_norm(nn.Linear(in_channels, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stages(self.activation(self.stem(x)))
        return self.classifier(x.mean(dim=(2, 3)))
