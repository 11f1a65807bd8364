"""What a policy's MLP and head compute, in numpy: five times faster on a few observations than in torch."""

from collections.abc import Callable
from typing import Any

import numpy as np
from gymnasium import spaces
from torch import nn

from lit_rl.masks import ACTION_MASK
from lit_rl.networks.inputs import FlatInput
from lit_rl.networks.mlp import MLP
from lit_rl.normalizer import ObservationNormalizer
from lit_rl.trees import Tree

ACTIVATIONS: dict[type[nn.Module], Callable[[np.ndarray], np.ndarray]] = {
    nn.Tanh: lambda x: np.tanh(x, out=x),
    nn.ReLU: lambda x: np.maximum(x, 0, out=x),
}
# What numpy does in their place: a subclass of `Policy` that overrides one acts in torch. (A `draw` is given tensors.)
METHODS = ("inputs", "action_parameters", "rule_out", "choose", "draw")


def has_twin(policy: Any) -> bool:
    """Whether a `NumpyPolicy` computes what the policy computes in torch: all conditions are here.

    They are looked at when a policy acts with other parameters or after `Policy.weights_moved`, not in every step: a
    hook that is added in between is not seen.
    """
    encoder, head = policy.encoder, getattr(policy, "head", None)
    is_mlp = isinstance(encoder, MLP) and type(encoder).forward is MLP.forward
    if not is_mlp or type(encoder.layers) is not nn.Sequential:
        return False
    layers = [*encoder.layers, head]
    linears, activations = layers[0::2], layers[1::2]
    return (
        not policy.own_methods
        and type(encoder.input) is FlatInput
        and not encoder.input.embeddings
        and type(policy.normalizer) in (type(None), ObservationNormalizer)
        # A layer with weight_norm is of another class, and so is a quantised or lazy one.
        and all(type(layer) is nn.Linear and layer.bias is not None for layer in linears)
        and all(type(activation) in ACTIVATIONS for activation in activations)
        and all(parameter.device.type == "cpu" for parameter in policy.parameters())
        and not any(module._forward_hooks or module._forward_pre_hooks for module in policy.modules())
    )


class NumpyPolicy:
    """A policy's action parameters, the same as in torch to float32 rounding.

    The arrays share memory with the policy's parameters and statistics: updates in place are seen.

    Args:
        policy: a `Policy` that has such a twin; see `of`.
    """

    def __init__(self, policy: Any):
        self._policy = policy
        flat, space = policy.encoder.input, policy.encoder.input.space
        linears = [*policy.encoder.layers[0::2], policy.head]
        self._modules = policy.encoder, policy.head
        # Who holds which parameter, and where its numbers are.
        self._memory = [
            (linear._parameters, name, parameter, parameter.data_ptr())
            for linear in linears
            for name, parameter in linear._parameters.items()
            if parameter is not None
        ]
        first, *weights = [linear.weight.detach().numpy().T for linear in linears]
        *biases, self._last_bias = [linear.bias.detach().numpy() for linear in linears]
        activations = [ACTIVATIONS[type(activation)] for activation in policy.encoder.layers[1::2]]
        self._layers = list(zip(biases, activations, weights))
        # Observations times the first weight. A one-hot row times a matrix is a row of the matrix: none is made.
        self._product: Callable[[Tree], np.ndarray]
        if isinstance(space, spaces.Discrete):
            start = int(space.start)
            self._product = lambda x: first[x - start]
        elif flat.is_vector:
            self._product = lambda x: x @ first
        else:
            self._product = lambda x: flat.numpy(x) @ first

    @classmethod
    def of(cls, policy: Any) -> "NumpyPolicy | None":
        """The numpy form of a `Policy`, None if it has none."""
        return cls(policy) if has_twin(policy) else None

    @property
    def is_current(self) -> bool:
        """Whether the policy still has the layers, and these the parameters in the memory, that the arrays are of."""
        modules = self._policy._modules
        return (modules["encoder"], modules["head"]) == self._modules and all(
            held.get(name) is parameter and parameter.data_ptr() == where
            for held, name, parameter, where in self._memory
        )

    def action_parameters(self, obs: Tree) -> np.ndarray:
        """`Policy.action_parameters` of observations [B, *obs], [B, P]."""
        policy = self._policy
        x = policy.unmasked(obs)
        if policy.normalizer is not None:
            x = policy.normalizer.numpy(x)
        x = self._product(x)
        for bias, activation, weight in self._layers:
            x += bias
            x = activation(x) @ weight
        x += self._last_bias
        log_std = policy.log_std
        if log_std is not None:
            log_std = log_std.detach().numpy()
            x = np.concatenate([x, np.broadcast_to(log_std, (len(x), len(log_std)))], -1)
        if policy.masks is not None:
            policy.masks.apply_numpy(x, obs[ACTION_MASK])
        return x
