"""What a `MultiAgent` is made of: algorithms, policies that are not trained, and scripts."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

import lit_rl
from lit_rl.algorithm import Algorithm, seed_for
from lit_rl.errors import CheckpointError, OptionError
from lit_rl.files.loading import load_policy
from lit_rl.networks import named_network
from lit_rl.policy import POLICIES, Policy, PolicySet
from lit_rl.policy.scripted import Random, Scripted
from lit_rl.source import Source
from lit_rl.spec import EnvSpec

CHILDREN = 102  # first number of SeedSequence keys of the algorithms


class Part(Source):
    """The datamodule, as the algorithm of one policy sees it.

    Args:
        source: the datamodule.
        spec: of the policy's agents.
        number: of the policy, which gives it a seed of its own.
        share: of all agents that may be its own; None before there is a rollout.
        in_turns: whether the algorithm learns from some rollouts alone.
    """

    ragged = True

    def __init__(self, source: Source, spec: EnvSpec, number: int, share: float | None, in_turns: bool = False):
        self._source, self._share, self._in_turns = source, share, in_turns
        self.spec = spec
        self.seed = None if source.seed is None else seed_for(source.seed, CHILDREN, number)
        self.clock = source.clock

    @property
    def budget(self) -> int | None:
        return self._source.budget

    @property
    def rollout_shape(self) -> tuple[int, int] | None:
        shape = self._source.rollout_shape
        return None if shape is None or self._share is None else (round(shape[0] * self._share), shape[1])

    @property
    def in_order(self) -> bool:
        return self._source.in_order and not self._in_turns

    @property
    def policy_lag(self) -> int:
        return self._source.policy_lag


def made_of(policy_id: str, given: Any) -> Any:
    """An algorithm, a policy that is not trained, or a scripted one."""
    if isinstance(given, str | Path):
        policy = load_policy(given)
        if isinstance(policy, PolicySet):
            raise OptionError(
                f"policies[{policy_id!r}]={str(given)!r} holds several policies: load one with load_policy(path, "
                "policy=...) and pass it."
            )
        return policy.requires_grad_(False).train()
    if isinstance(given, dict) and "policy" in given:
        cls = POLICIES.get(given["policy"]["class"], Policy)
        return cls.from_description(given["policy"]).requires_grad_(False)
    if isinstance(given, dict) and "class" in given:
        found = getattr(lit_rl, given["class"], None) if given["class"] in lit_rl.__all__ else None
        if not (isinstance(found, type) and issubclass(found, Algorithm | Random)):  # a file may name anything
            raise CheckpointError(
                f"The checkpoint's policy {policy_id!r} is of the class {given['class']}, which is none of lit_rl's "
                "own: pass policies= with it."
            )
        return found(**given["options"])
    if isinstance(given, Algorithm | Policy) or (isinstance(given, Scripted) and not isinstance(given, type)):
        return given
    raise OptionError(
        f"policies[{policy_id!r}]={given!r}: expected an algorithm such as PPO(), a checkpoint's path, Random(), or an "
        "object with act(obs)."
    )


def made_again(policy_id: str, described: Mapping[str, Any]) -> Any:
    """A policy that was added to a run, as a checkpoint of it describes it.

    Raises:
        CheckpointError: if it cannot be made from that.
    """
    try:
        made = made_of(policy_id, described)
        if isinstance(made, Algorithm) and isinstance(made.network, dict):
            named_network(made.network)
    except CheckpointError as error:
        raise CheckpointError(
            f"policies: {policy_id!r} was added while the run trained, and cannot be made from the checkpoint. Pass it "
            f"beside the others, as in policies={{..., {policy_id!r}: ...}}, with a policy_mapping that gives it an "
            f"agent. {error}"
        ) from error
    return made


def check_spaces(policy_id: str, policy: Policy, spec: EnvSpec) -> None:
    """Refuse a policy that was made for other spaces than its agents have."""
    for kind in ("observation_space", "action_space"):
        there, here = getattr(policy.spec, kind), getattr(spec, kind)
        if there != here:
            raise OptionError(
                f"policies[{policy_id!r}]: the checkpoint's policy has {kind} {there}, its agents have {here}. Use "
                "one that was trained on the same spaces."
            )


def check_apart(policies: Mapping[str, Any]) -> None:
    """Refuse an algorithm that is given twice, and one that is made of several."""
    seen: dict[int, str] = {}
    for policy_id, given in policies.items():
        if isinstance(given, Algorithm) and list(given.learners) != [given]:
            raise OptionError(f"policies[{policy_id!r}]: a MultiAgent: expected an algorithm with one policy.")
        if not isinstance(given, nn.Module):
            continue
        other = seen.setdefault(id(given), policy_id)
        if other != policy_id:
            raise OptionError(
                f"policies[{policy_id!r}] is the same object as policies[{other!r}]: make one for each, or give both "
                "groups of agents one policy by policy_mapping."
            )
    learned = {id(x.policy): i for i, x in policies.items() if isinstance(x, Algorithm) and hasattr(x, "policy")}
    for policy_id, given in policies.items():
        if id(given) in learned:
            raise OptionError(
                f"policies[{policy_id!r}] is the policy that policies[{learned[id(given)]!r}] learns: pass a copy, "
                f"frozen_copy({learned[id(given)]!r})."
            )


def class_name(cls: type) -> str:
    """How a checkpoint names a class: those of lit_rl by their name alone."""
    own = getattr(lit_rl, cls.__name__, None) if cls.__name__ in lit_rl.__all__ else None
    return cls.__name__ if own is cls else f"{cls.__module__}:{cls.__qualname__}"
