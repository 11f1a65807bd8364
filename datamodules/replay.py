"""Experience replay for off-policy algorithms."""

import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict

from lit_rl import distributed
from lit_rl.datamodules.environments import EnvDataModule
from lit_rl.envs.make import Env
from lit_rl.errors import OptionError
from lit_rl.files.checkpoint import files_beside
from lit_rl.off_policy import OffPolicy
from lit_rl.options import Count, taken, with_fields_of
from lit_rl.replay import ReplayBuffer, ReplayStream
from lit_rl.replay.options import CompleteReplay, Replay
from lit_rl.runners.ray_pool import RunnerPool
from lit_rl.trees import iterate

ROUNDING = 1e-6  # of an update
MOST_AT_ONCE = 128  # env steps per environment of a fragment, unless `rollout_length` is more
REPLAY = 2  # what a seed is for: see datamodules.environments


class ReplayDataModule(EnvDataModule):
    """Minibatches drawn from a buffer that env runners fill, for off-policy algorithms such as DQN and SAC.

    The buffer's options are those of `Replay`.

    Args:
        rollout_length: T, env steps per environment between updates.
        env_steps_per_batch: env steps of each learner process per Lightning batch: how often metrics are logged.
        batches_per_epoch: Lightning batches in an epoch: how often evaluation and checkpoints can happen.
    """

    env_steps_per_batch: int
    batches_per_epoch: int

    @with_fields_of(Replay)
    def __init__(
        self,
        env: Env,
        *,
        num_envs_per_env_runner: Count = 1,
        rollout_length: Count = 1,
        env_steps_per_batch: Count = 1000,
        batches_per_epoch: Count = 10,
        **options: Any,
    ):
        self.replay = taken(Replay, options)
        self._complete: CompleteReplay | None = None  # with the attached algorithm's defaults
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
        self.buffer: ReplayBuffer | None = None
        self._resumed_from: Path | None = None  # the folder of a checkpoint's buffer that is not loaded yet
        self._resumed_stored = 0  # what `_stored` is once it is
        self._staging: tempfile.TemporaryDirectory | None = None  # of rows as checkpoints of this run share them
        self._owed = 0.0  # updates that env steps ask for and are not made yet
        self._stored = 0  # env steps of all ranks since the buffer was empty
        self._env_steps = 0  # of all ranks so far, with those of the stream under way

    # --- Lightning's hooks --------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage != "fit":
            return
        if not isinstance(self.algorithm, OffPolicy):
            raise OptionError(
                f"model={type(self.algorithm).__name__}: ReplayDataModule feeds off-policy algorithms such as DQN and "
                "SAC. Use RolloutDataModule."
            )
        self._complete = self.replay.completed(self.algorithm.REPLAY)
        budget = self.max_env_steps
        if budget is not None and self.replay.learning_starts >= budget:
            raise OptionError(
                f"learning_starts={self.replay.learning_starts}: expected less than max_env_steps={budget}, or nothing "
                "is ever learned. Lower it."
            )

    def train_dataloader(self) -> "ReplayLoader":
        self.set_threads()
        self.say_if_done()
        return ReplayLoader(self)

    def teardown(self, stage: str) -> None:
        super().teardown(stage)
        if self._staging is not None:
            self._staging.cleanup()
            self._staging = None

    # --- minibatches --------------------------------------------------------------------------------------------

    def stream(self) -> ReplayStream:
        """The next Lightning batch."""
        return ReplayStream(self._minibatches)

    def _minibatches(self, stream: ReplayStream) -> Iterator[TensorDict]:
        """Step environments and yield minibatches, until the batch's env steps are taken and learned from."""
        trainer, algorithm = self.attached_trainer, self._off_policy
        begin = self._env_steps = algorithm.env_steps_done
        end = begin + self.env_steps_per_batch * trainer.world_size
        self.sample_s = 0.0
        while self._env_steps < end and self._budget_left(self._env_steps) >= self._max_rows:
            started = time.perf_counter()
            device = algorithm.device.type  # this is inside of the learner's training_step
            with torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext():
                self._collect(algorithm, end)
            stream.env_steps = self._env_steps - begin
            stream.waited_s += time.perf_counter() - started
            self.sample_s = stream.waited_s  # here, since whoever takes minibatches may stop at any
            while self._owed > 1 - ROUNDING:
                self._owed -= 1
                minibatch = self._draw(algorithm)
                yield minibatch
                if "priority" in minibatch.keys():  # noqa: SIM118
                    self._full_buffer.update_priorities(minibatch["index"], minibatch["priority"])
                if 0 <= trainer.max_steps <= trainer.global_step:
                    return
        if self._budget_left(self._env_steps) < self._max_rows:
            self.stop_at_budget()

    def _collect(self, algorithm: OffPolicy, end: int) -> None:
        """Take env steps of the runners into the buffer, up to `end` in all."""
        num_lines, world_size = self.num_envs_per_env_runner * self.num_slots, distributed.world_size()
        length = algorithm.sequence_length
        if length is not None and self._replay.batch_size < length:
            raise OptionError(
                f"batch_size={self._replay.batch_size}: expected at least one sequence, sequence_length={length} rows. "
                "Raise it."
            )
        if self.buffer is None:
            self.buffer = self._make_buffer()
        env_steps, rows = self._env_steps, self._max_rows
        warming_up = env_steps < self.replay.learning_starts
        times = self._times_at_once(rows, end)
        if warming_up and self.replay.random_warmup:
            epsilons = [1.0] * times
        else:
            epsilons = [algorithm.epsilon_at(env_steps + k * rows) for k in range(times)]
        self.start_runners(epsilons)
        if self.prefetch:
            assert isinstance(self._pool, RunnerPool)
            fragments = distributed.together(self._pool.finish_any, algorithm.device)
            self.start_runners(epsilons)
        else:
            assert self._pool is not None
            fragments = distributed.together(self._pool.finish, algorithm.device)
        taken = 0
        for runner, fragment in fragments:
            arrays = fragment.rows.views() | fragment.finals.views()
            envs = range(runner * num_lines, (runner + 1) * num_lines)
            taken += self.buffer.extend(arrays, envs, self.rollout_length)
        self.took(fragments, times)
        env_steps = sum(fragment.entry.delivered for _, fragment in fragments)  # with several agents not those taken
        if world_size > 1:
            counts = distributed.all_reduce_sum(torch.tensor([taken, env_steps], device=algorithm.device))
            taken, env_steps = counts.tolist()
        self._env_steps += env_steps
        self._stored += taken
        if not warming_up and self._stored >= self._replay.batch_size * world_size:
            self._owed += taken / world_size * self._replay.update_to_data

    def _times_at_once(self, rows: int, end: int) -> int:
        """How often `rows` env steps can be taken in one fragment: until an update is due, or `end` is reached.

        The buffer and the policy's actions are then as if each had been a fragment of its own. In this process alone,
        and where every step is a transition.
        """
        if self.num_env_runners or self.env.vectorization != "sync" or self.env.is_multi_agent:
            return 1
        env_steps, replay, length = self._env_steps, self._replay, self.rollout_length
        world_size = distributed.world_size()
        enough = replay.batch_size * world_size
        if env_steps < replay.learning_starts:
            most = -(-(replay.learning_starts - env_steps) // rows)
        elif self._stored < enough:  # in a resumed run that began with an empty buffer
            most = (enough - 1 - self._stored) // rows
        else:
            most = int((1 - ROUNDING - self._owed) / (rows / world_size * replay.update_to_data)) + 1
        room = replay.buffer_size // (16 * rows)  # what a fragment continues is never overwritten by it
        left = min(self._budget_left(env_steps) // rows, -(-(end - env_steps) // rows))
        return int(max(1, min(most, left, room, MOST_AT_ONCE // length)))

    def _draw(self, algorithm: OffPolicy) -> TensorDict:
        buffer = self._full_buffer
        length, gamma, steps, beta = algorithm.sequence_length, algorithm.gamma, self.num_steps, self.beta
        if length is None:
            minibatch = buffer.sample(self._replay.batch_size, gamma=gamma, num_steps=steps, beta=beta)
        else:
            minibatch = buffer.sample_sequences(
                self._replay.batch_size // length,
                length=length,
                burn_in=algorithm.burn_in,
                gamma=gamma,
                num_steps=steps,
                beta=beta,
            )
        return minibatch if algorithm.device.type == "cpu" else minibatch.to(algorithm.device, non_blocking=True)

    @property
    def num_steps(self) -> tuple[int, int]:
        """The least and the most rewards to sum."""
        return self._replay.num_steps

    @property
    def beta(self) -> float:
        """The importance weights' exponent now."""
        if self.max_env_steps is None:
            return self.replay.priority_beta
        return self.replay.priority_beta + (1 - self.replay.priority_beta) * min(
            1.0, self._env_steps / self.max_env_steps
        )

    def rollout_metrics(self) -> dict[str, float]:
        metrics = super().rollout_metrics()
        if self.buffer is not None:
            metrics["replay/transitions"] = float(len(self.buffer))
        return metrics | ({"replay/beta": self.beta} if self._replay.prioritized else {})

    # --- state --------------------------------------------------------------------------------------------------

    def restart(self) -> None:
        super().restart()
        self._owed, self._stored, self.buffer, self._resumed_from = 0.0, 0, None, None

    def rank_state(self, weights_only: bool = False) -> dict[str, Any]:
        state = super().rank_state() | {"owed": self._owed}
        if self.buffer is None and self._resumed_from is not None:
            self.buffer = self._make_buffer()  # nothing was drawn from it yet: it goes on to the next checkpoint
        if self.replay.checkpoint_buffer and self.buffer is not None and not weights_only:
            if self._staging is None:
                trainer = self.attached_trainer
                folder = Path(trainer.log_dir or trainer.default_root_dir)
                folder.mkdir(parents=True, exist_ok=True)
                self._staging = tempfile.TemporaryDirectory(prefix=".replay-", dir=folder)
            saved = self.buffer.save(Path(self._staging.name))
            state["replay"] = saved | {"stored": self._stored, "folder": self._staging.name}
        return state

    def load_ranks(self, states: Sequence[dict[str, Any]], rank: int, world_size: int) -> None:
        super().load_ranks(states, rank, world_size)
        # All ranks learn, or none does: it is the buffer with the fewest rows that counts.
        if self._resumed_from is not None:
            stored = states[rank]["replay"]["stored"]
            self._resumed_stored = stored * world_size // len(states) if world_size <= len(states) else 0

    def load_rank_state(self, state: dict[str, Any]) -> None:
        super().load_rank_state(state)
        self._owed, self._stored = state["owed"], 0
        self.buffer = None
        if self.replay.checkpoint_buffer and "replay" in state:
            trainer = self.attached_trainer
            self._resumed_from = files_beside(trainer.ckpt_path) / f"rank_{trainer.global_rank}"

    def _make_buffer(self) -> ReplayBuffer:
        policy = self.algorithm.policy
        self.keep_states = policy.has_memory
        rank = self.attached_trainer.global_rank
        try:
            buffer = ReplayBuffer(
                policy.spec,
                self.replay.buffer_size,
                state=dict(iterate(policy.initial_state(1), "state")) if policy.has_memory else None,
                priority_alpha=self.replay.priority_alpha if self._replay.prioritized else None,
                storage_dir=self.replay.storage_dir,
                seed=self._seed_sequence(REPLAY, rank),
            )
        except (MemoryError, OSError, ValueError) as error:
            message = " ".join(str(error).split())
            raise OptionError(
                f"buffer_size={self.replay.buffer_size}: no room for so many rows: {message}. Lower it."
            ) from error
        if self._resumed_from is not None:
            assert self._resume is not None
            buffer.load(self._resumed_from, self._resume["replay"])
            self._stored = self._resumed_stored
            self._resumed_from = None
        return buffer

    @property
    def _replay(self) -> CompleteReplay:
        assert self._complete is not None  # see setup
        return self._complete

    @property
    def _off_policy(self) -> OffPolicy:
        algorithm = self.algorithm
        assert isinstance(algorithm, OffPolicy)  # see setup
        return algorithm

    @property
    def _full_buffer(self) -> ReplayBuffer:
        assert self.buffer is not None
        return self.buffer

    @property
    def _max_rows(self) -> int:
        if self.prefetch:  # one runner's fragment at a time
            return self._fragment_rows
        return super()._max_rows

    @property
    def _rows_per_epoch(self) -> int:
        return self.batches_per_epoch * self.env_steps_per_batch * self.attached_trainer.world_size


class ReplayLoader:
    """A sized, stateful iterable over one epoch's streams of minibatches."""

    def __init__(self, data: ReplayDataModule):
        self._data = data

    def __len__(self) -> int:
        return self._data.batches_per_epoch

    def __iter__(self) -> Iterator[ReplayStream]:
        first = self._data.attached_trainer.fit_loop.batch_idx + 1  # not 0 in an epoch that is resumed in its middle
        for _ in range(first, len(self)):
            yield self._data.stream()

    def state_dict(self) -> dict[str, Any]:
        """Nothing, since Lightning's batch index says where in the epoch we are; its presence says that we resume."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to load."""
