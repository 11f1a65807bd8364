"""Records what agents see and do in episodes that are played."""

from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np

from lit_rl.envs.copies import Copies, Events
from lit_rl.policy import Policy, PolicySet
from lit_rl.runners.cast import Cast, Choice, Group
from lit_rl.trees import Tree, iterate, row_converter


class AgentRecorder:
    """Keeps the rows of the episodes under way: a `Watcher`, see `play_agents`.

    An agent has a row for each time it acted, with the rewards until it acts again. Those of agents that are not there
    are in no row. Of an agent that terminates without a final observation the last one stands for it.
    """

    def begin(self, policy: Policy | PolicySet, cast: Cast, copies: Copies) -> None:
        """Watch what these do."""
        self._cast, self._num_slots = cast, copies.roster.num_slots
        self._converters = [
            (row_converter(actor.spec.observation_space), row_converter(actor.spec.action_space))
            for actor in cast.actors
        ]
        self._open: dict[int, tuple[str, list[dict[str, Any]]]] = {}  # agent and rows, by slot
        self._ended: dict[int, list[tuple[str, dict[str, np.ndarray]]]] = {}  # by copy
        self._over: deque[list[tuple[str, dict[str, np.ndarray]]]] = deque()

    def act(self, group: Group, choice: Choice | None, actions: Sequence[Any]) -> None:
        """What agents of one policy do, as the environment takes it."""
        as_obs_rows, as_action_rows = self._converters[group.number]
        for i, (one, action) in enumerate(zip(group.asked, actions)):
            row: dict[str, Any] = _copied(as_obs_rows(one.obs), "observation")
            row |= _copied(as_action_rows(action), "action")
            row |= {"reward": 0.0, "terminated": False, "truncated": False}
            row["action_log_prob"] = np.float32(0.0 if choice is None else choice.log_prob[i])
            self._open.setdefault(one.slot, (one.agent, []))[1].append(row)

    def step(self, events: Events) -> None:
        """What an env step brought."""
        self._take(events)
        self._cast.take(events)

    def take(self, events: Events) -> None:
        """Who acts next."""
        self.step(events)

    def next_episode(self) -> list[tuple[str, dict[str, np.ndarray]]]:
        """The steps of each agent, of the episode that was over first. It is then forgotten."""
        return self._over.popleft()

    def _take(self, events: Events) -> None:
        for slot, reward in events.credited:
            if slot in self._open:
                self._open[slot][1][-1]["reward"] += reward
        for ended in events.ended:
            agent, rows = self._open.pop(ended.slot, ("", []))
            if rows:
                rows[-1] |= {"terminated": ended.terminated, "truncated": ended.truncated}
                as_obs_rows, _ = self._converters[self._cast.owner[ended.slot]]
                steps = {name: np.asarray([row[name] for row in rows]) for name in rows[0]}
                last = {f"final_{name}": x for name, x in rows[-1].items() if name.startswith("observation")}
                final = last if ended.obs is None else _copied(as_obs_rows(ended.obs), "final_observation")
                self._ended.setdefault(ended.slot // self._num_slots, []).append((agent, steps | final))
        for outcome in events.over:
            self._over.append(self._ended.pop(outcome.copy, []))


def _copied(tree: Tree, name: str) -> dict[str, np.ndarray]:
    return {path: np.array(array) for path, array in iterate(tree, name)}
