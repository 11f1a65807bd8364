"""Conservative Q-learning, for continuous and for discrete actions.

Shapes: *N rows, [M] or sequences [S, L]; F features, K critics, n actions of each kind, d numbers of an action; A
discrete actions, Z numbers that say something of each.
"""

import math
from typing import Any

import torch
from gymnasium import spaces
from tensordict import TensorDict
from torch import Tensor, nn

from lit_rl.distributions import LOG_2
from lit_rl.errors import OptionError, SpaceError
from lit_rl.modules.dqn import DQN
from lit_rl.modules.sac import SAC
from lit_rl.options import Count, CountOrZero, NonNegative, Positive, UnitInterval
from lit_rl.rollout import mean_of_rows, means_of_rows
from lit_rl.spec import EnvSpec
from lit_rl.transitions import bootstrap_observation, features, greedy_actions, of_action, weighted_mean

MOST_WEIGHT = 1e6  # of the conservative loss, where it is learned


class CQL(SAC):
    """Conservative Q-learning, CQL(H), on SAC: Kumar et al. 2020, arXiv:2006.04779, eq. 4 and appendix F.

    To SAC's critic loss it adds `min_q_weight` times the gap between a soft maximum of the values at s and the
    recorded action's. The soft maximum is a logsumexp over `num_actions` uniform actions, as many of the policy at s
    and as many of the policy at s', all valued at s, each less the log-density it was drawn with; no gradient flows
    into the actions. Targets have no entropy bonus.

    `calibrated=True` is Cal-QL (Nakamoto et al. 2023, arXiv:2303.05479): the policy's actions are not pushed below the
    recorded return, so that a run that goes on online need not unlearn it.

    Deviations from the paper: those of `SAC`; a learned weight begins at `min_q_weight` and is the only one.

    Reads minibatches as `DQN` does, with `calibrated` also `return_to_go, to_go_discount, to_go_observation` [M].

    Args:
        min_q_weight: weight of the gap, beside half the squared TD error (the paper's alpha); 0.5 to 10, the greater
            the narrower the data.
        num_actions: actions (n) of each of the three kinds.
        temperature: of the logsumexp.
        lagrangian: learn the weight, from `min_q_weight` on, at `alpha_lr`, such that the gap is held at
            `lagrangian_thresh`.
        lagrangian_thresh: the gap that is aimed at then (the paper's tau).
        bc_iters: first updates in which the policy imitates the recorded actions, with the entropy bonus, instead of
            climbing the critics.
        calibrated: value the policy's actions at least at the recorded return.
        actor_lr: the policy's learning rate, well below the critics'; None takes `lr`.
    """

    TERMS = (*SAC.TERMS, "cql/gap")
    OTHERWISE = "BC or MARWIL"

    def __init__(
        self,
        *,
        min_q_weight: Positive = 5.0,
        num_actions: Count = 10,
        temperature: Positive = 1.0,
        lagrangian: bool = False,
        lagrangian_thresh: float = 5.0,
        bc_iters: CountOrZero = 0,
        calibrated: bool = False,
        actor_lr: Positive | None = 1e-4,
        **options: Any,
    ):
        super().__init__(actor_lr=actor_lr, **options)
        self.take_options()

    def build(self, spec: EnvSpec) -> None:
        if isinstance(spec.action_space, spaces.Discrete):
            raise SpaceError(
                f"CQL needs a Box action space, got {spec.action_space} from env {spec.env_id!r}. Use DiscreteCQL."
            )
        super().build(spec)
        if self.hp.calibrated and self.policy.has_memory:
            raise OptionError(
                f"calibrated=True: {type(self.policy.encoder).__name__} has memory, and rows of sequences have no "
                "returns. Leave it out, or use a network without memory."
            )
        weight = torch.tensor(math.log(self.hp.min_q_weight))
        self.log_weight = nn.Parameter(weight) if self.hp.lagrangian else None

    @property
    def wants_returns_to_go(self) -> bool:
        return self.hp.calibrated

    def configure_optimizers(self) -> torch.optim.Optimizer:
        optimizer = super().configure_optimizers()
        if self.log_weight is not None:
            lr = self.hp.alpha_lr or self.hp.lr
            optimizer.add_param_group({"params": [self.log_weight], "lr_scale": lr / self.hp.lr})
        return optimizer

    def draw_noise(self, batch: TensorDict, generator: torch.Generator | None = None) -> None:
        super().draw_noise(batch, generator)
        shape = (*batch["discount"].shape, self.hp.num_actions, self.policy.distribution.num_noise)
        device, generator = batch["discount"].device, generator or self.generator
        uniform = 2 * torch.rand(shape, generator=generator) - 1
        batch["uniform_action"] = uniform.to(device, non_blocking=True)
        for key in ("several_noise", "several_next_noise"):
            batch[key] = torch.randn(shape, generator=generator).to(device, non_blocking=True)

    def update(self, batch: TensorDict) -> dict[str, Tensor | float]:
        if self.updates_done < self.hp.bc_iters:
            batch["imitates"] = torch.ones_like(batch["next", "terminated"])  # another loss, which is compiled apart
        metrics = super().update(batch)
        if self.log_weight is not None:
            with torch.no_grad():
                self.log_weight.clamp_(max=math.log(MOST_WEIGHT))
            metrics["cql/weight"] = self.log_weight.detach().exp()
        return metrics

    def loss(self, batch: TensorDict) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        hp, policy, critics = self.hp, self.policy, self.critics
        obs, alpha = batch["observation"], self.log_alpha.detach().exp()
        feature, next_feature = features(policy, batch)
        critic_feature = critics.features(policy.inputs(obs), feature)
        if critics.encoder is None:
            feature = feature.detach()  # the critics alone train what they share with the policy
        with torch.no_grad():
            target = self.value_target(batch, next_feature, alpha)  # [*N, 1]
            actions, density = self.drawn_actions(batch, feature, next_feature)
        q = self.q_values(critics, critic_feature, batch["action"])  # [K, *N, 1]
        gap = self.soft_maximum(batch, critic_feature, actions, density) - q.squeeze(-1)  # [K, *N]
        weight = hp.min_q_weight if self.log_weight is None else self.log_weight.exp()
        critic_loss = self.critic_loss(q, target)
        conservative_loss = (weight.detach() if isinstance(weight, Tensor) else weight) * gap.sum(0)
        imitates = batch.get("imitates", None) is not None
        actor_loss, log_prob = (self.imitation_loss if imitates else self.actor_loss)(
            batch, feature, critic_feature.detach(), alpha
        )
        assert critic_loss.shape == conservative_loss.shape == actor_loss.shape == log_prob.shape == target.shape[:-1]
        loss = weighted_mean(critic_loss + conservative_loss, batch)
        if not self.critics_alone:
            loss = loss + self.policy_losses(batch, actor_loss, log_prob)
        if self.log_weight is not None:  # it rises while the gap is above its threshold
            loss = loss - mean_of_rows(weight * (gap.detach().mean(0) - hp.lagrangian_thresh), batch)
        with torch.no_grad():
            q_mean = q.mean((0, -1))
            td_error = (q_mean - target.mean(-1)).abs()
            terms = means_of_rows(batch, critic_loss, actor_loss, -log_prob, q_mean, td_error, gap.mean(0))
        return loss, (td_error, terms)

    def value_target(self, batch: TensorDict, next_feature: Tensor, alpha: Tensor) -> Tensor:
        """r + gamma^n (1 - terminated) Q'(s', a'), [*N, 1]: without an entropy bonus."""
        return super().value_target(batch, next_feature, torch.zeros_like(alpha))

    def drawn_actions(self, batch: TensorDict, feature: Tensor, next_feature: Tensor) -> tuple[Tensor, Tensor]:
        """Actions [*N, 3n, d] to value at s, and the log-densities they were drawn with, [*N, 3n].

        Uniform ones, those of the policy at s, and those of the policy at s', in this order. Recorded actions lie in
        [-1, 1], whatever the environment's bounds are: the uniform log-density is -d log 2.
        """
        policy = self.policy
        here, log_prob_here = self.several(
            policy.action_parameters(feature, batch["observation"]), batch["several_noise"]
        )
        there, log_prob_there = self.several(
            policy.action_parameters(next_feature, bootstrap_observation(batch)), batch["several_next_noise"]
        )
        uniform = batch["uniform_action"]
        log_prob_uniform = torch.full_like(log_prob_here, -uniform.shape[-1] * LOG_2)
        actions = torch.cat([uniform, here, there], -2)
        return actions, torch.cat([log_prob_uniform, log_prob_here, log_prob_there], -1)

    def several(self, parameters: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Actions [*N, n, d] of distributions with parameters [*N, P], made of noise [*N, n, d], and log-densities."""
        repeated = parameters.unsqueeze(-2).expand(*noise.shape[:-1], -1)
        action, log_prob = self.sample(repeated, noise)
        return action.reshape(noise.shape), log_prob

    def soft_maximum(self, batch: TensorDict, critic_feature: Tensor, actions: Tensor, density: Tensor) -> Tensor:
        """log of the integral of exp(Q(s, a)) over all actions, estimated with those given, [K, *N].

        Args:
            batch: minibatch.
            critic_feature: of s, [*N, F].
            actions: [*N, 3n, d].
            density: the log-densities they were drawn with, [*N, 3n].
        """
        repeated = critic_feature.unsqueeze(-2).expand(*actions.shape[:-1], -1)
        q = self.critics(repeated, actions).squeeze(-1)  # [K, *N, 3n]
        if self.hp.calibrated:
            uniform, of_policy = q.split([self.hp.num_actions, 2 * self.hp.num_actions], -1)
            q = torch.cat([uniform, torch.maximum(of_policy, self.return_of(batch).unsqueeze(-1))], -1)
        return self.hp.temperature * torch.logsumexp((q - density) / self.hp.temperature, -1)

    @torch.no_grad()
    def return_of(self, batch: TensorDict) -> Tensor:
        """Discounted returns [M]: the rewards to the episode's end and, unless that was a termination, Q' after it."""
        policy, obs = self.policy, batch["to_go_observation"]
        inputs = policy.inputs(obs)
        feature = policy.encoder(inputs)
        action = greedy_actions(policy, feature, obs)
        given = feature if self.target_policy is None else self.target_policy.encoder(inputs)
        value = self.backup(self.target(self.target.features(inputs, given), action)).squeeze(-1)
        return batch["return_to_go"] + batch["to_go_discount"] * value

    def imitation_loss(
        self, batch: TensorDict, feature: Tensor, critic_feature: Tensor, alpha: Tensor
    ) -> tuple[Tensor, Tensor]:
        """alpha log pi(a|s) - log pi(a_data|s), in `actor_loss`'s place, and log pi(a|s), each [*N]."""
        parameters = self.policy.action_parameters(feature, batch["observation"])
        _, log_prob = self.sample(parameters, batch["noise"])
        log_prob_of_data, _ = self.log_prob_of_data(parameters, batch["action"], batch["noise"])
        return alpha * log_prob - log_prob_of_data, log_prob.detach()


class DiscreteCQL(DQN):
    """Conservative Q-learning, CQL(H), on double DQN, for Discrete actions: Kumar et al. 2020, arXiv:2006.04779.

    To DQN's loss it adds `min_q_weight` times logsumexp_a Q(s, a) - Q(s, a_data), over legal actions alone.

    Args:
        min_q_weight: weight of that gap, beside half the squared TD error (the paper's alpha); 0.5 to 4.
        epsilon: probability of a random action, if it goes on online; None as in `DQN`.
    """

    REPLAY = {**DQN.REPLAY, "batch_size": 256, "n_step": 1}
    TERMS = (*DQN.TERMS, "cql/gap")

    def __init__(self, *, min_q_weight: NonNegative = 1.0, epsilon: UnitInterval | None = 0.05, **options: Any):
        super().__init__(epsilon=epsilon, **options)
        self.take_options()

    def build(self, spec: EnvSpec) -> None:
        if not isinstance(spec.action_space, spaces.Discrete):
            instead = "CQL" if isinstance(spec.action_space, spaces.Box) else "BC or MARWIL"
            raise SpaceError(
                f"DiscreteCQL needs a Discrete action space, got {spec.action_space} from env {spec.env_id!r}. Use "
                f"{instead}."
            )
        super().build(spec)

    def loss(self, batch: TensorDict) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        policy, obs = self.policy, batch["observation"]
        if self.hp.double:
            feature, next_feature = features(policy, batch)
        else:
            feature, next_feature = policy.features(batch), None
        outputs = policy.distributions(feature)  # [*N, A, Z]
        with torch.no_grad():
            next_outputs = self.next_outputs(batch, next_feature)  # [*N, Z]
        output = of_action(outputs, batch["action"])
        td_loss, td_error = self.losses(batch, output, next_outputs)
        q = policy.expectation(output.unsqueeze(-2)).squeeze(-1)
        gap = torch.logsumexp(policy.rule_out(policy.expectation(outputs), obs), -1) - q
        assert td_loss.shape == td_error.shape == gap.shape == batch["next", "reward"].shape
        with torch.no_grad():
            terms = means_of_rows(batch, td_loss, td_error.abs(), q, gap)
        return weighted_mean(td_loss + self.hp.min_q_weight * gap, batch), (td_error, terms)
