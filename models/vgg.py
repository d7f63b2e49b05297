"""VGG-11 with BatchNorm for small images, standard and low-curvature."""

from torch import Tensor, nn

from models.layers import Layers, conv_norm

VGG11 = (64, 64, "M", 128, 128, "M", 256, 256, "M", 512, 512, "M", 512, 512)  # output channels; M = MaxPool 2


class VGG(nn.Module):
    """(N, 3, input_size, input_size) pixels in [0, 1] -> (N, num_classes) logits.

    The last Linear is plain in the low-curvature variant too, as in the reference: its norm counts in a bound.

    Raises:
        ValueError: if input_size is not a multiple of 16 (the four poolings must divide it).
    """

    def __init__(self, layers: Layers, num_classes: int, input_size: int = 32):
        super().__init__()
        if input_size < 16 or input_size % 16:
            raise ValueError(f"a VGG's input size must be a multiple of 16, got {input_size}")
        self.features = nn.Sequential()
        in_channels, size = 3, input_size
        for entry in VGG11:
            if entry == "M":
                self.features.append(nn.MaxPool2d(2))
                size //= 2
            else:
                self.features.append(conv_norm(layers, in_channels, entry, 3, padding=1, input_size=size))
                self.features.append(layers.activation())
                in_channels = entry
        self.classifier = nn.Linear(in_channels * size * size, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).flatten(1))
