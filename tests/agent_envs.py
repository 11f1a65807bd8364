"""Multi-agent environments that write down what every transition is, to be held against what a runner recorded."""

import contextlib
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
from envs import OurFault
from gymnasium import spaces

from lit_rl.envs.multi_agent import MultiAgentEnv

MADE: list["LoggedAgents"] = []  # all that were made since a test emptied it


class Transition(NamedTuple):
    """What an agent did, and what came of it; `next` is None where it is nobody's business."""

    agent: int
    obs: int
    action: int
    reward: float
    next: int | None
    terminated: bool
    truncated: bool


class LoggedAgents(MultiAgentEnv):
    """An agent's observation is 100 * life + own turn, and its number; lives are counted over all episodes.

    Rewards go to anybody at any time, also to those who are dead or did not act yet. What happens does not depend on
    the actions.

    Args:
        mode: "turns" (one after the other; all leave at once, each in its way), "together" (all act, and leave, at
            once), "random" (they appear, wait, leave and come again), "once" (each acts once and leaves as the next
            appears), "cars" (ids that are not known beforehand, at most `num_agents` of them at a time).
        num_agents: how many.
        names: theirs.
        shuffled: give dicts in an order of their own.
        raises_at: the step of its life at which it raises.
        forgets: count lives from 0 in each seeded episode, which then depends on its seed alone.
    """

    def __init__(
        self,
        mode: str,
        num_agents: int = 2,
        names: Sequence[str] = ("a", "b", "c", "d"),
        shuffled: bool = False,
        raises_at: int | None = None,
        forgets: bool = False,
    ):
        self.possible_agents = ["car_*"] if mode == "cars" else list(names[:num_agents])
        if mode == "cars":
            self.max_agents = num_agents
        self._mode, self._num, self._raises_at, self._forgets = mode, num_agents, raises_at, forgets
        self._rng, self._order = np.random.default_rng(0), np.random.default_rng(1) if shuffled else None
        self._lives, self._steps, self._named = 0, 0, 0
        self.log: list[Transition] = []
        self.totals: list[dict[str, float]] = []
        MADE.append(self)

    def observation_space(self, agent: str) -> gym.Space:
        return spaces.Box(-1.0, 1e6, (2,))

    def action_space(self, agent: str) -> gym.Space:
        return spaces.Discrete(3)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[dict, dict]:
        if seed is not None:
            self._rng = np.random.default_rng(seed)
            if self._forgets:
                self._lives, self._named = 0, 0
        self._t, self._end = 0, int(self._rng.integers(3, 10))
        self._life: dict[str, list[int]] = {}  # of those that are there: life, own turn
        self._open: dict[str, list[Any]] = {}  # observation, action, reward of what they did last
        self._total: dict[str, float] = {}
        self._acting: list[str] = []
        if self._mode == "cars":
            first = self._cars(1 + int(self._rng.integers(self._num)))
        else:
            first = self.possible_agents[: 1 if self._mode in ("turns", "once") else None]
        return self._shuffle({agent: self._ask(agent) for agent in first}), {}

    def step(self, actions: dict[str, Any]) -> tuple[dict, dict, dict, dict, dict]:
        if set(actions) != set(self._acting):
            raise OurFault(f"{sorted(actions)} act: it is the turn of {self._acting}")
        self._steps += 1
        if self._steps == self._raises_at:
            raise ValueError("the simulator fell over")
        self._t += 1
        for agent, action in actions.items():
            self._open[agent][1] = int(action)
        reward = self._rewards()
        for agent, more in reward.items():
            self._total[agent] = self._total.get(agent, 0.0) + more
            if agent in self._open:
                self._open[agent][2] += more
        acted, self._acting = self._acting, []
        obs, terminated, truncated = {}, {}, {}
        for agent, (is_terminated, is_truncated) in self._leaving(acted).items():
            terminated[agent], truncated[agent] = is_terminated, is_truncated
            final = None
            if not is_terminated or self._rng.random() < 0.5:
                final = self._number(agent)
                obs[agent] = self._as_obs(agent, final)
            self._close(agent, None if is_terminated else final, is_terminated, is_truncated)
            del self._life[agent]
        for agent in self._next(terminated):
            if agent in self._life:
                self._close(agent, self._number(agent), False, False)
            obs[agent] = self._ask(agent)
        if not self._life:
            self.totals.append(dict(self._total))
        return *(self._shuffle(part) for part in (obs, reward, terminated, truncated)), {}

    def _leaving(self, acted: list[str]) -> dict[str, tuple[bool, bool]]:
        """Who leaves now, and why."""
        there = list(self._life)
        if self._mode == "once":
            gone = acted
        elif self._t >= self._end:
            gone = there
        elif self._mode in ("random", "cars"):
            gone = [agent for agent in there if self._rng.random() < 0.2]
        else:
            gone = []
        ways = [(True, False), (False, True), (True, True)]
        return {agent: ways[self._rng.integers(3)] for agent in gone}

    def _next(self, gone: dict[str, bool]) -> list[str]:
        """Who acts next."""
        there = [agent for agent in self._life if agent not in gone]
        if self._mode == "once":
            return self.possible_agents[self._t : self._t + 1]
        if self._t >= self._end:
            return []
        if self._mode == "turns":
            return [self.possible_agents[self._t % self._num]]
        if self._mode == "together":
            return there
        there = [agent for agent in there if self._rng.random() < 0.6]
        if self._mode == "random":
            new = [a for a in self.possible_agents if a not in self._life and a not in gone]
        else:
            new = self._cars(self._num - len(self._life))
        return [*there, *(agent for agent in new if self._rng.random() < 0.3)]

    def _cars(self, num: int) -> list[str]:
        """New ids."""
        self._named += num
        return [f"car_{i}" for i in range(self._named - num, self._named)]

    def _rewards(self) -> dict[str, float]:
        anybody = [*self._life] if self._mode == "cars" else self.possible_agents
        return {agent: float(self._rng.integers(-9, 10)) for agent in anybody if self._rng.random() < 0.7}

    def _ask(self, agent: str) -> np.ndarray:
        if agent not in self._life:
            self._life[agent] = [self._lives, 0]
            self._total.setdefault(agent, 0.0)
            self._lives += 1
        number = self._number(agent)
        self._open[agent] = [number, None, 0.0]
        self._life[agent][1] += 1
        self._acting.append(agent)
        return self._as_obs(agent, number)

    def _close(self, agent: str, following: int | None, terminated: bool, truncated: bool) -> None:
        number, action, reward = self._open.pop(agent)
        self.log.append(Transition(self._index(agent), number, action, reward, following, terminated, truncated))

    def _number(self, agent: str) -> int:
        life, turn = self._life[agent]
        return 100 * life + turn

    def _index(self, agent: str) -> int:
        return 0 if self._mode == "cars" else self.possible_agents.index(agent)

    def _as_obs(self, agent: str, number: int) -> np.ndarray:
        return np.array([number, self._index(agent)], np.float32)

    def _shuffle(self, part: dict[str, Any]) -> dict[str, Any]:
        if self._order is None:
            return part
        names = list(part)
        self._order.shuffle(names)
        return {name: part[name] for name in names}


class DiesOnce(LoggedAgents):
    """Ends its process in its 90th step, if no other one did so before.

    Args:
        marker: a file that says that one did.
        **options: of `LoggedAgents`.
    """

    def __init__(self, marker: str, **options: Any):
        super().__init__(**options)
        self._marker = Path(marker)

    def step(self, actions: dict[str, Any]) -> Any:
        if self._steps == 89:
            with contextlib.suppress(FileExistsError):  # two may be here at a time
                self._marker.touch(exist_ok=False)
                os._exit(1)
        return super().step(actions)


class Wrong(MultiAgentEnv):
    """Two agents that act at once; something about it is wrong.

    Args:
        how: what.
    """

    def __init__(self, how: str = ""):
        self.how = how
        self.possible_agents: Any = ["a", "b"]
        if how == "no agents":
            self.possible_agents = []
        if how == "numbers":
            self.possible_agents = [0, 1]
        if how == "pattern":
            self.possible_agents = ["a*", "b"]
        self._t = 0

    def observation_space(self, agent: str) -> Any:
        if self.how == "no space":
            return 4
        return spaces.Box(-1, 1, (3 if self.how == "spaces change" and self._t else 2,))

    def action_space(self, agent: str) -> Any:
        return spaces.Discrete(3 if self.how == "differ" and agent == "b" else 2)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> Any:
        self._t = 0
        if self.how == "reset":
            return {"a": np.zeros(2, np.float32)}
        if self.how == "all gone":
            return {}, {}
        return {agent: np.zeros(2, np.float32) for agent in ("a", "b")}, {}

    def step(self, actions: dict[str, Any]) -> Any:
        self._t += 1
        ended = self._t == 5
        obs = {agent: np.zeros(2, np.float32) for agent in ("a", "b")}
        reward, terminated, truncated = {"a": 1.0, "b": 1.0}, {"a": ended, "b": ended}, {}
        if self.how == "four":
            return obs, reward, terminated, {}
        if self.how == "stranger":
            obs["c"] = np.zeros(2, np.float32)
        if self.how == "reward of a stranger":
            reward["c"] = 1.0
        if self.how == "__all__":
            terminated["__all__"] = ended
        if self.how == "shape":
            obs["b"] = np.zeros(3, np.float32)
        if self.how == "reward":
            reward["b"] = None
        if self.how == "nan reward" and ended:
            reward["b"] = math.nan
        if self.how == "no final observation":
            truncated, terminated = {"b": True}, {}
            del obs["b"]
        return obs, reward, terminated, truncated, {}


class MaskedInTurns(MultiAgentEnv):
    """Two agents in turns, whose masks come in the info: an illegal action is our fault. Reward 1 for the lowest."""

    possible_agents = ("a", "b")

    def observation_space(self, agent: str) -> gym.Space:
        return spaces.Box(-1, 1, (2,))

    def action_space(self, agent: str) -> gym.Space:
        return spaces.Discrete(4)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[dict, dict]:
        self._rng = np.random.default_rng(seed)
        self._t = 0
        return self._show()

    def step(self, actions: dict[str, Any]) -> tuple[dict, dict, dict, dict, dict]:
        ((agent, action),) = actions.items()
        if not self._mask[action]:
            raise OurFault(f"{action} is illegal: {self._mask}")
        self._t += 1
        reward = {agent: float(action == self._mask.argmax())}
        if self._t == 9:
            return {}, reward, {"a": True, "b": True}, {}, {}
        obs, info = self._show()
        return obs, reward, {}, {}, info

    def _show(self) -> tuple[dict, dict]:
        agent = self.possible_agents[self._t % 2]
        self._mask = (self._rng.random(4) < 0.4).astype(np.int8)
        self._mask[self._rng.integers(4)] = 1
        return {agent: self._rng.uniform(-1, 1, 2).astype(np.float32)}, {agent: {"action_mask": self._mask}}


class Namers(MultiAgentEnv):
    """Two agents that see a number of three: "a" gets 1 for naming it, "b" for the next one. Episodes last four steps.

    "b" acts in every other step alone. What happens depends on an episode's seed and the actions.

    Args:
        scale: of what "b" sees.
    """

    possible_agents = ("a", "b")

    def __init__(self, scale: float = 1.0):
        self._scale = {"a": 1.0, "b": scale}

    def observation_space(self, agent: str) -> gym.Space:
        return spaces.Box(0.0, self._scale[agent], (3,))

    def action_space(self, agent: str) -> gym.Space:
        return spaces.Discrete(3)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[dict, dict]:
        self._rng, self._t = np.random.default_rng(seed), 0
        return self._show(), {}

    def step(self, actions: dict[str, Any]) -> tuple[dict, dict, dict, dict, dict]:
        right = {"a": self._number, "b": (self._number + 1) % 3}
        reward = {agent: float(action == right[agent]) for agent, action in actions.items()}
        self._t += 1
        if self._t == 4:
            return {}, reward, dict.fromkeys(self.possible_agents, True), {}, {}
        return self._show(), reward, {}, {}, {}

    def _show(self) -> dict[str, np.ndarray]:
        self._number = int(self._rng.integers(3))
        seen = np.eye(3, dtype=np.float32)[self._number]
        return {agent: seen * self._scale[agent] for agent in ("a", "b")[: 1 if self._t % 2 else 2]}
