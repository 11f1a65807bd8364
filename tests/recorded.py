"""Recorded rows with known answers, and how algorithms learn from them without an environment."""

from collections.abc import Iterator
from typing import Any

import lightning as L
import torch
from helpers import quiet_trainer
from tensordict import TensorDict
from torch import Tensor

from lit_rl.off_policy import OffPolicy
from lit_rl.replay import ReplayStream
from lit_rl.source import Source

ALONE = ""


class Drawn(L.LightningDataModule, Source):
    """Minibatches drawn from recorded rows [N]; with several policies from those of each in turn."""

    clock = "updates"

    def __init__(self, rows: TensorDict | dict[str, TensorDict], num_updates: int, batch_size: int = 64):
        super().__init__()
        self.rows = rows if isinstance(rows, dict) else {ALONE: rows}
        self.num_updates, self.batch_size, self.seed = num_updates, batch_size, 0

    @property
    def budget(self) -> int:
        return self.num_updates

    def train_dataloader(self) -> "Drawn":
        return self

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[ReplayStream]:
        yield ReplayStream(self._minibatches)

    def _minibatches(self, stream: ReplayStream) -> Iterator[tuple[str, TensorDict]]:
        generator = torch.Generator().manual_seed(1)
        for _ in range(self.num_updates):
            for policy_id, rows in self.rows.items():
                chosen = torch.randint(len(rows), (self.batch_size,), generator=generator)
                yield policy_id, rows[chosen].clone()


def learn(algorithm: Any, rows: TensorDict | dict[str, TensorDict], num_updates: int, **options: Any) -> L.Trainer:
    """So many updates on minibatches of recorded rows."""
    trainer = quiet_trainer(max_epochs=1, limit_val_batches=0, **options)
    trainer.fit(algorithm, Drawn(rows, num_updates))
    return trainer


def one_update(algorithm: OffPolicy, batch: TensorDict) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The metrics of an update, and the gradients of its loss; no step is taken."""
    algorithm.zero_grad()
    algorithm.optimize = lambda loss, optimizer=None: loss.backward() or True
    metrics = algorithm.update(batch)
    return metrics, {name: p.grad for name, p in algorithm.named_parameters() if p.grad is not None}


def bandit(num: int = 1000, good: float = 0.3, shuffled: bool = False, continuous: bool = False) -> TensorDict:
    """Episodes of one step in one of two states: the action that is like the state gives 1, the other one 0.

    A share `good` of the recorded actions are such. A continuous one is near 0.5 or -0.5. With `shuffled` rewards they
    say nothing.
    """
    g = torch.Generator().manual_seed(0)
    state = torch.randint(2, (num,), generator=g)
    is_good = torch.rand(num, generator=g) < good
    action = torch.where(is_good, state, 1 - state)
    reward = is_good.float()
    if shuffled:
        reward = reward[torch.randperm(num, generator=g)]
    obs = torch.nn.functional.one_hot(state, 2).float()
    if continuous:
        action = (action - 0.5 + 0.1 * torch.randn(num, generator=g)).unsqueeze(-1)
    return TensorDict(
        {
            "observation": obs, "action": action, "discount": torch.full((num,), 0.99),
            "return_to_go": reward, "to_go_discount": torch.zeros(num), "to_go_observation": obs,
            "is_init": torch.ones(num, dtype=torch.bool),
            "next": {"observation": obs, "reward": reward, "terminated": torch.ones(num, dtype=torch.bool)},
        },
        [num],
    )  # fmt: skip
