"""APPO: IMPALA with a clipped surrogate objective and a target policy.

Shapes: B envs, T steps, F features.
"""

import math
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from lit_rl.actor_critic import Steps
from lit_rl.learner.host import Host
from lit_rl.learner.steps import where_taken
from lit_rl.learner.targets import Follower, target_of
from lit_rl.losses import approximate_kl, ppo_clip, value_loss
from lit_rl.modules.impala import IMPALA
from lit_rl.options import Count, NonNegative, Positive, PositiveFraction
from lit_rl.policy import Policy
from lit_rl.rollout import mean_of_rows, means_of_rows, new_rows
from lit_rl.spec import EnvSpec
from lit_rl.trees import Tree

TERMS = (
    "loss/policy", "loss/value", "policy/entropy", "policy/kl", "policy/clip_fraction", "vtrace/rho_mean",
    "vtrace/rho_clipped",
)  # fmt: skip


class APPO(IMPALA):
    """Asynchronous PPO: IMPACT of Luo et al. 2020, arXiv:1912.00167.

    Three policies: mu, which acted; the target policy pi_old, a copy of the policy and its normaliser that follows
    every `target_update_interval` gradient steps; and pi, which learns. V-trace corrects from mu to pi_old, the
    surrogate's ratio is that of pi to the one of mu and pi_old that is the less likely to have acted, clipped as in
    PPO.

    Deviations from the paper: those of `IMPALA`, whose advantages are taken too; the values are those of the present
    critic.

    Args:
        clip: how far the surrogate's probability ratio may leave 1 before its gradient stops; 0.1 to 0.4.
        vtrace: correct advantages and values for the policy's age. False takes those of `returns.gae`: the surrogate's
            ratio alone then corrects.
        target_clip: bound of mu / pi_old in that ratio, the paper's rho.
        target_update_interval: gradient steps between those of the target policy.
        tau: how far the target policy then moves to the policy: 1 copies it.
        kl_coef: weight of a penalty on KL(pi_old || pi), which is exact, unless a `policy_class` with an
            `evaluate_actions` of its own leaves an estimate from the actions taken alone. 0: no penalty.
    """

    CORRECTS = True

    target: Policy

    def __init__(
        self,
        *,
        clip: Positive = 0.4,
        target_clip: Positive = 2.0,
        target_update_interval: Count = 4,
        tau: PositiveFraction = 1.0,
        kl_coef: NonNegative = 0.0,
        **options: Any,
    ):
        super().__init__(**options)
        self.take_options()

    def build(self, spec: EnvSpec) -> None:
        super().build(spec)
        self.target = target_of(self.policy)
        self.follow = Follower(self.target, self.policy)

    def attach(self, host: Host) -> None:
        super().attach(host)
        self.follow = Follower(self.target, self.policy)  # since it was built it may share another policy's encoder
        if not host.is_resumed:  # the policy may be another run's since it was built
            self.follow(1.0)

    def update_steps(self, rollout: TensorDict) -> Steps:
        taken, terms = yield self.batch_of(rollout)
        self.update_normalizers(rollout, new_rows(rollout))
        if (self.updates_done + 1) % self.hp.target_update_interval == 0:
            self.follow(self.hp.tau, taken)
        return {name: mean for means in where_taken([taken], [terms]) for name, mean in zip(TERMS, means.unbind())}

    def loss(self, batch: TensorDict) -> tuple[Tensor, Tensor]:
        """The loss of a batch [B, T] of whole time lines, and the means of its terms, those of `TERMS`."""
        hp, behaviour = self.hp, batch["action_log_prob"]
        features = self.policy.features(batch)
        log_prob, entropy, value = self.evaluate(batch, features)  # [B, T] each
        with torch.no_grad():
            old_features = self.target.features(batch)
            old_log_prob, _ = self.target.evaluate(batch, old_features)
        log_rho = old_log_prob - behaviour
        advantage, target = self.targets(batch, value.detach(), log_rho)
        # log of clip(mu / pi_old, 0, target_clip) * pi / mu
        log_ratio = (-log_rho).clamp(max=math.log(hp.target_clip)) + log_prob - behaviour
        policy_loss = ppo_clip(log_ratio, advantage, hp.clip)
        critic_loss = value_loss(value, target)
        row_loss = policy_loss + self.value_coef.value * critic_loss - self.entropy_coef.value * entropy
        if type(self.policy).evaluate_actions is Policy.evaluate_actions:
            kl = self.kl(batch["observation"], features, old_features)
        else:  # from actions of mu
            kl = log_rho.exp().clamp(max=hp.target_clip) * approximate_kl(log_prob - old_log_prob)
        if hp.kl_coef:
            row_loss = row_loss + hp.kl_coef * kl
        clipped = ((log_ratio.detach().exp() - 1).abs() > hp.clip).float()
        with torch.no_grad():
            terms = means_of_rows(batch, policy_loss, critic_loss, entropy, kl, clipped, *self.rho(log_rho))
        return mean_of_rows(row_loss, batch), terms

    def kl(self, obs: Tree, features: Tensor, old_features: Tensor) -> Tensor:
        """KL(pi_old || pi), [B, T], of the action distributions that follow from features [B, T, F]."""
        old = self.target.action_parameters(old_features, obs)
        return self.policy.distribution.kl(old, self.policy.action_parameters(features, obs))
