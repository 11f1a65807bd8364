"""The policy of a world model: it acts on the features of latents that it keeps from step to step."""

import functools
from collections.abc import Mapping
from typing import Any, NoReturn

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn

from lit_rl.distributions import BoundedGaussian
from lit_rl.errors import OptionError, SpaceError
from lit_rl.masks import split_mask
from lit_rl.networks import NetworkFactory
from lit_rl.networks.latent import LatentNetwork
from lit_rl.networks.normed import Linear, normed
from lit_rl.networks.rssm_scan import one_hot, sample
from lit_rl.policy.base import Policy, State, built_in
from lit_rl.spec import EnvSpec
from lit_rl.trees import Tree, to_numpy, to_torch

FIRST_SCALE = 0.01  # of the actor's last layer: the first policy is close to uniform


@built_in
class LatentPolicy(Policy):
    """Observations and the actions before them become latents, and these an action.

    The state is {"deter", "stoch", "action"}: the recurrent state, the latents' sample and the previous action. Random
    actions come with random latents; where the most probable action is asked for, the latents are the most probable.

    Args:
        spec: the environment's spaces; actions are Discrete or a Box with bounds.
        network: callable `(observation_space) -> nn.Module` with an `output_size` that encodes observations; None for
            `ObservationEncoder`.
        size: numbers of the networks, see `lit_rl.modules.dreamer_v3.SIZES`.
        unimix: share of the uniform distribution in that of latents and of Discrete actions.
    """

    encoder: LatentNetwork

    def __init__(
        self,
        spec: EnvSpec,
        *,
        network: NetworkFactory | dict[str, Any] | None = None,
        size: Mapping[str, int],
        unimix: float = 0.01,
    ):
        action_space = spec.action_space
        if not isinstance(action_space, spaces.Discrete | spaces.Box):
            raise SpaceError(
                f"A world model's policy needs a Discrete or Box action space, got {action_space} from env "
                f"{spec.env_id!r}. Wrap the environment to give it one, or use PPO."
            )
        if split_mask(spec.observation_space)[1] is not None:
            raise SpaceError(
                f"env={spec.env_id}: its observations hold an action mask, which a world model does not know in states "
                "that it imagines. Wrap the environment to leave it out, or use PPO or DQN."
            )
        self._size, self._unimix = dict(size), unimix  # what build_head, which is called now, reads
        count = int(action_space.n) if isinstance(action_space, spaces.Discrete) else int(np.prod(action_space.shape))
        own = functools.partial(LatentNetwork, num_actions=count, encoder=network, size=self._size, unimix=unimix)
        super().__init__(spec, network=own)
        self._network = network
        self._arguments: dict[str, Any] = {"size": self._size, "unimix": unimix}
        self.is_discrete = isinstance(action_space, spaces.Discrete)
        if isinstance(action_space, spaces.Box):
            self.distribution = BoundedGaussian(action_space)

    def build_head(self, num_features: int) -> None:
        units, layers = self._size["units"], self._size["layers"]
        num_outputs = self.distribution.num_outputs + self.distribution.num_scales
        self.head = nn.Sequential(
            normed(num_features, *[units] * layers), Linear(units, num_outputs, scale=FIRST_SCALE)
        )

    def action_parameters(self, features: Tensor, obs: Tree = None) -> Tensor:
        """The action distribution's parameters, [*B, F] to [*B, P]; those of Discrete actions are log-probabilities."""
        out = self.head(features).float()
        if not self.is_discrete:
            return out
        return ((1 - self._unimix) * out.softmax(-1) + self._unimix / out.shape[-1]).log()

    @torch.no_grad()
    def imagined_action(self, features: Tensor, noise: Tensor) -> Tensor:
        """Random actions as numbers [N, A] for features [N, F], without gradients.

        They are made of uniform noise [N, 1] or, of a Box, standard normal noise [N, A].
        """
        out = self.head(features).float()
        if self.is_discrete:
            return sample(out, noise.squeeze(-1), self._unimix)
        assert isinstance(self.distribution, BoundedGaussian)
        mean, log_std = self.distribution.bounded(out).chunk(2, -1)
        return torch.addcmul(mean, log_std.exp(), noise)

    def as_numbers(self, action: Any) -> Any:
        """Recorded actions [*B, *action], arrays or tensors, as floats [*B, A]: Discrete ones are one-hot."""
        if self.is_discrete:
            count = self.encoder.num_actions
            if isinstance(action, Tensor):
                return one_hot(action.unsqueeze(-1), count)
            return (np.expand_dims(action, -1) == np.arange(count)).astype(np.float32)
        shape = self.spec.action_space.shape or ()
        return action.reshape(*action.shape[: action.ndim - len(shape)], -1)

    def as_action(self, numbers: Tensor) -> Tensor:
        """Actions as recorded, [*B, *action], of numbers [*B, A]: the inverse of `as_numbers`."""
        if self.is_discrete:
            return numbers.argmax(-1)
        return numbers.unflatten(-1, self.spec.action_space.shape or ())

    def step(self, obs: Tree, state: State = None, deterministic: bool = False) -> tuple[Tree, np.ndarray, State]:
        device = self._device
        with torch.inference_mode():
            tensors = to_torch(obs, device)
            before = to_torch(state, device)
            batch, noise = len(before["action"]), None
            if not deterministic:
                uniform = self.rng.random((batch, self._size["stoch"]), dtype=np.float32)
                noise = torch.from_numpy(uniform).to(device)
            features, after = self.encoder(self.inputs(tensors), before, noise)
            action, log_prob = self.choose(features, tensors, deterministic)
        action, log_prob, state = to_numpy(action), to_numpy(log_prob), to_numpy(after)
        if self.own_methods:
            self._check_chosen(action, log_prob, batch)
        if self.epsilon and not deterministic:
            action = self._explore(action, obs, batch)
        return action, log_prob, {**state, "action": self.as_numbers(action)}

    def features(self, batch: Any) -> NoReturn:
        raise OptionError(f"{type(self).__name__}: expected DreamerV3, which alone trains a world model's policy.")
