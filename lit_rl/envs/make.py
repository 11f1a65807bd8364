"""From what a user calls an environment (id, entry point, callable) to something that makes one."""

import functools
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Annotated, Any

import gymnasium as gym
from gymnasium.vector import AutoresetMode, VectorEnv

from lit_rl.envs.async_vector import AsyncVectorEnv
from lit_rl.envs.check import check_env, check_spaces, hidden_statistics
from lit_rl.envs.entry_points import Wrapper, check_arguments, entry_point, wrapper_of
from lit_rl.envs.multi_agent import ActionMasksFromInfo, MultiAgentEnv, MultiAgentWrapper, has_agents, has_masks_in_info
from lit_rl.envs.multi_agent_check import check_multi_agent_env
from lit_rl.envs.pettingzoo import adapted
from lit_rl.envs.vector import SyncVectorEnv
from lit_rl.errors import EnvError, OptionError, env_error
from lit_rl.options import Arguments, Limit, OneOf, OptionFields, check_fields
from lit_rl.spec import EnvSpec, MultiAgentSpec


class _Maker(Limit):
    """What makes an environment."""

    def accepts(self, value: Any) -> bool:
        return isinstance(value, str) or callable(value) or _makers_of(value) is not None

    def __repr__(self) -> str:
        return (
            "a gymnasium id such as 'CartPole-v1', 'package.module:Class', a callable that returns an environment (its "
            "class, or a function), or a module of PettingZoo"
        )


Env = Annotated[str | Callable[..., Any] | ModuleType, _Maker()]
Vectorization = Annotated[str, OneOf("sync", "async", "native")]


@dataclass(frozen=True)
class EnvConfig(OptionFields):
    """How to make an environment, one at a time or vectorised.

    Attributes:
        env: a gymnasium id, `"package.module:Class"`, or a callable that returns an environment; of several agents a
            `MultiAgentEnv`, or one of PettingZoo's, also as the module (or its name, "mpe2.simple_spread_v3") that has
            `parallel_env` or `env`.
        env_kwargs: passed to whichever of these makes it.
        wrappers: applied in order; each a callable, `"package.module:Class"`, or `{"package.module:Class": kwargs}`.
        vectorization: "sync" steps the environments one after the other in this process, "async" gives each a process
            of its own, "native" uses the environment's own vector form (its vector entry point; a callable is called
            with `num_envs=` and returns a `VectorEnv`).
    """

    env: Env
    env_kwargs: Arguments = field(default_factory=dict)
    wrappers: Sequence[Wrapper] = ()
    vectorization: Vectorization = "sync"

    def __post_init__(self) -> None:
        check_fields(self)
        if isinstance(self.env, ModuleType):
            object.__setattr__(self, "env", self.env.__name__)
        if isinstance(self.wrappers, str):
            raise OptionError(f"wrappers={self.wrappers!r}: expected a list.")

    @property
    def env_id(self) -> str:
        """How messages name the environment."""
        return self.env if isinstance(self.env, str) else getattr(self.env, "__qualname__", repr(self.env))

    def to_dict(self) -> dict[str, Any] | None:
        """The environment in plain data, or None where part of it is an object: a callable, an array."""
        described = {
            "env": self.env,
            "env_kwargs": self.env_kwargs,
            "wrappers": list(self.wrappers),
            "vectorization": self.vectorization,
        }
        return described if _is_plain(described) else None

    def make(self) -> gym.Env:
        """One environment.

        Raises:
            EnvError: if it cannot be found or made, or has several agents.
        """
        return self._checked(self._make_any())

    def make_multi_agent(self) -> MultiAgentEnv:
        """One environment of several agents, with their action masks in their observations.

        Raises:
            EnvError: if it cannot be found or made, or is none.
        """
        env = self._make_any()
        if not has_agents(env):
            raise EnvError(f"env={self.env_id} made a {type(env).__name__}: expected a MultiAgentEnv.")
        return self._with_masks(env)

    @functools.cached_property
    def is_multi_agent(self) -> bool:
        """Whether it is an environment of several agents: one is made to find out, unless that is known."""
        named = isinstance(self.env, str) and self.env in gym.registry
        if self.vectorization == "native" or named or (isinstance(self.env, type) and issubclass(self.env, gym.Env)):
            return False
        env = self._make_any()
        env.close()
        return has_agents(env)

    def known_to_be(self, is_multi_agent: bool) -> "EnvConfig":
        """The same, of which it need not be found out whether it is an environment of several agents."""
        self.__dict__["is_multi_agent"] = is_multi_agent
        return self

    def make_vector(
        self, num_envs: int, autoreset: AutoresetMode = AutoresetMode.SAME_STEP, info_keys: Sequence[str] = ()
    ) -> VectorEnv:
        """`num_envs` environments as one.

        Args:
            num_envs: how many.
            autoreset: the mode for "sync" and "async"; a native vector environment keeps its own.
            info_keys: what "sync" and "async" give of `info`.

        Raises:
            EnvError: if they cannot be found or made.
        """
        if self.vectorization == "native":
            return self._make_native(num_envs)
        makers = [self.make] * num_envs
        vector_class = SyncVectorEnv if self.vectorization == "sync" else AsyncVectorEnv
        return vector_class(makers, autoreset_mode=autoreset, env_id=self.env_id, info_keys=info_keys)

    def spec(self) -> EnvSpec:
        """The spaces, read from an environment that is made, tried out for one step and closed again.

        Raises:
            EnvError: if it cannot be made, does not keep to gymnasium's interface, or has several agents.
        """
        found = self.try_out()
        if isinstance(found, MultiAgentSpec):
            raise EnvError(f"env={self.env_id} made an environment of several agents: expected a gymnasium.Env.")
        return found

    def try_out(self) -> EnvSpec | MultiAgentSpec:
        """`spec`, or the agents and their spaces if there are several.

        Raises:
            EnvError: if it cannot be made, or does not keep to its interface.
        """
        native = self.vectorization == "native"
        env: Any = self._make_native(1) if native else self._make_any()
        try:
            if not native and has_agents(env):
                return self.known_to_be(True)._try_out_agents(env)
            if not native:
                env = self._checked(env)
                check_env(env, self.env_id)
            observation_space = env.single_observation_space if native else env.observation_space
            action_space = env.single_action_space if native else env.action_space
            if native:
                check_spaces(self.env_id, observation_space, action_space)
            advice = hidden_statistics(env)
            if advice:
                _warn_once(f"env={self.env_id}: {advice}")
            self.known_to_be(False)
            return EnvSpec(self.env_id, observation_space, action_space)
        finally:
            env.close()

    def _try_out_agents(self, env: MultiAgentEnv) -> MultiAgentSpec:
        if self.vectorization != "sync":
            raise OptionError(
                f"vectorization={self.vectorization!r}: env={self.env_id} has several agents, and its copies are "
                "stepped one after the other. Use 'sync', and more env runners."
            )
        return check_multi_agent_env(self._with_masks(env), self.env_id)

    def _with_masks(self, env: MultiAgentEnv) -> MultiAgentEnv:
        try:
            return ActionMasksFromInfo(env) if has_masks_in_info(env) else env
        except Exception as error:
            raise env_error(self.env_id, "raised in reset", error) from error

    def _make_any(self) -> Any:
        return self._wrap(self._construct(self.env_kwargs))

    def _checked(self, env: Any) -> gym.Env:
        """An environment, if it is one of one agent."""
        if isinstance(env, VectorEnv):
            raise EnvError(f"env={self.env_id} made a VectorEnv: set vectorization='native' to use it.")
        if not isinstance(env, gym.Env):
            found = "an environment of several agents" if has_agents(env) else f"a {type(env).__name__}"
            raise EnvError(f"env={self.env_id} made {found}: expected a gymnasium.Env.")
        return env

    def _make_native(self, num_envs: int) -> VectorEnv:
        if isinstance(self.env, str) and self._entry_point() is None:
            env_spec = _registered(self.env)
            if env_spec.vector_entry_point is None:
                raise OptionError(
                    f"vectorization='native': {self.env} has no vector entry point of its own. Use 'sync' or 'async'."
                )
            env = _call(
                self.env_id,
                gym.make_vec,
                env_spec.id,
                num_envs,
                vectorization_mode="vector_entry_point",
                **self.env_kwargs,
            )
        else:
            env = self._construct({**self.env_kwargs, "num_envs": num_envs})
        env = self._wrap(env)
        if not isinstance(env, VectorEnv):
            raise OptionError(
                f"vectorization='native': env={self.env_id} made a {type(env).__name__}, expected a "
                "gymnasium.vector.VectorEnv. Use 'sync' or 'async' for a single environment."
            )
        return env

    def _construct(self, kwargs: dict[str, Any]) -> Any:
        entry_point = self._entry_point()
        if entry_point is not None:
            return _call(self.env_id, entry_point, **kwargs)
        # What gymnasium's checker looks at once, lit_rl looks at in every step.
        return _call(self.env_id, gym.make, _registered(str(self.env)).id, **{"disable_env_checker": True, **kwargs})

    def _entry_point(self) -> Callable[..., Any] | None:
        """What makes the environment; None if gymnasium does, by its id."""
        if callable(self.env):
            return self.env
        name = str(self.env)
        if ":" not in name and "." in name and "/" not in name and name not in gym.registry:
            return _of_module(name)
        return entry_point(name)

    def _wrap(self, env: Any) -> Any:
        for wrapper in self.wrappers:
            wrapper, kwargs = wrapper_of(wrapper)
            if isinstance(env, VectorEnv) and isinstance(wrapper, type) and issubclass(wrapper, gym.Wrapper):
                raise OptionError(
                    f"wrappers: {wrapper.__name__} wraps one environment, and env={self.env_id} with vectorization="
                    "'native' is many in one. Use a gymnasium.vector.VectorWrapper, or vectorization='sync'."
                )
            if isinstance(wrapper, type) and issubclass(wrapper, MultiAgentWrapper):
                env = _call(self.env_id, adapted, env)
            if isinstance(wrapper, type) and has_agents(env) != issubclass(wrapper, MultiAgentWrapper):
                self._check_wrapper(wrapper, has_agents(env))
            check_arguments(wrapper, kwargs)
            env = _call(self.env_id, wrapper, env, **kwargs)
        return _call(self.env_id, adapted, env)

    def _check_wrapper(self, wrapper: type, has_agents: bool) -> None:
        """Refuse a wrapper of one agent around several, and one of several around one."""
        if has_agents and issubclass(wrapper, gym.Wrapper):
            raise OptionError(
                f"wrappers: {wrapper.__name__} wraps an environment of one agent, and env={self.env_id} has several. "
                "Use a lit_rl.envs.multi_agent.MultiAgentWrapper, or wrap the agents inside."
            )
        if not has_agents and issubclass(wrapper, MultiAgentWrapper):
            raise OptionError(
                f"wrappers: {wrapper.__name__} wraps an environment of several agents, and env={self.env_id} has one. "
                "Leave it out."
            )


def autoreset_mode(envs: VectorEnv) -> AutoresetMode:
    """How a vector environment starts the next episode.

    Raises:
        EnvError: if it does not say, since guessing wrong corrupts every episode's last transition.
    """
    mode = envs.metadata.get("autoreset_mode")
    if isinstance(mode, AutoresetMode):
        return mode
    for known in AutoresetMode:
        if mode is not None and str(getattr(mode, "value", mode)) in (known.value, known.name):
            return known
    raise EnvError(
        f"The vector environment {type(envs).__name__} says metadata['autoreset_mode']={mode!r}: expected one of "
        "gymnasium.vector.AutoresetMode. Set it in the environment's metadata."
    )


@functools.cache
def _warn_once(sentence: str) -> None:
    """Warn, unless this process did so before: an environment is tried out more than once."""
    from lightning.pytorch.utilities.rank_zero import (
        rank_zero_warn,  # the learner's alone: runners do without Lightning
    )

    rank_zero_warn(sentence)


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(item) for key, item in value.items())
    if isinstance(value, list | tuple):
        return all(_is_plain(item) for item in value)
    return value is None or type(value) in (bool, int, float, str)


def _makers_of(module: Any) -> Callable[..., Any] | None:
    """What makes the environment of a module as PettingZoo has them; None if it is none."""
    if not isinstance(module, ModuleType):
        return None
    return getattr(module, "parallel_env", None) or getattr(module, "env", None)


def _of_module(name: str) -> Callable[..., Any]:
    """What makes the environment of a module by its name."""
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        raise EnvError(
            f"env={name!r} is neither a registered gymnasium environment nor a module to import ({error}). "
            "PettingZoo's environments need lit-rl[multi-agent]."
        ) from error
    found = _makers_of(module)
    if found is None:
        raise EnvError(f"env={name!r}: the module has neither parallel_env nor env, as PettingZoo's have.")
    return found


def _whose(env_id: str) -> str:
    """Which package registers environments with this prefix, in a sentence; "" for one without."""
    prefix, slash, _ = env_id.partition("/")
    if not slash or ":" in env_id or any(known.startswith(f"{prefix}/") for known in gym.registry):
        return ""
    package = {"ALE": "ale_py"}.get(prefix)
    if package is None:
        return f" Write package:{env_id}, with the package that registers it."
    return f" Write {package}:{env_id}."


def _registered(env_id: str) -> Any:
    try:
        return gym.spec(env_id.rpartition(":")[2])  # "ale_py:ALE/Pong-v5": the module is imported by now
    except gym.error.Error as error:
        message = " ".join(str(error).split())
        raise EnvError(
            f"env={env_id!r} is not a registered gymnasium environment: {message}{_whose(env_id)}"
        ) from error


def _call(env_id: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    try:
        return function(*args, **kwargs)
    except Exception as error:
        raise env_error(env_id, "could not be made", error) from error
