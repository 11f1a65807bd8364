"""Env runners as Ray actors: the same transitions, replaced when they die."""

import os
import signal

import numpy as np
import pytest
from envs import CounterEnv, FailingEnv
from test_env_runner import CONFIGS, FRAGMENTS, LENGTH, NUM_ENVS, check_episodes, check_rollouts

from lit_rl.envs.make import EnvConfig
from lit_rl.errors import EnvError, RunnerError
from lit_rl.policy import Policy
from lit_rl.rollout import to_rollout
from lit_rl.runners.env_runner import EnvRunner, Fragment
from lit_rl.runners.pool import RunnerPool

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("ray_session")]


def make_pool(*configs: EnvConfig) -> tuple[RunnerPool, Policy]:
    """A runner for each config, all with one policy."""
    policy = Policy(configs[0].spec())

    def make_runner(runner: int, incarnation: int) -> EnvRunner:
        seed = np.random.SeedSequence(0, spawn_key=(runner, incarnation))
        own = Policy(policy.spec)
        return EnvRunner(configs[runner], own, num_envs=NUM_ENVS, rollout_length=LENGTH, seed=seed)

    return RunnerPool(make_runner, len(configs)), policy


def test_every_transition_is_exact_through_ray_in_every_autoreset_mode() -> None:
    pool, policy = make_pool(*CONFIGS.values())
    collected: list[list[Fragment]] = []
    for version in range(FRAGMENTS):
        pool.start(policy, version)
        collected.append(pool.finish())
    pool.close()
    for config, fragments in zip(CONFIGS.values(), zip(*collected)):
        offsets = list(range(NUM_ENVS)) if config.vectorization == "native" else [0] * NUM_ENVS
        rollouts = [to_rollout([fragment], copy=True) for fragment in fragments]
        check_rollouts(rollouts, offsets)
        check_episodes(list(fragments), offsets)
        assert [fragment.policy_version for fragment in fragments] == list(range(FRAGMENTS))
        rollouts[0]["observation"].add_(1.0)  # Ray's own memory is read-only, the rollout's is not


def test_a_killed_runner_is_replaced_and_its_fragment_collected_again() -> None:
    pool, policy = make_pool(EnvConfig("CartPole-v1"), EnvConfig("CartPole-v1"))
    seen = []
    for version in range(4):
        policy.head.weight.data.mul_(3.0)
        if version in (1, 3):
            os.kill(pool.pids()[0], signal.SIGKILL)
        pool.start(policy, version)
        fragments = pool.finish()
        rollout = to_rollout(fragments, copy=True)
        # Both fragments are there, collected with the newest weights.
        assert [f.policy_version for f in fragments] == [version, version]
        log_prob, _ = policy.evaluate(rollout)
        np.testing.assert_allclose(log_prob.detach(), rollout["action_log_prob"], atol=1e-5)
        seen.append(fragments[0].rows.views()["observation"][:, 0])
    assert pool.num_restarts == 2
    # A new incarnation has seeds of its own: it does not replay its predecessor's first episodes.
    assert not np.array_equal(seen[0], seen[1]) and not np.array_equal(seen[1], seen[3])
    pool.close()


def test_a_runner_that_always_dies_ends_the_run_with_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lit_rl.runners.pool.MAX_RESTARTS", 1)
    pool, policy = make_pool(EnvConfig("test_pool:DyingEnv"))
    pool.start(policy, 0)
    with pytest.raises(RunnerError, match="Env runner 0 died 2 times in a row") as caught:
        pool.finish()
    assert "\n" not in str(caught.value)
    pool.close()


def test_an_environments_error_arrives_as_it_was_raised() -> None:
    pool, policy = make_pool(EnvConfig(FailingEnv))
    pool.start(policy, 0)
    with pytest.raises(EnvError, match="FailingEnv raised in step: ValueError: the simulator fell over"):
        pool.finish()
    pool.close()


class DyingEnv(CounterEnv):
    """Takes its process with it at its second step (the first is when the environment is tried out)."""

    steps = 0

    def step(self, action: int) -> tuple:
        self.steps += 1
        if self.steps == 2:
            os._exit(1)
        return super().step(action)
