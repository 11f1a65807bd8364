"""Several copies of a multi-agent environment, stepped one after the other: who is where, and what came of a step."""

import contextlib
import copy
import operator
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch

from lit_rl.envs.check import NUMBERS
from lit_rl.envs.info import metric
from lit_rl.envs.make import EnvConfig
from lit_rl.envs.multi_agent import MultiAgentEnv
from lit_rl.envs.multi_agent_check import checked_reset, checked_step, missing_final, spec_of, stranger
from lit_rl.envs.views import Views
from lit_rl.errors import EnvError, EnvFailure, env_error
from lit_rl.observations import short
from lit_rl.roster import Roster
from lit_rl.trees import Tree

BY_SLOT = operator.itemgetter(0)
DICT = {dict}
LONGEST_WAIT = 1_000  # env steps without anybody who acts
LONGEST = 100_000  # env steps: what a longer episode was given is not kept


class Asked(NamedTuple):
    """An agent that acts next.

    Attributes:
        slot: where it is, over all copies.
        agent: its id.
        obs: what it sees.
    """

    slot: int
    agent: str
    obs: Any


class Ended(NamedTuple):
    """An agent that left.

    Attributes:
        slot: where it was.
        terminated, truncated: why.
        obs: its final observation; None if it has none.
        central: what central critics then see, by kind, if it is only truncated.
    """

    slot: int
    terminated: bool
    truncated: bool
    obs: Any
    central: dict[str, Tree] | None = None


class Outcome(NamedTuple):
    """An episode of a copy that is over.

    Attributes:
        copy: its number.
        returns: of each agent that was there or got a reward: the undiscounted sum.
        length: env steps.
        info: the user's metrics, each the mean over the agents whose last `info` has it.
    """

    copy: int
    returns: dict[str, float]
    length: int
    info: dict[str, float]


@dataclass
class Events:
    """What a step of all copies brought, in the order in which it is to be taken in.

    Attributes:
        credited: rewards of agents that are there, each after its slot.
        uncredited: rewards of agents that are not there, each after the agent's id.
        dropped: slots of agents whose copy failed.
        ended: agents that left.
        again: slots of agents that act again: what they did last is complete.
        begun: slots in which an agent appeared.
        over: episodes that ended, with which nobody is left in their copies.
        failed: copies whose step raised.
    """

    credited: list[tuple[int, float]] = field(default_factory=list)
    uncredited: list[tuple[str, float]] = field(default_factory=list)
    dropped: list[int] = field(default_factory=list)
    ended: list[Ended] = field(default_factory=list)
    again: list[int] = field(default_factory=list)
    begun: list[int] = field(default_factory=list)
    over: list[Outcome] = field(default_factory=list)
    failed: list[int] = field(default_factory=list)


class Copies:
    """Copies of a multi-agent environment. Each agent of each copy is in a slot, `roster.num_slots` in each copy.

    Args:
        env: how to make them.
        num_envs: how many.
        info_keys: of `info`, what outcomes tell.
        remembers: whether what each copy was given since its episode began is kept, for `state`.
        recover: what is asked when copy b raises in "step" or "reset", or when it is made: returns the seed of the one
            that is made in its place, or raises. None: what it raised is an `EnvFailure`.
        central: kinds of inputs of central critics, see `central_space`.

    Attributes:
        roster: which agents there may be.
        views: those inputs; None if there are none.
    """

    def __init__(
        self,
        env: EnvConfig,
        num_envs: int,
        info_keys: Sequence[str] = (),
        recover: Callable[[int, str, Exception], int] | None = None,
        *,
        remembers: bool = False,
        central: Collection[str] = (),
    ):
        self._env, self._recover, self._remembers = env, recover, remembers
        envs = [self._made(b) for b in range(num_envs)]
        self.roster = Roster(envs[0].possible_agents, getattr(envs[0], "max_agents", None))
        self.views = Views(spec_of(envs[0], env.env_id), central, num_envs) if central else None
        self._copies = [_Copy(made, env.env_id, self.roster, b, info_keys, self.views) for b, made in enumerate(envs)]

    @property
    def num_slots(self) -> int:
        """Of all copies."""
        return len(self._copies) * self.roster.num_slots

    def spaces_of(self, name: str) -> tuple[gym.Space, gym.Space]:
        """The observation and the action space of an entry of `possible_agents`."""
        env = self._copies[0].env
        return env.observation_space(name), env.action_space(name)

    def has_agents(self, b: int) -> bool:
        """Whether an episode of copy b is under way."""
        return bool(self._copies[b].slots)

    def seed_of(self, b: int) -> int | None:
        """With which copy b's episode was begun."""
        return self._copies[b].seed

    def outcome(self, b: int) -> Outcome:
        """Of copy b's episode as it is now."""
        return self._copies[b].outcome(b)

    def asked(self) -> list[Asked]:
        """Those that act next, in the order of their slots."""
        return [asked for copy_ in self._copies for asked in copy_.asked]

    def begin(self, b: int, seed: int | None, events: Events) -> None:
        """Begin an episode in copy b, which is added to `events`."""
        try:
            found = self._copies[b].env.reset(seed=seed)
        except Exception as error:
            found, seed = self._rebuild(b, "reset", error)
        self._copies[b].begin(found, seed, events)

    def step(self, actions: Iterator[Any]) -> Events:
        """Step every copy in which an agent is, once.

        Args:
            actions: of those that are `asked`, as the environment takes them, in the same order.
        """
        events = Events()
        for b, copy_ in enumerate(self._copies):
            if not copy_.slots:
                continue
            given = {one[1]: next(actions) for one in copy_.asked}
            try:
                result = copy_.env.step(given)
            except Exception as error:
                found, seed = self._rebuild(b, "step", error)
                events.failed.append(b)
                copy_.drop(events)
                copy_.begin(found, seed, events)
                continue
            if self._remembers:
                copy_.remember(given)
            copy_.take(result, events)
            if not copy_.slots:
                events.over.append(copy_.outcome(b))
            elif not copy_.asked:
                copy_.check_wait()
        return events

    @property
    def env_id(self) -> str:
        return self._env.env_id

    def who(self, slot: int) -> str:
        """The agent in a slot, in words; where ids are not known beforehand the slot itself."""
        copy_, at = divmod(slot, self.roster.num_slots)
        names = self.roster.names
        return f"{f'agent {names[at]!r}' if len(names) == self.roster.num_slots else f'slot {at}'} of copy {copy_}"

    def state(self, b: int) -> dict[str, Any]:
        """How copy b's episode under way began, what it was given since, and what its agents see, in plain data."""
        copy_ = self._copies[b]
        seen = {one.agent: plain(one.obs) for one in copy_.asked}
        return {"seed": copy_.seed, "given": None if copy_.given is None else plain(copy_.given), "seen": seen}

    def begin_again(self, b: int, state: Mapping[str, Any]) -> bool:
        """Bring copy b to where an episode was, of which this is the `state`; returns whether it is there."""
        copy_, nothing = self._copies[b], Events()
        if state["seed"] is None or state["given"] is None:
            return False
        try:
            copy_.begin(copy_.env.reset(seed=state["seed"]), state["seed"], nothing)
            for given in from_plain(state["given"]):
                copy_.remember(given)
                copy_.take(copy_.env.step(given), nothing)
        except Exception:  # whatever it raised: it does not go on from there
            return False
        return _same(plain({one.agent: one.obs for one in copy_.asked}), state["seen"])

    def close(self) -> None:
        for copy_ in self._copies:
            copy_.env.close()

    def _made(self, b: int) -> MultiAgentEnv:
        while True:
            try:
                return self._env.make_multi_agent()
            except EnvFailure as error:
                if self._recover is None:
                    raise
                self._recover(b, "make", error)

    def _rebuild(self, b: int, what: str, error: Exception) -> tuple[Any, int]:
        """A new environment in the place of one that raised: what its reset returned, and the seed of that."""
        while True:
            if self._recover is None:
                raise env_error(self._env.env_id, f"raised in {what}", error) from error
            seed = self._recover(b, what, error)
            with contextlib.suppress(Exception):  # what failed may fail to close
                self._copies[b].env.close()
            what = "reset"
            try:
                self._copies[b].env = self._env.make_multi_agent()
                return self._copies[b].env.reset(seed=seed), seed
            except Exception as again:
                error = again


class _Copy:
    """One copy, and the slots of the agents that are there."""

    def __init__(
        self,
        env: MultiAgentEnv,
        env_id: str,
        roster: Roster,
        number: int,
        info_keys: Sequence[str],
        views: Views | None,
    ):
        self.env = env
        self.asked: list[Asked] = []
        self.slots: dict[str, int] = {}  # within the copy
        self.length = 0
        self.seed: int | None = None  # with which the episode was begun
        self.given: list[dict[str, Any]] | None = []  # since; None if that is too much
        self._env_id, self._roster, self._info_keys = env_id, roster, info_keys
        self._copy, self._first, self._views = number, number * roster.num_slots, views
        self._returns: dict[str, float] = {}
        self._asked_at = 0  # length of the episode when somebody was asked last
        self._infos: list[dict[str, float]] = []

    def begin(self, found: Any, seed: int | None, events: Events) -> None:
        """Take in what `reset` with a seed returned."""
        obs, _ = checked_reset(self._env_id, "reset", self._roster, found)
        self.seed, self.given = seed, []
        self.slots, self._returns, self._infos, self.length, self._asked_at = {}, {}, [], 0, 0
        if not obs:
            raise EnvError(
                f"env={self._env_id}: reset gave no observation: expected those of the agents that act first."
            )
        if self._views is not None:
            self._views.begin(self._copy)
        self._ask(obs, events)
        if self._views is not None:
            self._views.see_state(self._copy, self.env)

    def check_wait(self) -> None:
        """Nobody acts: that may be, but not for ever.

        Raises:
            EnvError: if nobody was asked for long.
        """
        if self.length - self._asked_at >= LONGEST_WAIT:
            raise EnvError(
                f"env={self._env_id}: nobody was asked to act for {LONGEST_WAIT} steps, though {sorted(self.slots)} "
                "are there. Give an observation of whoever acts next, or end their episodes."
            )

    def remember(self, given: dict[str, Any]) -> None:
        """Keep what a step was given."""
        if self.given is not None:
            self.given.append(given)
            if len(self.given) > LONGEST:
                self.given = None

    def drop(self, events: Events) -> None:
        """Forget the agents that are there."""
        events.dropped += [self._first + slot for slot in self.slots.values()]

    def take(self, result: Any, events: Events) -> None:
        """Take in what `step` returned."""
        if not (result.__class__ is tuple and len(result) == 5 and set(map(type, result)) == DICT):
            checked_step(self._env_id, self._roster, result)
        obs, reward, terminated, truncated, info = result
        slots, returns, first, credited = self.slots, self._returns, self._first, events.credited
        self.length += 1
        for agent, more in reward.items():
            if more.__class__ not in NUMBERS:
                more = self._number(agent, more)
            if agent in slots:
                credited.append((first + slots[agent], more))
                returns[agent] += more
            else:
                checked_step(self._env_id, self._roster, result)
                returns[agent] = returns.get(agent, 0.0) + more
                events.uncredited.append((agent, more))
        if not (any(terminated.values()) or any(truncated.values())):
            self._ask(obs, events)
            if self._views is not None:
                self._views.see_state(self._copy, self.env)
            return
        checked_step(self._env_id, self._roster, result)
        ended: list[tuple[str, Ended]] = []
        for agent in [agent for agent in slots if terminated.get(agent) or truncated.get(agent)]:
            flags = bool(terminated.get(agent)), bool(truncated.get(agent))
            final = obs.get(agent)
            if final is None and not flags[0]:
                raise missing_final(self._env_id, agent)
            final = final.copy() if isinstance(final, np.ndarray) else copy.deepcopy(final)
            ended.append((agent, Ended(first + slots.pop(agent), *flags, final)))
            if self._info_keys:
                self._read_info(info.get(agent, {}))
        self._ask({a: x for a, x in obs.items() if not (terminated.get(a) or truncated.get(a))}, events)
        events.ended += [one for _, one in ended] if self._views is None else self._viewed(self._views, ended)

    def _viewed(self, views: Views, ended: list[tuple[str, Ended]]) -> list[Ended]:
        """Agents that left, with what central critics see of the end: those that are truncated are still there."""
        again = {one.slot: one for one in self.asked}  # a slot may have a new agent at once
        for agent, (slot, terminated, _, obs, _) in ended:
            if not terminated:
                views.see(self._copy, slot - self._first, agent, obs)
            elif slot not in again:
                views.leave(self._copy, slot - self._first)
        if self.asked or not all(one.terminated for _, one in ended):
            views.see_state(self._copy, self.env)
        found = [one if one.terminated else one._replace(central=views.row(one.slot)) for _, one in ended]
        for one in found:
            new = again.get(one.slot)
            if new is None:
                views.leave(self._copy, one.slot - self._first)
            else:
                views.see(self._copy, one.slot - self._first, new.agent, new.obs)
        return found

    def outcome(self, b: int) -> Outcome:
        found: dict[str, list[float]] = {}
        for infos in self._infos:
            for key, value in infos.items():
                found.setdefault(key, []).append(value)
        return Outcome(b, dict(self._returns), self.length, {key: float(np.mean(x)) for key, x in found.items()})

    def _ask(self, obs: dict[str, Any], events: Events) -> None:
        """These agents act next; those that were not there appear."""
        asked, slots, first = [], self.slots, self._first
        for agent, x in obs.items():
            slot = slots.get(agent)
            if slot is None:
                slot = self._appear(agent)
                events.begun.append(first + slot)
            else:
                events.again.append(first + slot)
            asked.append(Asked(first + slot, agent, x))
            if self._views is not None:
                self._views.see(self._copy, slot, agent, x)
        if len(asked) > 1:  # not in the order of a dict, on which nothing must depend
            asked.sort(key=BY_SLOT)
        self.asked = asked
        if asked:
            self._asked_at = self.length

    def _appear(self, agent: str) -> int:
        if not isinstance(agent, str) or self._roster.name_of(agent) is None:
            raise stranger(self._env_id, "step returned an observation of", self._roster, agent)
        slot = self._roster.free_slot(agent, self.slots)
        if slot is None:
            raise EnvError(
                f"env={self._env_id}: agent {agent!r} appeared beside {sorted(self.slots)}: expected at most "
                f"{self._roster.num_slots} agents at a time. Raise the environment's max_agents."
            )
        self.slots[agent] = slot
        self._returns.setdefault(agent, 0.0)
        return slot

    def _number(self, agent: str, reward: Any) -> float:
        try:
            return float(reward)
        except (TypeError, ValueError) as error:
            raise EnvError(
                f"env={self._env_id}: step returned reward={short(reward)} for agent {agent!r}: expected one number. "
                "Mend the environment."
            ) from error

    def _read_info(self, info: Any) -> None:
        found = {}
        for key in self._info_keys:
            value = metric(key, info[key]) if isinstance(info, dict) and key in info else None
            if value is not None:
                found[key] = value
        self._infos.append(found)


def plain(value: Any) -> Any:
    """Actions and observations as plain data and tensors."""
    if isinstance(value, dict):
        return {key: plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(plain(part) for part in value)
    if isinstance(value, np.ndarray):
        return torch.from_numpy(np.array(value))
    return value.item() if isinstance(value, np.generic) else value


def from_plain(value: Any) -> Any:
    """What `plain` was given."""
    if isinstance(value, dict):
        return {key: from_plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(from_plain(part) for part in value)
    return value.numpy() if isinstance(value, torch.Tensor) else value


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    return bool(torch.equal(a, b)) if isinstance(a, torch.Tensor) else a == b


def returns_by_name(roster: Roster, returns: dict[str, float]) -> dict[str, float]:
    """Returns by entry of `possible_agents`: of a pattern the mean over its agents."""
    found: dict[str, list[float]] = {}
    for agent, value in returns.items():
        found.setdefault(str(roster.name_of(agent)), []).append(value)
    return {name: float(np.mean(found[name])) for name in roster.names if name in found}
