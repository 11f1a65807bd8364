"""The options of an evaluation."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import gymnasium as gym

from lit_rl.envs.make import EnvConfig
from lit_rl.errors import OptionError
from lit_rl.options import Arguments, Count, CountOrZero, Positive, check_fields


@dataclass(frozen=True)
class Evaluation:
    """How `Trainer.validate`, and each evaluation during `fit`, plays episodes.

    Attributes:
        episodes: whole episodes, each with the same seed every time.
        deterministic: whether the most probable action is taken.
        timeout_s: seconds after which an evaluation ends with the episodes it has.
        env: played instead of training's environment, with its wrappers but not with its `env_kwargs`; None plays that.
        env_kwargs: passed to the environment, in place of training's `env_kwargs` of that name.
        num_env_runners: Ray actors that play the episodes, per learner process; 0 plays them in the learner process.
        parallel: go on training while they play. Each evaluation is then logged when the next one is due, and the last
            one at the end (needs num_env_runners >= 1).
    """

    episodes: Count = 10
    deterministic: bool = True
    timeout_s: Positive = 1800.0
    env: str | Callable[..., gym.Env] | None = None
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
        """How to make the environment that is played, where training makes its own in this way."""
        own: dict[str, Any] = self.env_kwargs or {}
        if self.env is not None:
            return replace(training, env=self.env, env_kwargs=own)
        return replace(training, env_kwargs=training.env_kwargs | own)
