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
    linears, norms, activations = _parts(encoder.layers)
    linears.append(head)
    return (
        not policy.own_methods
        and type(encoder.input) is FlatInput
        and not encoder.input.embeddings
        and type(policy.normalizer) in (type(None), ObservationNormalizer)
        # A layer with weight_norm is of another class, and so is a quantised or lazy one.
        and all(type(layer) is nn.Linear and layer.bias is not None for layer in linears)
        and all(norm is None or (type(norm) is nn.LayerNorm and norm.bias is not None) for norm in norms)
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
        linears, norms, activations = _parts(policy.encoder.layers)
        linears.append(policy.head)
        self._modules = policy.encoder, policy.head
        # Who holds which parameter, and where its numbers are.
        self._memory = [
            (layer._parameters, name, parameter, parameter.data_ptr())
            for layer in (*linears, *filter(None, norms))
            for name, parameter in layer._parameters.items()
            if parameter is not None
        ]
        first, *weights = [linear.weight.detach().numpy().T for linear in linears]
        *biases, self._last_bias = [linear.bias.detach().numpy() for linear in linears]
        after = [_LayerNorm(norm) if norm is not None else None for norm in norms]
        self._layers = list(zip(biases, after, [ACTIVATIONS[type(each)] for each in activations], weights))
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
        for bias, norm, activation, weight in self._layers:
            x += bias
            x = activation(x if norm is None else norm(x)) @ weight
        x += self._last_bias
        log_std = policy.log_std
        if log_std is not None:
            log_std = log_std.detach().numpy()
            x = np.concatenate([x, np.broadcast_to(log_std, (len(x), len(log_std)))], -1)
        if policy.masks is not None:
            policy.masks.apply_numpy(x, obs[ACTION_MASK])
        return x


class _LayerNorm:
    """A `nn.LayerNorm` over the last axis, in place."""

    def __init__(self, norm: nn.LayerNorm):
        self._weight, self._bias = norm.weight.detach().numpy(), norm.bias.detach().numpy()
        self._eps, self._share = norm.eps, np.float32(1 / norm.normalized_shape[0])

    def __call__(self, x: np.ndarray) -> np.ndarray:
        x -= x.sum(-1, keepdims=True) * self._share
        variance = np.einsum("...i,...i->...", x, x)[..., None] * self._share
        x *= self._weight / np.sqrt(variance + self._eps)
        x += self._bias
        return x


def _parts(layers: Any) -> tuple[list[Any], list[Any], list[Any]]:
    """An MLP's layers: the linear ones, the norm after each (or None), and the activations."""
    rest, linears, norms, activations = list(layers), [], [], []
    while rest:
        linears.append(rest.pop(0))
        norms.append(rest.pop(0) if len(rest) > 1 and isinstance(rest[0], nn.LayerNorm) else None)
        activations.append(rest.pop(0) if rest else None)
    return linears, norms, activations
