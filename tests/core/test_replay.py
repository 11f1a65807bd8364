"""The replay buffer: what is drawn is what happened, in every autoreset mode, over and over again around the ring."""

import errno
import gc
import os
from pathlib import Path
from typing import Any

import helpers
import numpy as np
import pytest
import torch
from envs import counter_vector
from gymnasium import spaces

from lit_rl import LSTMNetwork, Policy
from lit_rl.envs.make import EnvConfig
from lit_rl.errors import CheckpointError, ReplayError
from lit_rl.files.snapshots import CHUNK_ROWS
from lit_rl.replay import ReplayBuffer
from lit_rl.runners.env_runner import EnvRunner
from lit_rl.spec import EnvSpec
from lit_rl.transitions import bootstrap_observation, features, next_features
from lit_rl.trees import iterate

MODES = ["SameStep", "NextStep", "Disabled"]
ENVS = 3


def counter(mode: str = "SameStep") -> EnvConfig:
    return EnvConfig(counter_vector, {"mode": mode}, vectorization="native")


def make_runner(mode: str = "SameStep", length: int = 4, network: Any = None, **options: Any) -> EnvRunner:
    torch.manual_seed(0)
    policy = Policy(counter(mode).spec(), network=network)
    return helpers.make_runner(counter(mode), policy, ENVS, length, **options)


def fill(buffer: ReplayBuffer, runner: EnvRunner, times: int, first: int = 0) -> int:
    added = 0
    for _ in range(times):
        fragment = runner.sample()
        added += buffer.extend(fragment.rows.views() | fragment.finals.views(), range(first, first + ENVS))
    return added


def make_buffer(capacity: int = 1000, runner: EnvRunner | None = None, **options: Any) -> ReplayBuffer:
    if runner is not None and runner.policy.has_memory:
        options["state"] = dict(iterate(runner.policy.initial_state(1), "state"))
    return ReplayBuffer(counter().spec(), capacity, seed=np.random.SeedSequence(0), **options)


def length_of(obs: torch.Tensor, env: torch.Tensor) -> torch.Tensor:
    """CounterEnv's episode lengths, from its observations 100 * episode + t."""
    return 2 + (obs // 100 + env) % 3


def possible(obs: float, steps: int, ended: bool) -> list[int]:
    """Of which of the environments a transition can be that begins at `obs`."""
    episode, t = divmod(int(obs), 100)
    lengths = {env: 2 + (episode + env) % 3 for env in range(ENVS)}
    return [env for env, length in lengths.items() if (t + steps == length) == ended and t + steps <= length]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("capacity", "length"), [(1000, 4), (40, 4), (40, 1), (37, 3), (16, 3)])
def test_every_transition_drawn_is_one_that_happened(mode: str, capacity: int, length: int) -> None:
    buffer, runner = make_buffer(capacity), make_runner(mode, length)
    for _ in range(30):
        fill(buffer, runner, 1)
        batch = buffer.sample(64)
        obs, next_obs = batch["observation"][:, 0], batch["next", "observation"][:, 0]
        torch.testing.assert_close(next_obs, obs + 1)  # never the next episode's first
        torch.testing.assert_close(batch["next", "reward"], obs % 100 + 1)
        assert batch["action"].dtype == torch.int64
        for start, terminated in zip(obs.tolist(), batch["next", "terminated"].tolist()):
            assert possible(start, 1, ended=True) if terminated else True
            assert not terminated or start // 100 % 2 == 0  # odd episodes are truncated


@pytest.mark.parametrize("mode", ["SameStep", "Disabled"])
@pytest.mark.parametrize("rollout_length", [1, 2])
@pytest.mark.parametrize("capacity", [1000, 60])
def test_rows_of_a_long_fragment_lie_as_those_of_several_short_ones(
    mode: str, rollout_length: int, capacity: int
) -> None:
    long, short = make_buffer(capacity, priority_alpha=0.5), make_buffer(capacity, priority_alpha=0.5)
    runner, same = make_runner(mode, rollout_length), make_runner(mode, rollout_length)
    for times in (1, 4, 2, 6):
        fill(short, same, times)
        runner.set_version(0, [0.0] * times)
        fragment = runner.sample()
        arrays = fragment.rows.views() | fragment.finals.views()
        assert long.extend(arrays, range(ENVS), rollout_length) == ENVS * rollout_length * times
        assert (long._open, len(long)) == (short._open, len(short))
        for name, column in (long._saved() | long._priorities()).items():
            np.testing.assert_array_equal(column, (short._saved() | short._priorities())[name], name)


@pytest.mark.parametrize("mode", MODES)
def test_every_transition_is_drawn_equally_often(mode: str) -> None:
    buffer, runner = make_buffer(), make_runner(mode)
    added = fill(buffer, runner, 5)
    assert len(buffer) == added == ENVS * 4 * 5 - (0 if mode != "NextStep" else ENVS * 4 * 5 - added)
    counts = np.bincount(buffer.sample(20_000)["index"].numpy())
    seen = counts[counts > 0]
    assert len(seen) == added
    assert seen.min() > 0.75 * 20_000 / added and seen.max() < 1.25 * 20_000 / added


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("num_steps", [(3, 3), (5, 5), (1, 4)])
def test_n_steps_stop_at_the_end_of_an_episode_and_bootstrap_after_truncation(
    mode: str, num_steps: tuple[int, int]
) -> None:
    buffer, runner = make_buffer(60), make_runner(mode)
    low, high = num_steps
    found = set()
    for _ in range(30):
        fill(buffer, runner, 1)
        batch = buffer.sample(64, gamma=0.5, num_steps=num_steps)
        for obs, next_obs, reward, discount, terminated in zip(
            batch["observation"][:, 0].tolist(),
            batch["next", "observation"][:, 0].tolist(),
            batch["next", "reward"].tolist(),
            batch["discount"].tolist(),
            batch["next", "terminated"].tolist(),
        ):
            steps, t = int(next_obs - obs), int(obs) % 100
            assert 1 <= steps <= high
            assert discount == 0.5**steps
            assert reward == sum(0.5**k * (t + k + 1) for k in range(steps))
            if steps < low:  # the episode ended, or the newest row was reached
                assert terminated or possible(obs, steps, ended=True) or possible(obs, steps, ended=False)
            if terminated:
                assert obs // 100 % 2 == 0 and possible(obs, steps, ended=True)
            found.add((steps, terminated))
    assert {(k, False) for k in range(1, min(high, 3) + 1)} <= found
    assert (2, True) in found


def test_n_steps_agree_with_torchrl() -> None:
    from tensordict import TensorDict
    from torchrl.data.postprocs import MultiStep

    reward = torch.tensor([[1.0, 2.0, 4.0, 8.0, 16.0, 32.0]])
    done = torch.tensor([[False, False, True, False, False, False]])
    terminated = torch.zeros_like(done)  # row 2 is a truncation
    obs = torch.arange(6.0)[None, :, None]
    data = TensorDict(
        {
            "observation": obs,
            "next": {
                "observation": torch.tensor([1.0, 2.0, 77.0, 4.0, 5.0, 6.0])[None, :, None],
                "reward": reward[..., None], "done": done[..., None], "terminated": terminated[..., None],
            },
        },
        [1, 6],
    )  # fmt: skip
    theirs = MultiStep(gamma=0.5, n_steps=3)(data.clone())
    rows = {
        "observation": obs.numpy(), "last_observation": np.array([[6.0]], np.float32), "reward": reward.numpy(),
        "action": np.zeros((1, 6), np.int64), "terminated": terminated.numpy(), "truncated": done.numpy(),
        "is_init": np.array([[True, False, False, True, False, False]]), "final_step": np.array([[2]]),
        "final_observation": np.array([[[77.0]]], np.float32),
    }  # fmt: skip
    buffer = ReplayBuffer(counter().spec(), 100, seed=np.random.SeedSequence(0))
    buffer.extend(rows, [0])
    ours = buffer.sample(500, gamma=0.5, num_steps=(3, 3))
    for row in range(6):
        at = (ours["observation"][:, 0] == row).nonzero()[0, 0]
        torch.testing.assert_close(ours["next", "reward"][at], theirs["next", "reward"][0, row, 0])
        torch.testing.assert_close(ours["next", "observation"][at], theirs["next", "observation"][0, row])
        torch.testing.assert_close(ours["discount"][at], 0.5 ** theirs["steps_to_next_obs"].float()[0, row].squeeze())


def test_runners_fill_one_buffer_in_any_order() -> None:
    buffer, runners = make_buffer(90), [make_runner(), make_runner(length=2)]
    order = np.random.default_rng(0).integers(0, 2, 60)
    for runner in order:
        fill(buffer, runners[runner], 1, first=int(runner) * ENVS)
        batch = buffer.sample(64)
        torch.testing.assert_close(batch["next", "observation"], batch["observation"] + 1)
        longer = buffer.sample(64, num_steps=(3, 3))
        steps = (longer["next", "observation"] - longer["observation"])[:, 0]
        first = longer["observation"][:, 0] % 100 + 1
        torch.testing.assert_close(longer["next", "reward"], steps * (2 * first + steps - 1) / 2)


def test_an_environment_that_starts_anew_begins_a_new_chain() -> None:
    buffer = make_buffer()
    fill(buffer, make_runner(length=3), 1)
    fill(buffer, make_runner(length=3), 1)  # the same environments' numbers, but it was replaced: episodes begin
    assert len(buffer) == 2 * 3 * ENVS
    batch = buffer.sample(500, num_steps=(5, 5))
    assert (batch["next", "observation"] - batch["observation"]).max() <= 4
    torch.testing.assert_close(batch["observation"] // 100, batch["next", "observation"] // 100)


def test_observations_are_stored_once() -> None:
    image = spaces.Box(0, 255, (84, 84, 4), np.uint8)
    buffer = ReplayBuffer(EnvSpec("Images", image, spaces.Discrete(4)), 200)
    per_row = sum(column.nbytes for column in buffer._saved().values()) / 200
    assert per_row < 84 * 84 * 4 + 30
    vector = EnvSpec("Vectors", spaces.Box(-1, 1, (17,), np.float32), spaces.Box(-1, 1, (6,), np.float32))
    million = ReplayBuffer(vector, 1_000_000, priority_alpha=0.6)
    columns = [*million._saved().values(), million._tree.leaves]
    assert sum(column.nbytes for column in columns) <= 180e6


def test_a_fragment_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ReplayError, match="buffer_size=14: one fragment of 3 environments takes"):
        fill(make_buffer(14), make_runner(), 1)


def test_nothing_is_drawn_from_an_empty_buffer() -> None:
    with pytest.raises(ReplayError, match="empty"):
        make_buffer().sample(1)


# --- priorities -----------------------------------------------------------------------------------------------------


def test_transitions_are_drawn_in_proportion_to_their_priorities_and_weighted_against_it() -> None:
    buffer, runner = make_buffer(priority_alpha=0.5), make_runner(length=2)
    fill(buffer, runner, 1)
    index = torch.unique(buffer.sample(500)["index"])
    assert len(index) == 6
    td_error = torch.tensor([1.0, 4.0, 9.0, 16.0, 25.0, 36.0])
    buffer.update_priorities(index, td_error)
    probability = torch.arange(1.0, 7.0) / 21  # the square roots
    batch = buffer.sample(21_000, beta=0.5)
    counts = torch.bincount(batch["index"])[index]
    torch.testing.assert_close(counts / 21_000.0, probability, atol=0.01, rtol=0.0)
    weight = (6 * probability) ** -0.5
    for row, expected in zip(index, weight / weight.max()):
        found = batch["weight"][batch["index"] == row]
        torch.testing.assert_close(found, torch.full_like(found, float(expected)), atol=1e-4, rtol=1e-4)


def test_a_new_transition_has_the_greatest_priority_so_far() -> None:
    buffer, runner = make_buffer(priority_alpha=1.0), make_runner(length=1)
    fill(buffer, runner, 1)
    first = torch.unique(buffer.sample(200)["index"])
    buffer.update_priorities(first, torch.tensor([8.0, 1.0, 1.0]))
    fill(buffer, runner, 1)
    counts = torch.bincount(buffer.sample(34_000)["index"])
    new = [row for row in counts.nonzero().flatten().tolist() if row not in first.tolist()]
    assert len(new) == 3
    assert (abs(counts[new] - 8000) < 400).all()  # 8 of 8 + 1 + 1 + 3 * 8


def test_the_priority_of_an_overwritten_row_is_not_written_back() -> None:
    buffer, runner = make_buffer(20, priority_alpha=1.0), make_runner(length=2)
    fill(buffer, runner, 1)
    old = buffer.sample(8)
    fill(buffer, runner, 12)
    flags_before = len(buffer)
    buffer.update_priorities(old["index"], torch.full((8,), 1e6))
    batch = buffer.sample(500)
    torch.testing.assert_close(batch["next", "observation"], batch["observation"] + 1)
    assert len(buffer) == flags_before


# --- sequences ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("capacity", [1000, 60])
def test_sequences_are_of_one_episode_and_padded_after_its_end(mode: str, capacity: int) -> None:
    runner = make_runner(mode, network=LSTMNetwork, keep_states=True)
    buffer = make_buffer(capacity, runner)
    for _ in range(20):
        fill(buffer, runner, 1)
        batch = buffer.sample_sequences(32, length=5)
        obs, mask = batch["observation"][..., 0], batch["mask"]
        assert mask[:, 0].all() and (mask[:, 1:] <= mask[:, :-1]).all()
        whole = torch.cat([obs, batch["last_observation"]], 1)
        following, real = whole[:, 1:], mask
        torch.testing.assert_close(following[real], obs[real] + 1)  # also the row after the last real one
        torch.testing.assert_close(batch["next", "reward"][real], obs[real] % 100 + 1)
        assert (batch["is_init"][real] == (obs[real] % 100 == 0)).all()
        assert not batch["next", "terminated"][~real].any()


def test_n_steps_in_sequences_are_those_of_transitions() -> None:
    runner = make_runner(network=LSTMNetwork, keep_states=True)
    buffer = make_buffer(500, runner)
    fill(buffer, runner, 10)
    batch = buffer.sample_sequences(200, length=6, gamma=0.5, num_steps=(3, 3))
    obs, mask = batch["observation"][..., 0], batch["mask"]
    next_obs = bootstrap_observation(batch)[..., 0]
    steps = (next_obs - obs)[mask]
    assert steps.min() == 1 and steps.max() == 3
    torch.testing.assert_close(batch["discount"][mask], 0.5**steps)
    t = obs[mask] % 100
    expected = sum(torch.where(k < steps, 0.5**k * (t + k + 1), 0.0) for k in range(3))
    torch.testing.assert_close(batch["next", "reward"][mask], expected)
    for start, k, terminated in zip(obs[mask].tolist(), steps.tolist(), batch["next", "terminated"][mask].tolist()):
        assert not terminated or (start // 100 % 2 == 0 and possible(start, int(k), ended=True))


@pytest.mark.parametrize("burn_in", [0, 3])
@pytest.mark.parametrize("mode", ["SameStep", "NextStep"])
def test_features_of_sequences_are_those_the_runner_had(mode: str, burn_in: int) -> None:
    """With unchanged weights stored states, burn-in and whole episodes all lead to the same features."""
    runner = make_runner(mode, network=LSTMNetwork, keep_states=True)
    policy, buffer = runner.policy, make_buffer(300, runner)
    fill(buffer, runner, 12)
    batch = buffer.sample_sequences(100, length=4, burn_in=burn_in)
    with torch.no_grad():
        found, following = features(policy, batch)
        torch.testing.assert_close(next_features(policy, batch), following)
        obs, mask = batch["observation"], batch["mask"]
        for s in range(100):
            first = obs[s, 0, 0] // 100 * 100
            episode = torch.arange(float(first), float(first) + 6)[:, None]  # from its first step on
            state = {name: torch.from_numpy(x) for name, x in policy.initial_state(1).items()}
            expected = policy.unroll(episode[None], state, torch.zeros(1, 6, dtype=torch.bool))[0][0]
            for t in mask[s].nonzero().flatten().tolist():
                at = int(obs[s, t, 0] - first)
                torch.testing.assert_close(found[s, t], expected[at])
                torch.testing.assert_close(following[s, t], expected[at + 1])


def test_burn_in_is_left_out_where_the_steps_before_are_overwritten() -> None:
    runner = make_runner(network=LSTMNetwork, keep_states=True)
    buffer = make_buffer(40, runner)
    fill(buffer, runner, 30)
    batch = buffer.sample_sequences(200, length=2, burn_in=4)
    before, real = batch["burn_in"], batch["burn_in", "real"]
    assert real.any()
    steps = before["observation"][real][..., 0]
    ahead = torch.cat([steps[:, 1:], batch["observation"][real][:, :1, 0]], 1)
    is_first = torch.cat([before["is_init"][real][:, 1:], batch["is_init"][real][:, :1]], 1)
    torch.testing.assert_close(ahead[~is_first], steps[~is_first] + 1)


# --- on disk --------------------------------------------------------------------------------------------------------


def test_a_buffer_on_disk_gives_what_one_in_memory_gives(tmp_path: Path) -> None:
    memory, disk = make_buffer(60), make_buffer(60, storage_dir=tmp_path / "buffer")
    for buffer in (memory, disk):
        fill(buffer, make_runner(), 15)
    for _ in range(3):
        a, b = memory.sample(32), disk.sample(32)
        for key in ("observation", "action", "index", ("next", "observation"), ("next", "reward")):
            assert torch.equal(a[key], b[key])
    assert list((tmp_path / "buffer").glob("replay-*/*.bin"))
    del disk, buffer, b
    gc.collect()
    assert not list((tmp_path / "buffer").iterdir())


def test_a_full_disk_is_an_error_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lit_rl.files.snapshots.GROWTH", 400)
    buffer, runner = make_buffer(1000, storage_dir=tmp_path), make_runner()
    fill(buffer, runner, 1)
    stored = len(buffer)

    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(ReplayError, match=r"the disk is full after \d+ of buffer_size=1000 rows; .*lower buffer_size"):
        fill(buffer, runner, 20)
    assert len(buffer) >= stored
    batch = buffer.sample(100)  # what there is can still be drawn
    torch.testing.assert_close(batch["next", "observation"], batch["observation"] + 1)


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ReplayError, match=r"storage_dir=.*file"):
        make_buffer(storage_dir=tmp_path / "file")


@pytest.mark.parametrize("options", [{}, {"priority_alpha": 0.6}])
def test_a_saved_buffer_goes_on_as_if_nothing_had_happened(tmp_path: Path, options: dict) -> None:
    buffer, runner = make_buffer(200, **options), make_runner()
    fill(buffer, runner, 30)
    if options:
        batch = buffer.sample(32)
        buffer.update_priorities(batch["index"], torch.rand(32))
    state = buffer.save(tmp_path)
    again = make_buffer(200, **options)
    again.load(tmp_path, state)
    fragments = [runner.sample() for _ in range(3)]
    for fragment in fragments:
        for one in (buffer, again):
            one.extend(fragment.rows.views() | fragment.finals.views(), range(ENVS))
    assert len(buffer) == len(again)
    for _ in range(3):
        a, b = buffer.sample(64, num_steps=(1, 3), beta=0.4), again.sample(64, num_steps=(1, 3), beta=0.4)
        for key in a.keys(include_nested=True, leaves_only=True):
            assert torch.equal(a[key], b[key]), key


def test_saving_again_writes_only_what_changed(tmp_path: Path) -> None:
    buffer, runner = make_buffer(4 * CHUNK_ROWS), make_runner(length=500)
    fill(buffer, runner, 6)
    first = set(buffer.save(tmp_path)["files"])
    fill(buffer, runner, 1)
    second = set(buffer.save(tmp_path)["files"])
    assert first & second  # an old chunk is kept as it is
    assert len(second - first) <= 2  # the chunk it ended in, and perhaps the next
    assert {path.name for path in tmp_path.iterdir()} == second


def test_a_damaged_or_wrong_snapshot_is_refused(tmp_path: Path) -> None:
    buffer = make_buffer(100)
    fill(buffer, make_runner(), 3)
    state = buffer.save(tmp_path)
    with pytest.raises(ReplayError, match="buffer_size=50: the checkpoint's replay buffer has 100 rows"):
        make_buffer(50).load(tmp_path, state)
    (tmp_path / next(iter(state["files"]))).write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match="missing or damaged"):
        make_buffer(100).load(tmp_path, state)
