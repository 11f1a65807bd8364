"""Files of a data set that are read one at a time, because all of them together do not fit into memory."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from lit_rl.errors import DataError
from lit_rl.files import episodes
from lit_rl.files.columns import columns_of, names_of
from lit_rl.files.finding import File, find_files, num_bytes, open_input
from lit_rl.files.parquet import refuse_extension_types
from lit_rl.files.recorded import MINARI, read_recorded, read_rows
from lit_rl.files.tables import FORMATS
from lit_rl.recorded import Recorded
from lit_rl.spec import EnvSpec, MultiAgentSpec

AT_ONCE = 16  # files that are looked at

Found = TypeVar("Found")


@dataclass(frozen=True)
class DataFiles:
    """Files, and how the episodes of each are read.

    Attributes:
        files: in the order in which they were found.
        spec: the spaces, or those of each agent.
        columns, preset: see `read_recorded`.
        digest: of the files' names and sizes.
    """

    files: tuple[File, ...]
    spec: EnvSpec | MultiAgentSpec
    columns: Mapping[str, Any] | None
    preset: str | None
    digest: str

    def __len__(self) -> int:
        return len(self.files)

    def read(self, number: int) -> Recorded:
        """The episodes of a file.

        Raises:
            DataError: if it is damaged, or is not what it must be.
        """
        file = self.files[number]
        return read_recorded([file], columns=self.columns, preset=self.preset, spec=self.spec)[0]


@dataclass(frozen=True)
class OwnDataset:
    """A `ray.data.Dataset` of the user's, each row of which is an episode.

    Attributes:
        dataset: it.
        spec, columns, preset: see `DataFiles`.
    """

    dataset: Any
    spec: EnvSpec | MultiAgentSpec
    columns: Mapping[str, Any] | None
    preset: str | None
    digest = "a ray.data.Dataset"

    def __len__(self) -> int:
        return 1


def open_dataset(
    dataset: Any,
    *,
    columns: Mapping[str, Any] | None = None,
    preset: str | None = None,
    spec: EnvSpec | MultiAgentSpec | None = None,
) -> OwnDataset:
    """Look at the first episode of a `ray.data.Dataset`. Spaces that nobody says are that one's.

    Args:
        dataset: each of its rows is an episode.
        columns, preset, spec: see `read_recorded`.

    Raises:
        OptionError, DataError: as `read_recorded`.
    """
    _, found = read_rows(dataset.take_batch(1, batch_format="numpy"), columns=columns, preset=preset, spec=spec)
    return OwnDataset(dataset, spec or found, columns, preset)


def size_of(paths: Sequence[str], *, are_tables: bool) -> list[tuple[File, int]]:
    """The files that paths mean, and the bytes that each has as rows in memory, as far as it says so.

    That is the size without compression of Parquet files, and the file's own size of others. Minari's data sets have
    no files.

    Args:
        paths: see `read_recorded`.
        are_tables: whether their columns are named.

    Raises:
        OptionError, DataError: if a path means no file, or a folder has not all that its manifest says.
    """
    if any(path.startswith(MINARI) for path in paths):
        return []
    are_own = not are_tables and all(episodes.is_own(path) for path in paths)
    files = episodes.find(paths) if are_own else find_files(paths, FORMATS)
    return list(zip(files, _of_each(_size, files)))


def open_files(
    files: Sequence[File],
    *,
    columns: Mapping[str, Any] | None = None,
    preset: str | None = None,
    spec: EnvSpec | MultiAgentSpec | None = None,
) -> DataFiles:
    """Look at files that are to be read one at a time. Spaces that nobody says are those of the first.

    Args:
        files: at least one.
        columns, preset, spec: see `read_recorded`.

    Raises:
        OptionError, DataError: as `read_recorded`, or if the schema of a file is not that of the first.
    """
    if columns is None and preset is None and episodes.is_own(files[0]):
        opened = _of_each(episodes.open_file, files)
        episodes.check_alike(opened)
        found = opened[0].spec
    else:
        found = read_recorded(files[:1], columns=columns, preset=preset, spec=spec)[1]
        _check_schemas(files, set(names_of(columns_of(columns or {}, preset))))
    listed = "\n".join(f"{file.name} {num_bytes(file)}" for file in files)
    digest = hashlib.blake2b(listed.encode(), digest_size=8).hexdigest()
    return DataFiles(tuple(files), found, columns, preset, digest)


def _of_each(look: Callable[[File], Found], files: Sequence[File]) -> list[Found]:
    """What is found in each of several files: those that are far away are looked at at once."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(look, files))


def _size(file: File) -> int:
    metadata = _footer(file)
    if metadata is None:
        return num_bytes(file)
    return sum(metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups))


def _footer(file: File) -> Any:
    """The metadata of a Parquet file; None of another one, or of one that is damaged, which who reads it will say."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if file.suffix.lower() != ".parquet":
        return None
    try:
        refuse_extension_types(file)
        with open_input(file) as source:
            return pq.read_metadata(source)
    except (pa.ArrowException, OSError, DataError):
        return None


def _check_schemas(files: Sequence[File], names: set[str]) -> None:
    """Refuse Parquet files of which columns that are read have other types than in the first.

    Raises:
        DataError: naming the file and the column.
    """
    footers = _of_each(_footer, files)
    schemas = [{} if footer is None else _types(footer, names) for footer in footers]
    for file, schema in zip(files, schemas):
        for name in sorted({*schemas[0], *schema}) if schema and schemas[0] else ():
            here, first = schema.get(name, "missing"), schemas[0].get(name, "missing")
            if here != first:
                raise DataError(
                    f"{file}: column {name!r} is {here}, in {files[0]} it is {first}. Expected files of one schema."
                )


def _types(footer: Any, names: set[str]) -> dict[str, str]:
    """The types of those of the named columns that there are."""
    schema = footer.schema.to_arrow_schema()
    return {name: str(schema.field(name).type) for name in schema.names if name in names}
