"""MARWIL: imitation of recorded actions, the better ones more.

Shapes: *N rows, [M] or, without weights, sequences [S, L]; d numbers that an entropy is estimated with.
"""

import math
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from lit_rl import distributed
from lit_rl.errors import OptionError
from lit_rl.losses import value_loss
from lit_rl.networks import Network, ValueNetwork, build_network, check_same_in_training, has_memory
from lit_rl.off_policy import OffPolicy
from lit_rl.options import NonNegative, Positive, PositiveFraction, options_of
from lit_rl.rollout import mask_of, mean_of_rows, means_of_rows
from lit_rl.schedules import Schedule
from lit_rl.spec import EnvSpec
from lit_rl.transitions import action_difference, greedy_actions, judged
from lit_rl.trees import Tree

TERMS = ("loss/policy", "policy/log_prob", "policy/entropy")
WEIGHTED = ("loss/value", "imitation/weight")  # and these, where rows have weights
ONLY_WEIGHTED = (  # options that do nothing without weights
    "max_weight", "moving_average_sqd_adv_norm_update_rate", "value_coef", "normalize_values", "critic_network",
)  # fmt: skip


class MARWIL(OffPolicy):
    """Monotonic advantage re-weighted imitation learning: Wang et al. 2018, algorithm 1.

    "Exponentially Weighted Imitation Learning for Batched Historical Data", NeurIPS 2018.

    Recorded actions are imitated with weights exp(beta A / c). The advantage A is the discounted return from the row
    on, less the critic's value; after a truncation the critic's value of the final observation takes the place of the
    rewards that are missing. c^2 is a moving average of A^2. With `beta=0` all weights are 1 and there is no critic:
    that is `BC`.

    Deviations from the paper: c^2 is the mean of A^2 until the moving average is as long as that, so that it has no
    first value; weights are bounded; the critic learns normalised targets.

    The policy has the options of PPO's, so that `PPO(init_from=...)` can go on with it.

    Reads minibatches [M] of `observation, action, return_to_go, to_go_discount, to_go_observation`; writes
    `value_target` and `imitation_weight` [M]. With `beta=0` it reads `observation, action`, also as sequences [S, L]
    with `state`, `is_init` and `mask`.

    Args:
        beta: how much more a row counts whose advantage is greater: by a factor e^beta for every c of it; 0 to 3.
        max_weight: bound of the weights.
        moving_average_sqd_adv_norm_update_rate: weight of a minibatch in the moving average c^2; the n-th has at least
            the weight 1/n.
        value_coef: weight of the value loss, which has a factor 1/2 of its own.
        entropy_coef: weight of an entropy bonus, which keeps the policy from becoming too sure for training that
            follows; 0 to 0.01.
        lr: Adam's learning rate; usually 1e-4 to 1e-3.
        lr_schedule: "constant"; "linear" or "cosine", to 0 at the datamodule's `max_updates`; or points
            `[[update, lr], ...]`, which replace `lr`.
        adam_eps: what Adam adds to the root of the squared gradient.
        normalize_observations: shift and scale observations, but for images, by the mean and variance of all seen so
            far, and clip them to ±10.
        normalize_values: shift and scale value targets for the critic's loss by their running mean and standard
            deviation.
        critic_network: callable `(observation_space) -> nn.Module` with an `output_size`, the critic's own; None takes
            `network`.
        state_dependent_std: whether the standard deviations of Box actions depend on the observation.
        log_std_init: the log standard deviations of Box actions before training; -2 to 0.
        squash_actions: keep Box actions within their bounds by a tanh, as SAC does. The entropy is then estimated from
            one sample.
        compile: compile each gradient step as one function, see `CompiledStep`: for runs long enough to pay for
            ten seconds to a minute of compilation.

    Attributes:
        critic: of states; None with `beta=0`.
        squared_advantage: c^2; None with `beta=0`.
    """

    NETWORKS = ("network", "critic_network")

    critic: ValueNetwork | None
    squared_advantage: Tensor | None

    def __init__(
        self,
        *,
        beta: NonNegative = 1.0,
        max_weight: Positive = 20.0,
        moving_average_sqd_adv_norm_update_rate: PositiveFraction = 0.01,
        value_coef: NonNegative = 1.0,
        entropy_coef: NonNegative = 0.0,
        lr: Positive = 3e-4,
        lr_schedule: Schedule = "constant",
        adam_eps: Positive = 1e-8,
        normalize_observations: bool = False,
        normalize_values: bool = True,
        critic_network: Network | None = None,
        state_dependent_std: bool = False,
        log_std_init: float = 0.0,
        squash_actions: bool = False,
        compile: bool = False,
        **options: Any,
    ):
        super().__init__(**options)
        self.take_options()
        self.lr, self.critic_network = self.scheduled("lr"), critic_network
        given = {**self.hp, "critic_network": critic_network}
        for name in () if beta else ONLY_WEIGHTED:
            if given[name] != options_of(MARWIL)[name].default:  # type: ignore[index]
                raise OptionError(f"{name}={given[name]!r}: expected beta above 0, which gives rows weights.")

    def build(self, spec: EnvSpec) -> None:
        hp = self.hp
        self.build_actor(spec)
        if hp.beta and self.policy.has_memory:
            raise OptionError(
                f"beta={hp.beta:g}: {type(self.policy.encoder).__name__} has memory, and rows of sequences have no "
                "returns to weigh them by. Use a network without memory, or BC."
            )
        self.critic = None
        self.register_buffer("squared_advantage", torch.zeros(()) if hp.beta else None)
        if hp.beta:
            network, option = self.critic_network or self.network, "network"
            if self.critic_network is not None:
                option = "critic_network"
            encoder = build_network(network, self.policy.input_space, option)
            if has_memory(encoder):
                raise OptionError(f"{option}={type(encoder).__name__}: expected a network without memory.")
            self.critic = ValueNetwork(encoder, hp.normalize_values)
            check_same_in_training(self.critic)

    @property
    def wants_returns_to_go(self) -> bool:
        return self.hp.beta > 0

    def configure_optimizers(self) -> torch.optim.Optimizer:
        parameters = [*self.policy.parameters(), *(() if self.critic is None else self.critic.parameters())]
        return torch.optim.Adam(parameters, lr=self.hp.lr, eps=self.hp.adam_eps, fused=True)

    def update(self, batch: TensorDict) -> dict[str, Tensor | float]:
        if "weight" in batch.keys():  # noqa: SIM118
            raise OptionError(f"prioritized=True: {type(self).__name__} draws all rows alike. Leave it out.")
        if self.critic is not None:
            self.weigh(batch, self.critic)
        num_noise = self.policy.distribution.num_noise
        if num_noise:
            noise = torch.randn((*batch["next", "reward"].shape, num_noise), generator=self.generator)
            batch["entropy_noise"] = noise.to(batch["next", "reward"].device, non_blocking=True)
        _, terms = self.gradient_step(batch)
        self.policy.update_normalizer(batch["observation"], mask_of(batch))
        metrics: dict[str, Tensor | float] = dict(zip(TERMS + WEIGHTED, terms.unbind()))
        if self.squared_advantage is not None:
            metrics["imitation/squared_advantage"] = self.squared_advantage.clone()
        return metrics

    @torch.no_grad()
    def weigh(self, batch: TensorDict, critic: ValueNetwork) -> None:
        """Add `value_target` and `imitation_weight` [M] to a minibatch; c^2 has the minibatch's own advantages."""
        hp, mask, squared = self.hp, mask_of(batch), self.squared_advantage
        assert squared is not None
        if not self.updates_done:
            critic.begin_at(batch["return_to_go"], mask)
        target = self.return_of(batch, critic)
        advantage = target - self.value(batch["observation"], critic)
        newest = distributed.rank_mean(distributed.masked_mean(advantage.square(), mask))
        rate = max(hp.moving_average_sqd_adv_norm_update_rate, 1 / (self.updates_done + 1))
        squared.copy_(torch.where(newest.isfinite(), squared.lerp(newest, rate), squared))
        exponent = hp.beta * advantage / (squared.sqrt() + 1e-8)
        batch["imitation_weight"] = exponent.clamp(max=math.log(hp.max_weight)).exp()
        batch["value_target"] = target
        critic.take_targets(target, mask)

    def loss(self, batch: TensorDict) -> tuple[Tensor, Tensor]:
        """The loss of a minibatch, and the means of its terms: those of `TERMS`, and of `WEIGHTED` with weights."""
        hp = self.hp
        log_prob, entropy = self.policy.evaluate(batch)  # [*N]
        if self.critic is None:
            policy_loss = -log_prob
            row_loss, terms = policy_loss, [policy_loss, log_prob, entropy]
        else:
            weight = batch["imitation_weight"]
            policy_loss = -weight * log_prob
            value, target = self.value(batch["observation"], self.critic), batch["value_target"]
            critic_loss = value_loss(self.critic.normalized(value), self.critic.normalized(target))
            row_loss = policy_loss + hp.value_coef * critic_loss
            terms = [policy_loss, log_prob, entropy, critic_loss, weight]
        if hp.entropy_coef:
            row_loss = row_loss - hp.entropy_coef * entropy
        with torch.no_grad():
            means = means_of_rows(batch, *terms)
        return mean_of_rows(row_loss, batch), means

    def return_of(self, batch: TensorDict, critic: ValueNetwork) -> Tensor:
        """Discounted returns [M]: the rewards to the episode's end and, unless that was a termination, V after it."""
        return batch["return_to_go"] + batch["to_go_discount"] * self.value(batch["to_go_observation"], critic)

    def value(self, obs: Tree, critic: ValueNetwork) -> Tensor:
        """The critic's values of raw observations, [M]."""
        return critic(self.policy.inputs(obs))

    @torch.no_grad()
    def judge(self, batch: TensorDict) -> dict[str, Tensor]:
        obs, action, policy = batch["observation"], batch["action"], self.policy
        features = policy.features(batch)
        num_noise = policy.distribution.num_noise
        if num_noise:  # of an entropy that is not asked for
            batch["entropy_noise"] = torch.zeros((*features.shape[:-1], num_noise), device=features.device)
        log_prob, _ = policy.evaluate(batch, features)
        difference = action_difference(policy, greedy_actions(policy, features, obs), action)
        values = {"log_prob": log_prob, "action_difference": difference}
        if self.critic is not None:
            value = self.value(obs, self.critic)
            td_error = (self.return_of(batch, self.critic) - value).abs()
            values |= {"td_error": td_error, "initial_value": value}
        return judged(batch, **values)
