"""Action distributions: for an action space, how network outputs ("parameters") become actions.

Each is used twice. An env runner samples in numpy, 8 rows at a time, where `torch.distributions` would cost ten times
the network's forward pass. The learner evaluates log-probabilities and entropies of recorded actions in torch. The two
halves are tested against each other and against `torch.distributions`.
"""

import math
from typing import Protocol

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from lit_rl.errors import SpaceError

LOG_SQRT_2PI = 0.5 * math.log(2 * math.pi)


class ActionDistribution(Protocol):
    """How parameters of shape [*B, num_parameters] become actions of shape [*B, *action_shape]."""

    num_parameters: int

    def sample(self, parameters: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Random actions [*B, *action_shape] and their log-probabilities [*B]."""

    def mode(self, parameters: np.ndarray) -> np.ndarray:
        """The most probable actions [*B, *action_shape]."""

    def evaluate(self, parameters: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probability of `action` and the entropy, each [*B], differentiable in `parameters`."""

    def to_env(self, action: np.ndarray) -> np.ndarray:
        """The action as the environment takes it: inside the space's bounds."""


class Categorical:
    """For Discrete spaces; the parameters are unnormalised log-probabilities ("logits") of the n actions."""

    def __init__(self, space: spaces.Discrete):
        self.num_parameters = int(space.n)
        self._start = int(space.start)

    def sample(self, parameters: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        rows = parameters.reshape(-1, self.num_parameters)
        shifted = rows - rows.max(-1, keepdims=True)
        cumulative = np.exp(shifted).cumsum(-1)
        total = cumulative[:, -1]
        # Inverse CDF. `<=` never chooses an action of probability 0, and the threshold is below the total.
        action = (cumulative <= (rng.random(len(rows)) * total)[:, None]).sum(-1)
        log_prob = shifted[np.arange(len(rows)), action] - np.log(total)
        shape = parameters.shape[:-1]
        return action.reshape(shape), log_prob.reshape(shape)

    def mode(self, parameters: np.ndarray) -> np.ndarray:
        return parameters.argmax(-1)

    def evaluate(self, parameters: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        log_probs = torch.log_softmax(parameters, -1)
        log_prob = log_probs.gather(-1, action.unsqueeze(-1)).squeeze(-1)
        entropy = -(log_probs.exp() * log_probs).sum(-1)
        return log_prob, entropy

    def to_env(self, action: np.ndarray) -> np.ndarray:
        return action + self._start if self._start else action


class DiagonalGaussian:
    """For Box spaces of one dimension; the parameters are the d means followed by the d log standard deviations.

    The distribution is unbounded: the recorded action is the sample, the environment is given it clipped to the
    space's bounds (as in Stable-Baselines3 and CleanRL).
    """

    def __init__(self, space: spaces.Box):
        self._size = int(np.prod(space.shape))
        self.num_parameters = 2 * self._size
        self._low, self._high = space.low, space.high

    def sample(self, parameters: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        mean, log_std = parameters[..., : self._size], parameters[..., self._size :]
        noise = rng.standard_normal(mean.shape, dtype=np.float32)
        log_prob = -(0.5 * noise * noise + log_std + LOG_SQRT_2PI).sum(-1)
        return mean + np.exp(log_std) * noise, log_prob

    def mode(self, parameters: np.ndarray) -> np.ndarray:
        return parameters[..., : self._size]

    def evaluate(self, parameters: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_std = parameters.split(self._size, -1)
        noise = (action - mean) * torch.exp(-log_std)
        log_prob = -(0.5 * noise * noise + log_std + LOG_SQRT_2PI).sum(-1)
        entropy = (log_std + LOG_SQRT_2PI + 0.5).sum(-1)
        return log_prob, entropy

    def to_env(self, action: np.ndarray) -> np.ndarray:
        return np.clip(action, self._low, self._high)


def distribution_for(space: gym.Space) -> ActionDistribution:
    """The action distribution for an action space.

    Raises:
        SpaceError: for a space other than Discrete or Box of one dimension.
    """
    if isinstance(space, spaces.Discrete):
        return Categorical(space)
    if isinstance(space, spaces.Box) and len(space.shape) == 1 and np.issubdtype(space.dtype, np.floating):
        return DiagonalGaussian(space)
    raise SpaceError(
        f"Action space {space} is not supported: expected Discrete or a one-dimensional Box of floats. "
        "Wrap the environment (gymnasium.wrappers.TransformAction, RescaleAction) to give it such a space."
    )
