"""Makes one rollout of the fragments that env runners collected. `lit_rl.rollout` describes its keys.

Shapes: B envs, T steps, F final observations of an env.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from lit_rl import distributed
from lit_rl.policy import Policy, PolicySet
from lit_rl.rollout import Rollout, Rollouts, length_of, mask_of
from lit_rl.runners.fragment import Fragment
from lit_rl.runners.ledger import Entry
from lit_rl.runners.time_lines import TimeLines
from lit_rl.trees import nest

NEXT = ("reward", "terminated", "truncated")


def to_rollout(fragments: Sequence[Fragment], *, copy: bool, num_new: int | None = None) -> Rollout:
    """One rollout [B] of all fragments, stacked along B.

    Args:
        fragments: of equal T, unless their time lines have a `length` each.
        copy: whether the result must own its memory, because the fragments' is read-only (from Ray).
        num_new: how many of the fragments, the first ones, are new; None: all, without an `is_new`.
    """
    parts = [fragment.rows.views() | fragment.finals.views() for fragment in fragments]
    longest = max(part["is_init"].shape[1] for part in parts)
    for part in parts:
        _lengthen(part, longest)
    width = max(part["final_step"].shape[1] for part in parts)
    has_length = any("length" in part for part in parts)
    has_mask = has_length or any("mask" in part for part in parts)
    for part in parts:
        if has_length and "length" not in part:
            part["length"] = np.full(len(part["is_init"]), part["is_init"].shape[1])
        if has_mask and "mask" not in part:
            part["mask"] = np.ones_like(part["is_init"])
            if has_length:
                part["mask"] &= np.arange(part["mask"].shape[1]) < part["length"][:, None]
        missing = width - part["final_step"].shape[1]
        for name in [name for name in part if missing and name.startswith("final_")]:
            part[name] = _pad(part[name], missing, -1 if name == "final_step" else 0)
    if len(parts) == 1 and not copy:
        columns = {name: torch.from_numpy(array) for name, array in parts[0].items()}
    else:
        columns = {name: torch.from_numpy(np.concatenate([part[name] for part in parts])) for name in parts[0]}
    batch, length = columns["reward"].shape
    if "policy_version" not in columns:
        versions = [fragment.policy_version for fragment in fragments]
        version = np.repeat(versions, [len(part["reward"]) for part in parts])
        columns["policy_version"] = torch.from_numpy(version)[:, None].expand(batch, length)
    next_ = {name: columns.pop(name) for name in NEXT}
    next_["done"] = next_["terminated"] | next_["truncated"]
    rollout = Rollout({**nest(columns), "next": next_}, [batch])
    rollout.env_steps = sum(fragment.entry.delivered for fragment in fragments)
    if num_new is not None:
        rollout["is_new"] = torch.arange(batch) < sum(len(part["reward"]) for part in parts[:num_new])
    return rollout


def to_rollouts(
    fragments: Sequence[Fragment],
    policies: PolicySet,
    learned: Sequence[str],
    version: int,
    *,
    copy: bool,
    num_new: int | None = None,
) -> Rollouts:
    """A rollout of each of several policies, see `to_rollout`.

    Fragments that were begun before a policy was added have no rows of it. If none has, its rollout is without a
    transition. What they have of policies that were removed since is left out.

    Args:
        fragments: of which each has a part for each policy that was trained then.
        policies: that there are now.
        learned: those that learn from rollouts.
        version: of the weights now.
        copy, num_new: see `to_rollout`.
    """
    found = {}
    for policy_id in learned:
        has_part = [fragment.has(policy_id, policies.numbers[policy_id]) for fragment in fragments]
        parts = [fragment.of(policy_id) for fragment, has in zip(fragments, has_part) if has]
        parts = parts or [nothing_of(policies.learned[policy_id], version)]
        new = None if num_new is None else sum(has_part[:num_new])
        found[policy_id] = to_rollout(parts, copy=copy, num_new=new)
        found[policy_id].env_steps = sum(fragment.entry.delivered for fragment in fragments)
    return Rollouts(found, numbers=policies.numbers)


def evened(rollout: Rollout, device: torch.device) -> Rollout:
    """A rank's rollout [B] as a batch: with environments that have no transitions, so that every rank has as many.

    Ranks then make equally many minibatches, and all of them have a `mask` if one has.
    """
    env_steps, mask, size = rollout.env_steps, mask_of(rollout), len(rollout)
    has_rows = mask is None or bool(mask.any())
    numbers = [size, -size, int(mask is not None), int(has_rows), env_steps, -env_steps]
    most, minus_fewest, masked, any_rows, most_steps, minus_fewest_steps = distributed.greatest(numbers, device)
    if most_steps != -minus_fewest_steps:
        env_steps = int(distributed.all_reduce_sum(torch.tensor(env_steps, device=device)))
    else:
        env_steps *= distributed.world_size()
    batch = padded(rollout, most, masked=bool(masked) or most != -minus_fewest)
    batch.env_steps, batch.has_rows = env_steps, bool(any_rows)
    return batch


def padded(rollout: Rollout, num_envs: int, *, masked: bool) -> Rollout:
    """A rollout [B] with environments of length 0 added, up to `num_envs`; `masked`: with a `mask`.

    They are copies of one that has steps, so that all they hold is legal.
    """
    missing = num_envs - len(rollout)
    if not missing and not masked:
        return rollout
    mask, length = mask_of(rollout), length_of(rollout)
    rollout["mask"] = mask = torch.ones_like(rollout["is_init"]) if mask is None else mask
    if not missing:
        return rollout
    if length is None:
        rollout["length"] = length = torch.full(mask.shape[:1], mask.shape[1], device=mask.device)
    together: Any = torch.cat([rollout, _without_steps(rollout[length.argmax()].expand(missing).clone())])
    return together


def nothing_like(rollout: Rollout) -> Rollout:
    """A rollout [1] without a transition, of the form of another."""
    nothing = Rollout({key: value[:1].clone() for key, value in rollout.items()}, [1])
    nothing["mask"] = torch.ones_like(nothing["is_init"])
    nothing["length"] = torch.zeros(1, dtype=torch.int64)
    return _without_steps(nothing)


def nothing_of(policy: Policy, version: int) -> Fragment:
    """A fragment [1] without a transition, of one of several policies."""
    spec, state = policy.spec, policy.initial_state(1)
    lines = TimeLines(spec, 1, state=state, keep_states=False, central=spec.central_space)
    rows, finals = lines.fragment(version)
    return Fragment(rows, finals, [], version, Entry(0, 0, 0, {}))


def _without_steps(rollout: Any) -> Any:
    rollout["final_step"].fill_(-1)
    rollout["mask"].fill_(False)
    rollout["length"].fill_(0)
    return rollout


def _lengthen(part: dict[str, np.ndarray], longest: int) -> None:
    """Pad the rows of a fragment whose time lines have a `length`, up to `longest`."""
    missing = longest - part["is_init"].shape[1]
    if not missing:
        return
    for name, array in part.items():
        if not name.startswith(("last_", "final_", "state")) and name != "length":
            part[name] = _pad(array, missing, 0)
    part["policy_version"][:, -missing:] = part["policy_version"].max()  # padding is of no other age than the rest


def _pad(array: np.ndarray, missing: int, value: int) -> np.ndarray:
    padding = [(0, 0), (0, missing)] + [(0, 0)] * (array.ndim - 2)
    return np.pad(array, padding, constant_values=value)
