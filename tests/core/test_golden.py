"""Checkpoints that earlier versions wrote are read as they were meant."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import TESTS

from lit_rl import DQN, PPO
from lit_rl.files.loading import FORMAT
from lit_rl.networks.build import default_network

GOLDEN = TESTS / "golden"
sys.path.insert(0, str(GOLDEN))

from make import actions_of, digest, runs  # noqa: E402

OLD_PPO = {
    "minibatch_size": 32,
    "num_epochs": 1,
    "gae_lambda": 0.95,
    "normalize_observations": True,
    "normalize_returns": True,
}
OLD_DQN = {"lr": 5e-4, "target_update_interval": 500, "tau": 1.0, "loss": "huber", "max_grad_norm": 10.0}
FILES = sorted(GOLDEN.glob("format_*/*.ckpt"))


def test_there_are_files_of_the_present_format() -> None:
    """Else make them: golden/make.py says how."""
    kept = {torch.load(path, weights_only=True)["lit_rl"]["format"] for path in FILES}
    assert FORMAT in kept and {int(path.parent.name.removeprefix("format_")) for path in FILES} == kept


def test_options_of_format_2_are_read_under_their_names_of_today(tmp_path: Path) -> None:
    def load(name: str, cls: Any, **options: Any) -> Any:
        checkpoint = torch.load(GOLDEN / "format_2" / f"{name}.ckpt", weights_only=True)
        checkpoint["hyper_parameters"] |= options
        torch.save(checkpoint, tmp_path / "old.ckpt")
        return cls.load_from_checkpoint(tmp_path / "old.ckpt")

    points = [[0.0, 0.5], [100.0, 0.1]]
    ppo = load("ppo", PPO, entropy_schedule=points, lr_schedule="linear")
    assert ppo.hparams == PPO(**OLD_PPO, entropy_coef_schedule=points, lr_schedule="linear").hparams
    assert ppo.entropy_coef.at(50, None) == pytest.approx(0.3)
    dqn = load("dqn", DQN, epsilon=points)
    assert dqn.hparams == DQN(**OLD_DQN, epsilon_schedule=points).hparams and dqn.epsilon_at(50) == pytest.approx(0.3)
    assert load("dqn", DQN, epsilon=0.2).hparams == DQN(**OLD_DQN, epsilon=0.2).hparams
    assert load("dqn", DQN).hparams == DQN(**OLD_DQN).hparams


@pytest.mark.parametrize("name", [2, 3])
def test_dqn_without_a_network_had_every_policys_default_one_up_to_format_3(name: int) -> None:
    encoder = DQN.load_from_checkpoint(GOLDEN / f"format_{name}" / "dqn.ckpt").policy.encoder
    assert [type(layer).__name__ for layer in encoder.layers] == ["Linear", "Tanh"] * 2


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_kept_checkpoint_acts_loads_and_goes_on(path: Path, make_trainer: Any, tmp_path: Path) -> None:
    expected = json.loads((path.parent / "expected.json").read_text())[path.stem]
    assert actions_of(path) == expected["actions"]
    algorithm, data = runs(256)[path.stem]
    if path.stem == "dqn" and path.parent.name < "format_4":
        algorithm = DQN(network=default_network)
    restored = type(algorithm).load_from_checkpoint(path)
    assert digest(restored.state_dict()) == expected["weights"]
    assert (restored.env_steps_done, restored.updates_done > 0) == (128, True)
    shutil.copytree(path.parent, tmp_path / "copy")
    make_trainer(limit_val_batches=0).fit(algorithm, data, ckpt_path=tmp_path / "copy" / path.name)
    assert algorithm.env_steps_done == 256 == data.ledger.delivered
    assert path.stem != "dqn" or len(data.buffer) == 256  # the first half came with the checkpoint
