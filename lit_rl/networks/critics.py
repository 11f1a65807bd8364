"""Critics: heads and networks that give values of what they see."""

import contextlib
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import torch
from torch import Tensor, nn

from lit_rl.errors import OptionError
from lit_rl.networks.build import NetworkFactory, as_input, build_network, output_size
from lit_rl.networks.mlp import orthogonal
from lit_rl.normalizer import ObservationNormalizer, RunningMoments
from lit_rl.trees import Tree, find, map_tree

NEWEST_TARGETS = 0.05  # least weight of the newest targets in the statistics of all
LEAST_DEVIATION = 1e-4  # of targets that are all alike, as van Hasselt et al. have it


class ValueHead(nn.Module):
    """Features [*B, input_size] to one number, [*B].

    Args:
        input_size: of the features.
        normalize: keep the mean and deviation of value targets, by which the linear layer's numbers are shifted and
            scaled (van Hasselt et al. 2016, arXiv:1602.07714). The values that it gives are those of returns in any
            case; losses are taken of `normalized` ones.
    """

    def __init__(self, input_size: int, normalize: bool = False):
        super().__init__()
        self.linear = orthogonal(nn.Linear(input_size, 1), gain=1.0)
        self.moments = RunningMoments(least_weight=NEWEST_TARGETS) if normalize else None
        self._others: list[nn.Linear] = []

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_others": []}

    def keep_in_unit(self, others: Sequence["ValueHead"]) -> None:
        """Have the linear layers of other heads, such as averages of this one, in the unit of this one's from now on.

        Copies of this head have no others.
        """
        self._others = [other.linear for other in others]

    def forward(self, features: Tensor) -> Tensor:
        x = self.linear(features).float().squeeze(-1)
        return x if self.moments is None else x * self._scale(self.moments) + self.moments.mean

    def normalized(self, value: Tensor) -> Tensor:
        """Values or targets [*B] less the mean of all targets, divided by their deviation; else as they are."""
        return value if self.moments is None else (value - self.moments.mean) / self._scale(self.moments)

    @torch.no_grad()
    def take_targets(self, target: Tensor, mask: Tensor | None = None) -> None:
        """Take value targets [*B] into the statistics, over all ranks; the values stay what they are (eq. 3, "Pop")."""
        if self.moments is None:
            return
        mean, scale = self.moments.mean.clone(), self._scale(self.moments)
        self.moments.update(target, mask)
        new_scale = self._scale(self.moments)
        for linear in (self.linear, *self._others):
            factor, shift, divisor = (x.to(linear.bias.device) for x in (scale, mean - self.moments.mean, new_scale))
            linear.weight.mul_(factor / divisor)
            linear.bias.mul_(factor).add_(shift).div_(divisor)

    def begin_at(self, target: Tensor, mask: Tensor | None = None) -> None:
        """Before anything was learned: values begin about the mean of the first targets, instead of 0."""
        if self.moments is not None and not self.moments.count:
            self.moments.update(target, mask)

    @staticmethod
    def _scale(moments: RunningMoments) -> Tensor:
        return moments.var.sqrt().clamp(min=LEAST_DEVIATION)


class ValueNetwork(nn.Module):
    """A critic with an encoder of its own: what it sees to one number each, [*B, ...] -> [*B].

    Args:
        encoder: of what it sees.
        normalize: see `ValueHead`.
    """

    def __init__(self, encoder: nn.Module, normalize: bool = False):
        super().__init__()
        self.encoder = encoder
        self.head = ValueHead(output_size(encoder), normalize)

    def forward(self, seen: Tree) -> Tensor:
        return self.head(self.encoder(seen))

    def normalized(self, value: Tensor) -> Tensor:
        return self.head.normalized(value)

    def take_targets(self, target: Tensor, mask: Tensor | None = None) -> None:
        self.head.take_targets(target, mask)

    def begin_at(self, target: Tensor, mask: Tensor | None = None) -> None:
        self.head.begin_at(target, mask)


class CentralCritic(ValueNetwork):
    """A critic of an agent that sees more than the agent: the state of the environment, or what all agents observe.

    As in MAPPO (Yu et al. 2021, arXiv:2103.01955) it sees the agent's own observation and id beside that.

    Args:
        network: of its encoder, for a Dict of `observation` and `central`; None for the default.
        input_space: of the agent's observations, as the policy's encoder is given them.
        central_space: of the rest, see `lit_rl.central`.
        normalize: see `ValueHead`.
        normalize_inputs: shift and scale the rest, as the policy does observations.
    """

    def __init__(
        self,
        network: NetworkFactory | dict[str, Any] | None,
        input_space: gym.Space,
        central_space: gym.Space,
        *,
        normalize: bool,
        normalize_inputs: bool,
    ):
        seen = gym.spaces.Dict(OrderedDict(observation=input_space, central=central_space))
        super().__init__(build_network(network, seen, "critic_network"), normalize)
        self._central_space = central_space
        normalizer = None
        if normalize_inputs:
            with contextlib.suppress(OptionError):  # there may be nothing to shift and scale
                normalizer = ObservationNormalizer(central_space)
        self.normalizer = normalizer

    def joined(self, inputs: Tree, central: Tree) -> Tree:
        """What the encoder takes: an agent's observation as the policy's encoder has it, and raw central inputs."""
        raw = as_input(self._central_space, central)
        if self.normalizer is None:
            return {"observation": inputs, "central": raw}
        scaled = self.normalizer(raw)
        for slot, seen in scaled.get("observations", {}).items():
            there = raw["alive"][..., int(slot)]
            scaled["observations"][slot] = map_tree(lambda x, there=there: _where(there, x), seen)
        return {"observation": inputs, "central": scaled}

    def take_inputs(self, central: Tree, mask: Tensor | None) -> None:
        """Take raw central inputs [*B, ...] into the statistics, if there are any; `mask` [*B] says which are real.

        Zeros that stand for agents that are not there are left out.
        """
        for name, moments in {} if self.normalizer is None else self.normalizer.moments.items():
            real = mask
            if name.startswith("observations/"):
                there = central["alive"][..., int(name.split("/")[1])] > 0
                real = there if mask is None else mask & there
            moments.update(find(central, name), real)


def _where(there: Tensor, x: Tensor) -> Tensor:
    """Floats [*B, ...] where an agent is there, [*B], and 0 elsewhere; whole numbers are classes, and stay."""
    return x * there.reshape(*there.shape, *[1] * (x.ndim - there.ndim)) if x.is_floating_point() else x
