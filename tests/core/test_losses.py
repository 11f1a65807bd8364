"""Losses against tables worked by hand and against their textbook forms."""

import pytest
import torch
from torch import Tensor

from lit_rl.losses import (
    approximate_kl,
    categorical_td_loss,
    ppo_clip,
    project,
    quantile_huber_loss,
    td_loss,
    value_loss,
)


def naive_ppo_clip(log_ratio: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """Eq. 7 as it is printed."""
    ratio = log_ratio.exp()
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),  # gradient by log r: -r A where it flows, since d r / d log r = r
    [
        (0.5, 2.0, -1.0, -1.0),  # a good action became rarer: pulled back, not clipped
        (1.1, 2.0, -2.2, -2.2),  # inside
        (1.5, 2.0, -2.4, 0.0),  # a good action is likely enough: 1.2 * 2
        (0.5, -2.0, 1.6, 0.0),  # a bad action is rare enough: 0.8 * 2
        (0.9, -2.0, 1.8, 1.8),  # inside
        (1.5, -2.0, 3.0, 3.0),  # a bad action became likelier: pulled back, not clipped
        (0.5, 0.0, 0.0, 0.0),
        (1.5, 0.0, 0.0, 0.0),
    ],
)
def test_ppo_clip_stops_the_gradient_only_on_the_side_that_helped(
    ratio: float, advantage: float, loss: float, gradient: float
) -> None:
    log_ratio = torch.tensor([ratio], dtype=torch.float64).log().requires_grad_()
    found = ppo_clip(log_ratio, torch.tensor([advantage], dtype=torch.float64), clip=0.2)
    found.sum().backward()
    torch.testing.assert_close([found.item(), log_ratio.grad.item()], [loss, gradient])


@pytest.mark.parametrize("clip", [0.1, 0.3, 1.5])
def test_ppo_clip_equals_the_printed_formula_and_its_gradient(clip: float) -> None:
    generator = torch.Generator().manual_seed(0)
    advantage = torch.randn(1000, generator=generator)
    advantage[::10] = 0.0
    log_ratio = torch.randn(1000, generator=generator) * 0.5
    results = []
    for function in (ppo_clip, naive_ppo_clip):
        x = log_ratio.clone().requires_grad_()
        loss = function(x, advantage, clip)
        results.append((loss.detach(), *torch.autograd.grad(loss.sum(), x)))
    torch.testing.assert_close(*results)
    assert ((log_ratio.exp() - 1).abs() > clip).any()  # some rows are clipped


def test_ppo_clip_keeps_the_shape_of_its_rows() -> None:
    assert ppo_clip(torch.zeros(3, 4), torch.ones(3, 4), 0.2).shape == (3, 4)


def test_value_loss_is_half_the_squared_error() -> None:
    value = torch.tensor([1.0, 4.0, 2.0], requires_grad=True)
    loss = value_loss(value, torch.tensor([3.0, 1.0, 2.0]))
    loss.sum().backward()
    torch.testing.assert_close(loss.detach(), torch.tensor([2.0, 4.5, 0.0]))
    torch.testing.assert_close(value.grad, torch.tensor([-2.0, 3.0, 0.0]))


def test_approximate_kl_is_the_exact_kl_in_expectation() -> None:
    logits = torch.randn(2, 20, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    log_mu, log_pi = torch.log_softmax(logits, -1)
    expectation = (log_mu.exp() * approximate_kl(log_pi - log_mu)).sum(-1)
    mu, pi = (torch.distributions.Categorical(logits=x) for x in (log_mu, log_pi))
    torch.testing.assert_close(expectation, torch.distributions.kl_divergence(mu, pi))


def test_approximate_kl_is_never_negative_and_zero_for_equal_policies() -> None:
    log_ratio = torch.cat([torch.linspace(-1e-3, 1e-3, 20_001), torch.linspace(-8, 8, 20_001)])
    kl = approximate_kl(log_ratio)
    assert (kl >= 0).all()
    assert (kl[log_ratio == 0] == 0).all()
    assert (kl[log_ratio.abs() > 1e-2] > 0).all()


def test_huber_is_quadratic_within_one_and_linear_outside() -> None:
    value = torch.tensor([0.0, 0.0, 0.0, 0.0], requires_grad=True)
    loss = td_loss(value, torch.tensor([0.5, -0.5, 3.0, -3.0]), "huber")
    loss.sum().backward()
    torch.testing.assert_close(loss, torch.tensor([0.125, 0.125, 2.5, 2.5]))
    torch.testing.assert_close(value.grad, torch.tensor([-0.5, 0.5, -1.0, 1.0]))
    torch.testing.assert_close(td_loss(value, torch.tensor([0.5, -0.5, 3.0, -3.0]), "mse")[2], torch.tensor(4.5))


# Support 0, 1, 2, 3; by hand.
@pytest.mark.parametrize(
    ("probability", "reward", "discount", "expected"),
    [
        ([0.0, 1.0, 0.0, 0.0], 0.0, 1.0, [0.0, 1.0, 0.0, 0.0]),  # nothing changes
        ([0.0, 1.0, 0.0, 0.0], 0.25, 1.0, [0.0, 0.75, 0.25, 0.0]),  # between two atoms
        ([0.0, 0.0, 0.0, 1.0], 0.0, 0.5, [0.0, 0.5, 0.5, 0.0]),  # 3 moves to 1.5
        ([0.5, 0.0, 0.0, 0.5], 1.0, 0.9, [0.0, 0.5, 0.0, 0.5]),  # 0 moves to 1; 3 to 3.7, clipped to 3
        ([0.25, 0.25, 0.25, 0.25], 2.0, 0.0, [0.0, 0.0, 1.0, 0.0]),  # terminated: the reward alone
        ([0.25, 0.25, 0.25, 0.25], -5.0, 1.0, [1.0, 0.0, 0.0, 0.0]),  # all below the support
    ],
)
def test_projection_onto_the_support(probability: list, reward: float, discount: float, expected: list) -> None:
    support = torch.arange(4.0)
    found = project(torch.tensor([probability]), support, torch.tensor([reward]), torch.tensor([discount]))
    torch.testing.assert_close(found, torch.tensor([expected]))


def test_projection_keeps_mass_and_mean_and_agrees_with_the_printed_algorithm() -> None:
    generator = torch.Generator().manual_seed(0)
    support = torch.linspace(-10, 10, 51)
    probability = torch.randn(64, 51, generator=generator).softmax(-1)
    reward, discount = torch.randn(64, generator=generator), torch.rand(64, generator=generator)
    found = project(probability, support, reward, discount)
    torch.testing.assert_close(found.sum(-1), torch.ones(64))
    moved = reward[:, None] + discount[:, None] * support
    inside = ((moved >= -10) & (moved <= 10)).all(1)
    torch.testing.assert_close(
        (found @ support)[inside], (reward + discount * (probability @ support))[inside], atol=1e-4, rtol=1e-4
    )
    # Algorithm 1 of Bellemare et al. 2017, as it is printed, atom by atom.
    expected = torch.zeros(64, 51)
    for row in range(64):
        for j in range(51):
            b = float((moved[row, j].clamp(-10, 10) + 10) / 0.4)
            low, high = int(b), min(int(b) + 1, 50)
            expected[row, low] += probability[row, j] * (1 - (b - low) if high > low else 1)
            if high > low:
                expected[row, high] += probability[row, j] * (b - low)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)


def test_the_categorical_loss_is_least_where_the_distributions_agree() -> None:
    target = torch.tensor([[0.2, 0.5, 0.3]])
    logits = target.log().requires_grad_()
    loss = categorical_td_loss(logits, target)
    loss.sum().backward()
    torch.testing.assert_close(loss, torch.special.entr(target).sum(-1))
    torch.testing.assert_close(logits.grad, torch.zeros(1, 3), atol=1e-6, rtol=0.0)


def test_quantile_loss_by_hand() -> None:
    # Two quantiles (tau 0.25, 0.75) at 0 and 1, two targets at 0.5 and 3.
    quantiles = torch.tensor([[0.0, 1.0]], requires_grad=True)
    loss = quantile_huber_loss(quantiles, torch.tensor([[0.5, 3.0]]))
    # i=0: u = 0.5, 3: 0.25 * (0.125 + 2.5) / 2; i=1: u = -0.5, 2: (0.25 * 0.125 + 0.75 * 1.5) / 2
    torch.testing.assert_close(loss, torch.tensor([0.25 * 2.625 / 2 + (0.25 * 0.125 + 0.75 * 1.5) / 2]))


def test_quantile_regression_finds_the_quantiles() -> None:
    target = torch.randn(1, 4000, generator=torch.Generator().manual_seed(0)) * 20
    quantiles = torch.zeros(1, 5, requires_grad=True)
    optimizer = torch.optim.Adam([quantiles], lr=0.5)
    for _ in range(600):
        optimizer.zero_grad()
        quantile_huber_loss(quantiles, target).sum().backward()
        optimizer.step()
    expected = torch.quantile(target, torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9]))
    torch.testing.assert_close(quantiles.detach()[0], expected, atol=1.0, rtol=0.0)
