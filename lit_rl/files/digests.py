"""Files of `torch.save` that carry the SHA-256 of themselves, and are refused when it is another one."""

import hashlib
import os
import struct
import zipfile
from typing import Any, BinaryIO

# The comment at the end of the zip archive, which is all that follows its last record.
MARK, HEX_LENGTH = b"lit_rl sha256 ", 64
RECORD_LENGTH, RECORD_START = 22, b"PK\5\6"


def seal(file: BinaryIO) -> None:
    """Append the digest of all that is before it to what `torch.save` wrote; plain `torch.load` reads it as before."""
    file.seek(-2, os.SEEK_END)  # the comment's length
    file.write(struct.pack("<H", len(MARK) + HEX_LENGTH) + MARK)
    file.seek(0)
    file.write(hashlib.file_digest(file, "sha256").hexdigest().encode())  # type: ignore[arg-type]


def check(file: BinaryIO) -> None:
    """Read a file to its end, and go back to its beginning. One that has no digest is checked by its zip's CRCs.

    Raises:
        ValueError: if it is not what was written, down to the last bit.
        zipfile.BadZipFile, OSError: likewise.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - len(MARK) - HEX_LENGTH))
    end = file.read()
    file.seek(0)
    if end.startswith(MARK):
        digest, left = hashlib.sha256(), size - HEX_LENGTH
        while block := file.read(min(left, 2**20)):
            digest.update(block)
            left -= len(block)
        if digest.hexdigest().encode() != end[len(MARK) :]:
            raise ValueError("its contents are not those that were written")
    elif end[-RECORD_LENGTH:].startswith(RECORD_START) and end.endswith(b"\0\0"):  # a zip without a comment
        with zipfile.ZipFile(file) as archive:
            bad = archive.testzip()
        if bad is not None:
            raise ValueError(f"the contents of {bad} are not those that were written")
    else:
        raise ValueError("it does not end as a checkpoint does")
    file.seek(0)


def describe(file: BinaryIO) -> list[Any]:
    """Size and SHA-256 of a whole file, in plain data; the file is at its beginning again."""
    file.seek(0)
    digest = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
    size = file.tell()
    file.seek(0)
    return [size, digest]
