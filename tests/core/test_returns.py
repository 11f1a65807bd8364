"""Returns and advantages against tables worked by hand, a brute-force double loop and torchrl."""

import pytest
import torch
from torch import Tensor

from lit_rl.returns import gae, running_return

F, T = False, True


def row(*values: float) -> Tensor:
    return torch.tensor([values], dtype=torch.float64)


def flags(*values: bool) -> Tensor:
    return torch.tensor([values])


# gamma = lambda = 1/2, so delta_t = r_t + next_value_t / 2 - value_t and A_t = delta_t + A_{t+1} / 4.
# rewards 1, 2, 4; values 1, 2, 3; the critic's next values are those of the next row, 8 after the last, and 6 for the
# final observation of an episode that ends in row 1.
GAE_TABLE = {
    # delta = 1 + 1 - 1 = 1, 2 + 1.5 - 2 = 1.5, 4 + 4 - 3 = 5;  A = 1 + 2.75/4, 1.5 + 5/4, 5
    "cut at the fragment's end": ([2.0, 3.0, 8.0], [F, F, F], [F, F, F], [1.6875, 2.75, 5.0]),
    # delta_1 = 2 + 0 - 2 = 0 whatever the critic says of the final observation;  A = 1 + 0/4, 0, 5
    "termination in the middle": ([2.0, 6.0, 8.0], [F, T, F], [F, F, F], [1.0, 0.0, 5.0]),
    # delta_1 = 2 + 6/2 - 2 = 3, and A_1 takes nothing from the next episode's A_2;  A = 1 + 3/4, 3, 5
    "truncation in the middle": ([2.0, 6.0, 8.0], [F, F, F], [F, T, F], [1.75, 3.0, 5.0]),
    # delta_2 = 4 + 0 - 3 = 1;  A = 1 + 3/4, 3, 1
    "truncation, then termination at the end": ([2.0, 6.0, 8.0], [F, F, T], [F, T, F], [1.75, 3.0, 1.0]),
    # An episode that ends both ways at once has terminated: as "termination in the middle".
    "both in one row": ([2.0, 6.0, 8.0], [F, T, F], [F, T, F], [1.0, 0.0, 5.0]),
    # A time limit in the last row is bootstrapped as any other cut.
    "truncation at the end": ([2.0, 3.0, 8.0], [F, F, F], [F, F, T], [1.6875, 2.75, 5.0]),
}


@pytest.mark.parametrize(("next_value", "terminated", "truncated", "expected"), GAE_TABLE.values(), ids=GAE_TABLE)
def test_gae_equals_the_table_worked_by_hand(
    next_value: list[float], terminated: list[bool], truncated: list[bool], expected: list[float]
) -> None:
    value, done = row(1, 2, 3), flags(*terminated) | flags(*truncated)
    advantage, target = gae(row(1, 2, 4), flags(*terminated), done, value, row(*next_value), gamma=0.5, lambda_=0.5)
    torch.testing.assert_close(advantage, row(*expected))
    torch.testing.assert_close(target, row(*expected) + value)


@pytest.mark.parametrize(
    ("terminated", "done", "expected"),
    [(F, F, 3 + 4 / 2 - 1), (F, T, 3 + 4 / 2 - 1), (T, T, 3 - 1)],
    ids=["running", "truncated", "terminated"],
)
def test_gae_of_a_fragment_of_length_one(terminated: bool, done: bool, expected: float) -> None:
    advantage, _ = gae(row(3), flags(terminated), flags(done), row(1), row(4), gamma=0.5, lambda_=0.9)
    torch.testing.assert_close(advantage, row(expected))


@pytest.mark.parametrize(
    ("lambda_", "expected"),
    # delta = 1, 1.5, 5 as above. lambda 0: the deltas themselves. lambda 1: discounted by gamma = 1/2 alone,
    # A_1 = 1.5 + 5/2 = 4, A_0 = 1 + 4/2 = 3: the Monte-Carlo return 1 + 2/2 + 4/4 + 8/8 = 4, less V = 1.
    [(0.0, [1.0, 1.5, 5.0]), (1.0, [3.0, 4.0, 5.0])],
)
def test_gae_is_one_step_at_lambda_0_and_monte_carlo_at_1(lambda_: float, expected: list[float]) -> None:
    false = flags(F, F, F)
    advantage, _ = gae(row(1, 2, 4), false, false, row(1, 2, 3), row(2, 3, 8), gamma=0.5, lambda_=lambda_)
    torch.testing.assert_close(advantage, row(*expected))


def random_fragment(seed: int, batch: int = 5, length: int = 12) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    reward, value, next_value = torch.randn(3, batch, length, dtype=torch.float64, generator=generator)
    terminated, truncated = torch.rand(2, batch, length, generator=generator) < 0.2
    return {
        "reward": reward,
        "terminated": terminated,
        "done": terminated | truncated,
        "value": value,
        "next_value": next_value,
    }


@pytest.mark.parametrize("seed", range(3))
def test_gae_equals_the_sum_of_its_definition(seed: int) -> None:
    gamma, lambda_, x = 31 / 32, 7 / 8, random_fragment(seed)  # exact in float32: masks make factors of that type
    expected = torch.zeros_like(x["reward"])
    batch, length = expected.shape
    for b in range(batch):
        for t in range(length):
            for k in range(t, length):  # A_t = sum over k of (gamma lambda)^(k - t) delta_k, up to the episode's end
                bootstrap = 0.0 if x["terminated"][b, k] else gamma * x["next_value"][b, k]
                delta = x["reward"][b, k] + bootstrap - x["value"][b, k]
                expected[b, t] += (gamma * lambda_) ** (k - t) * delta
                if x["done"][b, k]:
                    break
    advantage, target = gae(**x, gamma=gamma, lambda_=lambda_)
    torch.testing.assert_close(advantage, expected)
    torch.testing.assert_close(target, expected + x["value"])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("gamma", "lambda_"), [(0.99, 0.95), (1.0, 1.0), (0.9, 0.0)])
def test_gae_equals_torchrl(seed: int, gamma: float, lambda_: float) -> None:
    from torchrl.objectives.value.functional import generalized_advantage_estimate

    x = random_fragment(seed)
    names = ("value", "next_value", "reward", "done", "terminated")
    advantage, target = generalized_advantage_estimate(gamma, lambda_, *(x[name].unsqueeze(-1) for name in names))
    ours = gae(**x, gamma=gamma, lambda_=lambda_)
    torch.testing.assert_close(ours, (advantage.squeeze(-1), target.squeeze(-1)))


def test_gae_of_real_rows_does_not_see_a_reset_row() -> None:
    """NEXT_STEP: the row after an episode's end is no transition; what it and the critic hold there is rubbish."""
    done = flags(F, T, F, F, F)
    reward, value, next_value = row(1, 2, 99, 3, 4), row(1, 2, 77, 3, 4), row(2, 6, 88, 4, 8)
    kept = torch.tensor([0, 1, 3, 4])
    for terminated in (done, flags(F, F, F, F, F)):
        fragment = (reward, terminated, done, value, next_value)
        with_reset, _ = gae(*fragment, gamma=0.9, lambda_=0.8)
        without, _ = gae(*(x[:, kept] for x in fragment), gamma=0.9, lambda_=0.8)
        torch.testing.assert_close(with_reset[:, kept], without)


def test_running_return_equals_the_table_worked_by_hand() -> None:
    # gamma = 1/2. R_0 = 1 + 8; R_1 = 2 + 9/2 = 6.5 ends the episode; R_2 = 4; carried on: 4/2.
    sums, carry = running_return(row(1, 2, 4), flags(F, T, F), gamma=0.5, initial=torch.tensor([8.0]).double())
    torch.testing.assert_close(sums, row(9, 6.5, 4))
    torch.testing.assert_close(carry, torch.tensor([2.0]).double())


@pytest.mark.parametrize("cut", [1, 5, 11])
def test_running_return_goes_on_where_the_last_rollout_stopped(cut: int) -> None:
    x = random_fragment(0)
    reward, done, zero = x["reward"], x["done"], torch.zeros(5, dtype=torch.float64)
    whole, last = running_return(reward, done, gamma=0.9, initial=zero)
    first, carry = running_return(reward[:, :cut], done[:, :cut], gamma=0.9, initial=zero)
    second, carry = running_return(reward[:, cut:], done[:, cut:], gamma=0.9, initial=carry)
    torch.testing.assert_close(torch.cat([first, second], 1), whole)
    torch.testing.assert_close(carry, last)


def test_running_return_of_real_rows_does_not_see_a_reset_row() -> None:
    done, reward = flags(F, T, F, F, F), row(1, 2, 0, 3, 4)  # env runners record a reset row's reward as 0
    kept, zero = torch.tensor([0, 1, 3, 4]), torch.zeros(1, dtype=torch.float64)
    with_reset, carry = running_return(reward, done, gamma=0.9, initial=zero)
    without, carry_without = running_return(reward[:, kept], done[:, kept], gamma=0.9, initial=zero)
    torch.testing.assert_close(with_reset[:, kept], without)
    torch.testing.assert_close(carry, carry_without)
