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
    length: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimates and the value targets, each [B, T].

    delta_t = r_t + gamma (1 - terminated_t) V(s_{t+1}) - V(s_t)
    A_t     = delta_t + gamma lambda (1 - done_t) A_{t+1}                     target_t = A_t + V(s_t)

    eq. 16 of Schulman et al. 2016, arXiv:1506.02438, with episode ends.

    With `length` [B] row b's steps from `length[b]` on are padding: they may hold anything, and get 0.

    >>> one, false = torch.ones(1, 2), torch.zeros(1, 2, dtype=torch.bool)
    >>> advantage, target = gae(one, false, false, 0 * one, 0 * one, gamma=0.5, lambda_=1.0)
    >>> advantage
    tensor([[1.5000, 1.0000]])
    """
    delta = reward + gamma * ~terminated * next_value - value
    advantage = discounted_sum(delta, (gamma * lambda_) * ~done, length)
    target = advantage + value
    return advantage, target if length is None else torch.where(real_steps(length, target.shape[1]), target, 0.0)


def vtrace(
    log_ratio: Tensor,
    reward: Tensor,
    terminated: Tensor,
    done: Tensor,
    value: Tensor,
    next_value: Tensor,
    *,
    gamma: float,
    lambda_: float = 1.0,
    rho_clip: float = 1.0,
    c_clip: float = 1.0,
    policy_rho_clip: float = 1.0,
    length: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """V-trace: advantages of the policy gradient and value targets, each [B, T], from actions of an older policy mu.

    delta_t = min(rho_clip, r_t) (reward_t + gamma V(s_{t+1}) - V(s_t))            r_t = pi(a_t|s_t) / mu(a_t|s_t)
    v_t     = V(s_t) + delta_t + gamma lambda min(c_clip, r_t) (v_{t+1} - V(s_{t+1}))
    A_t     = min(policy_rho_clip, r_t) (reward_t + gamma v_{t+1} - V(s_t))

    eq. 1 and section 4.2 of Espeholt et al. 2018, arXiv:1802.01561, with episode ends: after a termination V(s_{t+1})
    and v_{t+1} are 0; after a truncation, and after the last step, v_{t+1} is V(s_{t+1}), of the true next observation.
    The fixed point is the value of the policy proportional to min(rho_clip mu, pi). On data of pi itself, with the
    bounds at 1, v is the n-step target to the end of the episode or of the time line.

    Args:
        log_ratio: log pi(a|s) - log mu(a|s), of all parts of the action together, [B, T].
        reward, terminated, done, value, next_value, length: see `gae`.
        gamma: discount per env step.
        lambda_: shortens the traces, as `gae`'s does.
        rho_clip: bound of the ratio in delta; decides which policy's value is learned.
        c_clip: bound of the ratio in the traces; decides how fast.
        policy_rho_clip: bound of the ratio in the advantage.

    >>> one, false = torch.ones(1, 2), torch.zeros(1, 2, dtype=torch.bool)
    >>> next_value = torch.tensor([[0.0, 1.0]])
    >>> vtrace(torch.tensor([[0.5, 2.0]]).log(), one, false, false, 0 * one, next_value, gamma=0.5)
    (tensor([[0.8750, 1.5000]]), tensor([[0.8750, 1.5000]]))
    """
    ratio = log_ratio.exp()
    next_value = next_value.masked_fill(terminated, 0.0)
    delta = ratio.clamp(max=rho_clip) * (reward + gamma * next_value - value)
    target = value + discounted_sum(delta, gamma * lambda_ * ratio.clamp(max=c_clip) * ~done, length)
    ends = done.clone()
    if length is None:
        ends[:, -1] = True
    else:
        target = torch.where(real_steps(length, target.shape[1]), target, 0.0)
        ends |= ~real_steps(length - 1, target.shape[1])
    next_target = torch.where(ends, next_value, target.roll(-1, 1))
    advantage = ratio.clamp(max=policy_rho_clip) * (reward + gamma * next_target - value)
    if length is not None:
        advantage = torch.where(real_steps(length, target.shape[1]), advantage, 0.0)
    return advantage, target


def discounted_sum(x: Tensor, discount: Tensor, length: Tensor | None = None) -> Tensor:
    """The sums y_t = x_t + discount_t y_{t+1} [B, T], where y_T = 0; with `length` [B], y is 0 from there on.

    Not step by step, but by doubling: in each pass y_t, which holds `reach` terms, takes in the `reach` terms of
    y_{t + reach}. That are log2(T) operations on whole tensors instead of T on columns (Hillis and Steele 1986).

    >>> discounted_sum(torch.ones(1, 3), torch.tensor([[0.5, 0.0, 0.5]]))
    tensor([[1.5000, 1.0000, 1.0000]])
    """
    num_steps, reach = x.shape[1], 1
    if length is not None:
        x = torch.where(real_steps(length, num_steps), x, 0.0)
    y = x
    while reach < num_steps:
        added = torch.addcmul(y[:, :-reach], discount[:, : num_steps - reach], y[:, reach:])
        y = torch.cat([added, y[:, -reach:]], 1)
        discount = discount[:, :-reach] * discount[:, reach:]  # of `reach` steps, then of twice as many
        reach *= 2
    return y


def real_steps(length: Tensor, num_steps: int) -> Tensor:
    """Which steps of time lines of some lengths [B] are no padding, [B, T].

    >>> real_steps(torch.tensor([2, 0]), 3)
    tensor([[ True,  True, False],
            [False, False, False]])
    """
    return torch.arange(num_steps, device=length.device) < length.unsqueeze(1)


def running_return(
    reward: Tensor,
    done: Tensor,
    *,
    gamma: float,
    initial: Tensor,
    is_init: Tensor | None = None,
    length: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Discounted sum of the rewards *up to* each row, [B, T], and what to carry on to the next rollout, [B].

    R_t = r_t + gamma (1 - done_{t-1}) (1 - is_init_t) R_{t-1}; `initial` [B] is what the previous call returned to
    carry on. `is_init` [B, T] cuts the sum where an episode begins whose predecessor was not seen to end: an
    environment failed, or its runner was replaced. With `length` [B], what is carried on is from step `length - 1`; the
    sums from `length` on mean nothing.

    >>> running_return(torch.ones(1, 3), torch.tensor([[False, True, False]]), gamma=0.5, initial=torch.zeros(1))
    (tensor([[1.0000, 1.5000, 1.0000]]), tensor([0.5000]))
    """
    carry, sums = initial, []
    begins = torch.zeros_like(done) if is_init is None else is_init
    real = None if length is None else real_steps(length, reward.shape[1])
    for t, (reward_t, keep_t) in enumerate(zip(reward.unbind(1), (gamma * ~done).unbind(1))):
        total = reward_t + carry.masked_fill(begins[:, t], 0.0)
        sums.append(total)
        carry = keep_t * total if real is None else torch.where(real[:, t], keep_t * total, carry)
    return torch.stack(sums, 1), carry


def n_step(rewards: Tensor, steps: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    """Discounted sum of each row's first rewards, and the discount of what follows them, each [M].

    R = sum_{i < k} gamma^i r_{t+i}, and gamma^k: the target is R + gamma^k (1 - terminated) V(s_{t+k}).

    Sutton & Barto 2018, eq. 7.1. An episode's end makes k smaller than n; only a terminated one has no V.

    Args:
        rewards: [M, n], 0 after the k-th.
        steps: k of each row, [M].
        gamma: discount per env step.

    >>> n_step(torch.tensor([[1.0, 1.0, 0.0]]), torch.tensor([2]), gamma=0.5)
    (tensor([1.5000]), tensor([0.2500]))
    """
    discounts = gamma ** torch.arange(rewards.shape[1] + 1, dtype=rewards.dtype, device=rewards.device)
    return rewards @ discounts[:-1], discounts[steps]


def n_step_in_sequences(reward: Tensor, end: Tensor, gamma: float, num_steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """`n_step` for every row of sequences [S, L].

    Args:
        reward: [S, L].
        end: whether nothing is known after the row, [S, L]: the episode ended, in either way, or padding follows.
        gamma: discount per env step.
        num_steps: n.

    Returns:
        The discounted sums, the discounts of what follows, and the number of the last row summed, each [S, L].

    >>> no = torch.zeros(1, 3, dtype=torch.bool)
    >>> n_step_in_sequences(torch.ones(1, 3), no, gamma=0.5, num_steps=2)
    (tensor([[1.5000, 1.5000, 1.0000]]), tensor([[0.2500, 0.2500, 0.5000]]), tensor([[1, 2, 2]]))
    """
    length = reward.shape[1]
    first = torch.arange(length, device=reward.device).expand_as(reward)
    total, row, goes_on = reward.clone(), first.clone(), torch.ones_like(end)
    for k in range(1, min(num_steps, length)):
        goes_on[:, : length - k] &= ~end[:, k - 1 : length - 1]
        goes_on[:, length - k :] = False
        total[:, : length - k] += gamma**k * reward[:, k:] * goes_on[:, : length - k]
        row += goes_on
    return total, gamma ** (row - first + 1), row


def lambda_returns(reward: Tensor, discount: Tensor, is_last: Tensor, bootstrap: Tensor, *, lambda_: float) -> Tensor:
    """Lambda-returns of the rows 0 to T - 2 of sequences that go on across the ends of episodes, [B, T - 1].

    R_t = r_{t+1} + d_{t+1} ((1 - c_{t+1}) V_{t+1} + c_{t+1} R_{t+1}),  c_t = lambda (1 - is_last_t),  R_{T-1} = V_{T-1}

    eq. 12 of Hafner et al. 2023, arXiv:2301.04104, for rewards that are received on arriving. What a last row's own
    return is has no meaning: the next row begins another episode.

    Args:
        reward: received on arriving at each row, [B, T].
        discount: of what comes after each row, [B, T]: 0 where an episode has terminated.
        is_last: where an episode ends, terminated or truncated, [B, T].
        bootstrap: V, what each row's return is estimated at, [B, T].
        lambda_: 0 believes the next row's estimate, 1 the last one's.

    >>> one, false = torch.ones(1, 3), torch.zeros(1, 3, dtype=torch.bool)
    >>> lambda_returns(one, 0.5 * one, false, 0 * one, lambda_=1.0)
    tensor([[1.5000, 1.0000]])
    """
    keep = lambda_ * ~is_last
    known = reward + discount * (1 - keep) * bootstrap
    following, found = bootstrap[:, -1], []
    for row, factor in zip(known[:, 1:].flip(1).unbind(1), (discount * keep)[:, 1:].flip(1).unbind(1)):
        following = torch.addcmul(row, factor, following)
        found.append(following)
    return torch.stack(found[::-1], 1)
