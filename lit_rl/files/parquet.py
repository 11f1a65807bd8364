"""What is looked at in a Parquet file before pyarrow may read anything of it."""

import base64
import io

from lit_rl.errors import DataError
from lit_rl.files.finding import File, open_input

KEY = b"ARROW:extension:name"
# As it is written in base64, after 0, 1 or 2 bytes of what comes before.
EXTENSION_NAMES = [base64.b64encode(bytes(k) + KEY)[-(-8 * k // 6) : 8 * (k + len(KEY)) // 6] for k in range(3)]


def refuse_extension_types(path: File) -> None:
    """Refuse a Parquet file whose schema has Arrow extension types, before pyarrow makes that.

    It then runs code of types that libraries have registered (Ray's may unpickle), also for metadata alone. The schema
    is in the file's footer, in base64.

    Raises:
        DataError: if it has some.
    """
    with open_input(path) as file:
        end = file.seek(0, io.SEEK_END)
        file.seek(max(0, end - 8))
        length = int.from_bytes(file.read(4), "little")
        file.seek(max(0, end - 8 - length))
        footer = file.read(length)
    if any(name in footer for name in EXTENSION_NAMES):
        raise DataError(
            f"{path}: it has columns of Arrow extension types, which may hold code. Write plain lists of numbers."
        )
