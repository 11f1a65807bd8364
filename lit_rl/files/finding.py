"""Which files paths, folders and globs mean, on this machine or in another filesystem that pyarrow knows."""

import glob
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from lit_rl.errors import OptionError

URI = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]*)://")


@dataclass(frozen=True)
class RemoteFile:
    """A file in a filesystem of pyarrow; it has those parts of a `Path` that readers of files use.

    Attributes:
        uri: what it is called in messages.
        path: where it is in the filesystem.
        filesystem: in which it is.
    """

    uri: str
    path: str
    filesystem: Any = field(compare=False, repr=False)

    @property
    def name(self) -> str:
        return PurePosixPath(self.path).name

    @property
    def stem(self) -> str:
        return PurePosixPath(self.path).stem

    @property
    def parent(self) -> PurePosixPath:
        return PurePosixPath(self.path).parent

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.path).suffix

    def __str__(self) -> str:
        return self.uri


File = Path | RemoteFile


def open_input(file: File) -> Any:
    """A file, open for reading, as pyarrow's functions take it.

    Raises:
        OSError: if it cannot be opened.
    """
    import pyarrow as pa

    return pa.OSFile(str(file)) if isinstance(file, Path) else file.filesystem.open_input_file(file.path)


def num_bytes(file: File) -> int:
    """The size of a file.

    Raises:
        OSError: if it cannot be looked at.
    """
    return file.stat().st_size if isinstance(file, Path) else file.filesystem.get_file_info(file.path).size


def find_files(paths: Sequence[str | File], endings: Collection[str]) -> list[File]:
    """The files that paths, folders (with what is below them) and globs mean, each once, sorted within each.

    Args:
        paths: of this machine, or URIs such as "s3://bucket/folder".
        endings: of the names of files in a folder that are meant, such as ".parquet".

    Raises:
        OptionError: if one of them means none.
    """
    found: dict[File, None] = {}
    for given in paths:
        for named in expand(given):
            files = _below(named, endings)
            if not files:
                raise OptionError(f"paths={str(given)!r}: the folder has no file that ends in {', '.join(endings)}.")
            found |= dict.fromkeys(files)
    return list(found)


def expand(given: str | File) -> list[File]:
    """The files and folders that a path or a glob names.

    Raises:
        OptionError: if there are none.
    """
    if isinstance(given, RemoteFile):
        return [given]
    if URI.match(str(given)):
        return _expand_uri(str(given))
    path = Path(given).expanduser()
    if path.exists():
        return [path]
    if not glob.has_magic(str(path)):
        made = " benchmarks/offline_data.py makes the recipes' data." if path.parts[:2] == ("runs", "data") else ""
        raise OptionError(f"paths={str(given)!r}: there is no such file or folder.{made}")
    found = sorted(Path(name) for name in glob.glob(str(path), recursive=True))
    if not found:
        raise OptionError(f"paths={str(given)!r}: no file matches it.")
    return list(found)


def _expand_uri(uri: str) -> list[File]:
    """What a URI names; "*" may stand for parts of the names in it."""
    import pyarrow as pa
    from pyarrow import fs

    scheme = URI.match(uri)
    assert scheme is not None
    try:
        filesystem, path = fs.FileSystem.from_uri(uri)

        def file(path: str) -> RemoteFile:
            return RemoteFile(f"{scheme[1]}://{path}", path, filesystem)

        if "*" in path:
            fixed = PurePosixPath(path[: path.index("*")] + "x").parent
            depth = len(PurePosixPath(path).parts)
            infos = filesystem.get_file_info(fs.FileSelector(str(fixed), recursive=True))
            matching = (PurePosixPath(info.path) for info in infos)
            names = sorted(str(one) for one in matching if len(one.parts) == depth and one.match(path))
            if not names:
                raise OptionError(f"paths={uri!r}: no file matches it.")
            return [file(name) for name in names]
        if filesystem.get_file_info(path).type == fs.FileType.NotFound:
            raise OptionError(f"paths={uri!r}: there is no such file or folder.")
        return [file(path)]
    except (pa.ArrowException, OSError) as error:
        message = " ".join(str(error).split())[:200]
        raise OptionError(f"paths={uri!r} cannot be looked at: {message}") from error


def _below(named: File, endings: Collection[str]) -> Sequence[File]:
    """A file, or the files in a folder and below it."""
    if isinstance(named, Path):
        if not named.is_dir():
            return [named]
        return [path for path in sorted(named.rglob("*")) if path.suffix.lower() in endings and path.is_file()]
    from pyarrow import fs

    if named.filesystem.get_file_info(named.path).type != fs.FileType.Directory:
        return [named]
    infos = named.filesystem.get_file_info(fs.FileSelector(named.path, recursive=True))
    prefix = named.uri.removesuffix(named.path)
    files = [RemoteFile(prefix + info.path, info.path, named.filesystem) for info in infos if info.is_file]
    return [file for file in sorted(files, key=lambda file: file.path) if file.suffix.lower() in endings]
