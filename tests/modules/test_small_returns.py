"""The explained variance says the same of returns in any unit, and nothing of returns that do not differ."""

import pytest
import torch

from lit_rl.modules.ppo import explained_variance

TARGET = torch.tensor([1.0, 2.0, 4.0, 5.0])  # mean 3, variance 2.5
VALUE = torch.tensor([1.0, 3.0, 3.0, 5.0])  # errors 0, -1, 1, 0: variance 0.5


@pytest.mark.parametrize("unit", [1e-9, 1e-5, 1.0, 1e9])
def test_explained_variance_does_not_depend_on_the_unit_of_the_returns(unit: float) -> None:
    assert float(explained_variance(VALUE * unit, TARGET * unit)) == pytest.approx(0.8, abs=1e-5)
    assert float(explained_variance(0 * VALUE, TARGET * unit)) == pytest.approx(0.0, abs=1e-5)
    assert float(explained_variance(TARGET * unit, TARGET * unit)) == 1


@pytest.mark.parametrize("constant", [0.0, 1e-5, 1.0, 100.1, -1e6])
def test_explained_variance_is_zero_where_the_targets_are_one_number_to_rounding(constant: float) -> None:
    torch.manual_seed(0)
    target = torch.full((1000,), constant)
    noise = 0.1 * torch.randn(1000)
    assert explained_variance(target + noise, target) == 0
    assert explained_variance(target + noise, target * (1 + 1e-7 * torch.randn(1000))) == 0


def test_explained_variance_of_returns_that_differ_little_is_a_number_still() -> None:
    target = 100 + 1e-3 * TARGET
    assert float(explained_variance(100 + 1e-3 * VALUE, target)) == pytest.approx(0.8, abs=0.02)


def test_explained_variance_of_no_rows_is_zero() -> None:
    assert explained_variance(VALUE, TARGET, torch.zeros(4, dtype=torch.bool)) == 0
