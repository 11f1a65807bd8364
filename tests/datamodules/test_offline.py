"""Recorded episodes -> minibatches -> algorithm, under Trainer: by the clock of updates, without an environment."""

import csv
import re
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from gymnasium import spaces
from helpers import assert_same
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from tensordict import TensorDict
from torch import Tensor

from lit_rl import (
    BC,
    CQL,
    DQN,
    IQL,
    MARWIL,
    PPO,
    SAC,
    DiscreteCQL,
    EnvStepsProgressBar,
    Evaluation,
    LSTMNetwork,
    MultiAgent,
    OfflineDataModule,
    ReplayDataModule,
)
from lit_rl.callbacks import Record
from lit_rl.errors import CheckpointError, DataError, LitRLError, OptionError
from lit_rl.learner.reporting import telling

COLUMNS = {
    "observation": ["episode", "t"], "next_observation": ["episode", "next_t"], "action": "action", "reward": "reward",
    "terminated": "terminated", "truncated": "truncated", "episode": "episode",
}  # fmt: skip
NUM_EPISODES, LENGTH = 10, 8


def write(path: Path, **changed: Any) -> str:
    """Episodes: an observation is the number of the episode and that of the step, a reward that of the episode."""
    episode, t = (x.reshape(-1) for x in np.mgrid[:NUM_EPISODES, :LENGTH])
    last = t == LENGTH - 1
    rows = {
        "episode": episode, "t": t, "next_t": t + 1, "action": (episode + t) % 2, "reward": episode.astype(float),
        "terminated": last & (episode % 2 == 0), "truncated": last & (episode % 2 == 1),
    }  # fmt: skip
    pq.write_table(pa.table(rows | changed), path)
    return str(path)


@pytest.fixture
def path(tmp_path: Path) -> str:
    return write(tmp_path / "episodes.parquet")


def make_data(path: str, **options: Any) -> OfflineDataModule:
    given = {
        "columns": COLUMNS, "max_updates": 60, "updates_per_batch": 10, "batches_per_epoch": 2, "batch_size": 16,
        "n_step": 1, "seed": 0,
    }  # fmt: skip
    return OfflineDataModule(path, **given | options)


class Watched(DQN):
    """Keeps what it is given."""

    def update(self, batch: TensorDict) -> dict:
        self.__dict__.setdefault("seen", []).append(batch.clone())
        return super().update(batch)

    def judge(self, batch: TensorDict) -> dict[str, Tensor]:
        self.__dict__.setdefault("judged", []).append(batch.clone())
        return {"reward": batch["next", "reward"], "initial_step": batch["observation"][batch["is_init"]][:, 1]}

    def episodes(self, name: str = "seen") -> set[int]:
        """Those that minibatches were of."""
        return {int(episode) for batch in getattr(self, name) for episode in batch["observation"][..., 0].flatten()}


class WithReturns(Watched):
    @property
    def wants_returns_to_go(self) -> bool:
        return True


def fit(make_trainer: Any, algorithm: L.LightningModule, data: L.LightningDataModule, **options: Any) -> L.Trainer:
    trainer = make_trainer(**options)
    trainer.fit(algorithm, data)
    return trainer


# --- minibatches ------------------------------------------------------------------------------------------------------


def test_minibatches_are_transitions_of_the_data(path: str, make_trainer) -> None:
    algorithm = Watched()
    fit(make_trainer, algorithm, make_data(path))
    batch = torch.cat(algorithm.seen)
    assert len(algorithm.seen) == 60 and len(batch) == 60 * 16
    episode, t = batch["observation"].unbind(1)
    assert (batch["next", "observation"] == torch.stack([episode, t + 1], 1)).all()
    assert (batch["next", "reward"] == episode).all() and (batch["action"] == (episode + t) % 2).all()
    assert (batch["next", "terminated"] == ((t == LENGTH - 1) & (episode % 2 == 0))).all()
    assert algorithm.episodes() == set(range(NUM_EPISODES))
    assert set(t.tolist()) == set(range(LENGTH))  # the last step of a truncated episode is learned from too
    assert set(batch.keys()) == {"observation", "action", "index", "discount", "next"}


def test_a_last_step_after_which_nothing_was_recorded_is_not_learned_from(path: str, make_trainer) -> None:
    algorithm = Watched()
    columns = {name: x for name, x in COLUMNS.items() if name != "next_observation"}
    fit(make_trainer, algorithm, make_data(path, columns=columns, n_step=3))
    batch = torch.cat(algorithm.seen)
    episode, t = batch["observation"].unbind(1)
    assert not ((t == LENGTH - 1) & (episode % 2 == 1)).any() and ((t == LENGTH - 1) & (episode % 2 == 0)).any()
    bootstrapped = ~batch["next", "terminated"]
    assert (batch["next", "observation"][:, 0] == episode)[bootstrapped].all()
    assert (batch["next", "observation"][:, 1] > t)[bootstrapped].all()


def test_returns_to_go_are_there_if_an_algorithm_wants_them(path: str, make_trainer) -> None:
    algorithm = WithReturns(gamma=0.5)
    fit(make_trainer, algorithm, make_data(path))
    batch = torch.cat(algorithm.seen)
    episode, t = batch["observation"].unbind(1)
    left = LENGTH - t
    torch.testing.assert_close(batch["return_to_go"], episode * 2 * (1 - 0.5**left))
    torch.testing.assert_close(batch["to_go_discount"], torch.where(episode % 2 == 0, 0.0, 0.5**left))
    assert (batch["to_go_observation"] == torch.stack([episode, torch.full_like(t, LENGTH)], 1)).all()


def test_memory_gets_sequences(path: str, make_trainer) -> None:
    algorithm = Watched(network=LSTMNetwork, sequence_length=4, burn_in=2)
    fit(make_trainer, algorithm, make_data(path, validation_fraction=0.2, max_updates=10))
    batch = algorithm.seen[-1]
    assert batch["observation"].shape == (4, 4, 2) and batch["burn_in", "observation"].shape == (4, 2, 2)
    assert not batch["state", "h"].any()
    rows = torch.cat([one["observation"][one["mask"]] for one in algorithm.judged[:1]])
    assert len(rows) == 2 * LENGTH == len(rows.unique(dim=0))  # each held-out row once


def test_options_are_the_algorithms_where_they_are_not_set(path: str, make_trainer) -> None:
    data = make_data(path, batch_size=None, n_step=None, max_updates=1)
    fit(make_trainer, algorithm := Watched(), data)
    assert len(algorithm.seen[0]) == 128 and data.feed().draws.num_steps == (3, 3)
    data = make_data(path, n_step=[2, 4], prioritized=True, max_updates=1, priority_beta=0.5)
    fit(make_trainer, algorithm := Watched(), data)
    assert data.feed().draws.num_steps == (2, 4) and "weight" in algorithm.seen[0].keys()  # noqa: SIM118
    assert [data.beta_at(updates) for updates in (0, 1)] == [0.5, 1.0]


def test_priorities_go_back_to_their_rows(path: str, make_trainer) -> None:
    class Constant(Watched):
        def update(self, batch: TensorDict) -> dict:
            metrics = super().update(batch)
            batch["priority"] = batch["index"].double()
            return metrics

    data = make_data(path, prioritized=True, priority_alpha=1.0)
    fit(make_trainer, algorithm := Constant(), data)
    leaves = data.feed().buffer._tree.leaves
    index = torch.cat([batch["index"] for batch in algorithm.seen]).unique().numpy()
    np.testing.assert_allclose(leaves[index], index + 1e-6)


# --- the clock --------------------------------------------------------------------------------------------------------


def test_the_clock_is_updates(path: str, make_trainer, tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path / "log")
    saver = ModelCheckpoint(tmp_path / "saved", filename="{updates:.0f}", save_top_k=-1)
    algorithm = Watched(lr=0.6, lr_schedule="linear")
    trainer = fit(
        make_trainer, algorithm, make_data(path), logger=logger, callbacks=[saver], enable_checkpointing=True,
        log_every_n_steps=1,
    )  # fmt: skip
    assert (algorithm.updates_done, algorithm.env_steps_done, trainer.current_epoch) == (60, 0, 3)
    rows = list(csv.DictReader((tmp_path / "log" / "lightning_logs" / "version_0" / "metrics.csv").open()))
    assert [int(row["step"]) for row in rows] == [10, 20, 30, 40, 50, 60]
    assert [float(row["updates"]) for row in rows] == [10, 20, 30, 40, 50, 60]
    learning_rates = [float(row["optim/lr"]) for row in rows]  # of the updates of a batch
    assert learning_rates == pytest.approx([0.6, 0.5, 0.4, 0.3, 0.2, 0.1])
    assert float(rows[0]["time/updates_per_s"]) > 0
    assert not [name for name in rows[0] if name.startswith("rollout/") or "env_steps" in name]
    assert sorted(found.name for found in (tmp_path / "saved").iterdir()) == [
        "updates=20.ckpt", "updates=40.ckpt", "updates=60.ckpt"
    ]  # fmt: skip


def test_the_progress_bar_counts_updates(path: str, make_trainer) -> None:
    bar = EnvStepsProgressBar()
    fit(make_trainer, DQN(), make_data(path), callbacks=[bar], enable_progress_bar=True)
    assert (bar.train_progress_bar.n, bar.train_progress_bar.total) == (60, 60)
    assert bar.train_progress_bar.desc.startswith("updates") and bar.train_progress_bar.unit == " updates"
    assert "updates/s" in bar.train_progress_bar.postfix


@pytest.mark.parametrize(
    ("options", "limits", "updates"),
    [
        ({"max_updates": 25}, {}, 25),
        ({}, {"max_steps": 33}, 33),
        ({}, {"max_epochs": 2}, 40),
        ({"max_updates": 3}, {}, 3),
    ],
)
def test_the_budget_and_the_trainers_limits_are_kept(
    options: dict, limits: dict, updates: int, path: str, make_trainer
) -> None:
    algorithm = DQN()
    fit(make_trainer, algorithm, make_data(path, **options), **limits)
    assert algorithm.updates_done == updates


def test_a_resumed_run_whose_budget_is_spent_says_so(path: str, make_trainer, tmp_path: Path, caplog) -> None:
    trainer = fit(make_trainer, DQN(), make_data(path))
    trainer.save_checkpoint(tmp_path / "done.ckpt")
    caplog.set_level("INFO", "lightning.pytorch.utilities.rank_zero")
    make_trainer().fit(algorithm := DQN(), make_data(path), ckpt_path=tmp_path / "done.ckpt")
    assert algorithm.updates_done == 60
    assert "Nothing to train: updates=60 of max_updates=60 are done. Set a larger max_updates" in caplog.text


# --- resuming ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (lambda: DQN(), {}),
        (lambda: DQN(), {"prioritized": True, "n_step": [1, 3]}),
        pytest.param(
            lambda: DQN(network=LSTMNetwork, sequence_length=4, burn_in=2),
            {"prioritized": True},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_resumed_run_equals_an_unbroken_one_bit_for_bit(
    make: Any, options: dict, path: str, make_trainer, tmp_path: Path
) -> None:
    options = options | {"validation_fraction": 0.2, "seed": None}
    torch.manual_seed(0)
    whole = fit(make_trainer, unbroken := make(), first := make_data(path, **options))
    part = make_data(path, **options | {"max_updates": 60})
    part.seed = first.seed
    fit(make_trainer, make(), part, max_steps=34).save_checkpoint(tmp_path / "part.ckpt")
    trainer, resumed, data = make_trainer(), make(), make_data(path, **options)
    trainer.fit(resumed, data, ckpt_path=tmp_path / "part.ckpt")
    assert data.seed == first.seed and resumed.updates_done == unbroken.updates_done == 60
    assert_same(dict(resumed.state_dict()), dict(unbroken.state_dict()))
    assert_same(data.rank_state(), first.rank_state())
    metrics = [
        {name: float(x) for name, x in one.callback_metrics.items() if not name.startswith("time/")}
        for one in (trainer, whole)
    ]
    assert metrics[0].keys() == metrics[1].keys()


def test_other_data_is_refused_on_resume(path: str, make_trainer, tmp_path: Path) -> None:
    fit(make_trainer, DQN(), make_data(path), max_steps=5).save_checkpoint(tmp_path / "part.ckpt")
    with pytest.raises(CheckpointError, match="drew from 80 recorded transitions, here there are 64"):
        make_trainer().fit(DQN(), make_data(path, validation_fraction=0.2), ckpt_path=tmp_path / "part.ckpt")


# --- which episodes ---------------------------------------------------------------------------------------------------


def test_held_out_episodes_are_judged_by_and_not_learned_from(path: str, make_trainer) -> None:
    algorithm = Watched()
    trainer = fit(make_trainer, algorithm, make_data(path, validation_fraction=0.3))
    held_out = algorithm.episodes("judged")
    assert len(held_out) == 3 and held_out | algorithm.episodes() == set(range(NUM_EPISODES))
    assert not held_out & algorithm.episodes()
    rows = torch.cat(algorithm.judged[:2])  # 24 rows in minibatches of 16
    assert [len(batch) for batch in algorithm.judged[:2]] == [16, 8] and len(rows["observation"].unique(dim=0)) == 24
    assert trainer.callback_metrics["eval/reward"] == pytest.approx(np.mean(sorted(held_out)))
    assert trainer.callback_metrics["eval/initial_step"] == 0
    assert not [name for name in trainer.callback_metrics if name.startswith("eval/return")]
    again = Watched()
    fit(make_trainer, again, make_data(path, validation_fraction=0.3))
    assert again.episodes("judged") == held_out


def test_validate_and_test_judge_without_an_environment(path: str, make_trainer) -> None:
    data, algorithm = make_data(path, validation_fraction=0.3), Watched()
    trainer = fit(make_trainer, algorithm, data)
    (found,) = trainer.validate(algorithm, data, verbose=False)
    assert set(found) == {"eval/reward", "eval/initial_step"}
    assert set(trainer.test(algorithm, data, verbose=False)[0]) == {"test/reward", "test/initial_step"}


def test_held_out_metrics_and_played_episodes_are_logged_together(make_trainer, tmp_path: Path) -> None:
    path = write(tmp_path / "t.parquet", extra=np.zeros(80))
    columns = COLUMNS | {"observation": ["episode", "t", "extra", "extra"]}
    columns["next_observation"] = ["episode", "next_t", "extra", "extra"]
    logger = CSVLogger(tmp_path / "log")
    data = make_data(
        path, columns=columns, validation_fraction=0.3, evaluation=Evaluation(env="CartPole-v1", episodes=3)
    )
    trainer = fit(make_trainer, algorithm := Watched(), data, logger=logger, log_every_n_steps=1)
    assert algorithm.spec.env_id == "CartPole-v1"
    assert {"eval/reward", "eval/return_mean", "eval/episodes"} <= trainer.callback_metrics.keys()
    rows = list(csv.DictReader((tmp_path / "log" / "lightning_logs" / "version_0" / "metrics.csv").open()))
    played = [row for row in rows if row["eval/return_mean"]]
    assert [int(row["step"]) for row in played] == [20, 40, 60] and all(row["eval/reward"] for row in played)


def test_the_best_episodes_alone_are_learned_from(path: str, make_trainer) -> None:
    algorithm = Watched()
    fit(make_trainer, algorithm, make_data(path, top_fraction=0.3))
    assert algorithm.episodes() == {7, 8, 9}


def test_there_is_nothing_to_evaluate_without_environment_and_held_out_data(path: str, make_trainer) -> None:
    algorithm, data = DQN(), make_data(path)
    trainer = fit(make_trainer, algorithm, data)
    with pytest.raises(
        OptionError, match=r"There is nothing to evaluate by: expected evaluation\.env, .* or a validation"
    ):
        trainer.validate(algorithm, data)
    with pytest.raises(OptionError, match=r"predict plays episodes: expected evaluation\.env"):
        make_trainer().predict(algorithm, data)


# --- several agents ---------------------------------------------------------------------------------------------------


def test_rows_go_to_the_policy_of_their_agent(make_trainer, tmp_path: Path) -> None:
    names = np.array(["red_0", "red_1", "blue"])
    path = write(tmp_path / "t.parquet", who=names[np.arange(NUM_EPISODES).repeat(LENGTH) % 3])
    data = make_data(path, columns=COLUMNS | {"agent": "who"}, validation_fraction=0.4)
    red, blue = Watched(), Watched(lr=0.6, lr_schedule="linear")
    algorithm = MultiAgent({"red": red, "blue": blue}, policy_mapping={"red_*": "red", "*": "blue"})
    trainer = fit(make_trainer, algorithm, data)
    assert (algorithm.updates_done, red.updates_done, blue.updates_done, algorithm.env_steps_done) == (60, 60, 60, 0)
    assert {episode % 3 for episode in red.episodes() | red.episodes("judged")} == {0, 1}
    assert {episode % 3 for episode in blue.episodes() | blue.episodes("judged")} == {2}
    assert not red.episodes() & red.episodes("judged")
    assert {"red/eval/reward", "blue/eval/reward", "red/loss/value"} <= trainer.callback_metrics.keys()
    assert trainer.callback_metrics["blue/optim/lr"] == pytest.approx(0.1)  # after 50 of 60 updates
    shared = Watched()
    fit(make_trainer, shared, make_data(path, columns=COLUMNS | {"agent": "who"}))
    assert shared.episodes() == set(range(NUM_EPISODES))


def test_a_mapping_that_cannot_be_known_is_refused(make_trainer, tmp_path: Path) -> None:
    path = write(tmp_path / "t.parquet", who=np.where(np.arange(80) < 40, "a", "b"))
    for mapping, message in (
        (lambda agent, info: "x", "policy_mapping: a function says who acts by which policy in an episode"),
        ({"a": "x", "b": "x", "*": "y"}, r"policies\['y'\]: policy_mapping gives it no"),
    ):
        algorithm = MultiAgent({"x": DQN(), "y": DQN()}, policy_mapping=mapping)
        with pytest.raises(OptionError, match=message):
            fit(make_trainer, algorithm, make_data(path, columns=COLUMNS | {"agent": "who"}))


# --- what cannot be ---------------------------------------------------------------------------------------------------


def test_what_cannot_be_is_one_sentence(path: str, make_trainer) -> None:
    for options, message in (
        ({"preset": "d4lr"}, "preset='d4lr': expected one of 'rllib', 'd4rl', 'lerobot'"),
        ({"validation_fraction": 1.0}, "validation_fraction=1.0: expected a number, at least 0 and below 1"),
        ({"top_fraction": 0.0}, "top_fraction=0.0: expected a number, above 0 and at most 1"),
        ({"evaluation": Evaluation(env_kwargs={"a": 1})}, "expected evaluation.env too, the environment to play"),
        (
            {"wrappers": ["gymnasium.wrappers:ClipReward"]},
            "wrappers: expected evaluation.env too, the environment that",
        ),
    ):
        with pytest.raises(OptionError) as found:
            make_data(path, **options)
        assert message in str(found.value)
    for paths in (5, "", ["episodes", ""]):
        with pytest.raises(OptionError, match=r"paths=.*: expected a path, or a list of paths"):
            OfflineDataModule(paths)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="model=PPO: OfflineDataModule feeds imitation and off-policy algorithms"):
        fit(make_trainer, PPO(), make_data(path))
    with pytest.raises(LitRLError, match=r"needs a Discrete action space, got Box"):
        fit(make_trainer, DQN(), make_data(path, columns=COLUMNS | {"action": ["reward"]}))
    with pytest.raises(OptionError, match="batch_size=16: expected at least one sequence, sequence_length=20"):
        fit(make_trainer, DQN(network=LSTMNetwork), make_data(path))


def test_a_run_goes_on_with_the_clock_it_began_with(own: str, make_trainer, tmp_path: Path) -> None:
    offline, online = make_data(own, columns=None), ReplayDataModule("CartPole-v1", **ONLINE)
    for begun, other, message in (
        (
            offline,
            online,
            "learned from recorded data: it cannot be resumed with ReplayDataModule. Begin a new run with",
        ),
        (
            online,
            offline,
            "learned in an environment: it cannot be resumed with OfflineDataModule. Begin a new run with",
        ),
    ):
        fit(make_trainer, DQN(), begun, limit_val_batches=0).save_checkpoint(tmp_path / "run.ckpt")
        with pytest.raises(CheckpointError, match=message):
            make_trainer(limit_val_batches=0).fit(DQN(), other, ckpt_path=tmp_path / "run.ckpt")


def test_a_datamodule_in_words_plays_nothing(path: str) -> None:
    for data in (make_data(path), ReplayDataModule("Nowhere-v0")):
        assert type(data).__name__ in str(data)


# --- recorded rows in online runs -------------------------------------------------------------------------------------


ONLINE: dict[str, Any] = {
    "max_env_steps": 120, "learning_starts": 40, "batch_size": 16, "buffer_size": 500, "env_steps_per_batch": 40,
    "update_to_data": 0.5, "n_step": 1, "seed": 0,
}  # fmt: skip


@pytest.fixture
def own(tmp_path: Path, make_trainer) -> str:
    """Episodes of CartPole that lit_rl recorded."""
    data = ReplayDataModule("CartPole-v1", **ONLINE | {"evaluation": Evaluation(episodes=6, deterministic=False)})
    algorithm = DQN()
    fit(make_trainer, algorithm, data, limit_val_batches=0)
    make_trainer(callbacks=[Record(str(tmp_path / "recorded"))]).predict(algorithm, data)
    return str(tmp_path / "recorded")


def test_own_episodes_are_learned_from(own: str, make_trainer) -> None:
    data = make_data(own, columns=None)
    fit(make_trainer, algorithm := Watched(), data)
    assert algorithm.updates_done == 60 and len(data.recorded.begins) == 6
    assert data.recorded.has_closing.all()
    with pytest.raises(OptionError, match=r"evaluation\.env='Acrobot-v1': the environment Acrobot-v1 has observation"):
        fit(make_trainer, DQN(), make_data(own, columns=None, evaluation=Evaluation(env="Acrobot-v1")))


def test_a_fixed_part_of_every_minibatch_is_recorded(own: str, make_trainer) -> None:
    data = ReplayDataModule("CartPole-v1", offline_paths=own, offline_fraction=0.25, **ONLINE | {"prioritized": True})
    fit(make_trainer, algorithm := Watched(), data, limit_val_batches=0)
    assert len(algorithm.seen) == 40 and {len(batch) for batch in algorithm.seen} == {16}
    recorded, buffer = data._recorded, data.buffer
    for batch in algorithm.seen:
        of_data = recorded.columns["observation"][batch["index"][12:].numpy()]
        assert (batch["observation"][12:].numpy() == of_data).all()
        of_buffer = buffer._columns["observation"][batch["index"][:12].numpy()]
        assert (batch["observation"][:12].numpy() == of_buffer).all()
    tree = data.feeds[""].recorded.buffer._tree.leaves[: len(recorded.reward)]
    drawn = torch.cat([batch["index"][12:] for batch in algorithm.seen]).unique().numpy()
    assert (tree[drawn] != 1).mean() > 0.9 and (tree[recorded.closing] == 0).all()


def test_online_rows_stand_in_for_their_returns_by_the_value_of_where_they_are(own: str, make_trainer) -> None:
    data = ReplayDataModule("CartPole-v1", offline_paths=own, **ONLINE)
    fit(make_trainer, algorithm := WithReturns(), data, limit_val_batches=0)
    batch = algorithm.seen[-1]
    assert not batch["return_to_go"][:8].any() and (batch["to_go_discount"][:8] == 1).all()
    assert (batch["to_go_observation"] == batch["observation"])[:8].all() and (batch["return_to_go"][8:] >= 1).all()
    with pytest.raises(OptionError, match="model=WithReturns: it learns from the returns of recorded episodes"):
        fit(make_trainer, WithReturns(), ReplayDataModule("CartPole-v1", **ONLINE))


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"prioritized": True}])
def test_a_resumed_online_run_draws_the_same_recorded_rows(
    options: dict, own: str, make_trainer, tmp_path: Path
) -> None:
    def make(**more: Any) -> ReplayDataModule:
        return ReplayDataModule("CartPole-v1", offline_paths=own, **ONLINE | options | more)

    fit(make_trainer, unbroken := Watched(), make(), limit_val_batches=0)
    fit(make_trainer, Watched(), make(), limit_val_batches=0, max_steps=20).save_checkpoint(tmp_path / "part.ckpt")
    resumed = Watched()
    make_trainer(limit_val_batches=0).fit(resumed, make(), ckpt_path=tmp_path / "part.ckpt")
    assert_same(dict(resumed.state_dict()), dict(unbroken.state_dict()))


def test_recorded_data_of_other_spaces_is_refused(own: str, make_trainer) -> None:
    with pytest.raises(
        OptionError, match=r"offline_paths=\['.*recorded'\]: the data has observation .*: expected those of"
    ):
        fit(make_trainer, SAC(), ReplayDataModule("Pendulum-v1", offline_paths=own, **ONLINE))


# --- algorithms -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [BC, MARWIL, DiscreteCQL, IQL])
def test_algorithms_learn_and_are_judged_by_held_out_episodes(kind: type, path: str, make_trainer) -> None:
    data = make_data(path, validation_fraction=0.2)
    fit(make_trainer, algorithm := kind(), data)
    assert algorithm.updates_done == 60
    found = make_trainer().validate(algorithm, data, verbose=False)[0]
    expected = {"BC": {"log_prob"}, "MARWIL": {"log_prob", "td_error", "initial_value"}}
    names = expected.get(kind.__name__, {"td_error", "initial_value"}) | {"action_difference"}
    assert {name.removeprefix("eval/") for name in found} >= names
    assert all(np.isfinite(found[f"eval/{name}"]) for name in names) and 0 <= found["eval/action_difference"] <= 1


@pytest.mark.parametrize(
    ("kind", "options"),
    [(DiscreteCQL, {"lr": 5e-3, "tau": 0.2}), (IQL, {"lr": 5e-3, "tau": 0.2}), (MARWIL, {"lr": 5e-3})],
)
def test_values_go_on_after_a_truncation_and_end_with_a_termination(
    kind: type, options: dict[str, Any], path: str, make_trainer
) -> None:
    """A state that is never left, with a reward of 1, in episodes of one step: it is worth 2 with a discount of 0.5."""
    found = {}
    for flag in ("terminated", "truncated"):
        same, is_last = np.ones(NUM_EPISODES * LENGTH), np.ones(NUM_EPISODES * LENGTH, np.bool_)
        number = np.arange(len(same))
        flags = {"terminated": ~is_last, "truncated": ~is_last} | {flag: is_last}
        write(Path(path), episode=number, t=same, next_t=same, reward=same, action=number % 2, **flags)
        columns = COLUMNS | {"observation": ["t"], "next_observation": ["next_t"]}
        data = make_data(path, columns=columns, max_updates=250, validation_fraction=0.1)
        torch.manual_seed(0)
        trainer = fit(make_trainer, kind(gamma=0.5, **options), data)
        found[flag] = trainer.callback_metrics["eval/initial_value"].item()
    assert found == pytest.approx({"terminated": 1.0, "truncated": 2.0}, abs=0.1)


@pytest.mark.parametrize("kind", [CQL, IQL, SAC, BC])
def test_actions_are_as_the_policy_gives_them(kind: type, make_trainer, tmp_path: Path) -> None:
    """A squashed policy's lie in [-1, 1]; the environment of the data was given them between its bounds, -2 and 2."""
    episode, t = (x.reshape(-1) for x in np.mgrid[:4, :8])
    columns = {f"obs{i}": np.sin(episode + i * t) for i in range(3)} | {
        "torque": np.linspace(-2, 2, 32),
        "episode": episode,
    }
    rows = columns | {"reward": -(columns["torque"] ** 2), "terminated": np.zeros(32, bool), "truncated": t == 7}
    rows |= {f"next{i}": np.sin(episode + i * (t + 1)) for i in range(3)}
    pq.write_table(pa.table(rows), tmp_path / "pendulum.parquet")
    named = {
        "observation": [f"obs{i}" for i in range(3)], "next_observation": [f"next{i}" for i in range(3)],
        "action": ["torque"], "reward": "reward", "terminated": "terminated", "truncated": "truncated",
        "episode": "episode",
    }  # fmt: skip
    seen: list[Tensor] = []

    class Watching(kind):  # type: ignore[misc,valid-type]
        def update(self, batch: TensorDict) -> Any:
            assert torch.allclose(batch["next", "reward"], -(self.scale * batch["action"][:, 0]).square(), atol=1e-5)
            seen.append(batch["action"])
            return super().update(batch)

    algorithm = Watching()
    algorithm.scale = 1.0 if kind is BC else 2.0
    data = make_data(
        str(tmp_path / "pendulum.parquet"), columns=named, max_updates=20, evaluation=Evaluation(env="Pendulum-v1")
    )
    fit(make_trainer, algorithm, data, limit_val_batches=0)
    assert torch.cat(seen).abs().max().item() == pytest.approx(2.0 if kind is BC else 1.0, abs=0.01)


# --- what is said ----------------------------------------------------------------------------------------------------


def test_how_many_episodes_are_used_and_held_out_is_said(path: str, make_trainer, caplog) -> None:
    caplog.set_level("INFO", "lightning.pytorch.utilities.rank_zero")
    bar = EnvStepsProgressBar()
    data = make_data(path, top_fraction=0.5, validation_fraction=0.25)
    trainer = fit(make_trainer, DQN(), data, callbacks=[bar], enable_progress_bar=True, limit_val_batches=None)
    found = re.search(r"(\d+) of (\d+) episodes are learned from, (\d+) held out\.", caplog.text)
    assert found is not None
    learned, episodes, held_out = map(int, found.groups())
    assert learned + held_out == round(episodes / 2) and held_out == max(1, round(episodes / 8))
    assert "eval/td_error" in bar.train_progress_bar.postfix and "loss/" not in bar.train_progress_bar.postfix
    assert telling(trainer.callback_metrics) == {"eval/td_error": float(trainer.callback_metrics["eval/td_error"])}


def test_without_held_out_episodes_losses_are_shown(path: str, make_trainer) -> None:
    bar = EnvStepsProgressBar()
    fit(make_trainer, DQN(), make_data(path), callbacks=[bar], enable_progress_bar=True)
    assert "loss/" in bar.train_progress_bar.postfix


# --- spaces of tables -------------------------------------------------------------------------------------------------

TABLE = "x,push,gain,run\n" + "".join(f"0.{i % 10},0.{i % 7},1,{i // 8}\n" for i in range(64))
OF_TABLE = {"observation": ["x"], "action": "push", "reward": "gain", "episode": "run"}


@pytest.fixture
def table(tmp_path: Path) -> str:
    (tmp_path / "log.csv").write_text(TABLE)
    return str(tmp_path / "log.csv")


def test_spaces_of_tables_may_be_given(table: str, make_trainer) -> None:
    wide = spaces.Box(-2.0, 2.0, (1,), np.float32)
    for given in ({"action_space": wide}, {"action_space": wide, "observation_space": spaces.Box(0, 1, (1,))}):
        data = OfflineDataModule(table, columns=OF_TABLE, max_updates=2, **given)
        algorithm = BC()
        make_trainer().fit(algorithm, data)
        assert algorithm.spec is not None and algorithm.spec.action_space == wide
        assert algorithm.spec.observation_space == given.get("observation_space", spaces.Box(-np.inf, np.inf, (1,)))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"action_space": 3}, "action_space=3: expected a gymnasium space."),
        ({"action_space": spaces.Box(-0.1, 0.1, (1,))}, "is outside of the action space"),
        ({"action_space": spaces.Box(-1, 1, (1,)), "columns": None}, "action_space: expected tables, with columns"),
        (
            {"observation_space": spaces.Box(-1, 1, (1,)), "evaluation": Evaluation(env="CartPole-v1")},
            "observation_space together with evaluation.env, which has spaces",
        ),
    ],
)
def test_spaces_that_do_not_fit_are_refused(options: dict, words: str, table: str, make_trainer) -> None:
    with pytest.raises((OptionError, DataError), match=re.escape(words)):
        make_trainer().fit(BC(), OfflineDataModule(table, **{"columns": OF_TABLE, "max_updates": 2} | options))


def test_whole_numbers_with_fractions_are_pointed_out(tmp_path: Path, make_trainer, caplog) -> None:
    caplog.set_level("INFO", "lightning.pytorch.utilities.rank_zero")
    (tmp_path / "log.csv").write_text("x,push,run\n" + "".join(f"0.{i},{i % 2}.0,0\n" for i in range(9)))
    columns = {"observation": ["x"], "action": "push", "episode": "run"}
    make_trainer().fit(BC(), OfflineDataModule(str(tmp_path / "log.csv"), columns=columns, max_updates=1))
    assert "all actions are whole numbers of a type with fractions: write integers if they are choices" in caplog.text


def test_a_fraction_of_no_recorded_data_is_refused() -> None:
    with pytest.raises(OptionError, match=r"offline_fraction=0\.25: expected offline_paths too"):
        ReplayDataModule("CartPole-v1", offline_fraction=0.25)
