"""Sequences across the ends of episodes: what is drawn is what happened, in every autoreset mode."""

from pathlib import Path
from typing import Any

import helpers
import numpy as np
import pytest
import torch
from envs import FailingEnv, counter_vector
from tensordict import TensorDict

from lit_rl import LatentPolicy
from lit_rl.envs.make import EnvConfig
from lit_rl.errors import OptionError, ReplayError
from lit_rl.files import snapshots
from lit_rl.replay.buffer import DONE
from lit_rl.replay.sequences import SequenceBuffer
from lit_rl.runners.env_runner import EnvRunner
from lit_rl.trees import iterate

MODES = ["SameStep", "NextStep", "Disabled"]
ENVS, LENGTH = 3, 6
SIZE = {"deter": 4, "hidden": 3, "stoch": 2, "classes": 2, "units": 4, "depth": 1, "layers": 1, "blocks": 1, "bins": 3}


def counter(mode: str = "SameStep") -> EnvConfig:
    return EnvConfig(counter_vector, {"mode": mode}, vectorization="native")


def make_runner(mode: str = "SameStep", length: int = 4, env: EnvConfig | None = None, **options: Any) -> EnvRunner:
    torch.manual_seed(0)
    policy = LatentPolicy((env or counter(mode)).spec(), size=SIZE)
    return helpers.make_runner(env or counter(mode), policy, ENVS, length, keep_states=True, **options)


def make_buffer(runner: EnvRunner, capacity: int = 1000, **options: Any) -> SequenceBuffer:
    state = dict(iterate(runner.policy.initial_state(1), "state"))
    options = {"length": LENGTH, "seed": np.random.SeedSequence(0)} | options
    return SequenceBuffer(runner.policy.spec, capacity, state=state, **options)


def fill(buffer: SequenceBuffer, runner: EnvRunner, times: int, rollout_length: int | None = None) -> None:
    for _ in range(times):
        fragment = runner.sample()
        buffer.extend(fragment.rows.views() | fragment.finals.views(), range(ENVS), rollout_length)


def check(batch: TensorDict) -> None:
    """CounterEnv's episode k has k at its first observation's hundreds, lasts 2 to 4 steps, and rewards step t by t."""
    obs, reward = batch["observation"][..., 0].numpy().astype(int), batch["reward"].numpy()
    first, last, terminal = (batch[key].numpy() for key in ("is_first", "is_last", "is_terminal"))
    episode, t = np.divmod(obs, 100)
    np.testing.assert_array_equal(first, t == 0)
    np.testing.assert_array_equal(reward, t)  # that received on arriving, 0 in the first row
    follows = (episode[:, 1:] == episode[:, :-1]) & (t[:, 1:] == t[:, :-1] + 1)
    begins = (episode[:, 1:] == episode[:, :-1] + 1) & (t[:, 1:] == 0)
    np.testing.assert_array_equal(begins, last[:, :-1])
    assert (follows | begins).all()
    np.testing.assert_array_equal(terminal, last & (episode % 2 == 0))  # odd episodes are truncated
    lengths = {2 + (k + env) % 3 for k in range(3) for env in range(ENVS)}
    assert set(t[last]) <= lengths


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("capacity", "length"), [(1000, 4), (60, 4), (60, 1), (53, 3)])
def test_every_sequence_drawn_is_one_that_happened(mode: str, capacity: int, length: int) -> None:
    runner = make_runner(mode, length)
    buffer, lasts = make_buffer(runner, capacity), 0
    for _ in range(40):
        fill(buffer, runner, 1)
        if buffer.can_draw:
            batch = buffer.sample_across(8)
            assert batch["observation"].shape == (8, LENGTH, 1) and batch["previous_action"].shape == (8, LENGTH)
            check(batch)
            lasts += int(batch["is_last"].sum())
    assert lasts > 50 and buffer._written > (2 * capacity if capacity < 100 else 100)


@pytest.mark.parametrize("mode", MODES)
def test_the_state_before_a_sequence_is_that_with_which_the_policy_acted(mode: str) -> None:
    runner = make_runner(mode)
    buffer = make_buffer(runner)
    fill(buffer, runner, 10)
    batch = buffer.sample_across(64)
    first = batch["is_first"][:, 0]
    action = runner.policy.as_numbers(batch["previous_action"][:, 0])
    torch.testing.assert_close(batch["state", "action"][~first], action[~first])
    assert (batch["state", "deter"][first] == 0).all() and (batch["state", "stoch"][~first].sum(-1) == 2).all()
    assert not batch["is_last"][:, 0].any()  # the state before a final observation is nowhere


def test_every_row_is_drawn_once_before_others_are_drawn_at_random() -> None:
    runner = make_runner(length=1)
    buffer, seen = make_buffer(runner), []
    for _ in range(4 * LENGTH):
        fill(buffer, runner, 1)
        while buffer._queue:
            batch = buffer.sample_across(1)
            seen += batch["following"].flatten().tolist()
    assert set(seen) >= set(range(min(seen), max(seen) - ENVS * LENGTH))  # none is left out
    assert len(seen) - len(set(seen)) <= len(seen) // LENGTH  # and one of a sequence at most is drawn again
    check(buffer.sample_across(16))  # and then at random


def test_sequences_are_drawn_equally_often() -> None:
    runner = make_runner()
    buffer = make_buffer(runner)
    fill(buffer, runner, 8)
    buffer._queue.clear()
    begins = np.concatenate([buffer._draw_begins(500, buffer.rng) for _ in range(40)])
    counts = np.bincount(begins)[np.flatnonzero(np.bincount(begins))]
    expected = 20_000 / len(counts)
    assert counts.min() > 0.7 * expected and counts.max() < 1.3 * expected
    can_begin = (buffer._flags & DONE == 0)[: buffer._written].sum() - 3  # but for each environment's newest
    assert can_begin - 3 * LENGTH <= len(counts) < can_begin


@pytest.mark.parametrize("rollout_length", [1, 2])
@pytest.mark.parametrize("capacity", [1000, 80])
def test_a_long_fragment_gives_the_sequences_of_several_short_ones(rollout_length: int, capacity: int) -> None:
    runner, same = make_runner(length=rollout_length), make_runner(length=rollout_length)
    long, short = make_buffer(runner, capacity), make_buffer(same, capacity)
    for times in (1, 4, 2, 3, 1, 4, 2):
        fill(short, same, times)
        runner.set_version(0, [0.0] * times)
        fill(long, runner, 1, rollout_length)
        assert (long._newest, long._due) == (short._newest, short._due)
        np.testing.assert_array_equal(long._flags, short._flags)
        assert {n for n in long._queue if long._is_there(n)} == {n for n in short._queue if short._is_there(n)}


def test_latents_go_back_to_the_rows_after_those_they_are_of() -> None:
    runner = make_runner()
    buffer = make_buffer(runner)
    fill(buffer, runner, 10)
    batch = buffer.sample_across(1)
    numbers = batch["following"][0]
    deter = torch.arange(LENGTH * 4.0).reshape(1, LENGTH, 4)
    deter[0, 2, 1] = torch.nan  # it stays as it was
    before = buffer._columns["state/deter"].copy()
    buffer.write_states(batch["following"], {"deter": deter, "stoch": torch.ones(1, LENGTH, 4)})
    for i, number in enumerate(numbers.tolist()):
        found = buffer._columns["state/deter"][number]
        np.testing.assert_array_equal(found, before[number] if i == 2 else deter[0, i].numpy())
    np.testing.assert_array_equal(
        buffer._columns["observation"][numbers[:-1].numpy(), 0], batch["observation"][0, 1:, 0].numpy()
    )
    untouched = np.setdiff1d(np.arange(1000), numbers.numpy())
    np.testing.assert_array_equal(buffer._columns["state/deter"][untouched], before[untouched])


def test_latents_of_rows_that_were_overwritten_are_left_out() -> None:
    runner = make_runner()
    buffer = make_buffer(runner, 60)
    fill(buffer, runner, 5)
    batch = buffer.sample_across(4)
    fill(buffer, runner, 20)
    before = buffer._columns["state/deter"].copy()
    buffer.write_states(batch["following"], {"deter": torch.full((4, LENGTH, 4), 77.0)})
    np.testing.assert_array_equal(buffer._columns["state/deter"], before)


def test_a_runner_that_was_replaced_begins_new_sequences() -> None:
    runner = make_runner()
    buffer = make_buffer(runner)
    fill(buffer, runner, 5)
    other = make_runner(seed=5)
    fill(buffer, other, 5)
    for _ in range(20):
        check(buffer.sample_across(16))


def test_an_environment_that_fails_ends_its_episode_by_truncation() -> None:
    runner = make_runner(env=EnvConfig(FailingEnv))
    buffer = make_buffer(runner)
    fill(buffer, runner, 3)
    for _ in range(20):
        batch = buffer.sample_across(16)
        last, first = batch["is_last"], batch["is_first"]
        assert torch.equal(last[:, :-1], first[:, 1:])
        t = batch["observation"][..., 0] % 100
        assert ((t == 0) == first).all() and torch.equal(batch["reward"], torch.where(first, 0.0, t))


def test_a_buffer_that_is_saved_and_loaded_draws_the_same(tmp_path: Path) -> None:
    runner = make_runner()
    buffer, other = make_buffer(runner, 60), make_buffer(runner, 60, seed=np.random.SeedSequence(9))
    fill(buffer, runner, 12)
    buffer.sample_across(1)
    other.load(tmp_path, buffer.save(tmp_path))
    for _ in range(5):
        fragment = runner.sample()
        for each in (buffer, other):
            each.extend(fragment.rows.views() | fragment.finals.views(), range(ENVS))
        mine, theirs = buffer.sample_across(8), other.sample_across(8)
        for key in mine.keys(True, True):
            assert torch.equal(mine[key], theirs[key]), key
    with pytest.raises(ReplayError, match="sequence_length=5: the checkpoint's replay buffer has sequences of 6 rows"):
        make_buffer(runner, 60, length=5).load(tmp_path, buffer.save(tmp_path))


def test_snapshots_hold_where_sequences_begin_in_rows_that_were_saved_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshots, "CHUNK_ROWS", 4)
    runner = make_runner(length=1)
    buffer, other = make_buffer(runner, 60), make_buffer(runner, 60)
    for _ in range(3 * LENGTH):
        fill(buffer, runner, 1)
        state = buffer.save(tmp_path)
    other.load(tmp_path, state)
    np.testing.assert_array_equal(other._flags, buffer._flags)


def test_sequences_longer_than_the_buffer_are_refused() -> None:
    with pytest.raises(OptionError, match="sequence_length=6: expected sequences that fit into buffer_size=7 rows"):
        make_buffer(make_runner(), 7)


def test_a_buffer_without_a_sequence_says_so() -> None:
    runner = make_runner(length=1)
    buffer = make_buffer(runner)
    fill(buffer, runner, LENGTH // 2)
    assert not buffer.can_draw
    with pytest.raises(ReplayError, match="The replay buffer holds no sequence of 6 rows"):
        buffer.sample_across(1)
    fill(buffer, runner, LENGTH)
    assert buffer.can_draw
