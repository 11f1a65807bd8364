"""What algorithms with a policy and critics of its actions share.

Shapes: *N rows, [M] or sequences [S, L]; F features, A discrete actions, K critics, Z numbers that a critic gives for
an action, d numbers of a continuous one.
"""

import functools
from typing import Any

from gymnasium import spaces
from torch import Tensor, nn

from lit_rl.errors import OptionError, SpaceError
from lit_rl.learner.refusals import check_memory
from lit_rl.learner.targets import Follower, target_of
from lit_rl.networks import MLP, Network, build_network, check_same_in_training, has_memory, output_size
from lit_rl.networks.ensemble import Critics
from lit_rl.networks.inputs import FlatInput
from lit_rl.off_policy import OffPolicy
from lit_rl.options import Count, Counts, Positive, PositiveFraction
from lit_rl.policy import Policy
from lit_rl.schedules import Schedule
from lit_rl.spec import EnvSpec, has_images
from lit_rl.transitions import of_action

MOST = 1 - 1e-5  # size of a recorded squashed action whose log-probability is asked for: that of 1 is infinite


class QActorCritic(OffPolicy):
    """Base of SAC and IQL. A subclass gives what an `Algorithm`'s does, but for `build`, which it may extend.

    The policy is SAC's: for Box actions a squashed Gaussian whose standard deviations depend on the observation, for
    Discrete ones categorical.

    Args:
        lr: Adam's learning rate, of everything that has none of its own.
        lr_schedule: "constant"; "linear" or "cosine", to 0 at the datamodule's `max_env_steps`; or points
            `[[env_step, lr], ...]`, which replace `lr`. The other learning rates keep their ratio to it.
        adam_eps: what Adam adds to the root of the squared gradient.
        actor_lr: the policy's; None takes `lr`.
        critic_lr: the critics'; None takes `lr`.
        tau: how far the target critics move to the critics after every update.
        num_critics: critics (K), whose minimum counts.
        critic_hidden_sizes: layers (with ReLU) of each critic, after the observation's features.
        critic_network: callable `(observation_space) -> nn.Module` with an `output_size`, the critics' own encoder of
            observations; None takes vectors as they are, and the default network for images.
        network: the policy's encoder; None is two hidden layers of 256 ReLU units, or the default network for images.
        share_encoder: whether the critics read the policy's encoder. It is then trained by the critics alone, at
            `critic_lr` (Yarats et al. 2021, arXiv:1910.01741). None shares one with memory.
        compile: compile each gradient step as one function, see `CompiledStep`: for runs long enough to pay for
            ten seconds to a minute of compilation.

    Attributes:
        OTHERWISE: what learns other actions.
        is_discrete: whether actions are Discrete.
        critics: of the policy's actions.
        target: the target critics.
        target_policy: its encoder is what the target critics read; None if they have one of their own.
    """

    NETWORKS = ("network", "critic_network")
    OTHERWISE = "PPO"

    critics: Critics
    target: Critics
    target_policy: Policy | None

    def __init__(
        self,
        *,
        lr: Positive = 3e-4,
        lr_schedule: Schedule = "constant",
        adam_eps: Positive = 1e-8,
        actor_lr: Positive | None = None,
        critic_lr: Positive | None = None,
        tau: PositiveFraction = 0.005,
        num_critics: Count = 2,
        critic_hidden_sizes: Counts = (256, 256),
        critic_network: Network | None = None,
        network: Network | None = None,
        share_encoder: bool | None = None,
        compile: bool = False,
        **options: Any,
    ):
        super().__init__(network=network, **options)
        self.take_options()
        self.lr = self.scheduled("lr")
        self.critic_network = critic_network

    def default_network(self, spec: EnvSpec) -> Network | None:
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
                f"{spec.env_id!r}. Use {self.OTHERWISE}."
            )
        check_memory(self)
        shares = self.policy.has_memory if hp.share_encoder is None else hp.share_encoder
        if shares and self.critic_network is not None:
            raise OptionError("critic_network: expected none, since the critics share the policy's network.")
        self.critics = self.make_critics(None if shares else self.make_critic_encoder())
        for network in (self.policy, self.critics):
            check_same_in_training(network)
        self.target = target_of(self.critics)
        self.target_policy = target_of(self.policy) if shares else None
        self.followers = [Follower(self.target, self.critics)]
        if self.target_policy is not None:
            self.followers.append(Follower(self.target_policy.encoder, self.policy.encoder))

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

    def parameters_by_lr(self) -> list[tuple[float | None, list[nn.Parameter]]]:
        """Parameters of the policy and the critics after their learning rates; None is `lr`. The policy's come first.

        What the critics share with the policy learns at their rate.
        """
        hp, shared = self.hp, set()
        if self.critics.encoder is None:
            shared = {*self.policy.encoder.parameters()}
        own = [(hp.critic_lr if p in shared else hp.actor_lr, [p]) for p in self.policy.parameters()]
        return [*own, (hp.critic_lr, [*self.critics.parameters()])]

    def q_values(self, critics: Critics, feature: Tensor, action: Tensor) -> Tensor:
        """What critics say of actions [*N, *action], whose observations have these features [*N, F]; [K, *N, Z]."""
        return self.q_of(critics(feature, None if self.is_discrete else action), action)

    def q_of(self, q: Tensor, action: Tensor) -> Tensor:
        """The outputs for the action taken, [K, *N, Z]."""
        if not self.is_discrete:
            return q
        return of_action(self.split(q), action.expand(len(q), *action.shape))

    def split(self, q: Tensor) -> Tensor:
        """Discrete actions' outputs [K, *N, A * Z] as [K, *N, A, Z]."""
        return q.unflatten(-1, (self.policy.distribution.num_outputs, -1))

    def log_prob_of_data(self, parameters: Tensor, action: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor]:
        """Log-probabilities of recorded actions, which are clipped inside of their bounds, and entropies, each [*N].

        Args:
            parameters: of the policy's distributions, [*N, P].
            action: [*N, *action].
            noise: [*N, d], by which the entropy is estimated; None for Discrete actions.
        """
        inside = action if self.is_discrete else action.clamp(-MOST, MOST)
        return self.policy.distribution.evaluate(parameters, inside, noise)
