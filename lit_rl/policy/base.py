"""What acts: shipped to env runners, loaded for inference."""

import functools
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from lit_rl.distributions import ActionDistribution, distribution_for
from lit_rl.errors import CheckpointError, EnvError, OptionError
from lit_rl.masks import ACTION_MASK, ActionMasks, is_wrapped, split_mask
from lit_rl.networks import (
    NetworkFactory,
    as_input,
    build_network,
    describe_network,
    has_memory,
    orthogonal,
    output_size,
    reset_rows,
    unroll,
)
from lit_rl.normalizer import ObservationNormalizer
from lit_rl.observations import as_tensors, holds_tensors, rows_of
from lit_rl.policy.numpy_policy import METHODS, NumpyPolicy
from lit_rl.spec import EnvSpec, class_counts
from lit_rl.trees import Tree, iterate, leaves, map_tree, row_converter, space_leaves, to_numpy, to_torch

# What a policy with memory carries from step to step, a tree of arrays [B, ...]; None for one without.
State: TypeAlias = Tree

# Which policies a checkpoint may ask for by name. A file never makes lit_rl import anything.
POLICIES: dict[str, type["Policy"]] = {}


def built_in(policy: type["Policy"]) -> type["Policy"]:
    """Class decorator: a checkpoint may name this policy."""
    POLICIES[policy.__name__] = policy
    return policy


@built_in
class Policy(nn.Module):
    """Observation to action and log-probability: an encoder, an action head and the observation normaliser.

    No critic and no optimizer. On the CPU an MLP is evaluated in numpy (see `NumpyPolicy`), which is five times faster
    on a few observations than torch; the result is the same to float32 rounding.

    A Dict observation with the key "action_mask" (see `ActionMasks`) restricts what is sampled, what is most probable,
    log-probability and entropy to legal actions; the encoder does not see it.

    A subclass can choose actions in its own way: override `build_head`, `choose` and `evaluate_actions`.

    Args:
        spec: the environment's spaces.
        network: callable `(observation_space) -> nn.Module` with an `output_size`; None for the space's default.
        normalize_observations: standardise observations by running statistics (Box spaces only), clipped to +-10. The
            statistics change only when `update_normalizer` is called, never while acting.
        state_dependent_std: whether the head gives the standard deviations of Box actions too; else they are
            parameters of their own, the same for every observation.
        squash: keep Box actions within their bounds by a tanh, instead of clipping them.
        log_std_init: the log standard deviations of Box actions before training.

    Attributes:
        epsilon: the probability with which `sample` takes an action that knows nothing of the observation instead.
        masks: what rules out illegal actions; None if the observations hold no action mask.
        own_methods: those of the methods in `numpy_policy.METHODS` that a subclass overrides.
    """

    def __init__(
        self,
        spec: EnvSpec,
        *,
        network: NetworkFactory | dict[str, Any] | None = None,
        normalize_observations: bool = False,
        state_dependent_std: bool = False,
        squash: bool = False,
        log_std_init: float = 0.0,
    ):
        super().__init__()
        self.spec = spec
        self.epsilon = 0.0
        self._network = network
        self._arguments = {
            "normalize_observations": normalize_observations,
            "state_dependent_std": state_dependent_std,
            "squash": squash,
            "log_std_init": log_std_init,
        }
        self.as_rows = row_converter(spec.observation_space)
        leaf_spaces = space_leaves(spec.observation_space)
        self.class_spaces = {path: space for path, space in leaf_spaces.items() if class_counts(space)}
        self.distribution = distribution_for(spec.action_space, squash=squash)
        self.input_space, mask_space = split_mask(spec.observation_space)
        self.masks = None if mask_space is None else ActionMasks(mask_space, spec.action_space, self.distribution)
        self._unwraps = is_wrapped(spec.observation_space)
        self.encoder: Any = build_network(network, self.input_space)
        self.has_memory = has_memory(self.encoder)
        self.normalizer = ObservationNormalizer(self.input_space) if normalize_observations else None
        self.log_std: nn.Parameter | None = None
        self.build_head(output_size(self.encoder))
        self.own_methods = [name for name in METHODS if getattr(type(self), name) is not getattr(Policy, name)]
        self.rng = np.random.default_rng()
        # The numpy form, if there is one, after the weight that the head had when this was found out.
        self._numpy: tuple[Tensor | None, NumpyPolicy | None] | None = None

    # --- for people ---------------------------------------------------------------------------------------------

    def act(self, obs: Any, state: State = None, deterministic: bool = True) -> tuple[Any, State]:
        """The action for one observation or a batch of them, as the environment takes it.

        Args:
            obs: [*obs] or [B, *obs], numpy or torch, raw as the environment gives it; dicts and tuples of these where
                the space has them.
            state: what the previous call returned; None at an episode's start. In a batch, `reset_state` starts some
                rows afresh.
            deterministic: the most probable action (as evaluation does by default), or a random one.

        Returns:
            The action ([*action] or [B, *action], numpy, or torch if `obs` is) and the state for the next call.

        Raises:
            OptionError: if the observation's shape is not the space's.
            EnvError: if the observation's action mask allows no action.
        """
        rows, single = rows_of(self.spec, obs)
        batch = len(leaves(rows)[0])
        if self.has_memory:
            initial = self.initial_state(batch)
            # A copy: a memory of one's own may write in place.
            state = map_tree(np.array, initial if state is None else to_numpy(state))
            shapes = [{name: np.shape(leaf) for name, leaf in iterate(tree, "state")} for tree in (state, initial)]
            if shapes[0] != shapes[1]:
                raise OptionError(f"{shapes[0]}: expected {shapes[1]} for {batch} observations, as act returned it.")
        if self.blocked(rows) is not None:
            raise EnvError(f"env={self.spec.env_id}: the observation's action_mask allows no action.")
        self.see_weights()
        action, _, state = self.step(rows, state, deterministic)
        action = self.to_env(map_tree(lambda x: x[0], action) if single else action)
        return (as_tensors(action) if holds_tensors(obs) else action), state

    def reset_state(self, state: State, is_init: Any) -> State:
        """`state` with the rows where `is_init` [B] is True as at an episode's start."""
        if state is None:
            return None
        is_init = torch.as_tensor(is_init).reshape(-1) != 0
        if is_init.shape != leaves(state)[0].shape[:1]:
            raise OptionError(f"is_init has shape {tuple(is_init.shape)}: expected ({len(leaves(state)[0])},).")
        with torch.inference_mode():
            initial = self.encoder.initial_state(len(is_init))
            return to_numpy(reset_rows(to_torch(state), map_tree(lambda x: x.cpu(), initial), is_init))

    # --- for env runners ----------------------------------------------------------------------------------------

    def sample(self, obs: Tree, state: State = None) -> tuple[Tree, np.ndarray, State]:
        """Random actions [B, *action] as recorded (not clipped), their log-probabilities [B], and the next state."""
        return self.step(obs, state)

    def step(self, obs: Tree, state: State = None, deterministic: bool = False) -> tuple[Tree, np.ndarray, State]:
        """Actions [B, *action] as recorded, their log-probabilities [B] (0 where there was no choice), and next state.

        An action that `epsilon` put in another's place keeps the other's log-probability.

        Args:
            obs: [B, *obs], what `as_rows` made of an environment's.
            state: [B, ...], None without memory.
            deterministic: the most probable actions instead of random ones.
        """
        twin = self._in_numpy()
        if twin is not None:
            with np.errstate(over="ignore", invalid="ignore"):  # of diverged weights: the runner says so, by name
                action, log_prob = self.draw(self.distribution, twin.action_parameters(obs), deterministic)
            if self.epsilon and not deterministic:
                action = self._explore(action, obs, len(log_prob))
            return action, log_prob, state
        with torch.inference_mode():
            device = self._device
            tensors = to_torch(obs, device)
            inputs = self.inputs(tensors)
            if self.has_memory:
                features, next_state = self.encoder(inputs, to_torch(state, device))
                state = to_numpy(next_state)
            else:
                features = self.encoder(inputs)
            action, log_prob = self.choose(features, tensors, deterministic)
        action, log_prob = to_numpy(action), to_numpy(log_prob)
        if self.own_methods:
            self._check_chosen(action, log_prob, len(features))
        if self.epsilon and not deterministic:
            action = self._explore(action, obs, len(log_prob))
        return action, log_prob, state

    def parameters_of(self, obs: Tree) -> np.ndarray:
        """`action_parameters` for observations [B, *obs] in numpy, where there is no memory."""
        self.see_weights()
        twin = self._in_numpy()
        if twin is not None:
            return twin.action_parameters(obs)
        with torch.inference_mode():
            return to_numpy(self(to_torch(obs, self._device)))

    def to_env(self, action: Tree) -> Any:
        """Recorded actions as the environment takes them: Box actions clipped to their bounds, tuples restored."""
        return self.distribution.to_env(action)

    def from_env(self, action: Tree) -> Tree:
        """What `to_env` undone gives: recorded actions [*B, *action], of arrays of what the environment took."""
        return self.distribution.from_env(action)

    def initial_state(self, num_envs: int) -> State:
        """The state at an episode's start, [num_envs, ...]; None without memory."""
        if not self.has_memory:
            return None
        with torch.inference_mode():
            return to_numpy(self.encoder.initial_state(num_envs))

    def blocked(self, obs: Tree) -> np.ndarray | None:
        """Which of the observations [B, *obs] have an action mask that allows no action, [B]; None if none has."""
        if self.masks is None:
            return None
        blocked = self.masks.blocked(obs[ACTION_MASK])
        return blocked if blocked.any() else None

    def draw(
        self, distribution: ActionDistribution, parameters: Tensor | np.ndarray, deterministic: bool
    ) -> tuple[Tree, np.ndarray]:
        """Actions and log-probabilities by the policy's own generator; deterministic ones have log-probability 0."""
        array = parameters if isinstance(parameters, np.ndarray) else to_numpy(parameters)
        if deterministic:
            return distribution.mode(array), np.zeros(len(array), np.float32)
        return distribution.sample(array, self.rng)

    @property
    def has_masks(self) -> bool:
        """Whether observations hold an action mask."""
        return self.masks is not None

    def legal(self, obs: Tree) -> Tensor:
        """Which outputs of a policy with masks belong to legal actions of the observations, [*B, num_outputs]."""
        assert self.masks is not None
        mask = obs[ACTION_MASK]
        shape = (*leaves(mask)[0].shape[:-1], self.distribution.num_outputs)
        return self.masks.apply(torch.zeros(shape, device=leaves(mask)[0].device), mask) == 0

    # --- what a subclass may override ---------------------------------------------------------------------------

    def build_head(self, num_features: int) -> None:
        """Make what turns features into an action distribution: here `head` and, for Box actions, `log_std`."""
        size, num_scales = self.distribution.num_outputs, self.distribution.num_scales
        if self._arguments["state_dependent_std"]:
            if not num_scales:
                raise OptionError(
                    f"state_dependent_std=True: expected a Box action, got {self.spec.action_space}. Leave it out."
                )
            size += num_scales
        elif num_scales:
            self.log_std = nn.Parameter(torch.full((num_scales,), self._arguments["log_std_init"]))
        # A small gain makes the first policy close to uniform (Andrychowicz et al. 2021).
        self.head = orthogonal(nn.Linear(num_features, size), gain=0.01)
        if num_scales and self.log_std is None:
            nn.init.constant_(self.head.bias[-num_scales:], self._arguments["log_std_init"])

    def choose(self, features: Tensor, obs: Tree, deterministic: bool) -> tuple[Tree, Any]:
        """Actions [B, *action] and their log-probabilities [B] for features [B, F]; `obs` holds the action mask."""
        return self.draw(self.distribution, self.action_parameters(features, obs), deterministic)

    def evaluate_actions(self, features: Tensor, obs: Tree, action: Tree) -> tuple[Tensor, Tensor]:
        """Log-probability of recorded actions [*B, *action] and the entropy, each [*B], differentiable."""
        return self.distribution.evaluate(self.action_parameters(features, obs), action)

    # --- for losses ---------------------------------------------------------------------------------------------

    def forward(self, obs: Tree) -> Tensor:
        """`action_parameters` of observations [*B, *obs], where there is no memory."""
        return self.action_parameters(self.encoder(self.inputs(obs)), obs)

    def features(self, batch: Any) -> Tensor:
        """The encoder's features of `batch["observation"]`, [*B, F].

        With memory the batch is sequences [S, L, ...] with `is_init` [S, L], and `state` [S, ...] before the first
        step. A `burn_in` part (`observation, is_init` [S, K, ...] and the `state` before it) is stepped through first,
        without gradients, and the state it ends in replaces `state` where `burn_in["real"]` [S] is True.
        """
        inputs = self.inputs(batch["observation"])
        if not self.has_memory:
            return self.encoder(inputs)
        state = batch["state"]
        if "burn_in" in batch.keys():  # noqa: SIM118
            before = batch["burn_in"]
            with torch.no_grad():
                burnt = self.unroll(before["observation"], before["state"], before["is_init"])[1]
            state = reset_rows(state, map_tree(lambda x: x[:, -1], burnt), before["real"])
        return unroll(self.encoder, inputs, state, batch["is_init"])[0]

    def unroll(self, obs: Tree, state: State, is_init: Tensor) -> tuple[Tensor, State]:
        """Features [B, T, F] and the state after every step [B, T, ...]; see `networks.recurrent.unroll`."""
        return unroll(self.encoder, self.inputs(obs), state, is_init)

    def evaluate(self, batch: Any, features: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Log-probability of `batch["action"]` given `batch["observation"]`, and the entropy; each [*B].

        Args:
            batch: see `features`; with `entropy_noise` [*B, distribution.num_noise], an entropy without closed form is
                estimated with it, unless a subclass has its own `evaluate_actions`.
            features: of the batch, if the caller has them already.
        """
        features = self.features(batch) if features is None else features
        obs, action, noise = batch["observation"], batch["action"], batch.get("entropy_noise", None)
        if noise is None or type(self).evaluate_actions is not Policy.evaluate_actions:
            log_prob, entropy = self.evaluate_actions(features, obs, action)
        else:
            log_prob, entropy = self.distribution.evaluate(self.action_parameters(features, obs), action, noise)
        shape = features.shape[:-1]
        if log_prob.shape != shape or entropy.shape != shape:
            raise OptionError(
                f"policy_class={type(self).__name__}: evaluate_actions gave a log-probability of shape "
                f"{tuple(log_prob.shape)} and an entropy of shape {tuple(entropy.shape)}: expected {tuple(shape)} both."
            )
        return log_prob, entropy

    def action_parameters(self, features: Tensor, obs: Tree) -> Tensor:
        """The action distribution's parameters, [*B, F] to [*B, P]: the head's, with illegal actions ruled out."""
        out = self.head(features).float()  # whatever the precision the network computes in
        if self.log_std is not None:
            out = torch.cat([out, self.log_std.expand(*out.shape[:-1], -1)], -1)
        return self.rule_out(out, obs)

    def rule_out(self, parameters: Tensor, obs: Tree) -> Tensor:
        """Parameters [*B, P] with the logits, or values, of actions that the observations' mask forbids very low."""
        return parameters if self.masks is None else self.masks.apply(parameters, obs[ACTION_MASK])

    def inputs(self, obs: Tree) -> Tree:
        """Observations in tensors as the encoder takes them, and the critic too: without mask, normalised."""
        obs = as_input(self.input_space, self.unmasked(obs))
        return obs if self.normalizer is None else self.normalizer(obs)

    def unmasked(self, obs: Tree) -> Tree:
        """What `inputs` takes of observations: the part "observation", if the mask is all that is beside it."""
        return obs["observation"] if self._unwraps else obs

    def update_normalizer(self, obs: Tree, mask: Tensor | None = None) -> None:
        """Take observations [*N, *obs] into the statistics, if there are any; `mask` [*N] says which are real."""
        if self.normalizer is not None:
            self.normalizer.update(self.unmasked(obs), mask)

    # --- plain data ---------------------------------------------------------------------------------------------

    def describe(self) -> dict[str, Any]:
        """Plain data from which `Policy.from_description` builds the same policy, without its weights."""
        return {
            "spec": self.spec.to_dict(),
            "class": class_name(type(self)),
            "network": describe_network(self._network),
            "arguments": dict(self._arguments),
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
            CheckpointError: if the network or the policy's class is the user's own and was not passed.
        """
        name = description["class"]
        if (name in POLICIES) != (class_name(cls) in POLICIES) or name.split(":")[-1] != cls.__qualname__:
            raise CheckpointError(
                f"The policy was trained with policy_class={name}, not {class_name(cls)}: pass that class."
            )
        spec = EnvSpec.from_dict(description["spec"])
        with torch.random.fork_rng(devices=[]):  # its first weights are thrown away: they cost no random numbers
            return cls(spec, network=network or description["network"], **description["arguments"])

    def maker(self) -> "Callable[[], Policy]":
        """What makes policies of this structure, with weights of their own, also in another process."""
        return functools.partial(type(self).from_description, self.describe(), network=self._network)

    def acting_copy(self) -> "Policy":
        """A copy, on the CPU, that plays and leaves this one as it is."""
        copy = self.maker()()
        copy.load_weights({name: tensor.cpu() for name, tensor in self.state_dict().items()})
        return copy.eval()

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
                f"{' '.join(str(error).split())}. Pass the network it was trained with as network=, in "
                "functools.partial(...) if it had arguments."
            ) from error

    # ------------------------------------------------------------------------------------------------------------

    @property
    def _device(self) -> torch.device:
        return next(self.parameters()).device

    def _explore(self, action: Tree, obs: Tree, batch: int) -> Tree:
        """Some of the actions [B, *action], each with probability `epsilon`, replaced by random legal ones."""
        chosen = self.rng.random(batch) < self.epsilon
        if not np.count_nonzero(chosen):
            return action
        legal = np.zeros((batch, self.distribution.num_outputs), np.float32)
        if self.masks is not None:
            self.masks.apply_numpy(legal, obs[ACTION_MASK])
        random = self.distribution.uniform(legal, self.rng)
        return map_tree(lambda x, y: np.where(chosen.reshape(-1, *[1] * (x.ndim - 1)), y, x), action, random)

    def _check_chosen(self, action: Tree, log_prob: np.ndarray, batch: int) -> None:
        """Refuse what a subclass's `choose` gave if it has not the action space's parts and shapes."""
        expected = {
            path: (batch, *(s.shape or ())) for path, s in space_leaves(self.spec.action_space, "action").items()
        }
        found = {path: np.shape(leaf) for path, leaf in iterate(action, "action")}
        if found != expected or np.shape(log_prob) != (batch,):
            raise OptionError(
                f"policy_class={type(self).__name__}: choose gave {found} and log-probabilities of shape "
                f"{np.shape(log_prob)}: expected {expected} and ({batch},)."
            )

    def see_weights(self) -> None:
        """Notice parameters that were replaced: `act` does so, and an env runner once per fragment."""
        twin = None if self._numpy is None else self._numpy[1]
        if twin is not None and not twin.is_current:
            self.weights_moved()

    def _in_numpy(self) -> NumpyPolicy | None:
        """The numpy form, if there is one: looked for again when the head has another weight."""
        head = self._modules.get("head")  # `self.head` takes longer, and this is asked in every step
        weight = None if head is None else head._parameters.get("weight")
        if self._numpy is None or self._numpy[0] is not weight:
            self._numpy = weight, NumpyPolicy.of(self)
        return self._numpy[1]

    @property
    def acts_in_numpy(self) -> bool:
        """Whether actions for a few observations are computed by the numpy form."""
        return self._in_numpy() is not None

    def weights_moved(self) -> None:
        """To be called when parameters got other memory, or layers or hooks were added: the numpy form is made anew."""
        self._numpy = None

    def _apply(self, fn: Any, recurse: bool = True) -> "Policy":
        self.weights_moved()
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_numpy": None}


def class_name(cls: type) -> str:
    """How a checkpoint names a policy's class."""
    return cls.__name__ if POLICIES.get(cls.__name__) is cls else f"{cls.__module__}:{cls.__qualname__}"
