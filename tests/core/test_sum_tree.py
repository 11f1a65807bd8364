"""The sum tree against plain cumulative sums."""

import numpy as np
import pytest

from lit_rl.replay.sum_tree import TOP, WIDTH, SumTree


@pytest.mark.parametrize("size", [1, 5, WIDTH, WIDTH + 1, TOP, TOP + 1, 40 * TOP + 7])
def test_find_is_a_search_in_the_running_sum(size: int) -> None:
    rng = np.random.default_rng(0)
    tree, priority = SumTree(size), np.zeros(size)
    for _ in range(5):
        index = rng.integers(size, size=40)
        values = rng.random(40) * 10.0 ** rng.integers(-3, 4, 40)
        values[::5] = 0.0
        for i, value in zip(index, values):
            priority[i] = value
        tree.set(index, values)
        cumulative = priority.cumsum()
        assert tree.total == pytest.approx(cumulative[-1])
        mass = rng.random(200) * cumulative[-1] * (1 - 1e-9)
        assert (tree.find(mass) == np.searchsorted(cumulative, mass, side="right")).all()


def test_a_leaf_without_priority_is_never_drawn() -> None:
    tree = SumTree(1000)
    index = np.arange(0, 1000, 7)
    tree.set(index, 0.3)
    drawn = tree.sample(20_000, np.random.default_rng(0))
    assert set(drawn.tolist()) == set(index.tolist())
    assert (tree.find(np.array([tree.total])) == index[-1]).all()  # rounding at the very end


def test_draws_are_stratified() -> None:
    tree = SumTree(10)
    tree.set(np.arange(10), 1.0)
    assert tree.sample(10, np.random.default_rng(0)).tolist() == list(range(10))
