"""A LightningModule of two whole algorithms, each with a host of its own: `python host_script.py <out> <case> ...`.

Started by test_host.py for two ranks, which also calls it in process for one.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from envs import counter_vector
from tensordict import TensorDict
from torch import nn

from lit_rl import DQN, PPO, Policy
from lit_rl.envs.make import EnvConfig
from lit_rl.learner.host import make_host
from lit_rl.replay import ReplayStream
from lit_rl.rollout import Rollout
from lit_rl.runners.env_runner import EnvRunner
from lit_rl.runners.gathering import evened, to_rollout
from lit_rl.source import Source
from lit_rl.spec import EnvSpec

ENV = EnvConfig(counter_vector, {"mode": "NextStep"}, vectorization="native")  # whose rollouts have masked rows
ENVS, LENGTH, ROWS, BATCHES = 4, 16, 12, 3  # the first and the third over all ranks


class Pair(L.LightningModule):
    """PPO and DQN side by side, unchanged: what each is given is its own."""

    def __init__(self, spec: EnvSpec, world_size: int, compile: bool):
        super().__init__()
        self.automatic_optimization = False
        size = ENVS // world_size * LENGTH
        ppo = PPO(minibatch_size=size, num_epochs=2, lr=1e-2, normalize_observations=True, compile=compile)
        self.parts = nn.ModuleDict({"ppo": ppo, "dqn": DQN(lr=1e-2, target_update_interval=2, compile=compile)})
        self.fed = Fed(spec)
        self.kept: list[list[torch.Tensor]] = []

    def configure_model(self) -> None:
        for part in self.parts.values():
            part.build_networks(self.fed)

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [part.configure_optimizers() for part in self.parts.values()]

    def on_fit_start(self) -> None:
        for part, optimizer in zip(self.parts.values(), self.optimizers()):
            part.attach(make_host(part, self, [optimizer], self.fed))

    def on_train_start(self) -> None:
        for name, part in self.parts.items():
            if self.resumed:
                part.load_resume_state(self.resumed[name])

    resumed: dict[str, Any] = {}

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        for name, part in self.parts.items():
            part.follow_schedules()
            part.learn_from(batch[name])

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.kept.append([p.grad.clone() for group in optimizer.param_groups for p in group["params"]])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["parts"] = {name: part.resume_state() for name, part in self.parts.items()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.resumed = checkpoint["parts"]


class Fed(Source):
    """Knows the spaces and the seed, and no more."""

    def __init__(self, spec: EnvSpec):
        self.spec, self.seed = spec, 0


class Recorded(L.LightningDataModule):
    """Each rank's share of a rollout and of a minibatch that were recorded, again and again."""

    def __init__(self, rollout: Rollout, minibatch: TensorDict):
        super().__init__()
        self.rollout, self.minibatch = rollout, minibatch

    def train_dataloader(self) -> Any:
        return Batches(self.trainer.world_size, self.trainer.global_rank, self.rollout, self.minibatch)


class Batches:
    def __init__(self, world_size: int, rank: int, rollout: Rollout, minibatch: TensorDict):
        envs, rows = ENVS // world_size, ROWS // world_size
        self.rollout = rollout[rank * envs : (rank + 1) * envs].clone()
        self.minibatch = minibatch[rank * rows : (rank + 1) * rows].clone()

    def __len__(self) -> int:
        return BATCHES

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for _ in range(len(self)):
            rollout = self.rollout.clone()
            rollout.env_steps = int(rollout["mask"].sum())
            yield {"ppo": evened(rollout, torch.device("cpu")), "dqn": ReplayStream(self.minibatches)}

    def minibatches(self, stream: ReplayStream) -> Iterator[tuple[str, TensorDict]]:
        for _ in range(3):
            stream.env_steps += 5
            yield "", self.minibatch.clone()


def record() -> tuple[EnvSpec, Rollout, TensorDict]:
    """What both algorithms learn from."""
    spec = ENV.spec()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        policy = Policy(spec)
    runner = EnvRunner(ENV, policy, num_envs=ENVS, rollout_length=LENGTH, seed=np.random.SeedSequence(0))
    rollout = to_rollout([runner.sample()], copy=True)
    runner.close()
    draw = torch.Generator().manual_seed(0)
    shape = (ROWS, *spec.observation_space.shape)
    minibatch = TensorDict(
        {
            "observation": torch.rand(shape, generator=draw),
            "action": torch.randint(int(spec.action_space.n), (ROWS,), generator=draw),
            "discount": torch.full((ROWS,), 0.99),
            "next": TensorDict(
                {
                    "observation": torch.rand(shape, generator=draw),
                    "reward": torch.randn(ROWS, generator=draw),
                    "terminated": torch.arange(ROWS) % 5 == 0,
                },
                [ROWS],
            ),
        },
        [ROWS],
    )
    return spec, rollout, minibatch


def run(out: Path, case: str, world_size: int, max_epochs: int = 2, ckpt_path: Path | None = None) -> Pair:
    """Train and keep what each rank ends with."""
    spec, rollout, minibatch = record()
    pair = Pair(spec, world_size, compile=case == "compiled")
    trainer = L.Trainer(
        accelerator="cpu", devices=world_size, strategy="ddp" if world_size > 1 else "auto", max_epochs=max_epochs,
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=out,
    )  # fmt: skip
    trainer.fit(pair, Recorded(rollout, minibatch), ckpt_path=ckpt_path)
    trainer.save_checkpoint(out / f"{case}-{world_size}-{max_epochs}.ckpt")
    found = {"weights": pair.state_dict(), "gradients": pair.kept, "global_step": trainer.global_step}
    torch.save(found, out / f"{case}-{world_size}-{trainer.global_rank}.pt")
    return pair


if __name__ == "__main__":
    for case in sys.argv[2:]:
        run(Path(sys.argv[1]), case, 2)
