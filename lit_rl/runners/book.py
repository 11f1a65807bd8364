"""The rows of agents, written down policy by policy as they act: what is learned from."""

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np

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
        central: the kinds of inputs of central critics, by policy; "" is the only one's id.
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
        central: Mapping[str, str] | None = None,
        make: Callable[..., TimeLines] = TimeLines,
    ):
        self._cast, self._copies, self._make = cast, copies, make
        self._kinds = [(central or {}).get(actor.policy_id) for actor in cast.actors]
        self.lines = [self._lines_of(policy, actor, kind, keep_states) for actor, kind in zip(cast.actors, self._kinds)]

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
                seen = None if central is None else central.get(str(self._kinds[number]))
                lines.end(slot, terminated, truncated, final, seen)
        for number, lines in enumerate(all_lines):
            again = events.again if len(all_lines) == 1 else [slot for slot in events.again if owner[slot] == number]
            if lines is not None and again:
                lines.complete(again)
        self._cast.take(events)
        for group in self._cast.groups:
            lines = all_lines[group.number]
            if lines is not None:
                central = self._central(self._kinds[group.number], group.slots)
                lines.ask(group.slots, group.obs, self._cast.is_init(group.slots), central)

    def fits(self, state: Mapping[str, Any], slots: np.ndarray) -> bool:
        """Whether a runner's saved `state` has time lines of the same policies, and of the same ones in these slots."""
        for lines, saved in zip(self.lines, state["lines"], strict=True):
            if (lines is None) != (saved is None):
                return False
            open_ = [] if saved is None else [slot for slot in slots.tolist() if saved["goes_on"][slot]]
            if lines is not None and not set(open_) <= set(lines.slots.tolist()):
                return False
        return True

    def _central(self, kind: str | None, slots: np.ndarray) -> Tree:
        """What a central critic sees of agents in slots [N], [N, ...]; None without one."""
        views = self._copies.views
        return None if kind is None or views is None else views.rows(kind, slots)

    def _not_finite(self, whose: str, reward: float) -> EnvError:
        what = f"env={self._copies.env_id}: reward={reward} of {whose}"
        return EnvError(f"{what}: expected finite numbers. Mend the environment.")

    def _lines_of(
        self, policy: Policy | PolicySet, actor: Actor, kind: str | None, keep_states: bool | Collection[str]
    ) -> TimeLines | None:
        """Where what a policy does is recorded; None if it is not trained."""
        copies, slots = self._copies, None
        num = copies.num_slots
        if isinstance(policy, PolicySet):
            if actor.policy_id not in policy.trained:
                return None
            size = copies.roster.num_slots
            slots = np.add.outer(np.arange(num // size) * size, policy.slots_of(actor.policy_id)).ravel()
        keep = keep_states if isinstance(keep_states, bool) else actor.policy_id in keep_states
        keep = keep and actor.state is not None
        space = None if kind is None or copies.views is None else copies.views.spaces[kind]
        return self._make(actor.spec, num, state=actor.state, keep_states=keep, slots=slots, central=space)
