"""Estimators of a policy's value from others' episodes: tables worked by hand, and an MDP whose values are known."""

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from known_mdp import GAMMA, MU, PI, T, exact, play

from lit_rl.evaluation import fitted_q, offline
from lit_rl.evaluation.fitted_q import Choices, Transitions
from lit_rl.evaluation.offline import Estimate

# Two episodes; the second is truncated after two steps. Weights: 2, 1, 3 and 1/2, 2 (2); returns 3 and 7.
REWARD = np.array([[1.0, 2.0, 4.0], [3.0, 8.0, 0.0]])
LOG_RATIO = np.log([[2.0, 0.5, 3.0], [0.5, 4.0, 1.0]])
HALF = {"gamma": 0.5}


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [
        (offline.importance_sampling, (3 * 3 + 2 * 7) / 2),
        (offline.per_decision, ((2 * 1 + 1 * 1 + 3 * 1) + (0.5 * 3 + 2 * 4)) / 2),
        (offline.weighted, (3 * 3 + 2 * 7) / 5),
        (offline.weighted_per_decision, (2 * 1 + 0.5 * 3) / 2.5 + (1 * 1 + 2 * 4) / 3 + (3 * 1 + 2 * 0) / 5),
    ],
)
def test_table_of_importance_sampling(estimator: Callable[..., Estimate], expected: float) -> None:
    assert estimator(REWARD, LOG_RATIO, **HALF).value == pytest.approx(expected)


def test_table_of_doubly_robust() -> None:
    q = np.array([[1.0, 1.0, 2.0], [2.0, 4.0, 0.0]])
    value = np.array([[1.0, 0.0, 1.0], [1.0, 2.0, 0.0]])
    # 1 + 3 (4 - 2) = 7; 0 + 1/2 (2 + 7/2 - 1) = 9/4; 1 + 2 (1 + 9/8 - 1) = 13/4
    # 2 + 4 (8 - 4) = 18; 1 + 1/2 (3 + 9 - 2) = 6
    found = offline.doubly_robust(REWARD, LOG_RATIO, q, value, **HALF)
    assert found.value == pytest.approx((13 / 4 + 6) / 2)


def test_data_is_the_mean_discounted_return() -> None:
    assert offline.monte_carlo(REWARD, **HALF).value == 5.0


def test_doubly_robust_without_values_is_per_decision() -> None:
    none = np.zeros_like(REWARD)
    found = offline.doubly_robust(REWARD, LOG_RATIO, none, none, **HALF)
    assert found.value == pytest.approx(offline.per_decision(REWARD, LOG_RATIO, **HALF).value)


def test_effective_sample_size_of_episodes_and_of_decisions() -> None:
    # Of the last weights (3, 2); of (2, 1/2), (1, 2), (3, 2), by gamma^t.
    last = 5**2 / (9 + 4)
    assert offline.weighted(REWARD, LOG_RATIO, **HALF).effective_sample_size == pytest.approx(last)
    each = (2.5**2 / 4.25 + 0.5 * 3**2 / 5 + 0.25 * last) / 1.75
    assert offline.per_decision(REWARD, LOG_RATIO, **HALF).effective_sample_size == pytest.approx(each)


def test_weights_beyond_all_numbers_leave_weighted_estimates_finite() -> None:
    reward, log_ratio = np.ones((20, 400)), np.full((20, 400), 3.0)
    for estimator in (offline.weighted, offline.weighted_per_decision):
        found = estimator(reward, log_ratio, gamma=0.9)
        assert found.value == pytest.approx(10.0)
    plain = offline.importance_sampling(reward, log_ratio, gamma=0.9)
    assert plain.value == np.inf
    assert plain.warning is not None


# --- when an interval says nothing ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ratio", "num", "words"),
    [
        (np.ones(50), 50, None),
        (np.ones(9), 9, "There are 9 episodes"),
        (np.r_[np.full(49, 1e-6), 50.0], 50, "1.0 of 50 episodes have all the weight"),
        (np.full(50, 0.01), 50, "mean 0.01 instead of 1"),
        (np.full(50, 4.0), 50, "mean 4 instead of 1"),
        (np.zeros(50), 50, "none of the recorded episodes"),
    ],
)
def test_warnings_say_when_an_interval_says_nothing(ratio: np.ndarray, num: int, words: str | None) -> None:
    with np.errstate(divide="ignore"):
        found = offline.weighted(np.arange(num, dtype=float)[:, None], np.log(ratio)[:, None], gamma=0.9)
    assert (found.warning is None) if words is None else (words in str(found.warning))


# --- an MDP whose values are known ----------------------------------------------------------------------------------


def log_ratio_of(data: dict[str, np.ndarray]) -> np.ndarray:
    at = data["state"][:, :-1], data["action"]
    return np.where(data["real"], np.log(PI[at] / MU[at]), 0.0)


RESAMPLES, EPISODES = 200, 100


@pytest.fixture(scope="module")
def mdp() -> dict[str, np.ndarray]:
    return play(RESAMPLES * EPISODES, seed=1)


def groups(mdp: dict[str, np.ndarray], size: int) -> Any:
    log_ratio, num = log_ratio_of(mdp), len(mdp["reward"]) // size
    return zip(*(np.split(x[: num * size], num) for x in (mdp["reward"], log_ratio)))


def doubly_robust_inputs(mdp: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """A Q that is wrong, and its V."""
    q = exact(PI) + np.random.default_rng(3).normal(0, 0.5, (T, 2, 2))
    state, step = mdp["state"][:, :-1], np.arange(T)
    value = (PI * q).sum(-1)[step, state]
    return np.where(mdp["real"], q[step, state, mdp["action"]], 0.0), np.where(mdp["real"], value, 0.0)


@pytest.mark.parametrize("name", ["IS", "PDIS", "WIS", "WPDIS", "DR"])
def test_estimates_of_a_known_mdp_are_unbiased_and_intervals_cover_its_value(
    name: str, mdp: dict[str, np.ndarray]
) -> None:
    truth = float((PI * exact(PI)[0]).sum(1).mean())
    played = float((MU * exact(MU)[0]).sum(1).mean())
    assert abs(truth - played) > 0.2  # so that what plays is told from what is judged
    estimators = {
        "IS": offline.importance_sampling, "PDIS": offline.per_decision, "WIS": offline.weighted,
        "WPDIS": offline.weighted_per_decision,
    }  # fmt: skip
    if name == "DR":
        fitted = [np.split(x, RESAMPLES) for x in doubly_robust_inputs(mdp)]
        found = [
            offline.doubly_robust(reward, log_ratio, q, value, gamma=GAMMA)
            for (reward, log_ratio), q, value in zip(groups(mdp, EPISODES), *fitted)
        ]
    else:
        found = [estimators[name](*group, gamma=GAMMA) for group in groups(mdp, EPISODES)]
    values = np.array([each.value for each in found])
    bias, error = values.mean() - truth, values.std() / RESAMPLES**0.5
    if name in ("IS", "PDIS", "DR"):
        assert abs(bias) < 2 * error
    assert abs(bias) < 0.05
    covered = np.mean([each.low <= truth <= each.high for each in found])
    assert 0.88 <= covered <= 0.99
    assert not any(each.warning for each in found)


@pytest.mark.parametrize("estimator", [offline.weighted, offline.weighted_per_decision])
def test_bias_of_weighted_estimates_shrinks_with_the_number_of_episodes(
    estimator: Callable[..., Estimate], mdp: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offline, "NUM_RESAMPLES", 1)
    truth = float((PI * exact(PI)[0]).sum(1).mean())
    bias = {}
    for size in (2, 8, 100):
        some = itertools.islice(groups(mdp, size), 1500)
        bias[size] = float(np.mean([estimator(*group, gamma=GAMMA).value for group in some])) - truth
    assert abs(bias[2]) > 2 * abs(bias[8]) > 4 * abs(bias[100])
    assert bias[2] < 0  # towards the value of what played


def test_doubly_robust_is_surer_than_per_decision(mdp: dict[str, np.ndarray]) -> None:
    reward, log_ratio = mdp["reward"][:500], log_ratio_of(mdp)[:500]
    q, value = (x[:500] for x in doubly_robust_inputs(mdp))
    exact_q = exact(PI)[np.arange(T), mdp["state"][:500, :-1], mdp["action"][:500]] * mdp["real"][:500]
    exact_value = (PI * exact(PI)).sum(-1)[np.arange(T), mdp["state"][:500, :-1]] * mdp["real"][:500]
    width = [
        each.high - each.low
        for each in (
            offline.doubly_robust(reward, log_ratio, exact_q, exact_value, gamma=GAMMA),
            offline.doubly_robust(reward, log_ratio, q, value, gamma=GAMMA),
            offline.per_decision(reward, log_ratio, gamma=GAMMA),
        )
    ]
    assert width[0] < width[1] < width[2]


# --- fitted Q -------------------------------------------------------------------------------------------------------


@pytest.fixture
def quick_fit(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """One linear layer, which is a table of one-hot states, and steps of a size that suits it."""
    for name, value in {"LR": 0.1, "LAST_LR": 0.001, "TAU": 0.2}.items():
        monkeypatch.setattr(fitted_q, name, value)

    def fit(data: Transitions, choices: Choices, weights: torch.Tensor, **options: Any) -> Any:
        given = {"gamma": 0.5, "num_updates": 200, "hidden_sizes": ()}
        return fitted_q.fit(data, choices, weights, **given | options)

    return fit


# Three episodes with closing rows: s0 a0 r1, s1 a0 r2, terminated | s0 a1 r3, truncated in s1 | s1 a1 r4, terminated.
# What is in a closing row after a termination means nothing. By pi = (1/4, 3/4) and gamma = 1/2:
# Q(s1) = 2, 4; V(s1) = 7/2; Q(s0) = 1 + 7/4, 3 + 7/4; V(s0) = 17/4
STATE = torch.tensor([0, 1, 0, 0, 1, 1, 0])
ACTION = torch.tensor([0, 0, 0, 1, 0, 1, 0])


def chain(action: torch.Tensor = ACTION) -> Transitions:
    return Transitions(
        inputs=torch.nn.functional.one_hot(STATE, 2).float(),
        action=action,
        reward=torch.tensor([1.0, 2.0, 0.0, 3.0, 0.0, 4.0, 0.0]),
        terminated=torch.tensor([False, True, False, False, False, True, False]),
        rows=torch.tensor([0, 1, 3, 5]),
        episode=torch.tensor([0, 0, 0, 1, 1, 2, 2]),
        return_to_go=torch.tensor([2.0, 2.0, 3.0, 4.0]),
    )


DISCRETE = chain(), Choices(probs=torch.tensor([0.25, 0.75]).expand(7, 2))
DRAWN = (
    chain(ACTION.float().unsqueeze(1)),
    Choices(draws=torch.tensor([0.0, 1.0, 1.0, 1.0]).reshape(4, 1, 1).expand(4, 7, 1)),
)


@pytest.mark.parametrize(("data", "choices"), [DISCRETE, DRAWN], ids=["summed", "drawn"])
def test_table_of_fitted_q(data: Transitions, choices: Choices, quick_fit: Callable[..., Any]) -> None:
    q, value = quick_fit(data, choices, torch.ones(1, 3))
    tolerance = 0.05 if choices.probs is not None else 0.3  # of actions that are drawn anew in every step
    torch.testing.assert_close(q[0, data.rows], torch.tensor([2.75, 2.0, 4.75, 4.0]), atol=tolerance, rtol=0)
    torch.testing.assert_close(value[0, :2], torch.tensor([4.25, 3.5]), atol=tolerance, rtol=0)


def test_fits_side_by_side_learn_from_their_own_episodes(quick_fit: Callable[..., Any]) -> None:
    data, _ = DISCRETE
    one_action = Choices(probs=torch.tensor([1.0, 0.0]).expand(7, 2))
    alone = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 1.0], [1.0, 1.0, 1.0]])
    q, _ = quick_fit(data, one_action, alone)
    assert q[0, 0].item() == pytest.approx(2.0, abs=0.05)  # 1 + 2/2, as in all episodes together
    assert q[2, 0].item() == pytest.approx(2.0, abs=0.05)
    assert q[2, 3].item() == pytest.approx(4.0, abs=0.05)
    assert q[1, 5].item() == pytest.approx(4.0, abs=0.05)
    assert abs(q[1, 1].item() - 2.0) > 0.2  # it has not seen that action there


def test_values_stay_within_what_the_rewards_allow(quick_fit: Callable[..., Any]) -> None:
    data, choices = DISCRETE
    no_end = Transitions(**{**vars(data), "terminated": torch.zeros(7, dtype=torch.bool)})
    _, value = quick_fit(no_end, choices, torch.ones(1, 3), gamma=0.9)
    assert value.max() < 1.1 * 4 / (1 - 0.9)


def test_fitted_q_of_a_known_mdp_goes_on_after_truncations(quick_fit: Callable[..., Any]) -> None:
    mdp = play(2000, seed=2)
    last, num = mdp["real"].sum(1), 2000
    kept = np.arange(T + 1) <= last[:, None]  # with a closing row
    is_closing = (np.arange(T + 1) == last[:, None])[kept]

    def rows(x: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.pad(x, ((0, 0), (0, T + 1 - x.shape[1])))[kept])

    state = rows(mdp["state"])
    data = Transitions(
        inputs=torch.nn.functional.one_hot(state, 2).float(),
        action=rows(mdp["action"]),
        reward=rows(mdp["reward"]).float(),
        terminated=rows(mdp["terminated"]),
        rows=torch.from_numpy(np.flatnonzero(~is_closing)),
        episode=torch.from_numpy(np.repeat(np.arange(num), last + 1)),
        return_to_go=rows(mdp["reward"]).float()[~is_closing],
    )
    choices = Choices(probs=torch.from_numpy(PI).float()[state])
    _, value = quick_fit(data, choices, torch.ones(1, num), gamma=GAMMA, num_updates=400)
    truth = (PI * exact(PI, cut=0.0, horizon=200)[0]).sum(1)
    found = [value[0, state == s].mean().item() for s in (0, 1)]
    assert found == pytest.approx(truth, abs=0.15)
    assert (truth > 1.5 * (PI * exact(PI)[0]).sum(1)).all()  # far from the values up to the truncations
