"""The budget in env steps against the Trainer's own minimum."""

import warnings
from pathlib import Path

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_rl import DQN, PPO, Evaluation, ReplayDataModule, RolloutDataModule

WEIGHTS = Path("x.ckpt")


def on_policy(budget: int) -> tuple[PPO, RolloutDataModule]:
    data = RolloutDataModule(
        "CartPole-v1",
        num_envs_per_env_runner=2,
        rollout_length=32,
        rollouts_per_epoch=1,
        max_env_steps=budget,
        evaluation=Evaluation(episodes=1),
        seed=0,
    )
    return PPO(minibatch_size=32, num_epochs=1), data


def off_policy(budget: int) -> tuple[DQN, ReplayDataModule]:
    data = ReplayDataModule(
        "CartPole-v1",
        learning_starts=32,
        batch_size=8,
        env_steps_per_batch=32,
        batches_per_epoch=2,
        max_env_steps=budget,
        evaluation=Evaluation(episodes=1),
        seed=0,
    )
    return DQN(), data


@pytest.mark.parametrize("make", [on_policy, off_policy])
@pytest.mark.parametrize("minimum", [{"min_epochs": 5}, {"min_steps": 10**6}])
def test_a_minimum_of_the_trainer_does_not_exceed_the_budget(make_trainer, make, minimum: dict[str, int]) -> None:
    algorithm, data = make(128)
    save = ModelCheckpoint(dirpath=".", filename="x", enable_version_counter=False)
    trainer = make_trainer(enable_checkpointing=True, callbacks=[save], **minimum)
    (name,) = minimum
    with pytest.warns(UserWarning, match=rf"Training ended at max_env_steps=128, after \d+ of Trainer\({name}="):
        trainer.fit(algorithm, data)
    assert algorithm.env_steps_done == 128
    assert "eval/return_mean" in trainer.callback_metrics and WEIGHTS.exists()  # at the end too
    assert {"min_epochs": trainer.min_epochs, "min_steps": trainer.min_steps}[name] == minimum[name]  # for another fit

    algorithm, data = make(128)  # nothing is left to train
    make_trainer(**minimum).fit(algorithm, data, ckpt_path=WEIGHTS)
    assert algorithm.env_steps_done == 128


@pytest.mark.parametrize("make", [on_policy, off_policy])
def test_a_minimum_within_the_budget_is_kept_without_a_word(make_trainer, make) -> None:
    algorithm, data = make(192)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Training ended")
        make_trainer(min_epochs=2).fit(algorithm, data)
    assert algorithm.env_steps_done == 192
