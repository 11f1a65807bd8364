"""What algorithms with a policy and a critic of states share."""

from collections.abc import Generator, Sequence
from typing import Any, TypeAlias

from tensordict import TensorDict
from torch import Tensor

from lit_rl.algorithm import Algorithm
from lit_rl.learner.refusals import check_critic
from lit_rl.networks import (
    CentralCritic,
    Network,
    ValueHead,
    ValueNetwork,
    build_network,
    check_same_in_training,
    has_memory,
    output_size,
    unroll,
)
from lit_rl.normalizer import ReturnNormalizer
from lit_rl.rollout import OWN, WITH_CENTRAL
from lit_rl.spec import EnvSpec
from lit_rl.trees import Tree

# Yields minibatches and is sent what `gradient_step` returns for each; may yield None to go on when all that learn
# together have taken their steps; returns metrics.
Steps: TypeAlias = Generator[TensorDict | None, Any, dict[str, Tensor | float]]


class ActorCritic(Algorithm):
    """Base of PPO and IMPALA. A subclass gives the options that `build` reads, and what an `Algorithm`'s gives.

    In place of `update` it gives `update_steps`. An algorithm by itself takes a gradient step on each minibatch of it;
    algorithms that share networks go on together, see `Team`.

    Args:
        critic_network: see the subclasses.
        **options: of `Algorithm`.

    Attributes:
        critic: a network of its own or, where the encoder is shared, a head on the policy's features.
        return_normalizer: of rewards; None leaves them.
    """

    NETWORKS = ("network", "critic_network")

    critic: ValueNetwork | ValueHead

    def __init__(self, *, critic_network: Network | None = None, **options: Any):
        super().__init__(**options)
        self.critic_network = critic_network

    def build(self, spec: EnvSpec) -> None:
        hp = self.hp
        self.build_actor(spec)
        check_critic(self, spec)
        self.critic = self.make_critic(spec)
        check_same_in_training(self.critic)
        self.return_normalizer = ReturnNormalizer(hp.gamma) if hp.normalize_returns else None

    def update(self, rollout: TensorDict) -> dict[str, Tensor | float]:
        steps, result = self.update_steps(rollout), None  # which begins when it is sent None
        while True:
            try:
                minibatch = steps.send(result)
            except StopIteration as end:
                return end.value
            result = None if minibatch is None else self.gradient_step(minibatch)

    def update_steps(self, rollout: TensorDict) -> Steps:
        """Learn from a rollout, as `update` does; the caller takes the gradient step on each minibatch."""
        raise NotImplementedError(f"{type(self).__name__} must define update_steps(rollout).")

    def make_critic(self, spec: EnvSpec) -> ValueNetwork | ValueHead:
        """What the options ask for."""
        normalize = self.normalizes_values
        if self.shares_encoder:
            return ValueHead(output_size(self.policy.encoder), normalize)
        network = self.critic_network
        if network is None and not self.policy.has_memory:
            network = self.network
        if not self.is_central:
            option = "network" if self.critic_network is None else "critic_network"
            return ValueNetwork(build_network(network, self.policy.input_space, option), normalize)
        assert spec.central_space is not None
        return CentralCritic(
            network,
            self.policy.input_space,
            spec.central_space,
            normalize=normalize,
            normalize_inputs=self.hp.normalize_observations,
        )

    @property
    def central_input(self) -> str | None:
        return self.hp.central_critic

    @property
    def is_central(self) -> bool:
        """Whether the critic sees more than the policy."""
        return self.central_input is not None

    @property
    def normalizes_values(self) -> bool:
        """Whether value targets are normalised for the critic's loss."""
        asked = self.hp.get("normalize_values", False)
        return self.is_central if asked is None else asked

    @property
    def shares_encoder(self) -> bool:
        """Whether the critic is a head on the policy's features."""
        shared = self.hp.share_encoder
        return self.policy.has_memory and not self.is_central if shared is None else shared

    @property
    def critic_keys(self) -> Sequence[str]:
        """The keys of what the critic sees in a rollout, in the order in which `value` takes them."""
        return WITH_CENTRAL if self.is_central else OWN

    @property
    def critic_has_memory(self) -> bool:
        """Whether the critic has a memory of its own."""
        return isinstance(self.critic, ValueNetwork) and has_memory(self.critic.encoder)

    def value(self, obs: Tree, central: Tree = None) -> Tensor:
        """The critic's value of raw observations, [*B, *obs] -> [*B], where there is no memory.

        Args:
            obs: [*B, *obs].
            central: what a central critic sees beside them, [*B, ...].
        """
        inputs = self.critic_inputs(obs, central)
        return self.critic(self.policy.encoder(inputs) if self.shares_encoder else inputs)

    def value_of(self, batch: TensorDict, features: Tensor) -> Tensor:
        """The critic's values of a batch, [*B], of which the policy's features [*B, F] are known."""
        if self.shares_encoder:
            return self.critic(features)
        seen = [batch[key] for key in self.critic_keys]
        if isinstance(self.critic, ValueNetwork) and self.critic_has_memory:
            return self.critic.head(self.unroll_critic(*seen, batch["critic_state"], batch["is_init"])[0])
        return self.value(*seen)

    def unroll_critic(self, *arguments: Any) -> tuple[Tensor, Tree]:
        """Features [B, T, F] of a critic with a memory of its own, and its states after every step [B, T, ...].

        The arguments are what the critic sees, [B, T, ...] each, its state before, [B, ...], and `is_init` [B, T].
        """
        *seen, state, is_init = arguments
        return unroll(self.critic.encoder, self.critic_inputs(*seen), state, is_init)

    def critic_inputs(self, obs: Tree, central: Tree = None) -> Tree:
        """What the critic's network takes of raw observations and central inputs, [*B, ...] each."""
        inputs = self.policy.inputs(obs)
        return self.critic.joined(inputs, central) if isinstance(self.critic, CentralCritic) else inputs

    def update_normalizers(self, rollout: TensorDict, mask: Tensor | None) -> None:
        """Take a rollout's observations into the statistics, if there are any; `mask` [B, T] says which rows."""
        self.policy.update_normalizer(rollout["observation"], mask)
        if isinstance(self.critic, CentralCritic):
            self.critic.take_inputs(rollout["central"], mask)
