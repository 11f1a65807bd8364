"""One rank of a run with several policies: `python ddp_multi_agent.py <out folder>`. Started by test_ddp.py."""

import os
import sys
from pathlib import Path

import torch
from agent_envs import LoggedAgents
from helpers import quiet_trainer

from lit_rl import IMPALA, PPO, EpisodeInfo, LSTMNetwork, MultiAgent, RolloutDataModule


def mapping(agent: str, info: EpisodeInfo) -> str:
    """Policy "two" has an agent on the second rank alone, and for a while alone."""
    if agent == "c":
        return "three"
    on_second = os.environ.get("LOCAL_RANK") == "1"
    return "two" if on_second and agent == "b" and 2 <= info.number < 8 else "one"


def main(out: Path) -> None:
    algorithm = MultiAgent(
        {
            "one": PPO(minibatch_size=8, num_epochs=2, normalize_observations=True),
            "two": PPO(minibatch_size=8, num_epochs=1, network=LSTMNetwork, sequence_length=4),
            "three": IMPALA(normalize_returns=True),
        },
        policy_mapping=mapping,
    )
    data = RolloutDataModule(
        LoggedAgents, env_kwargs={"mode": "random", "num_agents": 3}, num_envs_per_env_runner=2, rollout_length=16,
        seed=0, max_env_steps=768,
    )  # fmt: skip
    trainer = quiet_trainer(devices=2, strategy="ddp", limit_val_batches=0)
    trainer.fit(algorithm, data)
    steps = {policy_id: int(x.updates) for policy_id, x in algorithm.algorithms.items()}
    loss = {name: float(x) for name, x in trainer.callback_metrics.items() if "/loss/" in name}
    found = {"weights": algorithm.state_dict(), "updates": steps, "loss": loss, "rows": data.ledger.agent_steps}
    torch.save(found, out / f"{trainer.global_rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
