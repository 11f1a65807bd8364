"""Resuming episodes under way, whatever the action space; and no mistake of our own is called the environment's."""

from typing import Any

import numpy as np
import pytest
import torch
from envs import SampleEnv
from gymnasium import spaces

from lit_rl.envs.make import EnvConfig
from lit_rl.envs.vector import SyncVectorEnv
from lit_rl.evaluation.episodes import play
from lit_rl.policy import Policy
from lit_rl.runners.env_runner import EnvRunner

DISCRETE, BOX = spaces.Discrete(3), spaces.Box(-1, 1, (2,))


class Seeded(SampleEnv):
    """Observations come from `np_random` alone; episodes of 4 steps."""

    def reset(self, **options: Any) -> Any:
        super().reset(**options)
        self._t = 0
        return self._draw(), {}

    def step(self, action: Any) -> Any:
        super().step(action)
        return self._draw(), 1.0, self._t >= 4, False, {}

    def _draw(self) -> np.ndarray:
        return self.np_random.uniform(-1, 1, 2).astype(np.float32)


def runner_of(action_space: spaces.Space, length: int, env: type = Seeded) -> EnvRunner:
    config = EnvConfig(env, {"observation_space": BOX, "action_space": action_space})
    torch.manual_seed(0)
    policy, seed = Policy(config.spec()), np.random.SeedSequence(0)
    return EnvRunner(config, policy, num_envs=2, rollout_length=length, seed=seed, replayable=True)


@pytest.mark.parametrize("length", [8, 6])  # after 8 steps an episode has just begun, after 6 it made two
@pytest.mark.parametrize(
    "action_space",
    [
        DISCRETE,
        BOX,
        spaces.MultiDiscrete([2, 3]),
        spaces.Tuple([DISCRETE, BOX]),
        spaces.Dict(a=DISCRETE, b=spaces.Tuple([DISCRETE, BOX])),
    ],
    ids=str,
)
def test_episodes_go_on_whether_they_have_just_begun_or_not(action_space: spaces.Space, length: int) -> None:
    runner, resumed = runner_of(action_space, length), runner_of(action_space, length)
    runner.sample()
    assert resumed.set_state(runner.get_state()) == 0
    ours, theirs = resumed.sample().rows.views(), runner.sample().rows.views()
    for name, column in theirs.items():
        np.testing.assert_array_equal(ours[name], column)


class Unwilling(Seeded):
    """Raises in its second life, when an episode is begun again."""

    lives = 0

    def step(self, action: Any) -> Any:
        if Unwilling.lives:
            raise ValueError("not again")
        return super().step(action)


def test_an_environment_that_raises_begins_afresh() -> None:
    Unwilling.lives = 0
    runner, resumed = runner_of(DISCRETE, 6, Unwilling), runner_of(DISCRETE, 6, Unwilling)
    runner.sample()
    Unwilling.lives = 1
    assert resumed.set_state(runner.get_state()) == 2


def test_a_mistake_of_ones_own_is_not_the_environments(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = runner_of(DISCRETE, 6)
    runner.sample()
    state = runner.get_state()

    def mistaken(*arguments: Any) -> Any:
        raise KeyError("ours")

    monkeypatch.setattr(SyncVectorEnv, "_each", mistaken)
    with pytest.raises(KeyError, match="ours"):
        runner.set_state(state)
    with pytest.raises(KeyError, match="ours"):
        runner.sample()
    with pytest.raises(KeyError, match="ours"):
        list(play(runner._env, runner.policy, [0]))
