"""Whether what a checkpoint holds fits an algorithm, and what a new run may take from it."""

import os
from collections.abc import Mapping
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from lit_rl.errors import CheckpointError, OptionError
from lit_rl.files.loading import POLICY_PREFIX, read_checkpoint, section
from lit_rl.policy import POLICIES, class_name

COUNTERS = {"env_steps", "updates"}
OPTIONS = {"squash": "squash_actions", "hidden_sizes": "head_hidden_sizes"}  # of algorithms, by a policy's argument
ONLY_INITIAL = {"log_std_init", "noisy"}  # arguments of policies that nothing depends on once there are weights


def check_fits(algorithm: Any, found: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> None:
    """Refuse a checkpoint of another algorithm, policy or network.

    Args:
        algorithm: that has its networks.
        found: the section of the checkpoint that describes itself.
        state_dict: its weights.

    Raises:
        CheckpointError: naming the first thing that differs.
    """
    check_algorithm(algorithm, found)
    check_policy_fits(algorithm, found)
    check_shapes(algorithm, found, state_dict)


def check_algorithm(algorithm: Any, found: Mapping[str, Any]) -> None:
    """Refuse a checkpoint of another algorithm.

    Raises:
        CheckpointError: naming both.
    """
    name = found["algorithm"]
    if name not in (ancestor.__name__ for ancestor in type(algorithm).__mro__):
        raise CheckpointError(
            f"The checkpoint was written by {name}: it cannot be loaded into {type(algorithm).__name__}."
        )


def check_shapes(algorithm: Any, found: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> None:
    """Refuse a checkpoint of other weights.

    Raises:
        CheckpointError: naming the first that differs.
    """
    name = found["algorithm"]
    shapes = {key: tuple(tensor.shape) for key, tensor in algorithm.state_dict().items()}
    saved = {key: tuple(tensor.shape) for key, tensor in state_dict.items()}
    if shapes != saved:
        key = min(key for key in shapes.keys() | saved.keys() if shapes.get(key) != saved.get(key))
        there, here = (f"has shape {known[key]}" if key in known else "is missing" for known in (saved, shapes))
        raise CheckpointError(
            f"The checkpoint does not fit this {name}: {key} {there} in the file and {here} here. Use the environment, "
            "network and options it was trained with."
        )


def check_policy_fits(algorithm: Any, found: Mapping[str, Any]) -> None:
    """Refuse a checkpoint of a policy of another class, or made with other options.

    Raises:
        CheckpointError: naming the first thing that differs.
    """
    policy_class, own_class, kind = found["policy"]["class"], class_name(algorithm.policy_class), type(algorithm)
    if policy_class != own_class:
        mend = "pass that class"
        if policy_class in POLICIES and not issubclass(POLICIES[policy_class], algorithm.POLICY):
            mend = f"{kind.__name__} learns a {class_name(algorithm.POLICY)} alone"
        raise CheckpointError(f"The checkpoint was written with policy_class={policy_class}, not {own_class}: {mend}.")
    there, here = found["policy"]["arguments"], algorithm.policy.describe()["arguments"]
    for name in sorted(there.keys() & here.keys() - ONLY_INITIAL):
        if there[name] != here[name]:
            option = OPTIONS.get(name, name)
            mend = "use the options it was trained with"
            if option not in algorithm.hparams:
                mend = (
                    f"{kind.__name__} has no other policy, so that the other run must be with {option}={here[name]!r}"
                )
            raise CheckpointError(
                f"The checkpoint's policy was made with {option}={there[name]!r}, this one with "
                f"{option}={here[name]!r}: {mend}."
            )


def changed_options(algorithm: Any, options: Mapping[str, Any]) -> list[str]:
    """What a run has otherwise than its checkpoint, in words: "lr=0.1 (was 0.2)".

    Args:
        algorithm: of the run.
        options: of the checkpoint.
    """
    here = dict(algorithm.hparams) | algorithm.describe_networks()
    names = sorted(here.keys() & options.keys() - {"spec"})
    return [
        f"{name}={here[name]!r} (was {options[name]!r})"
        for name in names
        if _plain(here, name) != _plain(options, name)
    ]


def _plain(options: Mapping[str, Any], name: str) -> Any:
    value = options[name]
    return list(value) if isinstance(value, tuple) else value


def init_from(algorithm: Any, path: Any, policy_id: str | None = None) -> None:
    """Take the policy with its normaliser from another run's checkpoint, and all else of equal name and shape.

    One line lists what was not taken. Counters and the optimizer's state are those of a new run.

    Args:
        algorithm: that has its networks; the checkpoint may be of another algorithm with the same policy.
        path: of the checkpoint.
        policy_id: which of the policies, where the checkpoint holds several.

    Raises:
        OptionError: if that is no path.
        CheckpointError: if the policy there differs from the one here, or the file cannot be read.
    """
    if not isinstance(path, str | os.PathLike):
        raise OptionError(f"init_from={path!r}: expected a checkpoint's path.")
    checkpoint = read_checkpoint(path)
    found, there = section(checkpoint, path), checkpoint["state_dict"]
    if "policies" in found["policy"]:
        found, there = _part(found, there, path, policy_id)
    check_policy_fits(algorithm, found)
    here = algorithm.state_dict()
    fitting = {name for name in there.keys() & here.keys() if there[name].shape == here[name].shape} - COUNTERS
    # The last layer of a critic that normalises its targets is in their units.
    units = {name.rsplit(".moments.", 1)[0] for name in there.keys() - here.keys() if ".moments." in name}
    if any(name.startswith("return_normalizer.") for name in there.keys() ^ here.keys()):  # or of scaled rewards
        units |= {"critic", "critic.head"}
    fitting -= {name for name in fitting if name.rsplit(".linear.", 1)[0] in units}
    policy = [name for name in sorted(there.keys() | here.keys()) if name.startswith(POLICY_PREFIX)]
    for name in policy:
        if name not in fitting:
            in_file, own = (tuple(found[name].shape) if name in found else "missing" for found in (there, here))
            raise CheckpointError(
                f"init_from={str(path)!r}: the policy differs: {name} is {in_file} in the file and {own} here. Use the "
                "environment, and the network= and options it was trained with."
            )
    algorithm.load_state_dict({name: there[name] for name in fitting}, strict=False)
    left = sorted((there.keys() | here.keys()) - fitting - COUNTERS)
    if left:
        rank_zero_info(f"init_from={str(path)!r}: not taken, since it is not alike in both runs: {', '.join(left)}")


def _part(
    found: Mapping[str, Any], weights: Mapping[str, Tensor], path: Any, policy_id: str | None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The section and the weights of one of several algorithms' checkpoint, as if it had been written alone."""
    prefix = f"algorithms.{policy_id}."
    own = {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
    if not own:
        which = f"none is an algorithm called {policy_id!r}" if policy_id else "MultiAgent alone takes one of them"
        raise CheckpointError(
            f"init_from={str(path)!r}: the checkpoint holds the policies {list(found['policy']['policies'])}, and "
            f"{which}. Name a checkpoint of one policy."
        )
    return {"policy": found["policy"]["policies"][policy_id]}, own
