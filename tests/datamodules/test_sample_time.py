"""Where the time goes: `time/sample_s` is the last batch's own, the shares are the run's."""

import time
from typing import Any

import gymnasium as gym
import pytest
import torch

from lit_rl import DQN, PPO, Evaluation, ReplayDataModule, RolloutDataModule

SIZES = {"learning_starts": 20, "batch_size": 8, "buffer_size": 200, "env_steps_per_batch": 50, "batches_per_epoch": 4}


@pytest.mark.parametrize("max_steps", [25, 55, 120])
def test_a_stream_that_ends_by_max_steps_says_how_long_it_waited(make_trainer, max_steps: int) -> None:
    waited: list[float] = []

    class Watch(DQN):
        def learn_from(self, batch):
            metrics = super().learn_from(batch)
            waited.append(batch.waited_s)
            return metrics

    data = ReplayDataModule("CartPole-v1", seed=0, **SIZES)
    trainer = make_trainer(limit_val_batches=0, max_steps=max_steps)
    trainer.fit(Watch(), data)
    assert trainer.global_step == max_steps
    assert data.sample_s == waited[-1] > 0


def test_shares_of_the_time_say_what_it_was_spent_on(make_trainer) -> None:
    """An environment that sleeps for most of the time, of which a third is evaluation."""

    class Sleepy(gym.Wrapper):
        def __init__(self) -> None:
            super().__init__(gym.make("CartPole-v1", max_episode_steps=10))

        def step(self, action: Any) -> Any:
            time.sleep(0.005)
            return super().step(action)

    data = RolloutDataModule(
        Sleepy, num_envs_per_env_runner=1, rollout_length=20, rollouts_per_epoch=5, max_env_steps=200, seed=1,
        evaluation=Evaluation(episodes=5),
    )  # fmt: skip
    trainer, algorithm = make_trainer(max_epochs=2), PPO(num_epochs=1, minibatch_size=20)
    trainer.fit(algorithm, data)
    collecting, updating, evaluating = (
        float(trainer.callback_metrics[f"time/{name}"]) for name in ("collecting", "updating", "evaluating")
    )
    assert min(collecting, updating, evaluating) > 0 and collecting + updating + evaluating <= 1
    assert collecting > evaluating and collecting > updating
    after = algorithm.time_shares()
    assert after["evaluating"] > evaluating  # with the one after the last batch


@pytest.mark.parametrize(
    ("given", "environment", "expected"), [(None, None, 1), (None, "2", 2), (1, "2", 1), (2, None, 2)]
)
def test_the_learner_takes_one_thread_unless_more_are_asked_for(
    make_trainer, monkeypatch: pytest.MonkeyPatch, given: int | None, environment: str | None, expected: int
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if environment is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", environment)
    before = torch.get_num_threads()
    torch.set_num_threads(2)  # what torch takes of the variable, or of the machine
    try:
        data = RolloutDataModule("CartPole-v1", rollout_length=8, max_env_steps=64, torch_threads=given)
        make_trainer(limit_val_batches=0).fit(PPO(num_epochs=1, minibatch_size=64), data)
        assert torch.get_num_threads() == expected
    finally:
        torch.set_num_threads(before)
