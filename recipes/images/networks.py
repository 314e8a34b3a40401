"""Networks for small images that torchvision does not have."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchvision.models import resnet18


class ResidualBlock(nn.Module):
    """Two convolutions, and a shortcut without parameters.

    Where the shape changes, the shortcut subsamples and pads channels with zeros (option A of the paper).
    """

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(before, after, 3, stride, padding=1, bias=False)
        self.first_norm = nn.BatchNorm2d(after)
        self.second = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.second_norm = nn.BatchNorm2d(after)
        self.stride, self.widening = stride, after - before

    def forward(self, x: Tensor) -> Tensor:
        """The block's output."""
        y = torch.relu(self.first_norm(self.first(x)))
        y = self.second_norm(self.second(y))
        if self.stride > 1 or self.widening:
            x = nn.functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.widening))
        return torch.relu(x + y)


class CifarResNet(nn.Sequential):
    """The ResNets for CIFAR-10, of 6n + 2 layers: He et al., https://arxiv.org/abs/1512.03385, section 4.2.

    Args:
        depth: layers with weights: 20, 32, 44, 56 or 110 in the paper. ResNet-20 has 0.27 million parameters.
        classes: number of classes.
        width: channels of the first of the three stages.

    Raises:
        ValueError: if ``depth`` is not 6n + 2.
    """

    def __init__(self, depth: int = 20, classes: int = 10, width: int = 16) -> None:
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"depth must be 6n + 2, such as 20 or 56, got {depth}.")
        blocks, before = [], width
        for stage in range(3):
            for block in range((depth - 2) // 6):
                after = width << stage
                blocks.append(ResidualBlock(before, after, stride=2 if stage and not block else 1))
                before = after
        super().__init__(
            *(nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()),
            *blocks,
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, classes)),
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")


def cifar_resnet18(classes: int = 10) -> nn.Module:
    """Torchvision's ResNet-18 with the usual stem for 32 x 32 pixels: a 3 x 3 convolution, and no pooling."""
    network = resnet18(num_classes=classes)
    network.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    network.maxpool = nn.Identity()
    return network


def small_cnn(classes: int = 10, width: int = 32) -> nn.Module:
    """Three convolutions and a dense layer: CIFAR-10 in minutes on a CPU.

    Args:
        classes: number of classes.
        width: channels of the first convolution.
    """
    layers: list[nn.Module] = []
    before = 3
    for after in (width, 2 * width, 4 * width):
        layers += [
            nn.Conv2d(before, after, 3, padding=1, bias=False),
            nn.MaxPool2d(2),
            nn.BatchNorm2d(after),
            nn.ReLU(),
        ]
        before = after
    return nn.Sequential(*layers, nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(before, classes))


def mlp(inputs: int = 64, hidden: int = 64, classes: int = 10) -> nn.Module:
    """Two dense layers.

    Args:
        inputs: pixels times channels.
        hidden: width of the hidden layer.
        classes: number of classes.
    """
    return nn.Sequential(nn.Flatten(), nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, classes))
