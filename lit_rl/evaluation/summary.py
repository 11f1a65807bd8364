"""What the episodes of an evaluation say: the metrics that are logged."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

NUM_RESAMPLES = 2000  # of the bootstrap
INTERVAL = (2.5, 97.5)  # percentiles


@dataclass(frozen=True)
class EvaluationResult:
    """What an evaluation found.

    Attributes:
        episodes: the `Episode`s that were played, in the order they ended.
        lost: how many more were to be played.
        at: env steps after which the policy was as it played them.
    """

    episodes: Sequence[Any]
    lost: int
    at: int

    @property
    def cut(self) -> int:
        """Episodes that had not ended when their time was over."""
        return sum(episode.cut for episode in self.episodes)


def summarize(results: Sequence[EvaluationResult]) -> dict[str, float]:
    """The metrics of an evaluation of which each rank has a result, without prefix.

    Those of returns and lengths are there if there is an episode.
    """
    episodes = [episode for result in results for episode in result.episodes]
    num_cut = sum(result.cut for result in results)
    is_partial = num_cut + sum(result.lost for result in results) > 0
    metrics: dict[str, Any] = {"episodes": len(episodes), "cut_episodes": num_cut, "partial": float(is_partial)}
    if episodes:
        returns = np.sort([episode.return_ for episode in episodes])  # by whomever they were played
        low, high = bootstrap_interval(returns)
        metrics |= {
            "return_mean": returns.mean(),
            "return_std": returns.std(),
            "return_min": returns.min(),
            "return_max": returns.max(),
            "return_iqm": interquartile_mean(returns),
            "return_iqm_low": low,
            "return_iqm_high": high,
            "length_mean": np.mean([episode.length for episode in episodes]),
        }
    for agent in sorted({agent for episode in episodes for agent in episode.returns or ()}):
        metrics[f"return_mean/{agent}"] = np.mean([e.returns[agent] for e in episodes if agent in (e.returns or ())])
    for key in sorted({key for episode in episodes for key in episode.info}):
        metrics[f"info/{key}_mean"] = np.mean([e.info[key] for e in episodes if key in e.info])
    return {name: float(value) for name, value in metrics.items()}


def policy_returns(results: Sequence[EvaluationResult]) -> dict[str, float]:
    """The mean return of an agent that acted by a policy, by its id; none where there is only one policy."""
    found: dict[str, list[float]] = {}
    for episode in (episode for result in results for episode in result.episodes):
        for policy_id, returns in (episode.by_policy or {}).items():
            found.setdefault(policy_id, []).extend(returns)
    return {policy_id: float(np.mean(found[policy_id])) for policy_id in sorted(found)}


def interquartile_mean(x: np.ndarray) -> np.ndarray:
    """Mean of `x` [*N, K] over its last dimension without the lowest and highest quarter (rounded down) of the values.

    Agarwal et al. 2021, arXiv:2108.13264, section 4.3: less moved by single values than the mean, and by more than one
    value as the median is.

    >>> interquartile_mean(np.array([100.0, 1.0, 2.0, 3.0, -50.0]))  # of 5, one is left out at either end
    np.float64(2.0)
    """
    left_out = x.shape[-1] // 4
    return np.sort(x, -1)[..., left_out : x.shape[-1] - left_out].mean(-1)


def bootstrap_interval(x: np.ndarray) -> tuple[float, float]:
    """The 95 % percentile bootstrap interval of the interquartile mean of `x` [K]; the same for the same values.

    >>> bootstrap_interval(np.full(5, 2.0))
    (2.0, 2.0)
    """
    chosen = np.random.default_rng(0).integers(len(x), size=(NUM_RESAMPLES, len(x)))
    low, high = np.percentile(interquartile_mean(x[chosen]), INTERVAL)
    return float(low), float(high)
