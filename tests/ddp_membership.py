"""One rank of runs in which policies come and go: `python ddp_membership.py <out folder>`. Started by test_ddp.py."""

import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch
from agent_envs import LoggedAgents
from helpers import quiet_trainer

from lit_rl import DQN, IMPALA, PPO, LSTMNetwork, MultiAgent, Replay, ReplayDataModule, RolloutDataModule
from lit_rl.source import NoSource

SIZES: dict[str, Any] = {
    "env_kwargs": {"mode": "together", "num_agents": 3}, "num_envs_per_env_runner": 2, "max_env_steps": 768,
}  # fmt: skip
REPLAY: dict[str, Any] = {"learning_starts": 64, "batch_size": 16, "update_to_data": 0.25}


class ComeAndGo(L.Callback):
    """Adds an algorithm, whose weights each rank drew by itself, and a past version, and removes a policy."""

    def __init__(self, make: Any):
        self._make = make

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 2:
            torch.manual_seed(trainer.global_rank)
            three = self._make(spec=module.spec.agents["c"].to_dict())
            three.build_networks(NoSource())
            self.drawn = three.policy.head.weight.detach().clone()
            module.add_policy("three", three, policy_mapping={"a": "one", "b": "two", "c": "three"})
        if batch_idx == 4:
            mapping = {"a": "one", "b": "past", "c": "three"}
            module.add_policy("past", module.frozen_copy("one"), policy_mapping=mapping)
            module.remove_policy("two")


def main(out: Path) -> None:
    ppo: dict[str, Any] = {"minibatch_size": 4, "num_epochs": 1}
    runs: dict[str, tuple[Any, Any, Any]] = {
        "on-policy": (
            {"one": PPO(**ppo), "two": IMPALA(normalize_observations=True)},
            lambda **more: PPO(**ppo, normalize_observations=True, normalize_returns=True, **more),
            RolloutDataModule(LoggedAgents, rollout_length=16, **SIZES),
        ),
        "mixed": (
            {"one": PPO(**ppo), "two": DQN()},
            lambda **more: DQN(network=LSTMNetwork, sequence_length=4, **more),
            RolloutDataModule(LoggedAgents, rollout_length=16, replay=Replay(**REPLAY), **SIZES),
        ),
        "off-policy": (
            {"one": DQN(), "two": DQN()},
            DQN,
            ReplayDataModule(LoggedAgents, rollout_length=2, env_steps_per_batch=64, **REPLAY, **SIZES),
        ),
    }
    for name, (policies, make, data) in runs.items():
        algorithm = MultiAgent(policies, policy_mapping={"a": "one", "*": "two"})
        changes = ComeAndGo(make)
        trainer = quiet_trainer(devices=2, strategy="ddp", limit_val_batches=0, callbacks=[changes])
        trainer.fit(algorithm, data)
        trainer.save_checkpoint(out / f"{name}.ckpt")
        found = {
            "weights": algorithm.state_dict(), "ids": algorithm.ids, "drawn": changes.drawn,
            "env_steps": algorithm.env_steps_done, "abandoned": data.ledger.abandoned,
            "updates": {policy_id: x.updates_done for policy_id, x in algorithm.algorithms.items()},
            "loss": {key: float(x) for key, x in trainer.callback_metrics.items() if "three/loss/" in key},
            "global_step": trainer.global_step,
        }  # fmt: skip
        torch.save(found, out / f"{name}-{trainer.global_rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
