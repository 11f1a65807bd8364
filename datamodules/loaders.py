"""What the datamodule hands to Lightning: one epoch of rollouts, and the episodes of one evaluation."""

import logging
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from tensordict import TensorDict

from lit_rl.errors import EnvFailure
from lit_rl.replay import ReplayStream
from lit_rl.runners.env_runner import Episode
from lit_rl.runners.episodes import play
from lit_rl.runners.faults import Restarts
from lit_rl.runners.gathering import evened

if TYPE_CHECKING:
    from lit_rl.datamodules.environments import EnvDataModule
    from lit_rl.datamodules.replay import ReplayDataModule
    from lit_rl.datamodules.rollout import RolloutDataModule

log = logging.getLogger(__name__)


class RolloutLoader:
    """A sized, stateful iterable over one epoch's rollouts.

    Sized, because Lightning fetches one batch ahead from an iterable without a length: training would silently be one
    policy behind.
    """

    def __init__(self, data: "RolloutDataModule"):
        self._data = data
        self._in_flight = False

    def __len__(self) -> int:
        return self._data.rollouts_per_epoch

    def __iter__(self) -> Iterator[TensorDict]:
        data = self._data
        algorithm, trainer = data.algorithm, data.attached_trainer
        first = trainer.fit_loop.batch_idx + 1  # not 0 in an epoch that is resumed in its middle
        for _ in range(first, len(self)):
            started = time.perf_counter()
            if not self._in_flight:
                data.start_rollout()
            rollout = evened(data.finish_rollout(), algorithm.device)
            self._in_flight = False
            data.sample_s = time.perf_counter() - started
            left = data.rollouts_left(algorithm.env_steps_done + algorithm.count_env_steps(rollout))
            # Set before the last batch is yielded: Lightning then still validates and saves after it.
            if not left:
                trainer.should_stop = True
            elif data.prefetch:
                data.start_rollout()
                self._in_flight = True
            yield rollout

    def state_dict(self) -> dict[str, Any]:
        """Nothing, since Lightning's batch index says where in the epoch we are; its presence says that we resume."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to load."""


class ReplayLoader:
    """A sized, stateful iterable over one epoch's streams of minibatches."""

    def __init__(self, data: "ReplayDataModule"):
        self._data = data

    def __len__(self) -> int:
        return self._data.batches_per_epoch

    def __iter__(self) -> Iterator[ReplayStream]:
        first = self._data.attached_trainer.fit_loop.batch_idx + 1  # not 0 in an epoch that is resumed in its middle
        for _ in range(first, len(self)):
            yield self._data.stream()

    def state_dict(self) -> dict[str, Any]:
        """Nothing, as of `RolloutLoader`."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to load."""


class EpisodeLoader:
    """A sized iterable over this rank's share of the evaluation episodes, one item per episode.

    Every rank yields equally many items, since each is a collective under DDP: a smaller share ends with an empty one.
    """

    def __init__(self, data: "EnvDataModule", *, record: bool = False):
        self._data = data
        self._record = record
        self._seeds = data.eval_seeds()

    def __len__(self) -> int:
        return -(-self._data.evaluation.episodes // self._data.attached_trainer.world_size)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        data = self._data
        data.evaluated_at = data.algorithm.env_steps_done
        played = 0
        for episode in self._play_here() if not data.evaluation.num_env_runners else self._play_elsewhere():
            played += 1
            yield episode._asdict()
        for _ in range(len(self) - played):
            yield {}

    def _play_here(self) -> Iterator[Episode]:
        data = self._data
        acting = data.algorithm.acting_copy()
        acting.rng = np.random.default_rng(self._seeds)
        deadline = time.monotonic() + data.evaluation.timeout_s
        left, restarts, said = list(self._seeds), Restarts(data.fault_tolerance), False
        data.lost_episodes = 0
        while left:
            try:
                options = data.play_options(record=self._record)
                for episode in play(
                    data.eval_env, acting, left, timeout_s=max(deadline - time.monotonic(), 0.0), **options
                ):
                    if episode.cut and not said:
                        said = True
                        data.say_cut(len(self._seeds) - len(left), len(self._seeds))
                    left = [seed for seed in left if seed != episode.seed]
                    # What time was too short to begin is lost, and Lightning may not ask again after the last one.
                    data.lost_episodes = len(left) if said else 0
                    yield episode
            except EnvFailure as error:
                wait = restarts.failed()
                played = len(self._seeds) - len(left)
                if wait is None:
                    log.warning("%s Evaluation ends with %d of %d episodes.", error, played, len(self._seeds))
                    data.lost_episodes = len(left)
                    break
                log.warning("%s The evaluation episodes that had not ended are played again.", error)
                time.sleep(wait)
            else:
                break

    def _play_elsewhere(self) -> list[Episode]:
        """By the eval runners. While training goes on beside them, it is the evaluation before this one."""
        data, trainer = self._data, self._data.attached_trainer
        if not data.evaluates_in_parallel:
            data.begin_evaluation(record=self._record)
            return data.end_evaluation()
        if not data.evaluating:
            data.begin_evaluation()
        episodes = data.end_evaluation()
        data.begin_evaluation()
        if trainer.should_stop:  # no other one follows
            data.algorithm.log_evaluation([episode._asdict() for episode in episodes])
            episodes = data.end_evaluation()
        return episodes
