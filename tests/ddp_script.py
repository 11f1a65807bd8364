"""One rank of a DDP run, or one process alone: `python ddp_script.py <case> <out folder> [network]`.

Started by test_ddp.py.
"""

import sys
from pathlib import Path

import lightning as L
import torch
from envs import counter_vector
from tensordict import TensorDict

from lit_rl import PPO, RolloutDataModule, networks

ENVS = 4  # over all ranks
SHARES = {"one": [(0, 4)], "two": [(0, 2), (2, 2)], "uneven": [(0, 3), (3, 1)]}  # first environment and their number


class Recorded(RolloutDataModule):
    """Gives every rank its share of one recorded rollout, again and again."""

    def start_rollout(self) -> None:
        """Nothing is collected."""

    def finish_rollout(self) -> TensorDict:
        rollout = torch.load(Path(sys.argv[2]) / "rollout.pt", weights_only=True)
        rollout = TensorDict(rollout | {"next": TensorDict(rollout["next"], [ENVS])}, [ENVS])
        first, count = SHARES[sys.argv[1]][self.trainer.global_rank]
        return rollout[first:][:count].clone()


class Gradients(PPO):
    """Keeps the gradients of every step."""

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.kept = getattr(self, "kept", [])
        self.kept.append([p.grad.clone() for p in self.parameters()])


def gradients(world_size: int, out: Path, name: str) -> None:
    """The gradients of two full-batch updates, with everything on that is reduced over ranks."""
    length, most = 16, max(count for _, count in SHARES[name])
    data = Recorded(
        counter_vector, env_kwargs={"mode": "NextStep"}, vectorization="native", rollouts_per_epoch=2, seed=0,
        num_envs_per_env_runner=most, rollout_length=length,
    )  # fmt: skip
    algorithm = Gradients(
        minibatch_size=most * length, num_epochs=1, normalize_observations=True, normalize_returns=True,
        entropy_coef=0.01, lr=1e-2, network=getattr(networks, sys.argv[3]),
    )  # fmt: skip
    trainer = fit(algorithm, data, world_size, max_epochs=1)
    state = {"gradients": algorithm.kept, "env_steps": int(algorithm.env_steps), "weights": algorithm.state_dict()}
    torch.save(state, out / f"gradients-{name}-{trainer.global_rank}.pt")


def train(world_size: int, out: Path, num_env_runners: int) -> None:
    """A short run on CartPole: what each rank ends with."""
    data = RolloutDataModule(
        "CartPole-v1", num_envs_per_env_runner=4, rollout_length=32, max_env_steps=2048, rollouts_per_epoch=4, seed=0,
        eval_episodes=3, num_env_runners=num_env_runners,
    )  # fmt: skip
    first = []

    class Watch(PPO):
        def update(self, batch: TensorDict) -> dict:
            first.append(batch["observation"][:, 0].clone())
            return super().update(batch)

    algorithm = Watch(minibatch_size=32, num_epochs=2, lr=1e-3)
    trainer = fit(algorithm, data, world_size)
    trainer.save_checkpoint(out / "ddp.ckpt")
    torch.save(
        {
            "weights": algorithm.state_dict(),
            "first": first[0],
            "metrics": dict(trainer.callback_metrics),
            "global_step": trainer.global_step,
        },
        out / f"train-{trainer.global_rank}.pt",
    )


def fit(algorithm: PPO, data: RolloutDataModule, world_size: int, **kwargs: object) -> L.Trainer:
    options = {"max_epochs": -1, "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = L.Trainer(
        accelerator="cpu", devices=world_size, strategy="ddp" if world_size > 1 else "auto",
        enable_model_summary=False, num_sanity_val_steps=0, **options | kwargs,
    )  # fmt: skip
    trainer.fit(algorithm, data)
    return trainer


if __name__ == "__main__":
    torch.set_num_threads(1)
    case, out = sys.argv[1], Path(sys.argv[2])
    if case in SHARES:
        gradients(len(SHARES[case]), out, case)
    else:
        train(2, out, num_env_runners=int(case == "ray"))
