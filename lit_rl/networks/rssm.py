"""The recurrent state-space model of DreamerV3, and the layers of its networks.

Shapes: B sequences, L rows; D deter, the recurrent state; S latents of K classes, stoch [S * K] the one-hot sample of
them; A numbers of an action, H hidden, E tokens that an observation becomes, F = D + S * K features.
"""

import math
from collections.abc import Mapping
from typing import Any

import gymnasium as gym
import torch
from gymnasium import spaces
from torch import Tensor, nn

from lit_rl.errors import OptionError, SpaceError
from lit_rl.losses import symlog
from lit_rl.networks.build import NetworkFactory, build_network, has_memory, output_size
from lit_rl.networks.inputs import FlatInput, ImageInput
from lit_rl.networks.rssm_scan import EPSILON, UPDATE_BIAS, Scan, one_hot, sample
from lit_rl.spec import class_counts, is_image
from lit_rl.trees import Tree, find, space_leaves

MULTIPLES = (2, 3, 4, 4)  # filters of each convolution, in `depth`s
KERNEL = 5
MOST_PIXELS, FEWEST_PIXELS = 16, 3  # a side of what the convolutions leave of an image


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
        return nn.functional.silu(nn.functional.rms_norm(x.float(), self.scale.shape, self.scale, EPSILON))


def normed(in_features: int, *sizes: int) -> nn.Sequential:
    """Linear layers of these sizes, each followed by RMSNorm and SiLU."""
    layers: list[nn.Module] = []
    for size in sizes:
        layers += [Linear(in_features, size), NormedSiLU(size)]
        in_features = size
    return nn.Sequential(*layers)


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
        """The recurrent state [B, D] after an action."""
        shared = torch.cat([self.from_deter(deter), self.from_stoch(stoch), embedded], -1)
        if self.blocks == 1:
            x = torch.cat([deter, shared], -1)
        else:
            parts = shared.unsqueeze(1).expand(-1, self.blocks, -1)
            x = torch.cat([deter.unflatten(1, (self.blocks, -1)), parts], -1)
        gates = self.gates(self.hidden_norm(self.hidden(x)))
        if self.blocks == 1:
            reset, candidate, update = gates.chunk(3, -1)
        else:
            each = gates.unflatten(1, (self.blocks, 3, -1)).unbind(2)
            reset, candidate, update = (gate.flatten(1) for gate in each)
        # tanh(x) = 2 sigmoid(2 x) - 1, in a fifth of the time.
        candidate = torch.sigmoid(torch.sigmoid(reset) * candidate * 2).mul(2).sub(1)
        return torch.lerp(deter.to(candidate.dtype), candidate, torch.sigmoid(update + UPDATE_BIAS))

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
        deters, stochs, logits = (x.transpose(0, 1) for x in found)
        return deters, stochs, logits

    def observe_stepwise(
        self, tokens: Tensor, action: Tensor, is_first: Tensor, deter: Tensor, stoch: Tensor, noise: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What `observe` gives, in plain steps: for compilers, and to read."""
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


class LatentNetwork(nn.Module):
    """Observations to features [B, F] by an RSSM: a network with memory, whose state is latent and previous action.

    A policy that acts by it writes the action it takes into the state.

    Args:
        observation_space: of the observations.
        num_actions: A.
        encoder: makes tokens of observations; None for `ObservationEncoder`.
        size: of the RSSM, and of the encoder: `units`, `depth`, `layers`.
        unimix: see `RSSM`.
    """

    def __init__(
        self,
        observation_space: gym.Space,
        *,
        num_actions: int,
        encoder: NetworkFactory | dict[str, Any] | None,
        size: Mapping[str, int],
        unimix: float,
    ):
        super().__init__()
        if encoder is None:
            own = {name: size[name] for name in ("units", "depth", "layers")}
            self.encoder: Any = ObservationEncoder(observation_space, **own)
        else:
            self.encoder = build_network(encoder, observation_space)
            if has_memory(self.encoder):
                raise OptionError(
                    f"network={type(self.encoder).__name__}: expected a network without memory, since the world model "
                    "has its own."
                )
        own = {name: size[name] for name in ("deter", "stoch", "classes", "hidden", "blocks")}
        self.rssm = RSSM(output_size(self.encoder), num_actions, unimix=unimix, **own)
        self.num_actions, self.output_size = num_actions, self.rssm.num_features

    def initial_state(self, num_envs: int) -> dict[str, Tensor]:
        sizes = {"deter": self.rssm.deter, "stoch": self.rssm.stoch * self.rssm.classes, "action": self.num_actions}
        weight = next(self.parameters())
        return {name: torch.zeros(num_envs, size, device=weight.device) for name, size in sizes.items()}

    def forward(self, obs: Tree, state: Tree, noise: Tensor | None = None) -> tuple[Tensor, Tree]:
        """One step; `noise` are uniform numbers [B, S], None takes the most probable latents."""
        rssm = self.rssm
        deter = rssm.step(state["deter"], state["stoch"], rssm.embed(state["action"])).float()
        logits = rssm.posterior(torch.cat([deter, self.encoder(obs)], -1))
        if noise is None:
            best = logits.unflatten(-1, (rssm.stoch, rssm.classes)).argmax(-1, keepdim=True)
            stoch = one_hot(best, rssm.classes).flatten(1)
        else:
            stoch = rssm.sample(logits, noise)
        return torch.cat([deter, stoch], -1), {"deter": deter, "stoch": stoch, "action": state["action"]}


class ObservationEncoder(nn.Module):
    """Observations [*B, *obs] of any space as tokens [*B, E].

    Vectors are made small by symlog and go, with whole numbers as one-hot vectors, through `layers` layers of `units`;
    images through four convolutions, each of which halves their sides.

    Args:
        observation_space: of the observations.
        units, layers: of the layers for vectors.
        depth: filters of the convolutions are multiples of it.

    Raises:
        SpaceError: for images that the convolutions cannot take.
    """

    def __init__(self, observation_space: gym.Space, *, units: int, depth: int, layers: int):
        super().__init__()
        self.images, self.vectors = split_observation(observation_space)
        flat_inputs = [FlatInput(space) for space in self.vectors.values()]
        self.flat_inputs = nn.ModuleList(flat_inputs)
        self.image_inputs = nn.ModuleList(ImageInput(space) for space in self.images.values())
        self.output_size = 0
        if self.vectors:
            self.layers = normed(sum(flat.output_size for flat in flat_inputs), *[units] * layers)
            self.output_size += units
        if self.images:
            channels = sum(count_channels(image) for image in self.images.values())
            convolutions: list[nn.Module] = []
            for multiple in MULTIPLES:
                convolutions.append(ConvLayer(channels, depth * multiple, pool=True))
                channels = depth * multiple
            self.convolutions = nn.Sequential(*convolutions)
            height, width = sides_after(next(iter(self.images.values())))
            self.output_size += channels * height * width

    def forward(self, obs: Tree) -> Tensor:
        tokens: list[Tensor] = []
        if self.vectors:
            parts = []
            for (path, space), flat in zip(self.vectors.items(), self.flat_inputs):
                x = flat(find(obs, path))
                parts.append(x if class_counts(space) else symlog(x))
            tokens.append(self.layers(torch.cat(parts, -1)))
        if self.images:
            images = [find(obs, path) for path in self.images]
            batch = images[0].shape[: images[0].ndim - len(next(iter(self.images.values())).shape or ())]
            x = torch.cat([as_images(image) for as_images, image in zip(self.image_inputs, images)], 1) - 0.5
            tokens.append(self.convolutions(x).flatten(1).unflatten(0, batch))
        return torch.cat(tokens, -1)


class ConvLayer(nn.Module):
    """A convolution that keeps height and width, RMSNorm over the channels and SiLU.

    Args:
        in_channels, out_channels: of the convolution.
        pool: whether the greatest of every two by two pixels is kept, between convolution and norm.
        scale_up: whether each pixel is doubled first.
    """

    def __init__(self, in_channels: int, out_channels: int, *, pool: bool = False, scale_up: bool = False):
        super().__init__()
        self.convolution = convolution(in_channels, out_channels)
        self.norm = NormedSiLU(out_channels)
        self._pool, self._scale_up = pool, scale_up

    def forward(self, x: Tensor) -> Tensor:
        if self._scale_up:
            x = doubled(x)
        x = self.convolution(x)
        if self._pool:
            x = nn.functional.max_pool2d(x, 2)
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def convolution(in_channels: int, out_channels: int) -> nn.Conv2d:
    """A convolution that keeps height and width, with first weights as in `Linear`."""
    layer = nn.Conv2d(in_channels, out_channels, KERNEL, padding="same")
    truncated_normal(layer.weight, in_channels * KERNEL * KERNEL)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return layer


def doubled(x: Tensor) -> Tensor:
    """Images [N, C, h, w] of twice the height and width."""
    return x.repeat_interleave(2, -1).repeat_interleave(2, -2)


def split_observation(space: gym.Space) -> tuple[dict[str, gym.Space], dict[str, gym.Space]]:
    """The images in an observation, and all else, by path.

    Raises:
        SpaceError: for images that the convolutions cannot take, or that have no bounds.
    """
    leaves = space_leaves(space)
    images = {path: leaf for path, leaf in leaves.items() if is_image(leaf)}
    for image in images.values():
        assert isinstance(image, spaces.Box)
        if not (image.is_bounded() and image.high.max() > 0 and image.low.min() >= 0):
            raise SpaceError(
                f"{image}: expected images between 0 and a finite bound, which the decoder predicts. Wrap the "
                "environment (gymnasium.wrappers:RescaleObservation)."
            )
        sides_after(image)
    if len({sides_after(image) for image in images.values()}) > 1:
        raise SpaceError(f"{space}: expected images of one size. Resize them (gymnasium.wrappers:ResizeObservation).")
    return images, {path: leaf for path, leaf in leaves.items() if path not in images}


def count_channels(image: gym.Space) -> int:
    """How many channels an image has."""
    return ImageInput(image).shape[0]


def sides_after(image: gym.Space) -> tuple[int, int]:
    """Height and width of what the convolutions leave of an image.

    Raises:
        SpaceError: if they cannot take it.
    """
    _, height, width = ImageInput(image).shape
    factor = 2 ** len(MULTIPLES)
    low, high = FEWEST_PIXELS * factor, MOST_PIXELS * factor
    if any(side % factor or not low <= side <= high for side in (height, width)):
        raise SpaceError(
            f"Images of {height} by {width}: expected sides that are multiples of {factor} from {low} to {high}, such "
            "as 64 by 64. Resize them (gymnasium.wrappers:ResizeObservation)."
        )
    return height // factor, width // factor
