"""How good a policy is, by episodes that another one played: importance sampling and doubly robust estimates.

Pure functions of arrays [E, T]: E episodes, T steps of the longest one. After the end of an episode everything is 0.
All estimate the discounted sum of an episode's rewards, if the policy pi drew its actions, up to where the recorded
episodes end. A time limit is such an end: nothing after it is counted, here. (`fitted_q.fit` counts it.)

`log_ratio` is log pi(a|s) - log mu(a|s), where mu is the policy that played, the behaviour policy. The weight of an
episode up to step t is the product of the ratios so far: w_t = prod_{k <= t} pi(a_k|s_k) / mu(a_k|s_k).

Voloshin et al. 2021, arXiv:1911.06854, compare all of these estimators, and say which one to trust where.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

NUM_RESAMPLES = 1000
CONFIDENCE = 0.95
LEAST_EFFECTIVE = 10  # episodes: an interval that rests on fewer says nothing
MEAN_WEIGHTS = 0.5, 2.0  # between which the mean of the weights must be, whose expectation is 1


@dataclass(frozen=True)
class Estimate:
    """What an estimator says.

    Attributes:
        name: of the estimator, and of what is judged: "PDIS", "FQE (greedy)".
        value: the discounted return.
        low, high: the ends of its 95 % interval.
        effective_sample_size: how many episodes of equal weight would say as much, see `effective_sample_size`; None
            where there are no weights.
        warning: why the interval says nothing; None if nothing is wrong.
    """

    name: str
    value: float
    low: float
    high: float
    effective_sample_size: float | None = None
    warning: str | None = None


def monte_carlo(reward: np.ndarray, *, gamma: float, seed: int = 0) -> Estimate:
    """The mean discounted return of the recorded episodes: the value of the policy that played them.

    >>> monte_carlo(np.array([[1.0, 2.0]]), gamma=0.5).value
    2.0
    """
    return _estimate("data", reward @ _discounts(reward, gamma), None, None, seed)


def importance_sampling(reward: np.ndarray, log_ratio: np.ndarray, *, gamma: float, seed: int = 0) -> Estimate:
    """Each episode's return, times its weight: 1/E sum_i w_{T-1} sum_t gamma^t r_t.

    Precup et al. 2000, "Eligibility Traces for Off-Policy Policy Evaluation". Unbiased, and of a variance that grows
    exponentially with the length of episodes.

    Args:
        reward: [E, T].
        log_ratio: [E, T].
        gamma: discount per env step.
        seed: of the bootstrap.

    >>> importance_sampling(np.array([[1.0, 2.0]]), np.log([[2.0, 0.5]]), gamma=0.5).value
    2.0
    """
    log_weight = log_ratio.sum(1, keepdims=True)
    returns = (reward @ _discounts(reward, gamma))[:, None]
    return _estimate("IS", _weighed(log_weight, returns), None, _Weights(log_weight, np.ones(1)), seed)


def per_decision(reward: np.ndarray, log_ratio: np.ndarray, *, gamma: float, seed: int = 0) -> Estimate:
    """Each reward times the weight of what led to it: 1/E sum_i sum_t gamma^t w_t r_t.

    The same paper's PDIS. Unbiased, since actions say nothing of the rewards before them; of a lower
    variance than `importance_sampling`.

    Args:
        reward, log_ratio, gamma, seed: see `importance_sampling`.

    >>> per_decision(np.array([[1.0, 2.0]]), np.log([[2.0, 0.5]]), gamma=0.5).value
    3.0
    """
    log_weight, discounts = log_ratio.cumsum(1), _discounts(reward, gamma)
    return _estimate("PDIS", _weighed(log_weight, reward) @ discounts, None, _Weights(log_weight, discounts), seed)


def weighted(reward: np.ndarray, log_ratio: np.ndarray, *, gamma: float, seed: int = 0) -> Estimate:
    """`importance_sampling` with weights that sum to 1: sum_i w_{T-1} sum_t gamma^t r_t / sum_i w_{T-1}.

    The same paper's WIS. Biased towards the value of the behaviour policy, and consistent: the bias shrinks
    with the number of episodes. Never outside of the returns that were recorded.

    Args:
        reward, log_ratio, gamma, seed: see `importance_sampling`.

    >>> weighted(np.array([[1.0], [2.0]]), np.log([[3.0], [1.0]]), gamma=0.5).value
    1.25
    """
    weights = _Weights(log_ratio.sum(1, keepdims=True), np.ones(1))
    returns = (reward @ _discounts(reward, gamma))[:, None]
    return _estimate("WIS", weights.relative * returns, weights.relative, weights, seed)


def weighted_per_decision(reward: np.ndarray, log_ratio: np.ndarray, *, gamma: float, seed: int = 0) -> Estimate:
    """`per_decision` with weights that sum to 1 in every step: sum_t gamma^t sum_i w_t r_t / sum_i w_t.

    The CWPDIS of Thomas 2015, "Safe Reinforcement Learning". The sums go over all episodes, also over those that ended
    before: they keep their last weight, and give no reward.

    Args:
        reward, log_ratio, gamma, seed: see `importance_sampling`.

    >>> weighted_per_decision(np.array([[1.0, 2.0], [0.0, 0.0]]), np.log([[3.0, 1.0], [1.0, 1.0]]), gamma=1.0).value
    2.25
    """
    discounts = _discounts(reward, gamma)
    weights = _Weights(log_ratio.cumsum(1), discounts)
    return _estimate("WPDIS", weights.relative * reward * discounts, weights.relative, weights, seed)


def doubly_robust(
    reward: np.ndarray, log_ratio: np.ndarray, q: np.ndarray, value: np.ndarray, *, gamma: float, seed: int = 0
) -> Estimate:
    """The mean of X_0, where X_t = V(s_t) + pi(a_t|s_t) / mu(a_t|s_t) (r_t + gamma X_{t+1} - Q(s_t, a_t)).

    After the end X is 0.
    Eq. 10 of Jiang & Li 2016, arXiv:1511.03722. Unbiased for any Q that was not fitted to the same episodes, and V its
    mean over pi's actions. Of a low variance if Q is about the value of pi.

    Args:
        reward, log_ratio, gamma, seed: see `importance_sampling`.
        q: Q(s_t, a_t), [E, T].
        value: V(s_t), [E, T].

    >>> one = np.ones((1, 2))
    >>> doubly_robust(one, np.log(2 * one), q=0.5 * one, value=one, gamma=0.5).value
    4.0
    """
    total = np.zeros(len(reward))
    with np.errstate(over="ignore", invalid="ignore"):
        ratio = np.exp(log_ratio)
        for t in reversed(range(reward.shape[1])):
            total = value[:, t] + ratio[:, t] * (reward[:, t] + gamma * total - q[:, t])
    return _estimate("DR", total, None, _Weights(log_ratio.cumsum(1), _discounts(reward, gamma)), seed)


def effective_sample_size(log_weight: np.ndarray) -> np.ndarray:
    """(sum_i w)^2 / sum_i w^2 over episodes, of log-weights [E, T]; [T]. 0 if all weights are.

    Kong 1992: as many episodes of equal weight have the same variance. From 1 (one has all the weight) to E.

    >>> effective_sample_size(np.log([[1.0, 1.0], [1.0, 3.0]]))
    array([2. , 1.6])
    """
    weight = _relative(log_weight)
    squares = np.square(weight).sum(0)
    return np.divide(np.square(weight.sum(0)), squares, out=np.zeros_like(squares), where=squares > 0)


def warning_of(num_episodes: int, effective: float | None, mean_weight: float, value: float) -> str | None:
    """Why an estimate's interval says nothing, in a sentence; None if it does.

    Args:
        num_episodes: E.
        effective: of how many it is the sample, None for all.
        mean_weight: of the importance weights, which is 1 in expectation.
        value: what is estimated.
    """
    if not math.isfinite(value):
        return "The weights are not finite, or all are 0: the policy would have played none of the recorded episodes."
    if num_episodes < LEAST_EFFECTIVE:
        return f"There are {num_episodes} episodes: the interval says nothing of fewer than {LEAST_EFFECTIVE}."
    if effective is not None and effective < LEAST_EFFECTIVE:
        return (
            f"{effective:.1f} of {num_episodes} episodes have all the weight: the interval says nothing. The policy "
            "differs too much from the one that played, for episodes of this length."
        )
    if not MEAN_WEIGHTS[0] <= mean_weight <= MEAN_WEIGHTS[1]:
        return (
            f"The weights have the mean {mean_weight:.2g} instead of 1: the interval says nothing. The policy plays "
            "episodes that were not recorded, or the densities are not those of the recorded actions."
        )
    return None


# --------------------------------------------------------------------------------------------------------------------


class _Weights:
    """Weights of episodes by their logarithms [E, K], and how much each of the K columns counts [K]."""

    def __init__(self, log_weight: np.ndarray, importance: np.ndarray):
        share = importance / importance.sum()
        self.relative = _relative(log_weight)
        self.effective = float(effective_sample_size(log_weight) @ share)
        with np.errstate(over="ignore"):
            self.mean = float(np.exp(log_weight).mean(0) @ share)


def _relative(log_weight: np.ndarray) -> np.ndarray:
    """Weights [E, K], relative to the greatest of each column: they do not overflow."""
    greatest = log_weight.max(0)
    return np.exp(log_weight - np.where(np.isfinite(greatest), greatest, 0.0))


def _discounts(reward: np.ndarray, gamma: float) -> np.ndarray:
    return gamma ** np.arange(reward.shape[1], dtype=np.float64)


def _weighed(log_weight: np.ndarray, x: np.ndarray) -> np.ndarray:
    """x [E, K] times its weights. Where x is 0 that is 0, also if the weight is infinite."""
    with np.errstate(over="ignore", invalid="ignore"):
        return np.where(x == 0, 0.0, np.exp(log_weight) * x)


def _estimate(
    name: str, numerator: np.ndarray, denominator: np.ndarray | None, weights: _Weights | None, seed: int
) -> Estimate:
    """sum_k sum_i numerator / sum_i denominator, of arrays [E, K], with its percentile interval over episodes.

    Efron 1979. Without a denominator the sums over episodes are divided by their number.
    """
    numerator = numerator.reshape(len(numerator), -1)
    num = len(numerator)

    def ratio(counts: np.ndarray) -> np.ndarray:
        with np.errstate(all="ignore"):
            below = num if denominator is None else counts @ denominator
            return (counts @ numerator / below).sum(-1)

    value = float(ratio(np.ones((1, num)))[0])
    values = [ratio(counts) for counts in resamples(num, NUM_RESAMPLES, seed)]
    tails = (1 - CONFIDENCE) / 2
    found = np.concatenate(values)
    found = found[np.isfinite(found)]
    low, high = np.quantile(found, [tails, 1 - tails]) if len(found) else (math.nan, math.nan)
    effective, mean = (None, 1.0) if weights is None else (weights.effective, weights.mean)
    return Estimate(name, value, float(low), float(high), effective, warning_of(num, effective, mean, value))


def resamples(num_episodes: int, num: int, seed: int) -> Iterator[np.ndarray]:
    """How often each episode is drawn, if as many as there are are drawn with replacement: `num` rows, in blocks."""
    rng = np.random.default_rng(seed)
    block = max(1, 1_000_000 // num_episodes)
    for begin in range(0, num, block):
        rows = min(block, num - begin)
        drawn = rng.integers(num_episodes, size=(rows, num_episodes)) + num_episodes * np.arange(rows)[:, None]
        counts = np.bincount(drawn.reshape(-1), minlength=rows * num_episodes)
        yield counts.reshape(rows, num_episodes).astype(np.float64)
