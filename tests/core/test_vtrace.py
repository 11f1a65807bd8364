"""V-trace against a table worked by hand, a brute-force sum, torchrl, and what Theorem 1 of its paper says."""

import math

import pytest
import torch
from torch import Tensor

from lit_rl.returns import vtrace

F, T = False, True


def row(*values: float) -> Tensor:
    return torch.tensor([values], dtype=torch.float64)


def flags(*values: bool) -> Tensor:
    return torch.tensor([values])


# gamma = 1/2, ratios 2, 1/2, 1 (so 1, 1/2, 1 with all bounds at 1); rewards 1, 2, 4; values 1, 2, 3; the critic's next
# values are those of the next row, 8 after the last, and 6 for the final observation of an episode that ends in row 1.
# delta_t = rho_t (r_t + next_t / 2 - V_t),  v_t = V_t + delta_t + rho_t / 2 (v_{t+1} - V_{t+1}),
# A_t = rho_t (r_t + v_{t+1} / 2 - V_t).
TABLE = {
    # delta = 1 + 1 - 1 = 1, (2 + 1.5 - 2) / 2 = 0.75, 4 + 4 - 3 = 5.  v_2 = 8, v_1 = 2 + 0.75 + 5/4 = 4,
    # v_0 = 1 + 1 + (4 - 2) / 2 = 3.  A = 1 + 4/2 - 1 = 2, (2 + 8/2 - 2) / 2 = 2, 4 + 8/2 - 3 = 5.
    "cut at the end": ([2.0, 3.0, 8.0], [F, F, F], [F, F, F], [3.0, 4.0, 8.0], [2.0, 2.0, 5.0]),
    # Row 1 ends for good: delta_1 = (2 - 2) / 2 = 0, v_1 = 2, v_0 = 1 + 1 + 0 = 2.
    # A = 1 + 2/2 - 1 = 1, (2 + 0 - 2) / 2 = 0, 5.
    "terminated in the middle": ([2.0, 6.0, 8.0], [F, T, F], [F, F, F], [2.0, 2.0, 8.0], [1.0, 0.0, 5.0]),
    # Row 1 is cut: delta_1 = (2 + 6/2 - 2) / 2 = 1.5, v_1 = 3.5, v_0 = 2 + (3.5 - 2) / 2 = 2.75.
    # A = 1 + 3.5/2 - 1 = 1.75, (2 + 6/2 - 2) / 2 = 1.5 by the value of the final observation, 5.
    "truncated in the middle": ([2.0, 6.0, 8.0], [F, F, F], [F, T, F], [2.75, 3.5, 8.0], [1.75, 1.5, 5.0]),
    # Row 2 ends for good: delta_2 = 4 - 3 = 1, v_2 = 4, v_1 = 3.5 + 1/4 - ... of another episode: 3.5.
    # A_2 = 4 - 3 = 1.
    "truncated, then terminated": ([2.0, 6.0, 8.0], [F, F, T], [F, T, F], [2.75, 3.5, 4.0], [1.75, 1.5, 1.0]),
}
LOG_RATIO = row(2.0, 0.5, 1.0).log()


@pytest.mark.parametrize(("next_value", "terminated", "truncated", "target", "advantage"), TABLE.values(), ids=TABLE)
def test_vtrace_equals_the_table_worked_by_hand(
    next_value: list[float], terminated: list[bool], truncated: list[bool], target: list[float], advantage: list[float]
) -> None:
    done = flags(*terminated) | flags(*truncated)
    found = vtrace(
        LOG_RATIO, row(1, 2, 4), flags(*terminated), done, row(1, 2, 3), row(*next_value), gamma=0.5
    )  # fmt: skip
    torch.testing.assert_close(found, (row(*advantage), row(*target)))


def random_fragment(seed: int, batch: int = 5, length: int = 12) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    log_ratio, reward, value = torch.randn(3, batch, length, dtype=torch.float64, generator=generator)
    last = torch.randn(batch, dtype=torch.float64, generator=generator)
    terminated, truncated = torch.rand(2, batch, length, generator=generator) < 0.2
    final = torch.randn(batch, length, dtype=torch.float64, generator=generator)
    done = terminated | truncated
    next_value = torch.where(done, final, torch.cat([value[:, 1:], last[:, None]], 1))
    return {
        "log_ratio": log_ratio,
        "reward": reward,
        "terminated": terminated,
        "done": done,
        "value": value,
        "next_value": next_value,
    }


def brute_force(
    batch: dict[str, Tensor], *, gamma: float, lambda_: float, rho_clip: float, c_clip: float, policy_rho_clip: float
) -> tuple[Tensor, Tensor]:
    """The paper's eq. 1 as it stands: for each s the sum over t of gamma^(t-s) (prod c_i) delta_t."""
    ratio = batch["log_ratio"].exp()
    num_envs, num_steps = ratio.shape
    target, advantage = torch.zeros_like(ratio), torch.zeros_like(ratio)

    def next_value(b: int, t: int) -> float:
        return 0.0 if batch["terminated"][b, t] else float(batch["next_value"][b, t])

    for b in range(num_envs):
        for s in range(num_steps):
            total, weight = float(batch["value"][b, s]), 1.0
            for t in range(s, num_steps):
                error = float(batch["reward"][b, t]) + gamma * next_value(b, t) - float(batch["value"][b, t])
                total += weight * min(rho_clip, float(ratio[b, t])) * error
                if batch["done"][b, t]:
                    break
                weight *= gamma * lambda_ * min(c_clip, float(ratio[b, t]))
            target[b, s] = total
        for s in range(num_steps):
            cut = bool(batch["done"][b, s]) or s == num_steps - 1
            following = next_value(b, s) if cut else float(target[b, s + 1])
            error = float(batch["reward"][b, s]) + gamma * following - float(batch["value"][b, s])
            advantage[b, s] = min(policy_rho_clip, float(ratio[b, s])) * error
    return advantage, target


@pytest.mark.parametrize("bounds", [(1.0, 1.0, 1.0), (2.0, 0.8, 1.5), (math.inf, math.inf, math.inf)])
@pytest.mark.parametrize("seed", range(5))
def test_vtrace_equals_a_brute_force_sum(seed: int, bounds: tuple[float, float, float]) -> None:
    options = dict(zip(("rho_clip", "c_clip", "policy_rho_clip"), bounds)) | {"gamma": 0.9, "lambda_": 0.8}
    batch = random_fragment(seed)
    found, expected = vtrace(**batch, **options), brute_force(batch, **options)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_vtrace_agrees_with_torchrl() -> None:
    functional = pytest.importorskip("torchrl.objectives.value.functional")
    batch = random_fragment(0)
    column = {name: tensor.unsqueeze(-1) for name, tensor in batch.items()}
    # torchrl documents log_pi and log_mu the wrong way round: in its code log_pi is the current policy's. At a
    # truncation it takes the next row's target, which is the next episode's: so none here.
    column["done"] = column["terminated"]
    advantage, target = functional.vtrace_advantage_estimate(
        gamma=0.9, log_pi=column["log_ratio"], log_mu=torch.zeros_like(column["log_ratio"]),
        state_value=column["value"], next_state_value=column["next_value"], reward=column["reward"],
        done=column["done"], terminated=column["terminated"], rho_thresh=1.0, c_thresh=1.0,
    )  # fmt: skip
    found = vtrace(**batch | {"done": batch["terminated"]}, gamma=0.9)
    torch.testing.assert_close(found, (advantage.squeeze(-1), target.squeeze(-1)))


def test_on_the_policys_own_data_the_target_is_the_td_target_to_the_end() -> None:
    batch = random_fragment(1) | {"log_ratio": torch.zeros(5, 12, dtype=torch.float64)}
    _, target = vtrace(**batch, gamma=0.9)
    for b in range(5):
        following = float(batch["next_value"][b, -1])
        for t in reversed(range(12)):
            if batch["done"][b, t]:
                following = float(batch["next_value"][b, t])
            following = float(batch["reward"][b, t]) + 0.9 * following * (not batch["terminated"][b, t])
            assert math.isclose(following, float(target[b, t]), abs_tol=1e-9)


def test_padding_may_hold_anything() -> None:
    batch, length = random_fragment(2), torch.tensor([12, 7, 1, 0, 3])
    padding = torch.arange(12) >= length[:, None]
    for b, n in enumerate(length.tolist()):
        if n:
            batch["next_value"][b, n - 1] = 5.0  # the value of the last observation
    filled = {name: tensor.masked_fill(padding, T if tensor.dtype is torch.bool else math.inf)
              for name, tensor in batch.items()}  # fmt: skip
    advantage, target = vtrace(**filled, gamma=0.9, length=length)
    assert not advantage[padding].any() and not target[padding].any()
    for b, n in enumerate(length.tolist()):
        if n:
            alone = vtrace(**{name: tensor[b : b + 1, :n] for name, tensor in batch.items()}, gamma=0.9)
            torch.testing.assert_close((advantage[b : b + 1, :n], target[b : b + 1, :n]), alone)


def test_the_fixed_point_is_the_value_of_the_policy_between_the_two() -> None:
    """Theorem 1: with rho_clip = 1 it is the policy proportional to min(mu, pi), neither pi nor mu."""
    generator = torch.Generator().manual_seed(0)
    states, actions, gamma = 4, 3, 0.8
    pi, mu = torch.rand(2, states, actions, dtype=torch.float64, generator=generator).pow(3).add(0.01)
    pi, mu = pi / pi.sum(-1, keepdim=True), mu / mu.sum(-1, keepdim=True)
    moves = torch.rand(states, actions, states, dtype=torch.float64, generator=generator).pow(3)
    moves /= moves.sum(-1, keepdim=True)
    reward = torch.randn(states, actions, dtype=torch.float64, generator=generator)
    between = torch.minimum(mu, pi)
    between /= between.sum(-1, keepdim=True)

    def value_of(policy: Tensor) -> Tensor:
        step = torch.einsum("sa,sat->st", policy, moves)
        return torch.linalg.solve(torch.eye(states, dtype=torch.float64) - gamma * step, (policy * reward).sum(-1))

    # The expectation of one-step targets over all (s, a, s'), each weighed by how probable mu makes it.
    s, a, t = (
        index.flatten() for index in torch.meshgrid(*map(torch.arange, (states, actions, states)), indexing="ij")
    )
    false = torch.zeros(len(s), 1, dtype=torch.bool)
    value = torch.zeros(states, dtype=torch.float64)
    for _ in range(400):
        _, target = vtrace(
            (pi / mu).log()[s, a].unsqueeze(1), reward[s, a].unsqueeze(1), false, false, value[s].unsqueeze(1),
            value[t].unsqueeze(1), gamma=gamma,
        )  # fmt: skip
        value = torch.zeros_like(value).index_add(0, s, mu[s, a] * moves[s, a, t] * target.squeeze(1))
    torch.testing.assert_close(value, value_of(between))
    assert (value - value_of(pi)).abs().max() > 0.05 and (value - value_of(mu)).abs().max() > 0.05
