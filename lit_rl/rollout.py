"""Rollouts: TensorDicts in torchrl's TED layout, with the next observations stored once.

Keys, each [B, T, ...]: `observation, action, action_log_prob, is_init, policy_version` and, under `"next"`, `reward,
terminated, truncated, done`; `mask` (True = a real transition) where not every row is one.

Row t's next observation is row t+1's observation, except for the last row (`last_observation` [B, *obs]) and for rows
that ended an episode: row `final_step[b, f]` of environment b has `final_observation[b, f]` ([B, F, *obs]; a
`final_step` of -1 is padding). The TensorDict's batch size is therefore [B]: it can be cut into environments, not into
times, without leaving a next observation behind. `rows` gives the [B * T] form.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from tensordict import TensorDict
from torch import Tensor

from lit_rl.runners.env_runner import Fragment

NEXT = ("reward", "terminated", "truncated")


def to_rollout(fragments: Sequence[Fragment], *, copy: bool) -> TensorDict:
    """One rollout [B] of all fragments, stacked along B.

    Args:
        fragments: of equal T.
        copy: whether the result must own its memory, because the fragments' is read-only (from Ray).
    """
    parts = [fragment.rows.views() | fragment.finals.views() for fragment in fragments]
    width = max(part["final_step"].shape[1] for part in parts)
    for part in parts:
        missing = width - part["final_step"].shape[1]
        if missing:
            part["final_step"] = _pad(part["final_step"], missing, -1)
            part["final_observation"] = _pad(part["final_observation"], missing, 0)
    if len(parts) == 1 and not copy:
        columns = {name: torch.from_numpy(array) for name, array in parts[0].items()}
    else:
        columns = {name: torch.from_numpy(np.concatenate([part[name] for part in parts])) for name in parts[0]}
    batch, length = columns["reward"].shape
    version = np.repeat([fragment.policy_version for fragment in fragments], [len(part["reward"]) for part in parts])
    columns["policy_version"] = torch.from_numpy(version)[:, None].expand(batch, length)
    next_ = {name: columns.pop(name) for name in NEXT}
    next_["done"] = next_["terminated"] | next_["truncated"]
    return TensorDict({**columns, "next": TensorDict(next_, [batch])}, [batch])


def next_values(rollout: TensorDict, critic: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """The critic's values of every row's observation and of its true next observation, each [B, T].

    One pass over the stored observations: those of the rows, the B last ones and the final ones.
    """
    obs, last, final = (rollout[f"{name}observation"] for name in ("", "last_", "final_"))
    sizes = [obs.shape[0] * obs.shape[1], last.shape[0], final.shape[0] * final.shape[1]]
    values = critic(torch.cat([obs.flatten(0, 1), last, final.flatten(0, 1)]))
    value, last_value, final_value = values.split(sizes)
    value = value.view(obs.shape[:2])
    return value, _shift(value, last_value, final_value.view(final.shape[:2]), rollout["final_step"])


def next_observation(rollout: TensorDict) -> Tensor:
    """The true next observation of every row, [B, T, *obs]: a second copy, for who needs one."""
    obs, last, final = (rollout[f"{name}observation"] for name in ("", "last_", "final_"))
    return _shift(obs, last, final, rollout["final_step"])


def rows(rollout: TensorDict, *keys: str) -> TensorDict:
    """The [B * T] rows of some [B, T, ...] keys; those that are absent (such as `mask`) are left out."""
    present = set(rollout.keys())
    found = {key: rollout[key].flatten(0, 1) for key in keys if key in present}
    return TensorDict(found, [len(next(iter(found.values())))])


def mask_of(batch: TensorDict) -> Tensor | None:
    """The batch's `mask`, or None if every row is a real transition."""
    return batch.get("mask", None)


def count_rows(rollout: TensorDict) -> int:
    """Real transitions in this rank's rollout."""
    mask = mask_of(rollout)
    return rollout["action_log_prob"].numel() if mask is None else int(mask.sum())


def _shift(x: Tensor, last: Tensor, final: Tensor, final_step: Tensor) -> Tensor:
    """`x` [B, T, ...] one row later, with `last` [B, ...] at the end and `final` [B, F, ...] at `final_step` [B, F]."""
    shifted = torch.cat([x[:, 1:], last[:, None]], 1)
    b, f = (final_step >= 0).nonzero(as_tuple=True)
    shifted[b, final_step[b, f]] = final[b, f]
    return shifted


def _pad(array: np.ndarray, missing: int, value: int) -> np.ndarray:
    padding = [(0, 0), (0, missing)] + [(0, 0)] * (array.ndim - 2)
    return np.pad(array, padding, constant_values=value)
