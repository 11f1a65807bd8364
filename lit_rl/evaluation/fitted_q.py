"""Fitted Q evaluation: the values of a policy's actions, learned from transitions that another one made.

Shapes: N rows of all episodes, of which M are transitions; E episodes, F numbers of an observation, A actions of a
Discrete space or D numbers of any other action, S drawn actions, K fits, B rows of a minibatch.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_rl.learner.targets import Follower, target_of
from lit_rl.networks.ensemble import Ensemble

LR, LAST_LR = 1e-3, 1e-4  # of Adam, at the beginning and at the end
BATCH_SIZE = 256
TAU = 0.02
LEAST_UPDATES, MOST_UPDATES = 3000, 30_000
BLOCK = 4096  # rows that are valued at a time
LEAST_DEVIATION = 1e-3  # of returns that are all alike


@dataclass(frozen=True)
class Transitions:
    """Recorded rows, in the order of time, and which of them are transitions.

    Attributes:
        inputs: what Q sees of each row's observation, float32 [N, F].
        action: that was taken, int64 [N] from 0 on or float32 [N, D].
        reward: float32 [N].
        terminated: bool [N].
        rows: numbers of the transitions, [M]. The next observation of one is in the row after it, unless it was
            terminated.
        episode: of which each row is, int64 [N].
        return_to_go: discounted sum of the rewards from each transition on, float32 [M]: in which range values are.
    """

    inputs: Tensor
    action: Tensor
    reward: Tensor
    terminated: Tensor
    rows: Tensor
    episode: Tensor
    return_to_go: Tensor


@dataclass(frozen=True)
class Choices:
    """What a policy would do in each row.

    Attributes:
        probs: of the actions of a Discrete space, float32 [N, A]; None for other spaces.
        draws: actions that were drawn, float32 [S, N, D]; None for a Discrete space.
    """

    probs: Tensor | None = None
    draws: Tensor | None = None


def updates_for(gamma: float) -> int:
    """Gradient steps after which values have settled: the target follows in 1 / TAU, and 1 / (1 - gamma) times so.

    >>> updates_for(0.99)
    10000
    """
    return min(max(round(2 / (TAU * max(1 - gamma, 1e-6))), LEAST_UPDATES), MOST_UPDATES)


@torch.enable_grad()
def fit(
    data: Transitions,
    choices: Choices,
    weights: Tensor,
    *,
    gamma: float,
    num_updates: int,
    hidden_sizes: Sequence[int] = (64, 64),
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Q of the recorded actions and V of the policy, in every row, by K fits side by side: two tensors [K, N].

    Q(s, a) <- r + gamma (1 - terminated) sum_a' pi(a'|s') Q'(s', a'),          V(s) = sum_a pi(a|s) Q(s, a)

    Le et al. 2019, arXiv:1903.08738, with a target network Q' that follows slowly, as in Voloshin et al.
    2021, arXiv:1911.06854. Where actions are not Discrete, a drawn one stands for the sum. A truncated step is
    bootstrapped from its next observation, so that Q is the value without a time limit. Targets are kept between what
    the least and the greatest recorded reward give, if they come for ever.

    Args:
        data: the transitions.
        choices: what the policy does.
        weights: how much each episode counts in each fit, [K, E].
        gamma: discount per env step.
        num_updates: gradient steps.
        hidden_sizes: layers (with ReLU) of each fit.
        seed: of first weights and of minibatches.
    """
    rows, size = data.rows, min(BATCH_SIZE, len(data.rows))
    unit = data.return_to_go.mean(), data.return_to_go.std(correction=0).clamp(min=LEAST_DEVIATION)
    low, high = _bounds(data.reward[rows], gamma)
    num_inputs, num_outputs = data.inputs.shape[1], 1
    if choices.probs is not None:
        num_outputs = choices.probs.shape[1]
    else:
        num_inputs += data.action.shape[1]
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = Ensemble(len(weights), num_inputs, hidden_sizes, num_outputs)
    target_network = target_of(network)
    values, target = (_Values(each, data, choices, unit) for each in (network, target_network))
    follow = Follower(target_network, network)
    optimizer = torch.optim.Adam(network.parameters(), lr=LR, foreach=True)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, LAST_LR / LR, num_updates)
    for _ in range(num_updates):
        row = rows[torch.randint(len(rows), (size,), generator=generator)]  # [B]
        next_row = (row + 1).clamp(max=len(data.inputs) - 1)
        with torch.no_grad():
            next_value = target.of_policy(next_row, generator).masked_fill(data.terminated[row], 0.0)
            y = (data.reward[row] + gamma * next_value).clamp(low, high)  # [K, B]
        error = (values.of_recorded(row) - y) / unit[1]
        loss = (weights[:, data.episode[row]] * error.square()).mean(1).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
        follow(TAU)
    with torch.no_grad():
        blocks = torch.arange(len(data.inputs)).split(BLOCK)
        q, value = zip(*((values.of_recorded(block), values.of_policy(block)) for block in blocks))
    return torch.cat(q, 1), torch.cat(value, 1)


class _Values:
    """K networks that value the actions of rows.

    Args:
        ensemble: of the networks.
        data, choices: see `fit`.
        unit: what 0 stands for, and 1 more than that.
    """

    def __init__(self, ensemble: Ensemble, data: Transitions, choices: Choices, unit: tuple[Tensor, Tensor]):
        self._ensemble, self._data, self._choices = ensemble, data, choices
        self._center, self._scale = unit

    def of_recorded(self, row: Tensor) -> Tensor:
        """Of the recorded actions of rows [B], [K, B]; that of a closing row means nothing."""
        action = self._data.action[row]
        if self._choices.draws is not None:
            return self._of_action(row, action)
        outputs = self._of_all(row)
        return outputs.gather(-1, action.clamp(0).expand(len(outputs), -1).unsqueeze(-1)).squeeze(-1)

    def of_policy(self, row: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Of the policy in rows [B], [K, B]: of one of the drawn actions if there is a generator, else of all."""
        if self._choices.probs is not None:
            return (self._of_all(row) * self._choices.probs[row]).sum(-1)
        draws = self._choices.draws
        assert draws is not None
        if generator is not None:
            return self._of_action(row, draws[torch.randint(len(draws), row.shape, generator=generator), row])
        return torch.stack([self._of_action(row, actions[row]) for actions in draws]).mean(0)

    def _of_all(self, row: Tensor) -> Tensor:
        return self._center + self._scale * self._ensemble(self._data.inputs[row])

    def _of_action(self, row: Tensor, action: Tensor) -> Tensor:
        inputs = torch.cat([self._data.inputs[row], action], -1)
        return self._center + self._scale * self._ensemble(inputs).squeeze(-1)


def _bounds(reward: Tensor, gamma: float) -> tuple[float, float]:
    """The least and the greatest value that there can be if all rewards are like the recorded ones."""
    if gamma == 1:
        return -math.inf, math.inf
    low, high = float(reward.min()), float(reward.max())
    return min(low, 0.0) / (1 - gamma), max(high, 0.0) / (1 - gamma)
