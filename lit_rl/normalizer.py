"""Running statistics: of observations (inside the policy) and of discounted returns (inside the algorithm)."""

from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn

from lit_rl import distributed, returns
from lit_rl.errors import OptionError
from lit_rl.spec import is_image
from lit_rl.trees import Tree, find, is_leaf, space_leaves

CLIP = 10.0
EPSILON = 1e-8
WHOLE = "/"  # the name of an observation that is not nested


class RunningMoments(nn.Module):
    """Mean and variance of all rows seen, merged batch by batch (Chan et al. 1979).

    The statistics are buffers, so that they travel with weights and checkpoints, and are the same on every rank.

    Args:
        shape: of a row.
        least_weight: of the newest batch among all that were seen: above 0 older ones are forgotten.
    """

    mean: Tensor
    var: Tensor
    count: Tensor

    def __init__(self, shape: tuple[int, ...] = (), least_weight: float = 0.0):
        super().__init__()
        self._least_weight = least_weight
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("var", torch.ones(shape))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def update(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Take in rows `x` [*N, *shape] of which only those with `mask` [*N] True are real; summed over ranks."""
        rows = x.reshape(-1, *self.mean.shape) if mask is None else x[mask]
        rows = rows.to(torch.float64)
        # Two sums per rank; the shift by the running mean keeps their difference accurate.
        shifted = rows - self.mean.to(torch.float64)
        sums = torch.stack([shifted.sum(0), shifted.square().sum(0)])
        count = torch.tensor(float(len(rows)), dtype=torch.float64, device=x.device)
        packed = distributed.all_reduce_sum(torch.cat([sums.flatten(), count.reshape(1)]))
        batch_count = packed[-1]
        if batch_count == 0 or not packed.isfinite().all():  # the update that uses these rows is skipped
            return
        shift, square = (packed[:-1] / batch_count).reshape(sums.shape)
        batch_var = square - shift.square()
        total = self.count + batch_count
        weight = (batch_count / total).clamp(min=self._least_weight)
        var = self.var * (1 - weight) + batch_var * weight + shift.square() * weight * (1 - weight)
        self.mean.add_((shift * weight).to(self.mean.dtype))
        self.var.copy_(var)
        self.count.add_(batch_count.to(torch.int64))


class ObservationNormalizer(nn.Module):
    """Standardises an observation's vectors, clipped to +-10: every Box in it that is no image. The rest is passed on.

    Args:
        space: of the observations.

    Raises:
        OptionError: if there is nothing to standardise.
    """

    def __init__(self, space: gym.Space):
        super().__init__()
        boxes = {p: box for p, box in space_leaves(space).items() if isinstance(box, spaces.Box) and not is_image(box)}
        if not boxes:
            raise OptionError(
                f"normalize_observations=True: expected a Box observation that is no image, got {space}. Leave it out."
            )
        self.moments: Any = nn.ModuleDict({path or WHOLE: RunningMoments(box.shape) for path, box in boxes.items()})

    def update(self, obs: Tree, mask: Tensor | None = None) -> None:
        """Take in observations [*N, *obs] of which only those with `mask` [*N] True are real; summed over ranks."""
        for name, moments in self.moments.items():
            moments.update(obs if name == WHOLE else find(obs, name), mask)

    def forward(self, obs: Tree, path: str = "") -> Tree:
        if not is_leaf(obs):
            return {key: self(obs[key], f"{path}/{key}" if path else key) for key in obs}
        if (path or WHOLE) not in self.moments:
            return obs
        moments = self.moments[path or WHOLE]
        return ((obs - moments.mean) / (moments.var + EPSILON).sqrt()).clamp(-CLIP, CLIP)

    def numpy(self, obs: Tree, path: str = "") -> Tree:
        """`forward` for arrays."""
        if not is_leaf(obs):
            return {key: self.numpy(obs[key], f"{path}/{key}" if path else key) for key in obs}
        if (path or WHOLE) not in self.moments:
            return obs
        moments = self.moments[path or WHOLE]
        scaled = (obs.astype(np.float32, copy=False) - moments.mean.numpy()) / np.sqrt(
            moments.var.numpy() + np.float32(EPSILON)
        )
        return np.clip(scaled, -CLIP, CLIP)


class ReturnNormalizer(RunningMoments):
    """Scales rewards by the running standard deviation of the discounted return.

    As `VecNormalize(norm_reward=True)` of Stable-Baselines3: the reward is divided, its mean is kept.
    """

    def __init__(self, gamma: float):
        super().__init__()
        self.gamma = gamma
        self.running_return: Tensor | None = None  # [B], this rank's own: saved with the rank, not with the weights

    def shared(self) -> "ReturnNormalizer":
        """One with the same statistics for other time lines: what either takes in, both have."""
        other = ReturnNormalizer(self.gamma)
        other._buffers = self._buffers
        return other

    def scale(
        self,
        reward: Tensor,
        done: Tensor,
        mask: Tensor | None = None,
        is_init: Tensor | None = None,
        length: Tensor | None = None,
    ) -> Tensor:
        """Take in a rollout's rewards [B, T] and return them scaled and clipped to +-10; see `running_return`."""
        carry = self.running_return
        if carry is None or carry.shape != reward.shape[:1]:
            carry = reward.new_zeros(reward.shape[:1])
        discounted, self.running_return = returns.running_return(
            reward, done, gamma=self.gamma, initial=carry, is_init=is_init, length=length
        )
        self.running_return = self.running_return.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
        self.update(discounted, mask)
        return self.scaled(reward)

    def scale_apart(self, reward: Tensor, done: Tensor, is_init: Tensor, mask: Tensor | None = None) -> Tensor:
        """`scale` for time lines [B, T] that go on from none before: each one's return begins at 0.

        Returns are then no longer than T steps, and their standard deviation is smaller if 1 / (1 - gamma) is more.

        Args:
            reward, done, is_init: [B, T].
            mask: which rows are taken in, [B, T]; all are scaled.
        """
        keep = torch.cat([torch.zeros_like(reward[:, :1]), self.gamma * ~(done[:, :-1] | is_init[:, 1:])], 1)
        self.update(returns.discounted_sum(reward.flip(1), keep.flip(1)).flip(1), mask)
        return self.scaled(reward)

    def scaled(self, reward: Tensor) -> Tensor:
        """Rewards scaled and clipped to +-10."""
        return (reward / (self.var + EPSILON).sqrt()).clamp(-CLIP, CLIP)


class ReturnRange(nn.Module):
    """The range between two percentiles of returns, smoothed over updates: what DreamerV3 divides advantages by.

    low <- (1 - rate) low + rate P5(returns), high likewise with P95; both begin at 0. The scale is max(1, high - low):
    small returns are not made larger. Percentiles are those of all ranks' returns.

    Args:
        rate: of the newest returns.
    """

    limits: Tensor
    _percentiles: Tensor

    def __init__(self, rate: float):
        super().__init__()
        self._rate = rate
        self.register_buffer("limits", torch.zeros(2))
        self.register_buffer("_percentiles", torch.tensor([0.05, 0.95]), persistent=False)

    def moved(self, returns: Tensor) -> Tensor:
        """The limits [2] after these returns [*N], which are kept only if they become `limits`."""
        returns = distributed.gather_rows(returns.detach().flatten())
        return torch.lerp(self.limits, torch.quantile(returns, self._percentiles), self._rate)

    @staticmethod
    def scale(limits: Tensor) -> Tensor:
        """What advantages are divided by, []."""
        return (limits[1] - limits[0]).clamp(min=1.0)
