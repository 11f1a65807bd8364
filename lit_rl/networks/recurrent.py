"""Networks with memory, and how they are unrolled over sequences in which episodes end.

A network has memory if it has a method `initial_state(num_envs)`: its state at an episode's start, a tensor
[num_envs, ...] or a dict of such. Its `forward(obs, state)` is one step, [B, *obs] -> (features [B, output_size],
next state). That is all a network of one's own needs; `unroll` then steps it through time. A network that can unroll
itself faster has a method `unroll(obs, state, is_init)` as well.
"""

from typing import Any

import gymnasium as gym
import torch
from torch import Tensor, nn

from lit_rl.checks import check_count
from lit_rl.errors import OptionError
from lit_rl.networks.build import NetworkFactory, build_network, built_in, has_memory, output_size
from lit_rl.trees import Tree, map_tree


def reset_rows(state: Tree, initial: Tree, is_init: Tensor) -> Tree:
    """`state` [B, ...] with the rows where `is_init` [B] is True replaced by those of `initial`."""

    def reset(x: Tensor, start: Tensor) -> Tensor:
        return torch.where(is_init.reshape(-1, *[1] * (x.ndim - 1)), start, x)

    return map_tree(reset, state, initial)


def unroll_steps(network: Any, obs: Tree, state: Tree, is_init: Tensor) -> tuple[Tensor, Tree]:
    """Features [B, T, output_size] of sequences and the state after every step [B, T, ...], one step at a time.

    Args:
        network: with memory.
        obs: [B, T, *obs].
        state: before the first step, [B, ...].
        is_init: [B, T], True where an episode begins: there the state is the initial one.
    """
    initial = network.initial_state(len(is_init))
    features, states = [], []
    for t in range(is_init.shape[1]):
        state = reset_rows(state, initial, is_init[:, t])
        step_features, state = network(map_tree(lambda x, t=t: x[:, t], obs), state)
        features.append(step_features)
        states.append(state)
    return torch.stack(features, 1), map_tree(lambda *xs: torch.stack(xs, 1), *states)


def unroll(network: Any, obs: Tree, state: Tree, is_init: Tensor) -> Tensor:
    """Features [B, T, output_size] of sequences; gradients flow through time, back to each episode's start.

    Arguments as of `unroll_steps`.
    """
    if hasattr(network, "unroll"):
        return network.unroll(obs, state, is_init)
    return unroll_steps(network, obs, state, is_init)[0]


class _Recurrent(nn.Module):
    """An encoder and one recurrent layer of torch's. The state is a dict of tensors [B, hidden_size]."""

    STATE: tuple[str, ...]

    def __init__(self, observation_space: gym.Space, layer: Any, hidden_size: int, encoder: NetworkFactory | None):
        super().__init__()
        self.encoder = build_network(encoder, observation_space)
        if has_memory(self.encoder):
            raise OptionError(f"encoder={type(self.encoder).__name__}: expected a network without memory.")
        self.rnn = layer(output_size(self.encoder), check_count("hidden_size", hidden_size), batch_first=True)
        for name, parameter in self.rnn.named_parameters():
            nn.init.orthogonal_(parameter) if name.startswith("weight") else nn.init.zeros_(parameter)
        self.output_size = hidden_size

    def initial_state(self, num_envs: int) -> dict[str, Tensor]:
        return {name: self.rnn.weight_hh_l0.new_zeros(num_envs, self.output_size) for name in self.STATE}

    def forward(self, obs: Tree, state: Tree) -> tuple[Tensor, Tree]:
        features, state = self._run(self.encoder(obs).unsqueeze(1), state)
        return features.squeeze(1), state

    def unroll(self, obs: Tree, state: Tree, is_init: Tensor) -> Tensor:
        """`unroll_steps` without the states: sequences are cut where episodes begin, and the pieces run side by side.

        torch's layer takes a whole sequence in one call, but cannot be reset inside of it.
        """
        inputs = self.encoder(obs)
        batch, length = is_init.shape
        if not is_init[:, 1:].any():
            return self._run(inputs, reset_rows(state, self.initial_state(batch), is_init[:, 0]))[0]
        starts = is_init.clone()
        starts[:, 0] = True
        first = starts.flatten().nonzero().squeeze(1)  # row of each piece's first step, among all [B * T]
        end = torch.cat([first[1:], first.new_tensor([batch * length])])
        steps = first.unsqueeze(1) + torch.arange(int((end - first).max()), device=first.device)
        state = map_tree(lambda x: x[first // length], state)
        state = reset_rows(state, self.initial_state(len(first)), is_init.flatten()[first])
        # Short pieces run on over rows that are not theirs, to the length of the longest; that is thrown away.
        features, _ = self._run(inputs.flatten(0, 1)[steps.clamp(max=batch * length - 1)], state)
        return features[steps < end.unsqueeze(1)].unflatten(0, (batch, length))

    def _run(self, inputs: Tensor, state: Tree) -> tuple[Tensor, Tree]:
        """The layer over inputs [B, T, *] from `state`: features [B, T, hidden_size] and the state after them."""
        before = tuple(state[name].unsqueeze(0) for name in self.STATE)
        features, after = self.rnn(inputs, before if len(before) > 1 else before[0])
        after = after if len(before) > 1 else (after,)
        return features, {name: x.squeeze(0) for name, x in zip(self.STATE, after)}


@built_in
class LSTMNetwork(_Recurrent):
    """An encoder followed by a long short-term memory: Hochreiter & Schmidhuber 1997, doi:10.1162/neco.1997.9.8.1735.

    Args:
        observation_space: what the encoder is given.
        hidden_size: of the memory; the `output_size`.
        encoder: callable `(observation_space) -> nn.Module` without memory; None for the space's default network.
    """

    STATE = ("h", "c")

    def __init__(self, observation_space: gym.Space, *, hidden_size: int = 64, encoder: NetworkFactory | None = None):
        super().__init__(observation_space, nn.LSTM, hidden_size, encoder)


@built_in
class GRUNetwork(_Recurrent):
    """An encoder followed by gated recurrent units: Cho et al. 2014, arXiv:1406.1078.

    Args:
        observation_space: what the encoder is given.
        hidden_size: of the memory; the `output_size`.
        encoder: callable `(observation_space) -> nn.Module` without memory; None for the space's default network.
    """

    STATE = ("h",)

    def __init__(self, observation_space: gym.Space, *, hidden_size: int = 64, encoder: NetworkFactory | None = None):
        super().__init__(observation_space, nn.GRU, hidden_size, encoder)
