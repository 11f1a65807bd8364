"""Recorded episodes that are read from files while an algorithm learns. Most tests read in this process, not in Ray."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from gymnasium import spaces
from helpers import assert_same
from once_killed import OnceKilled
from tensordict import TensorDict
from test_offline import COLUMNS, Watched, WithReturns, fit

from lit_rl import DQN, LSTMNetwork, MultiAgent, OfflineDataModule, Rainbow
from lit_rl.datamodules import offline
from lit_rl.errors import CheckpointError, DataError, OptionError
from lit_rl.files.episode_folder import EpisodeFolder, TimeLine, WholeEpisode
from lit_rl.replay import streamed_feed
from lit_rl.replay.ray_blocks import ReadFiles, Shares, ray_blocks
from lit_rl.replay.windows import Windows
from lit_rl.spec import EnvSpec

LENGTHS = (8, 3, 5, 1, 7)  # of the three episodes in each file


def write_file(path: Path, first: int, length: int, **changed: Any) -> None:
    """Three episodes of `length` steps: see `test_offline.write`. The second is truncated, the others terminated."""
    episode, t = (x.reshape(-1) for x in np.mgrid[first : first + 3, :length])
    last = t == length - 1
    rows = {
        "episode": episode, "t": t, "next_t": t + 1, "action": (episode + t) % 2, "reward": episode + 0.25 * t,
        "terminated": last & (episode != first + 1), "truncated": last & (episode == first + 1),
    }  # fmt: skip
    pq.write_table(pa.table(rows | changed), path)


@pytest.fixture
def folder(tmp_path: Path) -> str:
    (tmp_path / "data").mkdir()
    for number, length in enumerate(LENGTHS):
        write_file(tmp_path / "data" / f"{number}.parquet", 3 * number, length)
    return str(tmp_path / "data")


def read_here(read: ReadFiles, part: int, store_bytes: int) -> Iterator[Any]:
    """What `ray_blocks` does, in this process."""
    while True:
        for rows in read.rows(part):
            yield part, rows
        part += 1


@pytest.fixture
def short(ray_session: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray, of which each execution reads few files: a process is asked for each, although it has only a few rows."""
    monkeypatch.setattr("lit_rl.replay.ray_blocks.PARTS", 8)


@pytest.fixture
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streamed_feed, "ray_blocks", read_here)
    monkeypatch.setattr(OfflineDataModule, "_connect_ray", lambda self: None)


def make_data(path: Any, **options: Any) -> OfflineDataModule:
    given = {
        "columns": COLUMNS, "max_updates": 36, "updates_per_batch": 6, "batches_per_epoch": 2, "batch_size": 16,
        "n_step": 1, "seed": 0, "streaming": True, "shuffle_window": 20,
    }  # fmt: skip
    return OfflineDataModule(path, **given | options)


NUM_ROWS = 3 * sum(LENGTHS)


def rows_of(batch: TensorDict, *left_out: str) -> list[list[float]]:
    """The rows of a minibatch, in an order that is the same for the same rows."""
    flat = batch.exclude(*left_out).flatten_keys("/")
    columns = [flat[name].double().reshape(len(batch), -1) for name in sorted(flat.keys())]
    return sorted(torch.cat(columns, 1).tolist())


# --- an epoch ---------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("without_ray")
@pytest.mark.parametrize(("n_step", "window"), [(1, 20), (3, 1), (3, 1000)])
def test_an_epoch_has_the_transitions_that_memory_has_each_once(
    n_step: int, window: int, folder: str, make_trainer
) -> None:
    streamed, in_memory = WithReturns(gamma=0.9), WithReturns(gamma=0.9)
    fit(make_trainer, streamed, make_data(folder, n_step=n_step, shuffle_window=window))
    data = make_data(folder, n_step=n_step, streaming=None)
    fit(make_trainer, in_memory, data)
    buffer = data.feed().buffer
    expected = buffer.transitions(buffer.rows, gamma=0.9, num_steps=(n_step, n_step))
    seen = torch.cat(streamed.seen)
    assert len(expected) == NUM_ROWS and len(seen) == 36 * 16 >= 3 * NUM_ROWS
    for epoch in range(3):
        batch = seen[epoch * NUM_ROWS : (epoch + 1) * NUM_ROWS]
        assert rows_of(batch, "index") == rows_of(expected, "index")
    assert streamed.seen[0].keys() == in_memory.seen[0].keys()
    assert streamed.seen[0]["next"].keys() == in_memory.seen[0]["next"].keys()
    dtypes = [{name: x.dtype for name, x in one.flatten_keys("/").items()} for one in (seen, in_memory.seen[0])]
    assert dtypes[0] == dtypes[1] and {len(batch) for batch in streamed.seen} == {16}


@pytest.mark.usefixtures("without_ray")
def test_own_episodes_stream_too(make_trainer, tmp_path: Path) -> None:
    spec = EnvSpec("Own", spaces.Box(-9, 9, (2,), np.float32), spaces.Discrete(3))
    rng, folder = np.random.default_rng(0), EpisodeFolder(tmp_path / "own", spec)
    for length in (4, 6, 3):  # a file each
        steps = {
            "observation": rng.random((length, 2), np.float32), "action": rng.integers(3, size=length),
            "reward": rng.random(length), "terminated": np.arange(length) == length - 1,
            "truncated": np.zeros(length, np.bool_), "log_prob": np.zeros(length, np.float32),
        }  # fmt: skip
        folder.add([WholeEpisode([TimeLine(steps, {"observation": rng.random(2, np.float32)}, False, 0)], [length])])
    fit(make_trainer, streamed := Watched(), make_data(folder.path, columns=None, max_updates=2))
    fit(make_trainer, Watched(), data := make_data(folder.path, columns=None, max_updates=1, streaming=None))
    buffer = data.feed().buffer
    expected = buffer.transitions(buffer.rows, gamma=0.99)
    assert rows_of(torch.cat(streamed.seen)[:13], "index") == rows_of(expected, "index")


@pytest.mark.usefixtures("without_ray")
def test_epochs_and_windows_are_shuffled_by_the_seed(folder: str, make_trainer) -> None:
    found = []
    for seed in (0, 0, 1):
        fit(make_trainer, algorithm := Watched(), make_data(folder, seed=seed))
        found.append(torch.cat(algorithm.seen)["observation"])
    assert (found[0] == found[1]).all() and (found[0] != found[2]).any()
    files = found[0][:, 0] // 3
    first, second = files[:NUM_ROWS], files[NUM_ROWS : 2 * NUM_ROWS]
    assert first.tolist() != second.tolist()
    assert len(files[:16].unique()) > 1  # rows of several files are mixed
    steps = found[0][:NUM_ROWS, 1]
    assert (steps[1:] - steps[:-1] != 1).float().mean() > 0.5  # those of an episode are apart


@pytest.mark.usefixtures("without_ray")
def test_sequences_are_next_to_each_other_and_have_every_row_once(folder: str, make_trainer) -> None:
    algorithm = Watched(network=LSTMNetwork, sequence_length=4, burn_in=2)
    fit(make_trainer, algorithm, make_data(folder, n_step=2))
    batch = algorithm.seen[-1]
    assert batch["observation"].shape == (4, 4, 2) and batch["burn_in", "observation"].shape == (4, 2, 2)
    assert not batch["state", "h"].any()
    per_epoch = 3 * sum(-(-length // 4) for length in LENGTHS)
    epoch = torch.cat(algorithm.seen)[:per_epoch]
    rows = epoch["observation"][epoch["mask"]]
    assert len(rows) == NUM_ROWS == len(rows.unique(dim=0))


def test_windows_never_reach_into_the_next_epoch() -> None:
    def read(part: int) -> Iterator[Any]:
        while True:
            yield part, {"x": np.arange(7) + 10 * part}
            part += 1

    windows = Windows(
        read, epoch_of=lambda part: part // 2, size=10, seed=lambda part, row: np.random.SeedSequence([part, row])
    )
    taken = [windows.take(14)["x"].tolist() for _ in range(3)]
    for epoch, rows in enumerate(taken):
        assert sorted(rows) == [*range(20 * epoch, 20 * epoch + 7), *range(20 * epoch + 10, 20 * epoch + 17)]


# --- learner processes ------------------------------------------------------------------------------------------------


def test_files_are_dealt_to_ranks_each_once_in_an_epoch() -> None:
    seed = np.random.SeedSequence(5)
    ranks = [Shares(5, seed, rank, 2) for rank in range(2)]
    dealt = [(one.epoch_of(part), one.file_of(part)) for part in range(10) for one in ranks]
    for epoch in range(4):
        assert sorted(file for of, file in dealt if of == epoch) == [0, 1, 2, 3, 4]
    assert [of for of, _ in dealt] == sorted(of for of, _ in dealt)
    orders = [[file for of, file in dealt if of == epoch] for epoch in range(4)]
    assert len({tuple(order) for order in orders}) == 4


# --- resuming ---------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("without_ray")
@pytest.mark.parametrize("steps", [3, 13, 29])
def test_a_resumed_run_equals_an_unbroken_one_bit_for_bit(
    steps: int, folder: str, make_trainer, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    fit(make_trainer, unbroken := Watched(), first := make_data(folder, n_step=[1, 3]))
    torch.manual_seed(0)
    part = make_data(folder, n_step=[1, 3])
    fit(make_trainer, Watched(), part, max_steps=steps).save_checkpoint(tmp_path / "part.ckpt")
    resumed, data = Watched(), make_data(folder, n_step=[1, 3])
    make_trainer().fit(resumed, data, ckpt_path=tmp_path / "part.ckpt")
    assert_same(torch.cat(resumed.seen).to_dict(), torch.cat(unbroken.seen[steps:]).to_dict())
    assert_same(dict(resumed.state_dict()), dict(unbroken.state_dict()))
    assert_same(data.rank_state(), first.rank_state())


@pytest.mark.usefixtures("without_ray")
def test_other_files_or_windows_are_refused_on_resume(folder: str, make_trainer, tmp_path: Path) -> None:
    fit(make_trainer, DQN(), make_data(folder), max_steps=3).save_checkpoint(tmp_path / "part.ckpt")
    with pytest.raises(CheckpointError, match="shuffled windows of 20 rows, here they have 30"):
        make_trainer().fit(DQN(), make_data(folder, shuffle_window=30), ckpt_path=tmp_path / "part.ckpt")
    write_file(Path(folder) / "9.parquet", 90, 4)
    with pytest.raises(CheckpointError, match="read other files, or had its data in memory"):
        make_trainer().fit(DQN(), make_data(folder), ckpt_path=tmp_path / "part.ckpt")
    with pytest.raises(CheckpointError, match="In the checkpoint's run the data streamed, here it is"):
        make_trainer().fit(DQN(), make_data(folder, streaming=False), ckpt_path=tmp_path / "part.ckpt")


# --- what streams -----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("without_ray")
def test_data_streams_above_the_memory_limit(folder: str, make_trainer) -> None:
    sizes = [size for _, size in offline.size_of([folder], are_tables=True)]
    for limit, streaming, streams in (
        (sum(sizes), None, False), (sum(sizes) - 1, None, True), (sum(sizes) - 1, False, False), ("4GB", True, True),
    ):  # fmt: skip
        data = make_data(folder, memory_limit=limit, streaming=streaming, max_updates=1)
        fit(make_trainer, DQN(), data)
        assert (data._files is not None) == streams
    assert data.memory_limit == 4 * 10**9


@pytest.mark.usefixtures("without_ray")
@pytest.mark.parametrize("pattern", ["", "/*.parquet"])
@pytest.mark.parametrize("streaming", [True, False])
def test_uris_are_read_as_pyarrow_knows_them(streaming: bool, pattern: str, folder: str, make_trainer) -> None:
    near, far = Watched(), Watched()
    fit(make_trainer, near, make_data(folder, streaming=streaming, max_updates=8))
    fit(make_trainer, far, make_data(f"file://{folder}{pattern}", streaming=streaming, max_updates=8))
    assert_same(torch.cat(far.seen).to_dict(), torch.cat(near.seen).to_dict())
    for name, message in (("gone", "there is no such file or folder"), ("x*.parquet", "no file matches it")):
        with pytest.raises(OptionError, match=message):
            fit(make_trainer, DQN(), make_data(f"file://{folder}/{name}", streaming=streaming))
    with pytest.raises(OptionError, match=r"paths='nowhere://x' cannot be looked at: "):
        fit(make_trainer, DQN(), make_data("nowhere://x", streaming=streaming))


# --- what cannot be ---------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("without_ray")
@pytest.mark.parametrize(
    ("options", "make", "message"),
    [
        ({"validation_fraction": 0.2}, DQN, "streaming=True: validation_fraction needs all data in memory. Either v"),
        ({"top_fraction": 0.2}, DQN, "top_fraction needs all data in memory. Either select episodes when you write"),
        ({"prioritized": True}, DQN, "prioritized replay needs all data in memory. Either set prioritized=False, or"),
        ({}, Rainbow, "prioritized replay needs all data in memory. Either set prioritized=False, or leave streaming"),
        ({"streaming": None, "memory_limit": 2000, "top_fraction": 0.5}, DQN, "is more than memory_limit, and strea"),
        ({}, lambda: MultiAgent({"a": DQN(), "b": DQN()}, policy_mapping={"*": "a"}), "a MultiAgent needs all data in"),
        ({"memory_limit": 100}, DQN, "bytes in memory, more than memory_limit=100. Write it as several files, or r"),
        ({"memory_limit": "4 XB"}, DQN, "memory_limit='4 XB': expected a number of bytes, or a text such as '4GB'."),
        ({"shuffle_window": 0}, DQN, "shuffle_window=0: expected a whole number of at least 1"),
    ],
)
def test_what_cannot_stream_is_one_sentence(
    options: dict, make: Callable[[], Any], message: str, folder: str, make_trainer
) -> None:
    with pytest.raises(OptionError) as caught:
        fit(make_trainer, make(), make_data(folder, **options))
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.usefixtures("without_ray")
def test_more_ranks_than_files_are_refused(folder: str, make_trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(L.Trainer, "world_size", 6)
    with pytest.raises(OptionError, match="5 files stream to 6 learner processes: expected at least a file for each"):
        fit(make_trainer, DQN(), make_data(folder))


@pytest.mark.usefixtures("without_ray")
def test_a_schema_that_changes_in_a_folder_is_refused(folder: str, make_trainer) -> None:
    write_file(Path(folder) / "5.parquet", 90, 4, action=[0.5] * 12)
    with pytest.raises(DataError, match=r"5\.parquet: column 'action' is double, in .*0\.parquet it is int64\. Expec"):
        fit(make_trainer, DQN(), make_data(folder))


# --- held-out episodes ------------------------------------------------------------------------------------------------


def test_a_checkpoint_is_judged_by_the_episodes_that_its_run_held_out(
    folder: str, make_trainer, tmp_path: Path
) -> None:
    options = {"streaming": False, "validation_fraction": 0.4, "seed": None}
    run = make_data(folder, **options)
    run.seed = 3
    fit(make_trainer, algorithm := Watched(), run).save_checkpoint(tmp_path / "run.ckpt")
    for seed, is_same in ((None, True), (4, False)):
        data, judged = make_data(folder, **options | {"seed": seed}), Watched()
        data.seed = data.seed or 5
        make_trainer().validate(judged, data, ckpt_path=tmp_path / "run.ckpt", verbose=False)
        assert (judged.episodes("judged") == algorithm.episodes("judged")) == is_same


# --- through Ray ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.usefixtures("short")
def test_ray_gives_the_same_rows_in_the_same_order(folder: str, make_trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    fit(make_trainer, through_ray := Watched(), make_data(folder, max_updates=14))
    monkeypatch.setattr(streamed_feed, "ray_blocks", read_here)
    fit(make_trainer, here := Watched(), make_data(folder, max_updates=14))
    assert_same(torch.cat(through_ray.seen).to_dict(), torch.cat(here.seen).to_dict())


@pytest.mark.slow
@pytest.mark.usefixtures("short")
def test_the_file_of_a_process_that_is_lost_is_read_again_and_no_row_comes_twice(
    folder: str, make_trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(read: ReadFiles, part: int, store_bytes: int) -> Iterator[Any]:
        return ray_blocks(OnceKilled(read, tmp_path / "killed"), part, store_bytes)

    monkeypatch.setattr("lit_rl.replay.ray_blocks.BLOCK_BYTES", 64)
    monkeypatch.setattr(streamed_feed, "ray_blocks", killed)
    fit(make_trainer, survived := Watched(), make_data(folder, max_updates=10))
    assert (tmp_path / "killed").exists()
    monkeypatch.setattr(streamed_feed, "ray_blocks", read_here)
    fit(make_trainer, here := Watched(), make_data(folder, max_updates=10))
    assert_same(torch.cat(survived.seen).to_dict(), torch.cat(here.seen).to_dict())


@pytest.mark.slow
@pytest.mark.usefixtures("short")
def test_a_mistake_in_a_file_is_one_sentence_also_through_ray(folder: str, make_trainer) -> None:
    write_file(Path(folder) / "5.parquet", 90, 4, reward=[float("nan")] * 12)
    with pytest.raises(DataError, match=r"5\.parquet: column 'reward' is nan in row 0: expected numbers\.$"):
        fit(make_trainer, DQN(), make_data(folder))


@pytest.mark.slow
@pytest.mark.usefixtures("short")
def test_each_row_of_an_own_dataset_is_an_episode_and_its_epoch_begins_anew(folder: str, make_trainer) -> None:
    import ray.data

    table = pa.concat_tables([pq.read_table(path) for path in sorted(Path(folder).glob("*.parquet"))]).to_pandas()
    episodes = [{name: part[name].to_numpy() for name in part} for _, part in table.groupby("episode")]
    dataset = ray.data.from_items(episodes, override_num_blocks=4)
    columns = {name: x for name, x in COLUMNS.items() if name != "episode"}
    fit(make_trainer, streamed := Watched(), data := make_data(dataset, columns=columns, max_updates=9, n_step=3))
    fit(make_trainer, in_memory := Watched(), held := make_data(folder, n_step=3, streaming=False, max_updates=1))
    buffer = held.feed().buffer
    expected = buffer.transitions(buffer.rows, gamma=in_memory.gamma, num_steps=(3, 3))
    assert rows_of(torch.cat(streamed.seen)[:NUM_ROWS], "index") == rows_of(expected, "index")
    position = data.feed().position()
    assert position["epoch"] == 1 and position["taken"] > 0
    data.feed().go_on(position)
    assert data.feed().position()["row"] == data.feed().position()["taken"] == 0
    with pytest.raises(OptionError, match=r"paths is a ray\.data\.Dataset, and streams: top_fraction needs all data"):
        fit(make_trainer, DQN(), make_data(dataset, columns=columns, top_fraction=0.5))
    with pytest.raises(DataError, match=r"ray\.data\.Dataset: column 'episode' has one value a row: expected an array"):
        fit(make_trainer, DQN(), make_data(ray.data.from_items([dict.fromkeys(table, 1)]), columns=columns))
