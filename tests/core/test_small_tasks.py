"""The delayed cue and the falling dot, on which DreamerV3's recipes train."""

from typing import Any

import gymnasium as gym
import numpy as np
import pytest

from lit_rl.envs.make import EnvConfig
from lit_rl.envs.memory import DelayedCue
from lit_rl.envs.pixels import COLORS, FallingDot
from lit_rl.errors import OptionError
from lit_rl.viewing.playing import TRUSTED_ENVS


@pytest.mark.parametrize("env", ["lit_rl.envs.memory:DelayedCue", "lit_rl.envs.pixels:FallingDot"])
def test_each_is_what_an_environment_must_be_and_depends_on_the_seed_alone(env: str) -> None:
    assert env in TRUSTED_ENVS
    config = EnvConfig(env)
    config.spec()
    first, again, other = (played(config.make(), seed, np.random.default_rng(0)) for seed in (0, 0, 1))
    assert len(first) == len(again) and all((a == b).all() for a, b in zip(first, again))
    assert len(first) != len(other) or any((a != b).any() for a, b in zip(first, other))


def played(env: gym.Env, seed: int, rng: np.random.Generator) -> list[np.ndarray]:
    """The observations of eight episodes of random actions, of which the first alone is given a seed."""
    seen = []
    for episode in range(8):
        obs, _ = env.reset(seed=seed if episode == 0 else None)
        seen.append(obs)
        over = False
        while not over:
            obs, _, over, _, _ = env.step(rng.integers(env.action_space.n))
            assert obs in env.observation_space
            seen.append(obs)
    return seen


@pytest.mark.parametrize("delay", [0, 1, 10])
def test_a_cue_is_shown_at_the_start_asked_for_and_shown_once_more(delay: int) -> None:
    env = DelayedCue(delay=delay)
    cues, last = set(), ([], [])
    for seed in range(20):
        for wrong in (0, 1):
            obs, _ = env.reset(seed=seed)
            cue, steps, rewards, over = int(obs[:2].argmax()), [obs.tolist()], [], False
            while not over:
                obs, reward, over, truncated, _ = env.step(cue ^ wrong if obs[2] else seed % 2)
                rewards.append(reward)
                steps.append(obs.tolist())
                assert not truncated
            cues.add(cue)
            assert steps == [[1 - cue, cue, 0], *[[0, 0, 0]] * delay, [0, 0, 1], [1 - cue, cue, 0]]
            assert rewards[:-1] == [0] * (delay + 1)
            last[wrong].append(rewards[-1])
    assert set(last[0]) == {1} and set(last[1]) == {-1} and cues == {0, 1}


def columns_of(obs: np.ndarray, name: str) -> list[int]:
    """Columns of pixels in which a colour is seen."""
    return sorted(set(np.nonzero((obs == COLORS[name]).all(2))[1].tolist()))


def towards_the_dot(obs: np.ndarray) -> int:
    """The action that brings the middle of the paddle below the dot, read from the picture."""
    dot, paddle = columns_of(obs, "dot"), columns_of(obs, "paddle")
    return 1 + int(np.sign(round((np.mean(dot) - np.mean(paddle)) / len(dot))))


def share_caught(env: FallingDot, act: Any, num_episodes: int) -> float:
    """The mean of what the last steps say was caught, which rewards must say too."""
    shares = []
    for episode in range(num_episodes):
        obs, _ = env.reset(seed=episode)
        rewards, over = [], False
        while not over:
            obs, reward, over, _, info = env.step(act(obs))
            assert ("caught" in info) == over
            rewards.append(reward)
        landed = [reward for reward in rewards if reward]
        assert len(rewards) == 15 * len(landed) - 1
        assert info["caught"] == landed.count(1.0) / len(landed) and len(landed) == landed.count(1.0) + landed.count(-1)
        shares.append(info["caught"])
    return float(np.mean(shares))


def test_every_dot_can_be_caught_and_few_are_by_chance() -> None:
    rng = np.random.default_rng(0)
    assert share_caught(FallingDot(), towards_the_dot, 40) == 1.0
    assert 0.05 < share_caught(FallingDot(), lambda _: rng.integers(3), 40) < 0.35


def test_the_picture_shows_dot_paddle_and_what_is_left() -> None:
    env = FallingDot(size=96, num_dots=3, render_mode="rgb_array")
    obs, _ = env.reset(seed=0)
    assert obs.shape == (96, 96, 3) and obs.dtype == np.uint8 and (obs == env.render()).all()
    counts = {name: int((obs == color).all(2).sum()) // 36 for name, color in COLORS.items()}
    assert counts == {"dot": 1, "paddle": 3, "left": 2}
    before = columns_of(obs, "paddle")
    for action, moved in ((0, -6), (1, 0), (2, 6)):
        after = columns_of(env.step(action)[0], "paddle")
        assert [column + moved for column in before] == after
        before = after


@pytest.mark.parametrize(
    ("env", "options", "said"),
    [
        (DelayedCue, {"delay": -1}, "delay=-1: expected a whole number of at least 0"),
        (FallingDot, {"size": 60}, "size=60: expected a multiple of 16"),
        (FallingDot, {"num_dots": 0}, "num_dots=0: expected a whole number of 1 to 17"),
    ],
)
def test_options_that_make_no_task_are_refused(env: type, options: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionError, match=said):
        env(**options)
