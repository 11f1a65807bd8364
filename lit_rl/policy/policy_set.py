"""The policies of several agents, as one thing that acts."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lit_rl.errors import OptionError
from lit_rl.policy.base import Policy
from lit_rl.policy.mapping import EpisodeInfo, Mapped, PolicyMapping
from lit_rl.policy.scripted import Random, Script, Scripted
from lit_rl.spec import EnvSpec, MultiAgentSpec

MAPPING = 1  # last number of the mapping's SeedSequence key; those of scripted policies are from 2 on


class PolicySet(nn.Module):
    """Policies by id, and which agent acts by which.

    Args:
        spec: the agents.
        policies: by id: a `Policy`, or a scripted one.
        mapping: see `PolicyMapping`; None where there is only one policy.
        trained: ids of those that are learned: what they do is recorded.
        numbers: by id: what tells a policy from others that had its id before; None: from 0 on.
        specs: by id the spaces of those that the mapping gives no agent.

    Attributes:
        learned: those that have weights, also if they are not trained.
        scripted: the others.
        mapping: which agent acts by which.
        trained, numbers: see above.
    """

    def __init__(
        self,
        spec: MultiAgentSpec,
        policies: Mapping[str, Policy | Scripted],
        mapping: Mapped,
        trained: Sequence[str] = (),
        *,
        numbers: Mapping[str, int] | None = None,
        specs: Mapping[str, EnvSpec] | None = None,
    ):
        super().__init__()
        self.spec = spec
        self.ids = tuple(policies)
        self.learned: Any = nn.ModuleDict({i: x for i, x in policies.items() if isinstance(x, Policy)})
        self.scripted = {i: x for i, x in policies.items() if not isinstance(x, Policy)}
        self.mapping = PolicyMapping(mapping, self.ids)
        self.trained = tuple(trained)
        self.numbers = dict(numbers or {policy_id: number for number, policy_id in enumerate(self.ids)})
        self._specs = {i: spec for i, spec in (specs or {}).items() if not self.names_of(i)}
        self._scripts: dict[str, Script] = {}
        self.rng = np.random.default_rng()

    @property
    def rng(self) -> np.random.Generator:
        """Of the mapping's random numbers. To set it gives every policy a generator of its own that depends on it."""
        return self._rng

    @rng.setter
    def rng(self, rng: np.random.Generator) -> None:
        self._rng = rng
        children = rng.spawn(len(self.ids))
        for policy_id, child in zip(self.ids, children):
            self._give_rng(policy_id, child)

    def succeed(self, before: "PolicySet", seed: np.random.SeedSequence) -> None:
        """Go on for another set: policies that are in both are the other's own, as they are now.

        Args:
            before: the other set, which is not used any more.
            seed: of the generators of new policies; the number of each is a part of its own.
        """
        self._rng = before._rng
        for policy_id in self.ids:
            if not self.is_kept(policy_id, before):
                key = (*seed.spawn_key, self.numbers[policy_id])
                rng = np.random.default_rng(np.random.SeedSequence(seed.entropy, spawn_key=key))
                self._give_rng(policy_id, rng)
            elif policy_id in self.learned:
                self.learned[policy_id] = before.learned[policy_id]
            else:
                self._scripts[policy_id] = before._scripts[policy_id]

    def is_kept(self, policy_id: str, before: "PolicySet") -> bool:
        """Whether a policy was in another set too, and not another one of its id."""
        return before.numbers.get(policy_id) == self.numbers[policy_id]

    def _give_rng(self, policy_id: str, rng: np.random.Generator) -> None:
        if policy_id in self.learned:
            self.learned[policy_id].rng = rng
        else:
            spec, scripted = self.spec_of(policy_id), self.scripted[policy_id]
            self._scripts[policy_id] = Script(policy_id, scripted, spec, rng)

    def rng_state(self) -> dict[str, Any]:
        """Of all generators, in plain data."""
        own = {i: self._rng_of(i).bit_generator.state for i in self.ids}
        return {"mapping": self._rng.bit_generator.state, "policies": own}

    def load_rng_state(self, state: Mapping[str, Any]) -> None:
        """Go on from what `rng_state` returned."""
        self._rng.bit_generator.state = state["mapping"]
        for policy_id, own in state["policies"].items():
            self._rng_of(policy_id).bit_generator.state = own

    def _rng_of(self, policy_id: str) -> np.random.Generator:
        return self.learned[policy_id].rng if policy_id in self.learned else self._scripts[policy_id].rng

    def spec_of(self, policy_id: str) -> EnvSpec:
        """The spaces of the agents that may act by a policy.

        Raises:
            OptionError: if they differ, or there is none.
        """
        return self._specs.get(policy_id) or self.spec.shared(self.names_of(policy_id), policy_id)

    def names_of(self, policy_id: str) -> list[str]:
        """The entries of `possible_agents` whose agents may act by a policy."""
        return self.mapping.names_of(policy_id, list(self.spec.agents))

    def slots_of(self, policy_id: str) -> np.ndarray:
        """The slots of one copy of the environment in which a policy's agents may be."""
        names = list(self.spec.agents) if self.mapping.is_function else self.names_of(policy_id)
        return np.array(self.spec.roster.slots_of(names), np.int64)

    def script(self, policy_id: str) -> Script | None:
        """A scripted policy at work; None if it is none."""
        return self._scripts.get(policy_id)

    def act(
        self, obs: Mapping[str, Any], states: Mapping[str, Any] | None = None, deterministic: bool = True
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The actions of agents, as the environment takes them.

        Args:
            obs: what each agent sees that is to act.
            states: what the previous call returned; None at an episode's start. They hold which policy an agent has,
                and what it remembers.
            deterministic: the most probable actions, or random ones.

        Returns:
            Actions by agent, and the states for the next call.
        """
        found, actions = dict(states or {}), {}
        for agent, seen in obs.items():
            policy_id, state = found.get(agent) or (
                self.mapping.policy_of(agent, EpisodeInfo(0, None, self._rng)),
                None,
            )
            if policy_id in self.learned:
                actions[agent], state = self.learned[policy_id].act(seen, state, deterministic)
            else:
                (actions[agent],) = self._scripts[policy_id].act([seen])
            found[agent] = policy_id, state
        return actions, found

    # --- as a `Policy` does it --------------------------------------------------------------------------------------

    def see_weights(self) -> None:
        """Notice parameters that were replaced: see `Policy.see_weights`."""
        for policy in self.learned.values():
            policy.see_weights()

    def maker(self) -> Callable[[], "PolicySet"]:
        """What makes sets of this structure, with weights of their own, also in another process."""
        makers: dict[str, Any] = {i: policy.maker() for i, policy in self.learned.items()}
        parts = {i: makers.get(i, self.scripted.get(i)) for i in self.ids}
        more = {"numbers": self.numbers, "specs": self._specs}
        return functools.partial(_make, self.spec, parts, frozenset(makers), self.mapping.given, self.trained, more)

    def acting_copy(self) -> "PolicySet":
        """A copy, on the CPU, that plays and leaves this one as it is."""
        copy = self.maker()()
        with torch.no_grad():
            copy.load_state_dict({name: tensor.cpu() for name, tensor in self.state_dict().items()})
        return copy.eval()

    def load_weights(self, weights: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Load weights and normalisers, by policy."""
        for policy_id, tensors in weights.items():
            self.learned[policy_id].load_weights(dict(tensors))

    def describe(self) -> dict[str, Any]:
        """Plain data from which `PolicySet.from_description` builds the same set, without weights."""
        return {
            "class": "PolicySet",
            "spec": self.spec.to_dict(),
            "policies": {i: self.learned[i].describe() if i in self.learned else None for i in self.ids},
            "scripted": {i: _name_of(type(x)) for i, x in self.scripted.items()},
            "mapping": self.mapping.plain,
            "trained": list(self.trained),
            "specs": {policy_id: spec.to_dict() for policy_id, spec in self._specs.items()},
        }


def check_ids(policies: Mapping[str, Any]) -> None:
    """Refuse ids that could not be told from a path.

    Raises:
        OptionError: for the first one.
    """
    for policy_id in policies:
        if not isinstance(policy_id, str) or not policy_id.isidentifier():
            raise OptionError(f"policies: the id {policy_id!r}: expected a word of letters, digits and underscores.")
        if hasattr(nn.ModuleDict, policy_id) or policy_id == "training":
            raise OptionError(
                f"policies: the id {policy_id!r}: torch's modules have an attribute of that name. Rename it."
            )


def _name_of(cls: type) -> str:
    """How a checkpoint names the class of a script."""
    return cls.__name__ if cls is Random else f"{cls.__module__}:{cls.__qualname__}"


def _make(
    spec: MultiAgentSpec,
    parts: dict[str, Any],
    learned: frozenset[str],
    mapping: Mapped,
    trained: Sequence[str],
    more: dict[str, Any],
) -> PolicySet:
    policies = {i: part() if i in learned else part for i, part in parts.items()}
    return PolicySet(spec, policies, mapping, trained, **more)
