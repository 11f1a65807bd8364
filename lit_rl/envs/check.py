"""One reset and one step of an environment before training: what it gets wrong is said in one sentence."""

import contextlib
from numbers import Real
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from lit_rl.distributions import distribution_for
from lit_rl.errors import EnvError, SpaceError, env_error
from lit_rl.masks import ACTION_MASK, ActionMasks, split_mask
from lit_rl.observations import complaint, short, stacked
from lit_rl.spec import EnvSpec, space_to_dict
from lit_rl.trees import map_tree, row_converter, space_leaves

NUMBERS = {float, int, np.float64, np.float32, np.int64}
FLAGS = {bool, np.bool_}
STATISTICS: dict[type, str] = {
    gym.wrappers.NormalizeObservation: "normalize_observations",
    gym.wrappers.vector.NormalizeObservation: "normalize_observations",
    gym.wrappers.NormalizeReward: "normalize_returns",
    gym.wrappers.vector.NormalizeReward: "normalize_returns",
}


def check_env(env: gym.Env, env_id: str) -> None:
    """Reset and step an environment once, and hold what it returns against gymnasium's interface.

    Raises:
        EnvError: naming the environment, what it returned and what was expected.
    """
    for name in ("observation_space", "action_space"):
        if not isinstance(getattr(env, name, None), gym.Space):
            raise EnvError(f"env={env_id}: {name}={getattr(env, name, None)!r}: expected a gymnasium.Space.")
    check_spaces(env_id, env.observation_space, env.action_space)
    result = _call(env_id, "reset", env.reset, seed=0)
    problem = reset_complaint(env.observation_space, result)
    if problem:
        raise EnvError(f"env={env_id}: reset returned {problem}.")
    spec = EnvSpec(env_id, env.observation_space, env.action_space)
    problem = step_complaint(env.observation_space, _call(env_id, "step", env.step, legal_action(spec, result[0])))
    if problem:
        raise EnvError(f"env={env_id}: step returned {problem}.")


def hidden_statistics(env: Any) -> str | None:
    """What to do about gymnasium's wrappers that keep running statistics, wherever they are; None without such."""
    found: dict[str, str] = {}
    while isinstance(env, gym.Wrapper | gym.vector.VectorWrapper):
        for kind, option in STATISTICS.items():
            if isinstance(env, kind):
                found[type(env).__name__] = option
        env = env.env
    if not found:
        return None
    options = " and ".join(f"{option}=True" for option in dict.fromkeys(found.values()))
    return (
        f"{' and '.join(found)}: the running statistics of such a wrapper begin anew in each environment, in "
        f"evaluation, in a resumed run and after load_policy. Leave it out, and set {options} of PPO, which keeps them."
    )


def check_spaces(env_id: str, observation_space: gym.Space, action_space: gym.Space) -> None:
    """Refuse spaces that nothing can be in, and those that lit_rl has no network or distribution for.

    Raises:
        SpaceError: naming the environment and the space.
    """
    try:
        for name, space in (("observation_space", observation_space), ("action_space", action_space)):
            for path, leaf in space_leaves(space, name).items():
                _check_leaf(path, leaf)
        space_to_dict(observation_space)
        distribution_for(action_space)
    except SpaceError as error:
        raise SpaceError(f"env={env_id}: {error}") from error


def _check_leaf(path: str, space: gym.Space) -> None:
    if isinstance(space, spaces.Discrete) and int(space.n) < 1:
        raise SpaceError(f"{path}={space}: expected at least one value. Mend the environment.")
    if isinstance(space, spaces.Box) and not (space.low <= space.high).all():
        raise SpaceError(
            f"{path}={short(space)}: expected low to be at most high, got low={short(space.low)}, "
            f"high={short(space.high)}. Mend the environment."
        )


def reset_complaint(observation_space: gym.Space, result: Any) -> str | None:
    """What is wrong with what `reset` returned, as the end of a sentence; None if nothing is."""
    if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], dict)):
        return f"{short(result)}: expected (observation, info)"
    problem = complaint(observation_space, result[0], "observation")
    return f"what is not in its observation_space: {problem}" if problem else None


def step_complaint(observation_space: gym.Space, result: Any) -> str | None:
    """What is wrong with what `step` returned, as the end of a sentence; None if nothing is."""
    if not (isinstance(result, tuple) and len(result) == 5 and isinstance(result[4], dict)):
        return f"{short(result)}: expected (observation, reward, terminated, truncated, info)"
    obs, reward, *flags, _ = result
    problem = complaint(observation_space, obs, "observation")
    if problem:
        return f"what is not in its observation_space: {problem}"
    if not isinstance(reward, Real | np.number) and not (isinstance(reward, np.ndarray) and reward.ndim == 0):
        return f"reward={short(reward)}: expected one number"
    for name, flag in zip(("terminated", "truncated"), flags):
        if not isinstance(flag, bool | np.bool_ | int):
            return f"{name}={short(flag)}: expected True or False"
    return None


def is_usual(observation_space: gym.Space, result: Any) -> bool:
    """Whether what `step` returned needs no closer look; quicker than `step_complaint`."""
    if not (result.__class__ is tuple and len(result) == 5 and result[4].__class__ is dict):
        return False
    obs, reward, terminated, truncated, _ = result
    if not (reward.__class__ in NUMBERS and terminated.__class__ in FLAGS and truncated.__class__ in FLAGS):
        return False
    with contextlib.suppress(TypeError, ValueError, LookupError):
        stacked(observation_space, [obs])
        return True
    return False


def legal_action(spec: EnvSpec, obs: Any) -> Any:
    """A random action that the observation's action mask, if it has one, allows."""
    mask_space = split_mask(spec.observation_space)[1]
    if mask_space is None:
        return spec.action_space.sample()
    distribution = distribution_for(spec.action_space)
    parameters = np.zeros((1, distribution.num_outputs + distribution.num_scales), np.float32)
    mask = row_converter(mask_space)(obs[ACTION_MASK])
    masks = ActionMasks(mask_space, spec.action_space, distribution)
    masks.apply_numpy(parameters, map_tree(lambda x: x[None], mask))
    action, _ = distribution.sample(parameters, np.random.default_rng(0))
    return distribution.to_env(map_tree(lambda x: x[0], action))


def _call(env_id: str, where: str, function: Any, *args: Any, **kwargs: Any) -> Any:
    try:
        return function(*args, **kwargs)
    except Exception as error:
        raise env_error(env_id, f"raised in {where}", error) from error
