"""Evaluations whose time is over: an episode without a step was not begun, and is lost instead of a return of 0."""

import logging

import pytest
from envs import CounterEnv, IdentityEnv

from lit_rl.envs.make import EnvConfig
from lit_rl.evaluation.episodes import play
from lit_rl.evaluation.evaluator import Evaluator
from lit_rl.evaluation.options import Evaluation
from lit_rl.evaluation.summary import summarize
from lit_rl.policy import Policy
from lit_rl.runners.faults import FaultTolerance
from lit_rl.runners.placement import Placement


def evaluated(env: EnvConfig, episodes: int, timeout_s: float) -> dict[str, float]:
    evaluator = Evaluator(
        env, Evaluation(episodes=episodes, timeout_s=timeout_s), info_metrics=(), faults=FaultTolerance(),
        placement=Placement(), connect=lambda: None,
    )  # fmt: skip
    list(evaluator.play(Policy(env.spec()), range(episodes), 0))
    return summarize(evaluator.take_results())


@pytest.mark.parametrize("record", [False, True])
def test_episodes_that_had_just_been_reset_are_left_out(record: bool) -> None:
    env = EnvConfig(IdentityEnv)  # of one step: the two that ended are followed by two without a step
    found = list(play(env, Policy(env.spec()), range(4), num_envs=2, timeout_s=0.0, record=record))
    assert [(episode.seed, episode.length, episode.cut) for episode in found] == [(0, 1, False), (1, 1, False)]


def test_episodes_under_way_are_cut_as_they_are() -> None:
    env = EnvConfig(CounterEnv)  # rewards 1, 2, ...
    found = list(play(env, Policy(env.spec()), range(4), num_envs=2, timeout_s=0.0))
    assert [(episode.return_, episode.length, episode.cut) for episode in found] == [(1.0, 1, True)] * 2


def test_what_was_not_begun_is_lost_and_said(caplog) -> None:
    with caplog.at_level(logging.WARNING):
        found = evaluated(EnvConfig(IdentityEnv), 40, timeout_s=1e-9)
    assert (found["episodes"], found["cut_episodes"], found["partial"]) == (16, 0, 1)
    assert found["length_mean"] == 1  # before: 0.5, half of them without a step
    assert "only 16 of 40 episodes have ended" in caplog.text
