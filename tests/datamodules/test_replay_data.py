"""The path env -> runner -> buffer -> minibatch -> algorithm -> priorities and weights, under Trainer."""

import csv
import gc
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from envs import CycleEnv, FailingEnv, counter_vector
from helpers import ROOT, assert_same, run_python
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from tensordict import TensorDict

from lit_rl import DQN, PPO, SAC, Evaluation, LSTMNetwork, Rainbow, ReplayDataModule, load_policy
from lit_rl.errors import CheckpointError, EnvError, OptionError, ReplayError
from lit_rl.files.checkpoint import LitCheckpointIO
from lit_rl.replay.feed import ALONE

pytestmark = pytest.mark.slow  # dozens of short runs; test_dqn and test_sac have quick ones over the same path

SMALL: dict[str, Any] = {
    "learning_starts": 40, "batch_size": 16, "buffer_size": 500, "env_steps_per_batch": 50, "seed": 0,
    "update_to_data": 1.0, "n_step": 1,
}  # fmt: skip


class Watched(DQN):
    """Notes when updates happen and what they are given."""

    def update(self, batch: TensorDict) -> dict:
        if not hasattr(self, "seen"):
            self.seen: list[tuple[int, int]] = []
            self.batches: list[TensorDict] = []
        self.seen.append((self.env_steps_done, self.updates_done))
        self.batches.append(batch.clone())
        return super().update(batch)


def run(make_trainer: Any, algorithm: DQN | SAC, env: Any = CycleEnv, **options: Any) -> ReplayDataModule:
    data = ReplayDataModule(env, **SMALL | {"max_env_steps": 200} | options)
    make_trainer(limit_val_batches=0).fit(algorithm, data)
    return data


# --- the proportion of env steps and updates ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "updates"),
    [
        ({}, 160),  # one for each of the 200 - 40 env steps
        ({"update_to_data": 0.25}, 40),
        ({"update_to_data": 0.3}, 48),
        pytest.param({"update_to_data": 2.5}, 400),
        ({"update_to_data": 0.25, "rollout_length": 4}, 40),
        ({"num_envs_per_env_runner": 5, "rollout_length": 4}, 160),
        ({"learning_starts": 100, "env_steps_per_batch": 33}, 100),
    ],
)
def test_updates_per_env_step_are_what_was_asked_for(options: dict, updates: int, make_trainer) -> None:
    algorithm = Watched()
    run(make_trainer, algorithm, **options)
    assert algorithm.env_steps_done == 200
    assert algorithm.updates_done == len(algorithm.seen) == updates
    starts = options.get("learning_starts", 40)
    rows = options.get("num_envs_per_env_runner", 1) * options.get("rollout_length", 1)
    ratio = options.get("update_to_data", 1.0)
    assert all(starts < steps <= 200 for steps, _ in algorithm.seen)
    for steps, done in algorithm.seen:  # never ahead of the data, and never far behind
        assert done < (steps - starts) * ratio + 1e-6 <= done + 1 + rows * ratio


def test_the_budget_is_never_exceeded(make_trainer) -> None:
    algorithm = DQN()
    run(make_trainer, algorithm, max_env_steps=205, num_envs_per_env_runner=4, rollout_length=3)
    assert algorithm.env_steps_done == 204
    shape = {"num_envs_per_env_runner": 4, "rollout_length": 3}
    again = ReplayDataModule(CycleEnv, max_env_steps=10, **SMALL | {"learning_starts": 4, "batch_size": 4}, **shape)
    with pytest.raises(OptionError, match="max_env_steps=10: expected at least the 12 env steps that are taken at a"):
        make_trainer().fit(DQN(), again)


def test_masked_rows_are_not_counted_and_not_stored(make_trainer) -> None:
    algorithm = DQN()
    data = run(
        make_trainer, algorithm, counter_vector, env_kwargs={"mode": "NextStep"}, vectorization="native",
        num_envs_per_env_runner=3, rollout_length=4,
    )  # fmt: skip
    assert 188 < algorithm.env_steps_done <= 200
    assert len(data.buffer) == algorithm.env_steps_done
    batch = data.buffer.sample(300)
    torch.testing.assert_close(batch["next", "observation"], batch["observation"] + 1)


def test_actions_are_random_until_learning_starts_and_follow_epsilon_then(make_trainer) -> None:
    class Spy(ReplayDataModule):
        def start_runners(self, epsilons: Sequence[float] = (0.0,)) -> None:
            found.update(enumerate(epsilons, start=self._env_steps))
            super().start_runners(epsilons)

    for warm_up in (True, False):
        found: dict[int, float] = {}
        data = Spy(CycleEnv, max_env_steps=100, random_warmup=warm_up, **SMALL | {"update_to_data": 0.25})
        make_trainer(limit_val_batches=0).fit(DQN(epsilon_schedule=[[40, 0.5], [90, 0.0]]), data)
        assert list(found) == list(range(100))
        assert all(found[step] == (1.0 if warm_up else 0.5) for step in range(40))
        assert [found[step] for step in (40, 65, 90, 99)] == pytest.approx([0.5, 0.25, 0.0, 0.0])


def test_env_steps_are_taken_with_the_newest_weights(make_trainer) -> None:
    matches = []

    class Spy(ReplayDataModule):
        def start_runners(self, epsilons: Sequence[float] = (0.0,)) -> None:
            super().start_runners(epsilons)
            mine, theirs = self.algorithm.policy.state_dict(), self._pool._runner.policy.state_dict()
            matches.append(all(torch.equal(mine[name], theirs[name]) for name in mine))

    make_trainer(limit_val_batches=0).fit(Rainbow(), Spy(CycleEnv, max_env_steps=100, **SMALL))
    assert len(matches) > 60 and all(matches)  # 60 updates, one after each env step


# --- as many env steps in one fragment as no update is due for --------------------------------------------------------


class OneAtATime(ReplayDataModule):
    """Takes `rollout_length` env steps at a time, whether an update is due or not."""

    def _times_at_once(self, rows: int, end: int) -> int:
        return 1


class Lengths(ReplayDataModule):
    """Notes how many env steps each fragment has."""

    def took(self, fragments: Any, times: int = 1) -> None:
        self.lengths = [*getattr(self, "lengths", []), *(len(f.rows.views()["reward"][0]) for _, f in fragments)]
        super().took(fragments, times)


SHORT: dict[str, Any] = {"max_env_steps": 403, "update_to_data": 0.25, "learning_starts": 43, "env_steps_per_batch": 45}
EPSILON = [[0, 1.0], [300, 0.1]]


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (lambda: DQN(epsilon_schedule=EPSILON), {}),
        (lambda: DQN(epsilon_schedule=EPSILON), {"random_warmup": False}),
        (lambda: DQN(epsilon=0.1), {"update_to_data": 0.07, "num_envs_per_env_runner": 3}),
        (lambda: DQN(epsilon_schedule=EPSILON), {"update_to_data": 0.05, "rollout_length": 4}),
        (lambda: DQN(epsilon_schedule=EPSILON), {"buffer_size": 150, "n_step": [1, 3], "prioritized": True}),
        (lambda: DQN(network=LSTMNetwork, sequence_length=4, burn_in=2), {"update_to_data": 0.1}),
        (lambda: Rainbow(num_atoms=5), {"env": "CartPole-v1"}),
        (lambda: SAC(), {"env": "Pendulum-v1", "num_envs_per_env_runner": 2}),
    ],
)
def test_env_steps_taken_at_once_are_those_taken_one_by_one(make: Any, options: dict, make_trainer) -> None:
    env = options.get("env", "CartPole-v1")
    options = SMALL | SHORT | {name: value for name, value in options.items() if name != "env"}
    states = []
    for data_class in (OneAtATime, Lengths):
        rows: list[dict] = []

        class Keep(L.Callback):
            def on_train_batch_end(self, trainer: L.Trainer, *_: object, rows: list = rows) -> None:
                values = trainer.callback_metrics.items()
                rows.append({name: float(value) for name, value in values if not name.startswith("time/")})

        data, algorithm = data_class(env, **options), make()
        make_trainer(limit_val_batches=0, callbacks=[Keep()]).fit(algorithm, data)
        buffer = data.buffer
        columns = {name: torch.from_numpy(np.array(column)) for name, column in buffer._saved().items()}
        states.append({
            "weights": dict(algorithm.state_dict()), "metrics": rows, "buffer": columns, "open": buffer._open,
            "drawn": buffer.rng.bit_generator.state, "runner": data._runner_states, "collected": data._collected,
        })  # fmt: skip
    assert_same(states[1], states[0])
    assert max(data.lengths) >= 3 * options.get("rollout_length", 1)


def test_a_fragment_ends_where_an_update_is_due_or_learning_starts_or_a_batch_ends(make_trainer) -> None:
    data = Lengths("CartPole-v1", **SMALL | SHORT | {"buffer_size": 1000})
    make_trainer(limit_val_batches=0).fit(DQN(), data)
    ends = np.cumsum(data.lengths).tolist()
    assert ends[:4] == [43, 45, 47, 51]  # learning starts at 43, the first batch ends at 45, updates are due every 4
    assert {45 * k for k in range(1, 9)} <= set(ends) and ends[-1] == 403
    assert {43 + 4 * k for k in range(1, 91)} <= set(ends)


def test_fragments_of_other_vector_environments_stay_short(make_trainer) -> None:
    """Where an environment fails they are discarded, and not every row is a transition."""
    options = SMALL | SHORT | {"max_env_steps": 80}
    data = Lengths(
        counter_vector, env_kwargs={"mode": "NextStep"}, vectorization="native", num_envs_per_env_runner=2, **options
    )
    make_trainer(limit_val_batches=0).fit(DQN(), data)
    assert set(data.lengths) == {1}


def test_training_ends_with_an_evaluation_and_a_checkpoint(make_trainer, tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path / "saved", filename="last", save_on_train_epoch_end=True)
    data = ReplayDataModule(
        CycleEnv, max_env_steps=175, batches_per_epoch=2, evaluation=Evaluation(episodes=2), **SMALL
    )
    trainer = make_trainer(callbacks=[saver], enable_checkpointing=True)
    trainer.fit(DQN(), data)
    assert trainer.callback_metrics["eval/return_mean"] >= 0
    assert trainer.current_epoch == 2  # 100 env steps, then 75
    saved = torch.load(tmp_path / "saved" / "last.ckpt", weights_only=True)
    assert int(saved["state_dict"]["env_steps"]) == 175


def test_metrics_are_averaged_over_the_updates_of_a_batch_and_documented(make_trainer) -> None:
    values: list[dict] = []

    class Keep(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
            values.append({name: float(value) for name, value in trainer.callback_metrics.items()})

    data = ReplayDataModule("Pendulum-v1", max_env_steps=300, prioritized=True, **SMALL)
    make_trainer(limit_val_batches=0, callbacks=[Keep()]).fit(SAC(max_grad_norm=10.0), data)
    assert [row["env_steps"] for row in values] == [50.0 * k for k in range(1, 7)]
    assert {"loss/policy", "loss/value", "policy/alpha", "optim/grad_norm", "replay/beta"} <= values[-1].keys()
    assert values[-1]["replay/transitions"] == 300 and values[-1]["replay/beta"] == pytest.approx(1.0)
    documented = (ROOT / "docs" / "metrics.md").read_text()
    for name in values[-1]:
        assert f"`{name}`" in documented, f"docs/metrics.md does not define {name}"


def test_what_an_environment_raises_ends_training_in_one_sentence(make_trainer) -> None:
    with pytest.raises(EnvError, match="FailingEnv raised in step"):
        run(make_trainer, DQN(), FailingEnv)


# --- what is drawn --------------------------------------------------------------------------------------------------


def test_priorities_go_back_to_the_transitions_they_belong_to(make_trainer) -> None:
    written: list[tuple[list, list]] = []

    class Constant(Watched):
        def update(self, batch: TensorDict) -> dict:
            metrics = super().update(batch)
            batch["priority"] = batch["index"].double()  # any number that can be recognised
            return metrics

    data = ReplayDataModule(CycleEnv, max_env_steps=120, prioritized=True, priority_alpha=1.0, **SMALL)
    algorithm = Constant()
    make_trainer(limit_val_batches=0).fit(algorithm, data)
    leaves = data.buffer._tree.leaves
    for index in torch.cat([batch["index"] for batch in algorithm.batches]).unique().tolist():
        written.append((leaves[index], index + 1e-6))
    assert len(written) > 50
    np.testing.assert_allclose(*zip(*written))
    assert all(batch["weight"].max() == 1 for batch in algorithm.batches)


def test_the_algorithm_says_what_is_drawn_and_options_come_first(make_trainer) -> None:
    own = {"n_step": None, "update_to_data": None, "batch_size": None, "learning_starts": 140}
    data = run(make_trainer, algorithm := Rainbow(), **own)
    assert algorithm.updates_done == 7 and len(data.feeds[ALONE].draw()) == 128  # an update for eight of 60 env steps
    assert data.feeds[ALONE].options.num_steps == (3, 3) and "weight" in data.buffer.sample(1, beta=1.0).keys()  # noqa: SIM118
    data = run(make_trainer, Rainbow(), n_step=[2, 4], prioritized=False)
    assert data.feeds[ALONE].options.num_steps == (2, 4) and "weight" not in data.buffer.sample(1).keys()  # noqa: SIM118
    data = run(make_trainer, algorithm := DQN(), **own)
    assert data.feeds[ALONE].options.num_steps == (3, 3) and "weight" not in data.buffer.sample(1).keys()  # noqa: SIM118
    data = run(make_trainer, algorithm := SAC(), "Pendulum-v1", **own | {"learning_starts": 190, "batch_size": 8})
    assert data.feeds[ALONE].options.num_steps == (1, 1) and algorithm.updates_done == 10
    with pytest.raises(OptionError, match="learning_starts=140: expected at least batch_size=256 env steps"):
        run(make_trainer, SAC(), "Pendulum-v1", **own)


def test_rewards_are_discounted_by_the_algorithms_gamma(make_trainer) -> None:
    algorithm = Watched(gamma=0.5)
    run(make_trainer, algorithm, n_step=2)
    discounts = torch.cat([batch["discount"] for batch in algorithm.batches])
    assert set(discounts.unique().tolist()) == {0.5, 0.25}


def test_memory_gets_sequences_with_burn_in(make_trainer) -> None:
    algorithm = Watched(network=LSTMNetwork, sequence_length=4, burn_in=2)
    run(make_trainer, algorithm, max_env_steps=100)
    batch = algorithm.batches[-1]
    assert batch["observation"].shape == (4, 4, 5) and batch["burn_in", "observation"].shape == (4, 2, 5)
    assert batch["state", "h"].shape == (4, 64)


# --- resuming -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "env", "options"),
    [
        pytest.param(lambda: DQN(double=False), CycleEnv, {}),
        (lambda: Rainbow(v_min=0.0, v_max=5.0), CycleEnv, {"n_step": [1, 4]}),
        (lambda: SAC(lr=1e-3), CycleEnv, {"prioritized": True}),
        pytest.param(
            lambda: DQN(network=LSTMNetwork, sequence_length=4, burn_in=2),
            CycleEnv,
            {"prioritized": True},
            marks=pytest.mark.slow,
        ),
        pytest.param(lambda: DQN(), CycleEnv, {"storage_dir": "rows"}),
    ],
    ids=["DQN", "Rainbow", "SAC", "memory", "disk"],
)
def test_a_resumed_run_equals_an_unbroken_one_bit_for_bit(
    make: Any, env: Any, options: dict, make_trainer, tmp_path: Path
) -> None:
    """Where a checkpoint falls between episodes: these always begin in the same way."""
    options = SMALL | options | {"rollout_length": 5, "num_envs_per_env_runner": 2, "max_env_steps": 400}
    options |= {"buffer_size": 150, "batches_per_epoch": 2, "update_to_data": 0.25}

    class Series(L.Callback):
        def __init__(self) -> None:
            self.rows: list[dict] = []

        def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
            row = {k: float(v) for k, v in trainer.callback_metrics.items() if not k.startswith("time/")}
            self.rows.append(row)

    def fit(path: str | None = None, **limits: Any) -> tuple[Any, L.Trainer, ReplayDataModule, list]:
        algorithm, data, series = make(), ReplayDataModule(env, **options), Series()
        trainer = make_trainer(limit_val_batches=0, callbacks=[series], **limits)
        trainer.fit(algorithm, data, ckpt_path=path)
        return algorithm, trainer, data, series.rows

    unbroken, whole_trainer, _, whole = fit()
    _, trainer, _, first = fit(max_epochs=2)
    trainer.fit_loop.max_epochs = -1
    # Saved while the run's own folder of chunks is gone: the checkpoint stands alone.
    saver = ModelCheckpoint(tmp_path / "half", save_on_train_epoch_end=True, filename="half")
    algorithm, data = make(), ReplayDataModule(env, **options)
    make_trainer(limit_val_batches=0, max_epochs=2, callbacks=[saver], enable_checkpointing=True).fit(algorithm, data)
    path = tmp_path / "half" / "half.ckpt"
    assert list(Path(f"{path}.d").glob("rank_0/*.pt"))
    resumed, resumed_trainer, _, second = fit(str(path))
    assert first + second == whole
    assert resumed.updates_done == unbroken.updates_done == 90
    assert_same(resumed.state_dict(), unbroken.state_dict())
    assert_same(*(trainer.optimizers[0].state_dict()["state"] for trainer in (resumed_trainer, whole_trainer)))


def save(make_trainer: Any, **options: Any) -> tuple[L.Trainer, ReplayDataModule]:
    data = ReplayDataModule(CycleEnv, **SMALL | {"max_env_steps": 200} | options)
    trainer = make_trainer(limit_val_batches=0, max_epochs=1)
    trainer.strategy.checkpoint_io = LitCheckpointIO()  # keeps the file that is replaced, as for a ModelCheckpoint's
    files = []

    class Save(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
            trainer.save_checkpoint("run.ckpt")
            files.append({path.name for path in Path("run.ckpt.d/rank_0").glob("*")})

    trainer.callbacks.append(Save())
    trainer.fit(DQN(), data)
    trainer.saved_files = files
    return trainer, data


def listed_files(path: str) -> set[str]:
    listed = torch.load(path, weights_only=True)["lit_rl"]["ranks"][0]["data"]["replay"]
    assert "folder" not in listed
    return set(listed["files"])


def test_two_checkpoints_hold_their_own_buffers_and_nothing_of_an_earlier_one(make_trainer, tmp_path: Path) -> None:
    trainer, _ = save(make_trainer)
    kept = listed_files("run.ckpt"), listed_files("run.ckpt.previous")
    assert not kept[0] & kept[1]
    assert {path.name for path in Path("run.ckpt.d/rank_0").glob("*")} == kept[0] | kept[1]
    assert trainer.saved_files[0] != trainer.saved_files[-1]
    assert not list(tmp_path.glob(".replay-*"))  # the run's own folder is gone
    trainer.strategy.remove_checkpoint("run.ckpt")
    assert not list(Path().glob("run.ckpt*"))
    assert not list(Path().glob(".run*"))


def test_without_checkpoint_buffer_the_resumed_run_fills_an_empty_one(make_trainer) -> None:
    save(make_trainer, checkpoint_buffer=False)
    assert not Path("run.ckpt.d").exists()
    algorithm = Watched()
    data = ReplayDataModule(CycleEnv, **SMALL | {"max_env_steps": 300})
    make_trainer(limit_val_batches=0).fit(algorithm, data, ckpt_path="run.ckpt")
    assert len(data.buffer) == 100 and algorithm.env_steps_done == 300
    assert algorithm.seen[0][0] == 200 + SMALL["batch_size"]  # none before there is a batch


def test_a_missing_buffer_is_named_when_resuming(make_trainer) -> None:
    save(make_trainer)
    for path in Path("run.ckpt.d/rank_0").glob("*"):
        path.unlink()
    with pytest.raises(CheckpointError, match=r"replay buffer .*run.ckpt.d/rank_0/.* is missing or damaged"):
        make_trainer(limit_val_batches=0).fit(
            DQN(), ReplayDataModule(CycleEnv, **SMALL | {"max_env_steps": 300}), ckpt_path="run.ckpt"
        )
    assert load_policy("run.ckpt").act(np.zeros(5))[0] in (0, 1)  # acting needs no buffer
    data = ReplayDataModule(CycleEnv, checkpoint_buffer=False, **SMALL | {"max_env_steps": 300})
    make_trainer(limit_val_batches=0).fit(DQN(), data, ckpt_path="run.ckpt")
    assert len(data.buffer) == 100


def test_a_damaged_checkpoint_goes_on_from_the_previous_one_and_its_buffer(make_trainer) -> None:
    save(make_trainer)
    Path("run.ckpt").write_bytes(Path("run.ckpt").read_bytes()[:-1000])
    data = ReplayDataModule(CycleEnv, **SMALL | {"max_env_steps": 300})
    algorithm, trainer = DQN(), make_trainer(limit_val_batches=0)
    trainer.fit(algorithm, data, ckpt_path="run.ckpt")
    assert len(data.buffer) == 300 and algorithm.updates_done == 260
    trainer.save_checkpoint("run.ckpt")
    kept = listed_files("run.ckpt"), listed_files("run.ckpt.previous")  # the damaged one did not take its place
    assert {path.name for path in Path("run.ckpt.d/rank_0").glob("*")} == kept[0] | kept[1]
    again = ReplayDataModule(CycleEnv, **SMALL | {"max_env_steps": 200})
    trainer = make_trainer(limit_val_batches=0)
    trainer.fit(DQN(), again, ckpt_path="run.ckpt.previous")  # it can be asked for, too
    trainer.save_checkpoint("other.ckpt")
    assert len(again.buffer) in (150, 200)


def test_a_disk_that_is_full_keeps_the_previous_checkpoint(make_trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    save(make_trainer)
    before = Path("run.ckpt").read_bytes(), sorted(Path("run.ckpt.d/rank_0").iterdir())

    def full(*_: object) -> None:
        raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")

    monkeypatch.setattr("lit_rl.files.snapshots.torch.save", full)
    with pytest.raises(CheckpointError, match=r"Cannot write the replay buffer .* The previous checkpoint is kept"):
        save(make_trainer)
    assert before == (Path("run.ckpt").read_bytes(), sorted(Path("run.ckpt.d/rank_0").iterdir()))


def test_the_files_of_storage_dir_are_removed_with_the_datamodule(make_trainer, tmp_path: Path) -> None:
    data = run(make_trainer, DQN(), storage_dir=str(tmp_path / "rows"))
    assert list((tmp_path / "rows").iterdir())
    data.restart()
    gc.collect()
    assert not list((tmp_path / "rows").iterdir())


@pytest.mark.parametrize("storage_dir", [None, "rows"])
def test_a_checkpoint_after_training_holds_the_buffer_and_a_second_fit_goes_on_with_it(
    storage_dir: str | None, make_trainer
) -> None:
    data = ReplayDataModule(CycleEnv, max_env_steps=200, storage_dir=storage_dir, **SMALL)
    algorithm, trainer = Watched(), make_trainer(limit_val_batches=0)
    trainer.fit(algorithm, data)
    trainer.save_checkpoint("end.ckpt")
    other = ReplayDataModule(CycleEnv, max_env_steps=300, storage_dir=storage_dir, **SMALL)
    resumed = Watched()
    make_trainer(limit_val_batches=0).fit(resumed, other, ckpt_path="end.ckpt")
    assert len(other.buffer) == 300 and resumed.updates_done == 260
    data.max_env_steps = 250
    trainer.fit(algorithm, data)
    assert len(data.buffer) == 250 and algorithm.updates_done == 210


def test_a_resumed_run_with_nothing_to_do_keeps_the_buffer(make_trainer) -> None:
    save(make_trainer)
    trainer = make_trainer(limit_val_batches=0, min_epochs=2)
    trainer.fit(DQN(), ReplayDataModule(CycleEnv, **SMALL | {"max_env_steps": 200}), ckpt_path="run.ckpt")
    trainer.save_checkpoint("run.ckpt")
    again = ReplayDataModule(CycleEnv, **SMALL | {"max_env_steps": 250})
    make_trainer(limit_val_batches=0).fit(DQN(), again, ckpt_path="run.ckpt")
    assert len(again.buffer) == 250


@pytest.mark.parametrize(("ratio", "updates"), [(0.5, 10), (1.0, 20), (2.0, 40)])
def test_another_ratio_on_resume_counts_from_there(ratio: float, updates: int, make_trainer) -> None:
    save(make_trainer)
    algorithm = DQN()
    data = ReplayDataModule(CycleEnv, **SMALL | {"max_env_steps": 220, "update_to_data": ratio})
    make_trainer(limit_val_batches=0).fit(algorithm, data, ckpt_path="run.ckpt")
    assert algorithm.updates_done == 160 + updates


def test_another_exponent_on_resume_rescales_the_priorities(make_trainer) -> None:
    _, data = save(make_trainer, prioritized=True, priority_alpha=0.5)
    leaves = data.buffer._tree.leaves.copy()
    again = ReplayDataModule(CycleEnv, prioritized=True, priority_alpha=1.0, **SMALL | {"max_env_steps": 200})
    trainer = make_trainer(limit_val_batches=0)
    trainer.fit(DQN(), again, ckpt_path="run.ckpt")
    trainer.save_checkpoint("again.ckpt")  # loads what was not needed yet
    np.testing.assert_allclose(again.buffer._tree.leaves, leaves**2)


def test_a_checkpoint_of_weights_alone_holds_no_buffer(make_trainer) -> None:
    trainer, _ = save(make_trainer)
    trainer.save_checkpoint("weights.ckpt", weights_only=True)
    assert not Path("weights.ckpt.d").exists()


def test_max_steps_ends_in_the_middle_of_a_batch(make_trainer) -> None:
    algorithm, trainer = DQN(), make_trainer(limit_val_batches=0, max_steps=25)
    trainer.fit(algorithm, ReplayDataModule(CycleEnv, max_env_steps=200, **SMALL))
    assert trainer.global_step == algorithm.updates_done == 25


def test_loggers_get_every_batch_that_is_due(make_trainer, tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, name="log")
    data = ReplayDataModule(CycleEnv, **SMALL | {"max_env_steps": 300, "update_to_data": 0.3})
    make_trainer(limit_val_batches=0, logger=logger, log_every_n_steps=2).fit(DQN(), data)
    rows = list(csv.DictReader((Path(logger.log_dir) / "metrics.csv").open()))
    assert [float(row["env_steps"]) for row in rows] == [100.0, 200.0, 300.0]


def test_a_policy_that_diverged_is_blamed_and_not_the_environment(make_trainer) -> None:
    with pytest.raises(EnvError, match="The policy has diverged: lower lr"):
        run(make_trainer, SAC(lr=1e30), "Pendulum-v1", rollout_length=5)


def test_a_full_storage_dir_ends_training_with_a_sentence(make_trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(ReplayError, match="the disk is full after 0 of buffer_size=500 rows"):
        run(make_trainer, DQN(), storage_dir="rows")


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"buffer_size": 10}, "buffer_size=10: expected at least batch_size=16"),
        ({"learning_starts": 5}, "learning_starts=5: expected at least batch_size=16"),
        ({"num_envs_per_env_runner": 100, "rollout_length": 10}, "buffer_size=500: expected at least 2200 rows"),
        ({"storage_dir": 3}, "storage_dir=3: expected a folder's path"),
        ({"update_to_data": 0}, "update_to_data=0: expected a number, above 0"),
        ({"n_step": 0}, "n_step=0: expected a whole number of at least 1"),
        ({"n_step": [3, 1]}, "n_step=[3, 1]: expected a whole number, or [low, high]"),
        ({"prioritized": "yes"}, "prioritized='yes': expected True or False"),
        ({"priority_alpha": 2.0}, "priority_alpha=2.0"),
        ({"prefetch": 1}, "prefetch=1: collecting while the learner updates needs num_env_runners"),
    ],
)
def test_options_are_checked(options: dict, message: str) -> None:
    with pytest.raises(OptionError) as error:
        ReplayDataModule(CycleEnv, **SMALL | options)
    assert message in str(error.value)


@pytest.mark.parametrize("storage_dir", [None, "rows"])
def test_a_buffer_for_which_there_is_no_room_is_named(storage_dir: str | None, make_trainer) -> None:
    with pytest.raises(OptionError, match=r"buffer_size=10000000000000: no room for so many rows: .* Lower it"):
        run(make_trainer, DQN(), buffer_size=10**13, storage_dir=storage_dir)


def test_learning_that_would_never_start_is_refused(make_trainer) -> None:
    with pytest.raises(OptionError, match="learning_starts=200: expected less than max_env_steps=200"):
        run(make_trainer, DQN(), learning_starts=200)


def test_an_on_policy_algorithm_is_refused(make_trainer) -> None:
    with pytest.raises(OptionError, match=r"model=PPO: ReplayDataModule feeds off-policy .* Use RolloutDataModule"):
        make_trainer().fit(PPO(), ReplayDataModule(CycleEnv, **SMALL))


def test_a_batch_without_a_whole_sequence_is_refused(make_trainer) -> None:
    with pytest.raises(OptionError, match="batch_size=16: expected at least one sequence, sequence_length=20"):
        run(make_trainer, DQN(network=LSTMNetwork))


# --- Ray ------------------------------------------------------------------------------------------------------------


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize(("network", "prefetch"), [(None, 1), (LSTMNetwork, 0)])
def test_several_runners_fill_one_buffer(prefetch: int, network: Any, make_trainer) -> None:
    algorithm = Watched(network=network, sequence_length=4)
    data = run(
        make_trainer, algorithm, counter_vector, env_kwargs={"mode": "SameStep"}, vectorization="native",
        num_env_runners=2, num_envs_per_env_runner=3, rollout_length=4, prefetch=prefetch, max_env_steps=240,
    )  # fmt: skip
    assert algorithm.env_steps_done == 240 == len(data.buffer)
    assert 185 <= algorithm.updates_done <= 200
    batch = data.buffer.sample(300, num_steps=(3, 3))
    torch.testing.assert_close(batch["observation"] // 100, batch["next", "observation"] // 100)
    assert len(data.buffer._open) == 6  # every environment of both runners


def test_a_checkpoint_saved_after_training_leaves_no_other_folder_behind(make_trainer, tmp_path: Path) -> None:
    code = """
import lightning as L
from envs import CycleEnv
from test_replay_data import SMALL
from lit_rl import DQN, Evaluation, ReplayDataModule
data = ReplayDataModule(CycleEnv, max_env_steps=60, evaluation=Evaluation(episodes=1), **SMALL)
trainer = L.Trainer(accelerator="cpu", max_epochs=-1, logger=False, enable_progress_bar=False)
trainer.fit(DQN(), data)
trainer.save_checkpoint("after.ckpt")
"""
    run_python("-c", code, cwd=tmp_path)
    assert {path.name for path in tmp_path.iterdir()} - {"checkpoints"} == {"after.ckpt", "after.ckpt.d"}
