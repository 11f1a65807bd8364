"""Losses and gradients that are not finite: the step is skipped and counted, the batch saved, the run ended in time."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from envs import CounterEnv
from helpers import assert_same
from tensordict import TensorDict

from lit_rl import APPO, DQN, IMPALA, PPO, SAC, ReplayDataModule, RolloutDataModule
from lit_rl.errors import DivergedError
from lit_rl.files import rescue
from lit_rl.normalizer import ReturnNormalizer, RunningMoments
from lit_rl.replay.buffer import SMALLEST_PRIORITY

ROLLOUTS = {"num_envs_per_env_runner": 4, "rollout_length": 32, "rollouts_per_epoch": 2, "seed": 0}
REPLAY = {
    "num_envs_per_env_runner": 2, "learning_starts": 64, "batch_size": 16, "buffer_size": 500, "seed": 0,
    "env_steps_per_batch": 64, "update_to_data": 0.25,
}  # fmt: skip
MODELS: dict[str, tuple[type, dict]] = {
    "PPO": (PPO, {"minibatch_size": 64, "num_epochs": 1, "normalize_observations": True, "normalize_returns": True}),
    "IMPALA": (IMPALA, {"optimizer": "rmsprop", "normalize_returns": True}),
    "APPO": (APPO, {"target_update_interval": 1, "normalize_observations": True}),
    "DQN": (DQN, {"target_update_interval": 3}),
    "SAC": (SAC, {"max_grad_norm": None}),
}


def spoiled(name: str, bad: Callable[[int], bool], which: int | slice = 0, **more: Any) -> Any:
    """The algorithm, with some rewards of those updates NaN whose number `bad` picks; keeps every update's metrics."""
    base, options = MODELS[name]

    class Spoiled(base):  # type: ignore[misc, valid-type]
        def update(self, batch: TensorDict) -> dict:
            if bad(self.updates_done):
                batch["next", "reward"].view(-1)[which] = torch.nan
            return super().update(batch)

    return Spoiled(**options | more)


def datamodule(name: str) -> L.LightningDataModule:
    if name == "PPO":
        return RolloutDataModule("CartPole-v1", max_env_steps=128 * 6, **ROLLOUTS)
    if name in ("IMPALA", "APPO"):
        return RolloutDataModule("CartPole-v1", max_env_steps=128 * 12, **ROLLOUTS)
    env = "CartPole-v1" if name == "DQN" else "Pendulum-v1"
    return ReplayDataModule(env, max_env_steps=256, prioritized=name == "DQN", **REPLAY)


class Rows(L.Callback):
    """What was logged after every batch."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
        self.rows.append({name: float(value) for name, value in trainer.callback_metrics.items()})
        trainer.callback_metrics.clear()


@pytest.mark.parametrize("name", MODELS)
def test_a_step_without_a_finite_loss_is_skipped_counted_and_its_batch_saved(
    make_trainer, tmp_path: Path, name: str
) -> None:
    algorithm, data, rows = spoiled(name, lambda update: update == 3), datamodule(name), Rows()
    trainer = make_trainer(limit_val_batches=0, callbacks=[rows])
    with pytest.warns(UserWarning, match=r"The loss is not finite after \d+ env steps: the optimizer step was skipped"):
        trainer.fit(algorithm, data)
    steps = 2 if name == "PPO" else 1  # of an update
    assert algorithm.skipped_updates == rows.rows[-1]["optim/skipped_updates"] == steps
    assert rows.rows[0]["optim/skipped_updates"] == 0
    assert trainer.global_step == (algorithm.updates_done - 1) * steps  # counts the steps that were taken
    for key, value in algorithm.state_dict().items():  # target networks, normalisers and temperature too
        assert value.isfinite().all(), key
    assert all(np.isfinite(value) for row in rows.rows for value in row.values())
    (path,) = tmp_path.glob("nonfinite_batch_*_rank0.pt")
    batch = torch.load(path, weights_only=True)
    assert batch["next"]["reward"].isnan().any() and "observation" in batch
    if name in ("PPO", "IMPALA", "APPO"):
        assert "loss/policy" not in rows.rows[3] and "loss/policy" in rows.rows[4]
    if name == "PPO":
        assert algorithm.return_normalizer.running_return.isfinite().all()
    if name == "DQN":
        assert np.isfinite(data.buffer._tree.total) and data.buffer._tree.total > 0


@pytest.mark.parametrize("name", ["DQN", "SAC"])
def test_a_skipped_step_leaves_everything_as_it_was(make_trainer, name: str) -> None:
    """Target networks too, which follow after steps that were taken alone."""
    kept: list[bool] = []
    often = {"DQN": {"target_update_interval": 1, "tau": 0.5}, "SAC": {}}

    class Watch(MODELS[name][0]):  # type: ignore[misc, name-defined]
        def update(self, batch: TensorDict) -> dict:
            spoilt = self.updates_done == 3
            if spoilt:
                batch["next", "reward"].view(-1)[0] = torch.nan
                before = {key: value.clone() for key, value in self.state_dict().items()}
            metrics = super().update(batch)
            if spoilt:
                kept.append(all(torch.equal(value, before[key]) for key, value in self.state_dict().items()))
            return metrics

    with pytest.warns(UserWarning, match="skipped"):
        make_trainer(limit_val_batches=0).fit(Watch(**MODELS[name][1] | often[name]), datamodule(name))
    assert kept == [True]


def test_a_gradient_that_is_not_finite_is_named(make_trainer) -> None:
    class Infinite(PPO):
        def loss(self, minibatch: TensorDict) -> tuple:
            loss, terms = super().loss(minibatch)
            if self.updates_done == 1:
                loss = loss + (self.policy.head.weight[0, 0] * 0).sqrt()  # 0, with an infinite gradient
            return loss, terms

    algorithm = Infinite(**MODELS["PPO"][1])
    with pytest.warns(UserWarning, match=r"The gradient of policy\.head\.weight is not finite"):
        make_trainer(limit_val_batches=0).fit(algorithm, datamodule("PPO"))
    assert algorithm.skipped_updates == 2


@pytest.mark.parametrize("name", MODELS)
def test_five_in_a_row_end_the_run_with_a_checkpoint_of_the_weights_before(
    make_trainer, tmp_path: Path, name: str
) -> None:
    begin, good = 3, {}

    class Watch(L.Callback):
        def on_before_optimizer_step(self, trainer: L.Trainer, *_: object) -> None:
            good["step"] = trainer.global_step + 1

    algorithm = spoiled(name, lambda update: update >= begin)
    saver = L.pytorch.callbacks.ModelCheckpoint(tmp_path / "saved", filename="last")
    trainer = make_trainer(limit_val_batches=0, callbacks=[Watch(), saver], enable_checkpointing=True)
    with (
        pytest.warns(UserWarning, match="the optimizer step was skipped") as warned,
        pytest.raises(DivergedError, match=r"The loss is not finite after \d+ env steps, \d times in a row") as error,
    ):
        trainer.fit(algorithm, datamodule(name))
    path = tmp_path / "saved" / "before_divergence.ckpt"
    (batch,) = tmp_path.glob("nonfinite_batch_*")
    assert str(path) in str(error.value) and str(batch) in str(error.value) and "lower lr" in str(error.value)
    assert len([w for w in warned if "skipped" in str(w.message)]) == 1  # one row of them, one warning
    checkpoint = torch.load(path, weights_only=True)
    assert all(value.isfinite().all() for value in checkpoint["state_dict"].values())
    assert checkpoint["global_step"] == good["step"] == begin * (2 if name == "PPO" else 1)
    # What went on too long is gone: the run goes on from there, and goes on counting.
    resumed = spoiled(name, lambda update: False)
    make_trainer(limit_val_batches=0).fit(resumed, datamodule(name), ckpt_path=path)
    assert resumed.skipped_updates == checkpoint["lit_rl"]["skipped_updates"] >= 5
    assert resumed.env_steps_done >= 240


def test_steps_that_are_skipped_now_and_then_do_not_end_the_run(make_trainer, tmp_path: Path) -> None:
    algorithm, rows = spoiled("DQN", lambda update: update % 4 != 0), Rows()
    with pytest.warns(UserWarning, match="skipped"):
        make_trainer(limit_val_batches=0, callbacks=[rows]).fit(algorithm, datamodule("DQN"))
    assert algorithm.skipped_updates == 36 and algorithm.updates_done == 48
    assert "loss/value" in rows.rows[-1]
    assert len(list(tmp_path.glob("nonfinite_batch_*"))) <= 10


def test_a_reward_that_is_finite_but_too_large_ends_the_run_too(make_trainer, tmp_path: Path) -> None:
    class Huge(CounterEnv):
        def step(self, action: int) -> tuple:
            obs, _, *rest = super().step(action)
            return obs, 1e30, *rest

    data = RolloutDataModule(Huge, max_env_steps=128 * 6, **ROLLOUTS)
    with pytest.warns(UserWarning, match="skipped"), pytest.raises(DivergedError, match="scale the rewards down"):
        make_trainer(limit_val_batches=0).fit(PPO(minibatch_size=64, num_epochs=1, normalize_returns=False), data)
    checkpoint = torch.load(tmp_path / "before_divergence.ckpt", weights_only=True)
    assert all(value.isfinite().all() for value in checkpoint["state_dict"].values())


def test_a_row_whose_error_is_not_finite_is_hardly_drawn_again(make_trainer) -> None:
    data = datamodule("DQN")
    make_trainer(limit_val_batches=0).fit(DQN(), data)
    index = data.buffer.sample(3)["index"]
    data.buffer.update_priorities(index, torch.tensor([torch.nan, torch.inf, -torch.inf]))
    smallest = SMALLEST_PRIORITY**data.replay.priority_alpha
    np.testing.assert_allclose(data.buffer._tree.leaves[index.numpy()], smallest)
    assert data.buffer._max_priority < np.inf


def test_running_statistics_leave_out_what_is_not_finite() -> None:
    moments, normalizer = RunningMoments((2,)), ReturnNormalizer(0.9)
    moments.update(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    before = {name: value.clone() for name, value in moments.state_dict().items()}
    moments.update(torch.tensor([[1.0, torch.nan]]))
    assert_same(moments.state_dict(), before)
    reward, done = torch.tensor([[1.0, torch.inf], [1.0, 1.0]]), torch.zeros(2, 2, dtype=torch.bool)
    normalizer.scale(reward, done)
    assert normalizer.running_return.tolist() == pytest.approx([0.0, 0.9 * 1.9])


def test_a_batch_that_is_too_large_is_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = torch.zeros(1000, 1000)
    batch = TensorDict({"observation": whole[:4], "next": TensorDict({"reward": torch.ones(4)}, [4])}, [4])
    assert rescue.save_batch(batch, tmp_path / "a.pt") == str(tmp_path / "a.pt")
    assert (tmp_path / "a.pt").stat().st_size < 30_000  # the rows alone, not all that they are a view of
    monkeypatch.setattr(rescue, "MAX_BATCH_BYTES", 10_000)
    assert rescue.save_batch(batch, tmp_path / "b.pt").startswith("not saved")
    assert not (tmp_path / "b.pt").exists()
