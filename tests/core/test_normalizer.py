"""Running statistics against numpy on all rows at once, and against a plain per-step return normaliser."""

import math

import numpy as np
import pytest
import torch
from helpers import assert_same

from lit_rl.normalizer import CLIP, EPSILON, ReturnNormalizer, RunningMoments
from lit_rl.spec import EnvSpec


@pytest.mark.parametrize("shape", [(), (3,), (2, 4)])
@pytest.mark.parametrize(
    ("mean", "std", "tolerance"), [(0.0, 1.0, 1e-6), (1e4, 0.1, 1e-3), (-1e4, 1.0, 1e-4), (0.0, 1e-3, 1e-6)]
)
def test_moments_of_batches_equal_numpy_on_all_rows(
    shape: tuple[int, ...], mean: float, std: float, tolerance: float
) -> None:
    rng, moments = np.random.default_rng(0), RunningMoments(shape)
    batches = [rng.normal(mean, std, (*rows, *shape)).astype(np.float32) for rows in [(7, 5), (1, 1), (64, 3), (2, 2)]]
    for batch in batches:
        moments.update(torch.as_tensor(batch))
    rows = np.concatenate([batch.reshape(-1, *shape) for batch in batches]).astype(np.float64)
    assert int(moments.count) == len(rows)
    np.testing.assert_allclose(moments.mean, rows.mean(0), rtol=1e-6, atol=1e-6 + std * 0.01)
    np.testing.assert_allclose(moments.var, rows.var(0), rtol=tolerance)


def test_moments_of_masked_batches_see_real_rows_alone() -> None:
    rng, moments, real = np.random.default_rng(0), RunningMoments((3,)), []
    for _ in range(4):
        batch, mask = rng.normal(2.0, 3.0, (6, 5, 3)).astype(np.float32), rng.random((6, 5)) < 0.7
        batch[~mask] = np.nan  # rubbish, wherever it lies
        moments.update(torch.as_tensor(batch), torch.as_tensor(mask))
        real.append(batch[mask])
    rows = np.concatenate(real)
    assert int(moments.count) == len(rows) < 4 * 30
    np.testing.assert_allclose(moments.mean, rows.mean(0), rtol=1e-5)
    np.testing.assert_allclose(moments.var, rows.var(0), rtol=1e-5)


def test_moments_without_a_real_row_stay_as_they_were() -> None:
    moments = RunningMoments((2,))
    moments.update(torch.randn(8, 2))
    before = {name: tensor.clone() for name, tensor in moments.state_dict().items()}
    moments.update(torch.randn(8, 2), torch.zeros(8, dtype=torch.bool))
    assert_same(moments.state_dict(), before)


def test_moments_travel_in_the_state_dict() -> None:
    moments, other = RunningMoments((2,)), RunningMoments((2,))
    moments.update(torch.randn(8, 2))
    other.load_state_dict(moments.state_dict())
    batch = torch.randn(8, 2)
    moments.update(batch)
    other.update(batch)
    assert_same(other.state_dict(), moments.state_dict())


def rollouts(num: int, batch: int = 4, length: int = 25, seed: int = 0) -> list[tuple[np.ndarray, np.ndarray]]:
    """Rewards and done flags [B, T] of `num` rollouts in a row."""
    rng = np.random.default_rng(seed)
    return [
        (rng.normal(1.0, 5.0, (batch, length)).astype(np.float32), rng.random((batch, length)) < 0.1)
        for _ in range(num)
    ]


def test_scaled_rewards_equal_a_plain_step_by_step_form() -> None:
    """VecNormalize's arithmetic, except that a rollout's rewards share the statistics at its end."""
    gamma, normalizer = 0.9, ReturnNormalizer(0.9)
    discounted, seen = np.zeros(4), []
    for reward, done in rollouts(5):
        for t in range(reward.shape[1]):
            discounted = gamma * discounted + reward[:, t]
            seen.append(discounted.copy())
            discounted[done[:, t]] = 0.0
        expected = np.clip(reward / math.sqrt(np.var(seen) + EPSILON), -CLIP, CLIP)
        scaled = normalizer.scale(torch.as_tensor(reward), torch.as_tensor(done))
        np.testing.assert_allclose(scaled, expected, rtol=1e-4)


def test_scaled_rewards_of_real_rows_do_not_see_a_reset_row() -> None:
    with_reset, without = ReturnNormalizer(0.9), ReturnNormalizer(0.9)
    done = torch.tensor([[False, True, False, False, False]])
    mask, kept = torch.tensor([[True, True, False, True, True]]), torch.tensor([0, 1, 3, 4])
    for seed in range(3):
        reward = torch.randn(1, 5, generator=torch.Generator().manual_seed(seed)) * 3
        reward[~mask] = 0.0  # as env runners record it
        scaled = with_reset.scale(reward, done, mask)[:, kept]
        torch.testing.assert_close(scaled, without.scale(reward[:, kept], done[:, kept]))
    assert int(with_reset.count) == int(without.count) == 12


def test_normalisers_with_one_statistic_scale_by_the_rewards_of_both_and_go_on_with_their_own_returns() -> None:
    first, done = ReturnNormalizer(0.5), torch.zeros(1, 2, dtype=torch.bool)
    second = first.shared()
    first.scale(torch.tensor([[2.0, 4.0]]), done)  # returns 2 and 5
    scaled = second.scale(torch.tensor([[6.0, 0.0]]), done)  # 6 and 3
    torch.testing.assert_close(scaled, torch.tensor([[6.0, 0.0]]) / np.std([2, 5, 6, 3]))
    assert first.running_return / second.running_return == 5 / 3
    moved = torch.nn.ModuleList([first, second]).double()
    assert moved[0].var is moved[1].var and moved[0].var.dtype == torch.float64
    moved[1].load_state_dict(ReturnNormalizer(0.5).state_dict())
    assert first.count == 0


def test_scaled_rewards_keep_their_sign_and_are_clipped() -> None:
    normalizer = ReturnNormalizer(0.0)  # the running return is the reward itself
    reward = torch.cat([torch.zeros(1, 9999), torch.full((1, 1), -1000.0)], 1)
    scaled = normalizer.scale(reward, torch.zeros(1, 10000, dtype=torch.bool))
    assert (scaled.min().item(), scaled.max().item()) == (-CLIP, 0.0)


@pytest.mark.parametrize("method", ["act", "sample", "evaluate"])
def test_a_policys_statistics_are_frozen_while_it_acts(method: str) -> None:
    from gymnasium import spaces

    from lit_rl.policy import Policy

    policy = Policy(EnvSpec("e", spaces.Box(-9, 9, (3,)), spaces.Discrete(2)), normalize_observations=True)
    policy.update_normalizer(torch.randn(50, 3) * 2 + 1)
    before = {name: tensor.clone() for name, tensor in policy.normalizer.state_dict().items()}
    obs = np.full((8, 3), 7.0, np.float32)
    if method == "evaluate":
        policy.evaluate({"observation": torch.as_tensor(obs), "action": torch.zeros(8, dtype=torch.int64)})
    else:
        getattr(policy, method)(obs)
    assert_same(policy.normalizer.state_dict(), before)
