"""The path env -> runner -> rollout -> LightningModule -> weights -> runner, under Trainer."""

import csv
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from envs import CounterEnv, FailingEnv, counter_vector
from gymnasium import spaces
from helpers import ROOT
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from tensordict import TensorDict

from lit_rl import PPO, EnvStepsProgressBar, Evaluation, FaultTolerance, RolloutDataModule, load_policy
from lit_rl.envs.make import EnvConfig
from lit_rl.errors import EnvError, OptionError
from lit_rl.evaluation.episodes import play
from lit_rl.source import Source
from lit_rl.spec import EnvSpec

SMALL = {"num_envs_per_env_runner": 4, "rollout_length": 32, "seed": 0}
QUICK = {"minibatch_size": 64, "num_epochs": 1}


class Order(PPO):
    """Notes which weights collected what was learned from, and whether they were the newest."""

    def update(self, batch: TensorDict) -> dict:
        if not hasattr(self, "versions"):
            self.versions, self.fresh = [], []
        log_prob, _ = self.policy.evaluate(batch)
        self.fresh.append(bool(torch.allclose(log_prob, batch["action_log_prob"], atol=1e-5)))
        self.versions.append((self.updates_done, int(batch["policy_version"][0, 0])))
        return super().update(batch)


class Keep(L.Callback):
    """Every logged value of some metrics."""

    def __init__(self, *names: str):
        self.values: dict[str, list] = {name: [] for name in names}

    def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
        for name, values in self.values.items():
            values.append(trainer.callback_metrics.get(name))


def test_every_rollout_is_collected_with_the_newest_weights(make_trainer) -> None:
    data = RolloutDataModule("CartPole-v1", max_env_steps=128 * 6, rollouts_per_epoch=2, **SMALL)
    algorithm, lag = Order(lr=0.05, **QUICK), Keep("rollout/policy_lag")
    make_trainer(limit_val_batches=0, callbacks=[lag]).fit(algorithm, data)
    assert algorithm.versions == [(k, k) for k in range(6)]
    assert all(algorithm.fresh)
    assert lag.values["rollout/policy_lag"] == [0.0] * 6


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize("prefetch", [0, 1])
def test_prefetch_collects_one_version_behind_and_says_so(make_trainer, prefetch: int) -> None:
    data = RolloutDataModule(
        "CartPole-v1", max_env_steps=128 * 6, rollouts_per_epoch=2, num_env_runners=1, prefetch=prefetch, **SMALL
    )
    algorithm, lag = Order(lr=0.05, **QUICK), Keep("rollout/policy_lag")
    make_trainer(limit_val_batches=0, callbacks=[lag]).fit(algorithm, data)
    assert algorithm.versions == [(k, max(0, k - prefetch)) for k in range(6)]
    assert algorithm.fresh == [k == 0 or not prefetch for k in range(6)]
    assert lag.values["rollout/policy_lag"] == [float(bool(k and prefetch)) for k in range(6)]


@pytest.mark.parametrize(("budget", "spent"), [(128 * 5, 128 * 5), (128 * 5 + 127, 128 * 5)])
def test_the_budget_is_never_exceeded_and_the_last_epoch_is_validated(make_trainer, budget: int, spent: int) -> None:
    data = RolloutDataModule(
        "CartPole-v1", max_env_steps=budget, rollouts_per_epoch=2, evaluation=Evaluation(episodes=1), **SMALL
    )
    algorithm, trainer = PPO(**QUICK), make_trainer()
    validations = []
    algorithm.on_validation_end = lambda: validations.append(algorithm.env_steps_done)
    trainer.fit(algorithm, data)
    assert algorithm.env_steps_done == spent
    assert validations == [256, 512, 640]
    assert trainer.current_epoch == 3
    assert algorithm.updates_done == 5
    assert trainer.global_step == 5 * 2  # optimizer steps, as everywhere in Lightning


def test_reset_rows_are_not_counted_as_env_steps(make_trainer) -> None:
    data = RolloutDataModule(
        counter_vector, env_kwargs={"mode": "NextStep"}, vectorization="native", rollouts_per_epoch=3, **SMALL
    )
    real = []

    class Count(PPO):
        def update(self, batch: TensorDict) -> dict:
            real.append(int(batch["mask"].sum()))
            return super().update(batch)

    algorithm = Count(**QUICK)
    make_trainer(max_epochs=1, limit_val_batches=0).fit(algorithm, data)
    assert algorithm.env_steps_done == sum(real) < 3 * 128


def test_the_training_return_is_absent_until_an_episode_ends_then_a_rolling_mean(make_trainer) -> None:
    data = RolloutDataModule(CounterEnv, max_env_steps=400, num_envs_per_env_runner=1, rollout_length=1, seed=0)
    keep = Keep("rollout/return_mean", "rollout/length_mean")
    make_trainer(limit_val_batches=0, callbacks=[keep]).fit(PPO(minibatch_size=1, num_epochs=1), data)
    returns = keep.values["rollout/return_mean"]
    assert returns[0] is None
    assert returns[1] == 3.0  # the first episode: 1 + 2
    assert returns[4] == pytest.approx((3 + 6) / 2)
    # Episodes of 2, 3, 4 steps in turn: returns 3, 6, 10. 133 ended; the last 100 count.
    ended = [(3, 6, 10)[k % 3] for k in range(133)]
    assert float(returns[-1]) == pytest.approx(np.mean(ended[-100:]), rel=1e-6)


def test_named_info_metrics_are_logged(make_trainer) -> None:
    data = RolloutDataModule(
        CounterEnv, max_env_steps=256, info_metrics=["score"], evaluation=Evaluation(episodes=3), **SMALL
    )
    trainer = make_trainer()
    trainer.fit(PPO(**QUICK), data)
    assert trainer.callback_metrics["rollout/info/score_mean"] > 0
    assert trainer.callback_metrics["eval/info/score_mean"] == 0.0  # first episodes have score 0


def test_an_info_metric_that_no_episode_has_is_said_once(make_trainer, caplog) -> None:
    data = RolloutDataModule(
        CounterEnv, max_env_steps=256, info_metrics=["score", "succes"], evaluation=Evaluation(episodes=3), **SMALL
    )
    make_trainer().fit(PPO(**QUICK), data)
    said = [record.getMessage() for record in caplog.records if "info_metrics" in record.getMessage()]
    assert len(said) == 1 and "info_metrics=['succes']: the last info of none of the 3 evaluation episodes" in said[0]


def test_everything_is_logged_against_env_steps(make_trainer, tmp_path: Path) -> None:
    data = RolloutDataModule(
        "CartPole-v1", max_env_steps=128 * 4, rollouts_per_epoch=2, evaluation=Evaluation(episodes=1), **SMALL
    )
    logger = CSVLogger(tmp_path, name="log")
    make_trainer(logger=logger, log_every_n_steps=1).fit(PPO(**QUICK), data)
    logger.save()
    rows = list(csv.DictReader((Path(logger.log_dir) / "metrics.csv").open()))
    train = [row for row in rows if row["loss/policy"]]
    assert [int(row["step"]) for row in train] == [128, 256, 384, 512]
    assert [float(row["env_steps"]) for row in train] == [128, 256, 384, 512]
    evaluated = [row for row in rows if row["eval/return_mean"]]
    assert [int(row["step"]) for row in evaluated] == [256, 512]
    documented = (ROOT / "docs" / "metrics.md").read_text()
    for name in set(rows[0]) - {"step"}:
        assert f"`{name}`" in documented, f"docs/metrics.md does not define {name}"


def test_lightnings_callbacks_mean_what_they_mean_elsewhere(make_trainer, tmp_path: Path) -> None:
    data = RolloutDataModule(
        "CartPole-v1", max_env_steps=128 * 20, rollouts_per_epoch=2, evaluation=Evaluation(episodes=2), **SMALL
    )
    best = ModelCheckpoint(tmp_path / "best", monitor="eval/return_mean", mode="max", filename="{eval/return_mean:.0f}")
    stop = EarlyStopping("eval/return_mean", mode="max", stopping_threshold=1.0)  # reached at once
    monitor = LearningRateMonitor()
    logger = CSVLogger(tmp_path, name="log")
    trainer = make_trainer(
        enable_checkpointing=True, logger=logger, callbacks=[best, stop, monitor], log_every_n_steps=1
    )
    algorithm = PPO(lr_schedule="linear", **QUICK)
    trainer.fit(algorithm, data)
    assert algorithm.env_steps_done == 256  # EarlyStopping ended it after the first epoch
    assert best.best_model_score == trainer.callback_metrics["eval/return_mean"]
    assert Path(best.best_model_path).exists()
    assert monitor.lrs["lr-Adam"][-2:] == [pytest.approx(3e-4), pytest.approx(3e-4 * (1 - 128 / 2560))]


def test_the_learning_rate_follows_env_steps(make_trainer) -> None:
    data = RolloutDataModule("CartPole-v1", max_env_steps=128 * 4, **SMALL)
    keep = Keep("optim/lr")
    make_trainer(limit_val_batches=0, callbacks=[keep]).fit(PPO(lr=1.0, lr_schedule="linear", **QUICK), data)
    assert keep.values["optim/lr"] == pytest.approx([1.0, 0.75, 0.5, 0.25])
    with pytest.raises(OptionError, match="lr_schedule='linear': expected a budget"):
        make_trainer(max_epochs=1).fit(PPO(lr_schedule="linear", **QUICK), RolloutDataModule("CartPole-v1", **SMALL))


@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1"])
@pytest.mark.parametrize("deterministic", [True, False])
def test_a_loaded_policy_plays_exactly_as_evaluation_did(make_trainer, env: str, deterministic: bool, tmp_path) -> None:
    data = RolloutDataModule(
        env, max_env_steps=1024, evaluation=Evaluation(episodes=5, deterministic=deterministic), **SMALL
    )
    algorithm, trainer = PPO(normalize_observations=True, **QUICK), make_trainer(limit_val_batches=0)
    trainer.fit(algorithm, data)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    played = []
    algorithm.validation_step = lambda batch, batch_idx: played.append(batch["return_"])
    algorithm.on_validation_epoch_end = lambda: None
    make_trainer().validate(algorithm, data, verbose=False)

    policy = load_policy(tmp_path / "x.ckpt")
    if not deterministic:
        # Random actions: the same generator, and the same number of episodes at a time.
        seeds = [data.eval_seed(k) for k in range(5)]
        policy.rng = np.random.default_rng(seeds)
        again = [episode.return_ for episode in play(EnvConfig(env), policy, seeds, deterministic=False)]
        assert again == played
        return
    returns = []
    for k in range(5):  # by hand, one observation at a time
        environment = EnvConfig(env).make()
        obs, _ = environment.reset(seed=data.eval_seed(k))
        state, ended, return_ = None, False, 0.0
        while not ended:
            action, state = policy.act(obs, state)
            obs, reward, terminated, truncated, _ = environment.step(action)
            return_, ended = return_ + float(reward), terminated or truncated
        returns.append(return_)
    np.testing.assert_allclose(sorted(returns), sorted(played), rtol=1e-4)


def test_the_same_seed_gives_the_same_weights_and_another_does_not(make_trainer) -> None:
    def weights(seed: int) -> torch.Tensor:
        algorithm = PPO(**QUICK)
        data = RolloutDataModule("CartPole-v1", max_env_steps=512, **SMALL | {"seed": seed})
        make_trainer(limit_val_batches=0).fit(algorithm, data)
        return torch.cat([p.flatten() for p in algorithm.parameters()])

    assert torch.equal(weights(3), weights(3))
    assert not torch.equal(weights(3), weights(4))


def test_seed_everything_seeds_the_datamodule(make_trainer) -> None:
    L.seed_everything(11, verbose=False)
    data = RolloutDataModule("CartPole-v1", max_env_steps=256, num_envs_per_env_runner=4, rollout_length=32)
    make_trainer(limit_val_batches=0).fit(PPO(**QUICK), data)
    assert data.seed == 11


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_env_runners": -1}, "num_env_runners=-1"),
        ({"rollout_length": 0}, "rollout_length=0"),
        ({"prefetch": 1}, "prefetch=1: collecting while the learner updates needs num_env_runners"),
        ({"vectorization": "fast"}, "vectorization='fast'"),
        ({"max_env_steps": 0}, "max_env_steps=0"),
        ({"seed": -1}, "seed=-1"),
        ({"info_metrics": "score"}, "info_metrics='score': expected a list"),
        ({"wrappers": "a:B"}, "wrappers='a:B': expected a list"),
        ({"env_kwargs": [1]}, "env_kwargs=[1]: expected a dict"),
        ({"reward_scale": 0}, "reward_scale=0: expected a number, above 0"),
        ({"reward_clip": float("nan")}, "reward_clip=nan: expected a number, above 0"),
    ],
)
def test_a_bad_option_is_named_with_its_value(options: dict, words: str) -> None:
    with pytest.raises(OptionError) as caught:
        RolloutDataModule("CartPole-v1", **options)
    assert words in str(caught.value)


def test_a_budget_smaller_than_one_rollout_is_refused(make_trainer) -> None:
    data = RolloutDataModule("CartPole-v1", max_env_steps=100, **SMALL)
    with pytest.raises(OptionError, match="max_env_steps=100: expected at least the 128 env steps"):
        make_trainer().fit(PPO(**QUICK), data)


def test_a_budget_that_max_epochs_cannot_reach_is_said(make_trainer) -> None:
    data = RolloutDataModule("CartPole-v1", max_env_steps=10_000, rollouts_per_epoch=1, **SMALL)
    with pytest.warns(UserWarning, match="Training ends at 128 of max_env_steps=10000"):
        make_trainer(max_epochs=1, limit_val_batches=0).fit(PPO(**QUICK), data)


def test_an_algorithm_without_a_datamodule_says_what_it_needs(make_trainer) -> None:
    with pytest.raises(OptionError, match="PPO does not know its environment: expected a datamodule"):
        make_trainer().validate(PPO(), dataloaders=[[]])


def test_the_progress_bar_counts_env_steps(make_trainer, capsys) -> None:
    data = RolloutDataModule(
        CounterEnv, max_env_steps=512, evaluation=Evaluation(episodes=1), rollouts_per_epoch=2, **SMALL
    )
    bar = EnvStepsProgressBar()
    make_trainer(enable_progress_bar=True, callbacks=[bar]).fit(PPO(**QUICK), data)
    assert (bar.train_progress_bar.n, bar.train_progress_bar.total) == (512, 512)
    shown = str(bar.train_progress_bar)
    assert "512/512" in shown and "return=" in shown and "eval=" in shown and "steps/s=" in shown


def test_every_logged_row_is_on_disk_at_once(make_trainer, tmp_path: Path) -> None:
    data = RolloutDataModule("CartPole-v1", max_env_steps=128 * 3, evaluation=Evaluation(episodes=1), **SMALL)
    logger, on_disk = CSVLogger(tmp_path, name="log"), []

    class Look(L.Callback):
        def on_train_batch_end(self, *_: object) -> None:
            on_disk.append(len((Path(logger.log_dir) / "metrics.csv").read_text().splitlines()) - 1)

    make_trainer(logger=logger, log_every_n_steps=1, limit_val_batches=0, callbacks=[Look()]).fit(PPO(**QUICK), data)
    assert on_disk == [1, 2, 3]


def test_the_last_update_is_logged_whatever_ends_the_run(make_trainer, tmp_path: Path) -> None:
    data = RolloutDataModule("CartPole-v1", rollouts_per_epoch=5, **SMALL)
    logger = CSVLogger(tmp_path, name="log")
    make_trainer(logger=logger, log_every_n_steps=3, limit_val_batches=0, max_epochs=1).fit(PPO(**QUICK), data)
    rows = list(csv.DictReader((Path(logger.log_dir) / "metrics.csv").open()))
    assert [int(row["step"]) for row in rows] == [3 * 128, 5 * 128]


def test_a_run_without_a_logger_interval_trains(make_trainer) -> None:
    data = RolloutDataModule("CartPole-v1", max_env_steps=256, **SMALL)
    trainer = L.Trainer(accelerator="cpu", max_epochs=-1, barebones=True)  # log_every_n_steps is 0
    trainer.fit(PPO(**QUICK), data)
    assert trainer.global_step == 4


def test_a_datamodule_used_again_begins_anew(make_trainer) -> None:
    data = RolloutDataModule(CounterEnv, max_env_steps=128, num_envs_per_env_runner=4, rollout_length=32)
    seeds, windows, weights = [], [], []
    for seed in (1, 2, 1):
        L.seed_everything(seed, verbose=False)
        algorithm = PPO(**QUICK)
        make_trainer(limit_val_batches=0).fit(algorithm, data)
        seeds.append(data.seed)
        windows.append(len(data.rank_state()["episodes"]))
        weights.append(algorithm.policy.head.weight.detach().clone())
    assert seeds == [1, 2, 1] and len(set(windows)) == 1
    assert torch.equal(weights[0], weights[2]) and not torch.equal(weights[0], weights[1])


def test_numbers_of_numpy_are_numbers(make_trainer, tmp_path: Path) -> None:
    algorithm = PPO(lr=np.float32(1e-3), minibatch_size=np.int64(64), num_epochs=1)
    data = RolloutDataModule("CartPole-v1", max_env_steps=np.int64(128), **SMALL)
    trainer = make_trainer(limit_val_batches=0)
    trainer.fit(algorithm, data)
    trainer.save_checkpoint(tmp_path / "x.ckpt")  # plain data only
    assert PPO.load_from_checkpoint(tmp_path / "x.ckpt").hparams.minibatch_size == 64


def test_a_run_that_fails_closes_its_environments(make_trainer) -> None:
    closed = []

    class Closing(FailingEnv):
        def close(self) -> None:
            closed.append(True)

    faults = FaultTolerance(max_restarts=0)
    data = RolloutDataModule(Closing, max_env_steps=512, fault_tolerance=faults, **SMALL)
    with pytest.raises(EnvError, match="the simulator fell over"):
        make_trainer(limit_val_batches=0).fit(PPO(**QUICK), data)
    assert len(closed) == 1 + 4  # the one that was tried out, and the four that were stepped


def test_the_first_weights_do_not_depend_on_torchs_threads() -> None:
    """Orthogonal matrices do, in the last bits, which a first fit and the next ones would differ by."""

    def weights(num_threads: int) -> dict[str, Any]:
        before = torch.get_num_threads()
        torch.set_num_threads(num_threads)
        try:
            algorithm = PPO()
            algorithm.build_networks(SeededSource())
            assert torch.get_num_threads() == num_threads
        finally:
            torch.set_num_threads(before)
        return algorithm.state_dict()

    for name, x in weights(1).items():
        assert torch.equal(x, weights(2)[name]), name


class SeededSource(Source):
    """An environment with a long vector, without the environment."""

    spec = EnvSpec("Vector", spaces.Box(-1, 1, (300,)), spaces.Discrete(2))
    seed = 1


def test_a_run_that_nothing_ends_says_so(make_trainer) -> None:
    class Stop(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
            trainer.should_stop = True

    with pytest.warns(UserWarning, match=r"The run has no end: set max_env_steps on the datamodule"):
        make_trainer(limit_val_batches=0, max_epochs=-1, callbacks=[Stop()]).fit(
            PPO(**QUICK), RolloutDataModule("CartPole-v1", **SMALL)
        )
