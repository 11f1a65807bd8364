"""What the columns of other tools' tables are: episodes of lit_rl, with the spaces that they are in.

Shapes: N rows.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from gymnasium import spaces

from lit_rl.errors import DataError, OptionError
from lit_rl.files.finding import File
from lit_rl.files.tables import Table
from lit_rl.recorded import Recorded, joined
from lit_rl.spec import EnvSpec, MultiAgentSpec, single
from lit_rl.trees import iterate, row_dtype, space_leaves

PARTS = (
    "observation", "next_observation", "action", "reward", "terminated", "truncated", "episode", "step", "agent",
)  # fmt: skip
# What other tools call the columns. Those in OPTIONAL may be missing.
PRESETS: dict[str, dict[str, str]] = {
    "rllib": {
        "observation": "obs", "next_observation": "new_obs", "action": "actions", "reward": "rewards",
        "terminated": "terminateds", "truncated": "truncateds", "episode": "eps_id", "step": "t", "agent": "agent_id",
    },
    "d4rl": {
        "observation": "observations", "next_observation": "next_observations", "action": "actions",
        "reward": "rewards", "terminated": "terminals", "truncated": "timeouts",
    },
    # A demonstration that ends without success is cut off, not terminated.
    "lerobot": {
        "observation": "observation.state", "action": "action", "reward": "next.reward", "terminated": "next.success",
        "truncated": "next.done", "episode": "episode_index", "step": "frame_index",
    },
}  # fmt: skip
OPTIONAL = {
    "rllib": ("next_observation", "step", "agent"),
    "d4rl": ("next_observation",),
    "lerobot": ("reward", "terminated", "truncated"),
}


def columns_of(columns: Mapping[str, Any], preset: str | None) -> dict[str, Any]:
    """The columns that are meant, by part; those of nested spaces in a dict."""
    for part, names in columns.items():
        if part not in PARTS:
            raise OptionError(f"columns={dict(columns)!r}: {part!r}: expected some of {', '.join(map(repr, PARTS))}.")
        if not (names is None or isinstance(names, str | list | tuple | Mapping)):
            raise OptionError(f"columns: {part}={names!r}: expected a column's name, or a list or a dict of names.")
        leaves: dict[str, Any] = {} if names is None else _leaves(part, names) or {part: names}
        for path, given in leaves.items():
            if not given or not all(isinstance(name, str) for name in ([given] if isinstance(given, str) else given)):
                raise OptionError(f"columns: {path}={given!r}: expected a column's name, or a list of names.")
        if part not in PARTS[:3] and not (names is None or isinstance(names, str)):
            raise OptionError(f"columns: {part}={names!r}: expected the name of one column.")
    found = {**PRESETS.get(preset or "", {}), **columns}
    found = {part: names for part, names in found.items() if names is not None}
    for part in ("observation", "action"):
        if part not in found:
            raise OptionError(f"columns={dict(columns)!r}: expected {part!r} among them.")
    if not {"episode", "terminated", "truncated"} & set(found):
        raise OptionError(
            f"columns={dict(columns)!r}: expected 'episode', or 'terminated' and 'truncated', which say where episodes "
            "end."
        )
    for part in ("agent", "step"):
        if part in found and "episode" not in found:
            raise OptionError(f"columns={dict(columns)!r}: with {part!r} expected 'episode' too.")
    return found


def _leaves(part: str, names: Any) -> dict[str, list[str] | str]:
    """The columns of each leaf by path."""
    return dict(iterate(names, part)) if isinstance(names, Mapping) else {part: names}


def names_of(columns: Mapping[str, Any]) -> list[str]:
    """Of all columns, each once."""
    leaves = [names for part, given in columns.items() for names in _leaves(part, given).values()]
    return list(dict.fromkeys(name for names in leaves for name in ([names] if isinstance(names, str) else names)))


def read_tables(
    tables: Iterable[Table], columns: dict[str, Any], preset: str | None, spec: EnvSpec | MultiAgentSpec | None
) -> tuple[Recorded, EnvSpec | MultiAgentSpec]:
    """The episodes of tables, and their spaces.

    Args:
        tables: of equal columns.
        columns: see `columns_of`.
        preset: whose names these are, some of which may be missing.
        spec: the spaces, if they are known.
    """
    found, paths, agents = [], list[File](), list[str | None]()
    for table in tables:
        here = {
            part: names
            for part, names in columns.items()
            if part not in OPTIONAL.get(preset or "", ()) or set(names_of({part: names})) <= set(table.names)
        }
        if "reward" not in here:
            say(f"{table.path}: no column holds rewards: they are 0.")
        recorded, own = _of_table(table, here, preset)
        found.append(recorded)
        paths.append(table.path)
        agents += own
    shapes = [{name: x.shape[1:] for name, x in recorded.columns.items()} for recorded in found]
    for path, shape in zip(paths, shapes):
        if shape != shapes[0]:
            raise DataError(f"{path}: its columns make {_shapes(shape)}, those of {paths[0]} {_shapes(shapes[0])}.")
    recorded = joined(found, [str(agent) for agent in agents] if len(set(agents)) > 1 else None)
    first = _inferred(recorded, paths[0]) if spec is None else single(spec)
    _fit(recorded, first, paths[0])
    if spec is None and recorded.agents is not None:
        spec = MultiAgentSpec(first.env_id, dict.fromkeys(sorted(set(recorded.agents)), first))
    return recorded, spec or first


def _of_table(table: Table, columns: dict[str, Any], preset: str | None) -> tuple[Recorded, list[str | None]]:
    """The episodes of one file, and whose time line each is."""
    raw = table.read(names_of(columns))
    if preset == "rllib" and not isinstance(next(iter(raw.values())), np.ndarray) and _is_list(raw[columns["reward"]]):
        raw = table.explode(raw)  # a line of JSON is a SampleBatch of several steps
    numbers = {
        name: table.numbers(name, raw[name])
        for name in names_of({part: x for part, x in columns.items() if part not in ("episode", "agent")})
    }
    if len({len(array) for array in numbers.values()}) > 1:
        sizes = ", ".join(f"{name!r} {len(array)}" for name, array in numbers.items())
        raise DataError(f"{table.path}: columns have different numbers of rows: {sizes}. Expected equal ones.")
    num = len(next(iter(numbers.values())))
    if not num:
        raise DataError(f"{table.path}: it has no rows.")
    arrays = {
        path: _stacked(numbers, names)
        for part in PARTS[:3]
        if part in columns
        for path, names in _leaves(part, columns[part]).items()
    }
    reward = _scalar(table, columns, numbers, "reward", num).astype(np.float32)
    flags = {part: _flag(table, columns, numbers, part, num) for part in ("terminated", "truncated")}
    done, order, agents = flags["terminated"] | flags["truncated"], None, None
    if "episode" in columns:
        keys, _ = _codes(table, columns["episode"], raw, num)
        if "agent" in columns:
            whose, names = _codes(table, columns["agent"], raw, num)
            agents, keys = np.array(names, object)[whose], keys.astype(np.int64) * len(names) + whose
        order = _order(keys, numbers[columns["step"]] if "step" in columns else None)
        if order is not None:
            keys, done, reward = keys[order], done[order], reward[order]
            arrays = {path: array[order] for path, array in arrays.items()}
            flags = {part: flag[order] for part, flag in flags.items()}
            agents = None if agents is None else agents[order]
        begins = np.flatnonzero(np.append(True, keys[1:] != keys[:-1]))
        last = np.append(begins[1:], num) - 1
        early = done.copy()
        early[last] = False
        if early.any():
            row = int(np.flatnonzero(early)[0])
            which = "terminated" if flags["terminated"][row] else "truncated"
            raise DataError(
                f"{table.path}: an episode of column {columns['episode']!r} goes on after its step "
                f"{row - int(begins[begins <= row][-1])}, where {columns[which]!r} is True. Expected that at its last "
                "step alone; leave one of the columns out."
            )
    else:
        begins = np.flatnonzero(np.append(True, done[:-1]))
        last = np.append(begins[1:], num) - 1
    owners: list[str | None] = [None] * len(begins) if agents is None else [str(agent) for agent in agents[begins]]
    return _with_closing(arrays, reward, flags, begins, last), owners


def _with_closing(
    arrays: dict[str, np.ndarray],
    reward: np.ndarray,
    flags: dict[str, np.ndarray],
    begins: np.ndarray,
    last: np.ndarray,
) -> Recorded:
    """Episodes, with closing rows where next observations are known."""
    following = {path.removeprefix("next_"): x for path, x in arrays.items() if path.startswith("next_")}
    arrays = {path: x for path, x in arrays.items() if not path.startswith("next_")}
    if not following:
        no = np.zeros(len(reward), np.bool_)
        return Recorded(arrays, reward, flags["terminated"], flags["truncated"], closing=no, begins=begins)
    closing = np.zeros(len(reward) + len(begins), np.bool_)
    closing[last + 1 + np.arange(len(begins))] = True

    def spread(array: np.ndarray, at_end: Any = 0) -> np.ndarray:
        found = np.empty((len(closing), *array.shape[1:]), array.dtype)
        found[~closing], found[closing] = array, at_end
        return found

    columns = {path: spread(x, following[path][last] if path in following else 0) for path, x in arrays.items()}
    return Recorded(
        columns,
        spread(reward),
        spread(flags["terminated"]),
        spread(flags["truncated"]),
        closing=closing,
        begins=begins + np.arange(len(begins)),
    )


def _order(keys: np.ndarray, steps: np.ndarray | None) -> np.ndarray | None:
    """How rows are to be sorted so that an episode's are together, in order; None if they are."""
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    is_together = int(np.count_nonzero(keys[1:] != keys[:-1])) + 1 == len(first)
    if is_together and (steps is None or bool(((steps[1:] > steps[:-1]) | (keys[1:] != keys[:-1])).all())):
        return None
    appeared = first[inverse.reshape(-1)]  # episodes stay in the order in which they begin
    return np.lexsort((np.arange(len(keys)) if steps is None else steps, appeared))


def _is_list(column: Any) -> bool:
    import pyarrow as pa

    return pa.types.is_list(column.type)


def _stacked(numbers: Mapping[str, np.ndarray], names: str | Sequence[str]) -> np.ndarray:
    """One column as it is, or several side by side [N, K]."""
    if isinstance(names, str):
        return numbers[names]
    return np.concatenate([numbers[name].reshape(len(numbers[name]), -1) for name in names], 1)


def _codes(table: Table, name: str, raw: Mapping[str, Any], num: int) -> tuple[np.ndarray, list[str]]:
    """A column of ids, one for each row."""
    codes, names = table.codes(name, raw[name])
    if len(codes) != num:
        raise DataError(f"{table.path}: column {name!r} has {len(codes)} rows, the others have {num}.")
    return codes, names


def _scalar(table: Table, columns: dict, numbers: dict, part: str, num: int) -> np.ndarray:
    """A column of one number per row; 0 if there is none."""
    if part not in columns:
        return np.zeros(num)
    array = numbers[columns[part]]
    if array.size != num:
        raise DataError(f"{table.path}: column {columns[part]!r} has {array.shape[1:]} numbers a row: expected one.")
    return array.reshape(num)


def _flag(table: Table, columns: dict, numbers: dict, part: str, num: int) -> np.ndarray:
    array = _scalar(table, columns, numbers, part, num)
    wrong = (array != 0) & (array != 1)
    if wrong.any():
        row = int(wrong.argmax())
        raise DataError(
            f"{table.path}: column {columns[part]!r} is {array[row].item()!r} in row {row}: expected True or False."
        )
    return array.astype(np.bool_)


def _shapes(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{path} of shape {shape}" for path, shape in shapes.items())


def say(message: str) -> None:
    """Log a message once for all ranks."""
    from lightning.pytorch.utilities.rank_zero import rank_zero_info  # which processes that read files alone lack

    rank_zero_info(message)


# --- spaces ----------------------------------------------------------------------------------------------


def _inferred(recorded: Recorded, path: File) -> EnvSpec:
    """Spaces in which everything recorded is, which is said."""
    found = {}
    for name in ("observation", "action"):
        leaves = {p: _space(name, x[~recorded.closing]) for p, x in recorded.columns.items() if p.split("/")[0] == name}
        found[name] = leaves.get(name) or _nested({p.removeprefix(f"{name}/"): x for p, x in leaves.items()})
    say(
        f"{path}: spaces are taken from the data: observation {found['observation']}, action {found['action']}. Give "
        "evaluation.env, or observation_space and action_space, if the environment has others."
    )
    actions = recorded.columns.get("action")
    if (
        actions is not None
        and isinstance(found["action"], spaces.Box)
        and not np.any(np.mod(actions[~recorded.closing], 1))
    ):
        say(f"{path}: all actions are whole numbers of a type with fractions: write integers if they are choices.")
    return EnvSpec(path.stem, found["observation"], found["action"])


def _nested(leaves: Mapping[str, spaces.Space]) -> spaces.Dict:
    groups: dict[str, dict[str, spaces.Space]] = {}
    for path, space in leaves.items():
        key, _, rest = path.partition("/")
        groups.setdefault(key, {})[rest] = space
    return spaces.Dict({key: parts[""] if "" in parts else _nested(parts) for key, parts in groups.items()})


def _space(name: str, x: np.ndarray) -> spaces.Space:
    shape = x.shape[1:]
    if name == "action" and x.dtype.kind in "iub" and not shape and x.min() >= 0:
        return spaces.Discrete(int(x.max()) + 1)
    shape = shape or (1,)
    if name == "observation":
        is_image = x.dtype == np.uint8 and len(shape) >= 2
        return spaces.Box(0, 255, shape, np.uint8) if is_image else spaces.Box(-np.inf, np.inf, shape, np.float32)
    x = x.reshape(len(x), *shape).astype(np.float32)
    if np.abs(x).max() <= 1:
        return spaces.Box(-1.0, 1.0, shape, np.float32)
    low, high = x.min(0), x.max(0)
    return spaces.Box(np.where(low < high, low, low - 1).astype(np.float32), high, shape, np.float32)


def _fit(recorded: Recorded, spec: EnvSpec, path: File) -> None:
    """Give columns the shapes and dtypes of spaces, in place.

    Raises:
        DataError: if they have other parts or sizes, or numbers that are not whole in a discrete space.
    """
    leaves = space_leaves(spec.observation_space, "observation") | space_leaves(spec.action_space, "action")
    columns: Any = recorded.columns
    if set(leaves) != set(columns):
        raise DataError(
            f"{path}: the columns make {sorted(columns)}, the spaces of {spec.env_id} have {sorted(leaves)}."
        )
    for name, space in leaves.items():
        x, shape = columns[name], space.shape or ()
        if int(np.prod(x.shape[1:])) != int(np.prod(shape)):
            raise DataError(
                f"{path}: {name} has {int(np.prod(x.shape[1:]))} numbers a row, the space {space} of {spec.env_id} has "
                f"{int(np.prod(shape))}."
            )
        kind = np.dtype(row_dtype(space))
        if kind.kind in "iu" and x.dtype.kind == "f" and not bool((x == np.floor(x)).all()):
            value = x[x != np.floor(x)].flat[0].item()
            raise DataError(f"{path}: {name} has the value {value!r}: expected whole numbers of {space}.")
        if kind.kind == "u" and x.dtype != kind and not bool(((x >= 0) & (x <= 255)).all()):
            raise DataError(f"{path}: {name} has values from {x.min()} to {x.max()}: expected those of {space}.")
        columns[name] = np.require(x.reshape(len(x), *shape), kind, ["C", "W"])
