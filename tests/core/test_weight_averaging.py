"""What is no weight, under Lightning's callbacks that average weights."""

from typing import Any

import gymnasium as gym
import lightning as L
import numpy as np
import pytest
import torch
from gymnasium import spaces
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    ModelCheckpoint,
    ModelPruning,
    StochasticWeightAveraging,
    WeightAveraging,
)
from torch import nn

from lit_rl import PPO, Evaluation, RolloutDataModule
from lit_rl.errors import OptionError
from lit_rl.learner.weight_averaging import own_buffers

CALLBACKS = {
    "ema": lambda: EMAWeightAveraging(),
    "ema, seldom": lambda: EMAWeightAveraging(update_every_n_steps=3),
    "ema, without buffers": lambda: EMAWeightAveraging(use_buffers=False, update_starting_at_step=5),
    "equal weights": lambda: WeightAveraging(),
}


class Pairs(gym.Env):
    """Observes two classes: their offsets in the one-hot vector are a buffer of whole numbers."""

    def __init__(self) -> None:
        self.observation_space, self.action_space = spaces.MultiDiscrete([3, 4]), spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
        return self.observation_space.sample(), 1.0, bool(self.np_random.random() < 0.1), False, {}


class Recorded(PPO):
    """Records at which env steps it was evaluated."""

    def on_fit_start(self) -> None:
        super().on_fit_start()
        self.evaluated: list[int] = []

    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        self.evaluated.append(self.env_steps_done)


def run(make_trainer: Any, callbacks: list[L.Callback], env: Any = "CartPole-v1", **options: Any) -> Recorded:
    data = RolloutDataModule(
        env,
        num_envs_per_env_runner=2,
        rollout_length=32,
        rollouts_per_epoch=1,
        max_env_steps=320,
        evaluation=Evaluation(episodes=1, timeout_s=60),
        seed=1,
    )
    algorithm = Recorded(minibatch_size=32, num_epochs=1, **options)
    make_trainer(callbacks=callbacks, enable_checkpointing=True).fit(algorithm, data)
    return algorithm


def save() -> ModelCheckpoint:
    return ModelCheckpoint(dirpath=".", filename="x", enable_version_counter=False)


@pytest.mark.parametrize("name", CALLBACKS)
def test_counters_and_moments_are_those_of_a_run_without_averages(make_trainer, name: str) -> None:
    options = {"normalize_observations": True, "normalize_returns": True, "lr_schedule": "linear"}
    plain = run(make_trainer, [save()], **options)
    averaged = run(make_trainer, [CALLBACKS[name](), save()], **options)
    assert averaged.evaluated == plain.evaluated == [64, 128, 192, 256, 320]
    expected, saved = own_buffers(plain), torch.load("x.ckpt", weights_only=True)["state_dict"]
    for key, buffer in own_buffers(averaged).items():
        torch.testing.assert_close(buffer, expected[key], rtol=0, atol=0, msg=key)
        if key in saved:
            torch.testing.assert_close(saved[key], expected[key], rtol=0, atol=0, msg=f"{key}, in the checkpoint")
    pairs = zip(averaged.parameters(), plain.parameters(), strict=True)
    assert any(not torch.equal(a, b) for a, b in pairs)  # they are averaged


@pytest.mark.parametrize("callbacks", [[], [EMAWeightAveraging]])
def test_a_run_goes_on_from_averaged_weights_with_the_budget_that_is_left(make_trainer, callbacks: list) -> None:
    run(make_trainer, [EMAWeightAveraging(), save()])
    data = RolloutDataModule("CartPole-v1", num_envs_per_env_runner=2, rollout_length=32, max_env_steps=448, seed=1)
    trainer = make_trainer(limit_val_batches=0, callbacks=[callback() for callback in callbacks])
    trainer.fit(Recorded(minibatch_size=32, num_epochs=1), data, ckpt_path="x.ckpt")
    assert data.ledger.delivered == 448


def test_whole_numbers_that_a_network_looks_up_are_not_averaged(make_trainer) -> None:
    algorithm = run(make_trainer, [EMAWeightAveraging()], Pairs)
    offsets = [x.tolist() for name, x in own_buffers(algorithm).items() if x.dtype == torch.int64 and x.ndim]
    assert offsets and all(found == [0, 3] for found in offsets)


def test_statistics_of_batch_norm_layers_are_averaged_with_the_weights() -> None:
    class Module(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(2)
            self.register_buffer("count", torch.zeros(()))

    assert own_buffers(Module()).keys() == {"count"}


@pytest.mark.parametrize(
    ("callback", "instead"),
    [
        (lambda: StochasticWeightAveraging(swa_lrs=1e-3), "EMAWeightAveraging or WeightAveraging"),
        (lambda: ModelPruning("l1_unstructured", amount=0.5), "torch.nn.utils.prune"),
    ],
)
def test_a_callback_that_copies_networks_before_they_are_made_is_refused(make_trainer, callback, instead: str) -> None:
    with pytest.raises(OptionError, match=rf"PPO's networks are made later\. .*{instead}"):
        make_trainer(callbacks=[callback()]).fit(PPO(), RolloutDataModule("CartPole-v1", max_env_steps=2048))
