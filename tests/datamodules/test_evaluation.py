"""Evaluation: its metrics, its own environments and runners, and going on beside training."""

import csv
import logging
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from envs import CounterEnv, FailingEnv, IdentityEnv, Paid, halve
from helpers import make_runner, quiet_trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from lit_rl import DQN, PPO, Evaluation, FaultTolerance, ReplayDataModule, RolloutDataModule
from lit_rl.envs.make import EnvConfig
from lit_rl.errors import EnvError, OptionError
from lit_rl.evaluation.episodes import play
from lit_rl.evaluation.eval_pool import EvalPool
from lit_rl.evaluation.summary import EvaluationResult, bootstrap_interval, interquartile_mean, summarize
from lit_rl.policy import Policy
from lit_rl.runners.fragment import Episode
from lit_rl.runners.placement import Placement

SMALL = {"num_envs_per_env_runner": 4, "rollout_length": 32, "rollouts_per_epoch": 1, "seed": 0}
PARALLEL = Evaluation(episodes=5, num_env_runners=1, parallel=True)


def result_of(returns: list[float], cut: int = 0, lost: int = 0) -> EvaluationResult:
    return EvaluationResult([Episode(r, 10, {}, cut=i < cut) for i, r in enumerate(returns)], lost, at=0)


def test_the_metrics_of_an_evaluation_are_those_worked_by_hand() -> None:
    found = summarize([result_of([8.0, 1.0, 2.0]), result_of([7.0, 3.0, 100.0, 5.0, 6.0, 4.0])])  # two ranks
    # Of 9 values two are left out at either end: the mean of 3, 4, 5, 6 and 7.
    assert found["return_iqm"] == 5.0 and found["return_mean"] == pytest.approx(136 / 9)
    assert (found["return_min"], found["return_max"], found["length_mean"], found["episodes"]) == (1, 100, 10, 9)
    assert 1.0 <= found["return_iqm_low"] < 5.0 < found["return_iqm_high"] <= 100.0
    assert found["partial"] == 0


def test_the_interval_is_the_same_for_the_same_returns_in_any_order() -> None:
    returns = np.random.default_rng(1).normal(size=20).tolist()
    assert summarize([result_of(returns)]) == summarize([result_of(returns[::-1])])
    assert bootstrap_interval(np.array([3.0])) == (3.0, 3.0)


def test_the_interval_holds_the_true_value_about_95_times_in_100() -> None:
    rng = np.random.default_rng(0)
    intervals = [bootstrap_interval(rng.normal(size=30)) for _ in range(300)]
    covered = np.mean([low <= 0.0 <= high for low, high in intervals])
    assert 0.89 < covered < 0.985
    assert np.mean([high - low for low, high in intervals]) < 1.0  # that of a single value would be 3.9
    assert interquartile_mean(np.zeros((3, 1))).shape == (3,)


@pytest.mark.parametrize(("cut", "lost", "partial"), [(0, 0, 0), (1, 0, 1), (0, 2, 1)])
def test_a_partial_evaluation_is_flagged(cut: int, lost: int, partial: int) -> None:
    assert summarize([result_of([1.0, 2.0], cut, lost)])["partial"] == partial


def test_without_an_episode_there_is_no_return_and_no_nan() -> None:
    assert summarize([result_of([], lost=3)]) == {"episodes": 0, "cut_episodes": 0, "partial": 1}


def test_evaluation_has_environment_arguments_of_its_own(make_trainer: Callable) -> None:
    data = RolloutDataModule(
        CounterEnv,
        env_kwargs={"offset": 0},
        max_env_steps=128,
        evaluation=Evaluation(episodes=1, env_kwargs={"offset": 1}),
        **SMALL,
    )
    trainer = make_trainer(max_epochs=1)
    trainer.fit(PPO(minibatch_size=64), data)
    assert trainer.callback_metrics["eval/length_mean"] == 3  # the first episode with offset 0 has 2 steps
    assert data._episodes[0].length == 2
    merged = RolloutDataModule(
        FailingEnv, env_kwargs={"how": "raise", "at": 3}, evaluation=Evaluation(env_kwargs={"at": 99})
    )
    assert merged.eval_env.env_kwargs == {"how": "raise", "at": 99} and merged.env.env_kwargs["at"] == 3


def test_an_evaluation_environment_with_other_spaces_is_refused_before_training(make_trainer: Callable) -> None:
    data = RolloutDataModule(IdentityEnv, evaluation=Evaluation(env_kwargs={"n": 5}), max_env_steps=128, **SMALL)
    with pytest.raises(OptionError) as error:
        make_trainer().fit(PPO(minibatch_size=64), data)
    assert str(error.value) == (
        "evaluation.env_kwargs={'n': 5}: the environment IdentityEnv has observation Discrete(5), action Discrete(5): "
        "expected those of training, Discrete(4) and Discrete(4)."
    )
    data = RolloutDataModule(CounterEnv, evaluation=Evaluation(env="CartPole-v1"), max_env_steps=128, **SMALL)
    with pytest.raises(OptionError, match=r"evaluation.env='CartPole-v1': the environment CartPole-v1 has observation"):
        make_trainer().fit(PPO(minibatch_size=64), data)


@pytest.mark.parametrize("where", [0, pytest.param(1, marks=[pytest.mark.slow, pytest.mark.ray])])
def test_evaluation_can_play_another_environment_with_the_wrappers_of_training(
    where: int, make_trainer: Callable
) -> None:
    data = RolloutDataModule(
        CounterEnv,
        env_kwargs={"offset": 1},
        wrappers=[{"gymnasium.wrappers:TransformReward": {"func": halve}}],
        evaluation=Evaluation(episodes=2, env="envs:Paid", num_env_runners=where),
        max_env_steps=128,
        **SMALL,
    )
    trainer = make_trainer()
    trainer.fit(PPO(minibatch_size=64), data)
    # Paid was not given training's offset, which it has too: it ends after one step of 100, halved by the wrapper.
    assert trainer.callback_metrics["eval/return_mean"] == 50.0
    assert trainer.callback_metrics["eval/length_mean"] == 1.0
    assert data._episodes[0].length == 3 and data._episodes[0].return_ == 0.5 * (1 + 2 + 3)
    own = Evaluation(env=Paid, env_kwargs={"steps": 2}).environment(data.env)
    assert (own.env, own.env_kwargs, own.wrappers) == (Paid, {"steps": 2}, data.env.wrappers)


def test_the_evaluation_of_a_datamodule_can_be_replaced() -> None:
    data = RolloutDataModule(CounterEnv)
    assert data.eval_env == data.env
    data.evaluation = Evaluation(env_kwargs={"offset": 2})
    assert data.eval_env.env_kwargs == {"offset": 2} and data.env.env_kwargs == {}


@pytest.mark.parametrize(("how", "step"), [("nan reward", 0), ("nan observation", 1)])
def test_a_number_that_is_not_finite_in_evaluation_names_episode_step_and_value(how: str, step: int) -> None:
    env = EnvConfig(FailingEnv, {"how": how, "at": 1})
    what = how.removeprefix("nan ")
    with pytest.raises(
        EnvError, match=rf"env=FailingEnv: {what}=\[?nan\]? at step {step} of the evaluation episode .*seed 7"
    ):
        list(play(env, Policy(EnvConfig(CounterEnv).spec()), [7]))


@pytest.mark.parametrize(
    ("options", "expected"),
    [({"reward_scale": 2.0}, [2, 4, 2, 4, 6]), ({"reward_clip": 1.5}, [1, 1.5, 1, 1.5, 1.5]),
     ({"reward_scale": 0.5, "reward_clip": 1.2}, [0.5, 1, 0.5, 1, 1.2])],
)  # fmt: skip
def test_the_learner_sees_scaled_and_clipped_rewards_and_returns_stay_true(options: dict, expected: list) -> None:
    fragment = make_runner(EnvConfig(CounterEnv), num_envs=1, length=5, **options).sample()
    assert fragment.rows.views()["reward"][0].tolist() == pytest.approx(expected)
    assert [episode.return_ for episode in fragment.episodes] == [3.0, 6.0]


@pytest.mark.parametrize("kind", [RolloutDataModule, ReplayDataModule])
def test_reward_options_reach_the_runners_of_both_datamodules(kind: type, make_trainer: Callable) -> None:
    rewards = []

    class Watch(PPO):
        def update(self, rollout: Any) -> dict:
            rewards.append(rollout["next", "reward"].max().item())
            return super().update(rollout)

    options = {
        "max_env_steps": 128,
        "reward_scale": 0.25,
        "reward_clip": 0.6,
        "evaluation": Evaluation(episodes=3),
        "seed": 0,
    }
    if kind is RolloutDataModule:
        algorithm: Any = Watch(minibatch_size=64)
        data: Any = RolloutDataModule(CounterEnv, **SMALL | options)
    else:
        algorithm = DQN()
        data = ReplayDataModule(CounterEnv, learning_starts=64, batch_size=16, update_to_data=0.1, **options)
    trainer = make_trainer()
    trainer.fit(algorithm, data)
    if kind is ReplayDataModule:
        rewards.append(data.buffer.sample(200)["next", "reward"].max().item())
    assert max(rewards) == pytest.approx(0.6)  # the last rewards of an episode are 0.5, 0.75 and 1
    assert trainer.callback_metrics["eval/return_max"] == 3  # 1 + 2: evaluation plays each copy's first episode


def evaluations(folder: Path) -> dict[int, float]:
    """What was logged of evaluations, by env steps."""
    with next(folder.rglob("metrics.csv")).open() as file:
        rows = [row for row in csv.DictReader(file) if row.get("eval/return_mean")]
    return {int(float(row["env_steps"])): float(row["eval/return_mean"]) for row in rows}


def fit(
    make_trainer: Callable, name: str, *callbacks: Any, ckpt_path: str | None = None, **options: Any
) -> tuple[Any, PPO]:
    data = RolloutDataModule(
        "CartPole-v1", **SMALL | {"max_env_steps": 512, "evaluation": Evaluation(episodes=5)} | options
    )
    trainer = make_trainer(
        logger=CSVLogger(".", name=name), callbacks=list(callbacks), enable_checkpointing=bool(callbacks)
    )
    algorithm = PPO(minibatch_size=32, lr=5e-3)
    trainer.fit(algorithm, data, ckpt_path=ckpt_path)
    return trainer, algorithm


class TestWithRay:
    pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("ray_session")]

    def test_evaluations_beside_training_are_those_of_a_run_that_waits(self, make_trainer: Callable) -> None:
        waits, _ = fit(make_trainer, "waits")
        seen: list[float] = []

        class Best(ModelCheckpoint):
            def on_validation_end(self, trainer: Any, module: Any) -> None:
                super().on_validation_end(trainer, module)
                seen.append(trainer.callback_metrics["eval/return_mean"].item())

        best = Best(monitor="eval/return_mean", mode="max", dirpath="best", save_on_train_epoch_end=False)
        beside, _ = fit(
            make_trainer, "beside", best, evaluation=Evaluation(episodes=5, num_env_runners=2, parallel=True)
        )
        expected, found = evaluations(Path("waits")), evaluations(Path("beside"))
        assert list(expected) == [128, 256, 384, 512] and list(found) == [0, 128, 256, 384, 512]
        assert {k: v for k, v in found.items() if k} == pytest.approx(expected)
        # Each validation sees the evaluation before it; the last one has waited for its own.
        assert seen == pytest.approx([found[0], found[128], found[256], found[512]])
        assert best.best_model_score == max(seen)
        for name in ("eval/return_mean", "eval/return_iqm", "eval/return_iqm_low"):
            assert beside.callback_metrics[name] == pytest.approx(waits.callback_metrics[name].item())

    def test_a_resumed_run_evaluates_what_it_begins_with(self, make_trainer: Callable) -> None:
        fit(make_trainer, "waits")
        trainer, _ = fit(make_trainer, "begun", max_env_steps=256, evaluation=PARALLEL)
        trainer.save_checkpoint("begun.ckpt")
        fit(make_trainer, "resumed", ckpt_path="begun.ckpt", evaluation=PARALLEL)
        expected, found = evaluations(Path("waits")), evaluations(Path("resumed"))
        assert found == pytest.approx({steps: expected[steps] for steps in (256, 384, 512)})

    def test_the_last_evaluation_is_logged_whatever_ends_the_run(self, make_trainer: Callable) -> None:
        stop = EarlyStopping(monitor="eval/return_mean", mode="max", stopping_threshold=1.0)
        trainer, algorithm = fit(make_trainer, "stopped", stop, evaluation=PARALLEL)
        assert algorithm.env_steps_done == 128
        found = evaluations(Path("stopped"))
        assert list(found) == [0, 128]
        assert trainer.callback_metrics["eval/return_mean"] == pytest.approx(found[128])

    def test_eval_runners_give_what_evaluation_in_process_gives(self, make_trainer: Callable) -> None:
        algorithm = PPO(spec=EnvConfig("CartPole-v1").spec().to_dict())
        results = []
        for runners in (0, 3):
            data = RolloutDataModule("CartPole-v1", evaluation=Evaluation(episodes=7, num_env_runners=runners), seed=3)
            results += make_trainer().validate(algorithm, data, verbose=False)
            episodes = make_trainer().predict(algorithm, data)
            assert sorted(len(e["steps"]["reward"]) for e in episodes) == sorted(e["length"] for e in episodes)
        assert results[0] == results[1]

    def test_a_dead_eval_runner_is_replaced_and_its_episodes_played_again(self, caplog: Any) -> None:
        env = EnvConfig("envs:SlowElsewhere", {"home": os.getpid(), "step_s": 0.2})
        spec = env.spec()
        pool = EvalPool(env, lambda: Policy(spec), 2, FaultTolerance(), Placement())
        pids = pool.pids()
        pool.start(Policy(spec), range(4), 60.0)
        os.kill(pids[0], signal.SIGKILL)
        with caplog.at_level(logging.WARNING):
            episodes = pool.finish()
        pool.close()
        assert sorted(episode.seed for episode in episodes) == [0, 1, 2, 3]
        assert "Eval runner 0 died" in caplog.text and "Its 2 episodes are played again." in caplog.text

    def test_what_cannot_be_played_is_missing_and_flagged(self, make_trainer: Callable, caplog: Any) -> None:
        data = RolloutDataModule(
            "envs:SlowElsewhere", env_kwargs={"home": os.getpid(), "step_s": 60.0}, seed=0,
            evaluation=Evaluation(episodes=2, timeout_s=5.0, num_env_runners=1),
            fault_tolerance=FaultTolerance(step_timeout_s=1.0),
        )  # fmt: skip
        algorithm = PPO(spec=EnvConfig(CounterEnv).spec().to_dict())
        with caplog.at_level(logging.WARNING):
            (found,) = make_trainer().validate(algorithm, data, verbose=False)
        assert found == {"eval/episodes": 0, "eval/cut_episodes": 0, "eval/partial": 1}
        assert "Eval runner 0 is stuck and was ended. Its 2 episodes are missing." in caplog.text


def test_recorded_episodes_do_not_count_for_the_next_validation() -> None:
    data = RolloutDataModule(CounterEnv, seed=0, evaluation=Evaluation(episodes=3))
    algorithm = PPO(minibatch_size=64)
    quiet_trainer().predict(algorithm, data)
    (metrics,) = quiet_trainer().validate(algorithm, data, verbose=False)
    assert metrics["eval/episodes"] == 3
