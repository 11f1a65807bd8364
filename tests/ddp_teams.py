"""One rank of runs with policies that share networks: `python ddp_teams.py <folder>`. Started by test_ddp.py."""

import sys
from pathlib import Path
from typing import Any

import torch
from agent_envs import LoggedAgents
from helpers import quiet_trainer

from lit_rl import APPO, PPO, MultiAgent, RolloutDataModule
from lit_rl.rollout import Rollout, Rollouts

COPIES, LENGTH = 4, 16  # of the environment, over all ranks
MAPPING = {"a": "one", "*": "two"}
LINES = {"one": 1, "two": 2}  # time lines of a policy in each copy
SHARES = {"one": [(0, 4)], "two": [(0, 2), (2, 2)], "uneven": [(0, 3), (3, 1)]}  # first copy and their number
PAIR = [["one", "two"]]
CASES: dict[str, tuple[type, dict[str, Any], dict[str, Any]]] = {
    "encoder": (PPO, {"encoder_groups": PAIR}, {"num_epochs": 1}),
    "critic": (PPO, {"critic_groups": PAIR}, {"num_epochs": 1}),
    "a central critic": (PPO, {"critic_groups": PAIR}, {"num_epochs": 1, "central_critic": "observations"}),
    "central": (PPO, {"critic_groups": PAIR}, {"num_epochs": 1, "central_critic": "observations"}),
    "both": (APPO, {"critic_groups": PAIR, "encoder_groups": PAIR}, {"normalize_advantage": True, "kl_coef": 0.5}),
}


class Recorded(RolloutDataModule):
    """Gives every rank its share of the rollouts that were recorded in `folder`, again and again."""

    folder: Path
    shares: list[tuple[int, int]]

    def start_rollout(self) -> None:
        """Nothing is collected."""

    def finish_rollout(self) -> Rollouts:
        first, count = self.shares[self.trainer.global_rank]
        found = {}
        for policy_id, tensors in torch.load(self.folder / "rollouts.pt", weights_only=True).items():
            lines = LINES[policy_id]
            rollout = Rollout(tensors, [COPIES * lines])
            found[policy_id] = rollout[first * lines : (first + count) * lines].clone()
            found[policy_id].env_steps = count * LENGTH
        return Rollouts(found)


def source(cls: type[RolloutDataModule], num_copies: int = COPIES, **options: Any) -> Any:
    env_kwargs = {"mode": "random", "num_agents": 3, "forgets": True}
    sizes = {"num_envs_per_env_runner": num_copies, "rollout_length": LENGTH, "seed": 0}
    return cls(LoggedAgents, env_kwargs=env_kwargs, **sizes | options)


def record(out: Path) -> None:
    """Rollouts of some env steps, with observations that are not much larger than 1."""

    class Record(RolloutDataModule):
        def finish_rollout(self) -> Any:
            rollouts = super().finish_rollout()
            assert isinstance(rollouts, Rollouts)
            for rollout in rollouts.values():
                for prefix in ("", "last_", "final_"):
                    rollout[f"{prefix}observation"] /= 100
                    for seen in rollout[f"{prefix}central"]["observations"].values():
                        seen /= 100
            found = {policy_id: rollout.clone().to_dict() for policy_id, rollout in rollouts.items()}
            torch.save(found, out / "rollouts.pt")
            return rollouts

    data = source(Record, max_env_steps=COPIES * LENGTH)
    policies = {policy_id: APPO(central_critic="observations") for policy_id in LINES}
    algorithm = MultiAgent(policies, policy_mapping=MAPPING)
    quiet_trainer(limit_val_batches=0).fit(algorithm, data)


def gradients(world_size: int, out: Path, shares: str, case: str) -> None:
    """The gradients of two updates, and the weights after them."""
    cls, groups, options = CASES[case]
    kept = []

    class Gradients(MultiAgent):
        def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
            kept.append([p.grad.clone() for group in optimizer.param_groups for p in group["params"]])

    most = max(count for _, count in SHARES[shares])
    data = source(Recorded, most, rollouts_per_epoch=2)
    data.folder, data.shares = out, SHARES[shares]
    policies = {}
    for policy_id, lines in LINES.items():
        size = {"minibatch_size": most * lines * LENGTH} if cls is PPO else {}  # all of a rank's rows
        policies[policy_id] = cls(
            normalize_observations=True, normalize_returns=True, entropy_coef=0.01, lr=1e-2, **options | size
        )
    algorithm = Gradients(policies, policy_mapping=MAPPING, **groups)
    strategy = "ddp" if world_size > 1 else "auto"
    trainer = quiet_trainer(devices=world_size, strategy=strategy, max_epochs=1, limit_val_batches=0)
    trainer.fit(algorithm, data)
    found = {"gradients": kept, "env_steps": int(algorithm.env_steps), "weights": algorithm.state_dict()}
    torch.save(found, out / f"{case}-{shares}-{trainer.global_rank}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for case in CASES:
        for shares in ("two", "uneven"):
            gradients(2, Path(sys.argv[1]), shares, case)
