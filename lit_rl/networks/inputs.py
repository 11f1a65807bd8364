"""What networks do to an observation before their first layer: one vector, or a stack of images."""

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn

from lit_rl.errors import SpaceError
from lit_rl.options import Count, OneOf, check
from lit_rl.spec import class_counts, scale
from lit_rl.trees import Tree, find, space_leaves

CHANNEL_ORDERS = ("auto", "first", "last")
MOST_CLASSES = 1_000_000


class FlatInput(nn.Module):
    """An observation of any space as one vector, [*B, *obs] -> [*B, output_size].

    A Box is flattened (bytes are divided by their upper bound), a MultiBinary gives zeros and ones; a Discrete, and
    each part of a MultiDiscrete, is one-hot or, with `embedding_size`, a learned vector. The leaves of Dict and Tuple
    spaces follow one another in the space's order.

    Args:
        observation_space: what the input looks like.
        embedding_size: numbers per discrete value; None for one-hot.

    Raises:
        SpaceError: for a space with no such form.
    """

    def __init__(self, observation_space: gym.Space, embedding_size: int | None = None):
        super().__init__()
        self.embeddings = nn.ModuleDict()
        self.output_size = 0
        self.space = observation_space
        self._leaves = space_leaves(observation_space)
        self._counts = {path: class_counts(space) for path, space in self._leaves.items()}
        self._offsets = {path: _offsets(space) for path, space in self._leaves.items() if self._counts[path]}
        self._scales = {path: scale(space) for path, space in self._leaves.items()}
        floats = isinstance(observation_space, spaces.Box) and np.dtype(observation_space.dtype).kind == "f"
        self.is_vector = floats and len(observation_space.shape or ()) == 1  # nothing has to be done
        for path, space in self._leaves.items():
            counts = self._counts[path]
            if counts:
                self.register_buffer(_buffer(path), torch.from_numpy(self._offsets[path]), persistent=False)
            if counts and embedding_size is not None:
                check("embedding_size", embedding_size, Count)
                self.embeddings[path or "observation"] = nn.Embedding(sum(counts), embedding_size)
                self.output_size += embedding_size * len(counts)
            elif counts:
                if sum(counts) > MOST_CLASSES:
                    raise SpaceError(
                        f"{space} has too many values for one-hot vectors: set the network's embedding_size."
                    )
                self.output_size += sum(counts)
            elif isinstance(space, spaces.Box | spaces.MultiBinary):
                self.output_size += int(np.prod(space.shape))
            else:
                raise SpaceError(f"Observation space {space} is not supported: wrap the environment to give another.")

    def forward(self, obs: Tree) -> Tensor:
        vectors = [self._vector(path, space, find(obs, path)) for path, space in self._leaves.items()]
        return vectors[0] if len(vectors) == 1 else torch.cat(vectors, -1)

    def numpy(self, obs: Tree) -> np.ndarray:
        """`forward` for numpy inputs [B, *obs], where nothing is embedded."""
        vectors = []
        for path, counts in self._counts.items():
            x = find(obs, path)
            if counts:
                one_hot = np.zeros((len(x), sum(counts)), np.float32)
                one_hot[np.arange(len(x))[:, None], x.reshape(len(x), -1) + self._offsets[path]] = 1
                x = one_hot
            else:
                factor = 1 / self._scales[path] if x.dtype == np.uint8 else None
                x = x.reshape(len(x), -1)
                x = x if factor is None else x * np.float32(factor)
            vectors.append(x)
        return vectors[0] if len(vectors) == 1 else np.concatenate(vectors, -1)

    def _vector(self, path: str, space: gym.Space, x: Tensor) -> Tensor:
        num_dims = len(space.shape or ())
        x = x.flatten(x.ndim - num_dims) if num_dims else x.unsqueeze(-1)
        counts = self._counts[path]
        if not counts:
            return x.float() / self._scales[path] if x.dtype == torch.uint8 else x
        # The offsets give every part its own classes, so that the sum of the parts' one-hot vectors is one of all.
        index = x.long() + getattr(self, _buffer(path))
        if self.embeddings:
            return self.embeddings[path or "observation"](index).flatten(-2)
        return nn.functional.one_hot(index, sum(counts)).sum(-2).float()


class ImageInput(nn.Module):
    """Images [*B, *obs] as floats [N, channels, height, width]; bytes are divided by their upper bound.

    A Box of two dimensions is one channel. Of three, the channels are the first or the last dimension: the smaller.

    Args:
        observation_space: a Box of two or three dimensions.
        channels: "first", "last", or "auto" to recognise them.

    Attributes:
        shape: (channels, height, width).

    Raises:
        SpaceError: for another space, or one whose channels cannot be recognised.
    """

    def __init__(self, observation_space: gym.Space, channels: str = "auto"):
        super().__init__()
        OneOf(*CHANNEL_ORDERS)("channels", channels)
        if not isinstance(observation_space, spaces.Box) or len(observation_space.shape) not in (2, 3):
            raise SpaceError(
                f"A convolutional network takes images, a Box of two or three dimensions, got {observation_space}. Use "
                "MLP for vectors, MultiInput for a Dict or Tuple, or wrap the environment."
            )
        self._dims = observation_space.shape
        self._scale = scale(observation_space)
        self._last = channels == "last"
        if len(self._dims) == 3 and channels == "auto":
            first, last = self._dims[0], self._dims[2]
            if first == last:
                raise SpaceError(
                    f"Which dimension of {observation_space} holds the channels is not clear: set the network's "
                    "channels to 'first' or 'last'."
                )
            self._last = last < first
        dims = (1, *self._dims) if len(self._dims) == 2 else self._dims
        self.shape = (dims[2], dims[0], dims[1]) if self._last and len(self._dims) == 3 else dims

    def forward(self, obs: Tensor) -> Tensor:
        x = obs.reshape(-1, *self._dims)
        if len(self._dims) == 2:
            x = x.unsqueeze(1)
        elif self._last:
            x = x.permute(0, 3, 1, 2)
        # The memory layout in which torch convolves a third faster on the CPU; bytes are cheaper to bring into it.
        x = x.contiguous(memory_format=torch.channels_last)
        return x * (1 / self._scale) if x.dtype == torch.uint8 else x.float()


def _offsets(space: gym.Space) -> np.ndarray:
    """Where each discrete part's classes begin, when all are laid side by side, less its first value."""
    counts = class_counts(space)
    start = np.asarray(space.start, np.int64).flatten()  # type: ignore[attr-defined]
    return np.cumsum([0, *counts[:-1]]) - start


def _buffer(path: str) -> str:
    return f"offsets_{path or 'observation'}"
