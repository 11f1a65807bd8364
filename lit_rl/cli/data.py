"""`lit-rl data info|check`: what recorded episodes are like, and whether they are whole. Needs no Lightning."""

import sys
from collections.abc import Sequence
from pathlib import Path

from lit_rl.cli.shared import own_parser
from lit_rl.errors import DataError, OptionError


def data(args: Sequence[str]) -> None:
    """`lit-rl data`: tells of recorded episodes, or checks them; `check` exits with 1 if there is a fault.

    Raises:
        DataError: if there are no episodes, or `info` cannot read them.
        OptionError: if a path is empty, or the picture cannot be drawn.
    """
    parser = own_parser("data")
    parser.add_argument("what", choices=["info", "check"], help="info or check")
    parser.add_argument("episodes", nargs="+", help="files, folders or patterns, such as 'runs/*/*/episodes'")
    parser.add_argument("-o", "--output", type=str | None, default=None, help="info: draw histograms into this file")
    options = parser.parse_args(args)
    if "" in options.episodes:
        raise OptionError("episodes='': expected files, folders or patterns.")
    if options.what == "check":
        _check(options.episodes)
    else:
        _info(options.episodes, options.output)


def _info(paths: Sequence[str], output: str | None) -> None:
    """Say what episodes are like, and draw their histograms into a file if one is named."""
    from lit_rl.files.episodes import find, open_file, read_rows
    from lit_rl.viewing.recorded import describe, draw_histograms

    files = find(paths)
    rows = read_rows(
        files, [] if any(open_file(path).format == 1 for path in files) else ["deterministic", "policy_version"]
    )
    print("\n".join(describe(rows)))
    if output is not None:
        draw_histograms(rows, output)
        print(f"Histograms: {output}")


def _check(paths: Sequence[str]) -> None:
    """Say what is wrong with files, each by itself and all together."""
    from lit_rl.files.episodes import Rows, find, read_rows
    from lit_rl.files.finding import File
    from lit_rl.viewing.recorded import faults

    said: list[str] = []
    read: dict[File, Rows] = {}
    files: list[File] = []
    for path in paths:
        try:
            files += find([path])
        except DataError as error:
            said.append(str(error))
            files += sorted(Path(path).glob("*.parquet"))
    for file in dict.fromkeys(files):
        try:
            read[file] = read_rows([file])
        except DataError as error:
            said.append(str(error))
    said += faults(read)
    num_episodes = sum(len(set(rows.columns["episode"].tolist())) for rows in read.values())
    num_rows = sum(len(rows.columns["t"]) for rows in read.values())
    for sentence in said:
        print(f"lit-rl: error: {sentence}", file=sys.stderr)
    print(f"{len(read)} of {len(dict.fromkeys(files))} files are whole: {num_episodes:,} episodes, {num_rows:,} rows.")
    if said:
        print(f"{len(said)} fault{'s' if len(said) > 1 else ''}.")
        sys.exit(1)
