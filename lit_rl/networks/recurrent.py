"""Networks with memory, and how they are unrolled over sequences in which episodes end.

A network has memory if it has a method `initial_state(num_envs)`: its state at an episode's start, a tensor
[num_envs, ...] or a dict of such. Its `forward(obs, state)` is one step, [B, *obs] -> (features [B, output_size],
next state). That is all a network of one's own needs; `unroll` then steps it through time. A network that can do that
faster has a method `unroll(obs, state, is_init)` of the same meaning.
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


def unroll(network: Any, obs: Tree, state: Tree, is_init: Tensor) -> tuple[Tensor, Tree]:
    """Features [B, T, output_size] of sequences, and the state after every step, [B, T, ...].

    Gradients flow from the features through time, back to each episode's start.

    Args:
        network: with memory; it is stepped through time, unless it has a method of its own to do so.
        obs: [B, T, *obs].
        state: before the first step, [B, ...].
        is_init: [B, T], True where an episode begins: there the state is the initial one.
    """
    if hasattr(network, "unroll"):
        return network.unroll(obs, state, is_init)
    initial = network.initial_state(len(is_init))
    features, states = [], []
    for t in range(is_init.shape[1]):
        state = reset_rows(state, initial, is_init[:, t])
        step_features, state = network(map_tree(lambda x, t=t: x[:, t], obs), state)
        features.append(step_features)
        states.append(state)
    return torch.stack(features, 1), map_tree(lambda *xs: torch.stack(xs, 1), *states)


class _Recurrent(nn.Module):
    """An encoder and a recurrent layer. The state is a dict of tensors [B, hidden_size]."""

    STATE: tuple[str, ...]
    cell: nn.LSTMCell | nn.GRUCell

    def __init__(self, observation_space: gym.Space, cell: Any, hidden_size: int, encoder: NetworkFactory | None):
        super().__init__()
        self.encoder = build_network(encoder, observation_space)
        if has_memory(self.encoder):
            raise OptionError(f"encoder={type(self.encoder).__name__}: expected a network without memory.")
        self.cell = cell(output_size(self.encoder), check_count("hidden_size", hidden_size))
        for name, parameter in self.cell.named_parameters():
            nn.init.orthogonal_(parameter) if name.startswith("weight") else nn.init.zeros_(parameter)
        self.output_size = hidden_size

    def initial_state(self, num_envs: int) -> dict[str, Tensor]:
        return {name: self.cell.weight_hh.new_zeros(num_envs, self.output_size) for name in self.STATE}

    def unroll(self, obs: Tree, state: Tree, is_init: Tensor) -> tuple[Tensor, Tree]:
        """All steps in one autograd node: three times faster than step by step. No gradient flows from the states."""
        cell = self.cell
        inputs = nn.functional.linear(self.encoder(obs), cell.weight_ih, cell.bias_ih).transpose(0, 1)
        keep = (~is_init).to(cell.weight_hh.dtype).t().unsqueeze(-1)
        with torch.autocast(inputs.device.type, enabled=False):
            sequences = self._sequences(inputs.float(), state, keep)
        states = {name: sequence.transpose(0, 1) for name, sequence in zip(self.STATE, sequences)}
        return states["h"], states

    def _sequences(self, inputs: Tensor, state: Tree, keep: Tensor) -> tuple[Tensor, ...]:
        """The state's parts after every step, [T, B, hidden_size].

        Args:
            inputs: the gates' share that comes from the encoder, [T, B, number of gates * hidden_size].
            state: before the first step.
            keep: [T, B, 1], 0 where an episode begins, else 1.
        """
        raise NotImplementedError


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
        super().__init__(observation_space, nn.LSTMCell, hidden_size, encoder)

    def forward(self, obs: Tree, state: Tree) -> tuple[Tensor, Tree]:
        h, c = self.cell(self.encoder(obs), (state["h"], state["c"]))
        return h, {"h": h, "c": c}

    def _sequences(self, inputs: Tensor, state: Tree, keep: Tensor) -> tuple[Tensor, ...]:
        return _LSTMSequence.apply(inputs, state["h"], state["c"], keep, self.cell.weight_hh, self.cell.bias_hh)


@built_in
class GRUNetwork(_Recurrent):
    """An encoder followed by gated recurrent units: Cho et al. 2014, arXiv:1406.1078, in torch's form.

    Args:
        observation_space: what the encoder is given.
        hidden_size: of the memory; the `output_size`.
        encoder: callable `(observation_space) -> nn.Module` without memory; None for the space's default network.
    """

    STATE = ("h",)

    def __init__(self, observation_space: gym.Space, *, hidden_size: int = 64, encoder: NetworkFactory | None = None):
        super().__init__(observation_space, nn.GRUCell, hidden_size, encoder)

    def forward(self, obs: Tree, state: Tree) -> tuple[Tensor, Tree]:
        h = self.cell(self.encoder(obs), state["h"])
        return h, {"h": h}

    def _sequences(self, inputs: Tensor, state: Tree, keep: Tensor) -> tuple[Tensor, ...]:
        return (_GRUSequence.apply(inputs, state["h"], keep, self.cell.weight_hh, self.cell.bias_hh),)


# The layers over whole sequences, with their gradients written out: torch's own cannot be reset where an episode
# begins, and stepping torch's cells through autograd costs three times as much. Checked by gradcheck in the tests.


class _LSTMSequence(torch.autograd.Function):
    """h_t, c_t [T, B, H] of an LSTM whose state is multiplied by `keep` before every step.

    i, f, g, o = inputs_t + W h + b;  c_t = sigmoid(f) c + sigmoid(i) tanh(g);  h_t = sigmoid(o) tanh(c_t)
    """

    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, h: Tensor, c: Tensor, keep: Tensor, weight: Tensor, bias: Tensor
    ) -> tuple[Tensor, Tensor]:
        length, batch, size = inputs.shape[0], inputs.shape[1], h.shape[-1]
        gates = inputs + bias
        hs, cs = inputs.new_empty(length, batch, size), inputs.new_empty(length, batch, size)
        before_h, before_c, tanh_c = torch.empty_like(hs), torch.empty_like(cs), torch.empty_like(cs)
        weight_t = weight.t()
        for t in range(length):
            torch.mul(h, keep[t], out=before_h[t])
            torch.mul(c, keep[t], out=before_c[t])
            gate = gates[t].addmm_(before_h[t], weight_t)
            gate[:, : 2 * size].sigmoid_()
            gate[:, 2 * size : 3 * size].tanh_()
            gate[:, 3 * size :].sigmoid_()
            i, f, g, o = gate.split(size, 1)
            c = torch.mul(f, before_c[t], out=cs[t]).addcmul_(i, g)
            h = torch.mul(o, torch.tanh(c, out=tanh_c[t]), out=hs[t])
        ctx.save_for_backward(gates, before_h, before_c, tanh_c, keep, weight)
        ctx.mark_non_differentiable(cs)
        return hs, cs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gates, before_h, before_c, tanh_c, keep, weight = ctx.saved_tensors
        size = before_h.shape[-1]
        i, f, g, o = gates.split(size, -1)
        # What of each gate's gradient does not depend on later steps, for all steps at once.
        d_c_of_h = o * (1 - tanh_c * tanh_c)
        local = torch.cat([g * i * (1 - i), before_c * f * (1 - f), i * (1 - g * g), tanh_c * o * (1 - o)], -1)
        d_h, d_c = torch.zeros_like(before_h[0]), torch.zeros_like(before_h[0])
        d_gates = torch.empty_like(gates)
        for t in reversed(range(len(gates))):
            d_h = d_h + grads[0][t]
            d_c = d_c.addcmul(d_h, d_c_of_h[t])
            d_gate = torch.mul(local[t], torch.cat([d_c, d_c, d_c, d_h], 1), out=d_gates[t])
            d_h = (d_gate @ weight).mul_(keep[t])
            d_c = d_c.mul_(f[t]).mul_(keep[t])
        flat = d_gates.flatten(0, 1)
        return d_gates, d_h, d_c, None, flat.t() @ before_h.flatten(0, 1), flat.sum(0)


class _GRUSequence(torch.autograd.Function):
    """h_t [T, B, H] of gated recurrent units whose state is multiplied by `keep` before every step.

    r, z = sigmoid(inputs_t + W h + b);  n = tanh(inputs_t + r (W h + b));  h_t = n + z (h - n)
    """

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, h: Tensor, keep: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        length, batch, size = inputs.shape[0], inputs.shape[1], h.shape[-1]
        hs = inputs.new_empty(length, batch, size)
        before = torch.empty_like(hs)
        r_z, n = inputs[..., : 2 * size].clone(), inputs[..., 2 * size :].clone()
        recurrent = inputs.new_empty(length, batch, 3 * size)
        weight_t = weight.t()
        for t in range(length):
            torch.mul(h, keep[t], out=before[t])
            torch.addmm(bias, before[t], weight_t, out=recurrent[t])
            r_z[t].add_(recurrent[t, :, : 2 * size]).sigmoid_()
            n[t].addcmul_(r_z[t, :, :size], recurrent[t, :, 2 * size :]).tanh_()
            h = torch.lerp(n[t], before[t], r_z[t, :, size:], out=hs[t])
        ctx.save_for_backward(r_z, n, before, recurrent[..., 2 * size :], keep, weight)
        return hs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        r_z, n, before, recurrent_n, keep, weight = ctx.saved_tensors
        size = n.shape[-1]
        r, z = r_z.split(size, -1)
        d_n = (1 - z) * (1 - n * n)
        # The gates' gradients per unit of h's, and the same with n's share as the recurrent part sees it: through r.
        d_r, d_z = d_n * recurrent_n * r * (1 - r), (before - n) * z * (1 - z)
        per_h = torch.cat([d_r, d_z, d_n * r], -1)
        d_h, d_hs = torch.zeros_like(n[0]), torch.empty_like(n)
        for t in reversed(range(len(n))):
            d_h = torch.add(d_h, grads[0][t], out=d_hs[t])
            recurrent = (per_h[t] * d_h.repeat(1, 3)) @ weight
            d_h = recurrent.addcmul_(d_h, z[t]).mul_(keep[t])
        d_recurrent = (per_h * d_hs.repeat(1, 1, 3)).flatten(0, 1)
        d_inputs = torch.cat([d_r, d_z, d_n], -1) * d_hs.repeat(1, 1, 3)
        return d_inputs, d_h, None, d_recurrent.t() @ before.flatten(0, 1), d_recurrent.sum(0)
