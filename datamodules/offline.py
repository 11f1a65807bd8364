"""Recorded data, for off-policy and imitation algorithms."""

import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any

import gymnasium as gym
import numpy as np
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from tensordict import TensorDict

from lit_rl import distributed
from lit_rl.algorithm import Algorithm
from lit_rl.datamodules.evaluating import HELD_OUT, RECORDED, EpisodeLoader, EvaluatingDataModule
from lit_rl.datamodules.streams import StreamLoader
from lit_rl.envs.make import EnvConfig, Wrapper
from lit_rl.errors import CheckpointError, OptionError
from lit_rl.files.columns import PRESETS
from lit_rl.files.data_files import DataFiles, OwnDataset, open_dataset, open_files, size_of
from lit_rl.files.recorded import read_recorded
from lit_rl.multi_agent import MultiAgent
from lit_rl.off_policy import OffPolicy
from lit_rl.options import (
    ByteSize,
    Count,
    Data,
    Fraction,
    InstanceOf,
    OneOf,
    PositiveFraction,
    UnitInterval,
    is_dataset,
)
from lit_rl.recorded import Recorded
from lit_rl.replay import ReplayStream
from lit_rl.replay.feed import ALONE
from lit_rl.replay.options import Steps
from lit_rl.replay.ray_blocks import Shares
from lit_rl.replay.recorded_feed import Draws, RecordedFeed, best, episodes_of, rows_of_rank, split
from lit_rl.replay.streamed_feed import StreamedFeed, check_sizes, check_streams
from lit_rl.spec import EnvSpec, MultiAgentSpec

Space = Annotated[gym.Space, InstanceOf((gym.Space,), "a gymnasium space")]
Columns = Annotated[dict[str, Any], InstanceOf((dict,), "a dict of columns")]
Preset = Annotated[str, OneOf(*PRESETS)]


class OfflineDataModule(EvaluatingDataModule):
    """Minibatches drawn from recorded episodes, for off-policy algorithms such as BC, CQL, SAC and DQN.

    The clock is `updates`: schedules, `max_updates` and the loggers' step count gradient updates. Data of up to
    `memory_limit` is kept in memory; every learner process draws from an equal share of the transitions. More data
    streams: processes of Ray read the files in an order by `seed`, and each transition is learned from once in an epoch
    of the data.

    Args:
        paths: files, folders or globs of episodes that lit_rl recorded; of tables, Parquet, CSV, JSON lines or HDF5,
            with `columns` or `preset`; or "minari:NAME", a data set of Minari. Also URIs that pyarrow knows, such as
            "s3://bucket/folder", and a `ray.data.Dataset`, each row of which is an episode: it always streams.
        columns: of tables: names of columns by "observation", "action", "reward", "terminated", "truncated", "episode",
            "next_observation", "step" and "agent". Several side by side are a list, those of a Dict space a dict.
        preset: names of columns as another tool has them, "rllib", "d4rl" or "lerobot". `columns` replaces some.
        observation_space: of tables, where there is no `evaluation.env` to say it; None takes what the data is in.
        action_space: of tables, likewise.
        validation_fraction: of the episodes, drawn at random by `seed`: they are not learned from, and say how good the
            algorithm is (`eval/td_error` and its like).
        top_fraction: of the episodes, those of the greatest returns, that are used at all; None uses all.
        streaming: read files while learning. None: if the data is more than `memory_limit`.
        memory_limit: that data may take, as bytes or a text such as "4GB". Parquet files count without compression.
            What streams takes less, but no file may be larger.
        shuffle_window: transitions of data that streams which are shuffled together, less if they take more than a
            quarter of `memory_limit`.
        max_updates: the budget of gradient updates. None: the Trainer's limits alone.
        updates_per_batch: updates per Lightning batch: how often metrics are logged.
        batches_per_epoch: Lightning batches in an epoch: how often evaluation and checkpoints can happen.
        batch_size: rows of a minibatch, of each learner process. With memory they come as `batch_size /
            sequence_length` sequences. None takes the algorithm's own.
        n_step: rewards summed before bootstrapping; `[low, high]` draws the number anew for each transition. None takes
            the algorithm's own.
        prioritized: draw surprising transitions more often: Schaul et al. 2016, arXiv:1511.05952. None takes the
            algorithm's own.
        priority_alpha: 0 draws uniformly, 1 in proportion to the TD errors.
        priority_beta: exponent of the importance weights when training begins. It grows linearly to 1 at `max_updates`;
            without `max_updates` it stays.
        wrappers: of `evaluation.env`; each a callable, `"package.module:Class"`, or `{"package.module:Class": kwargs}`.
        evaluation: how episodes are played for evaluation, see `Evaluation`. Without `evaluation.env` none are played.
    """

    BUDGET = "max_updates"

    clock = "updates"
    paths: Any
    columns: dict[str, Any] | None
    preset: str | None
    observation_space: gym.Space | None
    action_space: gym.Space | None
    validation_fraction: float
    top_fraction: float | None
    streaming: bool | None
    memory_limit: int
    shuffle_window: int
    max_updates: int | None
    updates_per_batch: int
    batches_per_epoch: int
    batch_size: int | None
    n_step: Any
    prioritized: bool | None
    priority_alpha: float
    priority_beta: float
    wrappers: Sequence[Wrapper]

    def __init__(
        self,
        paths: Data,
        *,
        columns: Columns | None = None,
        preset: Preset | None = None,
        observation_space: Space | None = None,
        action_space: Space | None = None,
        validation_fraction: Fraction = 0.0,
        top_fraction: PositiveFraction | None = None,
        streaming: bool | None = None,
        memory_limit: ByteSize = "4GB",
        shuffle_window: Count = 100_000,
        max_updates: Count | None = None,
        updates_per_batch: Count = 100,
        batches_per_epoch: Count = 10,
        batch_size: Count | None = None,
        n_step: Steps | None = None,
        prioritized: bool | None = None,
        priority_alpha: UnitInterval = 0.6,
        priority_beta: UnitInterval = 0.4,
        wrappers: Sequence[Wrapper] = (),
        **options: Any,
    ):
        super().__init__(**options)
        self.take_options()
        if self.evaluation.env is None and self.evaluation.env_kwargs is not None:
            raise OptionError("evaluation.env_kwargs: expected evaluation.env too, the environment to play.")
        if self.evaluation.env is None and wrappers:
            raise OptionError("wrappers: expected evaluation.env too, the environment that they are of.")
        self._given: dict[str, Any] = {  # spaces
            name: space
            for name, space in (("observation_space", observation_space), ("action_space", action_space))
            if space is not None
        }
        for name in self._given:
            if self.evaluation.env is not None:
                raise OptionError(f"{name} together with evaluation.env, which has spaces: leave one of them out.")
            if columns is None and preset is None:
                raise OptionError(f"{name}: expected tables, with columns or a preset. Other recordings say their own.")
        self._recorded: Recorded | None = None
        self._files: DataFiles | OwnDataset | None = None  # if they are not in memory
        self._feeds: dict[str, RecordedFeed | StreamedFeed] = {}
        self._saved: dict[str, Any] = {}  # where the draws of a checkpoint's run were
        self._held_out_seed: int | None = None  # of the run that is evaluated, if none is given
        self._judged: dict[str, list[float]] = {}  # by metric, the sum over held-out rows, and their number

    # --- Lightning's hooks --------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        if stage == "predict" and self.eval_env is None:
            raise OptionError("lit-rl predict plays episodes: expected evaluation.env, the environment to play.")
        super().setup(stage)
        if stage == "predict":
            return
        self._read()
        if stage == "fit" or self.validation_fraction:
            for policy_id, algorithm in self._algorithms.items():
                self.check_policy(policy_id, algorithm)
            if self._files is not None:
                self._check_streams(self._files)
        if stage == "fit":
            if self._files is not None:
                self._connect_ray()
            self._say_if_epochs_end_it(self.updates_per_batch * self.batches_per_epoch)

    def teardown(self, stage: str) -> None:
        for feed in self._feeds.values():
            feed.close()
        super().teardown(stage)

    def train_dataloader(self) -> StreamLoader:
        self.set_threads()
        done = self.algorithm.clock
        if self._budget_left(done) < 1:
            rank_zero_info(
                f"Nothing to train: updates={done} of max_updates={self.max_updates} are done. Set a larger "
                "max_updates to go on."
            )
            self.stop_at_budget()
        return StreamLoader(self)

    def val_dataloader(self) -> Any:
        if self.eval_env is not None or self.validation_fraction:
            return OfflineLoader(self)
        if self.attached_trainer.state.fn == "fit":
            return []
        raise OptionError(
            "There is nothing to evaluate by: expected evaluation.env, an environment to play, or a "
            "validation_fraction of the data."
        )

    test_dataloader = val_dataloader

    # --- the data -----------------------------------------------------------------------------------------------

    @property
    def eval_env(self) -> EnvConfig | None:
        if self.evaluation.env is None:
            return None
        found = EnvConfig(self.evaluation.env, self.evaluation.env_kwargs or {}, self.wrappers)
        return found if self.spec is None else found.known_to_be(isinstance(self.spec, MultiAgentSpec))

    def find_spec(self) -> EnvSpec | MultiAgentSpec:
        if self.eval_env is not None:
            return self._try_out(self.eval_env)
        found = self._read()
        if not self._given:
            return found
        self._recorded, self._files = None, None  # they are read again, and have to fit
        if isinstance(found, MultiAgentSpec):
            agents = {name: dataclasses.replace(agent, **self._given) for name, agent in found.agents.items()}
            return dataclasses.replace(found, agents=agents)
        return dataclasses.replace(found, **self._given)

    def _read(self) -> EnvSpec | MultiAgentSpec:
        """Read the data, once; returns its spaces."""
        if self._recorded is None and self._files is None:
            spec, options = self.spec, dict[str, Any](columns=self.columns, preset=self.preset, spec=self.spec)
            are_tables = self.columns is not None or self.preset is not None
            is_read = self.streaming is False or is_dataset(self.paths)
            files = [] if is_read else size_of(self.paths, are_tables=are_tables)
            num_bytes = sum(size for _, size in files)
            if is_dataset(self.paths):
                self._files = open_dataset(self.paths, **options)
                found, said = self._files.spec, "it streams"
            elif self.streaming or num_bytes > self.memory_limit:
                check_sizes(files, self.paths, self.memory_limit)
                self._files = open_files([file for file, _ in files], **options)
                found, said = self._files.spec, f"{len(files)} files of {num_bytes / 1e9:.3g} GB, which stream"
            else:
                self._recorded, found = read_recorded(self.paths, **options)
                said = self._recorded.summary
            if spec is not None and self.eval_env is not None:
                self._check_eval_env(spec, found)
            if spec is not None or not self._given:  # else it is read again
                rank_zero_info(f"{'paths' if is_dataset(self.paths) else ', '.join(self.paths)}: {said}.")
            self.spec = spec or found
        assert self.spec is not None
        return self.spec

    def describe_env(self) -> dict[str, Any] | None:
        return None if self.eval_env is None else self.eval_env.to_dict()

    @property
    def recorded(self) -> Recorded:
        """The episodes."""
        assert self._recorded is not None, "they are read when the datamodule is set up, if they do not stream"
        return self._recorded

    # --- whom it feeds ------------------------------------------------------------------------------------------

    @property
    def _algorithms(self) -> Mapping[str, Algorithm]:
        algorithm = self.algorithm
        if isinstance(algorithm, MultiAgent):
            return dict(zip(algorithm.trained, algorithm.learners))
        return {ALONE: algorithm}

    def check_policy(self, policy_id: str, algorithm: Algorithm) -> None:
        if not isinstance(algorithm, OffPolicy):
            what = f"policies[{policy_id!r}]" if policy_id else "model"
            raise OptionError(
                f"{what}={type(algorithm).__name__}: OfflineDataModule feeds imitation and off-policy algorithms such "
                "as BC, CQL, SAC and DQN. Use RolloutDataModule."
            )
        algorithm.check_learns_from_recorded()

    def remove_policy(self, policy_id: str) -> None:
        self._feeds.pop(policy_id, None)

    def feed(self, policy_id: str = ALONE) -> RecordedFeed | StreamedFeed:
        """What feeds a policy's algorithm; its networks are needed."""
        algorithm: Any = self._algorithms[policy_id]
        feed = self._feeds.get(policy_id)
        if feed is None or feed.algorithm is not algorithm:
            feed = self._feeds[policy_id] = self._make_feed(policy_id, algorithm)
            if policy_id in self._saved:
                feed.go_on(self._saved.pop(policy_id))
        return feed

    def _draws(self, algorithm: OffPolicy) -> Draws:
        return Draws.of(
            algorithm,
            batch_size=self.batch_size,
            n_step=self.n_step,
            prioritized=self.prioritized,
            priority_alpha=self.priority_alpha,
        )

    def _check_streams(self, files: DataFiles | OwnDataset) -> None:
        algorithm = self.algorithm
        asks = {
            "validation_fraction": bool(self.validation_fraction),
            "top_fraction": self.top_fraction is not None,
            "a MultiAgent": isinstance(algorithm, MultiAgent),
            "prioritized replay": isinstance(algorithm, OffPolicy)
            and self._draws(algorithm).priority_alpha is not None,
        }
        check_streams(files, self.paths, asks, self.attached_trainer.world_size, streaming=self.streaming)

    def _make_feed(self, policy_id: str, algorithm: OffPolicy) -> RecordedFeed | StreamedFeed:
        rank, world_size = self.attached_trainer.global_rank, self.attached_trainer.world_size
        if self._files is not None:
            return StreamedFeed(
                algorithm,
                self._files,
                draws=self._draws(algorithm),
                shuffle_window=self.shuffle_window,
                memory_limit=self.memory_limit,
                shares=Shares(len(self._files), self._seed_sequence(RECORDED), rank, world_size),
            )
        recorded = self.recorded
        policy: Any = self.algorithm.policy
        key = () if policy_id == ALONE else (policy.numbers[policy_id],)
        episodes = episodes_of(recorded, policy_id, None if policy_id == ALONE else policy.mapping)
        if self.top_fraction is not None:
            episodes = best(recorded, episodes, self.top_fraction)
        held_out_seed = self.seed if self._held_out_seed is None else self._held_out_seed
        learned, held_out = split(
            episodes, self.validation_fraction, np.random.SeedSequence(held_out_seed, spawn_key=(HELD_OUT, *key))
        )
        if len(learned) < len(recorded.begins):
            whose = f"{policy_id}: " if policy_id else ""
            rank_zero_info(
                f"{whose}{len(learned)} of {len(recorded.begins)} episodes are learned from, {len(held_out)} held out."
            )
        rows = rows_of_rank(recorded, learned, rank, world_size)
        if not len(rows):
            raise OptionError(
                f"paths={list(self.paths)!r}: {len(learned)} episodes are left to learn from, with too few transitions "
                f"for {world_size} learner processes. Give more data."
            )
        return RecordedFeed(
            algorithm,
            recorded,
            rows=rows,
            held_out=np.flatnonzero(recorded.is_transition & recorded.rows_of(held_out)),
            draws=self._draws(algorithm),
            seed=self._seed_sequence(RECORDED, rank, *key),
            rank=rank,
            world_size=world_size,
        )

    # --- minibatches --------------------------------------------------------------------------------------------

    def stream(self) -> ReplayStream:
        """The next Lightning batch."""
        return ReplayStream(self._minibatches)

    def _minibatches(self, stream: ReplayStream) -> Iterator[tuple[str, TensorDict]]:
        """Yield a minibatch for each policy that learns, and so on until the batch's updates are made."""
        algorithm = self.algorithm
        learning = algorithm.learning if isinstance(algorithm, MultiAgent) else [ALONE]
        begin = algorithm.clock
        end = begin + int(min(self.updates_per_batch, self._budget_left(begin)))
        for now in range(begin, end):
            beta = self.beta_at(now)
            for policy_id in learning:
                if self.has_reached_max_steps():
                    return
                started = time.perf_counter()
                feed = self.feed(policy_id)
                minibatch = feed.draw(beta)
                stream.waited_s += time.perf_counter() - started
                yield policy_id, minibatch
                feed.learned(minibatch)
        if self._budget_left(end) < 1:
            self.stop_at_budget()

    def beta_at(self, updates: int) -> float:
        """The importance weights' exponent."""
        begin, budget = self.priority_beta, self.max_updates
        return begin if budget is None else begin + (1 - begin) * min(1.0, updates / budget)

    # --- evaluation: Source -------------------------------------------------------------------------------------

    def judge(self) -> Iterator[None]:
        """Have algorithms judged by this rank's held-out rows, one minibatch at a time."""
        self._judged = {}
        for policy_id in self._algorithms if self.validation_fraction else ():
            name_of = f"{policy_id}/{{prefix}}/{{name}}" if policy_id else "{prefix}/{name}"
            feed = self.feed(policy_id)
            assert isinstance(feed, RecordedFeed)
            for found in feed.judged():
                for name, (total, count) in found.items():
                    sums = self._judged.setdefault(name_of.replace("{name}", name), [0.0, 0.0])
                    sums[0], sums[1] = sums[0] + total, sums[1] + count
                yield

    @property
    def num_judged(self) -> int:
        """Minibatches of held-out rows, of the rank that has the most."""
        feeds = [self.feed(policy_id) for policy_id in self._algorithms if self.validation_fraction]
        return sum(feed.num_parts for feed in feeds if isinstance(feed, RecordedFeed))

    def judged(self, prefix: str) -> dict[str, float]:
        if not self.validation_fraction:
            return {}
        ranks, self._judged = distributed.gather(self._judged), {}
        names = sorted({name for found in ranks for name in found})
        sums = {name: np.sum([found[name] for found in ranks if name in found], 0) for name in names}
        return {name.format(prefix=prefix): float(total / count) for name, (total, count) in sums.items() if count}

    # --- the run: Source ----------------------------------------------------------------------------------------

    @property
    def budget(self) -> int | None:
        return self.max_updates

    def restart(self) -> None:
        self._feeds, self._saved = {}, {}

    def rank_state(self, weights_only: bool = False) -> dict[str, Any]:
        recorded = {i: feed.position(whole=not weights_only) for i, feed in self._feeds.items()}
        return {"seed": self.seed, "recorded": self._saved | recorded}

    def load_ranks(self, states: Sequence[dict[str, Any]], rank: int, world_size: int) -> None:
        """Go on from what `rank_state` returned on every rank; other numbers of ranks draw from other shares, anew.

        Raises:
            CheckpointError: if it was another datamodule's, whose clock is env steps.
        """
        if "rollouts" in states[0]:
            raise CheckpointError(
                "The checkpoint's run learned in an environment: it cannot be resumed with OfflineDataModule. Begin a "
                "new run with init_from."
            )
        if not self._seed_given:
            self.seed = states[0]["seed"]
        self._feeds, self._held_out_seed = {}, None
        self._saved = dict(states[rank].get("recorded", {})) if world_size == len(states) else {}

    def load_evaluated(self, states: Sequence[dict[str, Any]]) -> None:
        """Hold out the episodes that the evaluated run held out, unless a seed is given."""
        if not self._seed_given:
            self._feeds, self._held_out_seed = {}, states[0].get("seed")


class OfflineLoader(EpisodeLoader):
    """A sized iterable over an evaluation: the episodes that are played, then minibatches of held-out rows."""

    _data: OfflineDataModule

    def __len__(self) -> int:
        return self.num_episodes + self._data.num_judged

    @property
    def num_episodes(self) -> int:
        return 0 if self._data.eval_env is None else super().num_episodes

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if self._data.eval_env is not None:
            yield from super().__iter__()
        judged = 0
        for _ in self._data.judge():
            judged += 1
            yield {}
        for _ in range(self._data.num_judged - judged):
            yield {}
