"""A folder of recorded episodes, to which learner processes add: shards that are whole or absent, and a manifest.

A shard is written to a temporary file, flushed to disk, and renamed; then the manifest is replaced in the same way. One
process does so at a time, under a lock. A process that is killed in between leaves a whole shard that the manifest does
not have: the next one that adds to the folder enters it.

Episodes are numbered on. One that was recorded before is not recorded again, as when a run is resumed, or begun anew
with its seed, and plays the same episodes once more: an episode's id is made of what happened in it and of when it was.
"""

import contextlib
import fcntl
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lit_rl.errors import DataError, write_error
from lit_rl.files.atomic import flush, remove_strays, temporary_file
from lit_rl.files.episodes import (
    ALONE,
    FORMAT,
    MANIFEST,
    SHARDS,
    Spec,
    digest,
    open_file,
    read_manifest,
    read_rows,
    schema_of,
    spaces_of,
)
from lit_rl.trees import row_dtype

LOCK = ".lock"


class TimeLine(NamedTuple):
    """What an agent saw and did from an episode's beginning to its end, L steps.

    Attributes:
        steps: arrays [L, ...]: `observation, action` by path, `reward, terminated, truncated, log_prob`.
        final: its final observation [...], by path.
        deterministic: whether it took the most probable actions.
        policy_version: updates that its policy had been through, one for all steps or [L].
        agent: who it was.
    """

    steps: Mapping[str, np.ndarray]
    final: Mapping[str, np.ndarray]
    deterministic: bool
    policy_version: int | np.ndarray
    agent: str = ALONE

    def __len__(self) -> int:
        return len(self.steps["reward"])


class WholeEpisode(NamedTuple):
    """An episode from its beginning to its end.

    Attributes:
        lines: what each agent saw and did.
        origin: where it came from: seeds, positions in the run. Another episode has others, or another content.
    """

    lines: Sequence[TimeLine]
    origin: Sequence[int | str]

    @property
    def return_(self) -> float:
        """The undiscounted sum of all rewards."""
        return float(sum(line.steps["reward"].sum(dtype=np.float64) for line in self.lines))

    @property
    def num_bytes(self) -> int:
        return sum(array.nbytes for line in self.lines for array in line.steps.values())

    def id(self) -> str:
        """The same for the same episode, in whatever run."""
        found = hashlib.blake2b(json.dumps(list(self.origin)).encode(), digest_size=8)
        for line in self.lines:
            found.update(line.agent.encode())
            for part in (line.steps, line.final):
                for name in sorted(part):
                    found.update(name.encode())
                    found.update(np.ascontiguousarray(part[name]).data)
        return found.hexdigest()


class EpisodeFolder:
    """Adds episodes to a folder.

    Args:
        path: of the folder, which is made.
        spec: of the environment.
        env: how that is made, in plain data; None if it cannot be said.
        rank: of the learner process, which names its shards.

    Raises:
        DataError: if it cannot be written to, or has episodes of other spaces.
    """

    def __init__(self, path: str | Path, spec: Spec, env: dict[str, Any] | None = None, rank: int = 0):
        self.path = Path(path)
        self._spec, self._env, self._rank = spec, env, rank
        self._spaces = spaces_of(spec)
        with self._writing():
            self.path.mkdir(parents=True, exist_ok=True)
            remove_strays(self.path)
            with self._locked():
                files = [open_file(file) for file in sorted(self.path.glob(SHARDS))]
        for file in files:
            found = spaces_of(file.spec)
            for name in [*self._spaces, *found]:
                if self._spaces.get(name) != found.get(name):
                    raise DataError(
                        f"folder={str(path)!r} has episodes of {file.spec.env_id} with {name} in {found.get(name)}, "
                        f"{spec.env_id} has {self._spaces.get(name)}. Give another folder."
                    )
        self._known = {id_ for file in files for id_ in file.ids}

    def add(self, episodes: Sequence[WholeEpisode]) -> int:
        """Write episodes into a shard; returns how many, without those that were there before.

        Raises:
            DataError: if they cannot be written. The folder is then as it was.
        """
        ids = [episode.id() for episode in episodes]
        new = [i for i, id_ in enumerate(ids) if id_ not in self._known]
        if not new:
            return 0
        with self._writing(), self._locked():
            manifest = self._read_manifest()
            first = manifest["next_episode"]
            name = self._next_name()
            with temporary_file(self.path / name) as file:
                self._write(file, [episodes[i] for i in new], [ids[i] for i in new], first)
                file.flush()
                os.fsync(file.fileno())
                os.rename(file.name, self.path / name)
            flush(self.path)
            returns, rows = [episodes[i].return_ for i in new], self._rows_of([episodes[i] for i in new])
            self._enter(manifest, name, returns, rows, first + len(new))
        return len(new)

    def _write(self, file: Any, episodes: Sequence[WholeEpisode], ids: Sequence[str], first: int) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        metadata = {"format": FORMAT, "spec": self._spec.to_dict(), "env": self._env, "ids": ids}
        schema = schema_of(self._spec, metadata)
        columns = self._columns(episodes, first)
        arrays = []
        for field in schema:
            column = columns[field.name]
            if field.name == "agent":
                arrays.append(pa.array(column).dictionary_encode())
            elif pa.types.is_fixed_size_list(field.type):
                values = pa.array(column.reshape(-1))
                arrays.append(pa.FixedSizeListArray.from_arrays(values, field.type.list_size))
            else:
                arrays.append(pa.array(column, field.type))
        table = pa.Table.from_arrays(arrays, schema=schema)
        pq.write_table(table, file, compression="zstd", use_dictionary=["agent"], write_statistics=["episode", "t"])

    def _columns(self, episodes: Sequence[WholeEpisode], first: int) -> dict[str, Any]:
        """The rows of episodes by column; all zeros where a closing row knows nothing."""
        num_rows, at = self._rows_of(episodes), 0
        fields = {path: (row_dtype(space), space.shape or ()) for path, space in self._spaces.items()}
        fields |= {"episode": ("<i8", ()), "t": ("<i4", ()), "reward": ("<f8", ()), "log_prob": ("<f4", ())}
        fields |= dict.fromkeys(["terminated", "truncated", "deterministic", "closing"], ("|b1", ()))
        fields["policy_version"] = "<i8", ()
        columns: dict[str, Any] = {name: np.zeros((num_rows, *shape), dtype) for name, (dtype, shape) in fields.items()}
        agents: list[str] = []
        for number, episode in enumerate(episodes, first):
            for line in episode.lines:
                end = at + len(line)
                for name, values in line.steps.items():
                    columns[name][at:end] = values
                for name, value in line.final.items():
                    columns[name][end] = value
                columns["episode"][at : end + 1] = number
                columns["t"][at : end + 1] = np.arange(end + 1 - at)
                columns["deterministic"][at:end], columns["policy_version"][at:end] = line[2:4]
                columns["closing"][end] = True
                agents += [line.agent] * (end + 1 - at)
                at = end + 1
        return columns | {"agent": agents}

    @staticmethod
    def _rows_of(episodes: Sequence[WholeEpisode]) -> int:
        return sum(len(line) + 1 for episode in episodes for line in episode.lines)

    # --- the manifest -------------------------------------------------------------------------------------------

    def _read_manifest(self) -> dict[str, Any]:
        """The manifest, with every shard that is there."""
        manifest = read_manifest(self.path) or {"format": FORMAT, "next_episode": 0, "shards": {}}
        for path in sorted(self.path.glob(SHARDS)):
            if path.name not in manifest["shards"]:  # of a process that was killed before it had entered it
                rows = read_rows([path])
                returns = episode_returns(rows.columns).tolist()
                last = int(rows.columns["episode"].max(initial=-1))
                self._enter(manifest, path.name, returns, len(rows.columns["t"]), last + 1)
        return manifest

    def _enter(
        self, manifest: dict[str, Any], name: str, returns: Sequence[float], num_rows: int, next_episode: int
    ) -> None:
        """Enter a shard into the manifest, and write it."""
        path = self.path / name
        manifest["shards"][name] = {
            "sha256": digest(path),
            "bytes": path.stat().st_size,
            "episodes": len(returns),
            "rows": num_rows,
            "return_sum": float(np.sum(returns)),
            "return_min": float(np.min(returns)),
            "return_max": float(np.max(returns)),
            "return_histogram": return_histogram(returns),
        }
        shards = manifest["shards"].values()
        histogram: Counter[str] = Counter()
        for shard in shards:
            histogram.update(shard["return_histogram"])
        episodes = sum(shard["episodes"] for shard in shards)
        manifest |= {
            "next_episode": max(manifest["next_episode"], next_episode),
            "episodes": episodes,
            "rows": sum(shard["rows"] for shard in shards),
            "return_mean": sum(shard["return_sum"] for shard in shards) / episodes,
            "return_min": min(shard["return_min"] for shard in shards),
            "return_max": max(shard["return_max"] for shard in shards),
            "return_histogram": {value: histogram[value] for value in sorted(histogram, key=float)},
        }
        with temporary_file(self.path / MANIFEST) as file:
            file.write(_text(manifest).encode())
            file.flush()
            os.fsync(file.fileno())
            os.rename(file.name, self.path / MANIFEST)
        flush(self.path)

    def _next_name(self) -> str:
        prefix = f"episodes-rank{self._rank}-"
        taken = [path.stem.removeprefix(prefix) for path in self.path.glob(f"{prefix}*.parquet")]
        return f"{prefix}{max((int(number) for number in taken if number.isdigit()), default=-1) + 1:05d}.parquet"

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """No other process adds to the folder meanwhile."""
        with (self.path / LOCK).open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise DataError(f"folder={str(self.path)!r} cannot be written to: {write_error(error)}.") from error


def _text(manifest: Mapping[str, Any]) -> str:
    """A manifest as JSON, with a line for each shard."""
    shards = ",\n".join(f"  {json.dumps(name)}: {json.dumps(shard)}" for name, shard in manifest["shards"].items())
    lines = [f" {json.dumps(name)}: {json.dumps(value)}" for name, value in manifest.items() if name != "shards"]
    return "{\n" + ",\n".join([*lines, f' "shards": {{\n{shards}\n }}']) + "\n}\n"


def episode_returns(columns: Mapping[str, np.ndarray]) -> np.ndarray:
    """The return of each episode of a shard's columns: the sum over its agents."""
    _, number = np.unique(columns["episode"], return_inverse=True)
    return np.bincount(number, columns["reward"] * ~columns["closing"])


def return_histogram(returns: Sequence[float]) -> dict[str, int]:
    """How many returns there are of each value, rounded to two digits.

    >>> return_histogram([9.0, 497.0, 500.0, 488.0, -1632.5])
    {'-1600': 1, '9': 1, '490': 1, '500': 2}
    """
    counts = Counter(f"{float(f'{value:.1e}'):g}" for value in returns)
    return {value: counts[value] for value in sorted(counts, key=float)}
