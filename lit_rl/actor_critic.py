"""What algorithms with a policy and a critic of states share."""

from collections.abc import Generator
from typing import Any, TypeAlias

from tensordict import TensorDict
from torch import Tensor

from lit_rl.algorithm import Algorithm
from lit_rl.errors import OptionError
from lit_rl.learner.refusals import check_memory
from lit_rl.networks import ValueHead, ValueNetwork, build_network, check_same_in_training, output_size
from lit_rl.normalizer import ReturnNormalizer
from lit_rl.spec import EnvSpec
from lit_rl.trees import Tree

# Yields minibatches, is sent what `gradient_step` returns for each, and returns metrics.
Steps: TypeAlias = Generator[TensorDict, tuple[bool | Tensor, Any], dict[str, Tensor | float]]


class ActorCritic(Algorithm):
    """Base of PPO and IMPALA. A subclass gives the options that `build` reads, and what an `Algorithm`'s gives.

    In place of `update` it gives `update_steps`. An algorithm by itself takes a gradient step on each minibatch of it;
    algorithms that share networks go on together, see `Team`.

    Attributes:
        critic: a network of its own or, where the encoder is shared, a head on the policy's features.
        return_normalizer: of rewards; None leaves them.
    """

    critic: ValueNetwork | ValueHead

    def build(self, spec: EnvSpec) -> None:
        hp = self.hp
        self.policy = self.make_policy(
            spec,
            normalize_observations=hp.normalize_observations,
            state_dependent_std=hp.state_dependent_std,
            squash=hp.squash_actions,
            log_std_init=hp.log_std_init,
        )
        check_same_in_training(self.policy)
        check_memory(self)
        if not self.policy.distribution.num_scales:
            for name in ("squash_actions", "log_std_init"):
                if hp[name]:
                    raise OptionError(
                        f"{name}={hp[name]}: expected a Box action, got {spec.action_space}. Leave it out."
                    )
        if self.shares_encoder:
            self.critic = ValueHead(output_size(self.policy.encoder))
        else:
            self.critic = ValueNetwork(build_network(self.network, self.policy.input_space))
        self.return_normalizer = ReturnNormalizer(hp.gamma) if hp.normalize_returns else None

    def update(self, rollout: TensorDict) -> dict[str, Tensor | float]:
        steps, result = self.update_steps(rollout), None
        while True:
            try:
                minibatch = steps.send(result)  # type: ignore[arg-type] # None to begin with
            except StopIteration as end:
                return end.value
            result = self.gradient_step(minibatch)

    def update_steps(self, rollout: TensorDict) -> Steps:
        """Learn from a rollout, as `update` does; the caller takes the gradient step on each minibatch."""
        raise NotImplementedError(f"{type(self).__name__} must define update_steps(rollout).")

    @property
    def shares_encoder(self) -> bool:
        """Whether the critic is a head on the policy's features."""
        shared = self.hp.share_encoder
        return self.policy.has_memory if shared is None else shared

    def value(self, obs: Tree) -> Tensor:
        """The critic's value of raw observations, [*B, *obs] -> [*B], where there is no memory."""
        inputs = self.policy.inputs(obs)
        return self.critic(self.policy.encoder(inputs) if self.shares_encoder else inputs)
