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
    """

    @staticmethod
    def forward(
        ctx: Any,
        tokens: Tensor,
        actions: Tensor,
        keep: Tensor,
        deter: Tensor,
        stoch: Tensor,
        noise: Tensor,
        unimix: float,
        *weights: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        w0, b0, s0, w1, b1, s1, wd, wx, s2, wg, bg, w3, s3, w4, b4 = weights
        hidden, (blocks, size, _) = w0.shape[0], wd.shape
        _, batch, num_latents = noise.shape
        w0_t, w1_t, w3_t, w4_t = w0.t(), w1.t(), w3.t(), w4.t()
        s01, norm_h, norm_d = torch.stack([s0, s1]), (hidden,), (blocks * size,)
        gate_bias = bg.view(blocks, 3, size).transpose(0, 1).reshape(3, -1).clone()
        gate_bias[2] += UPDATE_BIAS
        rows: list[tuple[Tensor, ...]] = []
        for token, action, keep_t, uniform in zip(*(x.unbind(0) for x in (tokens, actions, keep, noise))):
            h, z = deter * keep_t, stoch * keep_t
            a = torch.stack([torch.addmm(b0, h, w0_t), torch.addmm(b1, z, w1_t)], 1)
            x = silu(rms_norm(a, norm_h, None, EPSILON) * s01)
            y2 = torch.addmm(action, x.view(batch, -1), wx).add_(_blockwise(h, wd))
            gate = _blockwise(silu(rms_norm(y2, norm_d, s2, EPSILON)), wg)
            if blocks > 1:
                gate = gate.view(batch, blocks, 3, size).transpose(1, 2)
            gate = gate.reshape(batch, 3, -1) + gate_bias
            opened = torch.sigmoid(gate)  # of which the middle is not looked at
            candidate = torch.tanh(opened[:, 0] * gate[:, 1])
            deter = torch.lerp(h, candidate, opened[:, 2])
            y3 = torch.addmm(token, deter, w3_t)
            logit = torch.addmm(b4, silu(rms_norm(y3, norm_h, s3, EPSILON)), w4_t)
            stoch = sample(logit.view(batch, num_latents, -1), uniform, unimix).view(batch, -1)
            rows.append((h, z, a, y2, gate, y3, deter, stoch, logit))
        found = [torch.stack(values) for values in zip(*rows)]
        ctx.save_for_backward(keep, *found, *weights)
        ctx.unimix, ctx.num_latents = unimix, num_latents
        return found[6], found[7], found[8]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast(grads[0].device.type, enabled=False):
            return Scan.gradients(ctx, *grads)

    @staticmethod
    def gradients(ctx: Any, d_deters: Tensor, d_stochs: Tensor, d_logits: Tensor) -> tuple[Tensor | None, ...]:
        """Of the arguments, for those of the results."""
        keep, h_in, z_in, a01, a2, gates, a3, deters, _, logits, *weights = ctx.saved_tensors
        w0, _, s0, w1, _, s1, wd, wx, s2, wg, _, w3, s3, w4, _ = weights
        blocks, size, _ = wd.shape
        length, batch, _ = h_in.shape
        norm01, norm2, norm3 = _Norm(a01, torch.stack([s0, s1])), _Norm(a2, s2), _Norm(a3, s3)
        soft = logits.view(length, batch, ctx.num_latents, -1).softmax(-1)
        reset, update = torch.sigmoid(gates[:, :, 0]), torch.sigmoid(gates[:, :, 2])
        raw, candidate = gates[:, :, 1], torch.tanh(reset * gates[:, :, 1])
        slope = update * (1 - candidate.square())
        # What a unit of the new recurrent state's gradient is for each gate.
        per_unit = torch.stack(
            [slope * raw * reset * (1 - reset), slope * reset, (candidate - h_in) * update * (1 - update)], 2
        )
        forget = 1 - update
        wd_t, wg_t, wx_t = wd.transpose(1, 2), wg.transpose(1, 2), wx.t()
        d_h, d_z = torch.zeros_like(h_in[0]), torch.zeros_like(z_in[0])
        rows: list[tuple[Tensor, ...]] = []
        for t in range(length - 1, -1, -1):
            d_z = (d_z + d_stochs[t]).view(soft[t].shape)
            d_z = (d_z - (d_z * soft[t]).sum(-1, keepdim=True)) * soft[t]
            d_l = torch.add(d_logits[t], d_z.view(batch, -1), alpha=1 - ctx.unimix)
            d_y3 = d_l @ w4
            d_a3 = norm3.backward(t, d_y3)
            d_h = torch.addmm(d_h + d_deters[t], d_a3, w3)
            d_gate = per_unit[t] * d_h.unsqueeze(1)  # [B, 3, D]
            if blocks > 1:
                d_gate = d_gate.view(batch, 3, blocks, size).transpose(1, 2)
            d_gate = d_gate.reshape(batch, -1)
            d_y2 = _blockwise(d_gate, wg_t)
            d_a2 = norm2.backward(t, d_y2)
            d_x = (d_a2 @ wx_t).view(batch, 2, -1)
            d_a01 = norm01.backward(t, d_x)
            d_h = torch.addmm((d_h * forget[t]).add_(_blockwise(d_a2, wd_t)), d_a01[:, 0], w0).mul_(keep[t])
            d_z = (d_a01[:, 1] @ w1).mul_(keep[t])
            rows.append((d_l, d_y3, d_gate, d_y2, d_x, d_a3, d_a2, d_a01))
        d_logit, d_y3, d_gate, d_y2, d_x, d_a3, d_a2, d_a01 = (
            torch.stack(values[::-1]).flatten(0, 1) for values in zip(*rows)
        )
        h_in, z_in, deters = (x.flatten(0, 1) for x in (h_in, z_in, deters))
        d_s01 = norm01.of_scale(d_x)
        d_weights = (
            d_a01[:, 0].t() @ h_in, d_a01[:, 0].sum(0), d_s01[0], d_a01[:, 1].t() @ z_in, d_a01[:, 1].sum(0), d_s01[1],
            _block_gradient(h_in, d_a2, blocks), norm01.output().flatten(0, 1).flatten(1).t() @ d_a2,
            norm2.of_scale(d_y2), _block_gradient(norm2.output().flatten(0, 1), d_gate, blocks), d_gate.sum(0),
            d_a3.t() @ deters, norm3.of_scale(d_y3), d_logit.t() @ norm3.output().flatten(0, 1), d_logit.sum(0),
        )  # fmt: skip
        shape = (length, batch, -1)
        return d_a3.view(shape), d_a2.view(shape), None, None, None, None, None, *d_weights


class _Norm:
    """silu(rms_norm(a) scale) of a [T, B, ..., n] that was computed, and its gradient step by step."""

    def __init__(self, a: Tensor, scale: Tensor):
        self._rate = (a.square().mean(-1, keepdim=True) + EPSILON).rsqrt()
        self._normed = a * self._rate
        self._scaled = self._normed * scale
        gate = torch.sigmoid(self._scaled)
        self._slope = gate * (1 + self._scaled * (1 - gate))
        self._per_unit = self._slope * scale
        # Divided by their number once, instead of taking a mean at every step.
        self._share = self._normed / a.shape[-1]

    def backward(self, t: int, d_y: Tensor) -> Tensor:
        """The gradient of a in row t."""
        d_n = d_y * self._per_unit[t]
        along = (d_n * self._share[t]).sum(-1, keepdim=True)
        return torch.addcmul(d_n, self._normed[t], along, value=-1).mul_(self._rate[t])

    def of_scale(self, d_y: Tensor) -> Tensor:
        """The gradient of the scale, for d_y [T * B, ..., n]."""
        return (d_y * (self._slope * self._normed).flatten(0, 1)).sum(0)

    def output(self) -> Tensor:
        return silu(self._scaled)


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
