"""On-policy rollouts, and those of slightly older policies."""

import functools
import math
import time
from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from lit_rl import distributed
from lit_rl.algorithm import Algorithm
from lit_rl.datamodules.environments import EnvDataModule
from lit_rl.datamodules.evaluating import FRAGMENTS
from lit_rl.envs.make import Env
from lit_rl.errors import OptionError
from lit_rl.multi_agent import MultiAgent
from lit_rl.off_policy import OffPolicy
from lit_rl.options import Count, CountOrZero, Fraction, Positive
from lit_rl.replay import ReplayStream
from lit_rl.replay.options import Replay, Replays
from lit_rl.rollout import Rollout, Rollouts, map_rollouts, mask_of, rollouts_in
from lit_rl.runners.fragment import Epsilons, Fragment
from lit_rl.runners.free_running import FreeRunning
from lit_rl.runners.gathering import evened, nothing_like, to_rollout, to_rollouts
from lit_rl.runners.ray_pool import RunnerPool
from lit_rl.runners.reuse import CircularBuffer, FragmentReplay

OLD = 30  # gradient steps of lag from which on learning suffers: Petrenko et al. 2020, arXiv:2006.11751, section 3.4
IDLE = 0.2  # share of the time from which on something is idle


class RolloutDataModule(EnvDataModule):
    """Rollouts [B, T] collected with the policy that is being trained, for PPO, APPO and IMPALA.

    Without `prefetch`, or with 1, and with `fixed_lag`, a rollout is one fragment of every runner. With `prefetch` of 2
    and more the runners are free-running: a rollout is the `fragments_per_batch` fragments that are ready first.

    Args:
        rollouts_per_epoch: new rollouts in a Lightning epoch: how often evaluation and checkpoints can happen.
        fixed_lag: k: a rollout is collected with the weights after all but the last k rollouts before it were learned,
            so that results do not depend on how fast the runners are. `prefetch=1` is `fixed_lag=1`.
        fragments_per_batch: fragments that free-running runners give at a time, per learner process; None takes as many
            as there are runners.
        max_policy_lag: updates that a fragment's weights may be behind when it is learned from; older ones of
            free-running runners are left out. None learns from all.
        broadcast_interval: updates between the weights that free-running runners are sent.
        stream_timeout_s: how long a learner process waits for its free-running runners, if others have theirs; it then
            joins without rows.
        num_reuses: how often each rollout is learned from, with APPO or IMPALA. The repeats come from a circular buffer
            of the last rollouts, and are no new env steps.
        circular_buffer_batches: rollouts in that buffer: with more, newer ones come before a repeat.
        replay_fraction: share of each batch that past fragments are, at least 0 and below 1, with APPO or IMPALA.
        replay_buffer_fragments: past fragments that are kept for it.
        replay: the replay buffers of the off-policy algorithms of a `MultiAgent`, see `Replay`: the same options for
            all, or by policy. They learn after each rollout, in proportion to the rows of their own agents.
    """

    rollouts_per_epoch: int
    fixed_lag: int | None
    fragments_per_batch: int | None
    max_policy_lag: int | None
    broadcast_interval: int
    stream_timeout_s: float
    num_reuses: int
    circular_buffer_batches: int
    replay_fraction: float
    replay_buffer_fragments: int
    replay: Replay | dict[str, Replay] | None

    def __init__(
        self,
        env: Env,
        *,
        rollouts_per_epoch: Count = 10,
        fixed_lag: CountOrZero | None = None,
        fragments_per_batch: Count | None = None,
        max_policy_lag: CountOrZero | None = None,
        broadcast_interval: Count = 1,
        stream_timeout_s: Positive = 60.0,
        num_reuses: Count = 1,
        circular_buffer_batches: Count = 1,
        replay_fraction: Fraction = 0.0,
        replay_buffer_fragments: Count = 64,
        replay: Replays | None = None,
        **options: Any,
    ):
        super().__init__(env, **options)
        self.take_options()
        self._check_stream()
        self._stream = FreeRunning(self.prefetch, self.broadcast_interval, self.max_policy_lag)
        self._buffer = CircularBuffer(self.circular_buffer_batches, self.num_reuses)
        self._replay: FragmentReplay | None = None
        self._template: Rollout | Rollouts | None = None  # of the form of this rank's batches
        self._is_last = False  # whether the budget has no room for another rollout
        self._restarts = 0  # of runners, before the last rollout
        self._begun: float | None = None  # when the first batch was asked for
        self._waited_s = 0.0  # of the time since, by the learner
        self._said_old = False

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage != "fit":
            return
        algorithm = self.algorithm
        name = type(algorithm).__name__
        if isinstance(algorithm, OffPolicy):
            raise OptionError(
                f"model={name}: RolloutDataModule feeds on-policy algorithms such as PPO. Use ReplayDataModule."
            )
        if isinstance(algorithm, MultiAgent):
            self.feed(algorithm.off_policy, self._replays_of(algorithm), algorithm.added)
        elif self.replay is not None:
            raise OptionError(
                f"replay=...: expected none with {name}. It is for the off-policy algorithms of a MultiAgent; one by "
                "itself takes a ReplayDataModule. Leave it out."
            )
        if self.feeds and self.is_free_running:
            raise OptionError(
                f"prefetch={self.prefetch}: expected 0 or 1 with replay, or fixed_lag. Free-running runners do not "
                "fill replay buffers yet."
            )
        for learner in algorithm.learners:
            self._check_reuse(learner)

    def _check_reuse(self, algorithm: Algorithm) -> None:
        for option, nothing in (("num_reuses", 1), ("replay_fraction", 0)):
            if getattr(self, option) != nothing and not algorithm.LEARNS_AGAIN:
                raise OptionError(
                    f"{option}={getattr(self, option)}: {type(algorithm).__name__} does not learn from rollouts "
                    "again. Use APPO or IMPALA alone, or leave it out."
                )

    def check_policy(self, policy_id: str, algorithm: Algorithm) -> None:
        self._check_reuse(algorithm)
        if isinstance(algorithm, OffPolicy) and not isinstance(self.replay, Replay):
            raise OptionError(
                f"policies[{policy_id!r}]={type(algorithm).__name__}(...): it learns from a replay buffer, for which "
                "there are no options. Begin with an off-policy algorithm and RolloutDataModule(replay=Replay(...)), "
                "the same for all policies, or use ReplayDataModule."
            )

    def add_policy(self, policy_id: str, algorithm: Algorithm, number: int) -> None:
        if isinstance(algorithm, OffPolicy):
            assert isinstance(self.replay, Replay)
            self.feeds.add(policy_id, algorithm, self.replay, number)

    def _replays_of(self, algorithm: MultiAgent) -> dict[str, Replay]:
        """The options of the replay buffers, by policy.

        Raises:
            OptionError: if they are not those of the policies that need some.
        """
        off_policy = algorithm.off_policy
        given = self.replay if isinstance(self.replay, dict) else dict.fromkeys(off_policy, self.replay)
        for policy_id in given:
            if policy_id in off_policy or policy_id in algorithm.removed:
                continue
            if policy_id in algorithm.trained:
                raise OptionError(
                    f"replay[{policy_id!r}]: expected none for {algorithm.name_of(policy_id)}, which learns from "
                    "rollouts. Leave it out."
                )
            raise OptionError(
                f"replay[{policy_id!r}]: expected some of the policies that learn from replay, {list(off_policy)}. "
                "Leave it out."
            )
        if self.replay is not None and not off_policy and not algorithm.removed:
            raise OptionError(
                f"replay=...: none of the policies that are trained, {algorithm.trained}, has an off-policy algorithm. "
                "Leave it out."
            )
        found = {}
        for policy_id in off_policy:
            replay = given.get(policy_id)
            if replay is None:
                raise OptionError(
                    f"policies[{policy_id!r}]={algorithm.name_of(policy_id)}(...): it learns from a replay buffer. "
                    "Give RolloutDataModule(replay=Replay(...)) or, if all are off-policy, use ReplayDataModule."
                )
            found[policy_id] = replay
        return found

    def teardown(self, stage: str) -> None:
        super().teardown(stage)
        if stage == "fit":
            self._advise()

    def train_dataloader(self) -> "RolloutLoader":
        self.set_threads()
        self.say_how_it_runs()
        self.say_if_done()
        return RolloutLoader(self)

    # --- batches ------------------------------------------------------------------------------------------------

    def next_batch(self) -> Rollout | Rollouts:
        """The next rollout to learn from, new or not, with as many environments on every rank."""
        started = time.perf_counter()
        if self._begun is None:
            self._begun = started
        if self._buffer.is_due:
            batch: Any = self._buffer.repeat()
        else:
            batch = self._new_batch()
            self._is_last = not self.rollouts_left(self.algorithm.env_steps_done + batch.env_steps)
            if batch.has_rows:
                self._buffer.add(batch, self._oldest_version(batch))
            if self._is_last:
                self._buffer.finish()
            if not self.is_free_running and self.lag and not self._is_last:
                self._start_ahead(batch)
        if self.max_policy_lag is not None:  # when the next batch is learned from
            self._buffer.drop_older(self.algorithm.updates_done + 1 - self.max_policy_lag)
        if self._is_last and not self._buffer.is_due:
            self.stop_at_budget()
        for rollout in rollouts_in(batch):
            self._watch_age(rollout)
        self.sample_s = time.perf_counter() - started
        self._waited_s += self.sample_s
        return batch

    def _new_batch(self) -> Rollout | Rollouts:
        if self.is_free_running:
            return self._free_batch()
        if not (isinstance(self._pool, RunnerPool) and self._pool.num_asked):
            self.start_rollout()
        return self._evened(self.finish_rollout())

    def start_rollout(self) -> None:
        """Have the runners begin to collect, with the weights the policy has now."""
        self.feeds.begin(self.algorithm.env_steps_done)
        self.start_runners(self._epsilons())

    def finish_rollout(self) -> Rollout | Rollouts:
        """The rollout that was begun first, this rank's."""
        assert self._pool is not None
        fragments = distributed.together(self._pool.finish, self.algorithm.device)
        self.took(fragments)
        self._watch_restarts()
        found = self._rollout_of(fragments)
        if isinstance(found, Rollouts) and self.feeds:
            found.streams = self._streams_of(fragments)
        return found

    def _streams_of(self, fragments: list[tuple[int, Fragment]]) -> dict[str, ReplayStream]:
        """Put fragments into the replay buffers; returns the minibatches that are due, by policy."""
        algorithm = self.algorithm
        assert isinstance(algorithm, MultiAgent)
        self.feeds.begin(algorithm.env_steps_done)
        env_steps = self.feeds.take(fragments, self.rollout_length, algorithm.device, algorithm.policy.numbers)
        self.feeds.rest(algorithm.learning)
        return {policy_id: feed.stream(env_steps, self.has_reached_max_steps) for policy_id, feed in self.feeds.items()}

    def _epsilons(self) -> Epsilons:
        """The probabilities of random actions of the policies that learn from replay, in rollouts begun now."""
        self.feeds.make_buffers()
        return self.feeds.epsilons(self._max_rows)

    def _start_ahead(self, batch: Rollout | Rollouts) -> None:
        """Have runners collect while the learner is at `batch`, with the weights of before."""
        left = self.rollouts_left(self.algorithm.env_steps_done + batch.env_steps)
        self._ask(ahead=min(self.lag, left))

    def _ask(self, *, ahead: int, most: int | None = None, interval: int = 0) -> None:
        """Ask runners for fragments with the weights of now, see `RunnerPool.start`."""
        algorithm, epsilons = self.algorithm, self._epsilons()
        self._runners.start(
            algorithm.policy, algorithm.updates_done, epsilons, ahead=ahead, most=most, interval=interval
        )

    @property
    def _runners(self) -> RunnerPool:
        """Those that can be asked for several fragments ahead."""
        pool = self.pool
        assert isinstance(pool, RunnerPool)
        return pool

    def _free_batch(self) -> Rollout | Rollouts:
        """The next fragments of free-running runners; a rank that has none in time joins the others without rows."""
        algorithm, dropped_steps, room = self.algorithm, 0, self._room
        while True:
            taken, dropped = distributed.together(functools.partial(self._take, room), algorithm.device)
            self.took([*taken, *dropped])
            room -= len(dropped)
            steps = sum(fragment.entry.delivered for _, fragment in dropped)
            self.ledger.dropped += steps
            dropped_steps += steps
            if taken:
                found = self._rollout_of(taken)
                self._template = map_rollouts(nothing_like, found) if self._template is None else self._template
            else:
                assert self._template is not None  # see _take
                found = self._nothing_like(self._template)
            for rollout in rollouts_in(found):
                rollout.env_steps += dropped_steps
            batch = self._evened(found)
            if isinstance(batch, Rollout) and mask_of(batch) is None:
                return batch
            is_spent = room < self._num_fragments
            most, any_spent = distributed.greatest([len(taken), int(is_spent)], algorithm.device)
            if most or any_spent:
                return batch

    def _nothing_like(self, template: Rollout | Rollouts) -> Rollout | Rollouts:
        """A batch without a row, also of policies that were added since there was a template."""
        found = map_rollouts(nothing_like, template)
        if isinstance(found, Rollouts):
            nothing = self._joined([], copy=True)
            assert isinstance(nothing, Rollouts)
            alike = {i for i in nothing if i in found and found.numbers[i] == nothing.numbers[i]}
            return Rollouts({i: found[i] if i in alike else nothing[i] for i in nothing}, numbers=nothing.numbers)
        return found

    def _take(self, room: int) -> tuple[list[tuple[int, Fragment]], list[tuple[int, Fragment]]]:
        """See `FreeRunning.take`. It is waited for as long as it takes where no other rank has fragments meanwhile."""
        algorithm = self.algorithm
        alone = distributed.world_size() == 1 or self._template is None
        return self._stream.take(
            self._runners,
            self._ask,
            self._num_fragments,
            version=algorithm.updates_done,
            room=room,
            timeout_s=math.inf if alone else self.stream_timeout_s,
        )

    def _rollout_of(self, fragments: list[tuple[int, Fragment]]) -> Rollout | Rollouts:
        """A rollout of new fragments, and of past ones if they are replayed; one for each of several policies."""
        new = [fragment for _, fragment in fragments]
        if not self.replay_fraction:
            return self._joined(new, copy=bool(self.num_env_runners))
        if self._replay is None:
            seed = self._seed_sequence(FRAGMENTS, self.attached_trainer.global_rank, self._collected)
            self._replay = FragmentReplay(self.replay_fraction, self.replay_buffer_fragments, seed)
        oldest = 0 if self.max_policy_lag is None else self.algorithm.updates_done - self.max_policy_lag
        past = self._replay.draw(len(new), oldest)
        found = self._joined([*new, *past], copy=True, num_new=len(new))
        self._replay.add(new)
        for rollout in rollouts_in(found):
            rollout.env_steps = sum(fragment.entry.delivered for fragment in new)
        return found

    def _joined(self, fragments: list[Fragment], *, copy: bool, num_new: int | None = None) -> Rollout | Rollouts:
        algorithm = self.algorithm
        if not isinstance(algorithm, MultiAgent):
            return to_rollout(fragments, copy=copy, num_new=num_new)
        policies, version = algorithm.policy, algorithm.updates_done
        return to_rollouts(fragments, policies, algorithm.on_policy, version, copy=copy, num_new=num_new)

    def _evened(self, found: Rollout | Rollouts) -> Any:
        """This rank's rollouts as a batch, see `evened`."""
        return map_rollouts(functools.partial(evened, device=self.algorithm.device), found)

    def rollouts_left(self, env_steps: int) -> int:
        """How many whole rollouts the budget still has room for."""
        left = self._budget_left(env_steps)
        return int(left // self._max_rows) if left != float("inf") else 2**31

    # --- how old they are ---------------------------------------------------------------------------------------

    @property
    def is_free_running(self) -> bool:
        return self.prefetch > 1

    @property
    def lag(self) -> int:
        """Rollouts that are collected ahead, where runners are not free-running."""
        return self.prefetch if self.fixed_lag is None else self.fixed_lag

    @property
    def in_order(self) -> bool:
        return not (self.is_free_running or self.num_reuses > 1 or self.replay_fraction)

    @property
    def policy_lag(self) -> int:
        """Updates between the weights that acted and those that learn, where all runners are as fast as each other.

        At least so many: past fragments that are replayed may have any age.
        """
        if not self.is_free_running:
            return max(self.lag * self.num_reuses + self.num_reuses - 1, int(self.replay_fraction > 0))
        ahead = -(-(self.prefetch + self.num_env_runners) // self._num_fragments)
        return ahead * self.num_reuses + self.broadcast_interval - 1

    def _oldest_version(self, batch: Rollout | Rollouts) -> int:
        """Of the weights that acted, on any rank: all have to keep the same batches."""
        if self.max_policy_lag is None:
            return 0
        algorithm = self.algorithm
        versions = [_versions(rollout) for rollout in rollouts_in(batch)]
        oldest = min([algorithm.updates_done, *(int(found.min()) for found in versions if len(found))])
        return -distributed.greatest([-oldest], algorithm.device)[0]

    def _check_stream(self) -> None:
        """Refuse options that contradict each other."""
        if self.fixed_lag is not None:
            for name, value in (("prefetch", self.prefetch), ("max_policy_lag", self.max_policy_lag)):
                if value:
                    raise OptionError(
                        f"fixed_lag={self.fixed_lag}: expected neither prefetch nor max_policy_lag beside it, got "
                        f"{name}={value}. Leave one out."
                    )
            if self.fixed_lag and not self.num_env_runners:
                raise OptionError(
                    f"fixed_lag={self.fixed_lag}: collecting ahead of the learner needs num_env_runners of at least 1, "
                    "got 0."
                )
        if not self.is_free_running:
            for name, nothing in (("fragments_per_batch", None), ("max_policy_lag", None), ("broadcast_interval", 1)):
                if getattr(self, name) != nothing:
                    raise OptionError(
                        f"{name}={getattr(self, name)}: it is for free-running runners, prefetch of at least 2, got "
                        f"{self.prefetch}. Leave it out."
                    )
        if self.replay_fraction and self.num_reuses > 1:
            raise OptionError(
                f"replay_fraction={self.replay_fraction}: expected num_reuses=1 beside it, got {self.num_reuses}. "
                "Leave one out."
            )
        if self.circular_buffer_batches > 1 and self.num_reuses == 1:
            raise OptionError(
                f"circular_buffer_batches={self.circular_buffer_batches}: nothing is taken from the buffer with "
                "num_reuses=1. Leave it out, or raise num_reuses."
            )
        if self.max_policy_lag is not None and self.max_policy_lag < self.policy_lag:
            raise OptionError(
                f"max_policy_lag={self.max_policy_lag}: expected at least {self.policy_lag}, by which fragments are "
                f"behind if all runners are equally fast (prefetch={self.prefetch} and num_env_runners="
                f"{self.num_env_runners} fragments under way, {self._num_fragments} per batch, "
                f"num_reuses={self.num_reuses}, "
                f"broadcast_interval={self.broadcast_interval}). Raise it, or lower prefetch."
            )

    def _watch_age(self, batch: Rollout) -> None:
        """Warn once of rows that were collected long before, in gradient steps."""
        updates = self.algorithm.updates_done
        if self._said_old or not updates or not self.policy_lag:
            return
        versions = _versions(batch)
        if not len(versions):  # this rank has none
            return
        lag = updates - float(versions.double().mean())
        optimizing = {learner.host.steps for learner in self.algorithm.learners}  # some take theirs together
        steps = lag * self.attached_trainer.global_step / updates / len(optimizing)  # of a policy
        if steps >= OLD:
            self._said_old = True
            rank_zero_warn(
                f"Rows are {steps:.0f} gradient steps old when they are learned from: from about {OLD} on learning "
                "suffers. Lower prefetch or fixed_lag, or give more fragments_per_batch."
            )

    def _watch_restarts(self) -> None:
        restarts, self._restarts = self._restarts, self.ledger.restarts
        if self.fixed_lag and self.ledger.restarts > restarts:
            rank_zero_warn(
                f"fixed_lag={self.fixed_lag}: an env runner or an environment was replaced. From here on results "
                "depend on when it came back."
            )

    # --- metrics ------------------------------------------------------------------------------------------------

    def metrics(self) -> dict[str, float]:
        found = super().metrics()
        if not self.is_free_running:
            return found
        stream, device = self._stream, self.algorithm.device
        found["rollout/policy_lag_max"] = float(distributed.greatest([stream.lag], device)[0])
        found["rollout/queue_length"] = float(self._pool.num_waiting) if isinstance(self._pool, RunnerPool) else 0.0
        found["rollout/runner_idle"] = self._runner_idle()
        rows = [stream.rows[runner] for runner in range(self.num_env_runners)]
        total = max(1, sum(rows))
        return found | {"rollout/least_share": min(rows) / total, "rollout/greatest_share": max(rows) / total}

    def step_counts(self) -> dict[str, float]:
        counts = super().step_counts()
        return counts | {"rollout/dropped_steps": float(self.ledger.dropped)} if self.is_free_running else counts

    def _runner_idle(self) -> float:
        return self._stream.idle_s / max(self._stream.idle_s + self._stream.busy_s, 1e-9)

    def _advise(self) -> None:
        """Say whether runners or the learner waited, once training with free-running runners is over."""
        if not self.is_free_running or self._begun is None:
            return
        learner, runners = self._waited_s / (time.perf_counter() - self._begun), self._runner_idle()
        self._begun = None
        if learner > IDLE and runners > IDLE:
            advice = "both wait, as where processes share too few cores"
        elif learner > IDLE:
            advice = "add env runners, or environments to each"
        elif runners > IDLE:
            advice = "fewer of them, or prefetch=1, are as good"
        else:
            advice = "neither waits for the other"
        rank_zero_info(
            f"The learner was idle for {learner:.0%} of the time, the env runners for {runners:.0%}: {advice}."
        )

    # --- the run ------------------------------------------------------------------------------------------------

    def restart(self) -> None:
        super().restart()
        self._forget()

    def load_rank_state(self, state: dict[str, Any]) -> None:
        super().load_rank_state(state)
        self._forget()
        if self.num_reuses > 1 or self.replay_fraction:
            rank_zero_info("Resumed: past rollouts are in no checkpoint; those that come are learned from again.")

    def _forget(self) -> None:
        """Begin without past rollouts."""
        self._buffer.clear()
        self._replay = self._template = None
        self._stream = FreeRunning(self.prefetch, self.broadcast_interval, self.max_policy_lag)
        self._is_last, self._begun, self._waited_s, self._restarts = False, None, 0.0, self.ledger.restarts
        self._said_old = False

    @property
    def rollout_shape(self) -> tuple[int, int]:
        return self._num_fragments * self.num_envs_per_env_runner * self.num_slots, self.rollout_length

    @property
    def _num_fragments(self) -> int:
        """Of a new rollout, this rank's."""
        return self.fragments_per_batch or max(1, self.num_env_runners)

    @property
    def _rows_per_epoch(self) -> int:
        return self.rollouts_per_epoch * self._max_rows


def _versions(rollout: Rollout) -> torch.Tensor:
    """Of the policies that acted, one for each real row."""
    mask = mask_of(rollout)
    return rollout["policy_version"].flatten() if mask is None else rollout["policy_version"][mask]


class RolloutLoader:
    """A sized, stateful iterable over one epoch's rollouts, new ones and repeats.

    Sized, because Lightning fetches one batch ahead from an iterable without a length: training would silently be one
    policy behind.
    """

    def __init__(self, data: RolloutDataModule):
        self._data = data

    def __len__(self) -> int:
        return self._data.rollouts_per_epoch * self._data.num_reuses

    def __iter__(self) -> Iterator[Rollout | Rollouts]:
        first = self._data.attached_trainer.fit_loop.batch_idx + 1  # not 0 in an epoch that is resumed in its middle
        for _ in range(first, len(self)):
            yield self._data.next_batch()

    def state_dict(self) -> dict[str, Any]:
        """Nothing, since Lightning's batch index says where in the epoch we are; its presence says that we resume."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to load."""
