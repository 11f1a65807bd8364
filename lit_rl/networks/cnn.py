"""Convolutional networks for images."""

from collections.abc import Sequence

import gymnasium as gym
import torch
from torch import Tensor, nn

from lit_rl.errors import OptionError, SpaceError
from lit_rl.networks.build import built_in
from lit_rl.networks.inputs import ImageInput
from lit_rl.networks.mlp import orthogonal
from lit_rl.options import Count, check


class _CNN(nn.Module):
    """Images through `self.convolutions` and one fully connected layer."""

    def __init__(self, observation_space: gym.Space, channels: str):
        super().__init__()
        self.input = ImageInput(observation_space, channels)
        self._num_dims = len(observation_space.shape or ())

    def _finish(self, convolutions: nn.Sequential, hidden_size: int) -> None:
        self.convolutions = convolutions.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        with torch.no_grad():
            size = convolutions(torch.zeros(1, *self.input.shape)).numel()
        self.linear = orthogonal(nn.Linear(size, check("hidden_size", hidden_size, Count)), gain=2**0.5)
        self.output_size = hidden_size

    def forward(self, obs: Tensor) -> Tensor:
        features = self.convolutions(self.input(obs)).flatten(1)
        return torch.relu(self.linear(features)).unflatten(0, obs.shape[: obs.ndim - self._num_dims])


@built_in
class NatureCNN(_CNN):
    """Three convolutions and a fully connected layer: Mnih et al. 2015, doi:10.1038/nature14236, Methods.

    Args:
        observation_space: images of at least 36 by 36, channels first or last (see `ImageInput`).
        hidden_size: width of the last layer, the `output_size`.
        channels: "first", "last", or "auto" to recognise them.

    >>> NatureCNN(gym.spaces.Box(0, 255, (84, 84, 3), "uint8"))(torch.zeros(2, 84, 84, 3, dtype=torch.uint8)).shape
    torch.Size([2, 512])
    """

    SMALLEST = 36

    def __init__(self, observation_space: gym.Space, *, hidden_size: int = 512, channels: str = "auto"):
        super().__init__(observation_space, channels)
        num_channels, height, width = self.input.shape
        if min(height, width) < self.SMALLEST:
            raise SpaceError(
                f"NatureCNN takes images of at least {self.SMALLEST} by {self.SMALLEST}, got {height} by {width} with "
                f"{num_channels} channels ({observation_space}, channels={channels!r}). Use network=ImpalaResNet, or "
                "gymnasium.wrappers:ResizeObservation."
            )
        layers: list[nn.Module] = []
        for filters, kernel, stride in ((32, 8, 4), (64, 4, 2), (64, 3, 1)):
            layers += [orthogonal(nn.Conv2d(num_channels, filters, kernel, stride), gain=2**0.5), nn.ReLU()]
            num_channels = filters
        self._finish(nn.Sequential(*layers), hidden_size)


@built_in
class ImpalaResNet(_CNN):
    """Three stages of a convolution, pooling and two residual blocks: Espeholt et al. 2018, arXiv:1802.01561, fig. 3.

    Args:
        observation_space: images of any size, channels first or last (see `ImageInput`).
        filters: of each stage; every stage halves height and width.
        hidden_size: width of the last layer, the `output_size`.
        channels: "first", "last", or "auto" to recognise them.
    """

    def __init__(
        self,
        observation_space: gym.Space,
        *,
        filters: Sequence[int] = (16, 32, 32),
        hidden_size: int = 256,
        channels: str = "auto",
    ):
        super().__init__(observation_space, channels)
        if not isinstance(filters, Sequence) or isinstance(filters, str) or not filters:
            raise OptionError(f"filters={filters!r}: expected a list of at least one number of filters.")
        layers: list[nn.Module] = []
        num_channels = self.input.shape[0]
        for count in filters:
            layers += [
                nn.Conv2d(num_channels, check("filters", count, Count), 3, padding=1),
                nn.MaxPool2d(3, stride=2, padding=1),
                _Residual(count),
                _Residual(count),
            ]
            num_channels = count
        self._finish(nn.Sequential(*layers, nn.ReLU()), hidden_size)


class _Residual(nn.Module):
    def __init__(self, filters: int):
        super().__init__()
        convolutions = (nn.Conv2d(filters, filters, 3, padding=1) for _ in range(2))
        first, second = convolutions
        self.layers = nn.Sequential(nn.ReLU(), first, nn.ReLU(), second)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)
