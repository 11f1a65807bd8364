"""One rank of runs with several policies: `python ddp_multi_agent.py <out folder>`. Started by test_ddp.py."""

import os
import sys
from pathlib import Path
from typing import Any

import torch
from agent_envs import LoggedAgents
from helpers import quiet_trainer

from lit_rl import (
    DQN,
    IMPALA,
    PPO,
    EpisodeInfo,
    LSTMNetwork,
    MultiAgent,
    Rainbow,
    Replay,
    ReplayDataModule,
    RolloutDataModule,
)

SIZES: dict[str, Any] = {
    "env_kwargs": {"mode": "random", "num_agents": 3}, "num_envs_per_env_runner": 2, "seed": 0, "max_env_steps": 768,
}  # fmt: skip
REPLAY: dict[str, Any] = {"learning_starts": 64, "batch_size": 16, "update_to_data": 0.25}


def is_second() -> bool:
    return os.environ.get("LOCAL_RANK") == "1"


def for_a_while(agent: str, info: EpisodeInfo) -> str:
    """Policy "two" has an agent on the second rank alone, and for a while alone."""
    if agent == "c":
        return "three"
    return "two" if is_second() and agent == "b" and 2 <= info.number < 8 else "one"


def on_one(agent: str, info: EpisodeInfo) -> str:
    """Policies "two" and "three" have agents on the second rank alone."""
    return {"b": "two", "c": "three"}.get(agent, "one") if is_second() else "one"


def main(out: Path) -> None:
    ppo = {"minibatch_size": 8, "num_epochs": 1}
    off_policy = {"two": Rainbow(v_min=-50, v_max=50), "three": DQN(network=LSTMNetwork, sequence_length=4)}
    runs: dict[str, tuple[MultiAgent, Any]] = {
        "on-policy": (
            MultiAgent(
                {
                    "one": PPO(**ppo | {"num_epochs": 2}, normalize_observations=True),
                    "two": PPO(**ppo, network=LSTMNetwork, sequence_length=4),
                    "three": IMPALA(normalize_returns=True),
                },
                policy_mapping=for_a_while,
            ),
            RolloutDataModule(LoggedAgents, rollout_length=16, **SIZES),
        ),
        "mixed": (
            MultiAgent({"one": PPO(**ppo), **off_policy}, policy_mapping=on_one),
            RolloutDataModule(LoggedAgents, rollout_length=16, replay=Replay(**REPLAY), **SIZES),
        ),
        "off-policy": (
            MultiAgent({"one": DQN(), **off_policy}, policy_mapping=on_one),
            ReplayDataModule(LoggedAgents, rollout_length=2, env_steps_per_batch=64, **REPLAY, **SIZES),
        ),
    }
    for name, (algorithm, data) in runs.items():
        trainer = quiet_trainer(devices=2, strategy="ddp", limit_val_batches=0)
        trainer.fit(algorithm, data)
        loss = {key: float(x) for key, x in trainer.callback_metrics.items() if "/loss/" in key}
        found = {
            "weights": algorithm.state_dict(), "loss": loss, "rows": data.ledger.agent_steps,
            "updates": {policy_id: int(x.updates) for policy_id, x in algorithm.algorithms.items()},
            "stored": {policy_id: len(feed.buffer) for policy_id, feed in data.feeds.items()},
        }  # fmt: skip
        torch.save(found, out / f"{name}-{trainer.global_rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
