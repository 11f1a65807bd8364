"""A run that was stopped and resumed is the unbroken one, bit for bit."""

import contextlib
import csv
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from envs import CounterEnv, MaskedEnv, RepeatPreviousEnv
from gymnasium import spaces
from helpers import assert_same, make_runner
from lightning.pytorch.loggers import CSVLogger

from lit_rl import (
    APPO,
    DQN,
    IMPALA,
    MLP,
    PPO,
    SAC,
    DreamerV3,
    GRUNetwork,
    LSTMNetwork,
    ReplayDataModule,
    RolloutDataModule,
)
from lit_rl.envs.make import EnvConfig

ON_POLICY = {"num_envs_per_env_runner": 3, "rollout_length": 16, "rollouts_per_epoch": 2, "max_env_steps": 480}
OFF_POLICY = {
    "num_envs_per_env_runner": 2, "rollout_length": 2, "env_steps_per_batch": 40, "batches_per_epoch": 2,
    "max_env_steps": 400, "learning_starts": 60, "batch_size": 32, "buffer_size": 300,
}  # fmt: skip
SMALL = functools.partial(MLP, hidden_sizes=[32])
PPO_OPTIONS = {"minibatch_size": 16, "num_epochs": 2, "normalize_observations": True, "normalize_returns": True}
CASES: dict[str, Callable[[], tuple[Any, Any]]] = {
    "PPO": lambda: (PPO(**PPO_OPTIONS), RolloutDataModule("CartPole-v1", seed=3, **ON_POLICY)),
    "PPO with memory": lambda: (
        PPO(minibatch_size=16, num_epochs=1, network=functools.partial(LSTMNetwork, hidden_size=16)),
        RolloutDataModule("CartPole-v1", seed=3, **ON_POLICY),
    ),
    "PPO, nested actions, masks": lambda: (
        PPO(minibatch_size=16, num_epochs=1),
        RolloutDataModule(
            MaskedEnv,
            env_kwargs={"action_space": spaces.Tuple([spaces.Discrete(3), spaces.MultiDiscrete([2, 3])])},
            seed=3,
            **ON_POLICY,
        ),
    ),
    "PPO on one-hot states": lambda: (
        PPO(minibatch_size=16, num_epochs=1),
        RolloutDataModule("FrozenLake-v1", env_kwargs={"is_slippery": True}, seed=3, **ON_POLICY),
    ),
    "IMPALA with memory": lambda: (
        IMPALA(optimizer="rmsprop", network=functools.partial(LSTMNetwork, hidden_size=16), normalize_returns=True),
        RolloutDataModule("CartPole-v1", seed=3, **ON_POLICY),
    ),
    "APPO, squashed": lambda: (
        APPO(squash_actions=True, target_update_interval=2, normalize_observations=True),
        RolloutDataModule("Pendulum-v1", seed=3, **ON_POLICY),
    ),
    "DQN prioritised": lambda: (
        DQN(),
        ReplayDataModule("CartPole-v1", seed=3, prioritized=True, n_step=[1, 3], **OFF_POLICY),
    ),
    "DQN with memory": lambda: (
        DQN(network=functools.partial(GRUNetwork, hidden_size=16), sequence_length=8, burn_in=4),
        ReplayDataModule(RepeatPreviousEnv, seed=3, **OFF_POLICY),
    ),
    "DreamerV3": lambda: (
        DreamerV3(size="nano", sequence_length=8, horizon=3, lr=1e-3, warmup=5),
        ReplayDataModule("CartPole-v1", seed=3, update_to_data=0.25, **OFF_POLICY),
    ),
    "SAC": lambda: (SAC(network=SMALL), ReplayDataModule("Pendulum-v1", seed=3, **OFF_POLICY)),
}


class SaveAt(L.Callback):
    """Writes a checkpoint after a batch, and ends the run there."""

    def __init__(self, batch: int):
        self._batch = batch

    def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
        if trainer.fit_loop.total_batch_idx + 1 == self._batch:
            trainer.save_checkpoint("broken.ckpt")
            raise KeyboardInterrupt


def series(folder: Path) -> dict[str, dict[str, str]]:
    """What was logged, by env steps; times aside."""
    with next(folder.rglob("metrics.csv")).open() as file:
        rows = list(csv.DictReader(file))
    return {
        f"{row['env_steps']} {bool(row.get('eval/return_mean'))}": {
            name: value for name, value in row.items() if value and not name.startswith("time/")
        }
        for row in rows
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", list(CASES))
def test_a_run_that_is_stopped_anywhere_and_resumed_equals_an_unbroken_one(
    name: str, make_trainer: Callable, tmp_path: Path
) -> None:
    def fit(folder: str, ckpt_path: str | None = None, **options: Any) -> tuple[Any, Any]:
        algorithm, data = CASES[name]()
        logger = CSVLogger(tmp_path, name=folder)
        trainer = make_trainer(logger=logger, log_every_n_steps=1, limit_val_batches=1, **options)
        with contextlib.suppress(SystemExit):  # so ends what KeyboardInterrupt stops
            trainer.fit(algorithm, data, ckpt_path=ckpt_path)
        return algorithm, trainer

    whole, whole_trainer = fit("whole")
    for batch in (1, 3):
        fit(f"first-{batch}", callbacks=[SaveAt(batch)])
        resumed, resumed_trainer = fit(f"second-{batch}", "broken.ckpt")
        assert resumed.updates_done == whole.updates_done > 0 and resumed.env_steps_done == whole.env_steps_done
        assert_same(resumed.state_dict(), whole.state_dict())
        assert_same(*(trainer.optimizers[0].state_dict()["state"] for trainer in (resumed_trainer, whole_trainer)))
        unbroken, first, second = (series(tmp_path / f) for f in ("whole", f"first-{batch}", f"second-{batch}"))
        assert not first.keys() & second.keys() and (first | second).keys() == unbroken.keys()
        for key, row in (first | second).items():
            assert row == unbroken[key], key


@pytest.mark.parametrize(
    ("env", "restarted"),
    [
        (EnvConfig("CartPole-v1"), 0),
        (EnvConfig("Acrobot-v1", wrappers=[{"gymnasium.wrappers:TimeLimit": {"max_episode_steps": 7}}]), 0),
        (EnvConfig(RepeatPreviousEnv), 0),
        (EnvConfig(CounterEnv), 3),  # its observations tell how often it was reset, which is not in `np_random`
        (EnvConfig("CartPole-v1", vectorization="async"), 3),
    ],
)
def test_episodes_under_way_go_on_where_they_can_and_begin_afresh_where_not(env: EnvConfig, restarted: int) -> None:
    one, other = (make_runner(env, length=5, seed=seed, replayable=True) for seed in (0, 1))
    try:
        for _ in range(3):
            one.sample()
        state = one.get_state()
        assert other.set_state(state) == restarted
        for _ in range(4):
            a, b = (runner.sample() for runner in (one, other))
            same = all(
                np.array_equal(x, y) for x, y in zip(a.rows.views().values(), b.rows.views().values(), strict=True)
            )
            assert same == (restarted == 0)
            if not restarted:
                assert a.episodes == b.episodes
            assert b.entry.delivered == 15
    finally:
        one.close()
        other.close()


def test_another_number_of_environments_begins_episodes_afresh() -> None:
    env = EnvConfig("CartPole-v1")
    state = make_runner(env, replayable=True).get_state()
    other = make_runner(env, num_envs=2, seed=1, replayable=True)
    assert other.set_state(state) == 2
    other.sample()


def test_very_long_episodes_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lit_rl.runners.history.LONGEST", 12)
    env = EnvConfig("Pendulum-v1")
    one, other = (make_runner(env, length=5, seed=seed, replayable=True) for seed in (0, 1))
    for _ in range(3):
        one.sample()
    assert one.get_state()["actions"] == [None] * 3
    assert other.set_state(one.get_state()) == 3


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_a_run_goes_on_with_fewer_env_runners_and_with_none(make_trainer: Callable) -> None:
    """RS2."""
    path = None
    for i, num_env_runners in enumerate((2, 1, 0)):
        data = RolloutDataModule(
            "CartPole-v1", num_env_runners=num_env_runners, num_envs_per_env_runner=2, rollout_length=16,
            max_env_steps=128 * (i + 1),
        )  # fmt: skip
        algorithm, trainer = PPO(**PPO_OPTIONS), make_trainer(limit_val_batches=0)
        trainer.fit(algorithm, data, ckpt_path=path)
        assert algorithm.env_steps_done == 128 * (i + 1) == data.ledger.delivered
        assert all(value.isfinite().all() for value in algorithm.state_dict().values())
        path = f"{num_env_runners}.ckpt"
        trainer.save_checkpoint(path)
    assert algorithm.updates_done == 2 + 4 + 4  # rollouts are half as long with one runner


@pytest.mark.parametrize("num_envs", [1, 3])
def test_a_replay_buffer_goes_on_with_another_number_of_environments(num_envs: int, make_trainer: Callable) -> None:
    def fit(num_envs: int, max_env_steps: int, path: str | None) -> tuple[DQN, ReplayDataModule]:
        options = OFF_POLICY | {"num_envs_per_env_runner": num_envs, "max_env_steps": max_env_steps, "buffer_size": 900}
        algorithm, data = DQN(), ReplayDataModule("CartPole-v1", seed=3, **options)
        trainer = make_trainer(limit_val_batches=0)
        trainer.fit(algorithm, data, ckpt_path=path)
        trainer.save_checkpoint("buffer.ckpt")
        return algorithm, data

    fit(2, 120, None)
    algorithm, data = fit(num_envs, 240, "buffer.ckpt")
    assert algorithm.env_steps_done == 240 == len(data.buffer)
    batch = data.buffer.sample(500)
    moved = (batch["next", "observation"] - batch["observation"])[:, 0]  # the cart's position, by its speed
    torch.testing.assert_close(moved, 0.02 * batch["observation"][:, 1], atol=1e-4, rtol=1e-3)
