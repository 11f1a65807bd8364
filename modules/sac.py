"""Soft Actor-Critic, for continuous and for discrete actions, and truncated quantile critics.

Shapes: *N rows, [M] or sequences [S, L]; F features, A discrete actions, K critics, Z numbers that a critic gives for
an action, J numbers that the target has.
"""

import math
from typing import Annotated, Any

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from lit_rl.distributions import SquashedGaussian
from lit_rl.errors import OptionError
from lit_rl.losses import quantile_huber_loss
from lit_rl.networks.ensemble import Critics
from lit_rl.options import Count, CountOrZero, NumberOr, Positive
from lit_rl.q_actor_critic import QActorCritic
from lit_rl.rollout import mean_of_rows, means_of_rows
from lit_rl.spec import EnvSpec
from lit_rl.transitions import (
    action_difference,
    bootstrap_observation,
    features,
    greedy_actions,
    judged,
    next_features,
    set_priority,
    weighted_mean,
)
from lit_rl.trees import Tree

Entropy = Annotated[float | str, NumberOr("auto")]
AUTO_ENTROPY = 0.98  # share of a uniform policy's entropy that a discrete one is held at


class SAC(QActorCritic):
    """Soft Actor-Critic with twin critics and automatic temperature: Haarnoja et al. 2018, arXiv:1812.05905.

    For Discrete actions the expectations over actions are exact sums: Christodoulou 2019, arXiv:1910.07207.

    Deviations from the paper: policy, critics and temperature take their gradients from the same weights, in one
    backward pass (the paper updates the critics first); with `n_step` above 1 the rewards' own entropy bonuses between
    the first and the last step are left out.

    Reads minibatches as `DQN` does.

    Args:
        alpha_lr: the temperature's learning rate; None takes `lr`.
        initial_alpha: the temperature, the weight of the entropy, when training begins.
        learn_alpha: whether the temperature is learned; else it stays.
        target_entropy: what the policy's entropy (nats) is held at by it. "auto" is minus the number of action
            dimensions; for discrete actions 0.98 log n, where n counts the legal ones.
        critic_warmup: updates in which the critics alone learn, before policy and temperature do: for a policy that is
            another run's, with critics that are new or were learned from other data.
    """

    TERMS: tuple[str, ...] = ("loss/value", "loss/policy", "policy/entropy", "value/q_mean", "value/td_error")

    def __init__(
        self,
        *,
        alpha_lr: Positive | None = None,
        initial_alpha: Positive = 1.0,
        learn_alpha: bool = True,
        target_entropy: Entropy = "auto",
        critic_warmup: CountOrZero = 0,
        **options: Any,
    ):
        super().__init__(**options)
        self.take_options()
        if critic_warmup and self.hp.compile:
            raise OptionError(
                f"critic_warmup={critic_warmup}: expected 0 with compile=True, whose step moves all parameters."
            )

    def build(self, spec: EnvSpec) -> None:
        super().build(spec)
        hp = self.hp
        log_alpha = torch.tensor(math.log(hp.initial_alpha))
        if hp.learn_alpha:
            self.log_alpha = nn.Parameter(log_alpha)
        else:
            self.register_buffer("log_alpha", log_alpha)
        size = self.policy.distribution.num_outputs
        auto = AUTO_ENTROPY * math.log(size) if self.is_discrete else -float(size)
        self.target_entropy = auto if hp.target_entropy == "auto" else hp.target_entropy

    def configure_optimizers(self) -> torch.optim.Optimizer:
        hp, learned = self.hp, self.parameters_by_lr()
        if hp.learn_alpha:
            learned.append((hp.alpha_lr, [self.log_alpha]))
        # One for each learning rate: a step costs by the group. The policy's is the first.
        groups: dict[float, list[nn.Parameter]] = {hp.actor_lr or hp.lr: []}
        for lr, parameters in learned:
            groups.setdefault(lr or hp.lr, []).extend(parameters)
        scaled = [{"params": parameters, "lr_scale": lr / hp.lr} for lr, parameters in groups.items()]
        return torch.optim.Adam(scaled, lr=hp.lr, eps=hp.adam_eps, fused=True)

    def update(self, batch: TensorDict) -> dict[str, Tensor | float]:
        alpha = self.log_alpha.detach().exp()
        if not self.is_discrete:
            self.draw_noise(batch)
        taken, (td_error, terms) = self.gradient_step(batch)
        set_priority(batch, td_error)
        for follow in self.followers:
            follow(self.hp.tau, taken)
        return {**dict(zip(self.TERMS, terms.unbind())), "policy/alpha": alpha}

    @property
    def critics_alone(self) -> bool:
        """Whether the critics alone learn now."""
        return self.hp.critic_warmup > 0 and self.updates_done < self.hp.critic_warmup

    def loss(self, batch: TensorDict) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The losses of critics, policy and temperature, each row's TD error [*N], and the means named by `TERMS`."""
        policy, critics = self.policy, self.critics
        obs, alpha = batch["observation"], self.log_alpha.detach().exp()
        feature, next_feature = features(policy, batch)
        critic_feature = critics.features(policy.inputs(obs), feature)
        if critics.encoder is None:
            feature = feature.detach()  # the critics alone train what they share with the policy
        with torch.no_grad():
            target = self.value_target(batch, next_feature, alpha)  # [*N, J]
        q = self.q_values(critics, critic_feature, batch["action"])
        assert q.shape[1:-1] == target.shape[:-1] == batch["next", "reward"].shape  # q [K, *N, Z]
        critic_loss = self.critic_loss(q, target)
        actor_loss, log_prob = self.actor_loss(batch, feature, critic_feature.detach(), alpha)
        assert critic_loss.shape == actor_loss.shape == log_prob.shape == target.shape[:-1]
        loss = weighted_mean(critic_loss, batch)
        if not self.critics_alone:
            loss = loss + self.policy_losses(batch, actor_loss, log_prob)
        with torch.no_grad():
            q_mean = q.mean((0, -1))
            td_error = (q_mean - target.mean(-1)).abs()
            terms = means_of_rows(batch, critic_loss, actor_loss, -log_prob, q_mean, td_error)
        return loss, (td_error, terms)

    def value_target(self, batch: TensorDict, next_feature: Tensor, alpha: Tensor) -> Tensor:
        """r + gamma^n (1 - terminated) (Q'(s', a') - alpha log pi(a'|s')), eqs. 3 and 5: [*N, J]."""
        policy, next_obs = self.policy, bootstrap_observation(batch)
        given = next_feature if self.target_policy is None else next_features(self.target_policy, batch)
        feature = self.target.features(policy.inputs(next_obs), given)
        parameters = policy.action_parameters(next_feature, next_obs)
        if self.is_discrete:
            log_probs = torch.log_softmax(parameters, -1)
            value = self.backup(self.split(self.target(feature)))  # [*N, A, J]
            next_value = (log_probs.exp().unsqueeze(-1) * (value - alpha * log_probs.unsqueeze(-1))).sum(-2)
        else:
            action, log_prob = self.sample(parameters, batch["next_noise"])
            next_value = self.backup(self.target(feature, action)) - alpha * log_prob.unsqueeze(-1)
        discount = batch["discount"] * ~batch["next", "terminated"]
        return batch["next", "reward"].unsqueeze(-1) + discount.unsqueeze(-1) * next_value

    def actor_loss(
        self, batch: TensorDict, feature: Tensor, critic_feature: Tensor, alpha: Tensor
    ) -> tuple[Tensor, Tensor]:
        """alpha log pi(a|s) - Q(s, a), eq. 7, and log pi(a|s), each [*N]; for discrete actions their expectations."""
        parameters = self.policy.action_parameters(feature, batch["observation"])
        if self.is_discrete:
            log_probs = torch.log_softmax(parameters, -1)
            with torch.no_grad():
                q = self.q_value(self.split(self.critics(critic_feature)))
            probs = log_probs.exp()
            return (probs * (alpha * log_probs - q)).sum(-1), (probs * log_probs).sum(-1).detach()
        action, log_prob = self.sample(parameters, batch["noise"])
        q = self.q_value(self.critics(critic_feature, action, frozen=True))
        return alpha * log_prob - q, log_prob.detach()

    def policy_losses(self, batch: TensorDict, actor_loss: Tensor, log_prob: Tensor) -> Tensor:
        """The means of the policy's losses and the temperature's, added up."""
        loss = mean_of_rows(actor_loss, batch)
        if not self.hp.learn_alpha:
            return loss
        return loss + mean_of_rows(self.alpha_loss(log_prob, self.entropy_target(batch["observation"])), batch)

    def alpha_loss(self, log_prob: Tensor, target_entropy: Tensor | float) -> Tensor:
        """-log(alpha) (log pi(a|s) + target entropy), [*N]: eq. 17, with log(alpha) in alpha's place.

        The temperature rises while the entropy is below its target.
        """
        return -self.log_alpha * (log_prob + target_entropy)

    def entropy_target(self, obs: Tree) -> Tensor | float:
        """What the entropy is held at; "auto" counts each observation's legal actions, [*N], if there is a mask."""
        if not (self.is_discrete and self.policy.has_masks and self.hp.target_entropy == "auto"):
            return self.target_entropy
        return AUTO_ENTROPY * self.policy.legal(obs).sum(-1).clamp(min=1).log()

    @torch.no_grad()
    def judge(self, batch: TensorDict) -> dict[str, Tensor]:
        obs, action = batch["observation"], batch["action"]
        if not self.is_discrete:
            self.draw_noise(batch, torch.Generator().manual_seed(0))
        feature, next_feature = features(self.policy, batch)
        critic_feature = self.critics.features(self.policy.inputs(obs), feature)
        target = self.value_target(batch, next_feature, self.log_alpha.exp()).mean(-1)
        q = self.q_values(self.critics, critic_feature, action).mean((0, -1))
        chosen = greedy_actions(self.policy, feature, obs)
        return judged(
            batch,
            td_error=(q - target).abs(),
            initial_value=self.q_value(self.q_values(self.critics, critic_feature, chosen)),
            action_difference=action_difference(self.policy, chosen, action),
        )

    # --- what a variant overrides -------------------------------------------------------------------------------

    def critic_loss(self, q: Tensor, target: Tensor) -> Tensor:
        """Of all critics together, [*N], for q [K, *N, Z] and target [*N, J]."""
        return 0.5 * (q - target).square().sum((0, -1))

    def backup(self, q: Tensor) -> Tensor:
        """What the target critics' [K, *N, Z] say of the next state, [*N, J]: here the minimum."""
        return q.amin(0)

    def q_value(self, q: Tensor) -> Tensor:
        """What the policy climbs, [*N], of the critics' [K, *N, Z]."""
        return q.amin(0).squeeze(-1)

    # ------------------------------------------------------------------------------------------------------------

    def draw_noise(self, batch: TensorDict, generator: torch.Generator | None = None) -> None:
        """Add what actions are made of, [*N, d] each: `next_noise` those of the target, `noise` those of the policy."""
        shape = (*batch["discount"].shape, self.policy.distribution.num_noise)
        for key in ("next_noise", "noise"):
            noise = torch.randn(shape, generator=generator or self.generator)
            batch[key] = noise.to(batch["discount"].device, non_blocking=True)

    def sample(self, parameters: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Actions and log-probabilities, differentiable."""
        distribution = self.policy.distribution
        assert isinstance(distribution, SquashedGaussian)
        return distribution.rsample(parameters, noise)


class TQC(SAC):
    """SAC with truncated quantile critics: Kuznetsov et al. 2020, arXiv:2005.04269.

    Each critic learns quantiles of the return; the greatest of all critics' quantiles are left out of the target,
    against overestimation. The policy climbs the mean of all.

    Args:
        num_quantiles: quantiles (Z) of each critic.
        num_dropped: greatest quantiles left out per critic.
    """

    def __init__(
        self,
        *,
        num_quantiles: Count = 25,
        num_dropped: CountOrZero = 2,
        **options: Any,
    ):
        super().__init__(**options)
        self.take_options()
        if num_dropped >= num_quantiles:
            raise OptionError(f"num_dropped={num_dropped}: expected less than num_quantiles={num_quantiles}.")

    def make_critics(self, encoder: nn.Module | None, num_outputs: int = 1) -> Critics:
        return super().make_critics(encoder, self.hp.num_quantiles)

    def critic_loss(self, q: Tensor, target: Tensor) -> Tensor:
        """Quantile regression of every critic towards the same targets: eq. 9, over Z as a mean."""
        return quantile_huber_loss(q, target).sum(0) / q.shape[-1]

    def backup(self, q: Tensor) -> Tensor:
        """All critics' quantiles in order, without the greatest: eq. 7."""
        pooled = torch.cat(q.unbind(0), -1).sort(-1).values
        return pooled[..., : pooled.shape[-1] - self.hp.num_dropped * len(q)]

    def q_value(self, q: Tensor) -> Tensor:
        return q.mean((0, -1))
