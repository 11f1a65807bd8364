"""Reading minibatches of replayed transitions: see `ReplayBuffer.sample` and `sample_sequences` for their keys.

Shapes: M rows or, with memory, S sequences, L steps of each; F features, A actions, Z atoms.
"""

import numpy as np
import torch
from gymnasium import spaces
from tensordict import TensorDict
from torch import Tensor, nn

from lit_rl.policy import Policy
from lit_rl.rollout import mask_of, mean_of_rows
from lit_rl.trees import Tree, find, from_env, leaves, map_tree, space_leaves, to_numpy, to_torch

MAX_SHARE = 0.9  # of a sequence's priority that is its greatest TD error's; the rest is the mean's (R2D2, section 2.3)


def features(policy: Policy, batch: TensorDict) -> tuple[Tensor, Tensor]:
    """Features of a minibatch's observations and, without gradients, of the observations to bootstrap from.

    Each [M, F] or, with memory, [S, L, F].
    """
    if not policy.has_memory:
        return policy.features(batch), next_features(policy, batch)
    whole = _unrolled(policy, batch)
    return whole[:, :-1], _pick(whole[:, 1:].detach(), batch["bootstrap_row"])


@torch.no_grad()
def next_features(policy: Policy, batch: TensorDict) -> Tensor:
    """Features of the observations to bootstrap from, without gradients."""
    if not policy.has_memory:
        return policy.encoder(policy.inputs(batch["next", "observation"]))
    return _pick(_unrolled(policy, batch)[:, 1:], batch["bootstrap_row"])


def bootstrap_observation(batch: TensorDict) -> Tree:
    """The observations to bootstrap from, [M, *obs] or [S, L, *obs]."""
    if "bootstrap_row" not in batch.keys():  # noqa: SIM118
        return batch["next", "observation"]
    return map_tree(lambda x: _pick(x[:, 1:], batch["bootstrap_row"]), _with_last(batch))


def weighted_mean(loss: Tensor, batch: TensorDict) -> Tensor:
    """Mean of losses [M] or [S, L] over real rows, each times its importance weight if the replay is prioritised."""
    weight = batch.get("weight", None)
    if weight is not None:
        loss = loss * weight.reshape(-1, *[1] * (loss.ndim - 1))
    return mean_of_rows(loss, batch)


def of_action(outputs: Tensor, action: Tensor) -> Tensor:
    """What outputs [*N, A, Z] for all actions say of one action each [*N], [*N, Z]."""
    index = action[..., None, None].expand(*action.shape, 1, outputs.shape[-1])
    return outputs.gather(-2, index).squeeze(-2)


def set_priority(batch: TensorDict, td_error: Tensor) -> None:
    """Say by `priority` [M] or [S] how surprising the transitions or sequences were, if the replay is prioritised.

    A sequence's is 0.9 of its greatest absolute TD error and 0.1 of their mean (R2D2: Kapturowski et al. 2019).
    """
    if "weight" not in batch.keys():  # noqa: SIM118
        return
    size, mask = td_error.detach().abs(), mask_of(batch)
    if mask is not None:
        size = size * mask
    if mask is not None and mask.ndim > 1:
        mean = size.sum(1) / mask.sum(1).clamp(min=1)
        size = MAX_SHARE * size.amax(1) + (1 - MAX_SHARE) * mean
    batch["priority"] = size


# --- held-out rows --------------------------------------------------------------------------------------------------


def judged(batch: TensorDict, **values: Tensor) -> dict[str, Tensor]:
    """What `OffPolicy.judge` returns, of values [M] or [S, L]: of real rows, `initial_value` where episodes begin."""
    mask = mask_of(batch)
    real = torch.ones_like(batch["is_init"]) if mask is None else mask
    return {name: x[real & batch["is_init"] if name == "initial_value" else real] for name, x in values.items()}


def greedy_actions(policy: Policy, features: Tensor, obs: Tree) -> Tree:
    """The most probable actions [*N, *action], as recorded, for features [*N, F] of observations [*N, *obs]."""
    shape = features.shape[:-1]
    flat = map_tree(lambda x: x.flatten(0, len(shape) - 1), obs)
    action, _ = policy.choose(features.flatten(0, -2), flat, deterministic=True)
    return map_tree(lambda x: x.unflatten(0, shape), to_torch(action, features.device))


def action_difference(policy: Policy, action: Tree, other: Tree) -> Tensor:
    """How far recorded actions [*N, *action] are from others, [*N]; the mean over the parts of an action.

    Of a Box that is the mean absolute difference of what the environment gets, with its bounds scaled to [-1, 1]
    (numbers without bounds as they are); of anything else the share that differs.
    """
    action_space, parts = policy.spec.action_space, []
    here, there = (from_env(action_space, policy.to_env(to_numpy(tree))) for tree in (action, other))
    num_batch = leaves(action)[0].ndim - len(next(iter(space_leaves(action_space).values())).shape or ())
    for path, space in space_leaves(action_space).items():
        a, b = (np.asarray(find(tree, path)) for tree in (here, there))
        if isinstance(space, spaces.Box):
            half = (space.high.astype(np.float64) - space.low) / 2
            difference = np.abs(a.astype(np.float64) - b) / np.where(np.isfinite(half) & (half > 0), half, 1.0)
        else:
            difference = (a != b).astype(np.float64)
        parts.append(difference.reshape(*difference.shape[:num_batch], -1).mean(-1))
    device = leaves(action)[0].device
    return torch.as_tensor(np.mean(parts, 0), dtype=torch.float32, device=device)


def _with_last(batch: TensorDict) -> Tree:
    """The observations of sequences and the one after, [S, L + 1, *obs]."""
    return map_tree(
        lambda x, last: torch.cat([x, last.unsqueeze(1)], 1), batch["observation"], batch["last_observation"]
    )


def _unrolled(policy: Policy, batch: TensorDict) -> Tensor:
    """Features of sequences and of the observation after them, [S, L + 1, F]."""
    is_init = nn.functional.pad(batch["is_init"], (0, 1), value=False)
    whole = {"observation": _with_last(batch), "is_init": is_init, "state": batch["state"]}
    if "burn_in" in batch.keys():  # noqa: SIM118
        whole["burn_in"] = batch["burn_in"]
    return policy.features(whole)


def _pick(x: Tensor, row: Tensor) -> Tensor:
    """x [S, L, ...] at the rows [S, L] of each sequence."""
    sequence = torch.arange(len(x), device=x.device).unsqueeze(1)
    return x[sequence, row]
