"""The rows of agents, written down policy by policy as they act: what is learned from."""

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import gymnasium as gym
import numpy as np

from lit_rl.central import kind_of
from lit_rl.envs.copies import Copies, Events
from lit_rl.errors import EnvError
from lit_rl.policy import Policy, PolicySet
from lit_rl.runners.acting import final_observation
from lit_rl.runners.cast import Actor, Cast, Choice, Group
from lit_rl.runners.time_lines import TimeLines
from lit_rl.trees import Tree


class Book:
    """Time lines of all policies that are trained, kept up with what happens in copies of an environment.

    Args:
        policy: of all agents, or several.
        cast: who acts.
        copies: of the environment.
        keep_states: keep the state before every row, instead of the first alone; of several policies for which.
        make: what makes the time lines, with the arguments of `TimeLines`.

    Attributes:
        lines: the time lines of each of the cast's actors; None of one that is not trained.
    """

    def __init__(
        self,
        policy: Policy | PolicySet,
        cast: Cast,
        copies: Copies,
        *,
        keep_states: bool | Collection[str] = False,
        make: Callable[..., TimeLines] = TimeLines,
    ):
        self._cast, self._copies, self._make = cast, copies, make
        self._policy, self._keep_states = policy, keep_states
        self._actors = cast.actors
        self._has_others = False  # whether there are time lines of agents to whom the mapping now gives other policies
        self.lines = [self._lines_of(actor) for actor in cast.actors]

    def follow(self, policies: PolicySet, keep_states: bool | Collection[str]) -> None:
        """Keep up with the cast, by which other policies act from now on, between two fragments.

        Args:
            policies: see `Cast.follow`.
            keep_states: as it was, for those that were there before.
        """
        kept = dict(zip(self._actors, self.lines))
        self._policy, self._keep_states, self._actors = policies, keep_states, self._cast.actors
        self.lines[:] = [kept[actor] if actor in kept else self._lines_of(actor) for actor in self._actors]

    def fit(self) -> None:
        """Have time lines where the mapping and the episodes under way have agents, between two fragments.

        In an episode that began before the mapping changed they keep their policies.
        """
        self._has_others = False
        for number, actor in enumerate(self._actors):
            mapped = self._slots_of(actor)
            if mapped is None:
                continue
            slots = mapped | self._cast.slots_of(number)
            self._has_others |= slots != mapped
            lines = self.lines[number]
            if lines is None or not slots:
                self.lines[number] = self._lines_of(actor, slots)
            elif set(lines.slots.tolist()) != slots:
                lines.move(np.array(sorted(slots)))

    def fit_if_needed(self) -> None:
        """`fit`, if there may be time lines that are not needed any more."""
        if self._has_others:
            self.fit()

    def act(self, group: Group, choice: Choice | None, version: int) -> None:
        """What agents do that act by one policy.

        Args:
            group: the agents.
            choice: of their policy; None if a script acts.
            version: of the policy now.
        """
        lines = self.lines[group.number]
        if choice is not None and lines is not None:
            lines.act(group.slots, *choice, version)

    def take(self, events: Events) -> None:
        """Take in what a step brought, and who acts next."""
        all_lines, owner = self.lines, self._cast.owner
        for slot, reward in events.credited:
            lines = all_lines[owner[slot]]
            if lines is not None:
                lines.credit(slot, reward)  # looked at when the fragment is complete
            elif not math.isfinite(reward):
                raise self._not_finite(f"{self._copies.who(slot)}, whose policy is not trained", reward)
        for agent, reward in events.uncredited:
            if not math.isfinite(reward):
                raise self._not_finite(f"agent {agent!r}, which is not there", reward)
        for slot in events.dropped:
            lines = all_lines[owner[slot]]
            if lines is not None:
                lines.drop(slot)
        for slot, terminated, truncated, obs, central in events.ended:
            number = owner[slot]
            lines, policy = all_lines[number], self._cast.actors[number].policy
            if lines is not None and policy is not None:
                final = None if obs is None else final_observation(policy, obs)
                kind = kind_of(policy.spec.central_space)
                seen = None if central is None or kind is None else central[kind]
                lines.end(slot, terminated, truncated, final, seen)
        for number, lines in enumerate(all_lines):
            again = events.again if len(all_lines) == 1 else [slot for slot in events.again if owner[slot] == number]
            if lines is not None and again:
                lines.complete(again)
        self._cast.take(events)
        for group in self._cast.groups:
            lines = all_lines[group.number]
            if lines is not None:
                central = self._central(self._actors[group.number], group.slots)
                lines.ask(group.slots, group.obs, self._cast.is_init(group.slots), central)

    def make_room(self, state: Mapping[str, Any]) -> None:
        """Have time lines wherever a runner's saved `state` has what is under way."""
        for number, saved in enumerate(state["lines"]):
            if saved is not None:
                lines, slots = self.lines[number], set(np.flatnonzero(saved["goes_on"].numpy()).tolist())
                there = set() if lines is None else set(lines.slots.tolist())
                if lines is None:
                    self.lines[number] = self._lines_of(self._actors[number], slots)
                elif not slots <= there:
                    lines.move(np.array(sorted(slots | there)))

    def fits(self, state: Mapping[str, Any], slots: np.ndarray) -> bool:
        """Whether a runner's saved `state` has time lines of the same policies, and of the same ones in these slots."""
        for lines, saved in zip(self.lines, state["lines"], strict=True):
            if (lines is None) != (saved is None):
                return False
            open_ = [] if saved is None else [slot for slot in slots.tolist() if saved["goes_on"][slot]]
            if lines is not None and not set(open_) <= set(lines.slots.tolist()):
                return False
        return True

    def _central(self, actor: Actor, slots: np.ndarray) -> Tree:
        """What the central critic of a policy sees of agents in slots [N], [N, ...]; None without one."""
        kind, views = kind_of(_central_space(actor)), self._copies.views
        return None if kind is None or views is None else views.rows(kind, slots)

    def _not_finite(self, whose: str, reward: float) -> EnvError:
        what = f"env={self._copies.env_id}: reward={reward} of {whose}"
        return EnvError(f"{what}: expected finite numbers. Mend the environment.")

    def _lines_of(self, actor: Actor, slots: set[int] | None = None) -> TimeLines | None:
        """Where what a policy does is recorded; None if it is not trained, or nobody acts by it.

        Args:
            actor: the policy at work.
            slots: in which its agents may be; None: those that the mapping gives it.
        """
        keep, found = self._keep_states, None
        if isinstance(self._policy, PolicySet):
            slots = self._slots_of(actor) if slots is None else slots
            if not slots:
                return None
            found = np.array(sorted(slots))
        keep = keep if isinstance(keep, bool) else actor.policy_id in keep
        keep = keep and actor.state is not None
        space = None if self._copies.views is None else _central_space(actor)
        num = self._copies.num_slots
        return self._make(actor.spec, num, state=actor.state, keep_states=keep, slots=found, central=space)

    def _slots_of(self, actor: Actor) -> set[int] | None:
        """In which slots agents may be to whom the mapping gives a policy; None if it is not trained."""
        policy, num = self._policy, self._copies.num_slots
        if not isinstance(policy, PolicySet) or actor.policy_id not in policy.trained:
            return None
        size = self._copies.roster.num_slots
        return set(np.add.outer(np.arange(num // size) * size, policy.slots_of(actor.policy_id)).ravel().tolist())


def _central_space(actor: Actor) -> gym.Space | None:
    """Of what the central critic of a policy sees; None without one."""
    return None if actor.policy is None else actor.policy.spec.central_space
