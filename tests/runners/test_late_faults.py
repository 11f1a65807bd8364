"""What an environment gets wrong after its first step: named as at the first, and neither cut nor blamed on numpy."""

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector import AutoresetMode

from lit_rl.envs.make import EnvConfig
from lit_rl.envs.vector import SyncVectorEnv
from lit_rl.errors import EnvError, EnvFailure
from lit_rl.evaluation.episodes import play
from lit_rl.observations import stacked
from lit_rl.policy import Policy
from lit_rl.runners.env_runner import EnvRunner

VECTOR = spaces.Box(-1, 1, (2,))
NESTED = spaces.Dict(a=VECTOR, b=spaces.Tuple([spaces.Box(0, 255, (1,), np.uint8), spaces.Discrete(3)]))
PIXELS = spaces.Box(0, 255, (2,), np.uint8)
GOOD, BYTE = np.zeros(2, np.float32), np.zeros(1, np.uint8)
NESTED_GOOD = {"a": GOOD, "b": (BYTE, 1)}

WRONG = [
    (NESTED, NESTED_GOOD, {"a": np.zeros(3, np.float32), "b": (BYTE, 1)}, r"observation\['a'\] has shape \(3,\)"),
    (NESTED, NESTED_GOOD, {"b": (BYTE, 1)}, "observation has no 'a'"),
    (NESTED, NESTED_GOOD, {"a": GOOD, "b": (BYTE, 1, 2)}, r"observation\['b'\] is 3 parts"),
    (NESTED, NESTED_GOOD, {"a": GOOD, "b": (BYTE + 0.5, 1)}, r"observation\['b'\]\[0\]=.*expected whole numbers"),
    (NESTED, NESTED_GOOD, {"a": GOOD, "b": (np.array([300]), 1)}, r"observation\['b'\]\[0\]=.*from 0 to 255"),
    (NESTED, NESTED_GOOD, {"a": GOOD, "b": (BYTE, 1.5)}, r"observation\['b'\]\[1\]=1.5: expected whole numbers"),
    (NESTED, NESTED_GOOD, {"a": "no", "b": (BYTE, 1)}, r"observation\['a'\]='no': expected numbers"),
    (PIXELS, np.zeros(2, np.uint8), np.array([0.5, 1.0]), "expected whole numbers"),
    (PIXELS, np.zeros(2, np.uint8), np.array([0, 300]), "from 0 to 255"),
    (VECTOR, GOOD, np.zeros(1, np.float32), r"observation has shape \(1,\)"),
    (spaces.MultiDiscrete([3, 3]), np.zeros(2, np.int64), np.array([0.0, 1.5]), "expected whole numbers"),
]


class Late(gym.Env):
    """Episodes of four steps; what is wrong comes after `steps` of them, or from the second reset."""

    action_space = spaces.Discrete(2)

    def __init__(self, space: gym.Space, good: Any, wrong: Any, steps: int | None):
        self.observation_space, self._good, self._wrong, self._steps = space, good, wrong, steps
        self._t, self._episode = 0, -1

    def reset(self, **options: Any) -> Any:
        super().reset(**options)
        self._t, self._episode = 0, self._episode + 1
        return self._wrong if self._steps is None and self._episode else self._good, {}

    def step(self, action: Any) -> Any:
        self._t += 1
        return self._wrong if self._t == self._steps else self._good, 1.0, self._t >= 4, False, {}


@pytest.mark.parametrize("vectorization", ["sync", "async"])
@pytest.mark.parametrize("steps", [2, 4, None])
@pytest.mark.parametrize(("space", "good", "wrong", "words"), WRONG)
def test_a_late_observation_is_checked_as_the_first(
    space: gym.Space, good: Any, wrong: Any, words: str, steps: int | None, vectorization: str
) -> None:
    if vectorization == "async" and (steps == 2 or space is not NESTED):
        pytest.skip("one path for all")
    env = EnvConfig(Late, {"space": space, "good": good, "wrong": wrong, "steps": steps}, vectorization=vectorization)
    policy = Policy(env.spec())
    what = "reset" if steps is None else "step"
    message = f"env=Late: {what} of environment 0 returned what is not in its observation_space: .*{words}"
    with pytest.raises(EnvError, match=message) as collecting:
        EnvRunner(env, policy, num_envs=1, rollout_length=9, seed=np.random.SeedSequence(0)).sample()
    with pytest.raises(EnvError, match=message) as evaluating:
        list(play(env, policy, range(2), num_envs=1))
    for caught in (collecting, evaluating):
        assert not isinstance(caught.value, EnvFailure)  # which would be tried again


class OddReset(Late):
    def reset(self, **options: Any) -> Any:
        found = super().reset(**options)
        return found[0] if self._episode else found


@pytest.mark.parametrize("steps", [2, 4])
def test_a_late_reset_that_is_no_pair_is_named(steps: int) -> None:
    env = EnvConfig(OddReset, {"space": VECTOR, "good": GOOD, "wrong": GOOD, "steps": steps})
    with pytest.raises(EnvError, match=r"reset of environment 0 returned array.*expected \(observation, info\)"):
        EnvRunner(env, Policy(env.spec()), num_envs=1, rollout_length=9, seed=np.random.SeedSequence(0)).sample()


def test_observations_of_other_types_that_lose_nothing_are_taken() -> None:
    batch = stacked(NESTED, [{"b": [[7], np.int8(2)], "a": [0, 1], "more": 1}, {"a": GOOD, "b": (BYTE, 1)}])
    np.testing.assert_array_equal(batch["a"], [[0, 1], [0, 0]])
    np.testing.assert_array_equal(batch["b"][0], [[7], [0]])
    np.testing.assert_array_equal(batch["b"][1], [2, 1])
    assert [batch["a"].dtype, batch["b"][0].dtype, batch["b"][1].dtype] == [np.float32, np.uint8, np.int64]
    # Whole numbers as floats are looked at closely, and taken.
    late = Late(spaces.MultiDiscrete([3, 3]), np.zeros(2, np.int64), np.array([2.0, 1.0]), 1)
    envs = SyncVectorEnv([lambda: late], autoreset_mode=AutoresetMode.SAME_STEP)
    envs.reset(seed=0)
    obs = envs.step(np.zeros(1, np.int64))[0]
    assert obs.tolist() == [[2, 1]] and obs.dtype == np.int64


@pytest.mark.parametrize("mode", [AutoresetMode.SAME_STEP, AutoresetMode.DISABLED])
def test_nested_batches_equal_gymnasiums(mode: AutoresetMode) -> None:
    class Samples(gym.Env):
        observation_space, action_space = NESTED, spaces.Discrete(2)

        def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
            super().reset(seed=seed)
            self._t = 0
            return self._observe(), {}

        def step(self, action: Any) -> Any:
            self._t += 1
            return self._observe(), 1.0, False, self._t == 3 and action == 1, {}

        def _observe(self) -> Any:
            number = int(self.np_random.integers(256))
            return {"a": self.np_random.uniform(-1, 1, 2).astype(np.float32), "b": (np.uint8([number]), number % 3)}

    ours = SyncVectorEnv([Samples] * 3, autoreset_mode=mode)
    theirs = gym.vector.SyncVectorEnv([Samples] * 3, autoreset_mode=mode)
    found, expected = [[envs.reset(seed=5)[0]] for envs in (ours, theirs)]
    for t in range(1, 9):
        actions = np.array([1, 0, 1])
        for envs, batches in ((ours, found), (theirs, expected)):
            batches.append(envs.step(actions)[0])
            if mode is AutoresetMode.DISABLED and t % 3 == 0:
                mask = np.array([True, False, True])
                batches.append(envs.reset(seed=[7, None, 9], options={"reset_mask": mask})[0])
    for x, y in zip(found, expected, strict=True):
        for a, b in ((x["a"], y["a"]), (x["b"][0], y["b"][0]), (x["b"][1], y["b"][1])):
            np.testing.assert_array_equal(a, b)
            assert a.dtype == b.dtype
