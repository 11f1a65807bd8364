"""Schedules by env steps."""

from pathlib import Path
from typing import Any

import pytest
import torch
from envs import CounterEnv

from lit_rl import DQN, PPO, ReplayDataModule, RolloutDataModule
from lit_rl.errors import OptionError
from lit_rl.options import check
from lit_rl.schedules import Schedule, Scheduled, UnitSchedule

POINTS = [[100, 1.0], [200, 0.5], [400, 0.7]]


@pytest.mark.parametrize(
    ("schedule", "env_steps", "value"),
    [
        ("constant", 0, 2.0),
        ("constant", 10**9, 2.0),
        ("linear", 0, 2.0),
        ("linear", 250, 1.5),  # 2 (1 - 250/1000)
        ("linear", 1000, 0.0),
        ("linear", 1500, 0.0),  # never negative
        ("cosine", 0, 2.0),
        ("cosine", 250, 1.7071067811865475),  # 2 (1 + cos(pi/4)) / 2
        ("cosine", 1000 / 3, 1.5),  # 2 (1 + cos(pi/3)) / 2
        ("cosine", 500, 1.0),
        ("cosine", 750, 0.2928932188134524),  # 2 (1 + cos(3 pi/4)) / 2
        ("cosine", 1000, 0.0),
        ("cosine", 1500, 0.0),  # does not rise again
        (POINTS, 0, 1.0),  # constant before the first point
        (POINTS, 100, 1.0),
        (POINTS, 150, 0.75),
        (POINTS, 200, 0.5),
        (POINTS, 300, 0.6),
        (POINTS, 400, 0.7),
        (POINTS, 10**9, 0.7),  # and after the last
        ([[50, 3.0]], 0, 3.0),
        ([[50, 3.0]], 99, 3.0),
    ],
)
def test_scheduled_equals_the_table_worked_by_hand(schedule: Any, env_steps: Any, value: float) -> None:
    scheduled = Scheduled("lr", 2.0, check("lr_schedule", schedule, Schedule))
    assert scheduled.at(env_steps, 1000) == pytest.approx(value, abs=1e-12)
    scheduled.follow(env_steps, 1000)
    assert float(scheduled.value) == pytest.approx(value)


def test_a_scheduled_value_begins_where_its_schedule_does_and_is_no_weight() -> None:
    assert float(Scheduled("clip", 0.2).value) == pytest.approx(0.2)
    assert float(Scheduled("clip", 0.2, "cosine").value) == pytest.approx(0.2)
    scheduled = Scheduled("clip", 0.2, POINTS)
    tensor = scheduled.value
    assert tensor.shape == () and tensor == 1.0 and scheduled.state_dict() == {}
    scheduled.follow(200, None)  # points need no budget
    assert scheduled.value is tensor and tensor == 0.5  # in place: a compiled step goes on reading it
    assert scheduled.double().value.dtype == torch.float64


@pytest.mark.parametrize("word", ["linear", "cosine"])
def test_a_word_that_ends_at_the_budget_says_what_to_set_without_one(word: str) -> None:
    with pytest.raises(OptionError) as error:
        Scheduled("clip", 1.0, word).at(0, None)
    assert str(error.value) == (
        f"clip_schedule={word!r}: expected a budget to end at: set max_env_steps, or max_updates of recorded data, on "
        "the datamodule."
    )


def test_tuples_are_points_as_lists_are_and_are_kept_as_plain_numbers() -> None:
    found = check("lr_schedule", ((0, 1), (10, 0.0)), Schedule)
    assert found == [[0.0, 1.0], [10.0, 0.0]] and type(found[0][1]) is float


@pytest.mark.parametrize("schedule", ["sine", "", None, 3, [], [[0]], [[0, 1.0, 2.0]], [0, 1.0]], ids=repr)
def test_what_is_no_schedule_is_refused_and_named(schedule: Any) -> None:
    with pytest.raises(OptionError) as error:
        check("lr_schedule", schedule, Schedule)
    assert str(error.value) == (
        f"lr_schedule={schedule!r}: expected 'constant', 'linear', 'cosine' or [[env_step, value], ...]."
    )


@pytest.mark.parametrize(
    ("schedule", "annotation", "words"),
    [
        ([[0, -1.0]], Schedule, "x=-1.0: expected a number, at least 0."),
        ([[-1, 1.0]], Schedule, "x=-1: expected a number, at least 0."),
        ([[0, "1"]], Schedule, "x='1': expected a number, at least 0."),
        ([[0, 2.0]], UnitSchedule, "x=2.0: expected a number, at least 0 and at most 1."),
        ([[10, 1.0], [0, 0.5]], Schedule, "x=[[10, 1.0], [0, 0.5]]: expected env steps in rising order."),
        ([[0, 1.0], [0, 0.5]], Schedule, "x=[[0, 1.0], [0, 0.5]]: expected env steps in rising order."),
    ],
)
def test_points_are_checked_one_by_one(schedule: Any, annotation: Any, words: str) -> None:
    with pytest.raises(OptionError) as error:
        check("x", schedule, annotation)
    assert str(error.value) == words


class Watched(PPO):
    """Notes the scheduled values of each update."""

    def update(self, rollout: Any) -> Any:
        lr = self.optimizers(use_pl_optimizer=False).param_groups[0]["lr"]
        self.seen = [*getattr(self, "seen", []), (lr, float(self.clip.value), float(self.entropy_coef.value))]
        return super().update(rollout)


def test_every_schedule_goes_on_where_it_was_when_a_run_is_resumed(make_trainer: Any) -> None:
    def fit(max_env_steps: int, ckpt_path: str | None = None) -> list:
        # The first run's budget is another one: the words follow the resumed run's.
        algorithm = Watched(
            minibatch_size=16, num_epochs=1, lr=1.0e-3, lr_schedule="linear", clip=0.4, clip_schedule="cosine",
            entropy_coef_schedule=[[0, 0.1], [64, 0.5]],
        )  # fmt: skip
        data = RolloutDataModule(
            CounterEnv, num_envs_per_env_runner=2, rollout_length=8, max_env_steps=max_env_steps, seed=0
        )
        trainer = make_trainer(limit_val_batches=0)
        trainer.fit(algorithm, data, ckpt_path=ckpt_path)
        trainer.save_checkpoint("end.ckpt")
        return algorithm.seen

    unbroken = fit(64)
    # Linear: 1, 3/4, 1/2, 1/4; cosine: 0.2 (1 + cos(0, pi/4, pi/2, 3 pi/4)); points: 0.1 + 0.4 k / 4.
    assert [x for row in unbroken for x in row] == pytest.approx(
        [1e-3, 0.4, 0.1, 7.5e-4, 0.34142136, 0.2, 5e-4, 0.2, 0.3, 2.5e-4, 0.05857864, 0.4]
    )
    fit(32)
    resumed = fit(64, "end.ckpt")
    assert resumed == unbroken[2:]


def test_epsilon_follows_its_schedule_and_none_is_the_papers(make_trainer: Any, tmp_path: Path) -> None:
    assert [DQN().epsilon_at(steps) for steps in (0, 5_000, 10_000)] == pytest.approx([1.0, 0.525, 0.05])
    assert DQN(noisy=True).epsilon_at(0) == 0.0
    assert [DQN(epsilon=0.3).epsilon_at(steps) for steps in (0, 10**6)] == [0.3, 0.3]
    points = DQN(epsilon_schedule=[[0, 0.5], [10, 0.1]], noisy=True)
    assert [points.epsilon_at(steps) for steps in (0, 5, 20)] == pytest.approx([0.5, 0.3, 0.1])
    assert points.hparams.epsilon is None and points.hparams.epsilon_schedule == [[0.0, 0.5], [10.0, 0.1]]

    algorithm = DQN(epsilon=0.8, epsilon_schedule="linear")
    data = ReplayDataModule(CounterEnv, max_env_steps=40, learning_starts=8, batch_size=8, env_steps_per_batch=20)
    trainer = make_trainer(limit_val_batches=0)
    trainer.fit(algorithm, data)
    assert [algorithm.epsilon_at(steps) for steps in (0, 10, 40)] == pytest.approx([0.8, 0.6, 0.0])
    assert trainer.callback_metrics["policy/epsilon"] == 0.0
    unbounded = ReplayDataModule(CounterEnv, learning_starts=8, batch_size=8)
    with pytest.raises(OptionError, match="epsilon_schedule='linear': expected a budget to end at"):
        make_trainer(max_epochs=1).fit(DQN(epsilon_schedule="linear"), unbounded)
