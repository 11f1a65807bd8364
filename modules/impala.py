"""IMPALA: an actor-critic that learns from actions of older policies.

Shapes: B envs, T steps.
"""

from typing import Annotated, Any

import torch
from tensordict import TensorDict
from torch import Tensor

from lit_rl import distributed, returns
from lit_rl.actor_critic import ActorCritic, Steps
from lit_rl.central import CentralInput
from lit_rl.distributed import standardize
from lit_rl.errors import OptionError
from lit_rl.learner.host import Host
from lit_rl.learner.rmsprop import RMSprop
from lit_rl.learner.steps import where_taken
from lit_rl.losses import approximate_kl, value_loss
from lit_rl.networks import Network
from lit_rl.options import CountOrZero, NonNegative, OneOf, Positive, UnitInterval
from lit_rl.rollout import (
    bootstrap_values,
    burnt_in,
    followed_by,
    length_of,
    mask_of,
    mean_of_rows,
    means_of_rows,
    more_padded,
    new_rows,
    next_values_with_memory,
    power_of_2,
    time_lines,
)
from lit_rl.schedules import Schedule

Optimizer = Annotated[str, OneOf("adam", "rmsprop")]
TERMS = ("loss/policy", "loss/value", "policy/entropy", "policy/kl", "vtrace/rho_mean", "vtrace/rho_clipped")


class IMPALA(ActorCritic):
    """Importance weighted actor-learner architecture: Espeholt et al. 2018, arXiv:1802.01561.

    Policy gradient with V-trace targets, which correct for the versions that the policy moved on since its runners
    acted. One gradient step per batch, on whole time lines.

    Deviations from the paper: after a time limit the value of the final observation is bootstrapped; losses are means
    over rows, not sums over time; Adam instead of RMSProp unless asked for; policy and critic are separate networks.

    With memory (`network=LSTMNetwork`) policy and critic share the encoder, and gradients flow back through a time line
    to its start, or to the start of its episode.

    A rollout may come again, or hold rows that did: where it says so by `is_new`, statistics take each row once.

    Reads a rollout's `observation, action, action_log_prob` and `("next", "reward" | "terminated" | "done")`, each
    [B, T, ...], its last and final observations, and `mask`, `length` and `is_new` if there are.

    Args:
        lr: the optimizer's learning rate; usually 1e-4 to 1e-3.
        lr_schedule: "constant"; "linear" or "cosine", to 0 at the datamodule's `max_env_steps`; or points
            `[[env_step, lr], ...]`, which replace `lr`.
        optimizer: "adam", or "rmsprop" as the paper has it, whose `epsilon` is inside the root.
        adam_eps: what Adam adds to the root of the squared gradient.
        rmsprop_decay: of the running mean of squared gradients.
        rmsprop_eps: what is added to that mean; the 0.1 of the paper's code is for losses summed over N rows: for the
            means here it is 0.1 / N^2.
        gamma: discount per env step; 0.9 to 0.999.
        vtrace: correct for the policy's age. False takes the targets of `returns.gae`, and is right on-policy alone.
        lambda_: 0 (one-step, biased) to 1 (to the end of the time line, noisy); the paper has 1.
        vtrace_clip_rho_threshold: bound of the probability ratio in the temporal difference: it decides between which
            policies the values are.
        vtrace_clip_pg_rho_threshold: bound of the ratio that weighs the policy's gradient.
        value_coef: weight of the value loss, which has a factor 1/2 of its own.
        value_coef_schedule: of `value_coef`, as `lr_schedule` is of `lr`.
        entropy_coef: weight of the entropy bonus; 0 to 0.02.
        entropy_coef_schedule: of `entropy_coef`, as `lr_schedule` is of `lr`.
        normalize_advantage: shift and scale the batch's advantages to mean 0 and standard deviation 1.
        normalize_observations: shift and scale observations, but for images, by the mean and variance of all seen so
            far, and clip them to ±10.
        normalize_returns: divide rewards by the running standard deviation of the discounted return inside of rollouts,
            and clip them to ±10.
        share_encoder: whether policy and critic share one network, instead of one each; None shares one with memory.
        central_critic: what the critic sees beside the agent's own observation and id, with several agents: "state",
            the environment's `state()`; "observations", those of all agents; None, nothing, not even the id.
        critic_network: callable `(observation_space) -> nn.Module` with an `output_size`, the critic's own, without
            memory. None takes `network`; if that has memory, a critic shares it, unless it is central: then it has the
            default network of what it sees.
        state_dependent_std: whether the standard deviations of Box actions depend on the observation.
        log_std_init: the log standard deviations of Box actions before training; -2 to 0.
        squash_actions: keep Box actions within their bounds by a tanh, instead of clipping what the environment gets.
            The entropy is then estimated from one sample.
        burn_in: the first steps of each time line, fewer than `rollout_length`, which refresh the memory alone: they
            are not learned from.
        compile: compile each gradient step as one function, see `CompiledStep`: for runs long enough to pay for
            ten seconds to a minute of compilation.
    """

    LEARNS_AGAIN = True
    CORRECTS = False  # whether the loss is right for older policies' actions without V-trace

    def __init__(
        self,
        *,
        lr: Positive = 5e-4,
        lr_schedule: Schedule = "constant",
        optimizer: Optimizer = "adam",
        adam_eps: Positive = 1e-5,
        rmsprop_decay: UnitInterval = 0.99,
        rmsprop_eps: Positive = 0.1,
        gamma: UnitInterval = 0.99,
        vtrace: bool = True,
        lambda_: UnitInterval = 1.0,
        vtrace_clip_rho_threshold: Positive = 1.0,
        vtrace_clip_pg_rho_threshold: Positive = 1.0,
        value_coef: NonNegative = 0.5,
        value_coef_schedule: Schedule = "constant",
        entropy_coef: NonNegative = 0.01,
        entropy_coef_schedule: Schedule = "constant",
        max_grad_norm: Positive | None = 40.0,
        normalize_advantage: bool = False,
        normalize_observations: bool = False,
        normalize_returns: bool = False,
        share_encoder: bool | None = None,
        central_critic: CentralInput | None = None,
        critic_network: Network | None = None,
        state_dependent_std: bool = False,
        log_std_init: float = 0.0,
        squash_actions: bool = False,
        burn_in: CountOrZero = 0,
        compile: bool = False,
        **options: Any,
    ):
        super().__init__(critic_network=critic_network, max_grad_norm=max_grad_norm, **options)
        self.take_options()
        self.lr = self.scheduled("lr")
        self.value_coef, self.entropy_coef = self.scheduled("value_coef"), self.scheduled("entropy_coef")

    def attach(self, host: Host) -> None:
        super().attach(host)
        hp, lag = self.hp, host.source.policy_lag
        if self.critic_has_memory:
            raise OptionError(
                f"critic_network={type(self.critic.encoder).__name__}: expected a network without memory, since time "
                "lines may come in any order. Use PPO, or leave it out."
            )
        if host.source.rollout_shape is not None and hp.burn_in >= host.source.rollout_shape[1]:
            raise OptionError(
                f"burn_in={hp.burn_in}: expected fewer steps than rollout_length={host.source.rollout_shape[1]}, of "
                "which the rest is learned from. Lower it, or collect longer rollouts."
            )
        if hp.compile and hp.normalize_advantage and distributed.world_size() > 1:
            raise OptionError(
                "normalize_advantage=True: with compile=True and several learner processes the advantages are known "
                "inside of the compiled step alone, where processes cannot ask each other. Leave one of them out."
            )
        if lag and not hp.vtrace and not self.CORRECTS:
            raise OptionError(
                f"vtrace=False: {type(self).__name__} then learns as if its own policy had acted, but rows are {lag} "
                "updates old. Leave it out, or collect with prefetch=0 and num_reuses=1."
            )

    def configure_optimizers(self) -> torch.optim.Optimizer:
        hp, parameters = self.hp, [*self.policy.parameters(), *self.critic.parameters()]
        if hp.optimizer == "rmsprop":
            return RMSprop(parameters, lr=hp.lr, decay=hp.rmsprop_decay, eps=hp.rmsprop_eps)
        return torch.optim.Adam(parameters, lr=hp.lr, eps=hp.adam_eps, fused=True)

    def update_steps(self, rollout: TensorDict) -> Steps:
        taken, terms = yield self.batch_of(rollout)
        self.update_normalizers(rollout, new_rows(rollout))
        return {name: mean for means in where_taken([taken], [terms]) for name, mean in zip(TERMS, means.unbind())}

    def loss(self, batch: TensorDict) -> tuple[Tensor, Tensor]:
        """The loss of a batch [B, T] of whole time lines, and the means of its terms, those of `TERMS`."""
        log_prob, entropy, value = self.evaluate(batch, self.policy.features(batch))  # [B, T] each
        log_ratio = log_prob.detach() - batch["action_log_prob"]
        advantage, target = self.targets(batch, value.detach(), log_ratio)
        policy_loss = -advantage * log_prob
        critic_loss = value_loss(value, target)
        row_loss = policy_loss + self.value_coef.value * critic_loss - self.entropy_coef.value * entropy
        with torch.no_grad():
            kl = approximate_kl(log_ratio)
            terms = means_of_rows(batch, policy_loss, critic_loss, entropy, kl, *self.rho(log_ratio))
        return mean_of_rows(row_loss, batch), terms

    def evaluate(self, batch: TensorDict, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities of a batch's actions, the entropies, and the values of its observations, each [B, T].

        Args:
            batch: [B, T, ...].
            features: the policy's, of the batch, [B, T, F].
        """
        log_prob, entropy = self.policy.evaluate(batch, features)
        value = self.value_of(batch, features)
        assert log_prob.shape == entropy.shape == value.shape == batch["action_log_prob"].shape
        return log_prob, entropy, value

    def rho(self, log_ratio: Tensor) -> tuple[Tensor, Tensor]:
        """V-trace's bounded ratio of probabilities, and whether (1.0) the bound changed it, each [*B]."""
        ratio, bound = log_ratio.exp(), self.hp.vtrace_clip_rho_threshold
        return ratio.clamp(max=bound), (ratio > bound).float()

    @torch.no_grad()
    def targets(self, batch: TensorDict, value: Tensor, log_ratio: Tensor) -> tuple[Tensor, Tensor]:
        """Advantages and value targets [B, T], corrected for actions that are `log_ratio` likelier now."""
        hp, mask, length = self.hp, mask_of(batch), length_of(batch)
        reward, terminated, done = (batch["next", key] for key in ("reward", "terminated", "done"))
        next_value = followed_by(value, batch["bootstrap_value"], done, length)
        if hp.vtrace:
            advantage, target = returns.vtrace(
                log_ratio,
                reward,
                terminated,
                done,
                value,
                next_value,
                gamma=hp.gamma,
                lambda_=hp.lambda_,
                rho_clip=hp.vtrace_clip_rho_threshold,
                policy_rho_clip=hp.vtrace_clip_pg_rho_threshold,
                length=length,
            )
        else:
            advantage, target = returns.gae(
                reward, terminated, done, value, next_value, gamma=hp.gamma, lambda_=hp.lambda_, length=length
            )
        return standardize(advantage, mask) if hp.normalize_advantage else advantage, target

    def batch_of(self, rollout: TensorDict) -> TensorDict:
        """What the loss needs of a rollout: its time lines [B, T], and what follows their ends, `bootstrap_value`.

        Rewards are scaled, which takes them into the statistics.
        """
        hp, policy = self.hp, self.policy
        batch = time_lines(rollout, *self.critic_keys, "action", "action_log_prob", "is_init")
        batch["next"] = rollout["next"].select("reward", "terminated", "done")
        if self.return_normalizer is not None:
            reward, done = rollout["next", "reward"], rollout["next", "done"]
            scaled = self.return_normalizer.scale_apart(reward, done, rollout["is_init"], new_rows(rollout))
            batch["next", "reward"] = scaled
        with torch.no_grad():
            if policy.has_memory and self.shares_encoder:
                found = next_values_with_memory(rollout, policy.unroll, self.critic)
                batch["bootstrap_value"] = found.next_value
            else:
                batch["bootstrap_value"] = bootstrap_values(rollout, self.value, self.critic_keys)
        if length_of(batch) is not None:  # time lines are of another length in each batch
            lines, steps = batch["is_init"].shape
            if hp.compile:  # once for every power of two
                batch = more_padded(batch, power_of_2(lines), power_of_2(steps))
            elif steps <= hp.burn_in:
                batch = more_padded(batch, lines, hp.burn_in + 1)
        if hp.burn_in:
            batch = burnt_in(batch, hp.burn_in)
        if policy.distribution.num_noise:
            shape = (*batch["action_log_prob"].shape, policy.distribution.num_noise)
            noise = torch.randn(shape, generator=self.generator)
            batch["entropy_noise"] = noise.to(batch["action_log_prob"].device, non_blocking=True)
        return batch
