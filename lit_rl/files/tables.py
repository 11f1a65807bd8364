"""Tables of numbers in files: named columns of Parquet, CSV, JSON lines and HDF5. No code that a file holds is run."""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from lit_rl.errors import DataError, OptionError
from lit_rl.files.finding import File, open_input
from lit_rl.files.parquet import refuse_extension_types
from lit_rl.recorded import first_not_finite

FORMATS = {
    ".parquet": "Parquet", ".csv": "CSV", ".json": "JSON lines", ".jsonl": "JSON lines", ".h5": "HDF5", ".hdf5": "HDF5",
}  # fmt: skip
JSON_BLOCK = 64 * 2**20  # bytes: no line may be longer
SHOWN = 12  # names of columns in a message


class Table:
    """A file of named columns.

    Attributes:
        path: the file.
        names: of its columns; of HDF5 the paths of its data sets.
    """

    def __init__(self, path: File):
        self.path = path
        ending = path.suffix.lower()
        if ending not in FORMATS:
            raise OptionError(f"paths={str(path)!r}: expected a name that ends in {', '.join(FORMATS)}.")
        self._format = FORMATS[ending]
        self._file: Any = None
        try:
            self.names: list[str] = list(getattr(self, f"_open_{ending.lstrip('.')}")())
        except (DataError, OptionError):
            raise
        except Exception as error:  # pyarrow and h5py raise a dozen kinds
            raise self._unreadable(error) from error

    @classmethod
    def of_arrays(cls, name: str, arrays: Mapping[str, np.ndarray]) -> "Table":
        """A table that is in memory: arrays of equal length by column.

        Args:
            name: what it is called in messages.
            arrays: by column.
        """
        table = cls.__new__(cls)
        table.path, table.names, table._format, table._file = Path(name), list(arrays), "arrays", arrays
        return table

    def read(self, names: Sequence[str]) -> dict[str, Any]:
        """Columns by name, numpy arrays or pyarrow's, for `numbers` and `codes`.

        Raises:
            DataError: if there is no such column, or the file is damaged.
        """
        missing = [name for name in names if name not in self.names]
        if missing:
            there = ", ".join(map(repr, self.names[:SHOWN])) + (", ..." if len(self.names) > SHOWN else "")
            raise DataError(f"{self.path}: there is no column {missing[0]!r}. There are {there}.")
        try:
            if self._format == "HDF5":
                return {name: np.asarray(self._file[name][()]) for name in names}
            if self._format == "arrays":
                return {name: self._file[name] for name in names}
            table = self._file.read(columns=list(names)) if self._format == "Parquet" else self._file
            return {name: table.column(name) for name in names}
        except Exception as error:
            raise self._unreadable(error) from error

    def numbers(self, name: str, column: Any) -> np.ndarray:
        """A column of numbers [N, *shape].

        Raises:
            DataError: naming the row that is none, is empty or is not finite, or the type if it cannot be one.
        """
        if isinstance(column, np.ndarray):
            if not column.ndim:
                raise DataError(f"{self.path}: column {name!r} is one value: expected one for each row.")
            array = column
        else:
            chunks = [self._of_arrow(name, chunk) for chunk in column.chunks if len(chunk)]
            if len({chunk.shape[1:] for chunk in chunks}) > 1:
                raise self._ragged(name)
            array = np.concatenate(chunks) if len(chunks) > 1 else chunks[0] if chunks else np.zeros(0)
        if array.dtype.kind not in "biuf":
            raise DataError(f"{self.path}: column {name!r} holds {array.dtype} values: expected numbers.")
        if (row := first_not_finite(array)) is not None:
            raise DataError(f"{self.path}: column {name!r} is {array[row].tolist()} in row {row}: expected numbers.")
        return array

    def codes(self, name: str, column: Any) -> tuple[np.ndarray, list[str]]:
        """A column of ids [N] as numbers, and what the numbers stand for; a missing id is one of its own."""
        if isinstance(column, np.ndarray):
            if column.ndim != 1:
                raise DataError(f"{self.path}: column {name!r} has {column.ndim} dimensions: expected one id a row.")
            values, codes = np.unique(column, return_inverse=True)
            return codes, [x.decode() if isinstance(x, bytes) else str(x) for x in values.tolist()]
        import pyarrow as pa

        if pa.types.is_nested(column.type) or pa.types.is_binary(column.type):
            raise DataError(f"{self.path}: column {name!r} is of the type {column.type}: expected numbers or texts.")
        encoded = column.combine_chunks()
        encoded = encoded if pa.types.is_dictionary(encoded.type) else encoded.dictionary_encode(null_encoding="encode")
        return encoded.indices.to_numpy(zero_copy_only=False), [str(x) for x in encoded.dictionary.to_pylist()]

    # --- formats ------------------------------------------------------------------------------------------------

    def _open_parquet(self) -> list[str]:
        import pyarrow.parquet as pq

        refuse_extension_types(self.path)
        self._file = pq.ParquetFile(open_input(self.path))
        return self._file.schema_arrow.names

    def _open_csv(self) -> list[str]:
        from pyarrow import csv

        self._file = csv.read_csv(open_input(self.path))
        return self._file.column_names

    def _open_json(self) -> list[str]:
        from pyarrow import json

        self._file = json.read_json(open_input(self.path), read_options=json.ReadOptions(block_size=JSON_BLOCK))
        return self._file.column_names

    _open_jsonl = _open_json

    def _open_h5(self) -> list[str]:
        if find_spec("h5py") is None:
            raise OptionError(
                f"paths={str(self.path)!r}: HDF5 files are read by h5py, which is missing. Install lit-rl[hdf5]."
            )
        import h5py

        source = self.path if isinstance(self.path, Path) else open_input(self.path)
        self._file, names = h5py.File(source, "r"), list[str]()
        self._file.visititems(lambda name, node: names.append(name) if isinstance(node, h5py.Dataset) else None)
        return names

    _open_hdf5 = _open_h5

    def explode(self, columns: dict[str, Any]) -> dict[str, Any]:
        """Columns of which each row holds the values of several, as one row for each of them."""
        import pyarrow as pa
        import pyarrow.compute as pc

        lengths = None
        for name, column in columns.items():
            if isinstance(column, np.ndarray) or not (
                pa.types.is_list(column.type) or pa.types.is_large_list(column.type)
            ):
                raise DataError(f"{self.path}: column {name!r} is of the type {column.type}: expected lists of rows.")
            found = pc.list_value_length(column).to_numpy(zero_copy_only=False)
            if lengths is not None and not np.array_equal(found, lengths):
                raise DataError(f"{self.path}: column {name!r} has lists of other lengths than the others.")
            lengths = found
        return {name: pc.list_flatten(column) for name, column in columns.items()}

    def _of_arrow(self, name: str, chunk: Any) -> np.ndarray:
        """An array of pyarrow as one of numpy, lists as further dimensions."""
        import pyarrow as pa

        kind = chunk.type
        if chunk.null_count:
            row = int(np.argmin(chunk.is_valid().to_numpy(zero_copy_only=False)))
            raise DataError(f"{self.path}: column {name!r} is empty in row {row}: expected numbers.")
        if pa.types.is_fixed_size_list(kind):
            flat = self._of_arrow(name, chunk.flatten())
            return flat.reshape(len(chunk), kind.list_size, *flat.shape[1:])
        if pa.types.is_list(kind) or pa.types.is_large_list(kind):
            lengths = np.unique(chunk.value_lengths().to_numpy(zero_copy_only=False))
            if len(lengths) > 1:
                raise self._ragged(name, lengths)
            flat = self._of_arrow(name, chunk.flatten())
            return flat.reshape(len(chunk), int(lengths[0]), *flat.shape[1:])
        if pa.types.is_boolean(kind) or pa.types.is_integer(kind) or pa.types.is_floating(kind):
            return chunk.to_numpy(zero_copy_only=False)
        row, example = _no_number(chunk)
        shown = f", as in {example!r} in row {row}" if pa.types.is_string(kind) and len(example) < 60 else ""
        advice = " It may be compressed or pickled: write plain lists of numbers." if len(str(example)) >= 60 else ""
        raise DataError(f"{self.path}: column {name!r} is of the type {kind}{shown}: expected numbers.{advice}")

    def _ragged(self, name: str, lengths: Any = None) -> DataError:
        said = "" if lengths is None else f": {lengths[0]} and {lengths[1]} numbers"
        return DataError(f"{self.path}: the rows of column {name!r} have different lengths{said}. Expected equal ones.")

    def _unreadable(self, error: Exception) -> DataError:
        message = " ".join(str(error).split())[:200]
        return DataError(f"{self.path} cannot be read as {self._format}, it may be truncated or damaged: {message}")


def _no_number(chunk: Any) -> tuple[int, Any]:
    """The first value of an array of pyarrow that is no number, and its row; the first of all if all are."""
    for row, value in enumerate(chunk):
        try:
            float(value.as_py())
        except (TypeError, ValueError):
            return row, value.as_py()
    return 0, chunk[0].as_py()
