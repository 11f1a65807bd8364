"""Estimates by fitted Q: of the halves of recorded episodes for doubly robust ones, and of resamples for intervals.

Shapes: N rows, E episodes.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from lit_rl.errors import DataError
from lit_rl.evaluation import offline
from lit_rl.evaluation.fitted_q import Choices, Transitions
from lit_rl.evaluation.offline import Estimate
from lit_rl.evaluation.policy_rows import PolicyRows
from lit_rl.recorded import Recorded

NORMAL_TAILS = 1.96  # standard deviations of a 95 % interval


def cross_fitted(
    fit: Callable[..., tuple[Tensor, Tensor]], data: Transitions, choices: Choices, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Q of the recorded actions and V of the policy in every row, each [N], fitted to the half that it is not in.

    Args:
        fit: `fitted_q.fit` with its options.
        data: the transitions.
        choices: what the policy does.
        seed: of which episodes are in which half.
    """
    num = int(data.episode[-1]) + 1
    half = torch.from_numpy(np.random.default_rng(seed).permutation(num) % 2)
    weights = torch.stack([half == 0, half == 1]).float()
    q, value = fit(data, choices, weights)
    other, row = 1 - half[data.episode], torch.arange(len(data.episode))
    return q[other, row].numpy(), value[other, row].numpy()


def fitted(
    name: str,
    fit: Callable[..., tuple[Tensor, Tensor]],
    data: Transitions,
    choices: Choices,
    begins: np.ndarray,
    num_refits: int,
    seed: int,
) -> Estimate:
    """The mean of V over the first observations, and an interval from refits to episodes that are drawn anew.

    As in Hao et al. 2021, arXiv:2102.03607; of so few refits the interval is that of a normal distribution. It has the
    error of a small sample, and not that of actions that nobody recorded.

    Args:
        name: of the estimate.
        fit, data, choices: see `cross_fitted`.
        begins: the rows of the first observations, [E].
        num_refits: how many.
        seed: of what is drawn.
    """
    num = len(begins)
    weights = np.concatenate([np.ones((1, num)), *offline.resamples(num, num_refits, seed)])  # [1 + refits, E]
    first = fit(data, choices, torch.from_numpy(weights).float())[1][:, begins].double().numpy()
    value, *refits = (first * weights).sum(1) / num
    half = NORMAL_TAILS * float(np.std(refits, ddof=1))
    warning = offline.warning_of(num, None, 1.0, value)
    return Estimate(name, float(value), float(value) - half, float(value) + half, None, warning)


def transitions_of(recorded: Recorded, rows: PolicyRows, gamma: float) -> Transitions:
    """Recorded transitions as `fitted_q.fit` takes them.

    Raises:
        DataError: if there are none.
    """
    transitions = np.flatnonzero(recorded.is_transition)
    if not len(transitions):
        raise DataError("The episodes hold no transitions: what came after their only steps was not recorded.")
    return Transitions(
        inputs=rows.inputs(),
        action=rows.action(),
        reward=torch.from_numpy(recorded.reward),
        terminated=torch.from_numpy(recorded.terminated),
        rows=torch.from_numpy(transitions),
        episode=torch.from_numpy(np.repeat(np.arange(len(recorded.begins)), recorded.ends - recorded.begins)),
        return_to_go=torch.from_numpy(recorded.to_go(gamma)[0][transitions]),
    )
