"""Wrappers that keep running statistics begin anew in evaluation: a warning names them and what to set instead."""

import warnings
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import pytest
from envs import CounterEnv
from gymnasium.wrappers import NormalizeObservation, NormalizeReward, TimeLimit
from gymnasium.wrappers import vector as vector_wrappers

from lit_rl import PPO, Evaluation, RolloutDataModule
from lit_rl.envs import make
from lit_rl.envs.make import EnvConfig


def wrapped() -> gym.Env:
    return TimeLimit(NormalizeReward(NormalizeObservation(CounterEnv())), 9)


def native(num_envs: int) -> Any:
    return vector_wrappers.NormalizeObservation(gym.make_vec("CartPole-v1", num_envs))


@pytest.fixture(autouse=True)
def nothing_said_yet() -> None:
    make._warn_once.cache_clear()


BOTH = "NormalizeReward and NormalizeObservation: .*normalize_returns=True and normalize_observations=True"


@pytest.mark.parametrize(
    ("env", "words"),
    [
        (EnvConfig(wrapped), BOTH),
        (EnvConfig("test_hidden_statistics:wrapped"), BOTH),
        (EnvConfig(CounterEnv, wrappers=["gymnasium.wrappers:NormalizeObservation"]), "normalize_observations=True"),
        (EnvConfig(native, vectorization="native"), "NormalizeObservation: .*normalize_observations=True"),
    ],
)
def test_wrappers_with_statistics_are_named(env: EnvConfig, words: str) -> None:
    with pytest.warns(UserWarning, match=words):
        env.spec()


def test_nothing_is_said_of_other_wrappers() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        EnvConfig(CounterEnv, wrappers=[{"gymnasium.wrappers:TimeLimit": {"max_episode_steps": 9}}]).spec()


def scaled_rewards() -> gym.Env:
    return NormalizeReward(CounterEnv())


@pytest.mark.parametrize(("env", "eval_env"), [(scaled_rewards, None), (CounterEnv, scaled_rewards)])
def test_a_run_says_it_once(env: Any, eval_env: Any, make_trainer: Callable) -> None:
    data = RolloutDataModule(
        env,
        num_envs_per_env_runner=2,
        rollout_length=16,
        max_env_steps=64,
        evaluation=Evaluation(episodes=1, env=eval_env),
        seed=0,
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer, algorithm = make_trainer(), PPO(minibatch_size=16)
        trainer.fit(algorithm, data)
        trainer.validate(algorithm, data)
    assert sum("running statistics of such a wrapper" in str(warning.message) for warning in caught) == 1
