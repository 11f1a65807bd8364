"""Algorithms whose policies share networks: they take their gradient steps together."""

from collections.abc import Mapping
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from lit_rl import distributed
from lit_rl.actor_critic import ActorCritic
from lit_rl.errors import OptionError
from lit_rl.rollout import Rollout, mask_of


class Team:
    """Algorithms of one class with one optimizer, which holds each of their parameters once.

    Their updates go on in lockstep. The loss at each index is the mean over the rows of all minibatches that there are:
    that of one policy with all these rows, as far as networks are shared. A member whose update has fewer steps, or
    ends early, drops out; one without rows takes no part.

    Each member has its own learning rate for its own parameters. Those that are shared have the first one's.

    Args:
        members: by policy; the first one's options say how gradients are bounded.
    """

    def __init__(self, members: Mapping[str, ActorCritic]):
        self.members = dict(members)
        self.first = next(iter(members))

    @property
    def names(self) -> dict[nn.Parameter, str]:
        """Of all parameters, those that are shared by the first member's."""
        found: dict[nn.Parameter, str] = {}
        for policy_id, member in self.members.items():
            for name, parameter in member.named_parameters():
                found.setdefault(parameter, f"{policy_id}.{name}")
        return found

    def configure_optimizer(self) -> torch.optim.Optimizer:
        """One optimizer, whose groups of parameters say by `policy_id` whose learning rate they have."""
        found: torch.optim.Optimizer | None = None
        seen: set[Tensor] = set()
        for policy_id, member in self.members.items():
            optimizer = member.configure_optimizers()
            if not isinstance(optimizer, torch.optim.Optimizer):
                raise OptionError(
                    f"policies[{policy_id!r}] shares a network: expected configure_optimizers of "
                    f"{type(member).__name__} to return one optimizer, got {type(optimizer).__name__}."
                )
            for group in optimizer.param_groups:
                group["policy_id"] = policy_id
                group["params"] = [parameter for parameter in group["params"] if parameter not in seen]
                seen.update(group["params"])
                if found is not None:
                    found.add_param_group(group)
            found = found or optimizer
        assert found is not None
        return found

    def metrics_of(self, rollouts: Mapping[str, Rollout]) -> dict[str, dict[str, Tensor | float]]:
        """Learn from the members' rollouts: what is to be logged of each, see `Algorithm.metrics_of`."""
        first, found = self.members[self.first], dict[str, dict[str, Tensor | float]]()
        for policy_id, member in self.members.items():
            member.begin_batch()
            found[policy_id] = {}
        there = {policy_id: rollouts[policy_id] for policy_id in self.members if rollouts[policy_id].has_rows}
        if there:
            lags = {policy_id: self.members[policy_id].lag_of(rollout) for policy_id, rollout in there.items()}
            update = first.checked_update(TensorDict(there), lambda: self.update(there))
            first.check_updates()
            for policy_id in there:
                found[policy_id] = update.metrics[policy_id] | {"rollout/policy_lag": lags[policy_id]}
                self.members[policy_id].count("updates", 1)
        for policy_id, member in self.members.items():
            member.count("env_steps", rollouts[policy_id].env_steps)
        return {policy_id: member.end_batch(found[policy_id]) for policy_id, member in self.members.items()}

    def update(self, rollouts: Mapping[str, TensorDict]) -> dict[str, dict[str, Tensor | float]]:
        """Learn from rollouts, step by step together; returns the metrics by policy."""
        steps = {policy_id: self.members[policy_id].update_steps(rollout) for policy_id, rollout in rollouts.items()}
        results: dict[str, Any] = dict.fromkeys(steps)
        waiting, metrics = dict[str, Any](), dict[str, dict[str, Tensor | float]]()
        while results:
            minibatches = {}
            for policy_id, result in results.items():
                try:
                    minibatch = steps[policy_id].send(result)
                except StopIteration as end:
                    metrics[policy_id] = end.value
                    continue
                if minibatch is None:
                    waiting[policy_id] = None
                else:
                    minibatches[policy_id] = minibatch
            if minibatches:
                results = self.gradient_step(minibatches)
            else:
                results, waiting = waiting, {}
        return metrics

    def gradient_step(self, minibatches: Mapping[str, TensorDict]) -> dict[str, tuple[bool | Tensor, Any]]:
        """One step on the mean loss over the rows of minibatches: by policy, what `Algorithm.gradient_step` returns."""
        masks = {policy_id: _mask(minibatch) for policy_id, minibatch in minibatches.items()}
        num_rows = torch.stack([mask.sum(dtype=torch.float32) for mask in masks.values()])
        counts = distributed.rank_mean(num_rows)
        losses, rest = [], {}
        for (policy_id, minibatch), count in zip(minibatches.items(), counts):
            minibatch["row_count"] = count.expand(masks[policy_id].shape)
            loss, rest[policy_id] = self.members[policy_id].loss(minibatch)
            losses.append(loss)
        taken = self.members[self.first].optimize((torch.stack(losses) * counts).sum() / counts.sum())
        return {policy_id: (taken, terms) for policy_id, terms in rest.items()}


def _mask(minibatch: TensorDict) -> Tensor:
    mask = mask_of(minibatch)
    return torch.ones_like(minibatch["action_log_prob"], dtype=torch.bool) if mask is None else mask
