"""What collecting and evaluating both do with a vector environment: reset it, check and read what it gives."""

from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from lit_rl.envs.async_vector import AsyncVectorEnv
from lit_rl.envs.info import metric
from lit_rl.envs.make import EnvConfig
from lit_rl.envs.vector import SyncVectorEnv
from lit_rl.errors import EnvError, OptionError, env_error
from lit_rl.observations import out_of_range
from lit_rl.policy import Policy
from lit_rl.trees import Tree, find

OWN = (
    SyncVectorEnv,
    AsyncVectorEnv,
)  # they name an environment that raises; anything else they raise is a mistake here


def one_of(space: gym.Space, batched: Any, b: int) -> Any:
    """Environment b's part of observations gathered in an `info`: arrays of them, dicts of such, or objects."""
    if isinstance(space, spaces.Dict) and isinstance(batched, dict):
        return {key: one_of(part, batched[key], b) for key, part in space.spaces.items()}
    return batched[b]


def final_obs(policy: Policy, info: dict[str, Any], b: int) -> Tree:
    """Environment b's true final observation, of an episode that ended in a step in autoreset mode SAME_STEP.

    Raises:
        EnvError: if `info` does not have it.
    """
    found = info.get("final_obs")
    if found is None:
        raise EnvError(
            f"env={policy.spec.env_id}: an episode ended in autoreset mode SAME_STEP without info['final_obs'], "
            "so its last transition is unknown. Return it, or use another autoreset mode."
        )
    return policy.as_rows(one_of(policy.spec.observation_space, found, b))


def check_obs(policy: Policy, obs: Tree, lengths: np.ndarray, resetting: np.ndarray) -> None:
    """Refuse observations of classes that do not exist, or in which every action is illegal where one has to be chosen.

    Raises:
        EnvError: naming the environment and the step.
    """
    for path, space in policy.class_spaces.items():
        wrong = out_of_range(space, find(obs, path))
        if wrong.any():
            i = int(np.argwhere(wrong)[0][0])
            raise EnvError(
                f"env={policy.spec.env_id}: observation{f'[{path!r}]' if path else ''}={find(obs, path)[i]} of "
                f"environment {i} at step {lengths[i]} of its episode: expected a value in {space}. Mend the "
                "environment."
            )
    blocked = policy.blocked(obs)
    if blocked is not None:
        for b in np.flatnonzero(blocked & ~resetting):
            raise EnvError(
                f"env={policy.spec.env_id}: the action_mask of environment {b} allows no action at step {lengths[b]} "
                "of its episode: expected at least one. End the episode there, or mend the mask."
            )


def read_info(info: dict[str, Any], keys: Sequence[str], b: int) -> dict[str, float]:
    """The user's metrics of environment b, those that its `info` holds; one that is NaN counts as absent.

    Raises:
        EnvError: if one is not a number.
    """
    found = {}
    for key in keys:
        values = info.get(key)
        present = info.get(f"_{key}")
        if values is None or (present is not None and not present[b]):
            continue
        value = metric(key, values[b])
        if value is not None:
            found[key] = value
    return found


def reset(envs: Any, env: EnvConfig, seeds: Sequence[int | None] | None, mask: np.ndarray | None = None) -> Any:
    """Reset the environments, those of `mask` if there is one; what they raise becomes an EnvError that names them.

    A native vector environment is seeded by one number: the first seed, made to fit 31 bits as ale-py's has to.
    """
    seed: Any = seeds
    if seeds is not None and env.vectorization == "native":
        seed = None if seeds[0] is None else seeds[0] % 2**30
    options = None if mask is None else {"reset_mask": mask}
    if isinstance(envs, OWN):
        return envs.reset(seed=seed, options=options)
    try:
        return envs.reset(seed=seed, options=options)
    except Exception as error:
        raise env_error(env.env_id, "raised in reset", error) from error


def step(envs: Any, env: EnvConfig, actions: Any) -> Any:
    """Step the environments; what they raise becomes an EnvError that names them."""
    if isinstance(envs, OWN):
        return envs.step(actions)
    try:
        return envs.step(actions)
    except Exception as error:
        raise env_error(env.env_id, "raised in step", error) from error


def scale_rewards(rewards: np.ndarray, scale: float, clip: float | None) -> None:
    """Rewards as they are learned from, in place: multiplied, then clipped to plus or minus `clip`."""
    if scale != 1.0:
        rewards *= np.float32(scale)
    if clip is not None:
        np.clip(rewards, -clip, clip, out=rewards)


def check_spaces(envs: Any, policy: Policy) -> None:
    spec = policy.spec
    found = (envs.single_observation_space, envs.single_action_space)
    if found != (spec.observation_space, spec.action_space):
        raise OptionError(
            f"The policy was made for {spec.env_id} (observation {spec.observation_space}, action "
            f"{spec.action_space}), but the environment has observation {found[0]}, action {found[1]}. "
            "Use the environment and env_kwargs it was trained with."
        )
