"""Losses against tables worked by hand and against their textbook forms."""

import pytest
import torch
from torch import Tensor

from lit_rl.losses import approximate_kl, ppo_clip, value_loss


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
