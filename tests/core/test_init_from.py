"""A new run takes another run's policy, and what else fits it."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_rl import MLP, PPO, Evaluation, RolloutDataModule
from lit_rl.envs.make import EnvConfig
from lit_rl.errors import CheckpointError, OptionError

SMALL = {"num_envs_per_env_runner": 2, "rollout_length": 32, "rollouts_per_epoch": 1, "seed": 0}


class Renamed(PPO):
    """Another algorithm with the same policy."""


def fit(make_trainer: Any, algorithm: PPO, **options: Any) -> PPO:
    data = RolloutDataModule("CartPole-v1", evaluation=Evaluation(episodes=1), **SMALL | options)
    make_trainer(max_epochs=options.pop("epochs", 1), limit_val_batches=0).fit(algorithm, data)
    return algorithm


def begun(make_trainer: Any, path: Path, algorithm: PPO) -> dict[str, torch.Tensor]:
    """The weights with which a run begins that takes them from a checkpoint."""
    algorithm.init_from = str(path)
    data = RolloutDataModule("CartPole-v1", **SMALL)
    found: dict[str, torch.Tensor] = {}
    algorithm.on_train_start = lambda: found.update({k: v.clone() for k, v in algorithm.state_dict().items()})
    algorithm.training_step = lambda batch, batch_idx: None
    algorithm.on_train_epoch_start = algorithm.on_train_end = lambda: None
    make_trainer(max_epochs=1, limit_val_batches=0).fit(algorithm, data)
    return found


@pytest.fixture
def source(make_trainer: Any, tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    algorithm = PPO(minibatch_size=64, lr=1e-2, normalize_observations=True, normalize_returns=True)
    fit(make_trainer, algorithm)
    path = tmp_path / "source.ckpt"
    algorithm.trainer.save_checkpoint(path)
    return path, algorithm.state_dict()


@pytest.mark.parametrize("algorithm", [PPO, Renamed])
def test_policy_normaliser_and_critic_are_taken_and_counters_are_not(
    make_trainer: Any, source: tuple[Path, dict[str, torch.Tensor]], algorithm: type[PPO]
) -> None:
    path, weights = source
    options: dict[str, Any] = {"normalize_observations": True, "normalize_returns": True}
    found = begun(make_trainer, path, algorithm(minibatch_size=64, **options))
    assert weights["env_steps"] == 64 and found["env_steps"] == found["updates"] == 0
    for name in weights.keys() - {"env_steps", "updates"}:
        assert torch.equal(found[name], weights[name]), name


def test_what_only_one_of_the_runs_has_is_left_and_named(
    make_trainer: Any, source: tuple[Path, dict[str, torch.Tensor]], caplog: pytest.LogCaptureFixture
) -> None:
    path, weights = source
    new = PPO(normalize_observations=True, normalize_returns=False, share_encoder=True)  # whose critic is a head
    with caplog.at_level(logging.INFO, logger="lightning.pytorch"):
        found = begun(make_trainer, path, new)
    for name in found:
        assert not name.startswith("policy.") or torch.equal(found[name], weights[name]), name
    (said,) = [record.getMessage() for record in caplog.records if "not taken" in record.getMessage()]
    assert "critic.linear.weight" in said and "return_normalizer" in said and "policy." not in said


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "normalize_observations"),
        ({"normalize_observations": True, "network": lambda space: MLP(space, hidden_sizes=[8])}, "the policy differs"),
    ],
)
def test_another_policy_is_refused(
    make_trainer: Any, source: tuple[Path, dict[str, torch.Tensor]], options: dict[str, Any], words: str
) -> None:
    algorithm = PPO(minibatch_size=64, **options)
    with pytest.raises(CheckpointError, match=words):
        begun(make_trainer, source[0], algorithm)


def test_what_is_no_path_is_refused() -> None:
    algorithm = PPO(spec=EnvConfig("CartPole-v1").spec().to_dict())
    algorithm.init_from = 3
    with pytest.raises(OptionError, match=r"init_from=3: expected a checkpoint's path\."):
        algorithm.configure_model()


def test_a_subclass_may_have_a_module_that_is_called_like_a_method_of_other_libraries() -> None:
    algorithm = PPO()
    algorithm.predict = torch.nn.Linear(2, 3)
    assert algorithm.predict.out_features == 3


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("learn", r"Training is the Trainer's: .*fit\(PPO\(\), Rollout"),
        ("predict", r"Actions are the policy's: .*policy\.act\(obs\)"),
        ("save", r"Checkpoints are the Trainer's: trainer\.save_checkpoint"),
    ],
)
def test_methods_of_other_libraries_are_answered_in_words(method: str, words: str) -> None:
    with pytest.raises(AttributeError, match=rf"PPO has no '{method}'\. {words}"):
        getattr(PPO(), method)
