"""Lightning batches of gradient updates."""

from collections.abc import Iterator
from typing import Any, Protocol

import lightning as L

from lit_rl.replay import ReplayStream


class Streams(Protocol):
    """A datamodule whose batches are streams of minibatches."""

    batches_per_epoch: int

    @property
    def attached_trainer(self) -> L.Trainer: ...

    def stream(self) -> ReplayStream: ...


class StreamLoader:
    """A sized, stateful iterable over one epoch's streams of minibatches."""

    def __init__(self, data: Streams):
        self._data = data

    def __len__(self) -> int:
        return self._data.batches_per_epoch

    def __iter__(self) -> Iterator[ReplayStream]:
        first = self._data.attached_trainer.fit_loop.batch_idx + 1  # not 0 in an epoch that is resumed in its middle
        for _ in range(first, len(self)):
            yield self._data.stream()

    def state_dict(self) -> dict[str, Any]:
        """Nothing, since Lightning's batch index says where in the epoch we are; its presence says that we resume."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to load."""
