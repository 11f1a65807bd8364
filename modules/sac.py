"""Soft Actor-Critic, for continuous and for discrete actions, and truncated quantile critics.

Shapes: *N rows, [M] or sequences [S, L]; F features, A discrete actions, K critics, Z numbers that a critic gives for
an action, J numbers that the target has.
"""

import functools
import math
from typing import Annotated, Any

import torch
from gymnasium import spaces
from tensordict import TensorDict
from torch import Tensor, nn

from lit_rl.distributions import SquashedGaussian
from lit_rl.errors import OptionError, SpaceError
from lit_rl.learner.refusals import check_memory
from lit_rl.learner.targets import Follower, target_of
from lit_rl.losses import quantile_huber_loss
from lit_rl.networks import MLP, NetworkFactory, build_network, check_same_in_training, has_memory, output_size
from lit_rl.networks.ensemble import Critics
from lit_rl.networks.inputs import FlatInput
from lit_rl.off_policy import OffPolicy
from lit_rl.options import Count, CountOrZero, Counts, NumberOr, Positive, PositiveFraction
from lit_rl.rollout import mean_of_rows, means_of_rows
from lit_rl.schedules import Schedule
from lit_rl.spec import EnvSpec, has_images
from lit_rl.transitions import bootstrap_observation, features, next_features, of_action, set_priority, weighted_mean
from lit_rl.trees import Tree

Entropy = Annotated[float | str, NumberOr("auto")]
TERMS = ("loss/value", "loss/policy", "policy/entropy", "value/q_mean", "value/td_error")
AUTO_ENTROPY = 0.98  # share of a uniform policy's entropy that a discrete one is held at


class SAC(OffPolicy):
    """Soft Actor-Critic with twin critics and automatic temperature: Haarnoja et al. 2018, arXiv:1812.05905.

    For Discrete actions the expectations over actions are exact sums: Christodoulou 2019, arXiv:1910.07207.

    Deviations from the paper: policy, critics and temperature take their gradients from the same weights, in one
    backward pass (the paper updates the critics first); with `n_step` above 1 the rewards' own entropy bonuses between
    the first and the last step are left out.

    Reads minibatches as `DQN` does.

    Args:
        lr: Adam's learning rate, of everything that has none of its own.
        lr_schedule: "constant"; "linear" or "cosine", to 0 at the datamodule's `max_env_steps`; or points
            `[[env_step, lr], ...]`, which replace `lr`. The other learning rates keep their ratio to it.
        adam_eps: what Adam adds to the root of the squared gradient.
        actor_lr: the policy's; None takes `lr`.
        critic_lr: the critics'; None takes `lr`.
        alpha_lr: the temperature's; None takes `lr`.
        tau: how far the target critics move to the critics after every update.
        initial_alpha: the temperature, the weight of the entropy, when training begins.
        learn_alpha: whether the temperature is learned; else it stays.
        target_entropy: what the policy's entropy (nats) is held at by it. "auto" is minus the number of action
            dimensions; for discrete actions 0.98 log n, where n counts the legal ones.
        num_critics: critics (K), whose minimum counts.
        critic_hidden_sizes: layers (with ReLU) of each critic, after the observation's features.
        critic_network: callable `(observation_space) -> nn.Module` with an `output_size`, the critics' own encoder of
            observations; None takes vectors as they are, and the default network for images.
        network: the policy's encoder; None is two hidden layers of 256 ReLU units, or the default network for images.
        share_encoder: whether the critics read the policy's encoder. It is then trained by the critics alone, at
            `critic_lr` (Yarats et al. 2021, arXiv:1910.01741). None shares one with memory.
        compile: compile each gradient step as one function, see `CompiledStep`: for runs long enough to pay for
            ten seconds to a minute of compilation.
    """

    NETWORKS = ("network", "critic_network")

    critics: Critics
    target: Critics

    def __init__(
        self,
        *,
        lr: Positive = 3e-4,
        lr_schedule: Schedule = "constant",
        adam_eps: Positive = 1e-8,
        actor_lr: Positive | None = None,
        critic_lr: Positive | None = None,
        alpha_lr: Positive | None = None,
        tau: PositiveFraction = 0.005,
        initial_alpha: Positive = 1.0,
        learn_alpha: bool = True,
        target_entropy: Entropy = "auto",
        num_critics: Count = 2,
        critic_hidden_sizes: Counts = (256, 256),
        critic_network: NetworkFactory | dict[str, Any] | None = None,
        network: NetworkFactory | dict[str, Any] | None = None,
        share_encoder: bool | None = None,
        compile: bool = False,
        **options: Any,
    ):
        super().__init__(network=network, **options)
        self.take_options()
        self.lr = self.scheduled("lr")
        self.critic_network = critic_network

    def default_network(self, spec: EnvSpec) -> NetworkFactory | None:
        if has_images(spec.observation_space):
            return None
        return functools.partial(MLP, hidden_sizes=[256, 256], activation="relu")

    def build(self, spec: EnvSpec) -> None:
        hp, action_space = self.hp, spec.action_space
        self.is_discrete = isinstance(action_space, spaces.Discrete)
        if self.is_discrete:
            self.policy = self.make_policy(spec)
        elif isinstance(action_space, spaces.Box):
            self.policy = self.make_policy(spec, squash=True, state_dependent_std=True)
        else:
            raise SpaceError(
                f"{type(self).__name__} needs a Box or Discrete action space, got {action_space} from env "
                f"{spec.env_id!r}. Use PPO."
            )
        check_memory(self)
        shares = self.policy.has_memory if hp.share_encoder is None else hp.share_encoder
        if shares and self.critic_network is not None:
            raise OptionError("critic_network: expected none, since the critics share the policy's network.")
        self.critics = self.make_critics(None if shares else self.make_critic_encoder())
        for network in (self.policy, self.critics):
            check_same_in_training(network)
        self.target = target_of(self.critics)
        # What the target critics read, if that is not an encoder of their own.
        self.target_policy = target_of(self.policy) if shares else None
        self.followers = [Follower(self.target, self.critics)]
        if self.target_policy is not None:
            self.followers.append(Follower(self.target_policy.encoder, self.policy.encoder))
        log_alpha = torch.tensor(math.log(hp.initial_alpha))
        if hp.learn_alpha:
            self.log_alpha = nn.Parameter(log_alpha)
        else:
            self.register_buffer("log_alpha", log_alpha)
        size = self.policy.distribution.num_outputs
        auto = AUTO_ENTROPY * math.log(size) if self.is_discrete else -float(size)
        self.target_entropy = auto if hp.target_entropy == "auto" else hp.target_entropy

    def make_critic_encoder(self) -> nn.Module:
        """The critics' own encoder of observations."""
        space = self.policy.input_space
        if self.critic_network is None and not has_images(space):
            return FlatInput(space)
        encoder = build_network(self.critic_network, space, "critic_network")
        if has_memory(encoder):
            raise OptionError(
                f"critic_network={type(encoder).__name__}: expected a network without memory. Give it to "
                "network=, which the critics then share."
            )
        return encoder

    def make_critics(self, encoder: nn.Module | None, num_outputs: int = 1) -> Critics:
        """Critics that give `num_outputs` numbers for an action."""
        size = self.policy.distribution.num_outputs
        return Critics(
            encoder,
            num=self.hp.num_critics,
            num_features=output_size(self.policy.encoder if encoder is None else encoder),
            num_actions=0 if self.is_discrete else size,
            hidden_sizes=self.hp.critic_hidden_sizes,
            output_size=(size if self.is_discrete else 1) * num_outputs,
        )

    def configure_optimizers(self) -> torch.optim.Optimizer:
        hp = self.hp
        shared = set() if self.critics.encoder is not None else {*self.policy.encoder.parameters()}
        learned = [(hp.critic_lr if p in shared else hp.actor_lr, [p]) for p in self.policy.parameters()]
        learned.append((hp.critic_lr, [*self.critics.parameters()]))
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
        return {**dict(zip(TERMS, terms.unbind())), "policy/alpha": alpha}

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
        q = self.q_of(critics(critic_feature, None if self.is_discrete else batch["action"]), batch["action"])
        assert q.shape[1:-1] == target.shape[:-1] == batch["next", "reward"].shape  # q [K, *N, Z]
        critic_loss = self.critic_loss(q, target)
        actor_loss, log_prob = self.actor_loss(batch, feature, critic_feature.detach(), alpha)
        assert critic_loss.shape == actor_loss.shape == log_prob.shape == target.shape[:-1]
        loss = weighted_mean(critic_loss, batch) + mean_of_rows(actor_loss, batch)
        if self.hp.learn_alpha:
            loss = loss + mean_of_rows(self.alpha_loss(log_prob, self.entropy_target(obs)), batch)
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

    def draw_noise(self, batch: TensorDict) -> None:
        """Add what actions are made of, [*N, d] each: `next_noise` those of the target, `noise` those of the policy."""
        shape = (*batch["discount"].shape, self.policy.distribution.num_noise)
        for key in ("next_noise", "noise"):
            noise = torch.randn(shape, generator=self.generator)
            batch[key] = noise.to(batch["discount"].device, non_blocking=True)

    def sample(self, parameters: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Actions and log-probabilities, differentiable."""
        distribution = self.policy.distribution
        assert isinstance(distribution, SquashedGaussian)
        return distribution.rsample(parameters, noise)

    def split(self, q: Tensor) -> Tensor:
        """Discrete actions' outputs [K, *N, A * Z] as [K, *N, A, Z]."""
        return q.unflatten(-1, (self.policy.distribution.num_outputs, -1))

    def q_of(self, q: Tensor, action: Tensor) -> Tensor:
        """The outputs for the action taken, [K, *N, Z]."""
        if not self.is_discrete:
            return q
        return of_action(self.split(q), action.expand(len(q), *action.shape))


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
