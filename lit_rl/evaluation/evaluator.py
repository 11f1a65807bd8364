"""Plays the episodes of evaluations: in this process, or in eval runners beside training."""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from lit_rl.envs.make import EnvConfig
from lit_rl.errors import EnvFailure
from lit_rl.evaluation.episodes import play
from lit_rl.evaluation.eval_pool import EvalPool
from lit_rl.evaluation.options import Evaluation
from lit_rl.evaluation.summary import EvaluationResult
from lit_rl.policy import Policy
from lit_rl.runners.faults import FaultTolerance, Restarts
from lit_rl.runners.fragment import Episode
from lit_rl.runners.placement import Placement

log = logging.getLogger(__name__)


class Evaluator:
    """Plays whole episodes with a copy of a policy, and says what it found.

    `play` plays them here, one after the other as they are asked for. `begin` and `end` have eval runners play them,
    while this process does something else.

    Args:
        env: the environment that is played.
        options: how.
        info_metrics: keys of `info` to report for each episode.
        faults: how often what fails is tried again.
        placement: of the eval runners.
        connect: joins Ray; called before the first eval runner is made.

    Attributes:
        recorder: told of each episode that was played, with its steps; None if nobody records them.
    """

    def __init__(
        self,
        env: EnvConfig,
        options: Evaluation = Evaluation(),  # noqa: B008 - it is frozen
        *,
        info_metrics: Sequence[str] = (),
        faults: FaultTolerance = FaultTolerance(),  # noqa: B008
        placement: Placement = Placement(),  # noqa: B008
        connect: Callable[[], None] = lambda: None,
    ):
        self._env, self._options = env, options
        self._info_metrics = self._to_check = tuple(info_metrics)
        self._faults, self._placement, self._connect = faults, placement, connect
        self.recorder: Callable[[Episode], None] | None = None
        self._pool: EvalPool | None = None
        self._playing: Any = None  # the policies that eval runners have
        # In eval runners: env steps and updates of the policy, number of episodes.
        self._under_way: tuple[int, int, int] | None = None
        self._results: list[EvaluationResult] = []

    @property
    def is_under_way(self) -> bool:
        """Whether eval runners are playing."""
        return self._under_way is not None

    def take_results(self) -> list[EvaluationResult]:
        """The evaluations since this was asked last, the oldest first."""
        results, self._results = self._results, []
        self._say_missing([episode for result in results for episode in result.episodes])
        return results

    def play(
        self, policy: Policy, seeds: Sequence[int], at: int, *, version: int = 0, record: bool = False
    ) -> Iterator[Episode]:
        """Play an episode for each seed in this process. The result is that of the episodes that were asked for.

        Args:
            policy: by whose weights, as they are now.
            seeds: one for each episode.
            at: env steps after which the policy is as it is.
            version: updates that it has been through.
            record: whether to keep the episodes' steps, even if there is no recorder.
        """
        acting = policy.acting_copy()
        acting.rng = np.random.default_rng(seeds)
        deadline = time.monotonic() + self._options.timeout_s
        left, restarts, played = list(seeds), Restarts(self._faults), list[Episode]()
        is_cut = False
        self._results.append(EvaluationResult(played, 0, at))
        while left:
            try:
                timeout_s = max(deadline - time.monotonic(), 0.0)
                for episode in play(self._env, acting, left, timeout_s=timeout_s, **self._play_options(record)):
                    if episode.cut and not is_cut:
                        is_cut = True
                        self._say_cut(len(played), len(seeds))
                    left = [seed for seed in left if seed != episode.seed]
                    episode = self._recorded(episode, version)
                    played.append(episode)
                    # Episodes that were not begun in time are lost. The caller may stop after the last episode, so the
                    # result is kept now.
                    self._results[-1] = EvaluationResult(played, len(left) if is_cut else 0, at)
                    yield episode
            except EnvFailure as error:
                wait = restarts.failed()
                if wait is None:
                    log.warning("%s Evaluation ends with %d of %d episodes.", error, len(played), len(seeds))
                    self._results[-1] = EvaluationResult(played, len(left), at)
                    break
                log.warning("%s The evaluation episodes that had not ended are played again.", error)
                time.sleep(wait)
            else:
                if left and not is_cut:  # time was over just when all episodes under way had ended
                    self._say_cut(len(played), len(seeds))
                    self._results[-1] = EvaluationResult(played, len(left), at)
                break

    def begin(self, policy: Policy, seeds: Sequence[int], at: int, *, version: int = 0, record: bool = False) -> None:
        """Have the eval runners play an episode for each seed; see `play`."""
        if self._pool is None:
            self._connect()
            num_runners = self._options.num_env_runners
            self._pool = EvalPool(self._env, policy.maker(), num_runners, self._faults, self._placement)
        elif policy is not self._playing:
            self._pool.follow(policy.maker())
        self._playing = policy
        self._pool.start(policy, seeds, self._options.timeout_s, **self._play_options(record))
        self._under_way = at, version, len(seeds)

    def end(self) -> EvaluationResult:
        """The result of the evaluation under way in eval runners, as soon as it is played."""
        assert self._pool is not None and self._under_way is not None
        found = self._pool.finish()
        (at, version, asked), self._under_way = self._under_way, None
        episodes = [self._recorded(episode, version) for episode in found]
        result = EvaluationResult(episodes, asked - len(episodes), at)
        self._results.append(result)
        if result.cut:
            self._say_cut(len(episodes) - result.cut, asked)
        return result

    def pids(self) -> list[int]:
        """The process ids of the eval runners that are there."""
        return [] if self._pool is None else self._pool.pids()

    def close(self) -> None:
        """Stop the eval runners."""
        self._results = []  # of an evaluation that was broken off, or was recorded: nobody asks for them any more
        if self._pool is not None:
            self._pool.close()
            self._pool, self._under_way = None, None

    def _play_options(self, record: bool) -> dict[str, Any]:
        return {
            "deterministic": self._options.deterministic,
            "info_metrics": self._info_metrics,
            "record": record or self.recorder is not None,
        }

    def _recorded(self, episode: Episode, version: int) -> Episode:
        """An episode that was played, after the recorder was told of it."""
        episode = episode._replace(policy_version=version)
        if self.recorder is not None:
            self.recorder(episode)
        return episode

    def _say_missing(self, episodes: Sequence[Episode]) -> None:
        """Warn of `info_metrics` that none of the first episodes had."""
        if not episodes:
            return
        missing = [key for key in self._to_check if not any(key in episode.info for episode in episodes)]
        self._to_check = ()
        if missing:
            log.warning(
                "info_metrics=%s: the last info of none of the %d evaluation episodes had it. Check the name, and that "
                "the environment puts it into the info of its last step.",
                missing,
                len(episodes),
            )

    def _say_cut(self, num_ended: int, asked: int) -> None:
        log.warning(
            "Evaluation took longer than evaluation.timeout_s=%g: only %d of %d episodes have ended.",
            self._options.timeout_s,
            num_ended,
            asked,
        )
