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

from lit_rl.errors import OptionError
from lit_rl.networks.build import NetworkFactory, build_network, built_in, has_memory, output_size
from lit_rl.options import Count, check
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
        network: with memory; it is stepped through time, unless it has an `unroll` that does the same at once.
        obs: [B, T, *obs].
        state: before the first step, [B, ...].
        is_init: [B, T], True where an episode begins: there the state is the initial one.
    """
    if has_own_unroll(network):
        return network.unroll(obs, state, is_init)
    initial = network.initial_state(len(is_init))
    features, states = [], []
    for t in range(is_init.shape[1]):
        state = reset_rows(state, initial, is_init[:, t])
        step_features, state = network(map_tree(lambda x, t=t: x[:, t], obs), state)
        features.append(step_features)
        states.append(state)
    return torch.stack(features, 1), map_tree(lambda *xs: torch.stack(xs, 1), *states)


def has_own_unroll(network: Any) -> bool:
    """Whether a network's `unroll` does what calling it step by step does.

    It is that of the class that defines `forward`, or of a subclass: not one that was inherited by a class with another
    `forward`. What is put around modules (hooks, weight_norm) goes around `unroll`.
    """
    owners = {
        name: next((cls for cls in type(network).__mro__ if name in vars(cls)), None) for name in ("unroll", "forward")
    }
    unroll_of, forward_of = owners["unroll"], owners["forward"]
    if unroll_of is None or forward_of is None or not issubclass(unroll_of, forward_of):
        return False
    cell = getattr(network, "cell", None)
    if issubclass(unroll_of, _Recurrent) and type(cell) is not unroll_of.CELL:
        return False
    around = [module for module in (network, cell) if isinstance(module, nn.Module)]
    return not any(module._forward_hooks or module._forward_pre_hooks for module in around)


class _Recurrent(nn.Module):
    """An encoder and a recurrent layer. The state is a dict of tensors [B, hidden_size]."""

    CELL: type[nn.LSTMCell | nn.GRUCell]
    STATE: tuple[str, ...]
    cell: nn.LSTMCell | nn.GRUCell

    def __init__(self, observation_space: gym.Space, *, hidden_size: int = 64, encoder: NetworkFactory | None = None):
        super().__init__()
        self.encoder = build_network(encoder, observation_space)
        if has_memory(self.encoder):
            raise OptionError(f"encoder={type(self.encoder).__name__}: expected a network without memory.")
        self.cell = self.CELL(output_size(self.encoder), check("hidden_size", hidden_size, Count))
        for name, parameter in self.cell.named_parameters():
            nn.init.orthogonal_(parameter) if name.startswith("weight") else nn.init.zeros_(parameter)
        self.output_size = hidden_size

    def initial_state(self, num_envs: int) -> dict[str, Tensor]:
        return {name: self.cell.weight_hh.new_zeros(num_envs, self.output_size) for name in self.STATE}

    def _unroll(self, obs: Tree, state: Tree, is_init: Tensor) -> tuple[Tensor, Tree]:
        """All steps in one autograd node: four times faster than step by step. No gradient flows from the states."""
        cell = self.cell
        features = self.encoder(map_tree(lambda x: x.flatten(0, 1), obs)).unflatten(0, is_init.shape)
        inputs = nn.functional.linear(features, cell.weight_ih, cell.bias_ih).transpose(0, 1)
        with torch.autocast(inputs.device.type, enabled=False):
            sequences = self._sequences(inputs.to(cell.weight_hh.dtype), state, is_init.t())
        states = {name: sequence.transpose(0, 1) for name, sequence in zip(self.STATE, sequences)}
        return states["h"], states

    def _sequences(self, inputs: Tensor, state: Tree, is_init: Tensor) -> tuple[Tensor, ...]:
        """The state's parts after every step, [T, B, hidden_size].

        Args:
            inputs: the gates' share that comes from the encoder, [T, B, number of gates * hidden_size].
            state: before the first step.
            is_init: [T, B].
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

    CELL, STATE = nn.LSTMCell, ("h", "c")

    def forward(self, obs: Tree, state: Tree) -> tuple[Tensor, Tree]:
        h, c = self.cell(self.encoder(obs), (state["h"], state["c"]))
        return h, {"h": h, "c": c}

    unroll = _Recurrent._unroll

    def _sequences(self, inputs: Tensor, state: Tree, is_init: Tensor) -> tuple[Tensor, ...]:
        return _LSTMSequence.apply(inputs, state["h"], state["c"], is_init, self.cell.weight_hh, self.cell.bias_hh)


@built_in
class GRUNetwork(_Recurrent):
    """An encoder followed by gated recurrent units: Cho et al. 2014, arXiv:1406.1078, in torch's form.

    Args:
        observation_space: what the encoder is given.
        hidden_size: of the memory; the `output_size`.
        encoder: callable `(observation_space) -> nn.Module` without memory; None for the space's default network.
    """

    CELL, STATE = nn.GRUCell, ("h",)

    def forward(self, obs: Tree, state: Tree) -> tuple[Tensor, Tree]:
        h = self.cell(self.encoder(obs), state["h"])
        return h, {"h": h}

    unroll = _Recurrent._unroll

    def _sequences(self, inputs: Tensor, state: Tree, is_init: Tensor) -> tuple[Tensor, ...]:
        return (_GRUSequence.apply(inputs, state["h"], is_init, self.cell.weight_hh, self.cell.bias_hh),)


# The layers over whole sequences, with their gradients written out: torch's own cannot be reset where an episode
# begins, and stepping torch's cells through autograd takes four times as long. What a step costs here is the number of
# operations, not their size, so everything that needs no earlier step is done for all steps at once, and views are made
# once. Checked against finite differences and torch's cells in the tests.


def _reset_steps(is_init: Tensor) -> list[bool]:
    """At which steps any of the environments begins an episode."""
    return is_init.any(1).tolist()


def _before(first: Tensor, after: Tensor, is_init: Tensor) -> Tensor:
    """What a state was before every step, [T, B, H], from what it was before the first one and after each."""
    return torch.cat([first.unsqueeze(0), after[:-1]]).masked_fill(is_init.unsqueeze(-1), 0.0)


class _LSTMSequence(torch.autograd.Function):
    """h_t, c_t [T, B, H] of an LSTM whose state is zeroed before the steps where `is_init` [T, B].

    i, f, g, o = inputs_t + W h + b;  c_t = sigmoid(f) c + sigmoid(i) tanh(g);  h_t = sigmoid(o) tanh(c_t)
    """

    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, h: Tensor, c: Tensor, is_init: Tensor, weight: Tensor, bias: Tensor
    ) -> tuple[Tensor, Tensor]:
        length, batch, size = inputs.shape[0], inputs.shape[1], h.shape[-1]
        # sigmoid(x) = tanh(x / 2) / 2 + 1 / 2, so that one tanh serves all four gates.
        half = inputs.new_tensor([0.5, 0.5, 1.0, 0.5]).repeat_interleave(size)
        shift = half.masked_fill(half == 1, 0.0)
        gates = (inputs + bias) * half
        weight_t = (weight * half.unsqueeze(1)).t().contiguous()
        hs, cs = inputs.new_empty(2, length, batch, size).unbind(0)
        tanh_c = torch.empty_like(cs)
        first = h, c
        views = (is_init.unsqueeze(-1), gates, *gates.split(size, -1), hs, cs, tanh_c)
        steps = zip(_reset_steps(is_init), *(x.unbind(0) for x in views))
        for resets, reset, gate, i, f, g, o, h_out, c_out, tanh_out in steps:
            if resets:
                h, c = h.masked_fill(reset, 0.0), c.masked_fill(reset, 0.0)
            gate.addmm_(h, weight_t).tanh_().mul_(half).add_(shift)
            c = torch.mul(f, c, out=c_out).addcmul_(i, g)
            h = torch.mul(o, torch.tanh(c, out=tanh_out), out=h_out)
        ctx.save_for_backward(gates, *first, hs, cs, tanh_c, is_init, weight)
        ctx.mark_non_differentiable(cs)
        return hs, cs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gates, h, c, hs, cs, tanh_c, is_init, weight = ctx.saved_tensors
        before_h, before_c = _before(h, hs, is_init), _before(c, cs, is_init)
        i, f, g, o = gates.split(h.shape[-1], -1)
        # What a unit of c's gradient (i, f, g) or of h's (o) is for each gate, and what one of h's is for c.
        per_unit = torch.cat([g * i * (1 - i), before_c * f * (1 - f), i * (1 - g * g), tanh_c * o * (1 - o)], -1)
        c_per_h = o * (1 - tanh_c * tanh_c)
        d_h = d_c = torch.zeros_like(h)
        d_gates = torch.empty_like(gates)
        views = (is_init.unsqueeze(-1), d_gates, per_unit, c_per_h, f, grads[0])
        steps = zip(_reset_steps(is_init), *(x.unbind(0) for x in views))
        for resets, reset, d_gate, unit, c_of_h, forget, grad in reversed(list(steps)):
            d_h = d_h + grad
            d_c = torch.addcmul(d_c, d_h, c_of_h)
            torch.mul(unit, torch.cat([d_c, d_c, d_c, d_h], 1), out=d_gate)
            d_h, d_c = d_gate @ weight, d_c * forget
            if resets:
                d_h, d_c = d_h.masked_fill(reset, 0.0), d_c.masked_fill(reset, 0.0)
        flat = d_gates.flatten(0, 1)
        return d_gates, d_h, d_c, None, flat.t() @ before_h.flatten(0, 1), flat.sum(0)


class _GRUSequence(torch.autograd.Function):
    """h_t [T, B, H] of gated recurrent units whose state is zeroed before the steps where `is_init` [T, B].

    r, z = sigmoid(inputs_t + W h + b);  n = tanh(inputs_t + r (W h + b));  h_t = n + z (h - n)
    """

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, h: Tensor, is_init: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        length, batch, size = inputs.shape[0], inputs.shape[1], h.shape[-1]
        hs = inputs.new_empty(length, batch, size)
        gates, recurrent = inputs.clone(), torch.empty_like(inputs)
        r_z, n = gates.split([2 * size, size], -1)
        first, weight_t = h, weight.t().contiguous()
        parts = recurrent.split([2 * size, size], -1)
        views = (is_init.unsqueeze(-1), recurrent, *parts, r_z, *r_z.split(size, -1), n, hs)
        steps = zip(_reset_steps(is_init), *(x.unbind(0) for x in views))
        for resets, reset, out, recurrent_rz, recurrent_n, rz_t, r_t, z_t, n_t, h_out in steps:
            if resets:
                h = h.masked_fill(reset, 0.0)
            torch.addmm(bias, h, weight_t, out=out)
            rz_t.add_(recurrent_rz).sigmoid_()
            n_t.addcmul_(r_t, recurrent_n).tanh_()
            h = torch.lerp(n_t, h, z_t, out=h_out)
        ctx.save_for_backward(gates, first, hs, recurrent, is_init, weight)
        return hs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gates, h, hs, recurrent, is_init, weight = ctx.saved_tensors
        before = _before(h, hs, is_init)
        size = h.shape[-1]
        r, z, n = gates.split(size, -1)
        # What a unit of h's gradient is for each gate; the recurrent part sees n's through r.
        d_n = (1 - z) * (1 - n * n)
        d_r, d_z = d_n * recurrent[..., 2 * size :] * r * (1 - r), (before - n) * z * (1 - z)
        per_unit = torch.cat([d_r, d_z, d_n * r], -1)
        d_h, d_hs = torch.zeros_like(h), torch.empty_like(hs)
        views = (is_init.unsqueeze(-1), d_hs, per_unit, z, grads[0])
        steps = zip(_reset_steps(is_init), *(x.unbind(0) for x in views))
        for resets, reset, out, unit, z_t, grad in reversed(list(steps)):
            total = torch.add(d_h, grad, out=out)
            d_h = ((unit * total.repeat(1, 3)) @ weight).addcmul_(total, z_t)
            if resets:
                d_h.masked_fill_(reset, 0.0)
        d_recurrent = (per_unit * d_hs.repeat(1, 1, 3)).flatten(0, 1)
        d_inputs = torch.cat([d_r, d_z, d_n], -1) * d_hs.repeat(1, 1, 3)
        return d_inputs, d_h, None, d_recurrent.t() @ before.flatten(0, 1), d_recurrent.sum(0)
