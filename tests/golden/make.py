"""Writes checkpoints of the present format, and what is expected of them: once for each format, then never again.

    python tests/golden/make.py

`test_golden.py` reads those of every format there was. A change after which it cannot needs a new `FORMAT`, files of
it, and a rule in `loading.upgrade` for those before.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch

from lit_rl import DQN, PPO, ReplayDataModule, RolloutDataModule, load_policy
from lit_rl.files.loading import FORMAT

FOLDER = Path(__file__).parent
OBS = np.linspace(-1, 1, 40, dtype=np.float32).reshape(10, 4)


def runs(max_env_steps: int) -> dict[str, tuple[Any, Any]]:
    """By name, an algorithm and its data."""
    shared = {"env": "CartPole-v1", "num_envs_per_env_runner": 2, "seed": 0, "max_env_steps": max_env_steps}
    return {
        "ppo": (
            PPO(minibatch_size=32, num_epochs=1, normalize_observations=True, normalize_returns=True),
            RolloutDataModule(rollout_length=32, rollouts_per_epoch=1, **shared),
        ),
        "dqn": (
            DQN(),
            ReplayDataModule(
                rollout_length=2, env_steps_per_batch=64, batches_per_epoch=1, learning_starts=64, batch_size=32,
                buffer_size=400, update_to_data=0.1, **shared,
            ),
        ),
    }  # fmt: skip


def digest(weights: dict[str, torch.Tensor]) -> str:
    """Of the numbers alone: a rule for a new format may rename them."""
    parts = sorted(hashlib.sha256(tensor.numpy().tobytes()).digest() for tensor in weights.values())
    return hashlib.sha256(b"".join(parts)).hexdigest()


def main() -> None:
    folder = FOLDER / f"format_{FORMAT}"
    folder.mkdir()
    expected = {}
    for name, (algorithm, data) in runs(128).items():
        trainer = L.Trainer(accelerator="cpu", max_epochs=-1, logger=False, enable_checkpointing=False)
        trainer.fit(algorithm, data)
        path = folder / f"{name}.ckpt"
        trainer.save_checkpoint(path)
        actions = [int(load_policy(path).act(obs)[0]) for obs in OBS]
        expected[name] = {"weights": digest(algorithm.state_dict()), "actions": actions}
    (folder / "expected.json").write_text(json.dumps(expected) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
