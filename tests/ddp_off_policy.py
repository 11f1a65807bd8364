"""Off-policy algorithms on two ranks: `python ddp_off_policy.py <folder> <case> ...`. Started by test_ddp.py.

`gradients`: the gradients of one update of every algorithm, on a share of one minibatch. An algorithm's name: a short
run of it under Trainer; "SAC,compile" is one whose compiled functions are run as they are written.
"""

import functools
import itertools
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from gymnasium import spaces
from helpers import quiet_trainer
from tensordict import TensorDict

from lit_rl import (
    BC,
    CQL,
    DQN,
    IQL,
    MARWIL,
    MLP,
    SAC,
    TQC,
    DiscreteCQL,
    DreamerV3,
    Evaluation,
    LSTMNetwork,
    Rainbow,
    ReplayDataModule,
)
from lit_rl.off_policy import OffPolicy
from lit_rl.rollout import mask_of
from lit_rl.spec import EnvSpec
from lit_rl.trees import iterate, nest

OBS = spaces.Box(-1, 1, (3,), np.float32)
DISCRETE = EnvSpec("Test", OBS, spaces.Discrete(3)).to_dict()
BOX = EnvSpec("Test", OBS, spaces.Box(-1, 1, (2,), np.float32)).to_dict()
CASES: dict[str, tuple[Any, dict]] = {
    "DQN": (DQN, DISCRETE), "Rainbow": (Rainbow, DISCRETE), "SAC": (SAC, BOX), "SAC discrete": (SAC, DISCRETE),
    "TQC": (TQC, BOX), "TQC discrete": (TQC, DISCRETE), "BC": (BC, BOX), "MARWIL": (MARWIL, DISCRETE),
    "CQL": (functools.partial(CQL, lagrangian=True), BOX), "DiscreteCQL": (DiscreteCQL, DISCRETE), "IQL": (IQL, BOX),
    "IQL discrete": (IQL, DISCRETE),
}  # fmt: skip


def minibatch(algorithm: OffPolicy, spec: dict, memory: bool) -> TensorDict:
    """Four rows, or four sequences of which the first two are shorter."""
    g = torch.Generator().manual_seed(1)
    n = (4, 4) if memory else (4,)
    action = torch.randint(3, n, generator=g) if spec is DISCRETE else torch.rand(*n, 2, generator=g) * 2 - 1
    batch: dict[str, Any] = {
        "observation": torch.randn(*n, 3, generator=g), "action": action, "discount": torch.full(n, 0.9),
        "weight": torch.rand(4, generator=g),
        "next": {"reward": torch.randn(n, generator=g), "terminated": torch.rand(n, generator=g) < 0.2},
    }  # fmt: skip
    if isinstance(algorithm, MARWIL):
        del batch["weight"]
    if not memory:
        batch |= {
            "return_to_go": torch.randn(n, generator=g), "to_go_discount": torch.rand(n, generator=g),
            "to_go_observation": torch.randn(*n, 3, generator=g),
        }  # fmt: skip
        batch["next"]["observation"] = torch.randn(*n, 3, generator=g)
        return TensorDict(batch, [4])
    state = nest({path: torch.from_numpy(x) for path, x in iterate(algorithm.policy.initial_state(4), "state")})
    batch |= {
        **state, "last_observation": torch.randn(4, 3, generator=g), "is_init": torch.zeros(n, dtype=torch.bool),
        "bootstrap_row": torch.arange(4).expand(n), "mask": torch.arange(4) < torch.tensor([[1], [2], [4], [4]]),
    }  # fmt: skip
    return TensorDict(batch, [4])


def draw_by_row(algorithm: CQL, batch: TensorDict) -> None:
    """What `CQL.draw_noise` adds, with uniform actions that depend on the row alone."""
    CQL.draw_noise(algorithm, batch)
    several = torch.arange(1, algorithm.hp.num_actions + 1).unsqueeze(-1)
    batch["uniform_action"] = (batch["observation"][..., None, :2] * several * 100).sin()


def gradients(rank: int, world_size: int, folder: Path) -> None:
    if world_size > 1:
        dist.init_process_group("gloo", rank=rank, world_size=world_size)
    found = {}
    for name, (kind, spec) in CASES.items():
        for memory, alone in itertools.product((False, True), repeat=2):
            if memory and kind is MARWIL:
                continue
            torch.manual_seed(0)
            algorithm: Any = kind(spec=spec, network=LSTMNetwork if memory else None)
            algorithm.configure_model()
            if isinstance(algorithm, SAC):  # noise that depends on the row alone, not on how many there are
                algorithm.sample = lambda p, noise, a=algorithm: a.policy.distribution.rsample(
                    p, (p[..., :2] * 1e3).sin().detach()
                )
            if isinstance(algorithm, CQL):
                algorithm.draw_noise = functools.partial(draw_by_row, algorithm)
            share = 4 // world_size
            batch = minibatch(algorithm, spec, memory)
            if not alone:
                batch = batch[rank * share :][:share]
            elif world_size > 1:  # as a `ReplayFeed` has it where the second rank has no rows
                mask = torch.ones_like(batch["next", "terminated"]) if mask_of(batch) is None else batch["mask"]
                batch["mask"] = mask & (rank == 0)
            algorithm.optimize = lambda loss: loss.backward()
            algorithm.update(batch)
            for parameter, gradient in ((n, p.grad) for n, p in algorithm.named_parameters() if p.requires_grad):
                if world_size > 1:  # as DDP does
                    dist.all_reduce(gradient)
                    gradient /= world_size
                kind_of = f"{'memory' if memory else 'rows'}{', one rank alone' if alone else ''}"
                found[f"{name}, {kind_of}: {parameter}"] = gradient
    dreamer_gradients(rank, world_size, found)
    torch.save(found, folder / f"off-policy-{world_size}-{rank}.pt")
    if world_size > 1:
        dist.destroy_process_group()


def dreamer_gradients(rank: int, world_size: int, found: dict[str, torch.Tensor]) -> None:
    """Those of DreamerV3, on a share of four sequences."""
    torch.manual_seed(0)
    algorithm = DreamerV3(spec=DISCRETE, size="nano", horizon=3, return_rate=1.0)
    algorithm.configure_model()
    for head in (algorithm.model.reward, algorithm.critic):  # so that returns differ, and their percentiles matter
        torch.nn.init.normal_(head.logits.weight)
    g, n = torch.Generator().manual_seed(1), (4, 5)
    is_last = torch.rand(n, generator=g) < 0.3
    state = {name: torch.from_numpy(x) for name, x in algorithm.policy.initial_state(4).items()}
    batch = TensorDict(
        {
            "observation": torch.randn(*n, 3, generator=g), "previous_action": torch.randint(3, n, generator=g),
            "reward": torch.randn(n, generator=g), "is_first": torch.zeros(n, dtype=torch.bool), "is_last": is_last,
            "is_terminal": is_last, "state": state,
        },
        [4],
    )  # fmt: skip
    algorithm.draw_noise(batch)
    share = 4 // world_size
    algorithm.draw_noise = lambda batch: None  # type: ignore[method-assign]
    algorithm.optimize = lambda loss: loss.backward()  # type: ignore[assignment,method-assign]
    algorithm.update(batch[rank * share :][:share])
    for name, parameter in algorithm.named_parameters():
        if parameter.grad is not None:
            if world_size > 1:
                dist.all_reduce(parameter.grad)
                parameter.grad /= world_size
            found[f"DreamerV3, rows: {name}"] = parameter.grad


def train(folder: Path, run: str) -> None:
    name, *switches = run.split(",")
    continuous = name in ("SAC", "TQC")
    data = ReplayDataModule(
        "Pendulum-v1" if continuous else "CartPole-v1", num_envs_per_env_runner=2, max_env_steps=400, seed=0,
        learning_starts=100, batch_size=16, buffer_size=500, env_steps_per_batch=50, update_to_data=0.1,
        evaluation=Evaluation(episodes=3),
    )  # fmt: skip
    kind = CASES[name][0]
    algorithm = kind(network=functools.partial(MLP, hidden_sizes=[16]), **dict.fromkeys(switches, True))
    trainer = quiet_trainer(devices=2, strategy="ddp")
    trainer.fit(algorithm, data)
    trainer.save_checkpoint(folder / f"{run}.ckpt")
    first = data.buffer.sample(64)["observation"]
    state = {"weights": algorithm.state_dict(), "stored": len(data.buffer), "obs": first}
    torch.save(state | {"metrics": dict(trainer.callback_metrics)}, folder / f"train-{run}-{trainer.global_rank}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    out = Path(sys.argv[1])
    for case in sys.argv[2:]:
        if case == "gradients":
            gradients(int(os.environ["LOCAL_RANK"]), 2, out)
        else:
            torch.compile = lambda function, **_: function  # type: ignore[assignment]
            train(out, case)
