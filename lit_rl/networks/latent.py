"""From observations and actions to latents: the network of a world model's policy.

Shapes: B sequences; E tokens that an observation becomes, A numbers of an action, S latents, F features.
"""

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
from lit_rl.networks.normed import ConvLayer, normed
from lit_rl.networks.rssm import RSSM
from lit_rl.networks.rssm_scan import one_hot
from lit_rl.spec import class_counts, is_image
from lit_rl.trees import Tree, find, space_leaves

MULTIPLES = (2, 3, 4, 4)  # filters of each convolution, in `depth`s
MOST_PIXELS, FEWEST_PIXELS = 16, 3  # a side of what the convolutions leave of an image


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
