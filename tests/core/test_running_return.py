"""The return normaliser's running sum ends where an episode does, also where its end was not seen."""

from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces

from lit_rl.envs.make import EnvConfig
from lit_rl.normalizer import ReturnNormalizer
from lit_rl.policy import Policy
from lit_rl.returns import running_return
from lit_rl.runners.env_runner import EnvRunner
from lit_rl.runners.gathering import to_rollout


class TenEnv(gym.Env):
    """Reward 10 for ever; raises at its 5th step."""

    observation_space, action_space = spaces.Box(0, 9, (1,), np.float32), spaces.Discrete(2)
    _steps = 0

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        return np.zeros(1, np.float32), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
        self._steps += 1
        if self._steps == 5:
            raise ValueError("the simulator fell over")
        return np.zeros(1, np.float32), 10.0, False, False, {}


def test_is_init_cuts_the_sum_where_no_end_was_seen() -> None:
    no = torch.zeros(1, 3, dtype=torch.bool)
    is_init = torch.tensor([[True, False, True]])
    sums, carry = running_return(torch.ones(1, 3), no, gamma=0.5, initial=torch.tensor([8.0]), is_init=is_init)
    assert sums.tolist() == [[1.0, 1.5, 1.0]] and carry.tolist() == [0.5]


def test_a_sum_that_is_not_finite_is_cut_too() -> None:
    no, is_init = torch.zeros(1, 2, dtype=torch.bool), torch.tensor([[False, True]])
    reward = torch.tensor([[torch.inf, 1.0]])
    assert running_return(reward, no, gamma=0.5, initial=torch.zeros(1), is_init=is_init)[0][0, 1] == 1


def test_an_environment_that_fails_in_a_fragments_first_step_begins_a_new_sum(monkeypatch) -> None:
    config = EnvConfig(TenEnv)
    runner = EnvRunner(config, Policy(config.spec()), num_envs=1, rollout_length=4, seed=np.random.SeedSequence(0))
    normalizer, sums = ReturnNormalizer(0.5), []
    monkeypatch.setattr(normalizer, "update", lambda discounted, mask: sums.append(discounted))
    masks = []
    for _ in range(2):
        rollout = to_rollout([runner.sample()], copy=False).clone()
        next_ = rollout["next"]
        masks.append(rollout.get("mask", torch.ones(1, 4, dtype=torch.bool)))
        normalizer.scale(next_["reward"], next_["done"], masks[-1], rollout["is_init"])
    assert sums[0][masks[0]].tolist() == [10.0, 15.0, 17.5, 18.75]
    assert masks[1].tolist() == [[False, True, True, True]]
    assert sums[1][masks[1]].tolist() == [10.0, 15.0, 17.5]  # before: 10 + 0.25 * 18.75 in the first row
