"""`info` is the user's: lit_rl reads what `info_metrics` names, value by value, and leaves the rest alone."""

import threading
from typing import Any

import numpy as np
import pytest
from envs import CounterEnv
from gymnasium.vector import AutoresetMode

from lit_rl.envs.make import EnvConfig
from lit_rl.errors import EnvError
from lit_rl.evaluation.episodes import play
from lit_rl.evaluation.summary import EvaluationResult, summarize
from lit_rl.policy import Policy
from lit_rl.runners.env_runner import EnvRunner
from lit_rl.runners.fragment import Episode

SEED = np.random.SeedSequence(0)


class Informs(CounterEnv):
    """What it puts into `info` differs from one environment to the next, and from one step to the next.

    `score` is 3.75 in one, 1 or True in the others.
    """

    made = 0

    def __init__(self, offset: int = 0):
        super().__init__(offset)
        self._number, Informs.made = Informs.made % 3, Informs.made + 1
        self._reused: dict[str, Any] = {}

    def reset(self, **options: Any) -> Any:
        return super().reset(**options)[0], self._info("reset")

    def step(self, action: Any) -> Any:
        *found, _ = super().step(action)
        return *found, self._info("step")

    def _info(self, where: str) -> dict[str, Any]:
        number = self._number
        self._reused |= {
            "path": np.zeros(1 + self._t + number),
            "kind": (1, None, "a text")[number],
            "nested": ({"a": 1}, 2.5, {"a": "b"})[number],
            "lock": threading.Lock(),  # cannot be pickled
            "final_info": number,  # as vector environments call something else
            "final_obs": "not it",
            "score": (1, 3.75, True)[number] if where == "step" else "of the reset",
        }
        return self._reused


@pytest.mark.parametrize("vectorization", ["sync", "async"])
@pytest.mark.parametrize("keys", [(), ("score",)])
def test_of_info_only_what_was_asked_for_is_read(vectorization: str, keys: tuple[str, ...]) -> None:
    env = EnvConfig(Informs, vectorization=vectorization)
    policy = Policy(env.spec())
    runner = EnvRunner(env, policy, num_envs=3, rollout_length=12, seed=SEED, info_metrics=keys)
    episodes = runner.sample().episodes
    runner.close()
    assert len(episodes) == 12
    played = list(play(env, policy, range(6), num_envs=3, info_metrics=keys))
    for found in (episodes, played):
        # As many of each environment; "async" makes one more in this process, and copies of it in the others.
        values = {episode.info.get("score") for episode in found}
        assert values <= ({1.0, 3.75} if keys else {None})
        if vectorization == "sync":
            assert values == ({1.0, 3.75} if keys else {None})
        assert all(episode.info.keys() == set(keys) for episode in found)


def test_a_float_is_not_cut_where_another_environment_gives_an_int() -> None:
    Informs.made = 0
    envs = EnvConfig(Informs).make_vector(3, AutoresetMode.SAME_STEP, ("score",))
    envs.reset(seed=0)
    actions = np.zeros(3, np.int64)
    envs.step(actions)
    info = envs.step(actions)[4]  # the first episodes last two steps
    assert info["final_info"]["score"].tolist() == [1, 3.75, True]
    assert info["score"].tolist() == ["of the reset"] * 3
    assert info["final_obs"][0].item() == 2.0


def test_a_metric_that_is_nan_counts_as_absent() -> None:
    class Sometimes(CounterEnv):
        def step(self, action: Any) -> Any:
            *found, _ = super().step(action)
            return *found, {"score": 5.0 if self._episode else float("nan")}

    env = EnvConfig(Sometimes)
    policy = Policy(env.spec())
    runner = EnvRunner(env, policy, num_envs=1, rollout_length=5, seed=SEED, info_metrics=["score"])
    assert [episode.info for episode in runner.sample().episodes] == [{}, {"score": 5.0}]
    played = list(play(env, policy, range(3), num_envs=1, info_metrics=["score"]))
    assert summarize([EvaluationResult(played, 0, 0)])["info/score_mean"] == 5.0
    nothing = EvaluationResult([Episode(1.0, 1, {})], 0, 0)
    assert "info/score_mean" not in summarize([nothing])


def test_a_metric_that_is_no_number_is_named() -> None:
    env = EnvConfig(Informs)
    runner = EnvRunner(env, Policy(env.spec()), num_envs=3, rollout_length=5, seed=SEED, info_metrics=["kind"])
    with pytest.raises(EnvError, match=r"info_metrics: info\['kind'\]=(None|'a text') is not a number"):
        runner.sample()
