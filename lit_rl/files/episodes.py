"""Recorded episodes in Parquet files: their schema, and how they are read.

A file holds whole episodes, one after the other, each with a row per step and a closing row. With several agents each
agent has rows of its own, of which `t` counts its turns:

    episode        int64    the same for all rows of an episode, and for those of no other one in the folder
    t              int32    from 0; that of the closing row is the number of steps
    agent          string   whose rows these are
    observation    number, or flat list of fixed size: before the step; in the closing row the final one
    action         likewise, as the environment was given it
    reward         float64
    terminated     bool
    truncated      bool
    log_prob       float32  of the action; 0 where there was no choice
    deterministic  bool     whether the most probable action was taken, and none was drawn
    policy_version int64    updates that the policy had been through
    closing        bool

Parts of Dict and Tuple spaces have columns of their own, named by path, "observation/arm". A closing row has zeros for
all that it does not know. The metadata's key "lit_rl" holds JSON: the format, the spaces ("spec"), how the environment
is made ("env"), and an "ids" entry for each episode. Format 1 had neither closing rows nor `deterministic`.

Nothing of a file is ever executed: Arrow's extension types and bytes, which could hold pickled objects, are refused
before a row is read. pyarrow is imported when a file is read or written.

Shapes: N rows, E time lines: an agent's rows in one episode.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from lit_rl.errors import DataError, OptionError, SpaceError
from lit_rl.files.finding import File, expand, find_files, open_input
from lit_rl.files.parquet import refuse_extension_types
from lit_rl.observations import out_of_range
from lit_rl.recorded import Recorded
from lit_rl.spec import EnvSpec, MultiAgentSpec
from lit_rl.trees import row_dtype, space_leaves

Spec = EnvSpec | MultiAgentSpec
FORMAT = 2
KEY = b"lit_rl"
MANIFEST = "_manifest.json"
SHARDS = "episodes-rank*.parquet"
ALONE = "agent_0"  # where there is one agent
FLAGS = ("terminated", "truncated", "closing")


# --- the schema -----------------------------------------------------------------------------------------------------


def spec_from_dict(data: dict[str, Any]) -> Spec:
    """The spec of a file's metadata."""
    return MultiAgentSpec.from_dict(data) if "agents" in data else EnvSpec.from_dict(data)


def spaces_of(spec: Spec) -> dict[str, gym.Space]:
    """The spaces of observations and actions by column.

    Raises:
        DataError: if agents have different ones.
    """
    agents = spec.agents if isinstance(spec, MultiAgentSpec) else {ALONE: spec}
    (first, one), *others = agents.items()
    for name, other in others:
        for kind in ("observation_space", "action_space"):
            if getattr(one, kind) != getattr(other, kind):
                raise DataError(
                    f"env={spec.env_id}: the {kind} of agent {first!r} is {getattr(one, kind)}, that of {name!r} "
                    f"{getattr(other, kind)}: episodes are recorded in one table, which needs equal spaces. Pad them "
                    "with a wrapper."
                )
    return space_leaves(one.observation_space, "observation") | space_leaves(one.action_space, "action")


def schema_of(spec: Spec, metadata: Mapping[str, Any]) -> Any:
    """The pyarrow schema of a file with episodes of an environment."""
    import pyarrow as pa

    def of_space(space: gym.Space) -> Any:
        scalar = pa.from_numpy_dtype(np.dtype(row_dtype(space)))
        return pa.list_(scalar, int(np.prod(space.shape))) if space.shape else scalar

    fields = [("episode", pa.int64()), ("t", pa.int32()), ("agent", pa.dictionary(pa.int32(), pa.string()))]
    fields += [(path, of_space(space)) for path, space in spaces_of(spec).items()]
    fields += [("reward", pa.float64()), ("terminated", pa.bool_()), ("truncated", pa.bool_())]
    fields += [("log_prob", pa.float32()), ("deterministic", pa.bool_()), ("policy_version", pa.int64())]
    return pa.schema([*fields, ("closing", pa.bool_())], {KEY: json.dumps(metadata)})


# --- finding files --------------------------------------------------------------------------------------------------


def find(paths: Sequence[str | File] | str | Path) -> list[File]:
    """The Parquet files that paths name, each once: files, folders and patterns such as "runs/*/episodes".

    Raises:
        DataError: for a path that names none, or a folder that has not all that its manifest says.
    """
    given = [paths] if isinstance(paths, str | Path) else paths
    try:
        for folder in (named for path in given for named in expand(path) if isinstance(named, Path)):
            for manifest in sorted(folder.rglob(MANIFEST)):
                for shard in _shards_of(manifest.parent):
                    if not (manifest.parent / shard).exists():
                        raise DataError(
                            f"{manifest.parent / shard} is missing: {manifest} has it. Restore it, or delete the "
                            "manifest."
                        )
        return find_files(given, [".parquet"])
    except OptionError as error:
        raise DataError(str(error)) from error


def is_own(path: str | File) -> bool:
    """Whether a file, or the files of a folder or a pattern, have this schema, be they whole or not."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        named = expand(path)
        if any(next(folder.rglob(MANIFEST), None) for folder in named if isinstance(folder, Path)):
            return True
        file = find_files(named, [".parquet"])[0]
    except OptionError:
        return False
    if fnmatch(file.name, SHARDS):
        return True
    try:
        refuse_extension_types(file)
        return KEY in (pq.read_metadata(open_input(file)).metadata or {})
    except (pa.ArrowException, OSError):
        return False


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """A folder's manifest; None if it has none.

    Raises:
        DataError: if it cannot be read.
    """
    path = folder / MANIFEST
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return found if found["format"] <= FORMAT else _newer(path, found["format"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} cannot be read: {error}. Delete it to have it made anew.") from error


def digest(path: Path) -> str:
    """The SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _shards_of(folder: Path) -> dict[str, Any]:
    manifest = read_manifest(folder)
    return {} if manifest is None else manifest["shards"]


# --- one file -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EpisodeFile:
    """A file whose types are those of the schema; its rows are not read yet.

    Attributes:
        path: where it is.
        format: of which its rows are.
        spec: of their environment.
        env: how that is made; None if the file does not say.
        ids: of its episodes.
        num_rows: N.
        columns: those that it has.
    """

    path: File
    format: int
    spec: Spec
    env: dict[str, Any] | None
    ids: tuple[str, ...]
    num_rows: int
    columns: frozenset[str]


def open_file(path: File) -> EpisodeFile:
    """Look at a file's metadata and types.

    Raises:
        DataError: if it is damaged, or of another schema.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    refuse_extension_types(path)
    try:
        with open_input(path) as source, pq.ParquetFile(source) as file:
            schema, num_rows = file.schema_arrow, file.metadata.num_rows
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} is no whole Parquet file: {_line(error)}") from error
    refuse_bytes(path, schema)
    try:
        head = json.loads((schema.metadata or {})[KEY])
        number = head["format"] if head["format"] <= FORMAT else _newer(path, head["format"])
        spec = spec_from_dict(head["spec"])
    except KeyError as error:
        (key,) = error.args
        name = key.decode() if isinstance(key, bytes) else key
        raise DataError(
            f"{path} has no key {name!r} in its metadata: expected a file that lit_rl recorded. Tables of other tools "
            "need columns=... or a preset."
        ) from error
    except (ValueError, TypeError, SpaceError) as error:
        raise DataError(f"{path}: its metadata cannot be read: {_line(error)}") from error
    expected = schema_of(spec, {})
    if number == 1:
        expected = pa.schema([field for field in expected if field.name not in ("closing", "deterministic")])
    for field in expected:
        if field.name not in schema.names:
            raise DataError(f"{path} has no column {field.name!r}. It has {', '.join(schema.names)}.")
        if _family(schema.field(field.name).type) != _family(field.type):
            raise DataError(
                f"{path}: column {field.name!r} has the type {schema.field(field.name).type}, expected {field.type}."
            )
    return EpisodeFile(
        path, number, spec, head.get("env"), tuple(head.get("ids", ())), num_rows, frozenset(schema.names)
    )


def refuse_bytes(path: File, schema: Any) -> None:
    """Refuse columns of bytes, which could hold pickled objects.

    Raises:
        DataError: naming the column.
    """
    for field in schema:
        if _holds_bytes(field.type):
            raise DataError(
                f"{path}: column {field.name!r} has the type {field.type}, which could hold pickled objects: expected "
                "numbers, flags or texts. It was not read."
            )


def check_digest(path: File) -> None:
    """Refuse a file that is not what its folder's manifest says.

    Raises:
        DataError: if there is such an entry, and it is of another content.
    """
    if not isinstance(path, Path) or (entry := _shards_of(path.parent).get(path.name)) is None:
        return
    size = path.stat().st_size
    if size != entry["bytes"]:
        raise DataError(f"{path} has {size} bytes: {path.parent / MANIFEST} says {entry['bytes']}. It is damaged.")
    if digest(path) != entry["sha256"]:
        raise DataError(f"{path} has another SHA-256 than {path.parent / MANIFEST} says. It is damaged.")


def _family(kind: Any) -> Any:
    """What types have in common of which one can be read in the place of another."""
    import pyarrow.types as types

    if types.is_fixed_size_list(kind):
        return kind.list_size, _family(kind.value_type)
    if types.is_dictionary(kind):
        return _family(kind.value_type)
    for family in (types.is_floating, types.is_integer, types.is_boolean, types.is_string):
        if family(kind):
            return family.__name__
    return str(kind)


def _holds_bytes(kind: Any) -> bool:
    import pyarrow.types as types

    if types.is_dictionary(kind):
        return _holds_bytes(kind.value_type)
    if types.is_nested(kind):
        return any(_holds_bytes(kind.field(i).type) for i in range(kind.num_fields))
    return types.is_binary(kind) or types.is_large_binary(kind) or types.is_fixed_size_binary(kind)


# --- reading --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rows:
    """The rows of files, one after the other.

    Attributes:
        files: in their order.
        first: the first row of each file, and N, [F + 1].
        columns: arrays [N, ...] by column.
        begins: the first row of each time line, and N, [E + 1].
        agents: whose time line each is; None where there is one agent.
    """

    files: Sequence[EpisodeFile]
    first: np.ndarray
    columns: dict[str, np.ndarray]
    begins: np.ndarray
    agents: list[str] | None

    @property
    def spec(self) -> Spec:
        return self.files[0].spec

    def where(self, row: int) -> str:
        """A row, in words."""
        file = self.files[int(np.searchsorted(self.first, row, "right")) - 1]
        return f"{file.path}, episode {self.columns['episode'][row]}, t={self.columns['t'][row]}"


def read(paths: Sequence[str | File]) -> tuple[Recorded, Spec]:
    """Recorded episodes, and the spec of their environment.

    Args:
        paths: files, folders, and patterns of these.

    Raises:
        DataError: if there are none, or one is damaged, of another schema or environment, or holds what it must not.
    """
    rows = read_rows(find(paths), ["deterministic"])
    columns = rows.columns
    if not len(columns["t"]):
        raise DataError(f"paths={list(map(str, paths))}: there are no episodes in it.")
    kept = {path: columns[path] for path in (*spaces_of(rows.spec), "log_prob", "deterministic")}
    flags = {name: columns[name] for name in FLAGS}
    reward = columns["reward"].astype(np.float32)
    return Recorded(columns=kept, reward=reward, begins=rows.begins[:-1], agents=rows.agents, **flags), rows.spec


def read_rows(paths: Sequence[File], more: Sequence[str] = ()) -> Rows:
    """The rows of files, checked.

    Args:
        paths: of the files.
        more: columns to read beside those that make up a transition: `deterministic`, `policy_version`.
    """
    for path in paths:
        check_digest(path)
    files = [open_file(path) for path in paths]
    check_alike(files)
    spec, first = files[0].spec, np.cumsum([0, *(file.num_rows for file in files)])
    leaves = spaces_of(spec)
    fields = {path: (row_dtype(space), space.shape or ()) for path, space in leaves.items()}
    fields |= {"episode": ("<i8", ()), "t": ("<i8", ()), "reward": ("<f8", ()), "log_prob": ("<f4", ())}
    fields |= dict.fromkeys(FLAGS, ("|b1", ()))
    fields |= {name: ("|b1" if name == "deterministic" else "<i8", ()) for name in more}
    columns = {name: np.zeros((first[-1], *shape), dtype) for name, (dtype, shape) in fields.items()}
    names: dict[str, int] = {}
    agent = np.zeros(first[-1], np.int32) if isinstance(spec, MultiAgentSpec) else None
    for file, begin, end in zip(files, first.tolist(), first[1:].tolist()):
        _fill(file, {name: column[begin:end] for name, column in columns.items()})
        if agent is not None:
            _fill_agents(file, agent[begin:end], names)
    begins = _begins(columns, first, agent)
    agents = None if agent is None else [list(names)[i] for i in agent[begins].tolist()]
    rows = Rows(files, first, columns, np.append(begins, first[-1]), agents)
    _check_time(rows)
    _check_values(rows, leaves)
    return rows


def check_alike(files: Sequence[EpisodeFile]) -> None:
    """Refuse files of environments with different spaces or agents.

    Raises:
        DataError: naming the two files, and what differs.
    """
    spec, first = files[0].spec, files[0].path
    for file in files[1:]:
        if isinstance(file.spec, MultiAgentSpec) != isinstance(spec, MultiAgentSpec):
            raise DataError(f"{file.path} and {first}: one has episodes of several agents, the other has not.")
        expected, found = spaces_of(spec), spaces_of(file.spec)
        for name in [*expected, *found]:
            if expected.get(name) != found.get(name):
                raise DataError(f"{file.path} has {name} in {found.get(name)}, {first} in {expected.get(name)}.")
        agents = [set(one.agents) if isinstance(one, MultiAgentSpec) else set() for one in (file.spec, spec)]
        if agents[0] != agents[1]:
            raise DataError(f"{file.path} has the agents {sorted(agents[0])}, {first} has {sorted(agents[1])}.")


def _fill(file: EpisodeFile, columns: dict[str, np.ndarray]) -> None:
    """Read a file into arrays."""
    for name, chunks in _read_columns(file, [name for name in columns if name in file.columns]):
        at, column = 0, columns[name]
        for chunk in chunks:
            values = chunk.flatten() if column.ndim > 1 else chunk
            missing = chunk.null_count + (values.null_count if values is not chunk else 0)
            if missing:
                raise DataError(f"{file.path}: column {name!r} has no value in {missing} places.")
            part = column[at : at + len(chunk)]
            part[...] = values.to_numpy(zero_copy_only=False).reshape(part.shape)
            at += len(chunk)


def _fill_agents(file: EpisodeFile, column: np.ndarray, names: dict[str, int]) -> None:
    """Read whose rows a file has, as numbers of `names`, to which those that are new are added."""
    ((_, chunks),) = _read_columns(file, ["agent"])
    at = 0
    for chunk in chunks:
        coded = chunk if hasattr(chunk, "dictionary") else chunk.dictionary_encode()
        if coded.null_count:
            raise DataError(f"{file.path}: column 'agent' has no value in {coded.null_count} places.")
        numbers = [names.setdefault(name, len(names)) for name in coded.dictionary.to_pylist()]
        column[at : at + len(chunk)] = np.array(numbers, np.int32)[coded.indices.to_numpy(zero_copy_only=False)]
        at += len(chunk)


def _read_columns(file: EpisodeFile, names: Sequence[str]) -> Iterator[tuple[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with open_input(file.path) as source, pq.ParquetFile(source) as opened:
            table = opened.read(columns=list(names), use_threads=True)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file.path} is damaged: {_line(error)}") from error
    for name in names:
        yield name, table[name].chunks


def _begins(columns: Mapping[str, np.ndarray], first: np.ndarray, agent: np.ndarray | None) -> np.ndarray:
    """The first row of each time line, [E]."""
    episode = columns["episode"]
    is_first = columns["t"] == 0
    is_first[first[:-1][first[:-1] < first[-1]]] = True
    is_first[1:] |= episode[1:] != episode[:-1]
    if agent is not None:
        is_first[1:] |= agent[1:] != agent[:-1]
    return np.flatnonzero(is_first)


def _check_time(rows: Rows) -> None:
    """Refuse time lines in which a row is missing, or that do not end where they must."""
    columns, begins, num_rows = rows.columns, rows.begins[:-1], int(rows.begins[-1])
    if not num_rows:
        return
    lengths = np.diff(rows.begins)
    out_of_order = np.flatnonzero(columns["t"] != np.arange(num_rows) - np.repeat(begins, lengths))
    if len(out_of_order):
        row = int(out_of_order[0])
        raise DataError(f"{rows.where(row)}: expected t={row - begins[begins <= row][-1]}.")
    of_format = np.repeat([file.format for file in rows.files], np.diff(rows.first))
    last = rows.begins[1:] - 1
    has_closing = of_format[last] > 1
    done = columns["terminated"] | columns["truncated"]
    may_end, must_close = np.zeros(num_rows, np.bool_), np.zeros(num_rows, np.bool_)
    must_close[last[has_closing]] = True
    may_end[last - has_closing] = True
    for wrong, expected in (
        (must_close & ~columns["closing"], "the closing row is missing"),
        (columns["closing"] & ~must_close, "a closing row in the middle of an episode"),
        (done & ~may_end, "the episode ends before its last step"),
    ):
        if wrong.any():
            raise DataError(f"{rows.where(int(wrong.argmax()))}: {expected}.")
    unended = has_closing & ~done[last - has_closing]
    if unended.any():
        raise DataError(f"{rows.where(int(last[unended][0]))}: its last step is neither terminated nor truncated.")


def _check_values(rows: Rows, leaves: Mapping[str, gym.Space]) -> None:
    """Refuse numbers that are not finite, and values that are not in their space."""
    columns = rows.columns
    for name in (*leaves, "reward", "log_prob"):
        column = columns[name]
        if column.dtype.kind == "f" and not np.isfinite(column.sum()):
            wrong = ~np.isfinite(column.reshape(len(column), -1)).all(1)
            if wrong.any():
                row = int(wrong.argmax())
                raise DataError(f"{rows.where(row)}: {name}={column[row].tolist()}: expected finite numbers.")
    for name, space in leaves.items():
        is_action = name.partition("/")[0] == "action"
        if isinstance(space, spaces.Box) and not is_action:  # environments often leave their own bounds
            continue
        if columns[name].size and _may_be_outside(space, columns[name]):
            wrong = _outside(space, columns[name])
            if is_action:
                wrong &= ~columns["closing"]
            if wrong.any():
                row = int(wrong.argmax())
                raise DataError(
                    f"{rows.where(row)}: {name}={columns[name][row].tolist()}: expected a value in {space}."
                )


def _may_be_outside(space: gym.Space, column: np.ndarray) -> bool:
    """Whether a column [N, ...] could hold anything that is not in the space: by its least and greatest number."""
    ends = np.array([column.min(), column.max()]).reshape(2, *[1] * (column.ndim - 1))
    return bool(_outside(space, np.broadcast_to(ends, (2, *column.shape[1:]))).any())


def _outside(space: gym.Space, column: np.ndarray) -> np.ndarray:
    """Which rows of a column [N, ...] are not in the space, [N]."""
    wrong: Any
    if isinstance(space, spaces.Box):
        low, high = (bound.astype(column.dtype) for bound in (space.low, space.high))
        wrong = (column < low) | (column > high)
    elif isinstance(space, spaces.MultiBinary):
        wrong = column > 1
    else:
        wrong = out_of_range(space, column)
    return wrong.reshape(len(column), -1).any(1)


def _newer(path: File, number: Any) -> Any:
    raise DataError(f"{path} has format {number}, this lit_rl reads up to {FORMAT}. Update lit_rl.")


def _line(error: Exception) -> str:
    text = " ".join(str(error).split())[:200]
    return text if text.endswith(".") else f"{text}."
