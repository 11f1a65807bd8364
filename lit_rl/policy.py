"""What acts: shipped to env runners, loaded for inference."""

import functools
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn

from lit_rl.distributions import distribution_for
from lit_rl.errors import CheckpointError, OptionError
from lit_rl.networks import NetworkFactory, build_network, describe_network, orthogonal, output_size
from lit_rl.normalizer import CLIP, EPSILON, RunningMoments
from lit_rl.spec import EnvSpec

# What a policy with memory carries from step to step; None for one without.
State: TypeAlias = Any


class Policy(nn.Module):
    """Observation to action and log-probability: an encoder, an action head and the observation normaliser.

    No critic and no optimizer. On the CPU the default network is evaluated in numpy, which is five times faster on a
    few observations than torch; the result is the same to float32 rounding.

    Args:
        spec: the environment's spaces.
        network: callable `(observation_space) -> nn.Module` with an `output_size`; None for the default MLP.
        normalize_observations: standardise observations by running statistics (Box spaces only), clipped to +-10. The
            statistics change only when `normalizer.update` is called, never while acting.
    """

    def __init__(
        self,
        spec: EnvSpec,
        *,
        network: NetworkFactory | dict[str, Any] | None = None,
        normalize_observations: bool = False,
    ):
        super().__init__()
        self.spec = spec
        self._network = network
        self._normalize_observations = normalize_observations
        space = spec.observation_space
        if normalize_observations and not isinstance(space, spaces.Box):
            raise OptionError(f"normalize_observations=True: expected a Box observation space, got {space}.")
        self.distribution = distribution_for(spec.action_space)
        self.encoder = build_network(network, space)
        self.normalizer = RunningMoments(space.shape or ()) if normalize_observations else None
        size = self.distribution.num_parameters
        self.log_std: nn.Parameter | None = None
        if isinstance(spec.action_space, spaces.Box):
            size //= 2
            self.log_std = nn.Parameter(torch.zeros(size))
        # A small gain makes the first policy close to uniform (Andrychowicz et al. 2021).
        self.head = orthogonal(nn.Linear(output_size(self.encoder), size), gain=0.01)
        self.rng = np.random.default_rng()
        self._dtype = np.int64 if isinstance(space, spaces.Discrete) else np.float32
        # The forward pass in numpy, and the weight whose memory it reads.
        self._forward_numpy: tuple[Tensor, Callable[[np.ndarray], np.ndarray]] | None = None

    # --- for people ---------------------------------------------------------------------------------------------

    def act(self, obs: np.ndarray | Tensor | int, state: State = None, deterministic: bool = True) -> tuple[Any, State]:
        """The action for one observation or a batch of them, as the environment takes it.

        Args:
            obs: [*obs] or [B, *obs], numpy or torch, raw as the environment gives it.
            state: what the previous call returned; None at an episode's start.
            deterministic: the most probable action (as evaluation does by default), or a random one.

        Returns:
            The action ([*action] or [B, *action], numpy, or torch if `obs` is) and the state for the next call.

        Raises:
            OptionError: if the observation's shape is not the space's.
        """
        array = obs.detach().cpu().numpy() if isinstance(obs, Tensor) else np.asarray(obs)
        shape = self.spec.observation_space.shape or ()
        if array.shape[array.ndim - len(shape) :] != shape or array.ndim - len(shape) not in (0, 1):
            batch = ", ".join(map(str, ("B", *shape)))
            raise OptionError(
                f"obs has shape {array.shape}: expected {shape}, or ({batch}) for a batch, "
                f"as {self.spec.env_id} gives it."
            )
        space = self.spec.observation_space
        if isinstance(space, spaces.Discrete):
            low = int(space.start)
            high = low + int(space.n)
            if not ((array >= low) & (array < high)).all():
                raise OptionError(f"obs={obs!r}: expected whole numbers in {space}, as {self.spec.env_id} gives them.")
        single = array.ndim == len(shape)
        parameters = self.parameters_of(array[None] if single else array)
        if deterministic:
            action = self.distribution.mode(parameters)
        else:
            action, _ = self.distribution.sample(parameters, self.rng)
        action = self.distribution.to_env(action)
        action = action[0] if single else action
        return (torch.as_tensor(action) if isinstance(obs, Tensor) else action), state

    # --- for env runners ----------------------------------------------------------------------------------------

    def sample(self, obs: np.ndarray, state: State = None) -> tuple[np.ndarray, np.ndarray, State]:
        """Random actions [B, *action] as recorded (not clipped), their log-probabilities [B], and the next state."""
        action, log_prob = self.distribution.sample(self.parameters_of(obs), self.rng)
        return action, log_prob, state

    def to_env(self, action: np.ndarray) -> np.ndarray:
        """Recorded actions as the environment takes them: Box actions clipped to the space's bounds."""
        return self.distribution.to_env(action)

    def initial_state(self, num_envs: int) -> State:
        """The state at an episode's start: None, since this policy has no memory."""
        return None

    def parameters_of(self, obs: np.ndarray) -> np.ndarray:
        """The action distribution's parameters [B, num_parameters] for observations [B, *obs], in numpy."""
        weight = self.head.weight
        if self._forward_numpy is None or self._forward_numpy[0] is not weight:
            fast = getattr(self.encoder, "numpy_forward", lambda head: None)(self.head)
            forward = self._forward_torch if fast is None else functools.partial(self._fast_forward, fast)
            self._forward_numpy = (weight, forward)
        return self._forward_numpy[1](obs.astype(self._dtype, copy=False))

    def _fast_forward(self, network: Callable[[np.ndarray], np.ndarray], obs: np.ndarray) -> np.ndarray:
        if self.normalizer is not None:
            mean, var = self.normalizer.mean.numpy(), self.normalizer.var.numpy()
            obs = np.clip((obs - mean) / np.sqrt(var + np.float32(EPSILON)), -CLIP, CLIP)
        out = network(obs)
        if self.log_std is not None:
            log_std = self.log_std.detach().numpy()
            out = np.concatenate([out, np.broadcast_to(log_std, out.shape)], -1)
        return out

    @torch.inference_mode()
    def _forward_torch(self, obs: np.ndarray) -> np.ndarray:
        return self(torch.as_tensor(obs, device=self.head.weight.device)).cpu().numpy()

    # --- for losses ---------------------------------------------------------------------------------------------

    def forward(self, obs: Tensor) -> Tensor:
        """The action distribution's parameters, [*B, *obs] -> [*B, num_parameters]."""
        out = self.head(self.encoder(self.normalize(obs)))
        return out if self.log_std is None else torch.cat([out, self.log_std.expand_as(out)], -1)

    def evaluate(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Log-probability of `batch["action"]` given `batch["observation"]`, and the entropy; each [*B]."""
        return self.distribution.evaluate(self(batch["observation"]), batch["action"])

    def normalize(self, obs: Tensor) -> Tensor:
        """Observations as the networks take them; the critic uses this too."""
        if self._dtype is np.float32:
            obs = obs.float()  # a Box of whole numbers is recorded as such
        if self.normalizer is None:
            return obs
        return ((obs - self.normalizer.mean) / (self.normalizer.var + EPSILON).sqrt()).clamp(-CLIP, CLIP)

    # --- plain data ---------------------------------------------------------------------------------------------

    def describe(self) -> dict[str, Any]:
        """Plain data from which `Policy.from_description` builds the same policy, without its weights."""
        return {
            "spec": self.spec.to_dict(),
            "network": describe_network(self._network),
            "arguments": {"normalize_observations": self._normalize_observations},
        }

    @classmethod
    def from_description(
        cls, description: dict[str, Any], network: NetworkFactory | dict[str, Any] | None = None
    ) -> "Policy":
        """The policy `describe` described.

        Args:
            description: what `describe` returned.
            network: the callable it was trained with, if that is not one of lit_rl's own.

        Raises:
            CheckpointError: if the network is the user's own and was not passed.
        """
        spec = EnvSpec.from_dict(description["spec"])
        return cls(spec, network=network or description["network"], **description["arguments"])

    def load_weights(self, state_dict: dict[str, Tensor]) -> None:
        """Load weights and normaliser.

        Raises:
            CheckpointError: if they belong to another network.
        """
        try:
            self.load_state_dict(state_dict)
        except RuntimeError as error:
            raise CheckpointError(
                f"The weights do not fit the policy's network, {type(self.encoder).__name__}: "
                f"{' '.join(str(error).split())}. Pass the network it was trained with as network=."
            ) from error

    def _apply(self, fn: Any, recurse: bool = True) -> "Policy":
        self._forward_numpy = None  # its arrays are views of the old device's memory
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_forward_numpy": None}
