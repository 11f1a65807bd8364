"""Several networks of one shape, evaluated together."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lit_rl.trees import Tree


class Ensemble(nn.Module):
    """K fully connected networks with ReLU, one batched matrix product per layer: [*B, input_size] -> [K, *B, O].

    Args:
        num: K.
        input_size: of each.
        hidden_sizes: width of each layer.
        output_size: O.
    """

    def __init__(self, num: int, input_size: int, hidden_sizes: Sequence[int], output_size: int):
        super().__init__()
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for outputs in (*hidden_sizes, output_size):
            bound = input_size**-0.5  # as torch initialises a Linear
            self.weights.append(nn.Parameter(torch.empty(num, input_size, outputs).uniform_(-bound, bound)))
            self.biases.append(nn.Parameter(torch.empty(num, 1, outputs).uniform_(-bound, bound)))
            input_size = outputs

    def forward(self, x: Tensor, frozen: bool = False) -> Tensor:
        """With `frozen` gradients reach the input, but not the parameters."""
        shape = x.shape[:-1]
        x = x.reshape(-1, x.shape[-1])
        hidden = x.expand(len(self.weights[0]), *x.shape)
        last = len(self.weights) - 1
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases)):
            if frozen:
                weight, bias = weight.detach(), bias.detach()
            if weight.shape[-1] == 1:  # a batched product with one column takes six times as long
                hidden = (hidden * weight.mT).sum(-1, keepdim=True) + bias
            elif torch.compiler.is_compiling():  # which adds the bias while it applies the ReLU
                hidden = torch.bmm(hidden, weight) + bias
            else:
                hidden = torch.baddbmm(bias, hidden, weight)
            if i < last:
                hidden = hidden.relu_()
        return hidden.unflatten(1, shape)


class Critics(nn.Module):
    """K critics with an encoder of their own or features from elsewhere.

    Args:
        encoder: of observations; None where features are given.
        num: K.
        num_features: what the encoder gives, or is given instead.
        num_actions: numbers of a continuous action, which the critics are given too; 0 where they value all of a
            Discrete's actions instead.
        hidden_sizes: of the critics' own layers.
        output_size: numbers that each gives.
    """

    def __init__(
        self,
        encoder: nn.Module | None,
        *,
        num: int,
        num_features: int,
        num_actions: int,
        hidden_sizes: Sequence[int],
        output_size: int,
    ):
        super().__init__()
        self.encoder: Any = encoder
        self.heads = Ensemble(num, num_features + num_actions, hidden_sizes, output_size)

    def features(self, inputs: Tree, given: Tensor) -> Tensor:
        """What `forward` takes: the encoder's features of observations, or those that are given."""
        return given if self.encoder is None else self.encoder(inputs)

    def forward(self, features: Tensor, action: Tensor | None = None, *, frozen: bool = False) -> Tensor:
        """Features [*B, F] and actions [*B, *action] to [K, *B, output_size]."""
        if action is not None:
            features = torch.cat([features, action.reshape(*features.shape[:-1], -1)], -1)
        return self.heads(features, frozen).float()
