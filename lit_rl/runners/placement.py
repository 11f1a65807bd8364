"""Where Ray puts actors, and what its errors mean."""

from dataclasses import dataclass
from typing import Annotated, Any

from lit_rl.errors import EnvError, LitRLError, RunnerError
from lit_rl.options import NonNegative, OneOf, OptionFields, check, check_fields


@dataclass(frozen=True)
class Placement(OptionFields):
    """What Ray reserves for a runner, and where it puts it.

    Attributes:
        num_cpus: CPUs of the node it runs on.
        resources: Ray's custom resources, such as {"simulator": 1}.
        strategy: "SPREAD" over the cluster's nodes, or Ray's "DEFAULT".
    """

    num_cpus: NonNegative = 0.0
    resources: dict[str, float] | None = None
    strategy: Annotated[str, OneOf("DEFAULT", "SPREAD")] = "DEFAULT"

    def __post_init__(self) -> None:
        check_fields(self, "placement.")
        for name, amount in (self.resources or {}).items():
            check(f"placement.resources[{name!r}]", amount, NonNegative)

    def options(self) -> dict[str, Any]:
        """Ray's, of an actor that nobody but its pool replaces: Ray restarts no actor and repeats no task."""
        return {
            "num_cpus": self.num_cpus,
            "resources": dict(self.resources or {}),
            "scheduling_strategy": self.strategy,
            "max_restarts": 0,
            "max_task_retries": 0,
        }


def store_errors(ray: Any) -> tuple[type[Exception], ...]:
    """What Ray raises where an object has no room, in memory or on disk."""
    return ray.exceptions.ObjectStoreFullError, ray.exceptions.OutOfDiskError


def store_is_full(what: str, error: Exception) -> RunnerError:
    """What is raised where Ray's store had no room for an object."""
    return RunnerError(
        f"Ray's object store has no room for {what}, and cannot move others to the disk ({type(error).__name__}). Free "
        "disk space where Ray keeps its files (/tmp/ray), give Ray more memory (ray start --object-store-memory), or "
        "lower rollout_length or num_envs_per_env_runner."
    )


def cause_of(error: Any) -> Exception:
    """What was raised in an actor: ours as it was, anything else as an EnvError."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, LitRLError):
        return cause
    message = " ".join(str(cause or error).split())
    return EnvError(f"An env runner raised {type(cause or error).__name__}: {message}")
