"""Which policies share a critic or an encoder, and what they must have in common."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lit_rl.actor_critic import ActorCritic
from lit_rl.algorithm import Algorithm
from lit_rl.errors import CheckpointError, OptionError
from lit_rl.files.fits import init_from

CRITIC, ENCODER = "critic_groups", "encoder_groups"
# Options of the one optimizer that policies have, and of how its gradient is bounded.
COMMON = ("max_grad_norm", "grad_clip_by", "optimizer", "adam_eps", "rmsprop_decay", "rmsprop_eps")
LONGEST = 80  # characters of a value that a message shows


class Sharing:
    """Groups of policies, each of which has one critic, or one encoder: that of its first policy.

    Args:
        groups: of policy ids, by option.
        algorithms: by policy.
        trained: the policies that learn. The first one of a group is the first one here.

    Attributes:
        groups: each group in the order of `trained`.

    Raises:
        OptionError: if there are policies in a group that cannot be in one.
    """

    def __init__(
        self,
        groups: Mapping[str, Sequence[Sequence[str]] | None],
        algorithms: Mapping[str, Algorithm],
        trained: Sequence[str],
    ):
        self._algorithms: Mapping[str, Any] = algorithms
        self._trained = trained
        for option, given in groups.items():
            _check_ids(option, given or (), trained)
        self.groups = {option: [_sorted(group, trained) for group in given or ()] for option, given in groups.items()}
        for option, found in self.groups.items():
            for group in found:
                _check_algorithms(option, {policy_id: algorithms[policy_id] for policy_id in group})

    @property
    def teams(self) -> list[list[str]]:
        """The policies that learn together: all that are connected by what they share."""
        teams: list[set[str]] = []
        for group in (*self.groups[CRITIC], *self.groups[ENCODER]):
            connected = [team for team in teams if team.intersection(group)]
            teams = [team for team in teams if team not in connected] + [set(group).union(*connected)]
        return [_sorted(team, self._trained) for team in teams]

    def share(self) -> None:
        """Have policies use the networks of their groups' first ones, when all were made.

        Raises:
            OptionError: if networks are not alike.
        """
        for first, other in self._pairs(ENCODER):
            one, another = self._algorithms[first], self._algorithms[other]
            _check_alike(ENCODER, (first, other), _encoder_facts(one), _encoder_facts(another))
            another.policy.encoder = one.policy.encoder
            another.policy.weights_moved()
        for first, other in self._pairs(CRITIC):
            one, another = self._algorithms[first], self._algorithms[other]
            _check_alike(CRITIC, (first, other), _critic_facts(one), _critic_facts(another))
            if one.shares_encoder and one.policy.encoder is not another.policy.encoder:
                raise OptionError(
                    f"critic_groups: the critics of {first!r} and {other!r} are heads on their policies' encoders, as "
                    "they are with memory and with share_encoder=True. Share the encoders too: "
                    f"encoder_groups=[[{first!r}, {other!r}]]."
                )
            another.critic = one.critic
            if one.return_normalizer is not None:  # the critic's values are in one unit
                another.return_normalizer = one.return_normalizer.shared()

    def init_from(self, paths: Mapping[str, Any]) -> None:
        """Begin from checkpoints, by policy: see `files.fits.init_from`.

        Raises:
            CheckpointError: if several of a group begin from different networks.
        """
        begun: dict[nn.Module, str] = {}  # shared networks, and by whose checkpoint they begin
        for policy_id, path in paths.items():
            networks = self._networks_of(policy_id)
            before = {
                kind: [x.clone() for x in network.state_dict().values()]
                for kind, network in networks.items()
                if network in begun
            }
            init_from(self._algorithms[policy_id], path, policy_id)
            for kind, tensors in before.items():
                if not all(map(torch.equal, tensors, networks[kind].state_dict().values())):
                    raise CheckpointError(
                        f"init_from: {begun[networks[kind]]!r} and {policy_id!r} share the {kind}, of which their "
                        f"checkpoints hold two. Name the checkpoint of one of them alone, or leave {kind}_groups out."
                    )
            begun.update(dict.fromkeys(networks.values(), policy_id))

    def _pairs(self, option: str) -> Iterator[tuple[str, str]]:
        """The first policy of each group, with each of the others."""
        for first, *others in self.groups[option]:
            for other in others:
                yield first, other

    def _networks_of(self, policy_id: str) -> dict[str, nn.Module]:
        """What a policy shares."""
        algorithm, found = self._algorithms[policy_id], {}
        if any(policy_id in group for group in self.groups[CRITIC]):
            found["critic"] = algorithm.critic
        if any(policy_id in group for group in self.groups[ENCODER]):
            found["encoder"] = algorithm.policy.encoder
        return found


def _check_ids(option: str, groups: Sequence[Sequence[str]], trained: Sequence[str]) -> None:
    seen: set[str] = set()
    for group in groups:
        for policy_id in group:
            if policy_id not in trained:
                raise OptionError(
                    f"{option}: {policy_id!r}: expected policies whose algorithms are trained, of {list(trained)}."
                )
        if len(set(group)) < max(2, len(group)):
            raise OptionError(f"{option}: the group {list(group)}: expected at least two policies, each of them once.")
        twice = seen.intersection(group)
        if twice:
            raise OptionError(f"{option}: {min(twice)!r} is in two groups. Join them, or take it out of one.")
        seen.update(group)


def _check_algorithms(option: str, algorithms: Mapping[str, Algorithm]) -> None:
    """Refuse algorithms that cannot have one optimizer."""
    (first, one), *others = algorithms.items()
    for policy_id, algorithm in algorithms.items():
        name = type(algorithm).__name__
        if not isinstance(algorithm, ActorCritic):
            raise OptionError(
                f"{option}: {policy_id!r} learns by {name}: expected an on-policy actor-critic, PPO, IMPALA or APPO."
            )
        for method, base in (("update", ActorCritic), ("gradient_step", Algorithm)):
            if getattr(type(algorithm), method) is not getattr(base, method):
                raise OptionError(
                    f"{option}: {name}, the algorithm of {policy_id!r}, overrides {method}, which is not called where "
                    "algorithms take their steps together. Override update_steps or loss."
                )
        if algorithm.hp.get("compile"):
            raise OptionError(f"{option}: {policy_id!r} has compile=True: expected eager steps. Leave it out.")
    for other, another in others:
        if type(one) is not type(another):
            raise OptionError(
                f"{option}: {first!r} learns by {type(one).__name__} and {other!r} by {type(another).__name__}: "
                "expected one algorithm."
            )
        for name in COMMON:
            values = one.hp.get(name), another.hp.get(name)
            if values[0] != values[1]:
                raise OptionError(
                    f"{option}: {name}={values[0]!r} of {first!r} and {values[1]!r} of {other!r}: expected one value "
                    "for both, since one optimizer steps them."
                )


def _encoder_facts(algorithm: Any) -> dict[str, Any]:
    """What is compared of encoders, by what messages call it."""
    return {
        "observation spaces": algorithm.policy.input_space,
        "networks": repr(algorithm.policy.encoder),
        "normalize_observations": algorithm.hp.normalize_observations,
    }


def _critic_facts(algorithm: Any) -> dict[str, Any]:
    """What is compared of critics, by what messages call it."""
    kind = "a head on the policy's encoder" if algorithm.shares_encoder else "a network of its own"
    return {
        "kinds of critic": f"central_critic={algorithm.hp.central_critic!r}" if algorithm.is_central else kind,
        "observation spaces": algorithm.policy.input_space,
        "normalize_values": algorithm.normalizes_values,
        "networks": repr(algorithm.critic),
        "normalize_observations": algorithm.hp.normalize_observations,
        "normalize_returns": algorithm.hp.normalize_returns,
        "gamma": algorithm.hp.gamma,
    }


def _check_alike(option: str, policy_ids: tuple[str, str], facts: Mapping[str, Any], others: Mapping[str, Any]) -> None:
    first, other = policy_ids
    for name, value in facts.items():
        if others[name] != value:
            shown = f" ({value} and {others[name]})"
            raise OptionError(
                f"{option}: {first!r} and {other!r} have different {name}{shown if len(shown) < LONGEST else ''}. Give "
                "both the same, or leave one of them out of the group."
            )


def _sorted(policy_ids: Collection[str], order: Sequence[str]) -> list[str]:
    return sorted(policy_ids, key=order.index)
