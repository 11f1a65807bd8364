"""Actor and critic, which learn from what the world model imagines. Section 3.2 of the paper.

Shapes: B sequences, L rows; N = B * L imagined ones of H steps, which come first; F features, A numbers of an action,
P parameters of the action distribution, S latents, Z bins.
"""

from typing import NamedTuple

import torch
from tensordict import TensorDict
from torch import Tensor

from lit_rl.modules.dreamer_v3.world_model import TwoHotHead, WorldModel
from lit_rl.networks.opaque import key_of, module_of, operator, step_of
from lit_rl.normalizer import ReturnRange
from lit_rl.policy.latent import LatentPolicy
from lit_rl.returns import lambda_returns


class Imagined(NamedTuple):
    """What the world model imagines while the policy acts in it, without gradients.

    Attributes:
        features: of the states, the first of which are real, [H + 1, N, F].
        action: taken in them, but for the last, as numbers, [H, N, A].
        reward: received on arriving at them, [H + 1, N].
        discount: gamma times the chance that the episode goes on there, [H + 1, N].
    """

    features: Tensor
    action: Tensor
    reward: Tensor
    discount: Tensor


@torch.no_grad()
def imagine(
    policy: LatentPolicy, model: WorldModel, deter: Tensor, stoch: Tensor, noise: Tensor, action_noise: Tensor
) -> Imagined:
    """H steps of the prior from N states.

    Args:
        policy: acts, and has the RSSM.
        model: predicts rewards and ends.
        deter, stoch: of the states, [N, D] and [N, S * K].
        noise: uniform numbers, [N, H, S].
        action_noise: what actions are made of, [N, H, 1] or [N, H, A].
    """
    noises = noise.transpose(0, 1), action_noise.transpose(0, 1)  # steps first
    if torch.compiler.is_compiling():
        features, action = _imagined(key_of(policy), deter, stoch, *noises, policy.encoder.num_actions)
    else:
        features, action = _steps(policy, deter, stoch, *noises, compiled=False)
    return Imagined(features, action, *model.predict(features))


def _steps(
    policy: LatentPolicy, deter: Tensor, stoch: Tensor, noise: Tensor, action_noise: Tensor, *, compiled: bool
) -> tuple[Tensor, Tensor]:
    """The features [H + 1, N, F] and actions [H, N, A] of as many steps as there is noise for."""
    features = deter.new_empty(len(noise) + 1, len(deter), deter.shape[-1] + stoch.shape[-1])
    torch.cat([deter, stoch], -1, out=features[0])
    step, actions = step_of(_step, compiled, id(policy), features.shape), []
    for t, (uniform, own) in enumerate(zip(noise.unbind(0), action_noise.unbind(0))):
        deter, stoch, action = step(policy, features[t], deter, stoch, uniform, own)
        torch.cat([deter, stoch], -1, out=features[t + 1])
        actions.append(action)
    return features, torch.stack(actions)


def _step(
    policy: LatentPolicy, features: Tensor, deter: Tensor, stoch: Tensor, noise: Tensor, action_noise: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """One step from each of N states: the policy acts, the recurrent state follows, the prior is sampled."""
    rssm, action = policy.encoder.rssm, policy.imagined_action(features, action_noise)
    deter = rssm.step(deter, stoch, rssm.embed(action))
    return deter, rssm.sample(rssm.prior(deter), noise), action


class Targets(NamedTuple):
    """What actor and critic learn from: no gradient flows into it.

    Attributes:
        returns: lambda-returns of the imagined states but for the last, [H, N].
        advantage: [H, N].
        weight: the chance, discounted, that an imagined state is reached at all, [H, N].
        scale: what advantages were divided by, [].
        limits: of the range of returns after these, see `ReturnRange`.
    """

    returns: Tensor
    advantage: Tensor
    weight: Tensor
    scale: Tensor
    limits: Tensor


@torch.no_grad()
def targets_of(
    imagined: Imagined, value: Tensor, returns_range: ReturnRange, *, lambda_: float, normalize: bool
) -> Targets:
    """Targets of what was imagined, with the critic's values [H + 1, N] of its states: eqs. 11 and 12."""
    is_last = torch.zeros_like(value, dtype=torch.bool)  # an end is only ever more or less probable
    returns = _returns(*(x.t() for x in (imagined.reward, imagined.discount, is_last, value)), lambda_=lambda_).t()
    limits = returns_range.moved(returns)
    scale = returns_range.scale(limits) if normalize else torch.ones_like(limits[0])
    advantage = (returns - value[:-1]) / scale
    return Targets(returns, advantage, imagined.discount[:-1].cumprod(0), scale, limits)


def policy_loss(
    policy: LatentPolicy, imagined: Imagined, targets: Targets, *, entropy_coef: float
) -> tuple[Tensor, Tensor]:
    """-weight (log pi(a|s) advantage + entropy_coef H(pi(.|s))) and the entropy, [H, N] each: eq. 11, REINFORCE.

    Features and actions were imagined without gradients: none reaches the world model.
    """
    parameters = policy.action_parameters(imagined.features[:-1])
    log_prob, entropy = policy.distribution.evaluate(parameters, policy.as_action(imagined.action))
    return -targets.weight * (log_prob * targets.advantage + entropy_coef * entropy), entropy


def value_loss(critic: TwoHotHead, slow: TwoHotHead, log_probs: Tensor, features: Tensor, target: Tensor) -> Tensor:
    """Cross entropy to targets, and to what the slow critic says, which holds the critic back: [*N], eq. 10.

    Args:
        critic: of log-probabilities [*N, Z] for features [*N, F].
        slow: follows it.
        log_probs: the critic's for these features.
        features: of states.
        target: [*N], without gradient.
    """
    with torch.no_grad():
        slow_value = slow.mean(slow(features))
    return critic.loss(log_probs, target, slow_value)


def replay_value_loss(
    critic: TwoHotHead,
    slow: TwoHotHead,
    features: Tensor,
    batch: TensorDict,
    bootstrap: Tensor,
    *,
    gamma: float,
    lambda_: float,
) -> Tensor:
    """The critic's loss on the rows that were replayed, [B, L - 1]; its gradient also shapes the latents.

    A lambda-return sums the rewards that were received. It bootstraps from returns that were imagined from the rows.

    Args:
        critic, slow: see `value_loss`.
        features: of the posterior's latents, [B, L, F].
        batch: of rows.
        bootstrap: the first imagined return of each row, [B, L].
        gamma: discount per env step.
        lambda_: of the lambda-returns.
    """
    discount = gamma * (~batch["is_terminal"]).float()
    with torch.no_grad():
        target = _returns(batch["reward"], discount, batch["is_last"], bootstrap, lambda_=lambda_)
    features = features[:, :-1]
    loss = value_loss(critic, slow, critic(features), features, target)
    return torch.where(batch["is_last"][:, :-1], 0.0, loss)


def _returns(reward: Tensor, discount: Tensor, is_last: Tensor, bootstrap: Tensor, *, lambda_: float) -> Tensor:
    """`lambda_returns`, a loop of one operator to a compiler."""
    if torch.compiler.is_compiling():
        return _lambda_returns(reward, discount, is_last, bootstrap, lambda_)
    return lambda_returns(reward, discount, is_last, bootstrap, lambda_=lambda_)


# --- for compilers, which look into no loop: see `lit_rl.networks.opaque` ---------------------------------------------


@torch.no_grad()
def _compiled_steps(
    policy: int, deter: Tensor, stoch: Tensor, noise: Tensor, action_noise: Tensor, num_actions: int
) -> tuple[Tensor, Tensor]:
    starts = (x.contiguous() for x in (deter, stoch, noise, action_noise))
    return _steps(module_of(policy), *starts, compiled=True)


def _like_steps(
    policy: int, deter: Tensor, stoch: Tensor, noise: Tensor, action_noise: Tensor, num_actions: int
) -> tuple[Tensor, Tensor]:
    (rows, _), horizon, num_features = deter.shape, len(noise), deter.shape[-1] + stoch.shape[-1]
    return deter.new_empty(horizon + 1, rows, num_features), deter.new_empty(horizon, rows, num_actions)


_imagined = operator(
    "imagine(int policy, Tensor deter, Tensor stoch, Tensor noise, Tensor action_noise, int num_actions) -> "
    "(Tensor, Tensor)",
    _compiled_steps,
    _like_steps,
)
_lambda_returns = operator(
    "lambda_returns(Tensor reward, Tensor discount, Tensor is_last, Tensor bootstrap, float lambda_) -> Tensor",
    lambda *rows_and_lambda: lambda_returns(*rows_and_lambda[:4], lambda_=rows_and_lambda[4]),
    lambda reward, *_: reward.new_empty(len(reward), reward.shape[1] - 1),
)
