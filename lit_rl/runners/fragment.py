"""A fragment, what a runner collects at a time, and the memory it is written into."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np

from lit_rl.runners.ledger import Entry
from lit_rl.runners.transport import Layout, Packed, allocate, pack
from lit_rl.spec import EnvSpec
from lit_rl.trees import Tree, is_leaf, iterate, leaves, row_dtype, space_leaves

# Probabilities of random actions, one for each `rollout_length` env steps; of several policies by policy, else 0.
Epsilons = Sequence[float | Mapping[str, float]]


class Episode(NamedTuple):
    """A finished episode.

    Attributes:
        return_: undiscounted sum of its rewards.
        length: its env steps.
        info: the user's metrics, read from the last step's `info`.
        steps: its transitions, if recorded: time-ordered arrays by name, and those of the final observation, each after
            "final_".
        seed: with which it was begun, if it was played for evaluation.
        cut: whether it had not ended when the time for it was over.
        returns: with several agents, of each entry of `possible_agents` that took part (of a pattern the mean over its
            agents); `return_` is the sum over all agents.
        policies: the ids of their policies, if there are several.
        by_policy: the returns of the agents that acted by each of them.
        agent_steps: with several agents, the `steps` of each after its id; an agent that came again has two.
        policy_version: updates that the policy had been through, if it was played for evaluation.
    """

    return_: float
    length: int
    info: dict[str, float]
    steps: dict[str, np.ndarray] | None = None
    seed: int | None = None
    cut: bool = False
    returns: dict[str, float] | None = None
    policies: dict[str, str] | None = None
    by_policy: dict[str, list[float]] | None = None
    agent_steps: list[tuple[str, dict[str, np.ndarray]]] | None = None
    policy_version: int | None = None


class Part(NamedTuple):
    """What one of several policies did in a fragment.

    Attributes:
        rows, finals: see `Fragment`.
        slots: of its time lines, [B].
        number: of the policy, see `PolicySet`.
    """

    rows: Packed
    finals: Packed
    slots: np.ndarray
    number: int


class Fragment(NamedTuple):
    """What one `EnvRunner.sample` collected.

    Attributes:
        rows: `observation, action, action_log_prob, reward, terminated, truncated, is_init` and, where not every row
            is a transition, `mask`; each [B, T, ...]; `last_observation` [B, *obs]; and, of a policy with memory,
            `state` [B, ...] before the first step, or [B, T, ...] before each. The parts of nested ones are named by
            path: "observation/arm". Of time lines of different lengths also `length` [B] and `policy_version` [B, T].
        finals: `final_step` [B, F], the rows t that ended an episode (-1: padding), and `final_observation`
            [B, F, *obs], their true next observations; and `mask` [B, T] if an environment failed.
            Where a critic is central, there is a `central` part beside each observation: see `lit_rl.central`.
        episodes: those that ended.
        policy_version: version of the weights that acted.
        entry: where its env steps went.
        failures: what environments raised, and was survived.
        busy_s: seconds it took, of a runner in a process of its own.
        idle_s: seconds that this was idle before it.
        parts: of several policies the rows and finals of each that is trained, by its id; there are no others then.
        slots: of the time lines of one of several policies, [B].
        reward: as the environment gave it [B, T], where that of the rows is scaled or clipped.
    """

    rows: Packed
    finals: Packed
    episodes: list[Episode]
    policy_version: int
    entry: Entry
    failures: Sequence[str] = ()
    busy_s: float = 0.0
    idle_s: float = 0.0
    parts: dict[str, Part] | None = None
    slots: np.ndarray | None = None
    reward: np.ndarray | None = None

    def has(self, policy_id: str, number: int) -> bool:
        """Whether there is a part of the policy with a number, and not of another one that had its id."""
        assert self.parts is not None
        return policy_id in self.parts and self.parts[policy_id].number == number

    def of(self, policy_id: str) -> "Fragment":
        """The part of one policy."""
        assert self.parts is not None
        part = self.parts[policy_id]
        return self._replace(rows=part.rows, finals=part.finals, slots=part.slots, parts=None)


NOTHING = pack({})


class FragmentLayout:
    """Where a runner's fragments have their arrays: the same for all of one length.

    Args:
        spec: the environment's spaces.
        num_envs: B.
        state: what the policy carries at an episode's start, [B, ...]; None without memory.
        keep_states: `state` before every step, [B, T, ...], instead of the first alone.
        has_mask: whether rows have a `mask`.
        ragged: whether time lines differ in length, and rows in their version.
        central: the space of a central critic's inputs, which rows then have; None without.
    """

    def __init__(
        self,
        spec: EnvSpec,
        num_envs: int,
        *,
        state: Tree,
        keep_states: bool,
        has_mask: bool,
        ragged: bool = False,
        central: gym.Space | None = None,
    ):
        self._num_envs = num_envs
        # dtype and shape of each array: of one row, [...], and of those that there are once per environment, [B, ...].
        self._rows: dict[str, tuple[str, tuple[int, ...]]] = {}
        self._once: dict[str, tuple[str, tuple[int, ...]]] = {}
        seen = space_leaves(spec.observation_space, "observation")
        seen |= {} if central is None else space_leaves(central, "central")
        for path, space in seen.items():
            self._rows[path] = (row_dtype(space), space.shape or ())
            self._once[f"last_{path}"] = (row_dtype(space), (num_envs, *(space.shape or ())))
        for path, space in space_leaves(spec.action_space, "action").items():
            self._rows[path] = (row_dtype(space), space.shape or ())
        for path, array in iterate(state, "state") if state is not None else ():
            if keep_states:
                self._rows[path] = (array.dtype.str, array.shape[1:])
            else:
                self._once[path] = (array.dtype.str, array.shape)
        self._rows |= {"action_log_prob": ("<f4", ()), "reward": ("<f4", ())}
        self._rows |= dict.fromkeys(
            ["terminated", "truncated", "is_init", *(["mask"] if has_mask else [])], ("|b1", ())
        )
        if ragged:
            self._rows["policy_version"] = ("<i8", ())
            self._once["length"] = ("<i8", (num_envs,))
        self._layouts: dict[int, tuple[int, Layout]] = {}  # size in bytes and layout of fragments of each length
        self._finals = {f"final_{path}": space for path, space in seen.items()}
        self._no_finals = self._packed([], [], 1)

    def allocate(self, length: int) -> Packed:
        """Uninitialised memory for the rows of a fragment of `length` env steps per environment."""
        if length not in self._layouts:
            batch = self._num_envs, length
            rows = {path: (dtype, (*batch, *shape)) for path, (dtype, shape) in self._rows.items()}
            packed = allocate(rows | self._once)
            self._layouts[length] = len(packed.buffer), packed.layout
        num_bytes, layout = self._layouts[length]
        return Packed(np.empty(num_bytes, np.uint8), layout)

    @property
    def row_fields(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """The dtype and the shape of one row of each array that has rows."""
        return dict(self._rows)

    def pack_finals(
        self, finals: Sequence[tuple[int, int, Tree]], failed: Sequence[tuple[int, int]], length: int
    ) -> Packed:
        """A fragment's `finals`.

        Args:
            finals: (b, t, observation [*obs]) of each row that ended an episode, those of one environment in order;
                where there are central inputs, both in a dict.
            failed: (b, t) of each row that is no transition, since the environment failed.
            length: T.
        """
        return self._packed(finals, failed, length) if finals or failed else self._no_finals

    def _packed(
        self, finals: Sequence[tuple[int, int, Tree]], failed: Sequence[tuple[int, int]], length: int
    ) -> Packed:
        num_envs = self._num_envs
        counts = np.bincount([b for b, _, _ in finals], minlength=num_envs)
        shape = (num_envs, int(counts.max()))
        steps = np.full(shape, -1, np.int64)
        columns = {path: np.zeros(shape + (part.shape or ()), row_dtype(part)) for path, part in self._finals.items()}
        filled = [0] * num_envs
        for b, t, obs in finals:
            steps[b, filled[b]] = t
            for column, value in zip(columns.values(), leaves(obs)):
                column[b, filled[b]] = value
            filled[b] += 1
        if failed:
            columns["mask"] = np.ones((num_envs, length), np.bool_)
            columns["mask"][tuple(zip(*failed))] = False
        return pack({"final_step": steps, **columns})


def put(rows: np.ndarray, b: int | np.ndarray, values: Any) -> None:
    """`values` [...] into environment b's row of `rows` [B, ...], or [N, ...] into those of N environments."""
    rows[b] = values


def write_step(rows: Tree, t: int, values: Tree) -> None:
    """`values` [B, ...] into `rows` [B, T, ...] at step t."""
    if is_leaf(rows):
        rows[:, t] = values
        return
    for key, part in rows.items():
        write_step(part, t, values[key])
