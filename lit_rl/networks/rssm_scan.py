"""The posterior's recurrence over whole sequences in one autograd node, with its gradient written out.

Step by step through autograd a small model's recurrence takes more than twice as long: a step costs the number of its
operations, not their size. Here every matrix's gradient is one product over all rows, and what needs no earlier step is
done for all rows at once. Checked against `RSSM.observe_stepwise` in the tests.

Shapes: T rows, B sequences; D the recurrent state, of G blocks; S latents of K classes; H hidden.
"""

import itertools
import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import rms_norm, silu

from lit_rl.networks.normed import EPSILON
from lit_rl.networks.opaque import operator, step_of

UPDATE_BIAS = -1.0  # of the recurrent state's update gate: it forgets slowly at first


def one_hot(index: Tensor, num: int) -> Tensor:
    """Floats [*N, num] that are 1 at an index [*N, 1]."""
    return (index == torch.arange(num, device=index.device)).float()


@torch.no_grad()
def sample(logits: Tensor, uniform: Tensor, unimix: float) -> Tensor:
    """One-hot samples [*N, K] of categorical distributions by uniform numbers [*N], without gradients.

    The probability of the first k + 1 classes is (1 - unimix) sum exp(logits) / total + unimix (k + 1) / K. A sample is
    the first class for which it exceeds the uniform number. Classes come first meanwhile: a tensor whose last dimension
    is as short as theirs takes several times as long.
    """
    num = logits.shape[-1]
    by_class = logits.movedim(-1, 0).contiguous()
    mass = (by_class - by_class.amax(0)).mul_(1 / math.log(2)).exp2_()  # exp2, as MKL's exp is slow on AMD
    for before, own in itertools.pairwise(mass.unbind(0)):
        own += before
    below = (torch.arange(1, num, device=logits.device) * (unimix / num)).view(-1, *[1] * uniform.ndim)
    passed = mass.new_ones(num + 1, *uniform.shape)  # whether it is none of the first k classes
    passed[num] = 0.0
    passed[1:num] = (uniform - below) * (mass[-1] / (1 - unimix)) >= mass[:-1]
    return (passed[:-1] - passed[1:]).movedim(0, -1).contiguous()


class Scan(torch.autograd.Function):
    """Recurrent states [T, B, D], samples [T, B, S * K] and logits [T, B, S * K] of the posterior.

    h, z = keep_t (h, z)
    x0 = silu(norm(W0 h + b0) s0),  x1 = silu(norm(W1 z + b1) s1)
    y2 = silu(norm(Wd h + Wx [x0, x1] + action_t) s2)                       Wd block-diagonal
    r, c, u = Wg y2 + bg;  h = h + sigmoid(u - 1) (tanh(sigmoid(r) c) - h)  Wg block-diagonal
    l_t = W4 silu(norm(W3 h + token_t) s3) + b4,  z ~ unimix softmax(l_t), whose gradient passes straight through

    Args (of `apply`):
        tokens: what they add before the posterior's norm, [T, B, H].
        actions: what they add before the recurrence's norm, [T, B, D].
        keep: 0 where an episode begins, else 1, [T, B, 1].
        deter, stoch: before the first row, [B, D] and [B, S * K]; no gradient reaches them.
        noise: uniform numbers, [T, B, S].
        unimix: share of the uniform distribution.
        weights: w0 b0 s0 w1 b1 s1 wd wx s2 wg bg w3 s3 w4 b4; wd [G, D / G, D / G], wg [G, D / G, 3 D / G], wx
            [2 H, D], the others as in `nn.Linear`.

    Returns:
        And beside these, for the gradient alone: what the recurrence began with in each row, [T, B, D] and
        [T, B, S * K]; what its norms and gates were given, [T, B, 2, H], [T, B, D], [T, B, 3, D] and [T, B, H].
    """

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        *inputs, unimix = arguments[:7]
        return _scan(inputs, list(arguments[7:]), unimix, torch.compiler.is_compiling())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output[3:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(inputs[2], *output, *inputs[7:])
        ctx.unimix, ctx.num_latents = inputs[6], inputs[5].shape[-1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        saved, compiled = list(ctx.saved_tensors), torch.compiler.is_compiling()
        known = [torch.zeros_like(x) if grad is None else grad for x, grad in zip(saved[1:], grads[:3])]
        d_tokens, d_actions, *d_weights = _scan_backward(known, saved, ctx.unimix, ctx.num_latents, compiled)
        return d_tokens, d_actions, None, None, None, None, None, *d_weights


def _forward(inputs: list[Tensor], weights: list[Tensor], unimix: float, compiled: bool) -> tuple[Tensor, ...]:
    """The results of `Scan`."""
    tokens, actions, keep, deter, stoch, noise = (x.contiguous() for x in inputs)
    with torch.autocast(tokens.device.type, enabled=False):
        w0, b0, s0, w1, b1, s1, wd, wx, s2, wg, bg, w3, s3, w4, b4 = weights
        gate_bias = bg.view(len(wd), 3, -1).transpose(0, 1).reshape(3, -1).clone()
        gate_bias[2] += UPDATE_BIAS
        ready = w0.t(), b0, w1.t(), b1, torch.stack([s0, s1]), wd, wx, s2, wg, gate_bias, w3.t(), s3, w4.t(), b4
        step = step_of(_row, compiled, tokens.shape, actions.shape, stoch.shape, len(wd), unimix)
        rows: list[tuple[Tensor, ...]] = []
        for given in zip(*(x.unbind(0) for x in (tokens, actions, keep, noise))):
            rows.append(step(deter, stoch, *given, ready, unimix))
            deter, stoch = rows[-1][:2]
        return tuple(torch.stack(values) for values in zip(*rows))


@torch.no_grad()
def _row(
    deter: Tensor,
    stoch: Tensor,
    token: Tensor,
    action: Tensor,
    keep: Tensor,
    uniform: Tensor,
    weights: tuple[Tensor, ...],
    unimix: float,
) -> tuple[Tensor, ...]:
    """One row of `Scan`."""
    w0_t, b0, w1_t, b1, s01, wd, wx, s2, wg, gate_bias, w3_t, s3, w4_t, b4 = weights
    (batch, num_latents), (blocks, size, _), norm_h = uniform.shape, wd.shape, s3.shape
    h, z = deter * keep, stoch * keep
    a = torch.stack([torch.addmm(b0, h, w0_t), torch.addmm(b1, z, w1_t)], 1)
    x = silu(rms_norm(a, norm_h, None, EPSILON) * s01)
    y2 = torch.addmm(action, x.view(batch, -1), wx) + _blockwise(h, wd)
    gate = _blockwise(silu(rms_norm(y2, s2.shape, s2, EPSILON)), wg)
    if blocks > 1:
        gate = gate.view(batch, blocks, 3, size).transpose(1, 2)
    gate = gate.reshape(batch, 3, -1) + gate_bias
    opened = torch.sigmoid(gate)  # of which the middle is not looked at
    candidate = torch.tanh(opened[:, 0] * gate[:, 1])
    deter = torch.lerp(h, candidate, opened[:, 2])
    y3 = torch.addmm(token, deter, w3_t)
    logit = torch.addmm(b4, silu(rms_norm(y3, norm_h, s3, EPSILON)), w4_t)
    stoch = sample(logit.view(batch, num_latents, -1), uniform, unimix).view(batch, -1)
    return deter, stoch, logit, h, z, a, y2, gate, y3


def _backward(
    grads: list[Tensor], saved: list[Tensor], unimix: float, num_latents: int, compiled: bool
) -> tuple[Tensor, ...]:
    """The gradients of tokens, actions and weights, for those of the results of `Scan`."""
    with torch.autocast(grads[0].device.type, enabled=False):
        keep, deters, _, logits, h_in, z_in, a01, a2, gates, a3, *weights = saved
        w0, _, s0, w1, _, s1, wd, wx, s2, wg, _, w3, s3, w4, _ = weights
        blocks = len(wd)
        length, batch, _ = h_in.shape
        norm01, norm2, norm3 = _Norm(a01, torch.stack([s0, s1])), _Norm(a2, s2), _Norm(a3, s3)
        soft = logits.view(length, batch, num_latents, -1).softmax(-1)
        reset, update = torch.sigmoid(gates[:, :, 0]), torch.sigmoid(gates[:, :, 2])
        raw, candidate = gates[:, :, 1], torch.tanh(reset * gates[:, :, 1])
        slope = update * (1 - candidate.square())
        # What a unit of the new recurrent state's gradient is for each gate.
        per_unit = torch.stack(
            [slope * raw * reset * (1 - reset), slope * reset, (candidate - h_in) * update * (1 - update)], 2
        )
        ready = w0, w1, wd.transpose(1, 2), wx.t(), wg.transpose(1, 2), w3, w4
        by_row = [*(grad.contiguous() for grad in grads), soft, per_unit, 1 - update, keep]
        for norm in (norm3, norm2, norm01):
            by_row += norm.by_row
        step = step_of(_row_backward, compiled, h_in.shape, z_in.shape, a3.shape, soft.shape, blocks, unimix)
        d_h, d_z = torch.zeros_like(h_in[0]), torch.zeros_like(z_in[0])
        rows: list[tuple[Tensor, ...]] = []
        for given in reversed(list(zip(*(x.unbind(0) for x in by_row)))):
            d_h, d_z, *row = step(d_h, d_z, given, ready, unimix)
            rows.append(tuple(row))
        d_logit, d_y3, d_gate, d_y2, d_x, d_a3, d_a2, d_a01 = (
            torch.stack(values[::-1]).flatten(0, 1) for values in zip(*rows)
        )
        h_in, z_in, deters = (x.flatten(0, 1) for x in (h_in, z_in, deters))
        d_s01, shape = norm01.of_scale(d_x), (length, batch, -1)
        return (
            d_a3.view(shape), d_a2.view(shape),
            d_a01[:, 0].t() @ h_in, d_a01[:, 0].sum(0), d_s01[0].clone(),
            d_a01[:, 1].t() @ z_in, d_a01[:, 1].sum(0), d_s01[1].clone(),
            _block_gradient(h_in, d_a2, blocks), norm01.output().flatten(0, 1).flatten(1).t() @ d_a2,
            norm2.of_scale(d_y2), _block_gradient(norm2.output().flatten(0, 1), d_gate, blocks), d_gate.sum(0),
            d_a3.t() @ deters, norm3.of_scale(d_y3), d_logit.t() @ norm3.output().flatten(0, 1), d_logit.sum(0),
        )  # fmt: skip


@torch.no_grad()
def _row_backward(
    d_h: Tensor, d_z: Tensor, given: tuple[Tensor, ...], weights: tuple[Tensor, ...], unimix: float
) -> tuple[Tensor, ...]:
    """One row of the gradient: for the row before, and what the weights' gradients are made of."""
    d_deter, d_stoch, d_logit, soft, per_unit, forget, keep, *norms = given
    w0, w1, wd_t, wx_t, wg_t, w3, w4 = weights
    batch, (blocks, size, _) = len(d_h), wd_t.shape
    d_z = (d_z + d_stoch).view(soft.shape)
    d_z = (d_z - (d_z * soft).sum(-1, keepdim=True)) * soft
    d_l = torch.add(d_logit, d_z.view(batch, -1), alpha=1 - unimix)
    d_y3 = d_l @ w4
    d_a3 = _norm_backward(d_y3, *norms[:4])
    d_h = torch.addmm(d_h + d_deter, d_a3, w3)
    d_gate = per_unit * d_h.unsqueeze(1)  # [B, 3, D]
    if blocks > 1:
        d_gate = d_gate.view(batch, 3, blocks, size).transpose(1, 2)
    d_gate = d_gate.reshape(batch, -1)
    d_y2 = _blockwise(d_gate, wg_t)
    d_a2 = _norm_backward(d_y2, *norms[4:8])
    d_x = (d_a2 @ wx_t).view(batch, 2, -1)
    d_a01 = _norm_backward(d_x, *norms[8:])
    d_h = torch.addmm(d_h * forget + _blockwise(d_a2, wd_t), d_a01[:, 0], w0) * keep
    return d_h, (d_a01[:, 1] @ w1) * keep, d_l, d_y3, d_gate, d_y2, d_x, d_a3, d_a2, d_a01


class _Norm:
    """silu(rms_norm(a) scale) of a [T, B, ..., n] that was computed, and what its gradient is made of."""

    def __init__(self, a: Tensor, scale: Tensor):
        self._rate = (a.square().mean(-1, keepdim=True) + EPSILON).rsqrt()
        self._normed = a * self._rate
        self._scaled = self._normed * scale
        gate = torch.sigmoid(self._scaled)
        self._slope = gate * (1 + self._scaled * (1 - gate))
        self._per_unit = self._slope * scale
        # Divided by their number once, instead of taking a mean at every step.
        self._share = self._normed / a.shape[-1]

    @property
    def by_row(self) -> list[Tensor]:
        """What `_norm_backward` takes, of all rows."""
        return [self._per_unit, self._share, self._normed, self._rate]

    def of_scale(self, d_y: Tensor) -> Tensor:
        """The gradient of the scale, for d_y [T * B, ..., n]."""
        return (d_y * (self._slope * self._normed).flatten(0, 1)).sum(0)

    def output(self) -> Tensor:
        return silu(self._scaled)


def _norm_backward(d_y: Tensor, per_unit: Tensor, share: Tensor, normed: Tensor, rate: Tensor) -> Tensor:
    """The gradient of a in one row, for that of silu(rms_norm(a) scale)."""
    d_n = d_y * per_unit
    return torch.addcmul(d_n, normed, (d_n * share).sum(-1, keepdim=True), value=-1) * rate


def _blockwise(x: Tensor, weight: Tensor) -> Tensor:
    """x [B, G * n] times a block-diagonal matrix of the blocks weight [G, n, m]: [B, G * m]."""
    blocks = len(weight)
    if blocks == 1:
        return x @ weight[0]
    return torch.bmm(x.view(len(x), blocks, -1).transpose(0, 1), weight).transpose(0, 1).reshape(len(x), -1)


def _block_gradient(x: Tensor, d_y: Tensor, blocks: int) -> Tensor:
    """The gradient of the blocks [G, n, m] of x [N, G * n] to y [N, G * m]."""
    x, d_y = (each.view(len(each), blocks, -1).transpose(0, 1) for each in (x, d_y))
    return torch.bmm(x.transpose(1, 2), d_y)


def _like(inputs: list[Tensor], weights: list[Tensor], unimix: float, compiled: bool) -> tuple[Tensor, ...]:
    """Empty tensors of the shapes of the results of `Scan`."""
    tokens, actions, _, _, stoch, _ = inputs
    (length, batch, hidden), deter = tokens.shape, actions.shape[-1]
    ends = ((deter,), stoch.shape[1:], stoch.shape[1:], (deter,), stoch.shape[1:])
    return tuple(tokens.new_empty(length, batch, *end) for end in (*ends, (2, hidden), (deter,), (3, deter), (hidden,)))


def _like_gradients(
    grads: list[Tensor], saved: list[Tensor], unimix: float, num_latents: int, compiled: bool
) -> tuple[Tensor, ...]:
    """Empty tensors of the shapes of its gradients."""
    return tuple(x.new_empty(x.shape) for x in (saved[9], saved[7], *saved[10:]))


_scan = operator(
    f"scan(Tensor[] inputs, Tensor[] weights, float unimix, bool compiled) -> ({', '.join(['Tensor'] * 9)})",
    _forward,
    _like,
)
_scan_backward = operator(
    "scan_backward(Tensor[] grads, Tensor[] saved, float unimix, int num_latents, bool compiled) -> "
    f"({', '.join(['Tensor'] * 17)})",
    _backward,
    _like_gradients,
)
