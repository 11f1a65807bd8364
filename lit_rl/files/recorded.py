"""Recorded episodes of every kind in memory: lit_rl's own files, other tables, Minari's data sets.

Shapes: N rows, E episodes.
"""

from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np
from gymnasium import spaces

from lit_rl.errors import DataError, OptionError
from lit_rl.files import episodes
from lit_rl.files.columns import PRESETS, columns_of, names_of, read_tables
from lit_rl.files.finding import File, find_files
from lit_rl.files.tables import FORMATS, Table
from lit_rl.recorded import Recorded, first_not_finite, joined
from lit_rl.spec import EnvSpec, MultiAgentSpec, single
from lit_rl.trees import from_env, iterate, row_dtype, space_leaves

MINARI = "minari:"
ROWS, EPISODE = "ray.data.Dataset", "(row)"
ROUNDING = 1e-4  # of a Box's width: actions may lie so far outside, and are clipped


def read_recorded(
    paths: Sequence[str | File],
    *,
    columns: Mapping[str, Any] | None = None,
    preset: str | None = None,
    spec: EnvSpec | MultiAgentSpec | None = None,
) -> tuple[Recorded, EnvSpec | MultiAgentSpec]:
    """Episodes, and their spaces.

    Args:
        paths: files, folders and globs, of lit_rl's own episodes or, with `columns` or `preset`, of tables; or the
            names of Minari's data sets, "minari:D4RL/pen/human-v2".
        columns: of a table, by what they are: see `OfflineDataModule`.
        preset: names of the columns as another tool has them, one of `PRESETS`.
        spec: the spaces, if they are known; what is read has to fit.

    Raises:
        OptionError: if there are no such files, or the options contradict each other.
        DataError: if a file is damaged, or is not what it must be.
    """
    named = [str(path).removeprefix(MINARI) for path in paths if str(path).startswith(MINARI)]
    if named:
        if len(named) < len(paths) or columns is not None or preset is not None:
            raise OptionError(f"paths={list(paths)!r}: expected data sets of Minari alone, without columns and preset.")
        recorded, own = _read_minari(named)
        _check_finite(recorded, named[0])
        _check_actions(recorded, own, named[0])
        return recorded, own
    if columns is None and preset is None:
        strange = next((path for path in paths if not episodes.is_own(path)), None)
        if strange is not None:
            table = Table(find_files([strange], FORMATS)[0])
            raise OptionError(
                f"paths={str(table.path)!r}: these are no episodes that lit_rl wrote. Say what its columns are, with "
                f"columns={{'observation': [...], 'action': ..., ...}} or preset={' or '.join(map(repr, PRESETS))}. "
                f"There are {', '.join(map(repr, table.names))}."
            )
        return episodes.read(paths)
    tables = (Table(file) for file in find_files(paths, FORMATS))
    recorded, found = read_tables(tables, columns_of(columns or {}, preset), preset, spec)
    _check_actions(recorded, single(found), str(paths[0]))
    return recorded, found


def read_rows(
    rows: Mapping[str, np.ndarray],
    *,
    columns: Mapping[str, Any] | None = None,
    preset: str | None = None,
    spec: EnvSpec | MultiAgentSpec | None = None,
) -> tuple[Recorded, EnvSpec | MultiAgentSpec]:
    """Episodes of a table of which each row is a whole one, and their spaces.

    Args:
        rows: by column, what it holds of each episode: an array of its steps.
        columns, preset, spec: see `read_recorded`.

    Raises:
        OptionError, DataError: as `read_recorded`.
    """
    named = columns_of({**(columns or {}), "episode": EPISODE}, preset)
    found: dict[str, np.ndarray] = {}
    for name in names_of(named):
        if name in rows:
            steps = [np.asarray(x) for x in rows[name]]
            if not all(x.ndim for x in steps):
                raise DataError(
                    f"{ROWS}: column {name!r} has one value a row: expected an array of an episode's steps."
                )
            found[name] = np.concatenate(steps)
            found[EPISODE] = np.repeat(np.arange(len(steps)), [len(x) for x in steps])
    recorded, spec = read_tables([Table.of_arrays(ROWS, found)], named, preset, spec)
    _check_actions(recorded, single(spec), ROWS)
    return recorded, spec


def _check_actions(recorded: Recorded, spec: EnvSpec, where: str) -> None:
    """Refuse actions that are not in their space; those that are outside by rounding alone are clipped, in place.

    Raises:
        DataError: naming the action and the space.
    """
    columns: Any = recorded.columns
    for name, space in space_leaves(spec.action_space, "action").items():
        x = columns[name]
        if isinstance(space, spaces.Box):
            low, high = space.low.astype(x.dtype), space.high.astype(x.dtype)
            with np.errstate(over="ignore"):
                room = np.where(np.isfinite(high) & np.isfinite(low), (high - low) * ROUNDING, 0.0)
            outside = (x < low - room) | (x > high + room)
        else:
            start: Any = getattr(space, "start", 0)
            count: Any = space.n if isinstance(space, spaces.Discrete) else getattr(space, "nvec", 2)
            outside = (x < start) | (x >= start + count)
        wrong = outside.reshape(len(x), -1).any(1) & ~recorded.closing
        if wrong.any():
            row = int(wrong.argmax())
            raise DataError(
                f"{where}: {name}={x[row].tolist()} in {_step(recorded, row)} is outside of the action space {space}. "
                "Clip or scale the actions, or give the environment that they are for."
            )
        if isinstance(space, spaces.Box):
            np.clip(x, space.low, space.high, out=x)


def _check_finite(recorded: Recorded, where: str) -> None:
    """Refuse numbers that are not finite.

    Raises:
        DataError: naming the first.
    """
    for name, x in {**recorded.columns, "reward": recorded.reward}.items():
        if (row := first_not_finite(x)) is not None:
            raise DataError(f"{where}: {name}={x[row].tolist()} in {_step(recorded, row)}: expected finite numbers.")


def _step(recorded: Recorded, row: int) -> str:
    """A row, in words."""
    episode = int(np.searchsorted(recorded.begins, row, side="right")) - 1
    return f"step {row - int(recorded.begins[episode])} of episode {episode}"


def _read_minari(names: Sequence[str]) -> tuple[Recorded, EnvSpec]:
    if find_spec("minari") is None:
        raise OptionError(f"paths='{MINARI}{names[0]}': Minari is missing. Install minari[hdf5].")
    import minari

    found, spec = [], None
    for name in names:
        try:
            data: Any = minari.load_dataset(name)
            here = EnvSpec(name, data.observation_space, data.action_space)
            spec = spec or here
            if (here.observation_space, here.action_space) != (spec.observation_space, spec.action_space):
                raise DataError(f"{MINARI}{name}: its spaces are not those of {MINARI}{names[0]}.")
            found += [_of_episode(episode, spec) for episode in data.iterate_episodes()]
        except (OSError, KeyError, ValueError) as error:
            message = " ".join(str(error).split())[:200]
            raise DataError(f"paths='{MINARI}{name}' cannot be loaded: {message}") from error
    assert spec is not None
    return joined(found), spec


def _of_episode(episode: Any, spec: EnvSpec) -> Recorded:
    """One of Minari's episodes: T steps and T + 1 observations."""
    length = len(episode.rewards)

    def padded(x: Any, dtype: Any) -> np.ndarray:
        x = np.asarray(x)
        return np.concatenate([x, np.zeros((1, *x.shape[1:]), x.dtype)]).astype(dtype)

    trees: Iterable[tuple[str, Any, bool]] = [
        *(
            (path, x, False)
            for path, x in iterate(from_env(spec.observation_space, episode.observations), "observation")
        ),
        *((path, x, True) for path, x in iterate(from_env(spec.action_space, episode.actions), "action")),
    ]
    leaves = space_leaves(spec.observation_space, "observation") | space_leaves(spec.action_space, "action")
    columns = {
        path: padded(x, row_dtype(leaves[path])) if is_action else np.asarray(x).astype(row_dtype(leaves[path]))
        for path, x, is_action in trees
    }
    return Recorded(
        columns,
        padded(episode.rewards, np.float32),
        padded(episode.terminations, np.bool_),
        padded(episode.truncations, np.bool_),
        closing=np.arange(length + 1) == length,
        begins=np.zeros(1, np.int64),
    )
