"""The world model: what it predicts of each row, and how that is learned. Section 3.1 of the paper.

Shapes: B sequences, L rows; D the recurrent state, S latents of K classes, F = D + S * K features, Z bins, C channels.
"""

from collections.abc import Mapping

import torch
from gymnasium import spaces
from tensordict import TensorDict
from torch import Tensor, nn

from lit_rl.errors import OptionError
from lit_rl.losses import kl_losses, symexp, symexp_bins, symlog, two_hot_loss, two_hot_mean
from lit_rl.networks.inputs import ImageInput
from lit_rl.networks.latent import MULTIPLES, count_channels, sides_after, split_observation
from lit_rl.networks.normed import BlockLinear, ConvLayer, Convolution, Linear, NormedSiLU, normed
from lit_rl.networks.rssm_scan import one_hot
from lit_rl.policy.latent import LatentPolicy
from lit_rl.spec import class_counts
from lit_rl.trees import Tree, find

IMPOSSIBLE = -1e9  # a logit
SPACE_BLOCKS = 8  # of the layer that makes an image's first pixels of the recurrent state


class TwoHotHead(nn.Module):
    """Features [*N, F] to a distribution over bins: log-probabilities [*N, Z + 1]. At first its mean is 0 everywhere.

    After the Z bins comes one of probability 0: so many columns are multiplied in half the time of an odd number.
    """

    bins: Tensor

    def __init__(self, num_features: int, *, units: int, layers: int, bins: int):
        super().__init__()
        self.layers = normed(num_features, *[units] * layers)
        self.logits = Linear(units, bins, scale=0.0)
        self.register_buffer("bins", symexp_bins(bins), persistent=False)

    def forward(self, features: Tensor) -> Tensor:
        weight = nn.functional.pad(self.logits.weight, (0, 0, 0, 1))
        bias = nn.functional.pad(self.logits.bias, (0, 1), value=IMPOSSIBLE)
        return nn.functional.linear(self.layers(features), weight, bias).float().log_softmax(-1)

    def mean(self, log_probs: Tensor) -> Tensor:
        """The distribution's mean, [*N]."""
        return two_hot_mean(log_probs[..., :-1], self.bins)

    def loss(self, log_probs: Tensor, *targets: Tensor) -> Tensor:
        """Cross entropy to numbers [*N], summed over several of them."""
        return two_hot_loss(log_probs, torch.stack(targets, -1), self.bins)


class WorldModel(nn.Module):
    """Decoder, reward and continue head: what is learned beside the policy's `LatentNetwork`, and with it.

    Args:
        policy: whose latents it predicts from.
        size: of the networks.
    """

    def __init__(self, policy: LatentPolicy, size: Mapping[str, int]):
        super().__init__()
        rssm = policy.encoder.rssm
        num_features, units = rssm.num_features, size["units"]
        images, vectors = split_observation(policy.input_space)
        self.vectors = VectorDecoder(vectors, num_features, units=units, layers=size["layers"]) if vectors else None
        self.images = None
        if images:
            self.images = ImageDecoder(images, rssm.deter, rssm.stoch * rssm.classes, units=units, depth=size["depth"])
        self.reward = TwoHotHead(num_features, units=units, layers=1, bins=size["bins"])
        self.continues = nn.Sequential(normed(num_features, units), Linear(units, 1))

    def losses(
        self, policy: LatentPolicy, batch: TensorDict, *, gamma: float, free_bits: float
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
        """Losses by name, each [B, L]; the latents, "deter" [B, L, D] and "stoch" [B, L, S * K]; features [B, L, F].

        Args:
            policy: whose `LatentNetwork` it is.
            batch: see `DreamerV3`.
            gamma: discount per env step, which continuing is worth.
            free_bits: nats per row of the KL divergences that cost nothing.
        """
        network, obs = policy.encoder, policy.inputs(batch["observation"])
        tokens, action = network.encoder(obs), policy.as_numbers(batch["previous_action"])
        state = batch["state"]
        deter, stoch, logits = network.rssm.observe(
            tokens, action, batch["is_first"], state["deter"], state["stoch"], batch["posterior_noise"]
        )
        posterior = network.rssm.probs(logits)  # [B, L, S, K]
        prior = network.rssm.probs(network.rssm.prior(deter))  # of the recurrent state alone
        losses = dict(zip(("dynamics", "representation"), kl_losses(posterior.log(), prior.log(), free_bits)))
        features = torch.cat([deter, stoch], -1)
        losses["observation"] = self.observation_loss(deter, stoch, obs)
        losses["reward"] = self.reward.loss(self.reward(features), batch["reward"])
        continues = gamma * (~batch["is_terminal"]).float()  # a truncated episode would have gone on
        logits = self.continues(features).float().squeeze(-1)
        losses["continue"] = nn.functional.binary_cross_entropy_with_logits(logits, continues, reduction="none")
        return losses, {"deter": deter.detach(), "stoch": stoch.detach()}, features

    def observation_loss(self, deter: Tensor, stoch: Tensor, obs: Tree) -> Tensor:
        """Minus the log-likelihood of observations, but for constants: [B, L]."""
        terms = []
        if self.vectors is not None:
            terms.append(self.vectors.loss(torch.cat([deter, stoch], -1), obs))
        if self.images is not None:
            terms.append(self.images.loss(deter, stoch, obs))
        return torch.stack(terms).sum(0)

    def compare(self, deter: Tensor, stoch: Tensor, obs: Tree) -> dict[str, tuple[Tensor, Tensor]]:
        """Each part of observations by path, as it is and as it is predicted from latents."""
        found: dict[str, tuple[Tensor, Tensor]] = {}
        if self.vectors is not None:
            found |= self.vectors.compare(torch.cat([deter, stoch], -1), obs)
        if self.images is not None:
            found |= self.images.compare(deter, stoch, obs)
        return found

    @torch.no_grad()
    def predict(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """The reward received on arriving at imagined states [*N, F], and gamma times their chance to go on; [*N]."""
        return self.reward.mean(self.reward(features)), torch.sigmoid(self.continues(features).float().squeeze(-1))


class VectorDecoder(nn.Module):
    """Features [*N, F] to all of an observation that is no image.

    Numbers are predicted as their symlog, whole numbers of a few classes by a distribution over these.

    Args:
        parts: their spaces, by path.
        num_features: F.
        units, layers: of the layers.
    """

    def __init__(self, parts: Mapping[str, spaces.Space], num_features: int, *, units: int, layers: int):
        super().__init__()
        self._parts = dict(parts)
        self._counts = {path: class_counts(space) for path, space in parts.items()}
        self._sizes = [
            sum(self._counts[path]) or int(torch.Size(space.shape or ()).numel()) for path, space in parts.items()
        ]
        self.layers = normed(num_features, *[units] * layers)
        self.outputs = Linear(units, sum(self._sizes))

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        """Of each part by path the symlog of numbers, or logits of classes, [*N, size]."""
        return dict(zip(self._parts, self.outputs(self.layers(features)).float().split(self._sizes, -1)))

    def compare(self, features: Tensor, obs: Tree) -> dict[str, tuple[Tensor, Tensor]]:
        """What each part by path is, and what it is predicted to be: numbers, or classes' probabilities; [*N, size]."""
        found = {}
        for path, predicted in self(features).items():
            true, counts = find(obs, path).reshape(*features.shape[:-1], -1), self._counts[path]
            if counts:
                index = (true - self._first_classes(path, true.device)).split(1, -1)
                true = torch.cat([one_hot(i, count) for i, count in zip(index, counts)], -1)
                predicted = torch.cat([logits.softmax(-1) for logits in predicted.split(counts, -1)], -1)
            else:
                predicted = symexp(predicted)
            found[path] = true.float(), predicted
        return found

    def loss(self, features: Tensor, obs: Tree) -> Tensor:
        """The squared error of symlogs, or the cross entropy of classes, summed over all numbers: [*N]."""
        loss = torch.zeros(features.shape[:-1], device=features.device)
        for path, predicted in self(features).items():
            target, counts = find(obs, path).reshape(*features.shape[:-1], -1), self._counts[path]
            if not counts:
                loss = loss + (predicted - symlog(target.float())).square().sum(-1)
                continue
            classes = target - self._first_classes(path, target.device)
            for logits, index in zip(predicted.split(counts, -1), classes.unbind(-1)):
                loss = loss - logits.log_softmax(-1).gather(-1, index.unsqueeze(-1)).squeeze(-1)
        return loss

    def _first_classes(self, path: str, device: torch.device) -> Tensor:
        """The lowest of each whole number of a part."""
        return torch.as_tensor(getattr(self._parts[path], "start", 0), device=device).flatten()


class ImageDecoder(nn.Module):
    """Recurrent states [*N, D] and samples [*N, S * K] to images between 0 and 1: all images of an observation.

    Args:
        images: their spaces, by path.
        deter, stoch: D and S * K.
        units, depth: of the layers and convolutions.
    """

    def __init__(self, images: Mapping[str, spaces.Space], deter: int, stoch: int, *, units: int, depth: int):
        super().__init__()
        self._paths = list(images)
        self._channels = [count_channels(image) for image in images.values()]
        self.inputs = nn.ModuleList(ImageInput(image) for image in images.values())
        height, width = sides_after(next(iter(images.values())))
        filters = [depth * multiple for multiple in MULTIPLES]
        self._shape = height, width, filters[-1]
        for name, number, of in (("depth", filters[-1], MULTIPLES[-1]), ("deter", deter, 1)):
            if number % SPACE_BLOCKS:
                raise OptionError(f"{name}={number // of}: expected a multiple of {SPACE_BLOCKS // of} for images.")
        self.from_deter = BlockLinear(deter, height * width * filters[-1], SPACE_BLOCKS)
        self.from_stoch = nn.Sequential(normed(stoch, 2 * units), Linear(2 * units, height * width * filters[-1]))
        self.norm = NormedSiLU(filters[-1])
        layers = [ConvLayer(c, n, scale_up=True) for c, n in zip(filters[:0:-1], filters[-2::-1])]
        self.layers = nn.Sequential(*layers)
        self.outputs = Convolution(filters[0], sum(self._channels), scale_up=True)

    def forward(self, deter: Tensor, stoch: Tensor) -> dict[str, Tensor]:
        """Of each image by path its pixels, [*N, C, height, width]."""
        height, width, filters = self._shape
        batch, deter, stoch = deter.shape[:-1], deter.flatten(0, -2), stoch.flatten(0, -2)
        from_deter = self.from_deter(deter).unflatten(-1, (SPACE_BLOCKS, height, width, -1))
        x = from_deter.permute(0, 2, 3, 1, 4).flatten(3)  # each block gives some of every pixel's filters
        x = self.norm(x + self.from_stoch(stoch).unflatten(-1, (height, width, filters)))
        x = torch.sigmoid(self.outputs(self.layers(x.permute(0, 3, 1, 2))).float())
        return {path: part.unflatten(0, batch) for path, part in zip(self._paths, x.split(self._channels, 1))}

    def compare(self, deter: Tensor, stoch: Tensor, obs: Tree) -> dict[str, tuple[Tensor, Tensor]]:
        """What each image by path is, and what it is predicted to be, [*N, C, height, width]."""
        pairs = zip(self(deter, stoch).items(), self.inputs)
        return {path: (as_images(find(obs, path)).reshape(x.shape), x) for (path, x), as_images in pairs}

    def loss(self, deter: Tensor, stoch: Tensor, obs: Tree) -> Tensor:
        """The squared error, summed over all pixels: [*N]."""
        terms = [(x - true).square().sum((-3, -2, -1)) for true, x in self.compare(deter, stoch, obs).values()]
        return torch.stack(terms).sum(0)
