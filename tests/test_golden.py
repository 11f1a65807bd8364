"""Checkpoints that earlier versions wrote are read as they were meant."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import TESTS

from lit_rl import load_policy
from lit_rl.files.loading import FORMAT

GOLDEN = TESTS / "golden"
sys.path.insert(0, str(GOLDEN))

from make import OBS, digest, runs  # noqa: E402

FILES = sorted(GOLDEN.glob("format_*/*.ckpt"))


def test_there_are_files_of_the_present_format() -> None:
    """Else make them: golden/make.py says how."""
    kept = {torch.load(path, weights_only=True)["lit_rl"]["format"] for path in FILES}
    assert FORMAT in kept and {int(path.parent.name.removeprefix("format_")) for path in FILES} == kept


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_kept_checkpoint_acts_loads_and_goes_on(path: Path, make_trainer: Any, tmp_path: Path) -> None:
    expected = json.loads((path.parent / "expected.json").read_text())[path.stem]
    policy = load_policy(path)
    assert [int(policy.act(obs)[0]) for obs in OBS] == expected["actions"]
    algorithm, data = runs(256)[path.stem]
    restored = type(algorithm).load_from_checkpoint(path)
    assert digest(restored.state_dict()) == expected["weights"]
    assert (restored.env_steps_done, restored.updates_done > 0) == (128, True)
    shutil.copytree(path.parent, tmp_path / "copy")
    make_trainer(limit_val_batches=0).fit(algorithm, data, ckpt_path=tmp_path / "copy" / path.name)
    assert algorithm.env_steps_done == 256 == data.ledger.delivered
    assert path.stem != "dqn" or len(data.buffer) == 256  # the first half came with the checkpoint
