"""Recorded episodes in memory: which rows are transitions, what is drawn of them, what is to come from each row on.

Four episodes of rows 0 to 12, whose observation is the number of the row:

    row          0   1   2   3  |  4   5   6  |  7   8   9  | 10  11
    reward       1   2   4   .  |  8  16   .  | 32  64 128  |  1   2
    end                 T  clo  |     U  clo  |         ?   |      T

The first is terminated (T), the second truncated (U), both with a closing row; the third was not recorded to its end,
so its last step is no transition; the fourth is terminated without a closing row.
"""

import numpy as np
import pytest
import torch
from gymnasium import spaces

from lit_rl.errors import CheckpointError, OptionError
from lit_rl.recorded import Recorded, joined
from lit_rl.replay import ReplayBuffer
from lit_rl.replay.recorded_buffer import RecordedBuffer
from lit_rl.replay.recorded_feed import best, rows_of_rank, split
from lit_rl.spec import EnvSpec

SPEC = EnvSpec("Test", spaces.Box(-100, 100, (1,), np.float32), spaces.Discrete(12))
STATE = {"state/h": np.zeros((1, 3), np.float32)}


def flags(*rows: int, num: int = 12) -> np.ndarray:
    return np.isin(np.arange(num), rows)


@pytest.fixture
def recorded() -> Recorded:
    rows = np.arange(12)
    return Recorded(
        {"observation": rows[:, None].astype(np.float32), "action": rows.copy()},
        np.array([1, 2, 4, 0, 8, 16, 0, 32, 64, 128, 1, 2], np.float32),
        terminated=flags(2, 11),
        truncated=flags(5),
        closing=flags(3, 6),
        begins=np.array([0, 4, 7, 10]),
    )


def test_the_last_step_of_an_episode_without_end_or_closing_row_is_no_transition(recorded: Recorded) -> None:
    assert np.flatnonzero(recorded.is_transition).tolist() == [0, 1, 2, 4, 5, 7, 8, 10, 11]
    assert recorded.is_dropped.tolist() == [False, False, True, False]
    assert recorded.lengths.tolist() == [3, 2, 3, 2]
    assert recorded.returns.tolist() == [7, 24, 224, 3]
    assert recorded.summary == (
        "4 episodes, 9 transitions, mean return 64.5; the last steps of 1 episodes are left out, since what came after "
        "them was not recorded"
    )


def test_a_transition_has_what_came_next_in_its_episode(recorded: Recorded) -> None:
    buffer = RecordedBuffer(recorded, SPEC)
    rows = np.array([0, 1, 2, 4, 5, 7, 8, 10])
    batch = buffer.transitions(rows, gamma=0.5)
    assert batch["observation"].squeeze(1).tolist() == batch["action"].tolist() == rows.tolist()
    assert batch["next", "observation"].squeeze(1).tolist() == [1, 2, 3, 5, 6, 8, 9, 11]
    assert batch["next", "reward"].tolist() == [1, 2, 4, 8, 16, 32, 64, 1]
    assert batch["next", "terminated"].tolist() == [False, False, True, False, False, False, False, False]
    last = buffer.transitions(np.array([11]))
    assert last["next", "terminated"].tolist() == [True]  # there is no next observation, and none is asked for
    assert set(batch.keys()) == {"observation", "action", "index", "discount", "next"}


def test_several_steps_end_with_the_episode_or_at_the_last_observation_that_is_known(recorded: Recorded) -> None:
    batch = RecordedBuffer(recorded, SPEC).transitions(np.array([0, 1, 4, 5, 7, 8, 10]), gamma=0.5, num_steps=(3, 3))
    assert batch["next", "reward"].tolist() == [1 + 1 + 1, 2 + 2, 8 + 8, 16, 32 + 32, 64, 1 + 1]
    assert batch["discount"].tolist() == [0.125, 0.25, 0.25, 0.5, 0.25, 0.5, 0.25]
    assert batch["next", "observation"][:6].squeeze(1).tolist() == [3, 3, 6, 6, 9, 9]
    assert batch["next", "terminated"].tolist() == [True, True, False, False, False, False, True]


def test_returns_to_go_end_with_the_episode_and_have_what_to_bootstrap_from(recorded: Recorded) -> None:
    batch = RecordedBuffer(recorded, SPEC, gamma=0.5).transitions(np.array([0, 1, 2, 4, 5, 7, 8, 10, 11]))
    assert batch["return_to_go"].tolist() == [1 + 1 + 1, 2 + 2, 4, 8 + 8, 16, 32 + 32, 64, 1 + 1, 2]
    assert batch["to_go_discount"].tolist() == [0, 0, 0, 0.25, 0.5, 0.25, 0.5, 0, 0]
    assert batch["to_go_observation"].squeeze(1)[3:7].tolist() == [6, 6, 9, 9]


def test_sequences_are_padded_where_the_episode_ends_and_begin_without_a_state(recorded: Recorded) -> None:
    buffer = RecordedBuffer(recorded, SPEC, state=STATE, gamma=0.5)
    batch = buffer.sequences(np.array([1, 4, 7]), length=3, burn_in=2, gamma=0.5)
    assert batch["mask"].tolist() == [[True, True, False], [True, True, False], [True, True, False]]
    assert batch["observation"].squeeze(2).tolist() == [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
    assert batch["is_init"].tolist() == [[False] * 3, [True, False, False], [True, False, False]]
    assert batch["next", "terminated"].tolist() == [[False, True, False], [False] * 3, [False] * 3]
    assert not batch["state", "h"].any()
    assert batch["burn_in", "observation"].squeeze(2).tolist() == [[0, 0], [4, 4], [7, 7]]
    assert batch["return_to_go"][:, :2].tolist() == [[4, 4], [16, 16], [64, 64]]
    assert batch["to_go_observation"].squeeze(1).tolist() == [3, 6, 9]


def test_only_the_rows_that_were_asked_for_are_drawn(recorded: Recorded) -> None:
    rows = np.array([1, 5, 10])
    for alpha in (None, 0.6):
        buffer = RecordedBuffer(recorded, SPEC, rows=rows, priority_alpha=alpha)
        batch = buffer.sample(300, beta=0.4, num_steps=(3, 3))
        assert set(batch["index"].tolist()) == set(rows.tolist()) and len(buffer) == 3
        assert batch["next", "reward"][batch["index"] == 1].unique().tolist() == [6]  # others may come after them
    batch = RecordedBuffer(recorded, SPEC, has_is_init=True).sample(100)
    assert torch.equal(batch["is_init"], torch.isin(batch["index"], torch.tensor([0, 4, 7, 10])))


def test_draws_are_uniform_over_the_rows(recorded: Recorded) -> None:
    counts = np.bincount(RecordedBuffer(recorded, SPEC).sample(90_000)["index"].numpy(), minlength=12)
    assert (np.abs(counts[recorded.is_transition] - 10_000) < 500).all()


def test_priorities_and_what_is_drawn_next_are_gone_on_with(recorded: Recorded) -> None:
    def make() -> RecordedBuffer:
        return RecordedBuffer(recorded, SPEC, priority_alpha=0.6, seed=np.random.SeedSequence(3))

    buffer = make()
    first = buffer.sample(64, beta=0.4)
    buffer.update_priorities(first["index"], first["index"].double())
    position = buffer.position()
    expected, other = buffer.sample(64, beta=0.4), make()
    other.go_on(position)
    found = other.sample(64, beta=0.4)
    assert torch.equal(found["index"], expected["index"]) and torch.equal(found["weight"], expected["weight"])
    assert "priorities" not in buffer.position(whole=False)
    with pytest.raises(CheckpointError, match="drew from 9 recorded transitions, here there are 2"):
        RecordedBuffer(recorded, SPEC, rows=np.array([0, 1])).go_on(position)


def test_recorded_rows_are_those_of_a_buffer_that_a_runner_filled() -> None:
    """The same episode, once from a fragment and once from a file."""
    length = 6
    obs = np.random.default_rng(0).normal(size=(length + 1, 1)).astype(np.float32)
    reward, done = np.arange(length, dtype=np.float32), np.arange(length) == length - 1
    fragment = {
        "observation": obs[None, :-1], "last_observation": obs[None, -1] * 0, "action": np.arange(length)[None],
        "reward": reward[None], "terminated": done[None] & False, "truncated": done[None],
        "is_init": np.eye(1, length) > 0,
        "final_observation": obs[None, None, -1], "final_step": np.array([[length - 1]]),
    }  # fmt: skip
    online = ReplayBuffer(SPEC, 20)
    online.extend(fragment, [0])
    columns = {"observation": obs, "action": np.append(np.arange(length), 0)}
    end = np.append(done, False)
    recorded = Recorded(columns, np.append(reward, 0), end & False, end, np.arange(7) == 6, np.zeros(1, np.int64))
    rows = np.arange(length)
    options = {"gamma": 0.9, "num_steps": (2, 2)}
    at = [int(np.flatnonzero((online._columns["observation"] == x).all(1))[0]) for x in obs[:-1]]
    expected = online.transitions(np.array(at), **options)
    found = RecordedBuffer(recorded, SPEC).transitions(rows, **options)
    del expected["index"], found["index"]
    assert (found == expected).all()


def test_ranks_draw_from_shares_that_are_equal_and_apart(recorded: Recorded) -> None:
    everything = np.arange(4)
    shares = [rows_of_rank(recorded, everything, rank, 4) for rank in range(4)]
    assert [share.tolist() for share in shares] == [[0, 1], [2, 4], [5, 7], [8, 10]]  # of 9 one is left out
    assert rows_of_rank(recorded, np.array([1, 3]), 0, 1).tolist() == [4, 5, 10, 11]


def test_the_best_episodes_are_those_of_the_greatest_returns(recorded: Recorded) -> None:
    assert best(recorded, np.arange(4), 0.5).tolist() == [1, 2]
    assert best(recorded, np.array([0, 3]), 0.1).tolist() == [0]  # at least one
    assert best(recorded, np.arange(4), 1.0).tolist() == [0, 1, 2, 3]


def test_whole_episodes_are_held_out_at_random_by_the_seed() -> None:
    learned, held_out = split(np.arange(100), 0.2, np.random.SeedSequence(1))
    assert len(held_out) == 20 and sorted([*learned, *held_out]) == list(range(100))
    again, other = (split(np.arange(100), 0.2, np.random.SeedSequence(seed))[1] for seed in (1, 2))
    assert held_out.tolist() == again.tolist() != other.tolist()
    assert len(split(np.arange(5), 0.0, np.random.SeedSequence(1))[1]) == 0
    with pytest.raises(OptionError, match=r"validation_fraction=0\.5: 1 of 1 episodes would be held out"):
        split(np.arange(1), 0.5, np.random.SeedSequence(1))


def test_parts_are_joined_in_order(recorded: Recorded) -> None:
    both = joined([recorded, recorded])
    assert both.begins.tolist() == [0, 4, 7, 10, 12, 16, 19, 22]
    assert both.returns.tolist() == 2 * recorded.returns.tolist()
    assert np.flatnonzero(both.is_transition).tolist() == [0, 1, 2, 4, 5, 7, 8, 10, 11] + [
        12 + row for row in (0, 1, 2, 4, 5, 7, 8, 10, 11)
    ]
