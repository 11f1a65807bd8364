"""What algorithms share that learn from a replay buffer."""

import copy
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from lit_rl.algorithm import Algorithm
from lit_rl.distributed import masked_mean
from lit_rl.options import CountOrZero, TwoOrMore, UnitInterval
from lit_rl.policy import Policy
from lit_rl.rollout import mask_of
from lit_rl.trees import Tree, map_tree

Module = TypeVar("Module", bound=nn.Module)
MAX_SHARE = 0.9  # of a sequence's priority that is its greatest TD error's; the rest is the mean's (R2D2, section 2.3)


class ReplayStream:
    """One Lightning batch of an off-policy algorithm: minibatches, drawn while the env runners go on stepping.

    Iterating it steps environments and yields minibatches in turn, in the proportion the datamodule was told. What
    `update` writes into a minibatch's `priority` goes back to the buffer before the next one is drawn.

    Args:
        minibatches: given this object, steps environments and yields minibatches.

    Attributes:
        waited_s: seconds the learner waited for env steps.
    """

    def __init__(self, minibatches: Callable[["ReplayStream"], Iterator[TensorDict]]):
        self._minibatches = minibatches
        self.waited_s = 0.0

    def __iter__(self) -> Iterator[TensorDict]:
        return self._minibatches(self)


class OffPolicy(Algorithm):
    """Base of algorithms that are fed by a `ReplayDataModule`. A subclass gives what an `Algorithm`'s does.

    `update` is given one minibatch: transitions [M] or, with memory, sequences [S, L]: see `ReplayBuffer.sample` and
    `sample_sequences`.

    Args:
        gamma: discount per env step; 0.9 to 0.999.
        sequence_length: steps of each sequence that a network with memory is trained on.
        burn_in: steps before each sequence that refresh the memory first, without gradients.

    Attributes:
        NUM_STEPS: the datamodule's `n_step` where that is not set.
        PRIORITIZED: its `prioritized` where that is not set.
    """

    NUM_STEPS: int = 1
    PRIORITIZED: bool = False

    def __init__(
        self,
        *,
        gamma: UnitInterval = 0.99,
        sequence_length: TwoOrMore = 20,
        burn_in: CountOrZero = 0,
        **options: Any,
    ):
        super().__init__(**options)
        self.take_options()

    @property
    def gamma(self) -> float:
        return self.hp.gamma

    @property
    def sequence_length(self) -> int | None:
        """Steps of each sequence to learn from; None without memory."""
        return self.hp.sequence_length if self.policy.has_memory else None

    @property
    def burn_in(self) -> int:
        """Steps before each sequence."""
        return self.hp.burn_in

    def epsilon_at(self, env_steps: int) -> float:
        """The probability of random actions after `env_steps`."""
        return 0.0

    def learn(self, batch: Any) -> dict[str, Tensor | float]:
        """`update` for each minibatch of a stream; the means of what it returned where no step was skipped."""
        metrics: dict[str, list[Tensor]] = {}
        for minibatch in batch:
            skipped = self.skipped_updates
            found = self.checked_update(minibatch)
            self.updates.add_(1)
            if self.skipped_updates > skipped:
                continue
            for name, value in found.items():
                metrics.setdefault(name, []).append(torch.as_tensor(value))
        return {name: torch.stack(values).mean() for name, values in metrics.items()}


def target_of(network: Module) -> Module:
    """A copy that is not trained: it follows by a `Follower`."""
    return copy.deepcopy(network).requires_grad_(False)


class Follower:
    """Moves a target network's parameters towards the network's: target += tau (network - target).

    Args:
        target: what `target_of` made.
        network: of which.
    """

    def __init__(self, target: nn.Module, network: nn.Module):
        self._target: list[Tensor] = list(target.parameters())
        self._network: list[Tensor] = list(network.parameters())

    @torch.no_grad()
    def __call__(self, tau: float) -> None:
        torch._foreach_lerp_(self._target, self._network, tau)


def features(policy: Policy, batch: TensorDict) -> tuple[Tensor, Tensor]:
    """Features of a minibatch's observations and, without gradients, of the observations to bootstrap from.

    Each [M, F] or, with memory, [S, L, F].
    """
    if not policy.has_memory:
        return policy.features(batch), next_features(policy, batch)
    whole = _unrolled(policy, batch)
    return whole[:, :-1], _pick(whole[:, 1:].detach(), batch["bootstrap_row"])


@torch.no_grad()
def next_features(policy: Policy, batch: TensorDict) -> Tensor:
    """Features of the observations to bootstrap from, without gradients."""
    if not policy.has_memory:
        return policy.encoder(policy.inputs(batch["next", "observation"]))
    return _pick(_unrolled(policy, batch)[:, 1:], batch["bootstrap_row"])


def next_observation(batch: TensorDict) -> Tree:
    """The observations to bootstrap from, [M, *obs] or [S, L, *obs]."""
    if "bootstrap_row" not in batch.keys():  # noqa: SIM118
        return batch["next", "observation"]
    return map_tree(lambda x: _pick(x[:, 1:], batch["bootstrap_row"]), _with_last(batch))


def weighted_mean(loss: Tensor, batch: TensorDict) -> Tensor:
    """Mean of losses [M] or [S, L] over real rows, each times its importance weight if the replay is prioritised."""
    weight = batch.get("weight", None)
    if weight is not None:
        loss = loss * weight.reshape(-1, *[1] * (loss.ndim - 1))
    return masked_mean(loss, mask_of(batch))


def of_action(outputs: Tensor, action: Tensor) -> Tensor:
    """What outputs [*N, A, Z] for all actions say of one action each [*N], [*N, Z]."""
    index = action[..., None, None].expand(*action.shape, 1, outputs.shape[-1])
    return outputs.gather(-2, index).squeeze(-2)


def set_priority(batch: TensorDict, td_error: Tensor) -> None:
    """Say by `priority` [M] or [S] how surprising the transitions or sequences were, if the replay is prioritised.

    A sequence's is 0.9 of its greatest absolute TD error and 0.1 of their mean (R2D2: Kapturowski et al. 2019).
    """
    if "weight" not in batch.keys():  # noqa: SIM118
        return
    size, mask = td_error.detach().abs(), mask_of(batch)
    if mask is not None:
        size = size * mask
        mean = size.sum(1) / mask.sum(1).clamp(min=1)
        size = MAX_SHARE * size.amax(1) + (1 - MAX_SHARE) * mean
    batch["priority"] = size


def _with_last(batch: TensorDict) -> Tree:
    """The observations of sequences and the one after, [S, L + 1, *obs]."""
    return map_tree(
        lambda x, last: torch.cat([x, last.unsqueeze(1)], 1), batch["observation"], batch["last_observation"]
    )


def _unrolled(policy: Policy, batch: TensorDict) -> Tensor:
    """Features of sequences and of the observation after them, [S, L + 1, F]."""
    is_init = nn.functional.pad(batch["is_init"], (0, 1), value=False)
    whole = {"observation": _with_last(batch), "is_init": is_init, "state": batch["state"]}
    if "burn_in" in batch.keys():  # noqa: SIM118
        whole["burn_in"] = batch["burn_in"]
    return policy.features(whole)


def _pick(x: Tensor, row: Tensor) -> Tensor:
    """x [S, L, ...] at the rows [S, L] of each sequence."""
    sequence = torch.arange(len(x), device=x.device).unsqueeze(1)
    return x[sequence, row]
