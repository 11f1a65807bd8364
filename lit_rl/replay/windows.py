"""Rows that come in an order of their own, handed on in a random one: those of a window at a time.

A window is rows that came one after the other, shuffled by a seed of its own, so where a run is can be said by three
numbers, and to go on there takes no more than to read one window again. It never reaches into the next epoch: an epoch
is all its rows, each once, whatever the window.

Shapes: N rows of a window, M of a minibatch.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

Block = tuple[int, Mapping[str, np.ndarray]]  # the number of the part that its rows are of, and arrays by path


class Windows:
    """Minibatches of rows that are read part by part, without end.

    Args:
        read: given the number of a part, the blocks of rows of it and of all parts that come after, in order.
        epoch_of: the epoch that a part belongs to.
        size: N, the most rows of a window.
        seed: for the number of a part and of a row in it, that of the window that begins there.
    """

    def __init__(
        self,
        read: Callable[[int], Iterator[Block]],
        *,
        epoch_of: Callable[[int], int],
        size: int,
        seed: Callable[[int, int], np.random.SeedSequence],
    ):
        self._read, self._epoch_of, self._size, self._seed = read, epoch_of, size, seed
        self._blocks: Iterator[Block] | None = None
        self._left: Block | None = None  # what was read of a block and is not in a window yet
        self._next = (0, 0)  # the part and the row in it that come after the window
        self._begin = (0, 0)  # with which the window begins
        self._window: dict[str, Tensor] = {}
        self._taken = 0  # rows of the window
        self._length = 0  # N, of the window

    def take(self, num: int) -> dict[str, Tensor]:
        """The next `num` rows by path; an epoch's last ones are followed by the first of the next epoch."""
        parts: list[dict[str, Tensor]] = []
        while num:
            if self._taken == self._length:
                self._open()
            end = min(self._taken + num, self._length)
            parts.append({path: x[self._taken : end] for path, x in self._window.items()})
            num, self._taken = num - (end - self._taken), end
        return parts[0] if len(parts) == 1 else {path: torch.cat([part[path] for part in parts]) for path in parts[0]}

    def position(self) -> dict[str, int]:
        """Where it is, in plain data."""
        part, row = self._begin
        return {"epoch": self._epoch_of(part), "part": part, "row": row, "taken": self._taken}

    def go_on(self, position: Mapping[str, int]) -> None:
        """Take what was to be taken next when `position` was asked."""
        self.close()
        self._begin = self._next = position["part"], position["row"]
        self._length = self._taken = 0
        if position["taken"]:
            self._open()
            self._taken = position["taken"]

    def close(self) -> None:
        """Read no further; what is taken next is read anew."""
        if self._blocks is not None and hasattr(self._blocks, "close"):
            self._blocks.close()
        self._blocks = self._left = None

    def _open(self) -> None:
        """Have the next window."""
        pieces: list[Mapping[str, np.ndarray]] = []
        size, epoch = 0, -1
        self._window = {}  # before there is another one
        while size < self._size:
            part, rows = self._block()
            if epoch not in (-1, self._epoch_of(part)):
                break
            if epoch == -1:
                epoch, self._begin = self._epoch_of(part), (part, self._next[1] if part == self._next[0] else 0)
            here = len(next(iter(rows.values())))
            taken = min(here, self._size - size)
            pieces.append({path: x[:taken] for path, x in rows.items()})
            self._next = part, (self._next[1] if part == self._next[0] else 0) + taken
            self._left = (part, {path: x[taken:] for path, x in rows.items()}) if taken < here else None
            size += taken
        order = np.random.default_rng(self._seed(*self._begin)).permutation(size)
        self._window = {path: torch.from_numpy(_placed([p[path] for p in pieces], order)) for path in pieces[0]}
        self._length, self._taken = size, 0

    def _block(self) -> Block:
        """The rows that come next, at least one."""
        if self._left is None:
            if self._blocks is None:
                part, skip = self._next
                self._blocks = _without(self._read(part), part, skip)
            self._left = next(self._blocks)
        return self._left


def _placed(pieces: list[np.ndarray], order: np.ndarray) -> np.ndarray:
    """Rows of several arrays, each where `order` says, in an array of their own."""
    found = np.empty((len(order), *pieces[0].shape[1:]), pieces[0].dtype)
    at = 0
    for piece in pieces:
        found[order[at : at + len(piece)]] = piece
        at += len(piece)
    return found


def _without(blocks: Iterator[Block], part: int, skip: int) -> Iterator[Any]:
    """Blocks that have rows, without the first `skip` rows of a part, with which they begin."""
    try:
        for number, rows in blocks:
            here = len(next(iter(rows.values())))
            dropped = min(skip, here) if number == part else 0
            skip -= dropped
            if dropped < here:
                yield number, {path: x[dropped:] for path, x in rows.items()}
    finally:
        close = getattr(blocks, "close", None)
        if close is not None:
            close()
