"""Batches on their way to the learner's device."""

from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from lit_rl.rollout import Rollout, Rollouts, map_rollouts


class Transfer:
    """Moves batches to a device.

    To a GPU they go from pinned memory on a stream of their own. The GPU may still be at the update before, and nobody
    waits for it: the next update does, for its batch.
    """

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream | None = None

    def __call__(self, batch: Any, device: torch.device) -> Any:
        """A batch, or one for each policy, on a device; what is no batch stays as it is."""
        if isinstance(batch, Rollouts):
            return map_rollouts(lambda rollout: self(rollout, device), batch)
        return self._moved(batch, device) if isinstance(batch, TensorDict) else batch

    def _moved(self, batch: TensorDict, device: torch.device) -> TensorDict:
        if batch.device == device:
            return batch
        if device.type != "cuda":
            return batch.to(device)
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)
        user = torch.cuda.current_stream(device)

        def move(column: Tensor) -> Tensor:
            moved = column.pin_memory().to(device, non_blocking=True)
            moved.record_stream(user)  # else its memory could be given away while the update still needs it
            return moved

        with torch.cuda.stream(self._stream):
            there = batch.apply(move, device=device)
        user.wait_stream(self._stream)
        if isinstance(batch, Rollout):
            there.env_steps, there.has_rows = batch.env_steps, batch.has_rows
        return there
