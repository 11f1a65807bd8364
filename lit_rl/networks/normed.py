"""The layers of DreamerV3's networks: RMSNorm and SiLU after each, block-diagonal matrices, convolutions."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm, silu

EPSILON = 1e-4  # of RMSNorm
KERNEL = 5


def truncated_normal(weight: Tensor, fan_in: int, scale: float = 1.0) -> None:
    """Normal numbers of variance scale^2 / fan_in, none of more than two standard deviations."""
    std = 1.1368 / math.sqrt(fan_in)  # cut off at two, the rest has the standard deviation 1 / 1.1368
    nn.init.trunc_normal_(weight, 0.0, std, -2 * std, 2 * std)
    weight.detach().mul_(scale)


class Linear(nn.Linear):
    """`nn.Linear` that begins as DreamerV3's does.

    Args:
        in_features, out_features: as of `nn.Linear`.
        scale: of the first weights; 0 makes the first outputs 0.
    """

    def __init__(self, in_features: int, out_features: int, scale: float = 1.0):
        super().__init__(in_features, out_features)
        truncated_normal(self.weight, in_features, scale)
        nn.init.zeros_(self.bias)


class BlockLinear(nn.Module):
    """A linear layer whose matrix is block-diagonal: input and output are cut into so many blocks of equal size.

    Args:
        in_features: of all blocks together.
        out_features: of all blocks together.
        blocks: of them.
    """

    def __init__(self, in_features: int, out_features: int, blocks: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(blocks, in_features // blocks, out_features // blocks))
        self.bias = nn.Parameter(torch.zeros(out_features))
        truncated_normal(self.weight, in_features)  # of all blocks: so does the author's code count

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_features] to [B, out_features], or the input [B, blocks, in_features / blocks]."""
        blocks = len(self.weight)
        if blocks == 1:
            return torch.addmm(self.bias, x.flatten(1), self.weight[0])
        out = torch.bmm(x.unflatten(1, (blocks, -1)).transpose(0, 1) if x.ndim == 2 else x.transpose(0, 1), self.weight)
        return out.transpose(0, 1).flatten(1) + self.bias


class NormedSiLU(nn.Module):
    """SiLU of RMSNorm (Zhang and Sennrich 2019, arXiv:1910.07467), in float32."""

    def __init__(self, size: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():  # which makes one loop of the formula
            return silu(rms_norm(x.float(), self.scale.shape, self.scale, EPSILON))
        return _NormedSiLU.apply(x.float(), self.scale)[0]


class _NormedSiLU(torch.autograd.Function):
    """silu(x rate scale) with rate = (mean(x^2) + EPSILON)^-1/2, in half the time of the formula and its gradient.

    What else it returns, x rate and the rate, is for the gradient alone.
    """

    @staticmethod
    def forward(x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        rate = norm.square_().div_(x.shape[-1]).add_(EPSILON).rsqrt_()
        normed = x * rate
        return silu(normed * scale, inplace=True), normed, rate

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(inputs[1], *output[1:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        scale, normed, rate = ctx.saved_tensors
        d_scaled = torch.ops.aten.silu_backward(grads[0], normed * scale)
        per_scale = d_scaled * normed
        with torch.autocast(normed.device.type, enabled=False):
            along = (per_scale @ scale).unsqueeze(-1) / scale.numel()
        d_x = torch.addcmul(d_scaled * scale, normed, along, value=-1) * rate
        return d_x, per_scale.flatten(0, -2).sum(0)


def normed(in_features: int, *sizes: int) -> nn.Sequential:
    """Linear layers of these sizes, each followed by RMSNorm and SiLU."""
    layers: list[nn.Module] = []
    for size in sizes:
        layers += [Linear(in_features, size), NormedSiLU(size)]
        in_features = size
    return nn.Sequential(*layers)


class ConvLayer(nn.Module):
    """A convolution that keeps height and width, RMSNorm over the channels and SiLU.

    Args:
        in_channels, out_channels: of the convolution.
        pool: whether the greatest of every two by two pixels is kept, between convolution and norm.
        scale_up: see `Convolution`.
    """

    def __init__(self, in_channels: int, out_channels: int, *, pool: bool = False, scale_up: bool = False):
        super().__init__()
        self.convolution = Convolution(in_channels, out_channels, scale_up=scale_up)
        self.norm = NormedSiLU(out_channels)
        self._pool = pool

    def forward(self, x: Tensor) -> Tensor:
        x = self.convolution(x)
        if self._pool:
            x = nn.functional.max_pool2d(x, 2)
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Convolution(nn.Conv2d):
    """A convolution that keeps height and width, with first weights as in `Linear`.

    Args:
        in_channels, out_channels: as of `nn.Conv2d`.
        scale_up: whether each pixel is doubled in both directions first. The doubled image is not made: each of its two
            by two pixels has a kernel of its own, of 3 by 3 original pixels. That is a third of the products.
    """

    shares: Tensor

    def __init__(self, in_channels: int, out_channels: int, *, scale_up: bool = False):
        super().__init__(in_channels, out_channels, KERNEL, padding="same")
        truncated_normal(self.weight, in_channels * KERNEL * KERNEL)
        assert self.bias is not None
        nn.init.zeros_(self.bias)
        self._scale_up = scale_up
        # Which of the kernel's five pixels fall on the original pixel before, on and after an even and an odd one.
        even = [[1, 1, 0, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 0, 1]]
        odd = [[1, 0, 0, 0, 0], [0, 1, 1, 0, 0], [0, 0, 0, 1, 1]]
        self.register_buffer("shares", torch.tensor([even, odd], dtype=torch.float32), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if not self._scale_up:
            return super().forward(x)
        rows = torch.einsum("pat,oits->opias", self.shares, self.weight)
        weight = torch.einsum("qbs,opias->opqiab", self.shares, rows).flatten(0, 2)
        assert self.bias is not None
        out = nn.functional.conv2d(x, weight, self.bias.repeat_interleave(4), padding=1)
        return nn.functional.pixel_shuffle(out, 2)
