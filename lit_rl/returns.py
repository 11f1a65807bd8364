"""Returns and advantages: pure functions of time-ordered tensors [B, T].

`terminated` zeroes the bootstrap, `done` (terminated or truncated) cuts the sum; the two are never merged.
`next_value[:, t]` is the value of the true next observation of row t: at an episode's last step that of its final
observation, never that of the next episode's first.
"""

import torch
from torch import Tensor


def gae(
    reward: Tensor,
    terminated: Tensor,
    done: Tensor,
    value: Tensor,
    next_value: Tensor,
    *,
    gamma: float,
    lambda_: float,
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimates and the value targets, each [B, T].

    delta_t = r_t + gamma (1 - terminated_t) V(s_{t+1}) - V(s_t)
    A_t     = delta_t + gamma lambda (1 - done_t) A_{t+1}                     target_t = A_t + V(s_t)

    eq. 16 of Schulman et al. 2016, arXiv:1506.02438, with episode ends.

    >>> one, false = torch.ones(1, 2), torch.zeros(1, 2, dtype=torch.bool)
    >>> advantage, target = gae(one, false, false, 0 * one, 0 * one, gamma=0.5, lambda_=1.0)
    >>> advantage
    tensor([[1.5000, 1.0000]])
    """
    delta = reward + gamma * ~terminated * next_value - value
    discount = (gamma * lambda_) * ~done
    advantage = torch.zeros_like(delta[:, 0])
    backwards = []
    for delta_t, discount_t in zip(reversed(delta.unbind(1)), reversed(discount.unbind(1))):
        advantage = torch.addcmul(delta_t, discount_t, advantage)
        backwards.append(advantage)
    advantages = torch.stack(backwards[::-1], 1)
    return advantages, advantages + value


def running_return(reward: Tensor, done: Tensor, *, gamma: float, initial: Tensor) -> tuple[Tensor, Tensor]:
    """Discounted sum of the rewards *up to* each row, [B, T], and what to carry on to the next rollout, [B].

    R_t = r_t + gamma (1 - done_{t-1}) R_{t-1}; `initial` [B] is what the previous call returned to carry on.

    >>> running_return(torch.ones(1, 3), torch.tensor([[False, True, False]]), gamma=0.5, initial=torch.zeros(1))
    (tensor([[1.0000, 1.5000, 1.0000]]), tensor([0.5000]))
    """
    carry, sums = initial, []
    for reward_t, keep_t in zip(reward.unbind(1), (gamma * ~done).unbind(1)):
        total = reward_t + carry
        sums.append(total)
        carry = keep_t * total
    return torch.stack(sums, 1), carry
