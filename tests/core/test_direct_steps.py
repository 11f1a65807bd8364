"""Gradient steps past Lightning's hooks: the same as through them, and only where nobody listens."""

from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
from helpers import assert_same
from lightning.pytorch.callbacks import LambdaCallback
from lightning.pytorch.core.optimizer import LightningOptimizer

from lit_rl import DQN, PPO, SAC, ReplayDataModule, RolloutDataModule
from lit_rl.learner.direct import HOOKS, way_of_steps

REPLAY = {
    "learning_starts": 32,
    "batch_size": 16,
    "buffer_size": 200,
    "env_steps_per_batch": 32,
    "update_to_data": 0.25,
}


class Listener(L.Callback):
    """Hears of every step."""

    def __init__(self) -> None:
        self.heard = 0

    def on_before_optimizer_step(self, *_: Any) -> None:
        self.heard += 1


def fit(make_trainer: Callable, algorithm: Any, **trainer: Any) -> Any:
    if isinstance(algorithm, PPO):
        data: Any = RolloutDataModule("CartPole-v1", rollout_length=16, max_env_steps=256, seed=0)
    else:
        name = "Pendulum-v1" if isinstance(algorithm, SAC) else "CartPole-v1"
        data = ReplayDataModule(name, max_env_steps=96, seed=0, **REPLAY)
    made = make_trainer(limit_val_batches=0, **trainer)
    made.fit(algorithm, data)
    return made


@pytest.mark.parametrize("cls", [PPO, DQN, SAC])
def test_training_is_the_same_to_the_last_bit(make_trainer: Callable, cls: Any) -> None:
    direct, heard, listener = cls(), cls(), Listener()
    first, second = fit(make_trainer, direct), fit(make_trainer, heard, callbacks=[listener])
    assert_same(direct.state_dict(), heard.state_dict())
    assert first.global_step == second.global_step == listener.heard > 8


def attached(module: L.LightningModule, make_trainer: Callable, **options: Any) -> L.LightningModule:
    module.trainer = make_trainer(**options)
    return module


def is_direct(module: L.LightningModule) -> bool:
    backward, step = way_of_steps(module)
    assert (backward is torch.Tensor.backward) == (step is not LightningOptimizer.step)
    return backward is torch.Tensor.backward


class Heard(L.LightningModule):
    def on_after_backward(self) -> None:
        pass


class OwnBackward(L.LightningModule):
    def backward(self, loss: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        loss.backward(*args, **kwargs)


def test_whoever_listens_is_heard(make_trainer: Callable) -> None:
    assert is_direct(attached(L.LightningModule(), make_trainer))
    assert is_direct(attached(L.LightningModule(), make_trainer, callbacks=[LambdaCallback(on_fit_end=print)]))
    for hook in HOOKS:
        of_class = type("Own", (L.Callback,), {hook: lambda *_: None})()
        of_object = LambdaCallback(**{hook: lambda *_: None})
        for callback in (of_class, of_object):
            assert not is_direct(attached(L.LightningModule(), make_trainer, callbacks=[callback])), hook
    for module in (Heard, OwnBackward):
        assert not is_direct(attached(module(), make_trainer))
    for options in ({"precision": "bf16-mixed"}, {"profiler": "simple"}):
        assert not is_direct(attached(L.LightningModule(), make_trainer, **options)), options
