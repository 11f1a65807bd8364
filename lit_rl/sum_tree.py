"""Sampling in proportion to priorities that change."""

import numpy as np

WIDTH = 128  # children of a node: three levels for two million leaves, and a row of them is one vectorised operation


class SumTree:
    """`size` priorities, of which to draw in proportion: O(log size) for a draw and for a change, many at a time.

    Every node is the sum of its `WIDTH` children, always added up anew, so that rounding does not accumulate.

    Args:
        size: number of leaves; all begin at 0.
    """

    def __init__(self, size: int):
        self._levels = []  # from the leaves up; each padded to whole rows of children
        while True:
            rows = -(-size // WIDTH)
            self._levels.append(np.zeros((rows, WIDTH)))
            if rows == 1:
                break
            size = rows
        self.leaves = self._levels[0].reshape(-1)  # a view: change it by `set` alone

    @property
    def total(self) -> float:
        return float(self._levels[-1].sum())

    def set(self, index: np.ndarray, priority: np.ndarray | float) -> None:
        """Change the leaves at `index` [N]; where an index is given twice, its last priority counts."""
        self.leaves[index] = priority
        for level, above in zip(self._levels, self._levels[1:]):
            index = np.unique(index // WIDTH) if len(index) > 1 else index // WIDTH
            above.reshape(-1)[index] = level[index].sum(1)

    def find(self, mass: np.ndarray) -> np.ndarray:
        """The leaf in which each `mass` [N] falls, with 0 <= mass < total: that of a running sum over the leaves."""
        node = np.zeros(len(mass), np.int64)
        for level in reversed(self._levels):
            cumulative = level[node].cumsum(1)
            # A mass that rounding left at a node's very end belongs to its last child that has any.
            mass = np.minimum(mass, np.nextafter(cumulative[:, -1], 0))
            child = (cumulative <= mass[:, None]).sum(1)
            before = np.where(child > 0, cumulative[np.arange(len(node)), child - 1], 0.0)
            mass, node = mass - before, node * WIDTH + child
        return node

    def sample(self, num: int, rng: np.random.Generator) -> np.ndarray:
        """`num` leaves in proportion to their priorities, one from each of `num` equal parts of the total."""
        return self.find((np.arange(num) + rng.random(num)) * (self.total / num))
