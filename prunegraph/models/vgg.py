"""VGG-16 with batch norm for small images (Simonyan and Zisserman 2015, arXiv 1409.1556).

The usual CIFAR form: 13 convolutions and one linear layer, state-dict names of K. Liu's
pytorch-cifar (``features.{i}``, ``classifier``).
"""

from torch import Tensor, nn

CONFIGURATION = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0)


class VGG16(nn.Module):
    """VGG-16-BN whose classifier is a single linear layer on the pooled features.

    Args:
        in_channels: channels of the images.
        num_classes: size of the output.

    Shapes:
        - input: ``[B, in_channels, h, w]`` with h, w >= 32
        - output: ``[B, num_classes]``
    """

    def __init__(self, *, in_channels: int = 3, num_classes: int = 10) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = in_channels
        for width in CONFIGURATION:
            if width == 0:
                layers.append(nn.MaxPool2d(2))
                continue
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
            channels = width
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits ``[B, num_classes]``."""
        logits: Tensor = self.classifier(self.features(x).mean(dim=(2, 3)))
        return logits
