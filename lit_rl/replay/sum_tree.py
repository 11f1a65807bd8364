"""Sampling in proportion to priorities that change."""

import numpy as np

WIDTH = 32  # children of a node: a row of them is one vectorised operation
TOP = 2048  # so many nodes are searched by a running sum over all of them


class SumTree:
    """`size` priorities, of which to draw in proportion: O(log size) for a draw and for a change, many at a time.

    Every node is the sum of its `WIDTH` children, always added up anew, so that rounding does not accumulate.

    Args:
        size: number of leaves; all begin at 0.
    """

    def __init__(self, size: int):
        rows = -(-size // WIDTH)
        self._levels = [np.zeros((rows, WIDTH))]  # from the leaves up; each in rows of children
        while rows * WIDTH > TOP:
            rows = -(-rows // WIDTH)
            self._levels.append(np.zeros((rows, WIDTH)))
        self.leaves = self._levels[0].reshape(-1)  # a view: change it by `set` alone

    @property
    def total(self) -> float:
        return float(self._levels[-1].sum())

    def set(self, index: np.ndarray, priority: np.ndarray | float) -> None:
        """Change the leaves at `index` [N]; where an index is given twice, its last priority counts."""
        self.leaves[index] = priority
        for level, above in zip(self._levels, self._levels[1:]):
            index = index // WIDTH
            above.reshape(-1)[index] = level[index].sum(1)

    def find(self, mass: np.ndarray) -> np.ndarray:
        """The leaf in which each `mass` [N] falls, with 0 <= mass < total: that of a running sum over the leaves."""
        running = self._levels[-1].reshape(-1).cumsum()
        # A mass that rounding left at the very end belongs to the last node that has any; so too below.
        mass = np.minimum(mass, np.nextafter(running[-1], 0))
        node = running.searchsorted(mass, side="right")
        mass = mass - np.where(node > 0, running[node - 1], 0.0)
        row = np.arange(len(mass))
        for level in reversed(self._levels[:-1]):
            children = level[node].cumsum(1)
            mass = np.minimum(mass, np.nextafter(children[:, -1], 0))
            child = (children <= mass[:, None]).sum(1)
            mass = mass - np.where(child > 0, children[row, child - 1], 0.0)
            node = node * WIDTH + child
        return node

    def sample(self, num: int, rng: np.random.Generator) -> np.ndarray:
        """`num` leaves in proportion to their priorities, one from each of `num` equal parts of the total."""
        return self.find((np.arange(num) + rng.random(num)) * (self.total / num))
