"""What feeds an algorithm, seen from the algorithm: all it may ask of a datamodule."""

from collections.abc import Sequence
from typing import Any, Literal, Protocol, runtime_checkable

from lit_rl.evaluation.summary import EvaluationResult
from lit_rl.spec import EnvSpec, MultiAgentSpec


@runtime_checkable
class Source(Protocol):
    """A datamodule that feeds an algorithm. One that subclasses this need only give what it has.

    Attributes:
        spec: the environment's spaces, or its agents and theirs; None if there is no environment, or before `setup`.
        seed: of everything random in the run; None if there is none.
        ragged: whether rollouts' time lines differ in length, from batch to batch.
        clock: what schedules follow and loggers are told: "env_steps", or "updates" where there is no environment.
        budget: what the clock ends at, over all ranks; None if it does not.
        rollout_shape: B and T of what this rank collects at a time; None if it collects nothing.
        in_order: whether each time line of a rollout goes on where that of the rollout before ended.
        policy_lag: updates between the weights that acted and those that learn; 0 if they are the same.
    """

    spec: EnvSpec | MultiAgentSpec | None = None
    seed: int | None = None
    clock: Literal["env_steps", "updates"] = "env_steps"

    @property
    def ragged(self) -> bool:
        return isinstance(self.spec, MultiAgentSpec)

    @property
    def budget(self) -> int | None:
        return None

    @property
    def rollout_shape(self) -> tuple[int, int] | None:
        return None

    @property
    def in_order(self) -> bool:
        return True

    @property
    def policy_lag(self) -> int:
        return 0

    def describe_env(self) -> dict[str, Any] | None:
        """How to make the environment, in plain data for checkpoints; None if it cannot be said."""
        return None

    def metrics(self) -> dict[str, float]:
        """What is to be logged of where the last batch came from; every rank calls it."""
        return {}

    # --- policies that come and go ------------------------------------------------------------------------------

    def check_policy(self, policy_id: str, algorithm: Any) -> None:
        """Refuse to feed one more algorithm, of a policy that is to be added while training.

        Raises:
            OptionError: if it cannot be fed.
        """
        return

    def before_change(self) -> None:
        """Policies are to be added or removed, or agents to be given others."""
        return

    def add_policy(self, policy_id: str, algorithm: Any, number: int) -> None:
        """Feed one more algorithm, of a policy that has a number of its own."""
        return

    def remove_policy(self, policy_id: str) -> None:
        """A policy's algorithm does not learn any more."""
        return

    # --- the run ------------------------------------------------------------------------------------------------

    def restart(self) -> None:
        """Forget an earlier run's episodes and position: a new one begins with this datamodule."""
        return

    def rank_state(self, weights_only: bool = False) -> dict[str, Any]:
        """This rank's part of a checkpoint, in plain data; with `weights_only`, without what is large."""
        return {}

    def load_ranks(self, states: Sequence[dict[str, Any]], rank: int, world_size: int) -> None:
        """Go on from what `rank_state` returned on every rank, be they as many now or not."""
        return

    def load_evaluated(self, states: Sequence[dict[str, Any]]) -> None:
        """A checkpoint is evaluated: know of what `rank_state` returned on every rank of its run."""
        return

    # --- evaluation ---------------------------------------------------------------------------------------------

    def begin_evaluation(self) -> None:
        """Training begins: where evaluations go on beside it, begin the first."""
        return

    def evaluations(self) -> list[EvaluationResult]:
        """What was evaluated since this was asked last; the last one is that of the validation under way."""
        return []

    def judged(self, prefix: str) -> dict[str, float]:
        """What rows that are not learned from say of the algorithm, in the validation under way; every rank calls it.

        Args:
            prefix: of the metrics.
        """
        return {}

    def end_evaluation(self) -> list[EvaluationResult]:
        """Training is over: the evaluation still under way beside it, if there is one, as soon as it has ended."""
        return []


class NoSource(Source):
    """In place of a datamodule that is none of lit_rl's: the algorithm is given batches, and knows nothing of them."""


def source_of(trainer: Any) -> Source:
    """The datamodule of a Trainer, as a `Source`."""
    datamodule = getattr(trainer, "datamodule", None)
    return datamodule if isinstance(datamodule, Source) else NoSource()
