"""Proximal Policy Optimization."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from lit_rl import returns
from lit_rl.actor_critic import ActorCritic, Steps
from lit_rl.central import CentralInput
from lit_rl.distributed import greatest, rank_mean, standardize
from lit_rl.errors import OptionError
from lit_rl.learner.host import Host
from lit_rl.learner.steps import where_taken
from lit_rl.losses import approximate_kl, clipped_value_loss, ppo_clip, value_loss
from lit_rl.networks import Network
from lit_rl.options import Count, CountOrZero, NonNegative, Positive, UnitInterval
from lit_rl.rollout import (
    length_of,
    mask_of,
    mean_of_rows,
    means_of_rows,
    next_values,
    next_values_with_memory,
    rows,
    sequences,
    states_before,
)
from lit_rl.schedules import Schedule
from lit_rl.spec import EnvSpec
from lit_rl.trees import Tree, leaves, map_tree

TERMS = ("loss/policy", "loss/value", "policy/entropy", "policy/kl", "policy/clip_fraction")
KL = TERMS.index("policy/kl")


class PPO(ActorCritic):
    """PPO with clipped surrogate objective: Schulman et al. 2017, arXiv:1707.06347, algorithm 1.

    Advantages are generalised advantage estimates (arXiv:1506.02438); after a time limit the value of the final
    observation is bootstrapped. Deviations from the paper, as in most implementations: advantages are standardised
    (over the rollout), gradients are clipped, policy and critic are separate networks with orthogonal weights.

    With memory (`network=LSTMNetwork`), policy and critic share the encoder. The loss is taken over sequences of
    `sequence_length` steps: gradients flow through time inside of each, back to the start of its episode.

    Reads a rollout's `observation, action, action_log_prob` and `("next", "reward" | "terminated" | "done")`, each
    [B, T, ...], its last and final observations, and `mask` and `length` if there are; writes `advantage` and
    `value_target` [B, T].

    Args:
        lr: Adam's learning rate; usually 1e-4 to 1e-3.
        lr_schedule: "constant"; "linear" or "cosine", to 0 at the datamodule's `max_env_steps`; or points
            `[[env_step, lr], ...]`, which replace `lr`.
        adam_eps: what Adam adds to the root of the squared gradient, 1e-8 to 1e-5.
        gamma: discount per env step; 0.9 to 0.999.
        gae_lambda: 0 (one-step, biased) to 1 (Monte-Carlo, noisy); usually 0.9 to 0.98.
        clip: how far the probability ratio may leave 1 before its gradient stops; 0.1 to 0.3.
        clip_schedule: of `clip`, as `lr_schedule` is of `lr`.
        value_coef: weight of the value loss, which has a factor 1/2 of its own.
        value_clip: how far a value may move from the one before the update until its gradient stops, in units of the
            return: 0.2 suits normalised returns alone. None: any way.
        entropy_coef: weight of the entropy bonus; 0 to 0.02.
        entropy_coef_schedule: of `entropy_coef`, as `lr_schedule` is of `lr`.
        kl_coef: first weight of a penalty on the KL divergence from the policy that acted (the paper's section 4);
            after an update in which it exceeded twice `kl_target` the weight is multiplied by 1.5, and halved after
            one in which it stayed below half of it. 0: no penalty.
        kl_target: the KL divergence the penalty aims at.
        target_kl: an update ends after the gradient step whose minibatch exceeds this KL divergence, usually 0.01 to
            0.05; None: never.
        num_epochs: passes over each rollout; 3 to 20. Fewer passes and larger minibatches are faster per env step.
        minibatch_size: rows per gradient step and rank; at most the B T rows of a rollout.
        normalize_advantage: shift and scale the rollout's advantages to mean 0 and standard deviation 1.
        normalize_observations: shift and scale observations, but for images, by the mean and variance of all seen so
            far, and clip them to ±10.
        normalize_returns: divide rewards by the running standard deviation of the discounted return, and clip them to
            ±10.
        normalize_values: shift and scale value targets for the critic's loss by their running mean and standard
            deviation, `value_clip` included; None does so with a central critic.
        share_encoder: whether policy and critic share one network, instead of one each; None shares one with memory.
        central_critic: what the critic sees beside the agent's own observation and id, with several agents: "state",
            the environment's `state()`; "observations", those of all agents; None, nothing, not even the id.
        critic_network: callable `(observation_space) -> nn.Module` with an `output_size`, the critic's own. If it has
            memory, that is its own state, which goes on from rollout to rollout. None takes `network`; if that has
            memory, a critic shares it, unless it is central: then it has the default network of what it sees.
        state_dependent_std: whether the standard deviations of Box actions depend on the observation.
        log_std_init: the log standard deviations of Box actions before training; -2 to 0. Small ones suit many MuJoCo
            tasks.
        squash_actions: keep Box actions within their bounds by a tanh, instead of clipping what the environment gets.
            The entropy is then estimated from one sample.
        sequence_length: steps of each sequence that a network with memory is trained on; divides `rollout_length`.
        burn_in: steps before each sequence that refresh the memory first, without gradients; at most `sequence_length`.
        compile: compile each gradient step as one function, see `CompiledStep`: for runs long enough to pay for
            ten seconds to a minute of compilation.
    """

    OF_ONE_RANK = ("running_return", "critic_state")
    RENAMED = {"entropy_schedule": "entropy_coef_schedule"}

    kl_coef: Tensor | None
    critic_state: Tree = None  # of a critic with a memory of its own, after the last rollout, [B, ...]
    steps_per_pass: int

    def __init__(
        self,
        *,
        lr: Positive = 3e-4,
        lr_schedule: Schedule = "constant",
        adam_eps: Positive = 1e-5,
        gamma: UnitInterval = 0.99,
        gae_lambda: UnitInterval = 0.98,
        clip: Positive = 0.2,
        clip_schedule: Schedule = "constant",
        value_coef: NonNegative = 0.5,
        value_clip: Positive | None = None,
        entropy_coef: NonNegative = 0.0,
        entropy_coef_schedule: Schedule = "constant",
        kl_coef: NonNegative = 0.0,
        kl_target: Positive = 0.01,
        target_kl: Positive | None = None,
        num_epochs: Count = 10,
        minibatch_size: Count = 64,
        max_grad_norm: Positive | None = 0.5,
        normalize_advantage: bool = True,
        normalize_observations: bool = False,
        normalize_returns: bool = True,
        normalize_values: bool | None = None,
        share_encoder: bool | None = None,
        central_critic: CentralInput | None = None,
        critic_network: Network | None = None,
        state_dependent_std: bool = False,
        log_std_init: float = 0.0,
        squash_actions: bool = False,
        sequence_length: Count = 16,
        burn_in: CountOrZero = 0,
        compile: bool = False,
        **options: Any,
    ):
        super().__init__(critic_network=critic_network, max_grad_norm=max_grad_norm, **options)
        self.take_options()
        if burn_in > sequence_length:
            raise OptionError(f"burn_in={burn_in}: expected at most sequence_length={sequence_length}.")
        self.lr, self.clip = self.scheduled("lr"), self.scheduled("clip")
        self.entropy_coef = self.scheduled("entropy_coef")

    def build(self, spec: EnvSpec) -> None:
        super().build(spec)
        # Depends on what was learned, but is no weight: in checkpoints it is with the rest of what resumes a run.
        kl_coef = self.hp.kl_coef
        self.register_buffer("kl_coef", torch.tensor(float(kl_coef)) if kl_coef else None, persistent=False)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        parameters = [*self.policy.parameters(), *self.critic.parameters()]
        return torch.optim.Adam(parameters, lr=self.hp.lr, eps=self.hp.adam_eps, fused=True)

    def update_steps(self, rollout: TensorDict) -> Steps:
        hp, mask, length = self.hp, mask_of(rollout), length_of(rollout)
        with torch.no_grad():
            value, next_value, states = self.values(rollout)
            reward, terminated, done = (rollout["next", key] for key in ("reward", "terminated", "done"))
            if self.return_normalizer is not None:
                reward = self.return_normalizer.scale(reward, done, mask, rollout["is_init"], length)
            advantage, value_target = returns.gae(
                reward, terminated, done, value, next_value, gamma=hp.gamma, lambda_=hp.gae_lambda, length=length
            )
            rollout["advantage"] = standardize(advantage, mask) if hp.normalize_advantage else advantage
            rollout["value_target"] = value_target
            self.critic.take_targets(value_target, mask)
            if hp.value_clip is not None:
                rollout["state_value"] = value

        results = []
        for minibatch in self.minibatches(rollout, states):
            taken, minibatch_terms = yield minibatch
            results.append((taken, minibatch_terms))
            if hp.target_kl is not None and taken and rank_mean(minibatch_terms[KL].clone()) > hp.target_kl:
                break
        terms = where_taken(*zip(*results))

        yield None  # statistics stay what they are while others, that share the critic, are not done with their steps
        self.update_normalizers(rollout, mask)
        metrics: dict[str, Tensor | float] = {}
        if terms:
            metrics |= zip(TERMS, torch.stack(terms).mean(0).unbind())
        if hp.target_kl is not None:
            metrics["optim/gradient_steps"] = float(len(terms))
        if self.kl_coef is not None and terms:
            metrics["policy/kl_coef"] = float(self.kl_coef)
            self.adapt_kl_coef(self.kl_coef, terms[-self.steps_per_pass :])
        metrics["value/explained_variance"] = explained_variance(value, value_target, mask)
        return metrics

    def loss(self, minibatch: TensorDict) -> tuple[Tensor, Tensor]:
        """The loss of a minibatch [M] (with memory [M, L]), and the means of its terms.

        The means are one tensor [5], in the order of `TERMS`. To log more, use `self.log`.
        """
        hp, advantage = self.hp, minibatch["advantage"]
        features = self.policy.features(minibatch)
        log_prob, entropy = self.policy.evaluate(minibatch, features)
        value, target = map(self.critic.normalized, (self.value_of(minibatch, features), minibatch["value_target"]))
        log_ratio = log_prob - minibatch["action_log_prob"]
        policy_loss = ppo_clip(log_ratio, advantage, self.clip.value)
        if hp.value_clip is None:
            critic_loss = value_loss(value, target)
        else:
            old_value = self.critic.normalized(minibatch["state_value"])
            critic_loss = clipped_value_loss(value, old_value, target, hp.value_clip)
        kl = approximate_kl(log_ratio)
        row_loss = policy_loss + hp.value_coef * critic_loss - self.entropy_coef.value * entropy
        if self.kl_coef is not None:
            row_loss = row_loss + self.kl_coef * kl
        clipped = ((log_ratio.detach().exp() - 1).abs() > self.clip.value).float()
        with torch.no_grad():
            terms = means_of_rows(minibatch, policy_loss, critic_loss, entropy, kl, clipped)
        return mean_of_rows(row_loss, minibatch), terms

    def adapt_kl_coef(self, kl_coef: Tensor, terms: list[Tensor]) -> None:
        """Weigh the KL penalty by what the last steps, as many as make a pass, measured: section 4 of the paper."""
        kl = float(rank_mean(torch.stack(terms).mean(0))[KL])
        if kl > 2 * self.hp.kl_target:
            kl_coef.mul_(1.5)
        elif kl < self.hp.kl_target / 2:
            kl_coef.mul_(0.5)

    def values(self, rollout: TensorDict) -> tuple[Tensor, Tensor, dict[str, Tree]]:
        """Values of a rollout's observations and of its next observations, [B, T], and the memories before each.

        A critic with a memory of its own goes on with it from the rollout before.
        """
        if self.shares_encoder and self.policy.has_memory:
            value, next_value, before, _ = next_values_with_memory(rollout, self.policy.unroll, self.critic)
            return value, next_value, {"state": before}
        states = {"state": states_before(rollout, self.policy.unroll)} if self.policy.has_memory else {}
        if not self.critic_has_memory:
            return *next_values(rollout, self.value, self.critic_keys), states
        critic: Any = self.critic
        state = self.critic_state
        if state is None or len(leaves(state)[0]) != len(rollout):
            state = critic.encoder.initial_state(len(rollout))
        value, next_value, states["critic_state"], self.critic_state = next_values_with_memory(
            rollout, self.unroll_critic, critic.head, self.critic_keys, state
        )
        return value, next_value, states

    def minibatches(self, rollout: TensorDict, states: dict[str, Tree]) -> Iterator[TensorDict]:
        """`num_epochs` passes over the rollout's real rows, each in a new order, in slices of `minibatch_size`.

        With memory the order is that of sequences, each of which counts `sequence_length` rows. If there is a mask, a
        pass has equally many slices on every rank, all of the same size: rows are repeated, with `mask` False.
        """
        hp, size = self.hp, self.hp.minibatch_size
        keys = (*self.critic_keys, "action", "action_log_prob", "advantage", "value_target", "state_value", "mask")
        if states:
            batch, size = sequences(rollout, states, hp.sequence_length, hp.burn_in, *keys), size // hp.sequence_length
        else:
            batch = rows(rollout, *keys)
        num, mask, device = len(batch), mask_of(batch), rollout["action_log_prob"].device
        self.steps_per_pass = -(-num // size)
        if mask is not None:
            self.steps_per_pass = greatest([self.steps_per_pass], device)[0]
            place = torch.arange(self.steps_per_pass * size, device=device)
            is_first = (place < num).view(-1, *[1] * (mask.ndim - 1))
        num_noise = self.policy.distribution.num_noise
        for _ in range(hp.num_epochs):
            order = torch.randperm(num, generator=self.generator).to(device, non_blocking=True)
            if mask is None:
                shuffled = batch[order]
            else:
                shuffled = batch[order[place % num]]
                shuffled["mask"] &= is_first
            for minibatch in shuffled.split(size):
                if num_noise:
                    shape = (*minibatch["advantage"].shape, num_noise)
                    noise = torch.randn(shape, generator=self.generator)
                    minibatch["entropy_noise"] = noise.to(device, non_blocking=True)
                yield minibatch

    def attach(self, host: Host) -> None:
        super().attach(host)
        if not host.is_resumed:
            self.critic_state = None
        if self.critic_has_memory and not host.source.in_order:
            raise OptionError(
                "critic_network: a critic with memory goes on from rollout to rollout: expected all of them, in order, "
                "not free-running runners, repeats, or train as a function. Use a network without memory."
            )
        if self.kl_coef is not None and not host.is_resumed:
            self.kl_coef.fill_(self.hp.kl_coef)
        if host.source.rollout_shape is not None:
            self.check_sizes(*host.source.rollout_shape)

    def check_sizes(self, num_envs: int, rollout_length: int) -> None:
        """Refuse rollouts [B, T] that cannot be cut into minibatches.

        Raises:
            OptionError: naming the option.
        """
        hp = self.hp
        if hp.minibatch_size > num_envs * rollout_length:
            raise OptionError(
                f"minibatch_size={hp.minibatch_size}: expected at most the {num_envs * rollout_length} rows of a "
                "rollout (environments x rollout_length). Lower it, or collect longer rollouts."
            )
        has_memory = self.policy.has_memory or self.critic_has_memory
        if has_memory and rollout_length % hp.sequence_length:
            raise OptionError(
                f"sequence_length={hp.sequence_length}: expected a divisor of rollout_length={rollout_length}."
            )
        if has_memory and hp.minibatch_size < hp.sequence_length:
            raise OptionError(
                f"minibatch_size={hp.minibatch_size}: expected at least one sequence, "
                f"sequence_length={hp.sequence_length} rows."
            )

    def rank_state(self) -> dict[str, Any]:
        return {
            "running_return": None if self.return_normalizer is None else self.return_normalizer.running_return,
            "critic_state": None if self.critic_state is None else map_tree(torch.clone, self.critic_state),
            "kl_coef": None if self.kl_coef is None else [self.hp.kl_coef, float(self.kl_coef)],
        }

    def load_rank_state(self, state: Mapping[str, Any]) -> None:
        if self.return_normalizer is not None:
            self.return_normalizer.running_return = state.get("running_return")
        critic_state = state.get("critic_state")
        if critic_state is not None:
            self.critic_state = map_tree(lambda x: x.to(self.device), critic_state)
        option, adapted = state.get("kl_coef") or (None, 0.0)
        if self.kl_coef is not None:  # with another option than the run before had, the weight begins anew
            self.kl_coef.fill_(adapted if option == self.hp.kl_coef else self.hp.kl_coef)


def explained_variance(value: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """1 - Var(target - value) / Var(target): 1 is a perfect critic, 0 one that says a constant; NaN-free.

    0 also where the targets are one number, to rounding, or none: there is nothing to explain.
    """
    if mask is not None:
        value, target = value[mask], target[mask]
    if not target.numel():
        return target.sum()
    variance = target.var(correction=0)
    rounding = (4 * torch.finfo(target.dtype).eps) ** 2 * target.square().mean()
    explained = 1 - (target - value).var(correction=0) / variance
    return torch.where(variance > rounding, explained, 0.0)
