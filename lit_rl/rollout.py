"""Rollouts: TensorDicts in torchrl's TED layout, with the next observations stored once.

Keys, each [B, T, ...]: `observation, action, action_log_prob, is_init, policy_version` and, under `"next"`, `reward,
terminated, truncated, done`; `mask` (True = a real transition) where not every row is one. Dict and Tuple spaces make
nested TensorDicts. With a policy that has memory, `state` [B, ...] is the state before the first step; where `is_init`
is True it is the initial one, whatever was before.

Row t's next observation is row t+1's observation, except for the last row (`last_observation` [B, *obs]) and for rows
that ended an episode: row `final_step[b, f]` of environment b has `final_observation[b, f]` ([B, F, *obs]; a
`final_step` of -1 is padding). The TensorDict's batch size is therefore [B]: it can be cut into environments, not into
times, without leaving a next observation behind. `rows` gives the [B * T] form, `sequences` pieces of L steps.

Shapes: B envs, T steps, F final observations of an env, S sequences, L steps of each, D features.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from lit_rl.distributed import masked_mean, row_means
from lit_rl.trees import Tree, leaves, map_tree

CHUNK = 1024  # observations that a critic is given at a time: what it keeps of more would fill the memory


class Rollout(TensorDict):
    """A batch of rollouts, and how many env steps it brings.

    Attributes:
        env_steps: real transitions in it that are new, those of all ranks once it is a batch.
    """

    env_steps: int = 0

    def to(self, *args: Any, **kwargs: Any) -> "Rollout":
        moved = super().to(*args, **kwargs)
        moved.env_steps = self.env_steps
        return moved


def next_values(rollout: TensorDict, critic: Callable[[Tree], Tensor]) -> tuple[Tensor, Tensor]:
    """The critic's values of every row's observation and of its true next observation, each [B, T].

    One pass over the stored observations: those of the rows, the B last ones and the final ones.
    """

    def values(obs: Tree, num_dims: int) -> Tensor:
        shape = leaves(obs)[0].shape[:num_dims]
        rows = map_tree(lambda x: x.flatten(0, num_dims - 1), obs)
        chunks = range(0, shape.numel(), CHUNK)
        parts = [critic(map_tree(lambda x, at=at: x[at : at + CHUNK], rows)) for at in chunks]
        return torch.cat(parts).view(shape) if parts else rollout["next", "reward"].new_zeros(shape)

    value = values(rollout["observation"], 2)
    last, final = values(rollout["last_observation"], 1), values(rollout["final_observation"], 2)
    return value, _shift(value, last, final, rollout["final_step"])


def next_values_with_memory(
    rollout: TensorDict,
    unroll: Callable[[Tree, Tree, Tensor], tuple[Tensor, Tree]],
    head: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor, Tree]:
    """`next_values` where the critic is a head on features with memory; and the states before every row.

    Args:
        rollout: with `state` and `is_init`.
        unroll: the policy's: observations [B, T, *obs], state [B, ...] and `is_init` [B, T] to features [B, T, D]
            and the states after each step [B, T, ...].
        head: features [*B, D] to values [*B].

    Returns:
        Values, values of the true next observations, each [B, T], and states [B, T, ...]; where an episode begins the
        state is not yet the initial one.
    """
    is_init, state = rollout["is_init"], rollout["state"]
    features, after = unroll(rollout["observation"], state, is_init)
    before = map_tree(lambda first, x: torch.cat([first[:, None], x[:, :-1]], 1), state, after)
    value = head(features)

    def values(obs: Tree, states: Tree) -> Tensor:
        """Of one observation [N, *obs] each, seen after the steps that led to `states`."""
        one = map_tree(lambda x: x[:, None], obs)
        never = torch.zeros(len(leaves(obs)[0]), 1, dtype=torch.bool, device=is_init.device)
        return head(unroll(one, states, never)[0].squeeze(1))

    last = values(rollout["last_observation"], map_tree(lambda x: x[:, -1], after))
    final_step = rollout["final_step"]
    final = value.new_zeros(final_step.shape)
    if final_step.numel():
        b, f = (final_step >= 0).nonzero(as_tuple=True)
        states = map_tree(lambda x: x[b, final_step[b, f]], after)
        final[b, f] = values(map_tree(lambda x: x[b, f], rollout["final_observation"]), states)
    return value, _shift(value, last, final, final_step), before


def next_observation(rollout: TensorDict) -> Tree:
    """The true next observation of every row, [B, T, *obs]: a second copy, for who needs one."""
    parts = (rollout[f"{name}observation"] for name in ("", "last_", "final_"))
    return map_tree(lambda obs, last, final: _shift(obs, last, final, rollout["final_step"]), *parts)


def rows(rollout: TensorDict, *keys: str) -> TensorDict:
    """The [B * T] rows of some [B, T, ...] keys; those that are absent (such as `mask`) are left out."""
    found = _select(rollout, keys, lambda x: x.flatten(0, 1))
    return TensorDict(found, [len(leaves(found)[0])])


def sequences(rollout: TensorDict, states: Tree, length: int, burn_in: int, *keys: str) -> TensorDict:
    """Pieces [S, L, ...] of a rollout for policies with memory, S = B * T / L, of some [B, T, ...] keys and `is_init`.

    Each begins with the `state` [S, ...] it had. With burn-in there is a `burn_in` part as `Policy.features` takes it:
    the K steps before each piece and the state before those. A rollout's first pieces have none.

    Args:
        rollout: whose T is a multiple of L.
        states: before every row, [B, T, ...].
        length: L.
        burn_in: K, at most L.
    """
    is_init = rollout["is_init"]
    begin = torch.arange(0, is_init.shape[1], length, device=is_init.device)
    found = _select(rollout, (*keys, "is_init"), lambda x: x.unflatten(1, (len(begin), length)).flatten(0, 1))
    found["state"] = map_tree(lambda x: x[:, begin].flatten(0, 1), states)
    if burn_in:
        steps = (begin[:, None] - burn_in + torch.arange(burn_in, device=begin.device)).clamp(min=0)
        before = _select(rollout, ("observation", "is_init"), lambda x: x[:, steps].flatten(0, 1))
        before["state"] = map_tree(lambda x: x[:, steps[:, 0]].flatten(0, 1), states)
        before["real"] = (begin >= burn_in).repeat(len(is_init))
        found["burn_in"] = before
    return TensorDict(found, [len(is_init) * len(begin)])


def mask_of(batch: TensorDict) -> Tensor | None:
    """The batch's `mask`, or None if every row is a real transition."""
    return batch.get("mask", None)


def mean_of_rows(x: Tensor, batch: TensorDict) -> Tensor:
    """The mean of `x` [*N] over the real rows of a batch, such that the ranks' average is that over all ranks' rows."""
    return masked_mean(x, mask_of(batch), _row_count(batch))


def means_of_rows(batch: TensorDict, *values: Tensor) -> Tensor:
    """The mean of each of several values [*N] over the real rows of a batch, to be logged; else as `mean_of_rows`."""
    return row_means(mask_of(batch), *values, count=_row_count(batch))


def count_rows(rollout: TensorDict) -> int:
    """Real transitions in this rank's rollout."""
    mask = mask_of(rollout)
    return rollout["action_log_prob"].numel() if mask is None else int(mask.sum())


def _row_count(batch: TensorDict) -> Tensor | None:
    """The ranks' mean number of real rows, if it was asked for: see `Algorithm.gradient_step`."""
    count = batch.get("row_count", None)
    return None if count is None else count.flatten()[0]


def _select(rollout: TensorDict, keys: Sequence[str], function: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    present = set(rollout.keys())
    return {key: map_tree(function, rollout[key]) for key in keys if key in present}


def _shift(x: Tensor, last: Tensor, final: Tensor, final_step: Tensor) -> Tensor:
    """`x` [B, T, ...] one row later, with `last` [B, ...] at the end and `final` [B, F, ...] at `final_step` [B, F]."""
    shifted = torch.cat([x[:, 1:], last[:, None]], 1)
    b, f = (final_step >= 0).nonzero(as_tuple=True)
    shifted[b, final_step[b, f]] = final[b, f]
    return shifted
