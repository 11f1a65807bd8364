"""Experience replay for off-policy algorithms."""

import time
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from tensordict import TensorDict

from lit_rl import distributed
from lit_rl.algorithm import Algorithm
from lit_rl.datamodules.environments import EnvDataModule
from lit_rl.datamodules.evaluating import RECORDED, check_same_spaces
from lit_rl.datamodules.streams import StreamLoader
from lit_rl.envs.make import Env
from lit_rl.errors import OptionError
from lit_rl.files.recorded import read_recorded
from lit_rl.multi_agent import MultiAgent
from lit_rl.off_policy import OffPolicy
from lit_rl.options import Count, OpenFraction, Paths, taken, with_fields_of
from lit_rl.policy import PolicySet
from lit_rl.recorded import Recorded
from lit_rl.replay import ReplayBuffer, ReplayStream
from lit_rl.replay.feed import ALONE, ROUNDING
from lit_rl.replay.options import Replay
from lit_rl.replay.recorded_feed import Draws, RecordedFeed, episodes_of, rows_of_rank
from lit_rl.runners.ray_pool import RunnerPool

MOST_AT_ONCE = 128  # env steps per environment of a fragment, unless `rollout_length` is more


class ReplayDataModule(EnvDataModule):
    """Minibatches drawn from a buffer that env runners fill, for off-policy algorithms such as DQN and SAC.

    The buffer's options are those of `Replay`.

    Args:
        rollout_length: T, env steps per environment between updates.
        env_steps_per_batch: env steps of each learner process per Lightning batch: how often metrics are logged.
        batches_per_epoch: Lightning batches in an epoch: how often evaluation and checkpoints can happen.
        offline_paths: recorded episodes that stay in every minibatch, beside those that env runners collect: see
            `OfflineDataModule`. None: there are none.
        offline_fraction: of a minibatch, that is recorded.
    """

    env_steps_per_batch: int
    batches_per_epoch: int
    offline_paths: tuple[str, ...] | None
    offline_fraction: float

    @with_fields_of(Replay)
    def __init__(
        self,
        env: Env,
        *,
        num_envs_per_env_runner: Count = 1,
        rollout_length: Count = 1,
        env_steps_per_batch: Count = 1000,
        batches_per_epoch: Count = 10,
        offline_paths: Paths | None = None,
        offline_fraction: OpenFraction = 0.5,
        **options: Any,
    ):
        self.replay = taken(Replay, options)
        super().__init__(env, num_envs_per_env_runner=num_envs_per_env_runner, rollout_length=rollout_length, **options)
        self.take_options()
        if self.prefetch > 1:
            raise OptionError(f"prefetch={self.prefetch}: expected 0 (newest weights) or 1 (one version behind).")
        batch, length = self.rollout_shape
        if self.replay.buffer_size < 2 * batch * (length + 1):
            raise OptionError(
                f"buffer_size={self.replay.buffer_size}: expected at least {2 * batch * (length + 1)} rows, for "
                f"{batch} environments and rollout_length={length}. Raise it."
            )
        if offline_paths is None and offline_fraction != 0.5:
            raise OptionError(f"offline_fraction={offline_fraction}: expected offline_paths too, the recorded data.")
        self._recorded: Recorded | None = None
        self._env_steps = 0  # of all ranks so far, with those of the stream under way

    # --- Lightning's hooks --------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage != "fit":
            return
        algorithm = self.algorithm
        added: dict[str, int] = {}
        if isinstance(algorithm, MultiAgent):
            found, added = algorithm.off_policy, algorithm.added
            for policy_id in algorithm.on_policy:
                self.check_policy(policy_id, algorithm.algorithms[policy_id])
        elif isinstance(algorithm, OffPolicy):
            found = {ALONE: algorithm}
        else:
            raise OptionError(
                f"model={type(algorithm).__name__}: ReplayDataModule feeds off-policy algorithms such as DQN and "
                "SAC. Use RolloutDataModule."
            )
        for policy_id, one in found.items():
            self.check_policy(policy_id, one)
        if self.offline_paths is not None:
            self.feeds.mix_in(self._recorded_feed, self.offline_fraction)
            if self._recorded is None:
                assert self.spec is not None
                self._recorded, spec = read_recorded(self.offline_paths, spec=self.spec)
                check_same_spaces(f"offline_paths={list(self.offline_paths)!r}: the data", spec, self.spec)
                rank_zero_info(f"{', '.join(self.offline_paths)}: {self._recorded.summary}.")
        self.feed(found, dict.fromkeys(found, self.replay), added)

    def check_policy(self, policy_id: str, algorithm: Algorithm) -> None:
        if not isinstance(algorithm, OffPolicy):
            raise OptionError(
                f"policies[{policy_id!r}]={type(algorithm).__name__}(...): ReplayDataModule feeds off-policy "
                "algorithms such as DQN and SAC alone. Use RolloutDataModule(replay=Replay(...)), which feeds both."
            )
        if algorithm.wants_returns_to_go and self.offline_paths is None:
            raise OptionError(
                f"model={type(algorithm).__name__}: it learns from the returns of recorded episodes: expected an "
                "OfflineDataModule, or offline_paths beside the environment."
            )
        if self.offline_paths is not None:
            algorithm.check_learns_from_recorded()

    def add_policy(self, policy_id: str, algorithm: Any, number: int) -> None:
        self.feeds.add(policy_id, algorithm, self.replay, number)

    def train_dataloader(self) -> StreamLoader:
        self.set_threads()
        self.say_how_it_runs()
        self.say_if_done()
        return StreamLoader(self)

    def _recorded_feed(self, policy_id: str) -> RecordedFeed:
        """Minibatches of recorded episodes for a policy's algorithm; its networks are there."""
        trainer, recorded, policy = self.attached_trainer, self._recorded, self.algorithm.policy
        assert recorded is not None
        feed = self.feeds[policy_id]
        mapping = policy.mapping if isinstance(policy, PolicySet) else None
        rows = rows_of_rank(
            recorded, episodes_of(recorded, policy_id, mapping), trainer.global_rank, trainer.world_size
        )
        if not len(rows):
            raise OptionError(
                f"offline_paths={list(self.offline_paths or ())!r}: too few transitions for {trainer.world_size} "
                "learner processes. Give more data."
            )
        options, length = feed.options, feed.algorithm.sequence_length or 1
        if options.batch_size < 2 * length:
            raise OptionError(
                f"batch_size={options.batch_size}: expected at least {2 * length} rows, of which a part is recorded. "
                "Raise it."
            )
        draws = Draws(options.batch_size, options.num_steps, options.priority_alpha if options.prioritized else None)
        seed = self._seed_sequence(RECORDED, trainer.global_rank, *feed.key)
        return RecordedFeed(feed.algorithm, recorded, rows=rows, held_out=rows[:0], draws=draws, seed=seed)

    # --- minibatches --------------------------------------------------------------------------------------------

    def stream(self) -> ReplayStream:
        """The next Lightning batch."""
        return ReplayStream(self._minibatches)

    def _minibatches(self, stream: ReplayStream) -> Iterator[tuple[str, TensorDict]]:
        """Step environments and yield minibatches, until the batch's env steps are taken and learned from."""
        trainer, algorithm = self.attached_trainer, self.algorithm
        begin = self._env_steps = algorithm.env_steps_done
        self.feeds.begin(begin)
        end = begin + self.env_steps_per_batch * trainer.world_size
        self.sample_s = 0.0
        learning = algorithm.learning if isinstance(algorithm, MultiAgent) else list(self.feeds)
        while self._env_steps < end and self._budget_left(self._env_steps) >= self._max_rows:
            started = time.perf_counter()
            device = algorithm.device.type  # this is inside of the learner's training_step
            with torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext():
                self._collect(end)
            self.feeds.rest(learning)
            stream.env_steps = self._env_steps - begin
            stream.waited_s += time.perf_counter() - started
            self.sample_s = stream.waited_s  # here, since whoever takes minibatches may stop at any
            for policy_id, feed in self.feeds.items():
                for minibatch in feed.minibatches(self.has_reached_max_steps):
                    yield policy_id, minibatch
            if self.has_reached_max_steps():
                return
        if self._budget_left(self._env_steps) < self._max_rows:
            self.stop_at_budget()

    def _collect(self, end: int) -> None:
        """Take env steps of the runners into the buffers, up to `end` in all."""
        device, rows = self.algorithm.device, self._max_rows
        self.feeds.make_buffers()
        times = self._times_at_once(rows, end)
        epsilons = self.feeds.epsilons(rows, times)
        self.start_runners(epsilons)
        if self.prefetch:
            assert isinstance(self._pool, RunnerPool)
            fragments = distributed.together(self._pool.finish_any, device)
            self.start_runners(epsilons)
        else:
            assert self._pool is not None
            fragments = distributed.together(self._pool.finish, device)
        self.took(fragments, times)
        policy: Any = self.algorithm.policy
        numbers = {} if ALONE in self.feeds else policy.numbers
        self._env_steps += self.feeds.take(fragments, self.rollout_length, device, numbers)

    def _times_at_once(self, rows: int, end: int) -> int:
        """How often `rows` env steps can be taken in one fragment: until an update is due, or `end` is reached.

        The buffer and the policy's actions are then as if each had been a fragment of its own. In this process alone,
        and where every step is a transition.
        """
        if self.num_env_runners or self.env.vectorization != "sync" or self.env.is_multi_agent:
            return 1
        feed, env_steps, length = self.feeds[ALONE], self._env_steps, self.rollout_length
        options, world_size = feed.options, distributed.world_size()
        enough = options.batch_size * world_size
        if feed.is_warming_up:
            most = -(-(options.learning_starts - env_steps) // rows)
        elif feed.stored < enough:  # in a resumed run that began with an empty buffer
            most = (enough - 1 - feed.stored) // rows
        else:
            most = int((1 - ROUNDING - feed.owed) / (rows / world_size * options.update_to_data)) + 1
        room = options.buffer_size // (16 * rows)  # what a fragment continues is never overwritten by it
        left = min(self._budget_left(env_steps) // rows, -(-(end - env_steps) // rows))
        return int(max(1, min(most, left, room, MOST_AT_ONCE // length)))

    @property
    def buffer(self) -> ReplayBuffer | None:
        """The buffer, where there is one policy alone; None before the first rows come."""
        return self.feeds[ALONE].buffer if ALONE in self.feeds else None

    @property
    def _max_rows(self) -> int:
        if self.prefetch:  # one runner's fragment at a time
            return self._fragment_rows
        return super()._max_rows

    @property
    def _rows_per_epoch(self) -> int:
        return self.batches_per_epoch * self.env_steps_per_batch * self.attached_trainer.world_size
