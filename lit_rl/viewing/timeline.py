"""What happens in an episode of several agents, in words: who acted when, and which reward was credited to what.

The rows are written down by what training writes them down with, so they are those that would be learned from.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lit_rl.envs.copies import Copies, Events
from lit_rl.policy import Policy, PolicySet
from lit_rl.runners.book import Book
from lit_rl.runners.cast import Cast, Choice, Group
from lit_rl.runners.time_lines import TimeLines

FLUSH = 1024  # env steps after which the rows so far are let go, as at the end of a rollout


@dataclass
class Row:
    """A row of a time line.

    Attributes:
        number: from 0 in an episode.
        step: the env step in which its agent acted.
        credited: the rewards that were, in their order.
        reward: as it is learned from.
        is_complete: whether its agent was asked again, or ended.
        terminated, truncated: whether its agent ended with it, and why.
    """

    number: int
    step: int
    credited: list[float] = field(default_factory=list)
    reward: float = 0.0
    is_complete: bool = False
    terminated: bool = False
    truncated: bool = False

    def __str__(self) -> str:
        ends = [name for name in ("terminated", "truncated") if getattr(self, name)]
        state = " and ".join(ends) or ("complete" if self.is_complete else "open")
        return f"row {self.number}: acted at step {self.step}, reward {_sum(self.credited, self.reward)}, {state}"


class NotedLines(TimeLines):
    """Time lines that note in which env step a row was begun, and which rewards were summed into it.

    Attributes:
        step: the env step that is under way.
        rows: those of the episode, by slot.
    """

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self.step = 0
        self.rows: dict[int, list[Row]] = {}

    def act(self, slots: np.ndarray, *args: Any) -> None:
        super().act(slots, *args)
        for slot in slots.tolist():
            rows = self.rows.setdefault(slot, [])
            rows.append(Row(len(rows), self.step))

    def credit(self, slot: int, reward: float) -> None:
        super().credit(slot, reward)
        row = self.rows[slot][-1]
        row.credited.append(reward)
        row.reward = self._pending[slot]

    def complete(self, slots: Sequence[int]) -> None:
        super().complete(slots)
        for slot in slots:
            row, at = self.rows[slot][-1], self._at[slot] - self._num_slots
            row.is_complete, row.reward = True, float(self._columns["reward"][at])
            row.terminated, row.truncated = (bool(self._columns[name][at]) for name in ("terminated", "truncated"))


class Timeline:
    """Watches episodes that are played one after the other: see `play_agents`.

    Args:
        max_steps: env steps of each episode that are shown, from its first; the rest is counted.
    """

    def __init__(self, max_steps: int = 200):
        self._max_steps = max_steps

    def begin(self, policy: Policy | PolicySet, cast: Cast, copies: Copies) -> None:
        """Watch what these do."""
        self._cast = cast
        self._book = Book(policy, cast, copies, make=NotedLines)
        self._forget()

    def act(self, group: Group, choice: Choice | None, actions: Sequence[Any]) -> None:
        """What agents of one policy do, as the environment takes it."""
        self._book.act(group, choice, version=0)
        policy_id = self._cast.actors[group.number].policy_id
        lines = self._lines(group.number)
        for one, action in zip(group.asked, actions):
            by = f" ({policy_id})" if policy_id else ""
            self._doing[one.slot] = f"{one.agent}{by} does {_words(action)}"
            self._agents[one.slot] = one.agent
            rows = self._rows.setdefault((one.slot, one.agent), (policy_id, []))[1]
            if lines is not None:
                rows.append(lines.rows[one.slot][-1])

    def step(self, events: Events) -> None:
        """What an env step brought."""
        self._end_step(events)
        self._book.take(events)

    def take(self, events: Events) -> None:
        """Who acts next."""
        self._book.take(events)

    def text(self) -> str:
        """The episode so far: a line for each env step and one for each row. Begins another."""
        lines = self._steps[: self._max_steps]
        if len(self._steps) > self._max_steps:
            lines.append(f"... {_count(len(self._steps) - self._max_steps, 'more env step')}")
        for (slot, agent), (policy_id, rows) in sorted(self._rows.items()):
            by = f", policy {policy_id}" if policy_id else ""
            shown = [row for row in rows if row.step < self._max_steps]
            lines.append(f"{agent}, slot {slot}{by}: {_count(len(rows), 'row') if rows else 'not learned from'}")
            lines += [f"  {row}" for row in shown]
            if len(shown) < len(rows):
                lines.append(f"  ... {_count(len(rows) - len(shown), 'more row')}")
        self._forget()
        return "\n".join(lines)

    def _end_step(self, events: Events) -> None:
        rewards = [
            f"{self._agents[slot]} {reward:g} ({self._credited(slot)})" for slot, reward in events.credited if reward
        ]
        rewards += [f"{agent} {reward:g} (credited to nothing)" for agent, reward in events.uncredited if reward]
        parts = [", ".join(self._doing[slot] for slot in sorted(self._doing)) or "nobody acts"]
        if rewards:
            parts.append(f"rewards: {', '.join(rewards)}")
        for ended in events.ended:
            flags = (("terminated", ended.terminated), ("truncated", ended.truncated))
            parts.append(f"{self._agents[ended.slot]} is {' and '.join(name for name, flag in flags if flag)}")
        self._steps.append(f"step {len(self._steps)}: {'; '.join(parts)}")
        self._doing.clear()
        for number in range(len(self._book.lines)):
            lines = self._lines(number)
            if lines is not None:
                lines.step = len(self._steps)
                if lines.step % FLUSH == 0:
                    lines.fragment(version=0)

    def _credited(self, slot: int) -> str:
        lines = self._lines(self._cast.owner[slot])
        return "not learned from" if lines is None else f"row {lines.rows[slot][-1].number}"

    def _lines(self, number: int) -> NotedLines | None:
        lines = self._book.lines[number]
        assert lines is None or isinstance(lines, NotedLines)
        return lines

    def _forget(self) -> None:
        self._steps: list[str] = []
        self._doing: dict[int, str] = {}  # what is done in the env step under way, by slot
        self._agents: dict[int, str] = {}  # who acted last, by slot
        self._rows: dict[tuple[int, str], tuple[str, list[Row]]] = {}  # policy and rows, by slot and agent
        for number in range(len(self._book.lines)):
            lines = self._lines(number)
            if lines is not None:
                lines.step, lines.rows = 0, {}
                lines.fragment(version=0)


def _count(num: int, what: str) -> str:
    return f"{num} {what}{'' if num == 1 else 's'}"


def _sum(parts: Sequence[float], total: float) -> str:
    """A sum with its parts that are not 0.

    >>> _sum([2.0, 0.0, 3.0, -1.0], 4.0), _sum([0.0, 2.0], 2.0)
    ('2 + 3 - 1 = 4', '2')
    """
    first, *others = [part for part in parts if part] or [0.0]
    if not others:
        return f"{total:g}"
    signed = "".join(f" {'-' if part < 0 else '+'} {abs(part):g}" for part in others)
    return f"{first:g}{signed} = {total:g}"


def _words(action: Any) -> str:
    """An action in at most 80 characters of one line."""
    with np.printoptions(precision=3, suppress=True):
        text = " ".join(str(action).split())
    return text if len(text) <= 80 else f"{text[:77]}..."
