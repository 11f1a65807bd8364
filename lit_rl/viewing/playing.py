"""A checkpoint plays its own environment, for people to watch."""

import contextlib
import importlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np

from lit_rl.envs.make import EnvConfig, Wrapper
from lit_rl.envs.multi_agent import MultiAgentWrapper
from lit_rl.errors import CheckpointError, OptionError
from lit_rl.evaluation.agent_episodes import play_agents
from lit_rl.evaluation.episodes import play
from lit_rl.files.loading import load_policy, read_checkpoint, section
from lit_rl.policy import Policy
from lit_rl.runners.fragment import Episode
from lit_rl.viewing.timeline import Timeline
from lit_rl.viewing.video import VideoFile, check_format, check_renders, framed, rendering

# Of what a file names, this alone is made unasked: a checkpoint from a stranger must not decide what is imported.
TRUSTED_WRAPPERS = (
    "gymnasium.wrappers",
    "lit_rl.envs.cartpole",
    "lit_rl.envs.multi_agent",
    "lit_rl.envs.teams",
    "lit_rl.envs.wrappers",
)
TRUSTED_ENVS = (
    "lit_rl.envs.coins:CoinGame",
    "lit_rl.envs.cooperation:Halves",
    "lit_rl.envs.cooperation:TwoStepGame",
    "lit_rl.envs.dm_control:DMControl",
    "lit_rl.envs.memory:DelayedCue",
    "lit_rl.envs.multi_agent:ReplicatedEnv",
    "lit_rl.envs.openspiel:OpenSpielEnv",
    "lit_rl.envs.pixels:FallingDot",
)
TRUSTED_PLUGINS = ("ale_py",)  # modules whose import registers environments: "ale_py:ALE/Pong-v5"


def environment_of(
    path: str | Path,
    env: str | None = None,
    env_kwargs: dict[str, Any] | None = None,
    wrappers: Sequence[Wrapper] | None = None,
) -> EnvConfig:
    """The environment a checkpoint was trained in.

    Args:
        path: the checkpoint.
        env, env_kwargs, wrappers: each in place of what the checkpoint says.

    Raises:
        CheckpointError: if the file is missing or damaged, if its environment was a callable, or if it names code that
            is neither gymnasium's nor lit_rl's, which only a caller may ask for.
    """
    found = section(read_checkpoint(path), path)
    saved = found.get("env")
    if saved is None:  # a callable, options that are no plain data, or a checkpoint of an older version
        env_id = found["policy"]["spec"]["env_id"]
        older = "env" not in found
        if env is None and not (older and env_id in gym.registry):
            why = "an older lit_rl wrote it" if older else "its run had none, or was given an object in place of a name"
            mend = env_id if env_id in gym.registry else "package.module:Class, or a gymnasium id"
            raise CheckpointError(
                f"Checkpoint {path} does not say how to make its environment {env_id}: {why}. Add --env {mend}."
            )
        saved = {"env": env_id, "env_kwargs": {}, "wrappers": [], "vectorization": "sync"}
    if env is None:
        _check_env(path, saved["env"], saved["env_kwargs"])
    if wrappers is None:
        for wrapper in saved["wrappers"]:
            _check_wrapper(path, wrapper, saved["wrappers"])
    return EnvConfig(
        env=saved["env"] if env is None else env,
        env_kwargs=saved["env_kwargs"] if env_kwargs is None else env_kwargs,
        wrappers=saved["wrappers"] if wrappers is None else wrappers,
        vectorization=saved["vectorization"] if saved["vectorization"] == "native" and env is None else "sync",
    )


def play_episodes(
    env: EnvConfig,
    policy: Policy,
    seeds: Sequence[int],
    *,
    deterministic: bool = True,
    video: str | Path | None = None,
    window: bool = False,
    timeout_s: float | None = None,
    timeline: Timeline | None = None,
) -> Iterator[Episode]:
    """Play whole episodes one after the other, and yield each as it ends.

    Args:
        env: how to make the environment.
        policy: what acts.
        seeds: one for each episode.
        deterministic: the most probable action, or a random one.
        video: an .mp4 or .gif file to record all episodes to; whole once the iterator is exhausted.
        window: show them, with `render_mode="human"`.
        timeout_s: seconds after which the episode under way is yielded as it is (`cut`), and no more begun.
        timeline: watches the episodes of several agents; each is over when it is yielded.

    Raises:
        OptionError: for a video of an environment that renders no pictures, or that cannot be written, and for the
            timeline of one agent.
        EnvError: if the environment raises.
    """
    if timeline is not None and not env.is_multi_agent:
        raise OptionError(
            f"--timeline: env={env.env_id} has one agent, of which every env step is a row with its own reward. Leave "
            "it out."
        )
    with contextlib.ExitStack() as stack:
        if video is not None:
            check_format("video", video)
            file = stack.enter_context(VideoFile(Path(video), check_renders(env)))
            shown = rendering(env, "rgb_array")
            env = replace(shown, wrappers=(*shown.wrappers, lambda made: framed(made, file.add)))
        elif window:
            env = rendering(env, "human")
        options: dict[str, Any] = {"deterministic": deterministic, "num_envs": 1, "timeout_s": timeout_s}
        if timeline is None:
            episodes = play(env, policy, seeds, **options)
        else:
            episodes = play_agents(env, policy, seeds, watcher=timeline, **options)
        stack.enter_context(contextlib.closing(episodes))  # type: ignore[type-var]
        # Not asked for more: it would begin another episode before it saw that there is none.
        yield from islice(episodes, len(seeds))


def episode_seeds(seed: int, episodes: int) -> list[int]:
    """A seed for each episode; the first ones are the same whatever the number."""
    return [int(np.random.SeedSequence(seed, spawn_key=(i,)).generate_state(1)[0]) for i in range(episodes)]


def load_player(
    path: str | Path,
    seed: int,
    network: str | None = None,
    policy_class: str | None = None,
    policies: dict[str, str] | None = None,
    policy_mapping: str | dict[str, str] | None = None,
) -> Policy:
    """`load_policy` with classes, scripts and a mapping by name, and the random numbers of a seed.

    Args:
        path: the checkpoint.
        seed: of random actions.
        network, policy_class: `package.module:Class`.
        policies: of scripts the class, which is made without arguments, or an object.
        policy_mapping: `package.module:function`; or a policy's id, or a dict of patterns and ids.

    Raises:
        OptionError: if a name leads nowhere.
        CheckpointError: see `load_policy`.
    """
    named = {"network": network, "policy_class": policy_class}
    found: dict[str, Any] = {name: _imported(name, value) for name, value in named.items() if value is not None}
    if policies is not None:
        found["policies"] = {policy_id: _script(f"policies.{policy_id}", name) for policy_id, name in policies.items()}
    if policy_mapping is not None:
        is_function = isinstance(policy_mapping, str) and ":" in policy_mapping
        found["policy_mapping"] = _imported("policy_mapping", policy_mapping) if is_function else policy_mapping
    policy = load_policy(path, **found)
    policy.rng = np.random.default_rng(seed)
    return policy


def _script(option: str, name: Any) -> Any:
    """The object of a name, or of the class that it names."""
    found = _imported(option, name)
    if not isinstance(found, type):
        return found
    try:
        return found()
    except Exception as error:
        raise OptionError(
            f"{option}={name!r}: {type(error).__name__}: {error}. Name an object, if the class needs arguments."
        ) from error


def _imported(option: str, name: Any) -> Any:
    module_name, _, attribute = str(name).partition(":")
    try:
        return getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        kind = "function" if option == "policy_mapping" else "Class"
        raise OptionError(f"{option}={name!r}: expected 'package.module:{kind}' ({error}).") from error


def _check_env(path: Any, env: Any, env_kwargs: dict[str, Any]) -> None:
    if env in TRUSTED_ENVS:
        if "env" in env_kwargs:  # it makes another
            _check_env(path, str(env_kwargs["env"]), {})
        for wrapper in env_kwargs.get("wrappers", ()):
            _check_wrapper(path, wrapper, env_kwargs["wrappers"])
        return
    module, colon, _ = env.rpartition(":")
    if (colon and module not in TRUSTED_PLUGINS) or (not colon and env not in gym.registry):
        is_module = "." in env and "/" not in env  # as PettingZoo's environments are named
        option = env if colon or is_module else f"package.module:{env} with the module that registers it"
        raise CheckpointError(
            f"Checkpoint {path} names the environment {env}, which is not gymnasium's own. A file does not decide what "
            f"is imported: if you trust it, add --env {option}."
        )


def _check_wrapper(path: Any, wrapper: Any, wrappers: Sequence[Any]) -> None:
    name = next(iter(wrapper)) if isinstance(wrapper, dict) else wrapper
    module, _, attribute = name.partition(":")
    if module in TRUSTED_WRAPPERS:
        found = getattr(importlib.import_module(module), attribute, None)
        if isinstance(found, type) and issubclass(found, gym.Wrapper | MultiAgentWrapper):
            return
    raise CheckpointError(
        f"Checkpoint {path} names the wrapper {name}, which is neither gymnasium's nor lit_rl's. A file does not "
        f'decide what is imported: if you trust it, add --wrappers "{list(wrappers)}".'
    )
