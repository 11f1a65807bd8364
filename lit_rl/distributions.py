"""Action distributions: for an action space, how network outputs ("parameters") become actions.

Each is used twice. An env runner samples in numpy, 8 rows at a time, where `torch.distributions` would cost ten times
the network's forward pass. The learner evaluates log-probabilities and entropies of recorded actions in torch. The two
halves are tested against each other and against `torch.distributions`.
"""

import math
from typing import Any, Protocol

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from lit_rl.errors import SpaceError
from lit_rl.trees import Tree, children

LOG_SQRT_2PI = 0.5 * math.log(2 * math.pi)
HUGE = 1e37  # float32 ends at 3.4e38: between such bounds there is infinity
LOG_2 = math.log(2)
LOG_STD_MIN, LOG_STD_MAX = -20.0, 2.0


class ActionDistribution(Protocol):
    """How parameters [*B, num_outputs + num_scales] become actions [*B, *action_shape].

    Attributes:
        num_outputs: parameters that depend on the observation.
        num_scales: log standard deviations, which follow them.
        num_noise: standard normal numbers that `evaluate` estimates the entropy with; 0 where it has a closed form.
        choices: for each choice among a finite number of actions, the slice of its logits among the outputs.
    """

    num_outputs: int
    num_scales: int
    num_noise: int
    choices: list[slice]

    def sample(self, parameters: np.ndarray, rng: np.random.Generator) -> tuple[Tree, np.ndarray]:
        """Random actions [*B, *action_shape] and their log-probabilities [*B]."""

    def mode(self, parameters: np.ndarray) -> Tree:
        """The most probable actions [*B, *action_shape]."""

    def uniform(self, legal: np.ndarray, rng: np.random.Generator) -> Tree:
        """Random actions [B, *action_shape] that know nothing, where the parameters `legal` [B, num_outputs] are not 0.

        Where an outcome is to be ruled out, its logit is very low.
        """

    def evaluate(self, parameters: Tensor, action: Tree, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Log-probability of `action` and the entropy, each [*B], differentiable in `parameters`.

        Args:
            parameters: [*B, num_outputs + num_scales].
            action: [*B, *action_shape].
            noise: [*B, num_noise]; None draws it, if there is any, from torch's global generator.
        """

    def kl(self, parameters: Tensor, other: Tensor) -> Tensor:
        """KL divergence of the distribution with `parameters` from that with `other`, each [*B, P]; [*B].

        E[log p(a) - log q(a)] of actions a of p, the former: exact, and differentiable in both.
        """

    def to_env(self, action: Tree) -> Tree:
        """The action as the environment takes it: inside the space's bounds, with tuples where it has them."""

    def from_env(self, action: Tree) -> Tree:
        """Actions of the space [*B, *action_shape], in arrays by the keys of a tree, as they are recorded."""


class Categorical:
    """For Discrete spaces; the parameters are unnormalised log-probabilities ("logits") of the n actions."""

    num_scales = num_noise = 0

    def __init__(self, n: int, start: int = 0):
        self.num_outputs = n
        self.choices = [slice(0, n)]
        self._start = start

    def sample(self, parameters: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        rows = parameters.reshape(-1, self.num_outputs)
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

    def uniform(self, legal: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return self.sample(legal, rng)[0]

    def evaluate(self, parameters: Tensor, action: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        log_probs = torch.log_softmax(parameters, -1)
        log_prob = log_probs.gather(-1, action.unsqueeze(-1)).squeeze(-1)
        entropy = -(log_probs.exp() * log_probs).sum(-1)
        return log_prob, entropy

    def kl(self, parameters: Tensor, other: Tensor) -> Tensor:
        log_probs, log_others = (torch.log_softmax(x, -1) for x in (parameters, other))
        return (log_probs.exp() * (log_probs - log_others)).sum(-1)

    def to_env(self, action: np.ndarray) -> np.ndarray:
        return action + self._start if self._start else action

    def from_env(self, action: np.ndarray) -> np.ndarray:
        return action - self._start if self._start else action


class MultiCategorical:
    """For MultiDiscrete spaces: independent categorical choices, their logits one after the other."""

    num_scales = num_noise = 0

    def __init__(self, space: spaces.MultiDiscrete):
        self._parts = [Categorical(int(n)) for n in space.nvec.flat]
        self._sizes = [part.num_outputs for part in self._parts]
        self.num_outputs = sum(self._sizes)
        ends = np.cumsum(self._sizes).tolist()
        self.choices = [slice(end - size, end) for end, size in zip(ends, self._sizes)]
        self._space = space

    def sample(self, parameters: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        sampled = [part.sample(parameters[..., at], rng) for part, at in zip(self._parts, self.choices)]
        actions, log_probs = zip(*sampled)
        return self._shaped(np.stack(actions, -1)), np.sum(log_probs, 0)

    def mode(self, parameters: np.ndarray) -> np.ndarray:
        return self._shaped(np.stack([parameters[..., at].argmax(-1) for at in self.choices], -1))

    def uniform(self, legal: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return self.sample(legal, rng)[0]

    def evaluate(self, parameters: Tensor, action: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        columns = action.reshape(*parameters.shape[:-1], len(self._parts)).unbind(-1)
        logits = parameters.split(self._sizes, -1)
        terms = [part.evaluate(x, column) for part, x, column in zip(self._parts, logits, columns)]
        log_prob, entropy = (torch.stack(term).sum(0) for term in zip(*terms))
        return log_prob, entropy

    def kl(self, parameters: Tensor, other: Tensor) -> Tensor:
        pairs = zip(self._parts, parameters.split(self._sizes, -1), other.split(self._sizes, -1))
        return torch.stack([part.kl(p, q) for part, p, q in pairs]).sum(0)

    def to_env(self, action: np.ndarray) -> np.ndarray:
        return (action + self._space.start).astype(self._space.dtype)

    def from_env(self, action: np.ndarray) -> np.ndarray:
        return action - self._space.start

    def _shaped(self, action: np.ndarray) -> np.ndarray:
        return action.reshape(*action.shape[:-1], *self._space.shape)


class Bernoulli:
    """For MultiBinary spaces: independent coin flips; the parameters are the logits of their ones."""

    num_scales = num_noise = 0

    def __init__(self, space: spaces.MultiBinary):
        self.num_outputs = int(np.prod(space.shape))
        self.choices: list[slice] = []
        self._space = space

    def sample(self, parameters: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        # logit(u) < x with probability sigmoid(x)
        ones = rng.logistic(size=parameters.shape) < parameters
        log_prob = -np.logaddexp(0, np.where(ones, -parameters, parameters)).sum(-1)
        return self._shaped(ones), log_prob

    def mode(self, parameters: np.ndarray) -> np.ndarray:
        return self._shaped(parameters > 0)

    def uniform(self, legal: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return self.sample(legal, rng)[0]

    def evaluate(self, parameters: Tensor, action: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        ones = action.reshape(parameters.shape).to(parameters.dtype)
        log_prob = -torch.nn.functional.softplus(torch.where(ones > 0, -parameters, parameters)).sum(-1)
        entropy = torch.nn.functional.softplus(parameters) - parameters * torch.sigmoid(parameters)
        return log_prob, entropy.sum(-1)

    def kl(self, parameters: Tensor, other: Tensor) -> Tensor:
        softplus = torch.nn.functional.softplus
        return (torch.sigmoid(parameters) * (parameters - other) + softplus(other) - softplus(parameters)).sum(-1)

    def to_env(self, action: np.ndarray) -> np.ndarray:
        return action.astype(self._space.dtype)

    def from_env(self, action: np.ndarray) -> np.ndarray:
        return action.astype(np.uint8, copy=False)

    def _shaped(self, ones: np.ndarray) -> np.ndarray:
        return ones.astype(np.uint8).reshape(*ones.shape[:-1], *self._space.shape)


class DiagonalGaussian:
    """For Box spaces of floats; the parameters are the d means followed by the d log standard deviations.

    The distribution is unbounded: the recorded action is the sample, the environment is given it clipped to the
    space's bounds (as in Stable-Baselines3 and CleanRL).
    """

    num_noise = 0

    def __init__(self, space: spaces.Box):
        self.num_outputs = self.num_scales = int(np.prod(space.shape))
        self.choices: list[slice] = []
        self._low, self._high, self._shape, self._dtype = space.low, space.high, space.shape, space.dtype

    def sample(self, parameters: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        mean, log_std = parameters[..., : self.num_outputs], parameters[..., self.num_outputs :]
        noise = rng.standard_normal(mean.shape, dtype=np.float32)
        log_prob = -(0.5 * noise * noise + log_std + LOG_SQRT_2PI).sum(-1)
        return self._shaped(mean + np.exp(log_std) * noise), log_prob

    def mode(self, parameters: np.ndarray) -> np.ndarray:
        return self._shaped(parameters[..., : self.num_outputs])

    def uniform(self, legal: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        bounded = _are_bounds(self._low) & _are_bounds(self._high)
        noise = rng.standard_normal((len(legal), *self._shape))
        inside = rng.uniform(np.where(bounded, self._low, 0), np.where(bounded, self._high, 1), noise.shape)
        return np.where(bounded, inside, noise).astype(np.float32)

    def evaluate(self, parameters: Tensor, action: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        mean, log_std = parameters.split(self.num_outputs, -1)
        noise = (action.reshape(mean.shape) - mean) * torch.exp(-log_std)
        log_prob = -(0.5 * noise * noise + log_std + LOG_SQRT_2PI).sum(-1)
        entropy = (log_std + LOG_SQRT_2PI + 0.5).sum(-1)
        return log_prob, entropy

    def kl(self, parameters: Tensor, other: Tensor) -> Tensor:
        return _gaussian_kl(*parameters.split(self.num_outputs, -1), *other.split(self.num_outputs, -1))

    def to_env(self, action: np.ndarray) -> np.ndarray:
        return np.clip(action, self._low, self._high).astype(self._dtype, copy=False)

    def from_env(self, action: np.ndarray) -> np.ndarray:
        return action.astype(np.float32, copy=False)

    def _shaped(self, action: np.ndarray) -> np.ndarray:
        return action if len(self._shape) == 1 else action.reshape(*action.shape[:-1], *self._shape)


class SquashedGaussian:
    """For Box spaces with bounds: the tanh of a Gaussian. The parameters are d means and d log standard deviations.

    log pi(a) = log N(u; mean, std) - sum log(1 - tanh(u)^2),  a = tanh(u): appendix C of Haarnoja et al. 2018,
    arXiv:1801.01290. The recorded action lies in [-1, 1]; the environment is given it scaled to the space's bounds,
    and log-probabilities are those of the recorded action. Log standard deviations are kept in [-20, 2].
    """

    def __init__(self, space: spaces.Box):
        self.num_outputs = self.num_scales = self.num_noise = int(np.prod(space.shape))
        self.choices: list[slice] = []
        if not (_are_bounds(space.low).all() and _are_bounds(space.high).all()):
            raise SpaceError(
                f"Action space {space} has no bounds, between which actions could be squashed. Wrap the environment "
                "(gymnasium.wrappers:RescaleAction after ClipAction), or use PPO without squash_actions."
            )
        self._shape, self._dtype = space.shape, space.dtype
        self._low, self._high = space.low, space.high
        low, high = (bound.astype(np.promote_types(space.low.dtype, np.float32)) for bound in (space.low, space.high))
        self._center, self._half = (high + low) / 2, (high - low) / 2

    def sample(self, parameters: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        mean = parameters[..., : self.num_outputs]
        log_std = np.clip(parameters[..., self.num_outputs :], LOG_STD_MIN, LOG_STD_MAX)
        action = np.tanh(mean + np.exp(log_std) * rng.standard_normal(mean.shape, dtype=np.float32))
        # The log-probability of what is recorded, as `evaluate` finds it again: tanh(u) says little of a large u.
        inside = 1 - np.finfo(action.dtype).eps
        unbounded = np.arctanh(action.clip(-inside, inside))
        noise = (unbounded - mean) * np.exp(-log_std)
        log_slope = 2 * (LOG_2 - unbounded - np.logaddexp(0, -2 * unbounded))
        log_prob = -(0.5 * noise * noise + log_std + LOG_SQRT_2PI + log_slope).sum(-1)
        return self._shaped(action), log_prob

    def mode(self, parameters: np.ndarray) -> np.ndarray:
        """The tanh of the means: what evaluation of squashed Gaussians takes, though not quite their mode."""
        return self._shaped(np.tanh(parameters[..., : self.num_outputs]))

    def uniform(self, legal: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return rng.uniform(-1, 1, (len(legal), *self._shape)).astype(np.float32)

    def rsample(self, parameters: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Actions [*B, *action_shape] made of standard normal `noise` [*B, d], and log-probabilities [*B].

        Both are differentiable in the parameters. 1 - tanh(u)^2 is computed as 4 / (e^u + e^-u)^2, which is exact
        where tanh(u) rounds to 1.
        """
        mean, log_std = parameters.split(self.num_outputs, -1)
        log_std = log_std.clamp(LOG_STD_MIN, LOG_STD_MAX)
        unbounded = torch.addcmul(mean, log_std.exp(), noise)
        log_slope = 2 * (LOG_2 - unbounded - torch.nn.functional.softplus(-2 * unbounded))
        log_prob = -(0.5 * noise * noise + log_std + LOG_SQRT_2PI + log_slope).sum(-1)
        return self._shaped(torch.tanh(unbounded)), log_prob

    def evaluate(self, parameters: Tensor, action: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Log-probability of `action`, and an estimate of the entropy: it has no closed form.

        An action of exactly +-1 counts as the nearest number inside.
        """
        mean, log_std = parameters.split(self.num_outputs, -1)
        log_std = log_std.clamp(LOG_STD_MIN, LOG_STD_MAX)
        inside = 1 - torch.finfo(action.dtype).eps
        unbounded = torch.atanh(action.reshape(mean.shape).clamp(-inside, inside))
        inverse = (unbounded - mean) * torch.exp(-log_std)
        log_slope = 2 * (LOG_2 - unbounded - torch.nn.functional.softplus(-2 * unbounded))
        log_prob = -(0.5 * inverse * inverse + log_std + LOG_SQRT_2PI + log_slope).sum(-1)
        return log_prob, -self.rsample(parameters, torch.randn_like(mean) if noise is None else noise)[1]

    def kl(self, parameters: Tensor, other: Tensor) -> Tensor:
        """That of the two Gaussians: the tanh changes nothing."""
        pairs = (x.split(self.num_outputs, -1) for x in (parameters, other))
        return _gaussian_kl(*(x for mean, log_std in pairs for x in (mean, log_std.clamp(LOG_STD_MIN, LOG_STD_MAX))))

    def to_env(self, action: np.ndarray) -> np.ndarray:
        scaled = self._center + self._half * action  # which may round to a number outside
        return np.clip(scaled, self._low, self._high).astype(self._dtype, copy=False)

    def from_env(self, action: np.ndarray) -> np.ndarray:
        scaled = (action - self._center) / np.where(self._half > 0, self._half, 1.0)
        return np.clip(scaled, -1, 1).astype(np.float32)

    def _shaped(self, action: Any) -> Any:
        return action if len(self._shape) == 1 else action.reshape(*action.shape[:-1], *self._shape)


class BoundedGaussian(DiagonalGaussian):
    """For Box spaces with bounds: a Gaussian whose mean and standard deviation are bounded, as DreamerV3 has it.

    The parameters are d numbers x and d numbers y: mean = tanh(x), std = 0.1 + 0.9 sigmoid(y + 2). The recorded action
    is the sample, which may lie outside of [-1, 1]; the environment is given it clipped, and scaled to its bounds.
    """

    def __init__(self, space: spaces.Box):
        super().__init__(space)
        squashed = SquashedGaussian(space)  # which refuses a space without bounds
        self._scaled = squashed.to_env

    def sample(self, parameters: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        return super().sample(self.bounded(torch.from_numpy(parameters)).numpy(), rng)

    def mode(self, parameters: np.ndarray) -> np.ndarray:
        return self._shaped(np.tanh(parameters[..., : self.num_outputs]))

    def uniform(self, legal: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return rng.uniform(-1, 1, (len(legal), *self._shape)).astype(np.float32)

    def evaluate(self, parameters: Tensor, action: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return super().evaluate(self.bounded(parameters), action, noise)

    def kl(self, parameters: Tensor, other: Tensor) -> Tensor:
        return super().kl(self.bounded(parameters), self.bounded(other))

    def to_env(self, action: np.ndarray) -> np.ndarray:
        return self._scaled(np.clip(action, -1, 1))

    def bounded(self, parameters: Tensor) -> Tensor:
        """Means and log standard deviations, [*B, 2d]."""
        mean, std = parameters.split(self.num_outputs, -1)
        return torch.cat([torch.tanh(mean), torch.log(0.1 + 0.9 * torch.sigmoid(std + 2))], -1)


def _gaussian_kl(mean: Tensor, log_std: Tensor, other_mean: Tensor, other_log_std: Tensor) -> Tensor:
    """KL divergence of independent Gaussians from others, each [*B, d]; [*B]."""
    ratio, shift = 2 * (log_std - other_log_std), (mean - other_mean) * torch.exp(-other_log_std)
    return 0.5 * (torch.expm1(ratio) - ratio + shift.square()).sum(-1)


def _are_bounds(bounds: np.ndarray) -> np.ndarray:
    """Which numbers bound anything; the largest of a data type, and infinity, are ways to say that nothing does."""
    return np.abs(bounds.astype(np.float64)) < HUGE


class Joint:
    """For Dict and Tuple spaces: independent parts. The log-probability and the entropy are the sums of theirs.

    The parameters are the outputs of all parts, then the log standard deviations of all parts. Actions are dicts by
    key, "0", "1", ... for a Tuple.
    """

    def __init__(self, space: gym.Space, parts: dict[str, ActionDistribution]):
        self.parts = parts
        self.choices = []
        self._tuple = isinstance(space, spaces.Tuple)
        self._slices: dict[str, tuple[slice, slice]] = {}
        self.num_outputs = sum(part.num_outputs for part in parts.values())
        self.num_scales = sum(part.num_scales for part in parts.values())
        self.num_noise = sum(part.num_noise for part in parts.values())
        at, scale_at = 0, self.num_outputs
        for key, part in parts.items():
            self._slices[key] = slice(at, at + part.num_outputs), slice(scale_at, scale_at + part.num_scales)
            self.choices += [slice(at + choice.start, at + choice.stop) for choice in part.choices]
            at, scale_at = at + part.num_outputs, scale_at + part.num_scales

    def sample(self, parameters: np.ndarray, rng: np.random.Generator) -> tuple[Tree, np.ndarray]:
        sampled = {key: part.sample(self._of(parameters, key), rng) for key, part in self.parts.items()}
        return {key: action for key, (action, _) in sampled.items()}, np.sum([lp for _, lp in sampled.values()], 0)

    def mode(self, parameters: np.ndarray) -> Tree:
        return {key: part.mode(self._of(parameters, key)) for key, part in self.parts.items()}

    def evaluate(self, parameters: Tensor, action: Tree, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        sizes = [part.num_noise for part in self.parts.values()]
        pieces = [None] * len(sizes) if noise is None else noise.split(sizes, -1)
        terms = [
            part.evaluate(self._of(parameters, key), action[key], piece)
            for (key, part), piece in zip(self.parts.items(), pieces)
        ]
        log_prob, entropy = (torch.stack(term).sum(0) for term in zip(*terms))
        return log_prob, entropy

    def kl(self, parameters: Tensor, other: Tensor) -> Tensor:
        parts = self.parts.items()
        return torch.stack([part.kl(self._of(parameters, key), self._of(other, key)) for key, part in parts]).sum(0)

    def uniform(self, legal: np.ndarray, rng: np.random.Generator) -> Tree:
        return {key: part.uniform(legal[..., self._slices[key][0]], rng) for key, part in self.parts.items()}

    def to_env(self, action: Tree) -> Tree:
        values = {key: part.to_env(action[key]) for key, part in self.parts.items()}
        return tuple(values.values()) if self._tuple else values

    def from_env(self, action: Tree) -> Tree:
        return {key: part.from_env(action[key]) for key, part in self.parts.items()}

    def _of(self, parameters: Any, key: str) -> Any:
        """A part's own parameters, of arrays or tensors."""
        outputs, scales = (parameters[..., at] for at in self._slices[key])
        if not self.parts[key].num_scales:
            return outputs
        cat: Any = torch.cat if isinstance(parameters, Tensor) else np.concatenate
        return cat([outputs, scales], -1)


def distribution_for(space: gym.Space, *, squash: bool = False) -> ActionDistribution:
    """The action distribution for an action space; with `squash`, Box actions are kept within their bounds by a tanh.

    Raises:
        SpaceError: for a space that has none.
    """
    parts = children(space)
    if parts:
        return Joint(space, {key: distribution_for(part, squash=squash) for key, part in parts.items()})
    if isinstance(space, spaces.Discrete):
        return Categorical(int(space.n), int(space.start))
    if isinstance(space, spaces.MultiDiscrete):
        return MultiCategorical(space)
    if isinstance(space, spaces.MultiBinary):
        return Bernoulli(space)
    if isinstance(space, spaces.Box) and space.shape and all(space.shape) and np.issubdtype(space.dtype, np.floating):
        return SquashedGaussian(space) if squash else DiagonalGaussian(space)
    raise SpaceError(
        f"Action space {space} is not supported: expected Discrete, MultiDiscrete, MultiBinary, a Box of floats of at "
        "least one dimension, or a Dict or Tuple of these. Wrap the environment (gymnasium.wrappers:TransformAction) "
        "to give it such a space."
    )
