"""Off-policy evaluation during a run on recorded data."""

from typing import Any

import lightning as L
import numpy as np

from lit_rl.errors import OptionError
from lit_rl.evaluation.estimating import Behavior, Estimators, estimate, refusal, whole_episodes
from lit_rl.multi_agent import MultiAgent
from lit_rl.options import Count, TakesOptions, UnitInterval
from lit_rl.recorded import Recorded


class OfflineEvaluation(TakesOptions, L.Callback):
    """Says in each validation what the policy is worth, by the held-out episodes of an `OfflineDataModule`.

    Logs the estimates of `lit-rl evaluate` as `eval/<estimator>`: `eval/wis`, `eval/fqe_sampled`, `eval/fqe_greedy`.
    The value is the discounted return, by the algorithm's gamma. Needs `validation_fraction`.

    Args:
        estimators: some of "is", "pdis", "wis", "wpdis", "dr" and "fqe". The last two fit networks each time.
        every: validations from one to the next.
        epsilon: judge the policy that takes a random legal action with this probability, and else the most probable
            one, instead of the policy as it draws its actions. Discrete actions only.
        behavior: where the densities of the policy that played are from: "recorded" with the episodes, or a "fit" of a
            policy to their actions.
        num_updates: gradient steps of fitted Q evaluation; None takes what values need, 10,000 where gamma is
            0.99.
    """

    estimators: tuple[str, ...]
    every: int
    epsilon: float | None
    behavior: str
    num_updates: int | None

    def __init__(
        self,
        estimators: Estimators = ("wis", "wpdis"),
        *,
        every: Count = 1,
        epsilon: UnitInterval | None = None,
        behavior: Behavior = "recorded",
        num_updates: Count | None = None,
    ):
        super().__init__()
        self.take_options()
        self._begun = 0  # validations

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        data = trainer.datamodule  # type: ignore[attr-defined]
        if not getattr(data, "validation_fraction", 0.0):
            raise OptionError(
                f"OfflineEvaluation: got {type(data).__name__}; expected an OfflineDataModule with a "
                "validation_fraction of the episodes, to judge by. Set it, or leave the callback out."
            )
        if isinstance(pl_module, MultiAgent):
            raise OptionError("OfflineEvaluation judges one policy, not those of MultiAgent. Leave it out.")

    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        if not trainer.ckpt_path:
            self._begun = 0
        recorded, _ = whole_episodes(_held_out(trainer))
        options: dict[str, Any] = {"epsilon": self.epsilon, "behavior": self.behavior}
        refused, problem = refusal(pl_module.policy, recorded, self.estimators, **options)
        if refused:  # now, and not when the first epoch is over
            raise OptionError(f"OfflineEvaluation: {refused[0]}: {problem}")

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if trainer.sanity_checking:
            return
        self._begun += 1
        if (self._begun - 1) % self.every:
            return
        result = estimate(  # on every rank, from equal episodes and seeds
            pl_module.policy.acting_copy(),
            _held_out(trainer),
            gamma=pl_module.gamma,
            estimators=self.estimators,
            epsilon=self.epsilon,
            behavior=self.behavior,
            num_updates=self.num_updates,
            seed=trainer.datamodule.seed,  # type: ignore[attr-defined]
        )
        found = {f"eval/{name}": value for name, value in result.metrics.items()}
        pl_module.log_evaluation(found, pl_module.clock)

    def state_dict(self) -> dict[str, Any]:
        return {"begun": self._begun}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._begun = state_dict["begun"]


def _held_out(trainer: L.Trainer) -> Recorded:
    """The episodes that are not learned from."""
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    recorded, rows = data.recorded, data.feed().held_out.rows
    return recorded.only(np.unique(np.searchsorted(recorded.begins, rows, side="right") - 1))
