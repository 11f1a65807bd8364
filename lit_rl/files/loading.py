"""Reading checkpoints without Lightning, an environment or Ray: one inference object from one file."""

import logging
import pickle
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from lit_rl.errors import CheckpointError
from lit_rl.files import digests
from lit_rl.networks import NetworkFactory
from lit_rl.policy import POLICIES, Policy, PolicySet, Random
from lit_rl.policy.scripted import Scripted
from lit_rl.spec import EnvSpec, MultiAgentSpec

log = logging.getLogger(__name__)

# The section of a checkpoint that describes itself, and the newest form of it that this version reads.
SECTION, FORMAT = "lit_rl", 5
POLICY_PREFIX = "policy."
SET = "PolicySet"  # what a checkpoint names in place of a class, if there are several policies


def load_policy(
    path: str | Path,
    network: NetworkFactory | None = None,
    policy_class: type[Policy] | None = None,
    *,
    policy: str | None = None,
    policies: Mapping[str, Any] | None = None,
    policy_mapping: Any = None,
) -> Any:
    """The policy in a checkpoint, on the CPU, ready to act: `action, state = policy.act(obs)`.

    If there are several it is a `PolicySet`: `actions, states = policies.act({agent: obs})`.

    Needs no environment, no Trainer and no Ray. It acts as it did in evaluation. If the file is damaged, that is the
    policy of the file it replaced (`<path>.previous`), with a warning.

    Args:
        path: a checkpoint that a lit_rl algorithm wrote.
        network: the callable it was trained with, if that is not one of lit_rl's own. A file never decides what is
            imported.
        policy_class: the class it was trained with, if that is one of your own.
        policy: of several policies that of this id alone; None gives them all as a `PolicySet`.
        policies: of several policies the scripted ones of your own, by id.
        policy_mapping: of several policies the mapping they were trained with, if that is a function.

    Raises:
        CheckpointError: if the file is missing, damaged or not lit_rl's, or needs an argument that is not there.
    """
    checkpoint = read_checkpoint(path)
    description, weights = section(checkpoint, path)["policy"], checkpoint["state_dict"]
    if description["class"] != SET:
        given = {"policy": policy, "policies": policies, "policy_mapping": policy_mapping}
        for name, value in given.items():
            if value is not None:
                raise CheckpointError(f"Checkpoint {path} holds one policy: leave {name}={value!r} out.")
        return _policy(description, weights, POLICY_PREFIX, network, policy_class)
    parts = description["policies"]
    if policy is not None:
        if parts.get(policy) is None:
            learned = [policy_id for policy_id, part in parts.items() if part is not None]
            raise CheckpointError(f"Checkpoint {path} has no policy {policy!r} with weights, only {learned}.")
        return _policy(parts[policy], weights, _prefix(policy, weights), network, policy_class)
    found: dict[str, Any] = {}
    _check_scripts(path, parts, policies or {})
    for policy_id, part in parts.items():
        scripted = description["scripted"].get(policy_id)
        if part is not None:
            found[policy_id] = _policy(part, weights, _prefix(policy_id, weights), network, policy_class)
        elif policies is not None and policy_id in policies:
            found[policy_id] = policies[policy_id]
        elif scripted == Random.__name__:
            found[policy_id] = Random()
        else:
            raise CheckpointError(
                f"Checkpoint {path}: the policy {policy_id!r} is a script of yours, {scripted}: pass it in policies=, "
                f"or to lit-rl play by --policies '{{{policy_id}: package.module:Class}}'."
            )
    mapping = description["mapping"] if policy_mapping is None else policy_mapping
    if mapping is None:
        raise CheckpointError(
            f"Checkpoint {path}: its mapping is a function: pass it as policy_mapping=, or to lit-rl play by "
            "--policy_mapping package.module:function."
        )
    spec = MultiAgentSpec.from_dict(description["spec"])
    specs = {policy_id: EnvSpec.from_dict(data) for policy_id, data in description.get("specs", {}).items()}
    return PolicySet(spec, found, mapping, description["trained"], specs=specs).eval()


def _check_scripts(path: Any, parts: Mapping[str, Any], policies: Mapping[str, Any]) -> None:
    """Refuse scripts for policies that there are not or that have weights, and what is no script."""
    scripted = [policy_id for policy_id, part in parts.items() if part is None]
    for policy_id, given in policies.items():
        if policy_id not in scripted:
            raise CheckpointError(
                f"Checkpoint {path}: policies: {policy_id!r}: expected some of its policies that are scripts, "
                f"{scripted}."
            )
        if isinstance(given, type) or not isinstance(given, Scripted):
            raise CheckpointError(f"policies[{policy_id!r}]={given!r}: expected an object with act(obs).")


def _policy(
    description: dict[str, Any],
    weights: Mapping[str, Any],
    prefix: str,
    network: NetworkFactory | None,
    policy_class: type[Policy] | None,
) -> Policy:
    """The policy whose weights have names that begin with `prefix`."""
    policy = (policy_class or POLICIES.get(description["class"], Policy)).from_description(description, network=network)
    own = {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
    policy.load_weights(own)
    return policy.eval()


def _prefix(policy_id: str, weights: Mapping[str, Any]) -> str:
    """With what the names of a policy's weights begin, that is one of several."""
    trained = f"algorithms.{policy_id}.{POLICY_PREFIX}"
    return trained if any(name.startswith(trained) for name in weights) else f"frozen.{policy_id}."


def read_checkpoint(path: Any, map_location: Any = "cpu") -> dict[str, Any]:
    """A checkpoint's contents: plain data and tensors only, whatever else the file may hold.

    If the file is damaged, they are those of the file it replaced, with a warning.

    Raises:
        CheckpointError: if that is missing or damaged too, or holds anything else.
    """
    return read_first(with_previous(path), map_location)[1]


def whole_checkpoint(path: Any) -> Any:
    """`path`, or that of the file it replaced if it is damaged: see `read_checkpoint`."""
    return read_first(with_previous(path))[0]


def previous_of(path: Any) -> Path:
    """Where the checkpoint is kept that was replaced by the one at `path`."""
    return Path(f"{path}.previous")


def with_previous(path: Any) -> list[Any]:
    """A checkpoint's path, and that of the one it replaced if there is one."""
    previous = previous_of(path)
    return [path, previous] if previous.exists() else [path]


def read_first(paths: Iterable[Any], map_location: Any = "cpu") -> tuple[Any, dict[str, Any]]:
    """The first path of a whole checkpoint, and its contents; one warning names those before it.

    Raises:
        CheckpointError: if there is none, with one sentence.
    """
    reasons = []
    for path in paths:
        try:
            checkpoint = read_one(path, map_location)
        except CheckpointError as error:
            reasons.append(str(error).removesuffix("."))
            continue
        if reasons:
            log.warning("%s; %s is taken instead.", "; ".join(reasons), path)
        return path, checkpoint
    raise CheckpointError("; ".join(reasons) + ".")


def read_one(path: Any, map_location: Any = "cpu") -> dict[str, Any]:
    """As `read_checkpoint`, of this file alone."""
    if str(path).startswith(("http://", "https://")):
        raise CheckpointError(f"Checkpoint {path}: expected a local file. Download it first.")
    if not Path(path).exists():
        raise CheckpointError(f"Checkpoint {path} does not exist.")
    if Path(path).is_dir():
        raise CheckpointError(f"Checkpoint {path} is a folder: expected a file.")
    try:
        with Path(path).open("rb") as file:  # once, so that the file that is checked is the file that is read
            digests.check(file)
            checkpoint = torch.load(file, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"Checkpoint {path} holds something other than tensors and plain data; it was not loaded."
        ) from error
    except Exception as error:  # zipfile and torch name a dozen kinds of damage
        message = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(f"Checkpoint {path} is damaged or not a checkpoint: {message[:200]}.") from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise CheckpointError(f"Checkpoint {path} holds no state_dict: it was not written by a Trainer.")
    upgrade(checkpoint)
    return checkpoint


def upgrade(checkpoint: dict[str, Any]) -> None:
    """Bring a checkpoint of an older format up to this version's, in place."""
    found = checkpoint.get(SECTION)
    if not isinstance(found, dict) or found.get("format") not in UPGRADES:
        return
    while found["format"] in UPGRADES:
        UPGRADES[found["format"]](checkpoint, found)
        found["format"] += 1
    found["upgraded"] = True


def _from_1(checkpoint: dict[str, Any], found: dict[str, Any]) -> None:
    """Policies had no class of their own, and normalisers and heads other names."""
    found["policy"]["class"] = "Policy"
    renamed = {"policy.normalizer.": "policy.normalizer.moments./.", "critic.head.": "critic.head.linear."}
    weights = checkpoint["state_dict"]
    for name in list(weights):
        for old, new in renamed.items():
            if name.startswith(old):
                weights[name.replace(old, new)] = weights.pop(name)


def _from_2(checkpoint: dict[str, Any], found: dict[str, Any]) -> None:
    """Points of `epsilon` were its own value, and the entropy's schedule had another name."""
    options = checkpoint.get("hyper_parameters", {})
    if "entropy_schedule" in options:
        options["entropy_coef_schedule"] = options.pop("entropy_schedule")
    if isinstance(options.get("epsilon"), list | tuple):
        options["epsilon_schedule"], options["epsilon"] = options["epsilon"], None


def _from_3(checkpoint: dict[str, Any], found: dict[str, Any]) -> None:
    """Where DQN was given no network it had every policy's default one."""
    options = checkpoint.get("hyper_parameters", {})
    if found.get("algorithm") in ("DQN", "Rainbow") and options.get("network") is None:
        options["network"] = {"name": "default_network"}


def _from_4(checkpoint: dict[str, Any], found: dict[str, Any]) -> None:
    """There was always one policy: nothing is to be done."""


UPGRADES: dict[int, Callable[[dict[str, Any], dict[str, Any]], None]] = {
    1: _from_1,
    2: _from_2,
    3: _from_3,
    4: _from_4,
}


def section(checkpoint: dict[str, Any], path: Any = "") -> dict[str, Any]:
    """The part of a checkpoint that describes itself, brought up to this version's form.

    Raises:
        CheckpointError: if there is none, or a newer lit_rl wrote it.
    """
    found = checkpoint.get(SECTION)
    if not isinstance(found, dict):
        raise CheckpointError(f"Checkpoint {path} was not written by a lit_rl algorithm.")
    if found["format"] > FORMAT:
        raise CheckpointError(
            f"Checkpoint {path} has format {found['format']}, this lit_rl reads up to {FORMAT}: install a newer lit_rl."
        )
    return found
