"""Which policy acts for which agent of copies of an environment, and what it remembers of it.

Shapes: B slots, N agents that act now by one policy.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from lit_rl.envs.copies import Asked, Copies, Events
from lit_rl.errors import OptionError
from lit_rl.policy import Policy, PolicySet
from lit_rl.policy.mapping import EpisodeInfo
from lit_rl.policy.scripted import Script
from lit_rl.runners.acting import actions_of, observations, sample
from lit_rl.spec import EnvSpec
from lit_rl.trees import Tree, iterate


class Actor:
    """A policy at work.

    Args:
        policy_id: its name; "" of one that acts for all.
        policy: what acts; None if a script does.
        script: what acts, if no policy does.
        spec: of its agents.
        num_slots: B.
    """

    def __init__(self, policy_id: str, policy: Policy | None, script: Script | None, spec: EnvSpec, num_slots: int):
        self.policy_id, self.policy, self.script, self.spec = policy_id, policy, script, spec
        self.state = None if policy is None else policy.initial_state(num_slots)


class Group(NamedTuple):
    """Agents that act now by one policy.

    Attributes:
        number: of the actor.
        places: of the agents among all that act now.
        asked: the agents.
        slots: theirs, [N].
        obs: what they see, [N, *obs]; None if a script acts.
    """

    number: int
    places: Sequence[int]
    asked: Sequence[Asked]
    slots: np.ndarray
    obs: Tree


class Choice(NamedTuple):
    """What a policy with weights chose: recorded actions, their log-probabilities, and the states before, [N, ...]."""

    action: Tree
    log_prob: np.ndarray
    before: Tree


class Cast:
    """The actors of all copies. An agent keeps its policy within an episode.

    Args:
        policy: of all agents, or several.
        copies: of the environment.

    Attributes:
        actors: those that may act.
        owner: number of the actor of each slot's agent.
        groups: the agents that act now, by policy.
    """

    def __init__(self, policy: Policy | PolicySet, copies: Copies):
        num, self._copies = copies.num_slots, copies
        self._set = policy if isinstance(policy, PolicySet) else None
        if isinstance(policy, PolicySet):
            self.actors = [self._actor(policy, policy_id) for policy_id in policy.ids]
            self._numbers = {policy_id: number for number, policy_id in enumerate(policy.ids)}
        else:
            self.actors = [Actor("", policy, None, policy.spec, num)]
        self.owner = [0] * num
        self.groups: list[Group] = []
        self._is_init = np.zeros(num, np.bool_)
        size = num // copies.roster.num_slots
        self._given: list[dict[str, int]] = [{} for _ in range(size)]  # agents' actors in each copy's episode
        self._infos: list[EpisodeInfo | None] = [None] * size
        self._checked: set[tuple[str, int]] = set()
        if self._set is None:
            for name in copies.roster.names:
                self._check(name, 0)

    def follow(self, policies: PolicySet) -> list[int]:
        """Have other policies act from now on. Those that were there too go on, and agents keep them.

        Returns:
            The copies in whose episodes a policy acted that is not there any more: each is to begin another one.
        """
        before = self._set
        assert before is not None
        kept = {i: self.actors[self._numbers[i]] for i in policies.ids if policies.is_kept(i, before)}
        moved = {self._numbers[i]: number for number, i in enumerate(policies.ids) if i in kept}
        self._set, self._checked = policies, set()
        self.actors = [kept.get(policy_id) or self._actor(policies, policy_id) for policy_id in policies.ids]
        self._numbers = {policy_id: number for number, policy_id in enumerate(policies.ids)}
        self.owner = [moved.get(number, 0) for number in self.owner]
        afresh = [b for b, given in enumerate(self._given) if not moved.keys() >= set(given.values())]
        for b, given in enumerate(self._given):
            self._given[b] = {} if b in afresh else {agent: moved[number] for agent, number in given.items()}
        return afresh

    def slots_of(self, number: int) -> set[int]:
        """Where agents of the episodes under way are, or may come again, that act by an actor."""
        roster, found = self._copies.roster, set()
        for b, given in enumerate(self._given):
            names = {str(roster.name_of(agent)) for agent, its_number in given.items() if its_number == number}
            found |= {b * roster.num_slots + slot for slot in roster.slots_of(list(names))}
        return found

    def begin(self, b: int, seed: int | None) -> None:
        """An episode of copy b begins."""
        if self._set is not None:
            info = self._infos[b]
            self._infos[b] = EpisodeInfo(0 if info is None else info.number + 1, seed, self._set.rng)
            self._given[b] = {}

    def take(self, events: Events) -> None:
        """Agents appeared, and others act again: `groups` becomes who acts now."""
        if np.count_nonzero(self._is_init):  # seldom: to write by a list takes longer
            self._is_init[events.again] = False
        self._is_init[events.begun] = True
        asked = self._copies.asked()
        if self._set is not None and events.begun:
            begun = set(events.begun)
            for one in asked:
                if one.slot in begun:
                    self.owner[one.slot] = self._number_of(one)
        self.groups = list(self._grouped(asked))

    def act(
        self, choose: Callable[[Policy], Callable[[Tree, Tree], tuple[Tree, np.ndarray, Tree]]]
    ) -> Iterator[tuple[Group, Choice | None, Iterator[Any]]]:
        """Of each group what was chosen, and the actions as the environment takes them.

        Args:
            choose: of a policy what chooses for observations and states, such as `Policy.sample`.
        """
        for group in self.groups:
            actor = self.actors[group.number]
            if actor.policy is None:
                assert actor.script is not None
                yield group, None, iter(actor.script.act([one.obs for one in group.asked]))
                continue
            is_init = self._is_init[group.slots]
            found = sample(actor.policy, group.obs, actor.state, group.slots, is_init, choose(actor.policy))
            yield group, Choice(*found), actions_of(actor.policy, found[0])

    def is_init(self, slots: np.ndarray) -> np.ndarray:
        """Whether the agents in slots [N] begin an episode with what they see now."""
        return self._is_init[slots]

    def state(self) -> dict[str, Any]:
        """Who acts for whom, and what is remembered, in plain data and tensors."""
        memory = [dict(iterate(actor.state, "state")) if actor.state is not None else {} for actor in self.actors]
        return {
            "owner": list(self.owner),
            "is_init": torch.from_numpy(self._is_init.copy()),
            "given": [dict(given) for given in self._given],
            "numbers": [None if info is None else [info.number, info.seed] for info in self._infos],
            "memory": [{path: torch.from_numpy(np.array(x)) for path, x in found.items()} for found in memory],
        }

    def load(self, state: dict[str, Any], b: int, slots: np.ndarray) -> None:
        """Have copy b, whose slots these are, go on from what `state` returned."""
        for slot in slots.tolist():
            self.owner[slot] = state["owner"][slot]
        self._is_init[slots] = state["is_init"].numpy()[slots]
        self._given[b] = dict(state["given"][b])
        if self._set is not None and state["numbers"][b] is not None:
            number, seed = state["numbers"][b]
            self._infos[b] = EpisodeInfo(number, seed, self._set.rng)
        for actor, memory in zip(self.actors, state["memory"]):
            for path, rows in iterate(actor.state, "state") if memory else ():
                rows[slots] = memory[path].numpy()[slots]

    def policies_of(self, b: int) -> dict[str, str] | None:
        """The policies of copy b's episode, by entry of `possible_agents`; None if there is only one."""
        if self._set is None:
            return None
        roster = self._copies.roster
        return {str(roster.name_of(a)): self.actors[number].policy_id for a, number in self._given[b].items()}

    def returns_of(self, b: int, returns: Mapping[str, float]) -> dict[str, list[float]] | None:
        """The returns of copy b's agents by the policies they acted by; None if there is only one policy."""
        if self._set is None:
            return None
        found: dict[str, list[float]] = {}
        for agent, number in self._given[b].items():
            if agent in returns:
                found.setdefault(self.actors[number].policy_id, []).append(returns[agent])
        return found

    def _actor(self, policies: PolicySet, policy_id: str) -> Actor:
        policy = dict(policies.learned.items()).get(policy_id)
        spec, num_slots = policies.spec_of(policy_id), self._copies.num_slots
        return Actor(policy_id, policy, policies.script(policy_id), spec, num_slots)

    def _grouped(self, asked: list[Asked]) -> Iterator[Group]:
        if len(self.actors) == 1 and asked:
            yield self._group(0, range(len(asked)), asked)
            return
        for number in range(len(self.actors)):
            places = [i for i, one in enumerate(asked) if self.owner[one.slot] == number]
            if places:
                yield self._group(number, places, [asked[i] for i in places])

    def _group(self, number: int, places: Sequence[int], asked: list[Asked]) -> Group:
        policy = self.actors[number].policy
        obs = None if policy is None else observations(policy, asked, self._copies.roster.num_slots)
        return Group(number, places, asked, np.array([one.slot for one in asked], np.int64), obs)

    def _number_of(self, one: Asked) -> int:
        """The actor of an agent that appeared: that which it had before in the same episode, if it was there."""
        assert self._set is not None
        b = one.slot // self._copies.roster.num_slots
        given, info = self._given[b], self._infos[b]
        assert info is not None
        if one.agent not in given:
            given[one.agent] = self._numbers[self._set.mapping.policy_of(one.agent, info)]
            self._check(str(self._copies.roster.name_of(one.agent)), given[one.agent])
        return given[one.agent]

    def _check(self, name: str, number: int) -> None:
        """Refuse an agent whose spaces are not those of its policy."""
        if (name, number) in self._checked:
            return
        self._checked.add((name, number))
        spec, found = self.actors[number].spec, self._copies.spaces_of(name)
        if found != (spec.observation_space, spec.action_space):
            policy_id = self.actors[number].policy_id
            whose = f"policies[{policy_id!r}]" if policy_id else "The policy"
            raise OptionError(
                f"{whose} was made for {spec.env_id} (observation {spec.observation_space}, action "
                f"{spec.action_space}), but agent {name!r} has observation {found[0]}, action {found[1]}. Use the "
                "environment and env_kwargs it was trained with."
            )
