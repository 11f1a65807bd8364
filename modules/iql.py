"""Implicit Q-learning.

Shapes: *N rows, [M] or sequences [S, L]; F features, K critics, d numbers that an entropy is estimated with.
"""

import math
from typing import Annotated, Any

import torch
from tensordict import TensorDict
from torch import Tensor

from lit_rl.losses import expectile_loss
from lit_rl.networks import output_size
from lit_rl.networks.ensemble import Critics
from lit_rl.options import NonNegative, Positive, Within
from lit_rl.q_actor_critic import QActorCritic
from lit_rl.rollout import mean_of_rows, means_of_rows
from lit_rl.schedules import Schedule, Scheduled
from lit_rl.spec import EnvSpec
from lit_rl.transitions import (
    action_difference,
    bootstrap_observation,
    features,
    greedy_actions,
    judged,
    set_priority,
    weighted_mean,
)
from lit_rl.trees import Tree

Expectile = Annotated[float, Within(0.0, 1.0, open_low=True, open_high=True)]
TERMS = (
    "loss/value", "loss/state_value", "loss/policy", "policy/log_prob", "policy/entropy", "value/q_mean",
    "value/td_error", "imitation/weight",
)  # fmt: skip


class IQL(QActorCritic):
    """Implicit Q-learning: Kostrikov et al. 2021, arXiv:2110.06169, algorithm 1.

    No value of an action that was not recorded is ever asked for: V is an expectile of the recorded actions' values,
    towards the best of them, and the policy imitates recorded actions with weights exp(beta (Q - V)).

    Deviations from the paper: the policy is SAC's, a squashed Gaussian whose standard deviations depend on the
    observation, so that `SAC(init_from=...)` can go on with policy, critics and target critics; Discrete actions may be
    learned too. V, Q and policy take their gradients from the same weights, in one backward pass.

    Reads minibatches as `DQN` does.

    Args:
        expectile: of the recorded actions' values that V is; 0.5 is their mean, and values beyond 0.9 come close to the
            best one's, and to its noise.
        beta: the inverse temperature of the policy's weights: 0 is imitation of all actions alike; 3 to 10.
        max_weight: bound of these weights.
        actor_lr_schedule: of the policy's learning rate: "cosine" or "linear", to 0 at the datamodule's budget
            (`max_updates`); "constant"; or points `[[update, lr], ...]`, which replace `actor_lr`.
        value_lr: of V; None takes `lr`.

    Attributes:
        state_value: V, which has layers and an encoder like a critic's.
    """

    OTHERWISE = "MARWIL"

    state_value: Critics

    def __init__(
        self,
        *,
        expectile: Expectile = 0.7,
        beta: NonNegative = 3.0,
        max_weight: Positive = 100.0,
        actor_lr_schedule: Schedule = "cosine",
        value_lr: Positive | None = None,
        **options: Any,
    ):
        super().__init__(**options)
        self.take_options()
        self.actor_lr = Scheduled("actor_lr", self.hp.actor_lr or self.hp.lr, actor_lr_schedule)

    def build(self, spec: EnvSpec) -> None:
        super().build(spec)
        shares = self.critics.encoder is None
        encoder = None if shares else self.make_critic_encoder()
        self.state_value = Critics(
            encoder,
            num=1,
            num_features=output_size(self.policy.encoder if encoder is None else encoder),
            num_actions=0,
            hidden_sizes=self.hp.critic_hidden_sizes,
            output_size=1,
        )

    def configure_optimizers(self) -> torch.optim.Optimizer:
        hp = self.hp
        groups: dict[str, list[torch.nn.Parameter]] = {"policy": [], "critics": [], "value": []}
        shared = set() if self.critics.encoder is not None else {*self.policy.encoder.parameters()}
        for parameter in self.policy.parameters():
            groups["critics" if parameter in shared else "policy"].append(parameter)
        groups["critics"] += self.critics.parameters()
        groups["value"] += self.state_value.parameters()
        rates = {"policy": hp.actor_lr, "critics": hp.critic_lr, "value": hp.value_lr}
        scaled = [{"params": found, "lr_scale": (rates[name] or hp.lr) / hp.lr} for name, found in groups.items()]
        return torch.optim.Adam(scaled, lr=hp.lr, eps=hp.adam_eps, fused=True)

    def follow_schedules(self) -> None:
        super().follow_schedules()
        if self._host is not None:  # the policy's group is the first
            self._host.param_groups[0]["lr"] = self.actor_lr.at(self.clock, self.budget)

    def update(self, batch: TensorDict) -> dict[str, Tensor | float]:
        num_noise = self.policy.distribution.num_noise
        if num_noise:
            noise = torch.randn((*batch["discount"].shape, num_noise), generator=self.generator)
            batch["entropy_noise"] = noise.to(batch["discount"].device, non_blocking=True)
        taken, (td_error, terms) = self.gradient_step(batch)
        set_priority(batch, td_error)
        for follow in self.followers:
            follow(self.hp.tau, taken)
        return dict(zip(TERMS, terms.unbind()))

    def loss(self, batch: TensorDict) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The losses of V, critics and policy, each row's TD error [*N], and the means named by `TERMS`."""
        hp, policy, critics = self.hp, self.policy, self.critics
        obs, action = batch["observation"], batch["action"]
        feature, next_feature = features(policy, batch)
        critic_feature = critics.features(policy.inputs(obs), feature)
        if critics.encoder is None:
            feature = feature.detach()  # the critics alone train what they share with the policy
        with torch.no_grad():
            target_q = self.target_q(batch, feature)
            target = self.value_target(batch, next_feature)
        advantage = target_q - self.value_of(obs, feature)  # Q - V, [*N]
        state_value_loss = expectile_loss(advantage, hp.expectile)  # eq. 5
        q = self.q_values(critics, critic_feature, action)  # [K, *N, 1]
        critic_loss = 0.5 * (q.squeeze(-1) - target).square().sum(0)  # eq. 6
        weight = (hp.beta * advantage.detach()).clamp(max=math.log(hp.max_weight)).exp()
        parameters = policy.action_parameters(feature, obs)
        log_prob, entropy = self.log_prob_of_data(parameters, action, batch.get("entropy_noise", None))
        actor_loss = -weight * log_prob  # eq. 7
        assert critic_loss.shape == state_value_loss.shape == actor_loss.shape == batch["next", "reward"].shape
        loss = weighted_mean(critic_loss, batch) + mean_of_rows(state_value_loss + actor_loss, batch)
        with torch.no_grad():
            q_mean = q.mean((0, -1))
            td_error = (q_mean - target).abs()
            terms = means_of_rows(
                batch, critic_loss, state_value_loss, actor_loss, log_prob, entropy, q_mean, td_error, weight
            )
        return loss, (td_error, terms)

    def target_q(self, batch: TensorDict, feature: Tensor) -> Tensor:
        """The smallest of the target critics' values of the recorded actions, [*N]."""
        given = feature if self.target_policy is None else self.target_policy.features(batch)
        target_feature = self.target.features(self.policy.inputs(batch["observation"]), given)
        return self.q_values(self.target, target_feature, batch["action"]).amin(0).squeeze(-1)

    def value_target(self, batch: TensorDict, next_feature: Tensor) -> Tensor:
        """r + gamma^n (1 - terminated) V(s'), [*N]."""
        discount = batch["discount"] * ~batch["next", "terminated"]
        return batch["next", "reward"] + discount * self.value_of(bootstrap_observation(batch), next_feature)

    def value_of(self, obs: Tree, feature: Tensor) -> Tensor:
        """V of observations whose features by the policy's encoder are [*N, F]; [*N]."""
        own = self.state_value.features(self.policy.inputs(obs), feature)
        return self.state_value(own).squeeze(0).squeeze(-1)

    @torch.no_grad()
    def judge(self, batch: TensorDict) -> dict[str, Tensor]:
        obs, action = batch["observation"], batch["action"]
        feature, next_feature = features(self.policy, batch)
        critic_feature = self.critics.features(self.policy.inputs(obs), feature)
        q = self.q_values(self.critics, critic_feature, action).mean((0, -1))
        chosen = greedy_actions(self.policy, feature, obs)
        return judged(
            batch,
            td_error=(q - self.value_target(batch, next_feature)).abs(),
            initial_value=self.value_of(obs, feature),
            action_difference=action_difference(self.policy, chosen, action),
        )
