"""The contract of algorithms that learn from a replay buffer."""

from collections.abc import Mapping, Sequence
from typing import Any

import lightning as L
import torch
from tensordict import TensorDict
from torch import Tensor

from lit_rl.algorithm import Algorithm, Update
from lit_rl.errors import OptionError
from lit_rl.learner.refusals import check_streams
from lit_rl.options import CountOrZero, TwoOrMore, UnitInterval


class OffPolicy(Algorithm):
    """Base of algorithms that learn from a replay buffer. A subclass gives what an `Algorithm`'s does.

    They are fed by a `ReplayDataModule` or, as parts of a `MultiAgent`, also by a `RolloutDataModule` with `replay`.

    `update` is given one minibatch: transitions [M] or, with memory, sequences [S, L]: see `ReplayBuffer.sample` and
    `sample_sequences`.

    Args:
        gamma: discount per env step; 0.9 to 0.999.
        sequence_length: steps of each sequence that a network with memory is trained on.
        burn_in: steps before each sequence that refresh the memory first, without gradients.

    Attributes:
        REPLAY: the datamodule's options that have this value where they are not set.
        ACROSS_EPISODES: whether its sequences go on across the ends of episodes, see `SequenceBuffer`.
    """

    REPLAY: Mapping[str, Any] = {
        "batch_size": 256, "learning_starts": 256, "update_to_data": 1.0, "n_step": 1, "prioritized": False
    }  # fmt: skip
    ACROSS_EPISODES = False

    def __init__(
        self,
        *,
        gamma: UnitInterval = 0.99,
        sequence_length: TwoOrMore = 20,
        burn_in: CountOrZero = 0,
        **options: Any,
    ):
        super().__init__(**options)
        self.take_options()
        self._updates: list[Update] = []  # of the batch under way

    @property
    def gamma(self) -> float:
        return self.hp.gamma

    @property
    def sequence_length(self) -> int | None:
        """Steps of each sequence to learn from; None without memory."""
        return self.hp.sequence_length if self.policy.has_memory else None

    @property
    def burn_in(self) -> int:
        """Steps before each sequence."""
        return self.hp.burn_in

    @property
    def wants_returns_to_go(self) -> bool:
        """Whether minibatches must have `return_to_go`, `to_go_discount` and `to_go_observation`: recorded data has."""
        return False

    def check_learns_from_recorded(self) -> None:
        """Refuse recorded episodes, if the algorithm cannot learn from them.

        Raises:
            OptionError: which says why.
        """
        if self.ACROSS_EPISODES:
            raise OptionError(
                f"model={type(self).__name__}: it learns from sequences with the states that its policy had, which "
                "recorded episodes lack. Use ReplayDataModule without offline_paths."
            )

    def epsilon_at(self, env_steps: int) -> float:
        """The probability of random actions after `env_steps`."""
        return 0.0

    def judge(self, batch: TensorDict) -> dict[str, Tensor]:
        """What is to be known of held-out rows, by name: a value for each row that it applies to, 1-D.

        `td_error`, absolute; `initial_value`, of the rows that begin an episode; `action_difference` of the greedy
        actions from the recorded ones, see `transitions.action_difference`; `log_prob` of the recorded actions.

        Args:
            batch: as `update` is given it, with `is_init` also where there is no memory. Keys may be added to it.
        """
        return {}

    def configure_callbacks(self) -> Sequence[L.Callback]:
        check_streams(self.trainer, self)
        return super().configure_callbacks()

    def learn_from(self, batch: Any) -> dict[str, Tensor | float]:
        """`update` for each minibatch of a stream."""
        for minibatch in batch:
            self.count("env_steps", batch.take_env_steps())
            self.learn_from_minibatch(minibatch)
        self.count("env_steps", batch.take_env_steps())
        return self.learned()

    def begin_batch(self) -> None:
        super().begin_batch()
        self._updates.clear()

    def learn_from_minibatch(self, minibatch: TensorDict) -> None:
        """`update` for one minibatch of a batch."""
        self._updates.append(self.checked_update(minibatch))
        self.count("updates", 1)

    def learned(self) -> dict[str, Tensor | float]:
        """The batch is over: the means of what `update` returned where no step was skipped."""
        self.check_updates()
        updates, self._updates = self._updates, []
        metrics: dict[str, list[Tensor]] = {}
        for update in updates:
            for name, value in () if update.skipped else update.metrics.items():
                metrics.setdefault(name, []).append(torch.as_tensor(value))
        return {name: torch.stack(values).mean() for name, values in metrics.items()}
