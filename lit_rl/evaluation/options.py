"""The options of an evaluation."""

from dataclasses import dataclass, replace
from typing import Any

from lit_rl.envs.make import Env, EnvConfig
from lit_rl.errors import OptionError
from lit_rl.options import Arguments, Count, CountOrZero, OptionFields, Positive, check_fields


@dataclass(frozen=True)
class Evaluation(OptionFields):
    """How `Trainer.validate`, and each evaluation during `fit`, plays episodes.

    Attributes:
        episodes: whole episodes of all learner processes together, each with the same seed every time.
        deterministic: take the most probable action, instead of drawing one.
        timeout_s: seconds after which an evaluation ends with the episodes it has.
        env: the environment to play, with training's wrappers and the same spaces; None plays training's.
        env_kwargs: passed to `env`; without an `env` of its own they are laid over training's `env_kwargs`.
        num_env_runners: Ray actors that play the episodes, per learner process; 0 plays them in the learner process.
        parallel: go on training while they play (needs num_env_runners >= 1). Each evaluation is then logged when the
            next one is due, and the last one at the end.
    """

    episodes: Count = 10
    deterministic: bool = True
    timeout_s: Positive = 1800.0
    env: Env | None = None
    env_kwargs: Arguments | None = None
    num_env_runners: CountOrZero = 0
    parallel: bool = False

    def __post_init__(self) -> None:
        check_fields(self, "evaluation.")
        if self.parallel and not self.num_env_runners:
            raise OptionError(
                "evaluation.parallel=True: evaluating while training goes on needs evaluation.num_env_runners of at "
                "least 1, got 0."
            )

    def environment(self, training: EnvConfig) -> EnvConfig:
        """How to make the environment to play.

        Args:
            training: how training makes its own.
        """
        own: dict[str, Any] = self.env_kwargs or {}
        if self.env is not None:
            return replace(training, env=self.env, env_kwargs=own)
        return replace(training, env_kwargs=training.env_kwargs | own)
