"""Episodes in Parquet files: what is written is read, and what is damaged is named."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
from gymnasium import spaces

from lit_rl.errors import DataError
from lit_rl.files import episode_folder, episodes
from lit_rl.files.episode_folder import EpisodeFolder, TimeLine, WholeEpisode
from lit_rl.spec import EnvSpec, MultiAgentSpec

SPEC = EnvSpec("Test-v0", spaces.Box(-np.inf, np.inf, (2,)), spaces.Box(-2, 2, (1,)))
FIRST = "data/episodes-rank0-00000.parquet"


def episode(number: int, length: int = 3, agent: str = "agent_0") -> WholeEpisode:
    """Odd ones are truncated, even ones terminated; all numbers tell which they are."""
    t = np.arange(length)
    last = t == length - 1
    steps = {
        "observation": np.stack([np.full(length, number), t], 1).astype(np.float32),
        "action": np.linspace(-2, 2, length, dtype=np.float32)[:, None],
        "reward": number + t / 10,
        "terminated": last & (number % 2 == 0),
        "truncated": last & (number % 2 == 1),
        "log_prob": (-t - 1).astype(np.float32),
    }
    final = {"observation": np.array([number, length], np.float32)}
    return WholeEpisode([TimeLine(steps, final, number > 2, 7, agent)], [number])


def write(*episodes_: WholeEpisode, spec: Any = SPEC, folder: str = "data") -> EpisodeFolder:
    found = EpisodeFolder(folder, spec)
    found.add(episodes_)
    return found


def test_what_is_read_is_what_was_written() -> None:
    write(episode(0, 3), episode(1, 2))
    write(episode(2, 1))
    found, spec = episodes.read(["data"])
    assert spec == SPEC and found.agents is None
    assert found.begins.tolist() == [0, 4, 7]
    t = [0, 1, 2, 3, 0, 1, 2, 0, 1]
    number = [0, 0, 0, 0, 1, 1, 1, 2, 2]
    assert found.columns["observation"].tolist() == [[n, k] for n, k in zip(number, t)]
    assert found.closing.tolist() == [k == (3, 2, 1)[n] for n, k in zip(number, t)]
    assert np.flatnonzero(found.terminated).tolist() == [2, 7] and np.flatnonzero(found.truncated).tolist() == [5]
    np.testing.assert_allclose(found.reward, [0, 0.1, 0.2, 0, 1, 1.1, 0, 2, 0])
    assert found.columns["action"][:, 0].tolist() == [-2, 0, 2, 0, -2, 2, 0, -2, 0]
    assert found.columns["log_prob"].tolist() == [-1, -2, -3, 0, -1, -2, 0, -1, 0]
    table = pq.read_table(FIRST)
    assert table["episode"].to_pylist() == number[:7] and table["t"].to_pylist() == t[:7]
    assert table["policy_version"].to_pylist() == [7, 7, 7, 0, 7, 7, 0] and set(table["agent"].to_pylist()) == {
        "agent_0"
    }


def test_paths_are_files_folders_and_patterns_and_each_file_counts_once() -> None:
    write(episode(0), folder="a")
    write(episode(1), folder="b")
    for paths in (["a", "b"], ["*"], ["a/*.parquet", "b", "a"], [Path("a"), Path("b")]):
        assert len(episodes.read(paths)[0].begins) == 2
    assert episodes.is_own("a") and episodes.is_own("*/*.parquet") and not episodes.is_own("nowhere")
    pq.write_table(pa.table({"x": [1]}), "other.parquet")
    assert not episodes.is_own("other.parquet")


SPACES: dict[str, Any] = {
    "number": (spaces.Box(-1, 1, ()), spaces.Discrete(3, start=1)),
    "image": (spaces.Box(0, 255, (8, 6, 3), np.uint8), spaces.MultiDiscrete([2, 3], start=[0, 5])),
    "dict": (
        spaces.Dict(observation=spaces.Box(-1, 1, (2, 2)), action_mask=spaces.MultiBinary(3)),
        spaces.Dict(a=spaces.Discrete(2), b=spaces.Tuple([spaces.Box(0.5, 1, (1,), np.float64)])),
    ),
    "flags": (spaces.Box(0, 1, (2,), np.bool_), spaces.MultiBinary(3)),
    "whole numbers": (spaces.Discrete(5, start=-2), spaces.Box(-1, 1, (2, 2))),
}


@pytest.mark.parametrize("kind", SPACES)
def test_every_space_is_read_as_it_was_written(kind: str) -> None:
    spec = EnvSpec("Test-v0", *SPACES[kind])
    rng, steps, final = np.random.default_rng(0), {}, {}
    for path, space in episodes.spaces_of(spec).items():
        space.seed(0)
        values = np.array([space.sample() for _ in range(4)]).astype(episodes.row_dtype(space))
        steps[path] = values
        if path.startswith("observation"):
            final[path] = np.array(space.sample()).astype(values.dtype)
    steps |= {"reward": rng.standard_normal(4), "terminated": np.zeros(4, np.bool_)}
    steps |= {"truncated": np.arange(4) == 3, "log_prob": rng.standard_normal(4).astype(np.float32)}
    write(WholeEpisode([TimeLine(steps, final, False, 0)], []), spec=spec)
    found, read_spec = episodes.read(["data"])
    assert read_spec == spec
    for path in episodes.spaces_of(spec):
        column = found.columns[path]
        assert column.dtype == steps[path].dtype
        np.testing.assert_array_equal(column[:4], steps[path])
        np.testing.assert_array_equal(column[4], final.get(path, np.zeros_like(column[4])))


def test_agents_have_time_lines_of_their_own() -> None:
    spec = MultiAgentSpec("Test-v0", {"a": SPEC, "b": SPEC})
    both = WholeEpisode([*episode(1, 2, "a").lines, *episode(1, 1, "b").lines, *episode(1, 2, "b").lines], [0])
    write(both, WholeEpisode(episode(2, 1, "b").lines, [1]), spec=spec)
    found, read_spec = episodes.read(["data"])
    assert read_spec == spec and found.agents == ["a", "b", "b", "b"] and found.begins.tolist() == [0, 3, 5, 8]
    manifest = json.loads(Path("data/_manifest.json").read_text())
    assert manifest["episodes"] == 2 and manifest["return_max"] == pytest.approx(5.2)
    other = EnvSpec("Test-v0", SPEC.observation_space, spaces.Discrete(2))
    with pytest.raises(DataError, match=r"the action_space of agent 'a' is .*, that of 'b' Discrete"):
        EpisodeFolder("more", MultiAgentSpec("Test-v0", {"a": SPEC, "b": other}))


def test_the_manifest_says_what_is_there() -> None:
    write(episode(0, 3), episode(1, 1))
    write(episode(4, 2))
    found = json.loads(Path("data/_manifest.json").read_text())
    assert (found["episodes"], found["rows"], found["return_min"]) == (3, 9, pytest.approx(0.3))
    assert found["return_histogram"] == {"0.3": 1, "1": 1, "8.1": 1}
    assert found["return_mean"] == pytest.approx((0.3 + 1 + 8.1) / 3)
    assert found["shards"][Path(FIRST).name]["sha256"] == episodes.digest(Path(FIRST))
    assert [name for name in sorted(os.listdir("data")) if name[0] != "."] == [
        "_manifest.json",
        "episodes-rank0-00000.parquet",
        "episodes-rank0-00001.parquet",
    ]
    assert pyarrow.dataset.dataset("data").count_rows() == 9  # the folder is a data set to others, too


def test_episodes_that_are_there_are_not_written_again() -> None:
    assert write(episode(0), episode(1)).add([episode(0)]) == 1  # one run may have two that are the same
    again = EpisodeFolder("data", SPEC)
    assert again.add([episode(1), episode(2)]) == 1 and again.add([episode(0)]) == 0
    rows = episodes.read_rows(episodes.find(["data"]))
    assert rows.columns["episode"][rows.begins[:-1]].tolist() == [0, 1, 2, 3]
    changed = episode(0)
    changed.lines[0].final["observation"][0] = 5
    assert EpisodeFolder("data", SPEC).add([changed]) == 1


def test_another_rank_numbers_on_and_has_files_of_its_own() -> None:
    first, second = EpisodeFolder("data", SPEC, rank=0), EpisodeFolder("data", SPEC, rank=1)
    first.add([episode(0)])
    second.add([episode(1), episode(2)])
    first.add([episode(3)])
    names = [path.name for path in episodes.find(["data"])]
    assert names == [f"episodes-rank{rank}-{n:05d}.parquet" for rank, n in ((0, 0), (0, 1), (1, 0))]
    rows = episodes.read_rows(episodes.find(["data"]))
    assert sorted(rows.columns["episode"][rows.begins[:-1]].tolist()) == [0, 1, 2, 3]
    assert len(json.loads(Path("data/_manifest.json").read_text())["shards"]) == 3


@pytest.mark.parametrize("at", ["write", "rename", "enter"])
def test_who_is_stopped_while_it_writes_leaves_a_shard_that_is_whole_or_none(
    at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write(episode(0))

    class Killed(BaseException):
        """As if the process had gone."""

    def kill(*args: Any, **options: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        if at == "write":
            real = pq.write_table
            patch.setattr(pq, "write_table", lambda table, file, **o: (real(table[:2], file, **o), kill()))
        elif at == "rename":
            patch.setattr(episode_folder.os, "rename", kill)
        else:
            patch.setattr(folder, "_enter", kill)
        with pytest.raises(Killed):
            folder.add([episode(1)])
    there = at == "enter"
    assert len(episodes.read(["data"])[0].begins) == 1 + there
    assert EpisodeFolder("data", SPEC).add([episode(1), episode(2)]) == 2 - there
    rows = episodes.read_rows(episodes.find(["data"]))
    assert sorted(rows.columns["episode"][rows.begins[:-1]].tolist()) == [0, 1, 2]
    assert json.loads(Path("data/_manifest.json").read_text())["episodes"] == 3


def test_a_folder_of_another_environment_is_refused() -> None:
    write(episode(0))
    other = EnvSpec("Other-v0", SPEC.observation_space, spaces.Discrete(2))
    with pytest.raises(DataError, match=r"folder='data' has episodes of Test-v0 with action in Box\(.*Give another"):
        EpisodeFolder("data", other)
    Path("file").touch()
    with pytest.raises(DataError, match=r"^folder='file' cannot be written to: "):
        EpisodeFolder("file", SPEC)


# --- bad input --------------------------------------------------------------------------------------------------------


def change(**columns: Any) -> Callable[[], None]:
    """Writes the first file anew with other columns; None leaves one out."""

    def changed() -> None:
        table = pq.read_table(FIRST)
        for name, values in columns.items():
            if values is None:
                table = table.drop_columns([name])
            elif callable(values):
                at = table.column_names.index(name)
                table = table.set_column(
                    at, name, pa.array(values(table[name].to_pylist()), table.schema.field(name).type)
                )
            else:
                table = table.set_column(table.column_names.index(name), name, values)
        pq.write_table(table, FIRST)
        Path("data/_manifest.json").unlink()

    return changed


def at(row: int, value: Any) -> Callable[[list[Any]], list[Any]]:
    return lambda values: [*values[:row], value, *values[row + 1 :]]


def cut(size: int) -> Callable[[], None]:
    def changed() -> None:
        Path("data/_manifest.json").unlink()
        os.truncate(FIRST, size)

    return changed


def flip() -> None:
    content = bytearray(Path(FIRST).read_bytes())
    content[40] ^= 1
    Path(FIRST).write_bytes(content)


def other_spaces() -> None:
    spec = EnvSpec("Test-v0", SPEC.observation_space, spaces.Box(-2, 2, (3,)))
    one = episode(9)
    one.lines[0].steps["action"] = np.zeros((3, 3), np.float32)  # type: ignore[index]
    write(one, spec=spec, folder="other")
    shutil.copy("other/episodes-rank0-00000.parquet", "data/episodes-rank0-00007.parquet")


class Unpickled(pa.ExtensionType):
    def __init__(self) -> None:
        super().__init__(pa.binary(), "test.unpickled")

    def __arrow_ext_serialize__(self) -> bytes:
        return b""

    made = 0  # times that pyarrow let it read what a file says

    @classmethod
    def __arrow_ext_deserialize__(cls, storage_type: Any, serialized: bytes) -> "Unpickled":
        cls.made += 1
        return cls()


def extension() -> pa.Array:
    return pa.ExtensionArray.from_storage(Unpickled(), pa.array([b"x"] * 7, pa.binary()))


N = 7  # rows of the file
BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "no column": (change(reward=None), "has no column 'reward'. It has episode, t, agent, observation,"),
    "no folder": (lambda: shutil.rmtree("data"), "paths='data': there is no such file or folder."),
    "an empty folder": (
        lambda: [path.unlink() for path in Path("data").iterdir()],
        "paths='data': the folder has no file that ends in .parquet.",
    ),
    "a truncated file": (cut(1000), f"{FIRST} is no whole Parquet file: "),
    "an empty file": (cut(0), f"{FIRST} is no whole Parquet file: "),
    "a flipped bit": (flip, f"{FIRST} has another SHA-256 than data/_manifest.json says. It is damaged."),
    "a shorter file": (lambda: os.truncate(FIRST, 1000), f"{FIRST} has 1000 bytes: data/_manifest.json says "),
    "a missing file": (Path(FIRST).unlink, f"{FIRST} is missing: data/_manifest.json has it. Restore it, or delete"),
    "no manifest": (lambda: Path("data/_manifest.json").write_text("{"), "data/_manifest.json cannot be read: "),
    "other spaces": (other_spaces, "episodes-rank0-00007.parquet has action in Box(-2.0, 2.0, (3,), float32), data/"),
    "another type": (
        change(action=pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(2 * N, np.float32)), 2)),
        f"{FIRST}: column 'action' has the type fixed_size_list<element: float>[2], expected fixed_size_list<item: ",
    ),
    "texts": (change(reward=pa.array(["1"] * N)), f"{FIRST}: column 'reward' has the type string, expected double."),
    "bytes": (
        change(reward=pa.array([b"1"] * N)),
        f"{FIRST}: column 'reward' has the type binary, which could hold pickled objects: expected numbers, flags or",
    ),
    "an extension": (change(reward=extension()), f"{FIRST}: it has columns of Arrow extension types, which may hold "),
    "nothing": (change(reward=at(2, None)), f"{FIRST}: column 'reward' has no value in 1 places."),
    "NaN": (
        change(observation=at(1, [float("nan"), 1.0])), "episode 0, t=1: observation=[nan, 1.0]: expected finite"
    ),
    "a NaN reward": (change(reward=at(4, float("nan"))), "episode 1, t=0: reward=nan: expected finite numbers."),
    "an action outside": (
        change(action=at(5, [2.5])), "episode 1, t=1: action=[2.5]: expected a value in Box(-2.0, 2.0, (1,)"
    ),
    "a lost row": (change(t=lambda t: [0, 1, 3, 4, *t[4:]]), f"{FIRST}, episode 0, t=3: expected t=2."),
    "no closing row": (change(closing=at(3, False)), f"{FIRST}, episode 0, t=3: the closing row is missing."),
    "two closing rows": (change(closing=at(2, True)), f"{FIRST}, episode 0, t=2: a closing row in the middle of an"),
    "no end": (change(terminated=at(2, False)), f"{FIRST}, episode 0, t=3: its last step is neither terminated nor"),
    "two ends": (change(truncated=at(1, True)), f"{FIRST}, episode 0, t=1: the episode ends before its last step."),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_is_one_sentence(kind: str) -> None:
    write(episode(0, 3), episode(1, 2))
    break_, words = BAD[kind]
    if kind == "an extension":
        pa.register_extension_type(Unpickled())
    try:
        break_()
        made = Unpickled.made
        with pytest.raises(DataError) as caught:
            episodes.read(["data"])
        assert Unpickled.made == made
    finally:
        if kind == "an extension":
            pa.unregister_extension_type("test.unpickled")
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_an_extension_that_nobody_registered_is_refused_too() -> None:
    write(episode(0, 3), episode(1, 2))
    pa.register_extension_type(Unpickled())
    change(reward=extension())()
    pa.unregister_extension_type("test.unpickled")
    with pytest.raises(DataError, match="columns of Arrow extension types"):
        episodes.read(["data"])


def test_a_newer_format_is_named() -> None:
    write(episode(0))
    table = pq.read_table(FIRST)
    head = json.loads(table.schema.metadata[b"lit_rl"]) | {"format": 9}
    pq.write_table(table.replace_schema_metadata({"lit_rl": json.dumps(head)}), FIRST)
    Path("data/_manifest.json").unlink()
    with pytest.raises(DataError, match=r"has format 9, this lit_rl reads up to 2\. Update lit_rl\."):
        episodes.read(["data"])


def test_what_is_missing_in_the_metadata_is_named() -> None:
    write(episode(0))
    table = pq.read_table(FIRST)
    head = json.loads(table.schema.metadata[b"lit_rl"])
    del head["spec"]
    Path("data/_manifest.json").unlink()
    for metadata, key in (({}, "lit_rl"), ({"lit_rl": json.dumps(head)}, "spec")):
        pq.write_table(table.replace_schema_metadata(metadata), FIRST)
        with pytest.raises(
            DataError, match=f"has no key '{key}' in its metadata: expected a file that lit_rl recorded"
        ):
            episodes.read(["data"])


def test_a_closing_rows_zero_may_be_no_action() -> None:
    spec = EnvSpec("Test-v0", SPEC.observation_space, spaces.Box(1, 2, (1,)))
    one = episode(0)
    one.lines[0].steps["action"][...] = 1.5
    write(one, spec=spec)
    assert episodes.read(["data"])[0].columns["action"][:, 0].tolist() == [1.5, 1.5, 1.5, 0]


def old_format(path: str, numbers: list[int], ends: list[bool]) -> None:
    """A file as `EpisodeWriter` wrote it: no closing rows, texts for agents, no manifest."""
    tables = []
    for number, terminated in zip(numbers, ends):
        flat = pa.array(np.arange(4, dtype=np.float32))
        tables.append(
            pa.table(
                {
                    "episode": [number] * 2, "t": [0, 1], "agent": ["agent_0"] * 2,
                    "observation": pa.FixedSizeListArray.from_arrays(flat, 2),
                    "action": pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(2, np.float32)), 1),
                    "reward": [1.0, 1.0], "terminated": [False, terminated], "truncated": [False, not terminated],
                    "log_prob": pa.array(np.zeros(2, np.float32)), "policy_version": [3, 3],
                }
            )
        )  # fmt: skip
    metadata = {"lit_rl": json.dumps({"format": 1, "spec": SPEC.to_dict()})}
    Path(path).parent.mkdir(exist_ok=True)
    pq.write_table(pa.concat_tables(tables).replace_schema_metadata(metadata), path)


def test_files_of_the_first_format_are_read_and_have_no_closing_rows() -> None:
    old_format("data/episodes-rank0.parquet", [0, 2], [True, False])
    old_format("data/episodes-rank1.parquet", [2], [True])  # numbers of files that are put together need not differ
    found, spec = episodes.read(["data"])
    assert spec == SPEC and found.begins.tolist() == [0, 2, 4] and not found.closing.any()
    assert found.terminated.tolist() == [False, True, False, False, False, True]
    write(episode(0))
    assert len(episodes.read(["data"])[0].begins) == 4
