"""What collecting and evaluating both do with agents that act: stack what they see, and take their actions apart."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from lit_rl.envs.copies import Asked
from lit_rl.errors import EnvError
from lit_rl.observations import complaint, out_of_range, stacked
from lit_rl.policy import Policy
from lit_rl.runners.fragment import put
from lit_rl.trees import Tree, find, map_tree


def observations(policy: Policy, asked: Sequence[Asked], num_slots: int) -> Tree:
    """What agents see, as rows [N, *obs] of their own: environments may write into what they gave.

    Args:
        policy: theirs.
        asked: the agents.
        num_slots: of each copy, so that errors can name it.

    Raises:
        EnvError: if one is not in the space, holds a class that does not exist, or a mask that allows no action.
    """
    spec = policy.spec
    space, seen = spec.observation_space, [one.obs for one in asked]

    def name(i: int) -> str:
        return f"agent {asked[i].agent!r} of copy {asked[i].slot // num_slots}"

    try:
        rows = stacked(space, seen)
    except (TypeError, ValueError, LookupError):
        for i, obs in enumerate(seen):
            problem = complaint(space, obs, "observation")
            if problem:
                raise EnvError(
                    f"env={spec.env_id}: {name(i)} was given what is not in its observation_space: {problem}. Mend the "
                    "environment."
                ) from None
        rows = stacked(space, seen, convert=True)
    rows = policy.as_rows(rows)
    for path, part in policy.class_spaces.items():
        wrong = np.flatnonzero(out_of_range(part, find(rows, path)).reshape(len(seen), -1).any(1))
        if len(wrong):
            raise EnvError(
                f"env={spec.env_id}: observation{f'[{path!r}]' if path else ''}={find(rows, path)[wrong[0]]} of "
                f"{name(wrong[0])}: expected a value in {part}. Mend the environment."
            )
    blocked = policy.blocked(rows)
    if blocked is not None:
        raise EnvError(
            f"env={spec.env_id}: the action_mask of {name(int(np.flatnonzero(blocked)[0]))} allows no action: expected "
            "at least one. End the episode there, or mend the mask."
        )
    return rows


def final_observation(policy: Policy, obs: Any) -> Tree:
    """An agent's final observation as a row [*obs].

    Raises:
        EnvError: if it is not in the space.
    """
    problem = complaint(policy.spec.observation_space, obs, "observation")
    if problem:
        raise EnvError(
            f"env={policy.spec.env_id}: an agent's final observation is not in its observation_space: {problem}. Mend "
            "the environment."
        )
    return policy.as_rows(obs)


def actions_of(policy: Policy, action: Tree) -> Iterator[Any]:
    """Recorded actions [N, *action] one by one, as an environment takes them."""
    return iter(_apart(policy.spec.action_space, policy.to_env(action)))


def sample(
    policy: Policy,
    obs: Tree,
    state: Tree,
    slots: np.ndarray,
    is_init: np.ndarray,
    step: Callable[[Tree, Tree], tuple[Tree, np.ndarray, Tree]],
) -> tuple[Tree, np.ndarray, Tree]:
    """Actions of agents [N], their log-probabilities and the states before them; the states after go into `state`.

    Args:
        policy: theirs.
        obs: what they see, [N, *obs].
        state: of all slots, [B, ...]; None without memory.
        slots: where they are, [N].
        is_init: which of them begin an episode, [N].
        step: chooses: `policy.sample`, or what does the same.
    """
    if state is None:
        action, log_prob, _ = step(obs, None)
        return action, log_prob, None
    before = map_tree(lambda x: x[slots], state)
    if is_init.any():
        before = policy.reset_state(before, is_init)
    action, log_prob, after = step(obs, map_tree(np.copy, before))  # a memory of one's own may write in place
    map_tree(lambda rows, x: put(rows, slots, x), state, after)
    return action, log_prob, before


def _apart(space: gym.Space, batch: Any) -> list[Any]:
    """A batch of actions as a list of them."""
    if isinstance(space, spaces.Dict):
        parts = {key: _apart(part, batch[key]) for key, part in space.spaces.items()}
        return [dict(zip(parts, values)) for values in zip(*parts.values())]
    if isinstance(space, spaces.Tuple):
        return list(zip(*(_apart(part, x) for part, x in zip(space.spaces, batch))))
    return np.asarray(batch).tolist() if isinstance(space, spaces.Discrete) else list(batch)
