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

from lit_rl import DQN, IMPALA, PPO, MultiAgent, Random, ReplayDataModule, RolloutDataModule, load_policy
from lit_rl.files.loading import FORMAT

FOLDER = Path(__file__).parent
OBS = np.linspace(-1, 1, 40, dtype=np.float32).reshape(10, 4)


def runs(max_env_steps: int) -> dict[str, tuple[Any, Any]]:
    """By name, an algorithm and its data."""
    shared: dict[str, Any] = {"env": "CartPole-v1", "num_envs_per_env_runner": 2, "seed": 0}
    shared |= {"max_env_steps": max_env_steps}
    three = {"env": "lit_rl.envs.multi_agent:ReplicatedEnv", "env_kwargs": {"env": "CartPole-v1", "num_agents": 3}}
    return {
        "ppo": (
            PPO(minibatch_size=32, num_epochs=1, normalize_observations=True, normalize_returns=True),
            RolloutDataModule(rollout_length=32, rollouts_per_epoch=1, **shared),
        ),
        "several": (
            MultiAgent(
                {"one": PPO(minibatch_size=32, num_epochs=1), "two": IMPALA(), "random": Random()},
                policy_mapping={"agent_0": "one", "agent_1": "two", "*": "random"},
            ),
            RolloutDataModule(rollout_length=32, rollouts_per_epoch=1, **shared | three),
        ),
        "dqn": (
            DQN(),
            ReplayDataModule(
                rollout_length=2, env_steps_per_batch=64, batches_per_epoch=1, learning_starts=64, batch_size=32,
                buffer_size=400, update_to_data=0.1, **shared,
            ),
        ),
    }  # fmt: skip


def actions_of(path: Path) -> list[int]:
    """What a checkpoint's policy does; of several policies that of each agent whose policy is learned."""
    policy = load_policy(path)
    if path.stem != "several":
        return [int(policy.act(obs)[0]) for obs in OBS]
    acted = [policy.act({"agent_0": obs, "agent_1": obs})[0] for obs in OBS]
    return [int(action) for actions in acted for action in actions.values()]


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
        expected[name] = {"weights": digest(algorithm.state_dict()), "actions": actions_of(path)}
    (folder / "expected.json").write_text(json.dumps(expected) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
