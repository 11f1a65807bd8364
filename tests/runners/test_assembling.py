"""Whole episodes put together from fragments: every row is what the environment counted."""

import numpy as np
import pytest
import torch
from envs import CounterEnv, FailingEnv, counter_vector
from helpers import make_runner

from lit_rl import Policy
from lit_rl.envs.make import EnvConfig
from lit_rl.runners.assembling import Assembled, Assembler
from lit_rl.runners.env_runner import EnvRunner
from lit_rl.runners.faults import FaultTolerance

SAME_STEP = EnvConfig(CounterEnv)
MODES = {
    "same step": SAME_STEP,
    "next step": EnvConfig(counter_vector, {"mode": "NextStep"}, vectorization="native"),
    "disabled": EnvConfig(counter_vector, {"mode": "Disabled"}, vectorization="native"),
}


def collect(assembler: Assembler, runner: EnvRunner, lengths: list[int]) -> list[Assembled]:
    found, step = [], 0
    for length in lengths:
        runner.set_version(step, [0.0] * length)  # rollout_length is 1
        found += assembler.add([(3, runner.sample())], step)
        step += length
    return found


def check(found: Assembled, policy: Policy, offset: int) -> int:
    """An episode of `CounterEnv`, of the environment with an offset; returns its number."""
    steps, length = found.steps, len(found.steps["reward"])
    number = int(steps["observation"][0, 0]) // 100
    assert length == 2 + (number + offset) % 3
    np.testing.assert_array_equal(steps["observation"][:, 0], 100 * number + np.arange(length))
    np.testing.assert_array_equal(found.final["observation"], [100 * number + length])
    np.testing.assert_array_equal(steps["reward"], 1 + np.arange(length))
    ends = [False] * (length - 1) + [True]
    assert steps["truncated"].tolist() == [end and number % 2 == 1 for end in ends]
    assert steps["terminated"].tolist() == [end and number % 2 == 0 for end in ends]
    obs, action = torch.from_numpy(steps["observation"]), torch.from_numpy(steps["action"])
    with torch.no_grad():
        log_prob, _ = policy.evaluate_actions(policy.features({"observation": obs}), obs, action)
    np.testing.assert_allclose(steps["log_prob"], log_prob.numpy(), rtol=1e-5)
    return number


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("lengths", [[40], [7, 1, 1, 5, 13, 13], [1] * 40])
def test_episodes_are_what_the_environment_counted_whatever_the_fragments(mode: str, lengths: list[int]) -> None:
    env = MODES[mode]
    torch.manual_seed(0)
    policy = Policy(env.spec())
    with torch.no_grad():
        policy.head.weight.mul_(100)  # so that another step has another log-probability
    assembler = Assembler()
    found = collect(assembler, make_runner(env, policy, 3, 1), lengths)
    for b in range(3):
        offset = 0 if mode == "same step" else b
        own = [one for one in found if one.origin[1] == b]
        assert [check(one, policy, offset) for one in own] == list(range(len(own)))
        assert len(own) >= 9
        ends = [one.origin[2] for one in own]
        assert ends == sorted(set(ends)) and all(one.origin[0] == 3 for one in own)
    assert assembler.broken == 0 and assembler.under_way + len(found) == assembler.begun


def test_versions_are_those_of_the_fragments() -> None:
    found = collect(Assembler(), make_runner(SAME_STEP, num_envs=1, length=1), [1] * 8)
    assert [one.steps["policy_version"].tolist() for one in found] == [[0, 1], [2, 3, 4]]


def test_every_third_episode_that_begins_is_kept() -> None:
    whole = collect(Assembler(), make_runner(SAME_STEP, num_envs=1, length=1), [60])
    some = collect(Assembler(every=3), make_runner(SAME_STEP, num_envs=1, length=1), [60])
    assert [one.origin for one in some] == [one.origin for one in whole[::3]]


def test_an_episode_whose_beginning_was_not_seen_is_left_out() -> None:
    runner = make_runner(SAME_STEP, num_envs=1, length=1)
    runner.sample()
    found = collect(Assembler(), runner, [20])
    assert [int(one.steps["observation"][0, 0]) for one in found] == [100 * k for k in range(1, 1 + len(found))]


def test_an_episode_whose_runner_is_replaced_is_broken_off() -> None:
    assembler = Assembler()
    first, second = (make_runner(SAME_STEP, num_envs=1, length=1) for _ in range(2))
    assert not list(assembler.add([(0, first.sample())], 0))
    second.set_version(0, [0.0] * 8)
    found = list(assembler.add([(0, second.sample())], 1))
    assert assembler.broken == 1
    assert [len(one.steps["reward"]) for one in found] == [2, 3]


@pytest.mark.parametrize("lengths", [[24], [1] * 24])
def test_a_failed_environment_truncates_its_episode_before_the_step_that_failed(lengths: list[int]) -> None:
    runner = make_runner(
        EnvConfig(FailingEnv, {"at": 4}), num_envs=1, length=1, faults=FaultTolerance(max_restarts=1_000)
    )
    found = collect(Assembler(), runner, lengths)
    assert len(found) > 4
    for first, second in zip(found[::2], found[1::2]):  # two steps, then one of the three that the next one has
        assert first.steps["terminated"].tolist() == [False, True]
        assert second.steps["observation"].tolist() == [[100.0]] and second.steps["truncated"].tolist() == [True]
        assert second.final["observation"].tolist() == [101.0] and not second.steps["terminated"].any()


def test_rewards_are_the_environments_own() -> None:
    runner = make_runner(SAME_STEP, num_envs=1, length=1, reward_scale=0.5, reward_clip=0.75)
    runner.set_version(0, [0.0] * 5)
    fragment = runner.sample()
    assert fragment.rows.views()["reward"].tolist() == [[0.5, 0.75, 0.5, 0.75, 0.75]]
    found = list(Assembler().add([(0, fragment)], 0))
    assert [one.steps["reward"].tolist() for one in found] == [[1.0, 2.0], [1.0, 2.0, 3.0]]
