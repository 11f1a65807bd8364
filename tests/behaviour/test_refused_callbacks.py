"""Lightning's callbacks that would do nothing here are refused by name, before anything starts."""

from datetime import timedelta
from typing import Any

import pytest
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder, ModelCheckpoint
from lightning.pytorch.tuner import Tuner

from lit_rl import DQN, PPO, Evaluation, ReplayDataModule, RolloutDataModule
from lit_rl.errors import OptionError


def on_policy() -> tuple[PPO, RolloutDataModule]:
    data = RolloutDataModule(
        "CartPole-v1", num_envs_per_env_runner=2, rollout_length=32, max_env_steps=64, evaluation=Evaluation(episodes=1)
    )
    return PPO(minibatch_size=32, num_epochs=1), data


def off_policy() -> tuple[DQN, ReplayDataModule]:
    return DQN(), ReplayDataModule("CartPole-v1", learning_starts=32, batch_size=8, max_env_steps=64)


@pytest.mark.parametrize("make", [on_policy, off_policy])
@pytest.mark.parametrize(
    ("callback", "said"),
    [
        (lambda: LearningRateFinder(), "LearningRateFinder.* {} does not use"),
        (lambda: BatchSizeFinder(), "BatchSizeFinder.* {} does not use"),
        (
            lambda: ModelCheckpoint(train_time_interval=timedelta(minutes=5)),
            r"train_time_interval.* {},.*every_n_epochs",
        ),
    ],
)
def test_a_callback_that_would_do_nothing_is_refused(make_trainer, make, callback: Any, said: str) -> None:
    algorithm, data = make()
    with pytest.raises(OptionError, match=said.format(type(algorithm).__name__)):
        make_trainer(callbacks=[callback()], enable_checkpointing=True).fit(algorithm, data)


def test_a_tuner_is_refused_with_the_callback_it_uses(make_trainer) -> None:
    algorithm, data = on_policy()
    with pytest.raises(OptionError, match="LearningRateFinder"):
        Tuner(make_trainer()).lr_find(algorithm, datamodule=data)


def test_checkpoints_by_gradient_steps_are_refused_off_policy_alone(make_trainer, tmp_path) -> None:
    def trainer() -> Any:
        save = ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=2)
        return make_trainer(callbacks=[save], enable_checkpointing=True)

    with pytest.raises(OptionError, match=r"every_n_train_steps=2.*every_n_epochs with DQN.*batches_per_epoch"):
        trainer().fit(*off_policy())
    trainer().fit(*on_policy())
    assert list(tmp_path.glob("*step=2.ckpt"))
