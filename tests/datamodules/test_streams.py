"""Rollouts of older policies: a fixed lag, free-running runners, reuse and replay."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import fake_ray
import lightning as L
import numpy as np
import pytest
import ray
import torch
from envs import CounterEnv, DawdlingEnv
from helpers import assert_same, make_runner
from tensordict import TensorDict

from lit_rl import APPO, IMPALA, PPO, ReplayDataModule, RolloutDataModule
from lit_rl.envs.make import EnvConfig
from lit_rl.errors import OptionError
from lit_rl.normalizer import ObservationNormalizer
from lit_rl.rollout import Rollout, new_rows
from lit_rl.runners.reuse import CircularBuffer, FragmentReplay

SMALL: dict[str, Any] = {"num_envs_per_env_runner": 2, "rollout_length": 8, "seed": 0}
ROWS = 16  # of a fragment


class Watched(IMPALA):
    """Notes how old what it learned from was, and which of it was new."""

    during_update: Callable[[], None] | None = None

    def update(self, rollout: TensorDict) -> dict:
        if not hasattr(self, "lags"):
            self.lags, self.versions, self.new, self.batches = [], [], [], []
        self.versions.append(rollout["policy_version"].unique().tolist())
        self.lags.append((self.updates_done - rollout["policy_version"]).unique().tolist())
        new = new_rows(rollout)
        self.new.append(rollout["is_init"].numel() if new is None else int(new.sum()))
        self.batches.append(rollout["observation"].clone())
        if self.during_update is not None:
            self.during_update()
        return super().update(rollout)


class Keep(L.Callback):
    """The last values of all metrics, and all of some."""

    def __init__(self) -> None:
        self.values: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
        self.values.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def train(make_trainer: Any, data: RolloutDataModule, **options: Any) -> Watched:
    algorithm = Watched(lr=1e-2, **options)
    make_trainer(limit_val_batches=0).fit(algorithm, data)
    return algorithm


# --- a fixed lag ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lag", [0, 1, 3])
def test_a_rollout_has_the_weights_of_so_many_rollouts_before(
    make_trainer: Any, monkeypatch: pytest.MonkeyPatch, lag: int
) -> None:
    fake_ray.use(monkeypatch, 1.0, 3.0)
    data = RolloutDataModule("CartPole-v1", num_env_runners=2, fixed_lag=lag, max_env_steps=2 * ROWS * 7, **SMALL)
    algorithm = train(make_trainer, data)
    assert algorithm.lags == [[min(k, lag)] for k in range(7)]
    assert data.ledger.executed == data.ledger.delivered == 2 * ROWS * 7  # nothing beyond the budget


def test_a_fixed_lag_is_no_promise_any_more_once_a_runner_was_replaced(
    make_trainer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = fake_ray.use(monkeypatch, 1.0)
    data = RolloutDataModule("CartPole-v1", num_env_runners=2, fixed_lag=2, max_env_steps=2 * ROWS * 10, **SMALL)
    with pytest.warns(UserWarning, match="fixed_lag=2: an env runner or an environment was replaced. From here on"):
        make_trainer(limit_val_batches=0, callbacks=[Kill(data, ray, at=(3,))]).fit(IMPALA(), data)
    assert data.ledger.executed == data.ledger.delivered + data.ledger.discarded.total()


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_with_a_fixed_lag_the_runners_speed_changes_nothing(make_trainer: Any, tmp_path: Path) -> None:
    weights = []
    for lock, seconds in ((None, 0.0), (str(tmp_path / "slow"), 0.01)):
        data = RolloutDataModule(
            DawdlingEnv, env_kwargs={"lock": lock, "seconds": seconds}, num_env_runners=2, fixed_lag=2,
            max_env_steps=2 * ROWS * 6, **SMALL,
        )  # fmt: skip
        weights.append(train(make_trainer, data).state_dict())
    assert (tmp_path / "slow").exists()
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name]), name


# --- free-running runners ---------------------------------------------------------------------------------------------


class Kill(L.Callback):
    """Kills the first runner after some updates."""

    def __init__(self, data: RolloutDataModule, ray: Any, at: Sequence[int]):
        self._data, self._ray, self._at = data, ray, at

    def on_train_batch_end(self, trainer: L.Trainer, algorithm: Any, *_: object) -> None:
        if algorithm.updates_done in self._at:
            self._ray.kill(self._data._runners._slots[0].actor)


def free_running(
    make_trainer: Any, algorithm: Watched, callbacks: Sequence[L.Callback] = (), **options: Any
) -> tuple[RolloutDataModule, Keep]:
    options = {"num_env_runners": 2, "prefetch": 2, "max_env_steps": ROWS * 40} | options
    data, keep = RolloutDataModule(options.pop("env", "CartPole-v1"), **options, **SMALL), Keep()
    make_trainer(limit_val_batches=0, callbacks=[keep, *callbacks]).fit(algorithm, data)
    return data, keep


@pytest.mark.parametrize("learner", [0.1, 10.0])
def test_rows_of_equally_fast_runners_are_as_old_as_is_said(
    make_trainer: Any, monkeypatch: pytest.MonkeyPatch, learner: float
) -> None:
    """With a learner that is slower than they are, or faster."""
    ray, algorithm = fake_ray.use(monkeypatch, 1.0, 1.001), Watched()
    algorithm.during_update = lambda: setattr(ray, "now", ray.now + learner)
    data, keep = free_running(make_trainer, algorithm, fragments_per_batch=1, max_policy_lag=4)
    assert data.policy_lag == 4  # 2 that wait, 2 that are under way, 1 in a batch
    assert algorithm.updates_done == 40 == len(keep.values)
    assert max(max(lags) for lags in algorithm.lags) == 4
    assert algorithm.env_steps_done == data.ledger.executed == ROWS * 40  # none beyond the budget
    last = keep.values[-1]
    assert last["rollout/dropped_steps"] == 0 == data.ledger.dropped
    assert max(value["rollout/policy_lag_max"] for value in keep.values) == 4
    assert max(value["rollout/queue_length"] for value in keep.values) == (4 if learner > 1 else 1)
    assert last["rollout/least_share"] == last["rollout/greatest_share"] == 0.5


def test_without_a_budget_the_trainers_limits_end_the_run(make_trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_ray.use(monkeypatch, 1.0)
    data = RolloutDataModule("CartPole-v1", num_env_runners=2, prefetch=2, **SMALL)
    algorithm = Watched()
    make_trainer(limit_val_batches=0, max_steps=5).fit(algorithm, data)
    assert algorithm.updates_done == 5 and algorithm.env_steps_done == 5 * 2 * ROWS


def test_fragments_of_a_slow_runner_are_left_out_and_counted(
    make_trainer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    algorithm, said = Watched(), []
    fake_ray.use(monkeypatch, 1.0, 10.0)
    monkeypatch.setattr("lit_rl.datamodules.rollout.rank_zero_info", said.append)
    data, keep = free_running(
        make_trainer, algorithm, fragments_per_batch=1, max_policy_lag=4, max_env_steps=ROWS * 100 + 5
    )
    dropped, last = data.ledger.dropped, keep.values[-1]
    assert dropped == 10 * ROWS == last["rollout/dropped_steps"] and max(max(lags) for lags in algorithm.lags) <= 4
    assert sum(algorithm.new) + dropped == algorithm.env_steps_done == data.ledger.delivered == ROWS * 100
    assert last["rollout/least_share"] == 0 and last["rollout/greatest_share"] == 1
    assert data.ledger.executed == data.ledger.delivered + data.ledger.discarded["unread"]
    assert len(said) == 1
    assert re.match(r"The learner was idle for \d+% of the time, the env runners for \d+%: ", said[0])


def test_weights_are_sent_every_so_many_updates(make_trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_ray.use(monkeypatch, 1.0, 1.5)
    algorithm = Watched()
    free_running(make_trainer, algorithm, broadcast_interval=5)
    assert {version for versions in algorithm.versions for version in versions} == {0, 5, 10, 15}


def test_a_replaced_runner_begins_with_the_newest_weights(make_trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ray, algorithm = fake_ray.use(monkeypatch, 1.0), Watched()
    monkeypatch.setattr("lit_rl.runners.faults.BACKOFF_S", 0.0)
    free_running(make_trainer, algorithm, broadcast_interval=50)
    assert {version for versions in algorithm.versions for version in versions} == {0}
    data = RolloutDataModule(
        "CartPole-v1", num_env_runners=2, prefetch=2, broadcast_interval=50, max_env_steps=ROWS * 60, **SMALL
    )
    algorithm = Watched()
    make_trainer(limit_val_batches=0, callbacks=[Kill(data, ray, at=(7,))]).fit(algorithm, data)
    assert any(7 <= version <= 12 for versions in algorithm.versions for version in versions)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_killed_runners_leave_no_gap_and_no_duplicate(make_trainer: Any, tmp_path: Path) -> None:
    """Of two runners one is slow, and the other is killed twice."""
    data = RolloutDataModule(
        DawdlingEnv, env_kwargs={"lock": str(tmp_path / "slow"), "seconds": 0.01}, num_env_runners=2, prefetch=2,
        fragments_per_batch=1, max_policy_lag=4, max_env_steps=ROWS * 400, **SMALL,
    )  # fmt: skip
    algorithm, keep = Watched(), Keep()
    make_trainer(limit_val_batches=0, callbacks=[keep, Kill(data, ray, at=(5, 100))]).fit(algorithm, data)
    assert 1 <= data.ledger.restarts <= 2
    assert sum(algorithm.new) + data.ledger.dropped == algorithm.env_steps_done == data.ledger.delivered == ROWS * 400
    assert max(max(lags) for lags in algorithm.lags) <= 4
    firsts = torch.cat(algorithm.batches)[:, 0]
    assert len(firsts.unique(dim=0)) == len(firsts)  # no fragment came twice
    assert 0 < keep.values[-1]["rollout/runner_idle"] < 1


# --- rollouts again ---------------------------------------------------------------------------------------------------


def batch(number: int) -> Rollout:
    columns = {"is_init": torch.zeros(2, 3, dtype=torch.bool), "observation": torch.full((2, 3, 1), float(number))}
    found = Rollout(columns, [2])
    found.env_steps = 6
    return found


@pytest.mark.parametrize(
    ("num_batches", "num_uses", "expected"),
    [
        (1, 1, [0, 1, 2, 3, 4, 5]),
        (4, 1, [0, 1, 2, 3, 4, 5]),
        (1, 3, [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4, 5, 5, 5]),
        (2, 2, [0, 1, 0, 2, 1, 3, 2, 4, 3, 5, 4, 5]),
        (3, 3, [0, 1, 0, 2, 1, 0, 3, 2, 1, 4, 3, 2, 5, 4, 3, 5, 4, 5]),
        (2, 3, [0, 0, 1, 1, 0, 2, 2, 1, 3, 3, 2, 4, 4, 3, 5, 5, 4, 5]),
        (4, 2, [0, 1, 2, 3, 0, 4, 1, 5, 2, 3, 4, 5]),
        (9, 2, [0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5]),
    ],
)
def test_every_batch_is_repeated_behind_newer_ones(num_batches: int, num_uses: int, expected: list[int]) -> None:
    """Of six batches; the repeats that are left come after the last one."""
    buffer, given = CircularBuffer(num_batches, num_uses), []
    for number in range(6):
        found = batch(number)
        buffer.add(found)
        assert new_rows(found) is None and found.env_steps == 6
        given.append(number)
        if number == 5:
            buffer.finish()
        while buffer.is_due:
            found = buffer.repeat()
            assert found.env_steps == 0 and not new_rows(found).any()
            given.append(int(found["observation"][0, 0]))
    assert given == expected
    assert [given.count(number) for number in range(6)] == [num_uses] * 6


def test_repeats_that_are_too_old_are_left_out() -> None:
    buffer = CircularBuffer(2, 4)
    buffer.add(batch(0), oldest=3)
    buffer.drop_older(3)
    assert buffer.is_due
    buffer.drop_older(4)
    assert not buffer.is_due
    buffer.add(batch(1), oldest=4)  # the first would come again after it
    given = []
    while buffer.is_due:
        given.append(int(buffer.repeat()["observation"][0, 0]))
    assert given == [1, 1]


@pytest.mark.parametrize(
    ("fraction", "drawn"), [(0.5, [2, 2, 2]), (1 / 3, [1, 1, 1]), (0.2, [0, 1, 0]), (0.0, [0] * 3)]
)
def test_past_fragments_join_new_ones_by_their_share(fraction: float, drawn: list[int]) -> None:
    runner = make_runner(EnvConfig(CounterEnv))
    replay = FragmentReplay(fraction, 3, np.random.SeedSequence(0))
    assert replay.draw(2) == []
    replay = FragmentReplay(fraction, 3, np.random.SeedSequence(0))
    fragments = [runner.sample()._replace(policy_version=version) for version in range(5)]
    replay.add(fragments)
    found = [replay.draw(2, oldest=3) for _ in range(3)]
    assert [len(each) for each in found] == drawn
    for fragment in (each for drawn_at_once in found for each in drawn_at_once):
        assert fragment.policy_version in (3, 4) and not fragment.episodes
        expected = fragments[fragment.policy_version].rows
        assert np.array_equal(fragment.rows.buffer, expected.buffer) and fragment.rows.buffer is not expected.buffer


def test_repeats_are_learned_from_and_counted_once(make_trainer: Any) -> None:
    data = RolloutDataModule("CartPole-v1", max_env_steps=ROWS * 6, num_reuses=3, rollouts_per_epoch=2, **SMALL)
    keep, algorithm = Keep(), Watched(normalize_observations=True)
    make_trainer(limit_val_batches=0, callbacks=[keep]).fit(algorithm, data)
    assert algorithm.new == [ROWS, 0, 0] * 6 and algorithm.updates_done == 18
    assert algorithm.lags == [[0], [1], [2]] * 6
    assert algorithm.env_steps_done == ROWS * 6 == data.ledger.delivered
    normalizer = ObservationNormalizer(algorithm.policy.input_space)
    for seen in algorithm.batches[::3]:
        normalizer.update(seen)
    assert_same(dict(algorithm.policy.normalizer.state_dict()), dict(normalizer.state_dict()))


def test_repeats_come_behind_newer_rollouts(make_trainer: Any) -> None:
    data = RolloutDataModule(
        "CartPole-v1", max_env_steps=ROWS * 4, num_reuses=2, circular_buffer_batches=2, rollouts_per_epoch=2, **SMALL
    )
    algorithm = train(make_trainer, data)
    assert algorithm.new == [ROWS, ROWS, 0, ROWS, 0, ROWS, 0, 0]
    assert algorithm.lags == [[0], [0], [2], [0], [3], [0], [3], [2]]
    assert algorithm.env_steps_done == ROWS * 4


def test_no_repeat_is_older_than_is_allowed(make_trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also at the end, where the budget has no room for a new rollout instead."""
    fake_ray.use(monkeypatch, 1.0, 1.001)
    algorithm = Watched()
    free_running(
        make_trainer, algorithm, fragments_per_batch=2, num_reuses=2, circular_buffer_batches=4, max_policy_lag=6
    )
    assert max(max(lags) for lags in algorithm.lags) <= 6
    assert sum(algorithm.new) == algorithm.env_steps_done == ROWS * 40
    assert 20 < len(algorithm.new) < 40  # some repeats, not all


def test_replayed_fragments_are_learned_from_beside_new_ones(make_trainer: Any) -> None:
    data = RolloutDataModule("CartPole-v1", max_env_steps=ROWS * 6, replay_fraction=0.5, **SMALL)
    algorithm = train(make_trainer, data)
    assert algorithm.new == [ROWS] * 6 and algorithm.env_steps_done == ROWS * 6
    assert [len(each) for each in algorithm.batches] == [2] + [4] * 5
    again = [any(torch.equal(each[2], old[b]) for old in algorithm.batches[:k] for b in (0, 1)) for k, each in
             enumerate(algorithm.batches) if k]  # fmt: skip
    assert all(again)


@pytest.mark.parametrize("options", [{"num_reuses": 2}, {"replay_fraction": 0.5}])
def test_a_resumed_run_says_that_it_begins_without_past_rollouts(
    make_trainer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    said: list[str] = []
    monkeypatch.setattr("lit_rl.datamodules.rollout.rank_zero_info", said.append)
    trainer = make_trainer(limit_val_batches=0)
    trainer.fit(APPO(), RolloutDataModule("CartPole-v1", max_env_steps=ROWS * 2, **options, **SMALL))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    assert not said
    data, algorithm = RolloutDataModule("CartPole-v1", max_env_steps=ROWS * 4, **options, **SMALL), APPO()
    make_trainer(limit_val_batches=0).fit(algorithm, data, ckpt_path=tmp_path / "a.ckpt")
    assert "past rollouts are in no checkpoint" in said[0] and algorithm.env_steps_done == ROWS * 4


def test_rows_that_are_many_gradient_steps_old_are_warned_of_once_a_fit(make_trainer: Any) -> None:
    data = RolloutDataModule("CartPole-v1", max_env_steps=ROWS * 2, num_reuses=40, **SMALL)
    for _ in range(2):
        with pytest.warns(UserWarning, match="Rows are 30 gradient steps old when they are learned from") as caught:
            train(make_trainer, data)
        assert len([each for each in caught if "gradient steps old" in str(each.message)]) == 1


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"prefetch": 2}, "prefetch=2: collecting while the learner updates needs num_env_runners of at least 1"),
        ({"fixed_lag": 2}, "fixed_lag=2: collecting ahead of the learner needs num_env_runners of at least 1, got 0"),
        ({"fixed_lag": 2, "num_env_runners": 1, "prefetch": 3}, "fixed_lag=2: expected neither prefetch nor"),
        ({"fixed_lag": 2, "num_env_runners": 1, "max_policy_lag": 9}, "max_policy_lag beside it, got max_policy_lag=9"),
        ({"max_policy_lag": 3}, "max_policy_lag=3: it is for free-running runners, prefetch of at least 2, got 0"),
        ({"fragments_per_batch": 3}, "fragments_per_batch=3: it is for free-running runners"),
        ({"broadcast_interval": 3}, "broadcast_interval=3: it is for free-running runners"),
        (
            {"prefetch": 3, "num_env_runners": 2, "fragments_per_batch": 2, "max_policy_lag": 3, "num_reuses": 2},
            "max_policy_lag=3: expected at least 6, by which fragments are behind if all runners are equally fast",
        ),
        ({"replay_fraction": 1}, "replay_fraction=1: expected a number, at least 0 and below 1"),
        ({"replay_fraction": 0.5, "num_reuses": 2}, "replay_fraction=0.5: expected num_reuses=1 beside it, got 2"),
        ({"circular_buffer_batches": 2}, "circular_buffer_batches=2: nothing is taken from the buffer"),
        ({"num_reuses": 0}, "num_reuses=0: expected a whole number of at least 1"),
        ({"stream_timeout_s": 0}, "stream_timeout_s=0: expected a number, above 0"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError) as caught:
        RolloutDataModule("CartPole-v1", **options)
    assert words in str(caught.value)


def test_what_needs_another_algorithm_or_datamodule_is_refused(make_trainer: Any) -> None:
    with pytest.raises(OptionError, match="num_reuses=2: PPO does not learn from rollouts again"):
        make_trainer().fit(PPO(), RolloutDataModule("CartPole-v1", num_reuses=2, max_env_steps=4096))
    with pytest.raises(OptionError, match="vtrace=False: IMPALA then learns as if its own policy had acted, but rows"):
        make_trainer().fit(
            IMPALA(vtrace=False), RolloutDataModule("CartPole-v1", num_reuses=2, max_env_steps=ROWS, **SMALL)
        )
    with pytest.raises(OptionError, match="but rows are 1 updates old"):
        make_trainer().fit(
            IMPALA(vtrace=False), RolloutDataModule("CartPole-v1", replay_fraction=0.5, max_env_steps=ROWS, **SMALL)
        )
    with pytest.raises(OptionError, match="prefetch=2: expected 0"):
        ReplayDataModule("CartPole-v1", prefetch=2, num_env_runners=1)
