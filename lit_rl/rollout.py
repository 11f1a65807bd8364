"""Rollouts: TensorDicts in torchrl's TED layout, with the next observations stored once.

Keys, each [B, T, ...]: `observation, action, action_log_prob, is_init, policy_version` and, under `"next"`, `reward,
terminated, truncated, done`; `mask` (True = a real transition) where not every row is one. Dict and Tuple spaces make
nested TensorDicts. With a policy that has memory, `state` [B, ...] is the state before the first step; where `is_init`
is True it is the initial one, whatever was before.

Row t's next observation is row t+1's observation, except for the last row (`last_observation` [B, *obs]) and for rows
that ended an episode: row `final_step[b, f]` of environment b has `final_observation[b, f]` ([B, F, *obs]; a
`final_step` of -1 is padding). The TensorDict's batch size is therefore [B]: it can be cut into environments, not into
times, without leaving a next observation behind. `rows` gives the real rows one by one, `sequences` pieces of L steps.

Where a critic is central, there is `central` beside every observation, `last_central` and `final_central` included: see
`lit_rl.central`.

Where time lines differ in length they are padded on the right and there is `length` [B]: row b's last step is
`length[b] - 1`, whose next observation is `last_observation[b]`; one of length 0 has nothing. `mask` is False in
padding, which may hold anything else. It never goes through a network.

Where some of it was learned from before, `is_new` [B] says which time lines were not.

Shapes: B envs, T steps, F final observations of an env, S sequences, L steps of each, N rows, D features.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from tensordict import TensorDict
from torch import Tensor

from lit_rl.distributed import masked_mean, row_means
from lit_rl.replay.stream import ReplayStream
from lit_rl.returns import real_steps
from lit_rl.trees import Tree, leaves, map_tree

OWN = ("observation",)  # what a critic sees
WITH_CENTRAL = ("observation", "central")  # what a central one sees
BEFORE_STEPS = ("state", "length")  # what time lines have once, not per step
CHUNK = 1024  # observations that a critic is given at a time: what it keeps of more would fill the memory


class Rollout(TensorDict):
    """A batch of rollouts, and how many env steps it brings.

    Attributes:
        env_steps: real transitions in it that are new, and those left out since they were too old; those of all ranks
            once it is a batch.
        has_rows: whether there is a real row on any rank, else there is nothing to learn.
    """

    env_steps: int = 0
    has_rows: bool = True

    def to(self, *args: Any, **kwargs: Any) -> "Rollout":
        moved = super().to(*args, **kwargs)
        moved.env_steps, moved.has_rows = self.env_steps, self.has_rows
        return moved


class Rollouts(dict[str, Rollout]):
    """Rollouts of several policies by their ids, all collected in the same env steps.

    Attributes:
        streams: by id, minibatches for the algorithms that learn from replay buffers.
        numbers: by id, of the policies it is of: see `PolicySet`.
        env_steps, has_rows: see `Rollout`.
    """

    def __init__(
        self,
        rollouts: Mapping[str, Rollout],
        streams: Mapping[str, ReplayStream] | None = None,
        numbers: Mapping[str, int] | None = None,
    ):
        super().__init__(rollouts)
        self.streams = dict(streams or {})
        self.numbers = dict(numbers or {})

    def is_of(self, policy_id: str, number: int) -> bool:
        """Whether it was collected when there was the policy of that number; True if it does not know."""
        return not self.numbers or self.numbers.get(policy_id) == number

    @property
    def env_steps(self) -> int:
        parts: list[Rollout | ReplayStream] = [*self.values(), *self.streams.values()]
        return parts[0].env_steps

    @property
    def has_rows(self) -> bool:
        return bool(self.streams) or any(rollout.has_rows for rollout in self.values())


def map_rollouts(function: Callable[[Rollout], Rollout], batch: Any) -> Any:
    """`function` of a rollout, or of each policy's."""
    if isinstance(batch, Rollouts):
        found = {policy_id: function(rollout) for policy_id, rollout in batch.items()}
        return Rollouts(found, batch.streams, batch.numbers)
    return function(batch)


def rollouts_in(batch: Rollout | Rollouts) -> list[Rollout]:
    """A rollout, or each policy's, as a list."""
    return list(batch.values()) if isinstance(batch, Rollouts) else [batch]


def next_values(rollout: TensorDict, critic: Callable[..., Tensor], keys: Sequence[str] = OWN) -> tuple[Tensor, Tensor]:
    """The critic's values of every row's observation and of its true next observation, each [B, T]; 0 in padding.

    One pass over the stored observations: those of the rows, the B last ones and the final ones.

    Args:
        rollout: [B, T].
        critic: the values [N] of what it sees, [N, ...] each.
        keys: what it is given of a rollout.
    """

    def values(seen: Tree) -> Tensor:
        """Of what is seen, [N, ...]."""
        chunks = range(0, len(leaves(seen)[0]), CHUNK)
        parts = [critic(*map_tree(lambda x, at=at: x[at : at + CHUNK], seen).values()) for at in chunks]
        return torch.cat(parts) if parts else rollout["next", "reward"].new_zeros(0)

    length, shape, seen, last_seen = length_of(rollout), rollout["next", "reward"].shape, *_seen(rollout, keys)
    if length is None:
        value = values(map_tree(lambda x: x.flatten(0, 1), seen)).view(shape)
        last = values(last_seen)
    else:
        real, some = real_steps(length, shape[1]), length > 0
        found = values(map_tree(lambda x: x[real], seen))
        value, last = found.new_zeros(shape), found.new_zeros(shape[0])
        value[real] = found
        last[some] = values(map_tree(lambda x: x[some], last_seen))
    return value, _shift(rollout, value, last, values(_finals(rollout, keys)))


def bootstrap_values(rollout: TensorDict, critic: Callable[..., Tensor], keys: Sequence[str] = OWN) -> Tensor:
    """The critic's values of the true next observations of rows whose next row is none of theirs, [B, T]; 0 elsewhere.

    These are rows that ended an episode, and the last one of each time line. For a critic whose values of the rows'
    own observations are known, or will be. Arguments as of `next_values`.
    """
    length, (_, last_seen) = length_of(rollout), _seen(rollout, keys)
    seen = map_tree(lambda x: x if length is None else x[length > 0], last_seen)
    found = critic(*map_tree(lambda last, final: torch.cat([last, final]), seen, _finals(rollout, keys)).values())
    last = found.new_zeros(len(rollout))
    count = len(leaves(seen)[0])
    last[... if length is None else length > 0] = found[:count]
    return _shift(rollout, found.new_zeros(rollout["next", "reward"].shape), last, found[count:])


def time_lines(rollout: TensorDict, *keys: str) -> TensorDict:
    """Some [B, T, ...] keys of a rollout as a batch [B] of whole time lines, for losses that look along them.

    Where there is padding it repeats a real step, without its `mask`, so that a network may be given all of it. Keys
    that are absent are left out; `mask`, `length` and `state` are there if the rollout has them.
    """
    batch = _without_padding(rollout, *keys, "mask")
    length, state = length_of(rollout), rollout.get("state", None)
    if length is not None:
        batch["length"] = length
    if state is not None:
        batch["state"] = state if length is None else map_tree(lambda x: x[_some_with_steps(length)], state)
    return batch


def more_padded(batch: TensorDict, num_lines: int, num_steps: int) -> TensorDict:
    """Time lines [B, T] of different lengths, of `time_lines`, with more padding: so many of them, and steps of each.

    It repeats real steps, as what is there does. Lines that are added have none of their own.
    """
    count, (lines, steps) = batch["length"], batch["mask"].shape
    line = torch.arange(num_lines, device=count.device)
    step = torch.arange(num_steps, device=count.device).clamp(max=steps - 1)
    at = line.clamp(max=lines - 1)
    found = _select(batch, [key for key, _ in batch.items() if key not in BEFORE_STEPS], lambda x: x[at][:, step])
    found |= _select(batch, BEFORE_STEPS, lambda x: x[at])
    found["length"] = torch.where(line < lines, found["length"], 0)
    for key in ("mask", "is_init"):
        found[key] = found[key] & real_steps(found["length"], num_steps)
    return TensorDict(found, [num_lines])


def power_of_2(least: int) -> int:
    """The smallest power of two that is at least so great: 1, 2, 4, 8, ..."""
    return 1 << (least - 1).bit_length()


def followed_by(value: Tensor, bootstrap: Tensor, done: Tensor, length: Tensor | None = None) -> Tensor:
    """The values of the next observations [B, T]: of the next rows, and of `bootstrap_values` where time lines end.

    >>> false = torch.zeros(1, 2, dtype=torch.bool)
    >>> followed_by(torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 3.0]]), false)
    tensor([[2., 3.]])
    """
    ends = done.clone()
    if length is None:
        ends[:, -1] = True
    else:
        ends |= ~real_steps(length - 1, value.shape[1])
    return torch.where(ends, bootstrap, value.roll(-1, 1))


def burnt_in(batch: TensorDict, num_steps: int) -> TensorDict:
    """Time lines [B, T] without their first `num_steps`, which become the `burn_in` part of `Policy.features`."""
    length = length_of(batch)
    found = _select(batch, [key for key, _ in batch.items() if key not in BEFORE_STEPS], lambda x: x[:, num_steps:])
    before = _select(batch, ("observation", "is_init"), lambda x: x[:, :num_steps])
    before["state"], before["real"] = batch["state"], torch.ones_like(batch["is_init"][:, 0])
    found |= {"burn_in": before, "state": batch["state"]}
    if length is not None:
        found["length"] = (length - num_steps).clamp(min=0)
    return TensorDict(found, batch.batch_size)


class Unrolled(NamedTuple):
    """What `next_values_with_memory` gives.

    Attributes:
        value, next_value: of the rows' observations and of their true next ones, [B, T].
        before: the states before every row, [B, T, ...]; where an episode begins they are not yet the initial one.
        last: the states after the last rows, [B, ...].
    """

    value: Tensor
    next_value: Tensor
    before: Tree
    last: Tree


def next_values_with_memory(
    rollout: TensorDict,
    unroll: Callable[..., tuple[Tensor, Tree]],
    head: Callable[[Tensor], Tensor],
    keys: Sequence[str] = OWN,
    state: Tree = None,
) -> Unrolled:
    """`next_values` where the critic is a head on features with memory; and the states before every row.

    Args:
        rollout: with `is_init`.
        unroll: the policy's, or the critic's own: what is seen [B, T, ...] each, state [B, ...] and `is_init` [B, T] to
            features [B, T, D] and the states after each step [B, T, ...].
        head: features [*B, D] to values [*B].
        keys: what it is given of a rollout.
        state: before the first rows, [B, ...]; None takes the rollout's, which is the policy's.
    """
    steps, length = _without_padding(rollout, *keys, "is_init"), length_of(rollout)
    state = rollout["state"] if state is None else state
    features, after = unroll(*(steps[key] for key in keys), state, steps["is_init"])
    before = _one_later(state, after)
    value = head(features)

    def values(seen: dict[str, Tree], states: Tree) -> Tensor:
        """Of what is seen once, [N, ...], after the steps that led to `states`."""
        one = map_tree(lambda x: x[:, None], seen)
        never = torch.zeros(len(leaves(seen)[0]), 1, dtype=torch.bool, device=value.device)
        features = unroll(*one.values(), states, never)[0] if len(never) else None
        return value.new_zeros(0) if features is None else head(features.squeeze(1))

    _, last_seen = _seen(rollout, keys)
    if length is None:
        ends = map_tree(lambda x: x[:, -1], after)
        last = values(last_seen, ends)
    else:
        value = torch.where(real_steps(length, value.shape[1]), value, 0.0)
        some, last = (length > 0).nonzero().squeeze(1), value.new_zeros(len(length))
        ends = map_tree(torch.clone, state)
        map_tree(lambda end, x: end.index_copy_(0, some, x[some, length[some] - 1]), ends, after)
        last[some] = values(map_tree(lambda x: x[some], last_seen), map_tree(lambda x: x[some], ends))
    b, f = (rollout["final_step"] >= 0).nonzero(as_tuple=True)
    t = rollout["final_step"][b, f]
    final = values(_finals(rollout, keys), map_tree(lambda x: x[b, t], after))
    return Unrolled(value, _shift(rollout, value, last, final), before, ends)


def states_before(rollout: TensorDict, unroll: Callable[..., tuple[Tensor, Tree]]) -> Tree:
    """The policy's states before every row, [B, T, ...], as `Unrolled` has them; `unroll` is its own."""
    steps, state = _without_padding(rollout, "observation", "is_init"), rollout["state"]
    return _one_later(state, unroll(steps["observation"], state, steps["is_init"])[1])


def _one_later(first: Tree, after: Tree) -> Tree:
    """The states before every row, [B, T, ...], from the first ones, [B, ...], and those after every row."""
    return map_tree(lambda first, x: torch.cat([first[:, None], x[:, :-1]], 1), first, after)


def next_observation(rollout: TensorDict) -> Tree:
    """The true next observation of every row, [B, T, *obs]: a second copy, for who needs one."""
    parts = (rollout["observation"], rollout["last_observation"], _finals(rollout)["observation"])
    return map_tree(lambda obs, last, final: _shift(rollout, obs, last, final), *parts)


def rows(rollout: TensorDict, *keys: str) -> TensorDict:
    """The real rows [N] of some [B, T, ...] keys; those that are absent (such as `mask`) are left out.

    Where no row is real, the first one is there, so that a rank without any can compute what the others do.
    """
    found = _select(rollout, keys, lambda x: x.flatten(0, 1))
    mask, batch = mask_of(rollout), TensorDict(found, [len(leaves(found)[0])])
    return batch if mask is None else batch[_real(mask.flatten())]


def sequences(rollout: TensorDict, states: Mapping[str, Tree], length: int, burn_in: int, *keys: str) -> TensorDict:
    """Pieces [S, L, ...] of a rollout for networks with memory, of some [B, T, ...] keys and `is_init`.

    S = B * T / L, less the pieces without a real row; where none has any, the first is there. Each begins with the
    states [S, ...] it had. With burn-in there is a `burn_in` part as `Policy.features` takes it: the K steps before
    each piece and the state before those. A rollout's first pieces have none.

    Padding in a piece repeats a real step, without its `mask`.

    Args:
        rollout: whose T is a multiple of L, unless its time lines differ in length.
        states: before every row, [B, T, ...], by the key that they get. The policy's are the `state`.
        length: L.
        burn_in: K, at most L.
    """
    steps = _without_padding(rollout, *keys, "observation", "is_init", "mask", multiple_of=length)
    is_init, mask = steps["is_init"], steps.get("mask", None)
    begin = torch.arange(0, is_init.shape[1], length, device=is_init.device)
    found = _select(steps, (*keys, "is_init"), lambda x: x.unflatten(1, (len(begin), length)).flatten(0, 1))
    found |= {key: map_tree(lambda x: x[:, begin].flatten(0, 1), tree) for key, tree in states.items()}
    if burn_in:
        at = (begin[:, None] - burn_in + torch.arange(burn_in, device=begin.device)).clamp(min=0)
        before = _select(steps, ("observation", "is_init"), lambda x: x[:, at].flatten(0, 1))
        before["state"] = map_tree(lambda x: x[:, at[:, 0]].flatten(0, 1), states["state"])
        before["real"] = (begin >= burn_in).repeat(len(is_init))
        found["burn_in"] = before
    batch = TensorDict(found, [len(is_init) * len(begin)])
    return batch if mask is None else batch[_real(mask.unflatten(1, (len(begin), length)).flatten(0, 1).any(1))]


def mask_of(batch: TensorDict) -> Tensor | None:
    """The batch's `mask`, or None if every row is a real transition."""
    mask, length = batch.get("mask", None), batch.get("length", None)
    if mask is None and length is not None:
        return real_steps(length, batch["next", "reward"].shape[1])
    return mask


def length_of(rollout: TensorDict) -> Tensor | None:
    """How many steps each time line has, [B], or None if none is padded."""
    return rollout.get("length", None)


def new_rows(rollout: TensorDict) -> Tensor | None:
    """Which rows [B, T] are real and come for the first time, or None if all do."""
    mask, is_new = mask_of(rollout), rollout.get("is_new", None)
    if is_new is None:
        return mask
    is_new = is_new.unsqueeze(1).expand_as(rollout["is_init"])
    return is_new if mask is None else mask & is_new


def mean_of_rows(x: Tensor, batch: TensorDict) -> Tensor:
    """The mean of `x` [*N] over the real rows of a batch, such that the ranks' average is that over all ranks' rows."""
    return masked_mean(x, mask_of(batch), _row_count(batch))


def means_of_rows(batch: TensorDict, *values: Tensor) -> Tensor:
    """The mean of each of several values [*N] over the real rows of a batch, to be logged; else as `mean_of_rows`."""
    return row_means(mask_of(batch), *values, count=_row_count(batch))


def _row_count(batch: TensorDict) -> Tensor | None:
    """The ranks' mean number of real rows, if it was asked for: see `Algorithm.gradient_step`."""
    count = batch.get("row_count", None)
    return None if count is None else count.flatten()[0]


def _select(batch: TensorDict, keys: Sequence[str], function: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    values = {key: mask_of(batch) if key == "mask" else batch.get(key, None) for key in keys}
    return {key: map_tree(function, value) for key, value in values.items() if value is not None}


def _without_padding(rollout: TensorDict, *keys: str, multiple_of: int = 1) -> TensorDict:
    """Some [B, T, ...] keys in which each step of padding repeats its row's last real one, or one of another row.

    If time lines differ in length there are so many such steps that T is a multiple of a number.
    """
    length = length_of(rollout)
    if length is None:
        return TensorDict(_select(rollout, keys, lambda x: x), rollout.batch_size)
    num_steps = -(-rollout["next", "reward"].shape[1] // multiple_of) * multiple_of
    row = _some_with_steps(length)
    step = torch.minimum(torch.arange(num_steps, device=row.device), (length[row, None] - 1).clamp(min=0))
    found = _select(rollout, keys, lambda x: x[row[:, None], step])
    for key in {"is_init", "mask"} & found.keys():
        found[key] &= real_steps(length, num_steps)
    return TensorDict(found, rollout.batch_size)


def _some_with_steps(length: Tensor) -> Tensor:
    """For each time line [B] itself, or another one where it has no step."""
    return torch.where(length > 0, torch.arange(len(length), device=length.device), length.argmax())


def _real(mask: Tensor) -> Tensor:
    """Where a mask [N] is True; 0 if nowhere."""
    found = mask.nonzero().squeeze(1)
    return found if len(found) else found.new_zeros(1)


def _seen(rollout: TensorDict, keys: Sequence[str]) -> tuple[dict[str, Tree], dict[str, Tree]]:
    """Some keys of the rows, [B, T, ...], and the same of what follows the last ones, [B, ...]."""
    return {key: rollout[key] for key in keys}, {key: rollout[f"last_{key}"] for key in keys}


def _finals(rollout: TensorDict, keys: Sequence[str] = OWN) -> dict[str, Tree]:
    """Some keys of the final observations [N, ...], without padding, in the order of (b, f)."""
    b, f = (rollout["final_step"] >= 0).nonzero(as_tuple=True)
    return {key: map_tree(lambda x: x[b, f], rollout[f"final_{key}"]) for key in keys}


def _shift(rollout: TensorDict, x: Tensor, last: Tensor, final: Tensor) -> Tensor:
    """`x` [B, T, ...] one row later, with `last` [B, ...] at the ends and `final` [N, ...] where episodes ended."""
    length, final_step = length_of(rollout), rollout["final_step"]
    shifted = torch.cat([x[:, 1:], last[:, None] if length is None else x[:, -1:]], 1)
    if length is not None:
        b = length.nonzero().squeeze(1)
        shifted[b, length[b] - 1] = last[b]
    if len(final):
        b, f = (final_step >= 0).nonzero(as_tuple=True)
        shifted[b, final_step[b, f]] = final
    return shifted
