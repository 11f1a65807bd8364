"""Heads that value actions: dueling, noisy, distributional."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from lit_rl.networks.mlp import orthogonal


class NoisyLinear(nn.Module):
    """A linear layer with factorised Gaussian noise on its parameters: Fortunato et al. 2018, arXiv:1706.10295.

    y = (mu_w + sigma_w * f(e_out) f(e_in)^T) x + mu_b + sigma_b * f(e_out),    f(e) = sign(e) sqrt|e|: eqs. 9 to 11.

    Args:
        input_size: p.
        output_size: q.
        sigma0: the sigmas begin at sigma0 / sqrt(p).

    Attributes:
        noise: f(e_in) [p] and f(e_out) [q]; None acts by the means alone.
    """

    def __init__(self, input_size: int, output_size: int, sigma0: float = 0.5):
        super().__init__()
        bound = input_size**-0.5
        self.weight_mu = nn.Parameter(torch.empty(output_size, input_size).uniform_(-bound, bound))
        self.weight_sigma = nn.Parameter(torch.full((output_size, input_size), sigma0 * bound))
        self.bias_mu = nn.Parameter(torch.empty(output_size).uniform_(-bound, bound))
        self.bias_sigma = nn.Parameter(torch.full((output_size,), sigma0 * bound))
        self.noise: tuple[Tensor, Tensor] | None = None

    def resample(self, normal: Callable[[int], Tensor]) -> None:
        """Draw new noise; `normal(n)` gives n standard normal numbers."""
        device = self.weight_mu.device
        e_in, e_out = (normal(size).to(device) for size in reversed(self.weight_mu.shape))
        self.noise = e_in.sign() * e_in.abs().sqrt(), e_out.sign() * e_out.abs().sqrt()

    def forward(self, x: Tensor) -> Tensor:
        if self.noise is None:
            return nn.functional.linear(x, self.weight_mu, self.bias_mu)
        e_in, e_out = self.noise
        # The noisy part of the weight is an outer product: it need not be multiplied out.
        noisy = nn.functional.linear(x * e_in, self.weight_sigma, self.bias_sigma) * e_out
        return nn.functional.linear(x, self.weight_mu, self.bias_mu) + noisy


class QHead(nn.Module):
    """Features [*B, F] to the values of `num_actions` actions, [*B, A], or to distributions of them, [*B, A, Z].

    Args:
        num_features: F.
        num_actions: A.
        num_atoms: Z; 1 for values alone.
        dueling: a stream for the state's value and one for advantages: Q = V + A - mean(A), eq. 9 of Wang et al. 2016,
            arXiv:1511.06581; for distributions the same for every atom (Hessel et al. 2018, arXiv:1710.02298).
        noisy: use NoisyLinear, with this sigma0; None uses plain layers.
        hidden_sizes: of the layers of each stream, with ReLU after each.
        support: what the atoms [Z] stand for, if the outputs are logits of a categorical distribution (C51); None: the
            outputs are equally probable returns (quantiles).
    """

    def __init__(
        self,
        num_features: int,
        num_actions: int,
        *,
        num_atoms: int = 1,
        dueling: bool = False,
        noisy: float | None = None,
        hidden_sizes: Sequence[int] = (),
        support: Tensor | None = None,
    ):
        super().__init__()
        self._shape = (num_actions, num_atoms)

        def linear(inputs: int, outputs: int, gain: float) -> nn.Module:
            if noisy is not None:
                return NoisyLinear(inputs, outputs, noisy)
            return orthogonal(nn.Linear(inputs, outputs), gain)

        def stream(outputs: int) -> nn.Sequential:
            layers: list[nn.Module] = []
            inputs = num_features
            for size in hidden_sizes:
                layers += [linear(inputs, size, 2**0.5), nn.ReLU()]
                inputs = size
            return nn.Sequential(*layers, linear(inputs, outputs, 1.0))

        self.advantage = stream(num_actions * num_atoms)
        self.value = stream(num_atoms) if dueling else None
        self.register_buffer("support", support, persistent=False)
        self.support: Tensor | None

    def distributions(self, features: Tensor) -> Tensor:
        """The outputs for each action, [*B, A, Z]: logits, quantiles or (Z = 1) values."""
        out = self.advantage(features).float().unflatten(-1, self._shape)
        if self.value is None:
            return out
        return self.value(features).float().unsqueeze(-2) + out - out.mean(-2, keepdim=True)

    def expectation(self, distributions: Tensor) -> Tensor:
        """The values [*B, A] of what `distributions` gave."""
        if self.support is not None:
            with torch.autocast(distributions.device.type, enabled=False):
                return distributions.softmax(-1) @ self.support
        return distributions.squeeze(-1) if self._shape[1] == 1 else distributions.mean(-1)

    def forward(self, features: Tensor) -> Tensor:
        return self.expectation(self.distributions(features))


def set_noise(module: nn.Module, source: torch.Generator | np.random.Generator | None) -> None:
    """New noise for every NoisyLinear of a module; None takes it away.

    Args:
        module: of any kind.
        source: of the noise: torch's on the learner, numpy's where a policy acts.
    """

    def normal(size: int) -> Tensor:
        if isinstance(source, np.random.Generator):
            return torch.from_numpy(source.standard_normal(size, dtype=np.float32))
        return torch.randn(size, generator=source)

    for layer in module.modules():
        if isinstance(layer, NoisyLinear):
            if source is None:
                layer.noise = None
            else:
                layer.resample(normal)
