"""Episodes from tables that other tools wrote, and from Minari."""

import json
import pickle
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from gymnasium import spaces
from pyarrow import csv

from lit_rl.errors import DataError, LitRLError, OptionError
from lit_rl.files.recorded import read_recorded
from lit_rl.recorded import Recorded
from lit_rl.spec import EnvSpec, MultiAgentSpec

# Two episodes: of 3 steps, terminated, and of 2 steps, truncated.
X = [0.0, 1.0, 2.0, 10.0, 11.0]
ROWS: dict[str, Any] = {
    "x": X, "y": [-x for x in X], "next_x": [1.0, 2.0, 3.0, 11.0, 12.0], "push": [0.5, -0.5, 1.0, 0.0, -1.0],
    "r": [1.0, 2.0, 3.0, 4.0, 5.0], "dead": [False, False, True, False, False], "late": [False] * 4 + [True],
    "run": ["a", "a", "a", "b", "b"], "k": [0, 1, 2, 0, 1],
}  # fmt: skip
COLUMNS = {
    "observation": ["x", "y"], "action": "push", "reward": "r", "terminated": "dead", "truncated": "late",
    "episode": "run",
}  # fmt: skip
ENV = EnvSpec("Test", spaces.Box(-100, 100, (2,), np.float32), spaces.Box(-1, 1, (1,), np.float32))


def write(path: Path, rows: dict[str, Any]) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.table(rows), path)
    elif path.suffix == ".csv":
        csv.write_csv(pa.table(rows), path)
    else:
        lines = (dict(zip(rows, row)) for row in zip(*rows.values()))
        path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return path


def read(path: Path, columns: dict[str, Any] | None = COLUMNS, **options: Any) -> tuple[Recorded, Any]:
    return read_recorded([str(path)], columns=columns, **options)


@pytest.mark.parametrize("ending", [".parquet", ".csv", ".json", ".jsonl"])
def test_a_table_of_any_format_has_the_same_episodes(ending: str, tmp_path: Path) -> None:
    recorded, spec = read(write(tmp_path / f"table{ending}", ROWS))
    assert recorded.columns["observation"].tolist() == [[x, -x] for x in X]
    assert recorded.columns["action"].tolist() == [[0.5], [-0.5], [1.0], [0.0], [-1.0]]
    assert recorded.reward.tolist() == [1, 2, 3, 4, 5] and recorded.begins.tolist() == [0, 3]
    assert recorded.terminated.tolist() == ROWS["dead"] and recorded.truncated.tolist() == ROWS["late"]
    assert np.flatnonzero(recorded.is_transition).tolist() == [0, 1, 2, 3]  # what came after the last is not known
    assert spec.observation_space == spaces.Box(-np.inf, np.inf, (2,), np.float32)
    assert spec.action_space == spaces.Box(-1, 1, (1,), np.float32)
    dtypes = {name: x.dtype for name, x in recorded.columns.items()}
    assert dtypes == {"observation": np.float32, "action": np.float32}
    assert all(x.flags.writeable and x.flags.c_contiguous for x in recorded.columns.values())


def test_next_observations_become_closing_rows(tmp_path: Path) -> None:
    columns = COLUMNS | {"observation": "x", "next_observation": "next_x"}
    recorded, _ = read(write(tmp_path / "t.parquet", ROWS), columns)
    assert recorded.columns["observation"].squeeze(-1).tolist() == [0, 1, 2, 3, 10, 11, 12]
    assert recorded.closing.tolist() == [False] * 3 + [True] + [False] * 2 + [True]
    assert recorded.begins.tolist() == [0, 4] and recorded.is_transition.sum() == 5
    assert recorded.terminated.tolist() == [False, False, True, False, False, False, False]
    assert recorded.truncated.tolist() == [False] * 5 + [True, False]


def test_without_a_column_of_episodes_they_end_where_flags_say_and_with_the_file(tmp_path: Path) -> None:
    columns = {name: x for name, x in COLUMNS.items() if name != "episode"}
    first, second = write(tmp_path / "1.parquet", ROWS), write(tmp_path / "2.csv", {k: x[:2] for k, x in ROWS.items()})
    recorded, _ = read_recorded([str(first), str(second)], columns=columns)
    assert recorded.begins.tolist() == [0, 3, 5]
    assert recorded.is_dropped.tolist() == [False, True, True]
    again, _ = read_recorded([str(tmp_path)], columns=columns)
    assert sorted(again.lengths.tolist()) == [2, 2, 3]
    assert read_recorded([str(tmp_path / "*.csv")], columns=columns)[0].lengths.tolist() == [2]


def test_equal_ids_in_several_files_are_different_episodes(tmp_path: Path) -> None:
    for name in ("1.parquet", "2.parquet"):
        write(tmp_path / name, ROWS)
    assert read(tmp_path)[0].begins.tolist() == [0, 3, 5, 8]


@pytest.mark.parametrize("order", [[3, 0, 1, 4, 2], [0, 3, 1, 4, 2]])
def test_rows_of_an_episode_that_are_apart_are_brought_together(order: list[int], tmp_path: Path) -> None:
    path = write(tmp_path / "t.parquet", {name: [x[i] for i in order] for name, x in ROWS.items()})
    recorded, _ = read(path)
    expected = [10, 11, 0, 1, 2] if order[0] == 3 else [0, 1, 2, 10, 11]
    assert recorded.columns["observation"][:, 0].tolist() == expected


def test_steps_say_in_which_order_an_episode_is(tmp_path: Path) -> None:
    path = write(tmp_path / "t.parquet", {name: x[::-1] for name, x in ROWS.items()})
    recorded, _ = read(path, COLUMNS | {"step": "k"})
    assert recorded.columns["observation"][:, 0].tolist() == [10, 11, 0, 1, 2]
    assert recorded.terminated.tolist() == [False, False, False, False, True]


def test_lists_nested_parts_and_pictures_have_their_shapes(tmp_path: Path) -> None:
    image = np.arange(5 * 12, dtype=np.uint8)
    spec = EnvSpec(
        "Test",
        spaces.Dict({"arm": spaces.Box(-99, 99, (2,), np.float32), "eye": spaces.Box(0, 255, (2, 2, 3), np.uint8)}),
        spaces.Discrete(3),
    )
    rows = ROWS | {"eye": pa.FixedSizeListArray.from_arrays(pa.array(image), 12), "choice": [0, 1, 2, 1, 0]}
    columns = COLUMNS | {"observation": {"arm": ["x", "y"], "eye": "eye"}, "action": "choice"}
    recorded, _ = read(write(tmp_path / "t.parquet", rows), columns, spec=spec)
    assert (recorded.columns["observation/eye"] == image.reshape(5, 2, 2, 3)).all()
    assert recorded.columns["observation/eye"].dtype == np.uint8 and recorded.columns["action"].dtype == np.int64
    assert recorded.columns["observation/arm"].shape == (5, 2)
    inferred = read(tmp_path / "t.parquet", columns)[1]
    assert inferred.action_space == spaces.Discrete(3) and list(inferred.observation_space.spaces) == ["arm", "eye"]


def test_agents_have_time_lines_of_their_own(tmp_path: Path) -> None:
    rows = {"who": ["red", "blue", "red", "blue", "red"], "game": [7] * 5} | {
        name: ROWS[name] for name in ["x", "push", "r"]
    }
    columns = {"observation": "x", "action": "push", "reward": "r", "episode": "game", "agent": "who"}
    recorded, spec = read(write(tmp_path / "t.parquet", rows), columns)
    assert recorded.agents == ["red", "blue"] and recorded.begins.tolist() == [0, 3]
    assert recorded.columns["observation"].squeeze(-1).tolist() == [0, 2, 11, 1, 10]
    assert isinstance(spec, MultiAgentSpec) and set(spec.agents) == {"red", "blue"}


# --- presets ----------------------------------------------------------------------------------------------------------


def as_rllib() -> dict[str, Any]:
    obs = [[x, -x] for x in X]
    return {
        "obs": obs, "new_obs": [*obs[1:3], [3.0, -3.0], obs[4], [12.0, -12.0]], "actions": [[a] for a in ROWS["push"]],
        "rewards": ROWS["r"], "terminateds": ROWS["dead"], "truncateds": ROWS["late"], "eps_id": ROWS["run"],
    }  # fmt: skip


def test_rllibs_rows_and_its_lines_of_several_steps(tmp_path: Path) -> None:
    rows = as_rllib()
    whole, _ = read(write(tmp_path / "t.parquet", rows), None, preset="rllib")
    line = json.dumps({"type": "SampleBatch"} | rows)
    (tmp_path / "t.json").write_text(f"{line}\n")
    lines, _ = read(tmp_path / "t.json", None, preset="rllib")
    for recorded in (whole, lines):
        assert recorded.columns["observation"][:, 0].tolist() == [0, 1, 2, 3, 10, 11, 12]
        assert recorded.is_transition.sum() == 5 and recorded.begins.tolist() == [0, 4]


def test_hdf5_without_h5py_is_refused_with_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lit_rl.files.tables.find_spec", lambda name: None)
    (tmp_path / "walker.hdf5").touch()
    with pytest.raises(OptionError, match=r"walker\.hdf5': HDF5 files are read by h5py.*Install lit-rl\[hdf5\]"):
        read(tmp_path / "walker.hdf5", None, preset="d4rl")


class TestHdf5:
    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        pytest.importorskip("h5py")
        return tmp_path / "walker.hdf5"

    @staticmethod
    def write(path: Path, **changed: Any) -> None:
        import h5py

        rows = {
            "observations": np.stack([X, X], 1), "actions": np.array(ROWS["push"])[:, None], "rewards": ROWS["r"],
            "terminals": ROWS["dead"], "timeouts": ROWS["late"], "infos/qpos": np.zeros((5, 3)),
        }  # fmt: skip
        with h5py.File(path, "w") as file:
            for name, values in (rows | changed).items():
                if values is not None:
                    file[name] = values

    def test_d4rls_rows(self, path: Path) -> None:
        self.write(path)
        recorded, spec = read(path, None, preset="d4rl")
        assert recorded.columns["observation"][:, 0].tolist() == X and recorded.reward.tolist() == ROWS["r"]
        assert recorded.begins.tolist() == [0, 3] and recorded.is_dropped.tolist() == [False, True]
        assert spec.action_space == spaces.Box(-1, 1, (1,), np.float32)
        self.write(path, next_observations=np.stack([X, X], 1) + 1)
        recorded, _ = read(path, None, preset="d4rl")
        assert recorded.columns["observation"][:, 0].tolist() == [0, 1, 2, 3, 10, 11, 12]

    def test_groups_and_texts(self, path: Path) -> None:
        who = ["a", "b", "a", "b", "b"]
        self.write(path, timeouts=None, terminals=None, who=who)
        columns = {"observation": "infos/qpos", "action": "actions", "episode": "run", "agent": "who"}
        self.write(path, timeouts=None, terminals=None, who=who, run=[0, 0, 0, 0, 0])
        recorded, _ = read(path, columns)
        assert recorded.agents == ["a", "b"] and recorded.begins.tolist() == [0, 2]

    @pytest.mark.parametrize(
        ("changed", "message"),
        [
            ({"timeouts": None}, "there is no column 'timeouts'. There are 'actions', 'infos/qpos', 'observations'"),
            ({"rewards": ["1", "2", "3", "4", "5"]}, "column 'rewards' holds object values: expected numbers."),
            ({"rewards": 1.0}, "column 'rewards' is one value: expected one for each row."),
            ({"rewards": [1.0, 2.0]}, "columns have different numbers of rows"),
            ({"observations": np.full((5, 2), np.nan)}, "column 'observations' is [nan, nan] in row 0"),
            ({"actions": np.array([b"\x80\x04."] * 5, "V3")}, "column 'actions' holds |V3 values: expected numbers."),
        ],
    )
    def test_what_is_wrong_is_one_sentence(self, path: Path, changed: dict, message: str) -> None:
        self.write(path, **changed)
        with pytest.raises(DataError) as error:
            read(path, None, preset="d4rl")
        assert message in str(error.value)

    def test_ids_are_one_for_each_row(self, path: Path) -> None:
        columns = {"observation": "observations", "action": "actions", "episode": "run"}
        for run, message in (([0, 1], "'run' has 2 rows, the others have 5"), (np.zeros((5, 2)), "'run' has 2 dim")):
            self.write(path, run=run)
            with pytest.raises(DataError, match=message):
                read(path, columns)

    def test_a_truncated_file_is_refused(self, path: Path) -> None:
        self.write(path)
        path.write_bytes(path.read_bytes()[:1000])
        with pytest.raises(DataError, match=r"walker\.hdf5 cannot be read as HDF5, it may be truncated or damaged"):
            read(path, None, preset="d4rl")


def test_lerobots_demonstrations_are_terminated_by_success_alone(tmp_path: Path) -> None:
    rows = {
        "observation.state": [[x, -x] for x in X], "action": [[a] for a in ROWS["push"]], "next.reward": ROWS["r"],
        "next.success": ROWS["dead"], "next.done": [False, False, True, False, True], "episode_index": [0, 0, 0, 1, 1],
        "frame_index": ROWS["k"], "timestamp": X,
    }  # fmt: skip
    recorded, _ = read(write(tmp_path / "t.parquet", rows), None, preset="lerobot")
    assert recorded.is_dropped.tolist() == [False, True] and recorded.returns.tolist() == [6, 9]
    bare = {name: rows[name] for name in ("observation.state", "action", "episode_index", "frame_index")}
    recorded, _ = read(write(tmp_path / "t.parquet", bare), None, preset="lerobot")
    assert recorded.is_dropped.all() and not recorded.reward.any()


def test_columns_replace_those_of_a_preset(tmp_path: Path) -> None:
    rows = as_rllib()
    rows["dones"] = rows.pop("terminateds")
    recorded, _ = read(write(tmp_path / "t.parquet", rows), {"terminated": "dones"}, preset="rllib")
    assert recorded.terminated.sum() == 1


def test_minari(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lit_rl.files.recorded.find_spec", lambda name: None)
    with pytest.raises(OptionError, match="paths='minari:D4RL/door/human-v2': Minari is missing"):
        read_recorded(["minari:D4RL/door/human-v2"])
    space = spaces.Dict({"arm": spaces.Box(-9, 9, (1,), np.float64)})
    lengths = (3, 2)
    of = [
        SimpleNamespace(
            observations={"arm": np.arange(n + 1.0)[:, None]}, actions=np.arange(n), rewards=np.ones(n),
            terminations=np.arange(n) == (n - 1 if n == 3 else 9), truncations=np.arange(n) == (n - 1 if n == 2 else 9),
        )
        for n in lengths
    ]  # fmt: skip
    data = SimpleNamespace(observation_space=space, action_space=spaces.Discrete(3), iterate_episodes=lambda: iter(of))
    monkeypatch.setattr("lit_rl.files.recorded.find_spec", lambda name: True)
    monkeypatch.setitem(sys.modules, "minari", SimpleNamespace(load_dataset={"door": data}.__getitem__))
    recorded, spec = read_recorded(["minari:door"])
    assert spec == EnvSpec("door", space, spaces.Discrete(3))
    assert recorded.columns["observation/arm"].squeeze(1).tolist() == [0, 1, 2, 3, 0, 1, 2]
    assert recorded.lengths.tolist() == [3, 2] and recorded.is_transition.sum() == 5
    assert np.flatnonzero(recorded.terminated).tolist() == [2] and np.flatnonzero(recorded.truncated).tolist() == [5]
    of[1].rewards[1] = np.nan
    with pytest.raises(DataError, match=r"door: reward=nan in step 1 of episode 1: expected finite numbers\."):
        read_recorded(["minari:door"])
    with pytest.raises(DataError, match="paths='minari:window' cannot be loaded: 'window'"):
        read_recorded(["minari:window"])
    with pytest.raises(OptionError, match="expected data sets of Minari alone, without columns and preset"):
        read_recorded(["minari:door", "x.parquet"])


# --- what is wrong ----------------------------------------------------------------------------------------------------


def changed(name: str, row: int, value: Any) -> dict[str, Any]:
    return ROWS | {name: [value if i == row else x for i, x in enumerate(ROWS[name])]}


@pytest.mark.parametrize(
    ("rows", "columns", "message"),
    [
        (ROWS, COLUMNS | {"action": "pull"}, "there is no column 'pull'. There are 'x', 'y', 'next_x', 'push'"),
        (changed("x", 3, float("nan")), COLUMNS, "t.parquet: column 'x' is nan in row 3: expected numbers."),
        (changed("r", 1, None), COLUMNS, "t.parquet: column 'r' is empty in row 1: expected numbers."),
        (
            ROWS | {"r": ["1", "2", "3", "4", "5"]},
            COLUMNS,
            "t.parquet: column 'r' is of the type string, as in '1' in row 0: expected numbers.",
        ),
        (
            ROWS | {"x": [b"BCJNGGhAgAYAAAA" * 9] * 5},
            COLUMNS,
            "column 'x' is of the type binary: expected numbers. It may be compressed or pickled: write plain lists of "
            "numbers.",
        ),
        (ROWS | {"dead": [0, 0, 1, 0, 2]}, COLUMNS, "column 'dead' is 2 in row 4: expected True or False."),
        (
            ROWS | {"dead": [True, False, True, False, False]},
            COLUMNS,
            "an episode of column 'run' goes on after its step 0, where 'dead' is True. Expected that at its last step "
            "alone; leave one of the columns out.",
        ),
        (
            ROWS | {"x": [[1.0], [1.0, 2.0], [1.0], [1.0], [1.0]]},
            COLUMNS,
            "t.parquet: the rows of column 'x' have different lengths: 1 and 2 numbers. Expected equal ones.",
        ),
        ({name: pa.array([], "float64") for name in ROWS}, COLUMNS, "t.parquet: it has no rows."),
        (ROWS, COLUMNS | {"speed": "x"}, "'speed': expected some of 'observation', 'next_observation', 'action'"),
        (ROWS, {"action": "push"}, "expected 'observation' among them."),
        (ROWS, {"observation": "x", "action": "push"}, "expected 'episode', or 'terminated' and 'truncated', which"),
        (ROWS, COLUMNS | {"reward": ["r", "k"]}, "columns: reward=['r', 'k']: expected the name of one column."),
        (ROWS, COLUMNS | {"observation": []}, "columns: observation=[]: expected a column's name, or a list of names."),
        (ROWS, COLUMNS | {"observation": {}}, "columns: observation={}: expected a column's name, or a list of names."),
        (ROWS, COLUMNS | {"observation": {"arm": ["x", 3]}}, "columns: observation/arm=['x', 3]: expected a column's"),
        (ROWS, COLUMNS | {"step": "k", "episode": None}, "with 'step' expected 'episode' too."),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_table_is_one_sentence(rows: dict, columns: dict, message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "t.parquet", rows)
    with pytest.raises(LitRLError) as found:
        read(path, columns)
    assert message in str(found.value) and "\n" not in str(found.value)


@pytest.mark.parametrize(
    ("rows", "spec", "message"),
    [
        (changed("push", 4, -1.5), ENV, "action=[-1.5] in step 1 of episode 1 is outside of the action space Box(-1.0"),
        (
            ROWS | {"push": [0, 1, 2, 3, 0]},
            EnvSpec("Test", ENV.observation_space, spaces.Discrete(3)),
            "action=3 in step 0 of episode 1 is outside of the action space Discrete(3). Clip or scale the actions",
        ),
        (
            ROWS,
            EnvSpec("Test", ENV.observation_space, spaces.Discrete(3)),
            "action has the value 0.5: expected whole numbers of Discrete(3).",
        ),
        (
            ROWS,
            EnvSpec("Test", spaces.Box(-9, 9, (3,), np.float32), ENV.action_space),
            "observation has 2 numbers a row, the space Box(-9.0, 9.0, (3,), float32) of Test has 3.",
        ),
        (
            ROWS,
            EnvSpec("Test", spaces.Dict({"arm": spaces.Box(-9, 9, (2,), np.float32)}), ENV.action_space),
            "the columns make ['action', 'observation'], the spaces of Test have ['action', 'observation/arm'].",
        ),
    ],
)
def test_what_does_not_fit_the_environment_is_one_sentence(
    rows: dict, spec: EnvSpec, message: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError) as found:
        read(write(tmp_path / "t.parquet", rows), spec=spec)
    assert message in str(found.value) and "t.parquet: " in str(found.value)


def test_actions_that_rounding_put_outside_are_clipped(tmp_path: Path) -> None:
    recorded, _ = read(write(tmp_path / "t.parquet", changed("push", 2, 1.00001)), spec=ENV)
    assert recorded.columns["action"].max() == 1


def test_files_whose_columns_have_other_shapes_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "1.parquet", ROWS)
    write(tmp_path / "2.parquet", ROWS | {"x": [[x, x] for x in X]})
    with pytest.raises(
        DataError, match=r"2\.parquet: its columns make observation of shape \(3,\), action of shape \(\), "
    ):
        read(tmp_path)


def test_extension_types_are_refused_before_their_schema_is_made(tmp_path: Path) -> None:
    asked = []

    class Evil(pa.ExtensionType):
        def __init__(self) -> None:
            super().__init__(pa.float64(), "evil")

        def __arrow_ext_serialize__(self) -> bytes:
            return pickle.dumps("code")

        @classmethod
        def __arrow_ext_deserialize__(cls, storage_type: Any, serialized: bytes) -> "Evil":
            asked.append(serialized)
            return cls()

    pa.register_extension_type(Evil())
    try:
        array = pa.ExtensionArray.from_storage(Evil(), pa.array(X))
        pq.write_table(pa.table(ROWS | {"other": array}), tmp_path / "t.parquet")
        asked.clear()
        with pytest.raises(
            DataError, match=r"t\.parquet: it has columns of Arrow extension types, which may hold code"
        ):
            read(tmp_path / "t.parquet")
        assert not asked
    finally:
        pa.unregister_extension_type("evil")


@pytest.mark.parametrize("size", [0, 10, 600])
def test_a_truncated_file_is_one_sentence(size: int, tmp_path: Path) -> None:
    path = write(tmp_path / "t.parquet", ROWS)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(DataError, match=r"t\.parquet cannot be read as Parquet, it may be truncated or damaged"):
        read(path)


def test_paths_that_mean_no_file_are_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("")
    for name, message in (
        ("empty", "the folder has no file that ends in .parquet, .csv"),
        ("x*.csv", "no file matches it"),
        ("gone.parquet", "there is no such file or folder"),
        ("notes.txt", "expected a name that ends in .parquet, .csv"),
    ):
        with pytest.raises(OptionError, match=message):
            read(tmp_path / name)


def test_tables_without_columns_are_refused_with_those_that_there_are(tmp_path: Path) -> None:
    path = write(tmp_path / "t.parquet", ROWS)
    with pytest.raises(
        OptionError, match=r"these are no episodes that lit_rl wrote\. Say what its columns are, .* There are "
    ):
        read(path, None)
