"""What is no weight, under Lightning's callbacks that average weights."""

import copy
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
from torch import Tensor, nn

from lit_rl import PPO, Evaluation, MultiAgent, RolloutDataModule
from lit_rl.envs.multi_agent import ReplicatedEnv
from lit_rl.errors import OptionError
from lit_rl.learner.weight_averaging import own_buffers
from lit_rl.networks import ValueHead

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


class InTheUnitOfReturns(L.Callback):
    """Averages the heads' weights as they are for returns, by hand; keeps whether the scale moved."""

    def __init__(self) -> None:
        self.averages: dict[str, Tensor] = {}
        self.scales: dict[str, set[float]] = {}

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        for name, (weights, scale) in in_the_unit_of_returns(pl_module).items():
            old = self.averages.get(name, weights)
            self.averages[name] = 0.9 * old + 0.1 * weights
            self.scales.setdefault(name, set()).add(round(scale, 3))


def in_the_unit_of_returns(module: nn.Module) -> dict[str, tuple[Tensor, float]]:
    """Of each head the weights and the bias that give returns, and by what they are scaled."""
    found = {}
    for name, head in module.named_modules():
        if isinstance(head, ValueHead) and head.moments is not None:
            scale, mean = head.moments.var.sqrt(), head.moments.mean
            weights = torch.cat([head.linear.weight.flatten() * scale, head.linear.bias * scale + mean])
            found[name] = weights.detach().clone(), float(scale)
    return found


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("options", [{}, {"use_buffers": False}])
def test_heads_of_normalised_values_are_averaged_in_one_unit(make_trainer, several: bool, options: dict) -> None:
    ppo = {"normalize_values": True, "normalize_returns": False, "minibatch_size": 32, "num_epochs": 1, "lr": 1e-2}
    algorithm: Any = PPO(**ppo)
    kwargs: dict[str, Any] = {"env": "CartPole-v1"}
    if several:
        algorithm = MultiAgent({"agent_0": PPO(**ppo), "agent_1": PPO(**ppo)}, critic_groups=[["agent_0", "agent_1"]])
        kwargs = {"env": ReplicatedEnv, "env_kwargs": {"env": "CartPole-v1", "num_agents": 2}}
    data = RolloutDataModule(
        num_envs_per_env_runner=2, rollout_length=32, max_env_steps=640, seed=1, evaluation=Evaluation(episodes=1),
        rollouts_per_epoch=3, **kwargs,
    )  # fmt: skip
    expected = InTheUnitOfReturns()
    trainer = make_trainer(callbacks=[EMAWeightAveraging(decay=0.9, **options), expected])
    trainer.fit(algorithm, data)  # at whose end the algorithm has the averages
    found = in_the_unit_of_returns(algorithm)
    assert len(found) == 1 and all(len(scales) > 5 for scales in expected.scales.values())
    for name, (weights, _) in found.items():
        torch.testing.assert_close(weights, expected.averages[name], rtol=1e-4, atol=1e-4)


def test_a_copy_of_a_head_has_no_others() -> None:
    head, other = ValueHead(2, normalize=True), ValueHead(2, normalize=True)
    head.keep_in_unit([other])
    before = other.linear.weight.clone()
    copy.deepcopy(head).take_targets(torch.tensor([3.0, 9.0]))
    assert torch.equal(other.linear.weight, before)
    head.take_targets(torch.tensor([3.0, 9.0]))
    assert not torch.equal(other.linear.weight, before)


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
