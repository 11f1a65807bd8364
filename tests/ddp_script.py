"""One rank of DDP runs, or one process alone: `python ddp_script.py <out folder> <case> ...`, one after the other.

Started by test_ddp.py. The case `gradients:<subfolder>:<shares>:<network>:<algorithm>[:compile]` has options.
"""

import logging
import os
import signal
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import lightning as L
import torch
from envs import DawdlingEnv, counter_vector
from helpers import quiet_trainer
from tensordict import TensorDict

from lit_rl import (
    APPO,
    DQN,
    IMPALA,
    PPO,
    Algorithm,
    Evaluation,
    LSTMNetwork,
    MultiAgent,
    ReplayDataModule,
    RolloutDataModule,
    distributed,
    networks,
)
from lit_rl.envs.multi_agent import ReplicatedEnv
from lit_rl.errors import DivergedError
from lit_rl.rollout import Rollout, mask_of

ENVS = 4  # over all ranks
SHARES = {"one": [(0, 4)], "two": [(0, 2), (2, 2)], "uneven": [(0, 3), (3, 1)]}  # first environment and their number


class Recorded(RolloutDataModule):
    """Gives every rank its share of the rollout that was recorded in `folder`, again and again."""

    folder: Path
    shares: list[tuple[int, int]]

    def start_rollout(self) -> None:
        """Nothing is collected."""

    def finish_rollout(self) -> Rollout:
        rollout = torch.load(self.folder / "rollout.pt", weights_only=True)
        first, count = self.shares[self.trainer.global_rank]
        share = Rollout(rollout, [ENVS])[first:][:count].clone()
        share.env_steps = int(share["mask"].sum())
        return share


ALGORITHMS = {"PPO": PPO, "IMPALA": IMPALA, "APPO": APPO}

RESUMED = ("PPO", "DQN", "MultiAgent")  # runs that go on with another number of ranks


def gradients(
    world_size: int, out: Path, name: str, network: str, algorithm_name: str = "PPO", compile: bool = False
) -> None:
    """The gradients of two full-batch updates, with everything on that is reduced over ranks."""
    cls: type[Algorithm] = ALGORITHMS[algorithm_name]

    class Gradients(cls):  # type: ignore[misc, valid-type]
        """Keeps the gradients of every step."""

        def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
            self.kept = getattr(self, "kept", [])
            self.kept.append([p.grad.clone() for p in self.parameters() if p.requires_grad])

    length, most = 16, max(count for _, count in SHARES[name])
    data = Recorded(
        counter_vector, env_kwargs={"mode": "NextStep"}, vectorization="native", rollouts_per_epoch=2, seed=0,
        num_envs_per_env_runner=most, rollout_length=length,
    )  # fmt: skip
    data.folder, data.shares = out, SHARES[name]
    own: dict[str, dict[str, object]] = {
        "PPO": {"minibatch_size": most * length, "num_epochs": 1, "sequence_length": 4},
        "IMPALA": {"normalize_advantage": True, "optimizer": "rmsprop", "rmsprop_eps": 1e-3},
        "APPO": {"normalize_advantage": True, "kl_coef": 0.5},
    }
    algorithm = Gradients(
        normalize_observations=True, normalize_returns=True, entropy_coef=0.01, lr=1e-2, compile=compile,
        network=getattr(networks, network), **own[algorithm_name],
    )  # fmt: skip
    trainer = fit(algorithm, data, world_size, max_epochs=1)
    state = {
        "gradients": getattr(algorithm, "kept", []),
        "env_steps": int(algorithm.env_steps),
        "weights": algorithm.state_dict(),
    }
    torch.save(state, out / f"{algorithm_name}-{name}{'-compiled' * compile}-{trainer.global_rank}.pt")


def train(world_size: int, out: Path, num_env_runners: int) -> None:
    """A short run on CartPole: what each rank ends with."""
    data = RolloutDataModule(
        "CartPole-v1", num_envs_per_env_runner=4, rollout_length=32, max_env_steps=2048, rollouts_per_epoch=4, seed=0,
        num_env_runners=num_env_runners,
        evaluation=Evaluation(episodes=3, num_env_runners=num_env_runners, parallel=bool(num_env_runners)),
    )  # fmt: skip
    first, reduced, all_reduce = [], [], distributed.all_reduce

    def counted(x: torch.Tensor, *op: object) -> torch.Tensor:
        reduced.append(x.numel())
        return all_reduce(x, *op)

    class Watch(PPO):
        def update(self, batch: TensorDict) -> dict:
            first.append(batch["observation"][:, 0].clone())
            return super().update(batch)

    target_kl = None if num_env_runners else 5e-4  # which the ranks do not exceed at the same time
    algorithm = Watch(minibatch_size=32, num_epochs=2, lr=1e-3, target_kl=target_kl)
    with mock.patch.object(distributed, "all_reduce", counted):
        trainer = fit(algorithm, data, world_size)
    trainer.save_checkpoint(out / "ddp.ckpt")
    torch.save(
        {
            "weights": algorithm.state_dict(),
            "first": first[0],
            "metrics": dict(trainer.callback_metrics),
            "global_step": trainer.global_step,
            "averaged": reduced.count(sum(parameter.numel() + 1 for parameter in algorithm.parameters())),
        },
        out / f"train-{trainer.global_rank}.pt",
    )


class NaNOnRank1(PPO):
    """Rank 1's loss is finite and has a gradient that is not, at optimizer step 3 and from step 12 on."""

    num_losses = 0

    def loss(self, minibatch: TensorDict) -> tuple[torch.Tensor, torch.Tensor]:
        loss, terms = super().loss(minibatch)
        step, self.num_losses = self.num_losses, self.num_losses + 1
        if self.global_rank == 1 and (step == 3 or step >= 12):
            loss = loss + (self.policy.head.weight[0, 0] * 0).sqrt()
        return loss, terms


def nan(out: Path) -> None:
    """What each rank has after one step was skipped, and after the run was ended."""

    class Keep(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, algorithm: PPO, *_: object) -> None:
            weights = {name: tensor.clone() for name, tensor in algorithm.state_dict().items()}
            kept.append((weights, trainer.global_step, dict(trainer.callback_metrics)))

    kept, error = [], ""
    data = RolloutDataModule(
        "CartPole-v1", num_envs_per_env_runner=4, rollout_length=32, max_env_steps=2048, rollouts_per_epoch=4, seed=0
    )
    try:
        fit(
            NaNOnRank1(minibatch_size=32, num_epochs=2, normalize_returns=False),
            data,
            2,
            callbacks=[Keep()],
            default_root_dir=out,
        )
    except DivergedError as caught:
        error = str(caught)
    torch.save({"kept": kept, "error": error}, out / f"nan-{data.trainer.global_rank}.pt")


def signalled(out: Path) -> None:
    """A run of which rank 1 gets SIGTERM in its third batch."""

    class Send(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, algorithm: PPO, *_: object) -> None:
            (out / f"pid-{trainer.global_rank}").write_text(str(os.getpid()))
            if trainer.global_rank == 1 and algorithm.updates_done == 2:
                os.kill(os.getpid(), signal.SIGTERM)

    data = RolloutDataModule("CartPole-v1", num_envs_per_env_runner=4, rollout_length=32, max_env_steps=100_000, seed=0)
    fit(PPO(minibatch_size=64), data, 2, callbacks=[Send()], default_root_dir=out)


def small_run(name: str, max_env_steps: int) -> tuple[Algorithm, RolloutDataModule | ReplayDataModule]:
    """Two environments of a rank; what it has of its own is in use: normalisers, replay buffer. No seed is given."""
    shared = {
        "env": "CartPole-v1", "num_envs_per_env_runner": 2, "max_env_steps": max_env_steps,
        "evaluation": Evaluation(episodes=2),
    }  # fmt: skip
    if name == "PPO":
        algorithm = PPO(minibatch_size=16, num_epochs=1, normalize_observations=True, normalize_returns=True)
        return algorithm, RolloutDataModule(rollout_length=16, rollouts_per_epoch=2, **shared)
    if name == "MultiAgent":
        ppo = {"minibatch_size": 16, "num_epochs": 1, "kl_coef": 0.5, "critic_network": LSTMNetwork}
        shared |= {"env": ReplicatedEnv, "env_kwargs": {"env": "CartPole-v1", "num_agents": 2}}
        algorithms = {"agent_0": PPO(**ppo), "agent_1": PPO(**ppo)}
        return MultiAgent(algorithms), RolloutDataModule(rollout_length=16, rollouts_per_epoch=2, **shared)
    return DQN(), ReplayDataModule(
        rollout_length=2, env_steps_per_batch=32, batches_per_epoch=2, learning_starts=32, batch_size=32,
        buffer_size=500, update_to_data=0.3, **shared,
    )  # fmt: skip


class Begun(L.Callback):
    """Keeps what each algorithm begins with on this rank, beside the weights."""

    def __init__(self) -> None:
        self.states: list[dict[str, Any]] = []

    def on_train_epoch_start(self, trainer: L.Trainer, module: Any) -> None:
        if not self.states:
            self.states = [learner.resume_state() for learner in module.learners]


def resume(out: Path) -> None:
    """Two ranks go on from what one has left, and note what each of them has at first and at the end."""
    for name in RESUMED:
        algorithm, data = small_run(name, 512)
        begun = Begun()
        trainer = fit(algorithm, data, 2, ckpt_path=out / f"{name}-1.ckpt", default_root_dir=out, callbacks=[begun])
        trainer.save_checkpoint(out / f"{name}-2.ckpt")
        found = {"weights": algorithm.state_dict(), "seed": data.seed, "ledger": data.ledger.state()}
        found |= {
            "begun": begun.states,
            "metrics": dict(trainer.callback_metrics),
            "rows": len(getattr(data, "buffer", None) or ()),
        }
        torch.save(found, out / f"resumed-{name}-{trainer.global_rank}.pt")


class Rows(IMPALA):
    """Keeps how many real rows each batch had, on this rank."""

    def update(self, rollout: TensorDict) -> dict:
        mask = mask_of(rollout)
        self.rows = [*getattr(self, "rows", []), rollout["is_init"].numel() if mask is None else int(mask.sum())]
        return super().update(rollout)


def streamed(world_size: int, out: Path) -> None:
    """Two env runners in all, two rollouts ahead; and free-running ones of two ranks, of which one is very slow."""
    data = RolloutDataModule(
        "CartPole-v1", num_env_runners=2 // world_size, fixed_lag=2, num_envs_per_env_runner=2, rollout_length=16,
        max_env_steps=64 * 5, seed=0,
    )  # fmt: skip
    algorithm = Rows(lr=1e-2, normalize_observations=True)
    trainer = fit(algorithm, data, world_size)
    torch.save(algorithm.state_dict(), out / f"ahead-{world_size}-{trainer.global_rank}.pt")
    if world_size == 1:
        return
    data = RolloutDataModule(
        DawdlingEnv, env_kwargs={"lock": str(out / "slow"), "seconds": 0.2}, num_env_runners=1, prefetch=2,
        num_envs_per_env_runner=2, rollout_length=4, stream_timeout_s=0.05, max_env_steps=16 * 40, seed=0,
    )  # fmt: skip
    algorithm = Rows(lr=1e-2)
    trainer = fit(algorithm, data, world_size)
    found = {"weights": algorithm.state_dict(), "rows": algorithm.rows, "ledger": data.ledger.state()}
    torch.save(found, out / f"free-{trainer.global_rank}.pt")


def fit(
    algorithm: Algorithm, data: L.LightningDataModule, world_size: int, ckpt_path: Path | None = None, **kwargs: object
) -> L.Trainer:
    trainer = quiet_trainer(devices=world_size, strategy="ddp" if world_size > 1 else "auto", **kwargs)
    trainer.fit(algorithm, data, ckpt_path=ckpt_path)
    return trainer


if __name__ == "__main__":
    torch.set_num_threads(1)
    out = Path(sys.argv[1])
    for case, *options in (argument.split(":") for argument in sys.argv[2:]):
        if case == "gradients":
            folder, shares, network, algorithm_name, *compile = options
            gradients(2, out / folder, shares, network, algorithm_name, compile=bool(compile))
        elif case == "nan":
            nan(out)
        elif case == "resume":
            logging.getLogger("lightning.pytorch").setLevel(logging.INFO)
            resume(out)
        elif case == "streams":
            streamed(2, out)
        elif case == "signal":
            signalled(out)
        else:
            train(2, out, num_env_runners=int(case == "ray"))
