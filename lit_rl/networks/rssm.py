"""The recurrent state-space model of DreamerV3.

Shapes: B sequences, L rows; D deter, the recurrent state; S latents of K classes, stoch [S * K] the one-hot sample of
them; A numbers of an action, H hidden, E tokens that an observation becomes, F = D + S * K features.
"""

from typing import Any

import torch
from torch import Tensor, nn

from lit_rl.networks.normed import BlockLinear, Linear, NormedSiLU, normed
from lit_rl.networks.rssm_scan import UPDATE_BIAS, Scan, sample


def straight_through(sampled: Tensor, probs: Tensor) -> Tensor:
    """Samples [*N, K] whose gradient is that of their probabilities: Bengio et al. 2013, arXiv:1308.3432."""
    return sampled + (probs - probs.detach())


class RSSM(nn.Module):
    """A recurrent state and discrete latents: Hafner et al. 2023, arXiv:2301.04104, in the author's present form.

    deter' = GRU(deter, stoch, action), block-diagonal; posterior p(stoch' | deter', tokens); prior p(stoch' | deter').

    Args:
        num_tokens: E.
        num_actions: A.
        deter, stoch, classes, hidden: D, S, K, H.
        blocks: of the recurrent matrices.
        unimix: share of the uniform distribution in each latent's.
    """

    def __init__(
        self,
        num_tokens: int,
        num_actions: int,
        *,
        deter: int,
        stoch: int,
        classes: int,
        hidden: int,
        blocks: int,
        unimix: float,
    ):
        super().__init__()
        self.deter, self.stoch, self.classes, self.blocks, self.unimix = deter, stoch, classes, blocks, unimix
        self._width = hidden
        self.num_features = deter + stoch * classes
        self.from_deter = normed(deter, hidden)
        self.from_stoch = normed(stoch * classes, hidden)
        self.from_action = normed(num_actions, hidden)
        self.hidden = BlockLinear(deter + 3 * hidden * blocks, deter, blocks)
        self.hidden_norm = NormedSiLU(deter)
        self.gates = BlockLinear(deter, 3 * deter, blocks)
        self.prior = nn.Sequential(normed(deter, hidden, hidden), Linear(hidden, stoch * classes))
        self.posterior = nn.Sequential(normed(deter + num_tokens, hidden), Linear(hidden, stoch * classes))

    def embed(self, action: Tensor) -> Tensor:
        """What the recurrent state sees of actions, [*N, A] to [*N, H]: no number of them is larger than 1."""
        return self.from_action(action / action.abs().clamp(min=1))

    def step(self, deter: Tensor, stoch: Tensor, embedded: Tensor) -> Tensor:
        """The recurrent state [B, D] after an action.

        A block's input is its part of the recurrent state, and what all blocks share, which is not copied for each.
        """
        shared = torch.cat([self.from_deter(deter), self.from_stoch(stoch), embedded], -1)
        before = deter.unflatten(-1, (self.blocks, -1)).transpose(0, 1)  # [G, B, D / G], as all below
        own, of_shared = self.hidden.weight.split([before.shape[-1], shared.shape[-1]], 1)
        x = torch.baddbmm(torch.bmm(before, own), shared.expand(self.blocks, -1, -1), of_shared)
        x = self.hidden_norm((x + self.hidden.bias.view(self.blocks, 1, -1)).transpose(0, 1).flatten(1))
        gate_bias = self.gates.bias.view(self.blocks, 1, -1)
        gates = torch.baddbmm(gate_bias, x.unflatten(-1, (self.blocks, -1)).transpose(0, 1), self.gates.weight)
        reset, candidate, update = gates.float().chunk(3, -1)
        # tanh(x) = 2 sigmoid(2 x) - 1, in a fifth of the time.
        candidate = torch.sigmoid(torch.sigmoid(reset) * candidate * 2).mul(2).sub(1)
        return torch.lerp(before.float(), candidate, torch.sigmoid(update + UPDATE_BIAS)).transpose(0, 1).flatten(1)

    def probs(self, logits: Tensor) -> Tensor:
        """Probabilities [*N, S, K] of logits [*N, S * K], of which `unimix` is uniform."""
        probs = logits.float().unflatten(-1, (self.stoch, self.classes)).softmax(-1)
        return (1 - self.unimix) * probs + self.unimix / self.classes

    def sample(self, logits: Tensor, uniform: Tensor) -> Tensor:
        """Samples [N, S * K] for logits [N, S * K] by uniform numbers [N, S], without gradients."""
        return sample(logits.float().unflatten(-1, (self.stoch, self.classes)), uniform, self.unimix).flatten(1)

    def observe(
        self, tokens: Tensor, action: Tensor, is_first: Tensor, deter: Tensor, stoch: Tensor, noise: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Recurrent states [B, L, D], samples [B, L, S * K] and logits [B, L, S * K] of the posterior.

        Args:
            tokens: of the observations, [B, L, E].
            action: before each of them, [B, L, A].
            is_first: where an episode begins, [B, L]: what was before is 0 there.
            deter, stoch: before the first row, [B, D] and [B, S * K].
            noise: uniform numbers, [B, L, S].
        """
        keep = (~is_first).float().unsqueeze(-1)
        posterior: Any = self.posterior
        (first, norm), last = posterior
        of_deter, of_token = first.weight.split([self.deter, tokens.shape[-1]], 1)
        size = self.deter // self.blocks
        own, shared, of_action = self.hidden.weight.split([size, 2 * self._width, self._width], 1)
        with torch.autocast(tokens.device.type, enabled=False):
            embedded = self.embed(action.float() * keep)
            of_tokens = nn.functional.linear(tokens.float(), of_token, first.bias)
            of_actions = embedded @ _beside(of_action) + self.hidden.bias
            found = Scan.apply(
                *(x.transpose(0, 1) for x in (of_tokens, of_actions, keep)), deter, stoch, noise.transpose(0, 1),
                self.unimix, *_of_layers(self.from_deter), *_of_layers(self.from_stoch), own, _beside(shared),
                self.hidden_norm.scale, self.gates.weight, self.gates.bias,
                of_deter, norm.scale, last.weight, last.bias,
            )  # fmt: skip
        deters, stochs, logits = (x.transpose(0, 1) for x in found[:3])
        return deters, stochs, logits

    def observe_stepwise(
        self, tokens: Tensor, action: Tensor, is_first: Tensor, deter: Tensor, stoch: Tensor, noise: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What `observe` gives, in plain steps: to read, and to check `observe` against."""
        keep = (~is_first).to(tokens.dtype).unsqueeze(-1)
        embedded = self.embed(action * keep)
        deters, stochs, logits = [], [], []
        for token, action_t, keep_t, uniform in zip(*(x.unbind(1) for x in (tokens, embedded, keep, noise))):
            deter = self.step(deter * keep_t, stoch * keep_t, action_t)
            logit = self.posterior(torch.cat([deter, token], -1))
            stoch = straight_through(self.sample(logit, uniform), self.probs(logit).flatten(1))
            deters.append(deter)
            stochs.append(stoch)
            logits.append(logit)
        return torch.stack(deters, 1), torch.stack(stochs, 1), torch.stack(logits, 1)


def _of_layers(layers: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Weight, bias and scale of a linear layer and the norm after it."""
    linear, norm = layers
    return linear.weight, linear.bias, norm.scale


def _beside(blocks: Tensor) -> Tensor:
    """Blocks [G, n, m], which are given the same input, as one matrix [n, G * m]."""
    return blocks.transpose(0, 1).flatten(1)
