"""What every datamodule does: evaluate, give seeds, keep to the budget."""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import gymnasium as gym
import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import EarlyStopping, Timer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from lit_rl import distributed
from lit_rl.algorithm import Algorithm
from lit_rl.envs.make import EnvConfig
from lit_rl.errors import EnvError, EnvFailure, OptionError
from lit_rl.evaluation.evaluator import Evaluator
from lit_rl.evaluation.options import Evaluation
from lit_rl.evaluation.summary import EvaluationResult
from lit_rl.learner.transfer import Transfer
from lit_rl.options import Count, CountOrZero, Names, TakesOptions
from lit_rl.runners.faults import FaultTolerance, time_limit
from lit_rl.runners.fragment import Episode
from lit_rl.runners.placement import Placement
from lit_rl.source import Source
from lit_rl.spec import EnvSpec, MultiAgentSpec

TRY_OUTS = 3  # of an environment that raises, before training
# What a seed is for: the first number of every SeedSequence's spawn key.
RUNNERS, EVALUATION, REPLAY_BUFFERS, FRAGMENTS, RECORDED, HELD_OUT = range(6)


class EvaluatingDataModule(TakesOptions, L.LightningDataModule, Source):
    """Evaluation, seeds and budget. A subclass gives `train_dataloader`, `budget`, `eval_env` and `find_spec`.

    Args:
        evaluation: how episodes are played for evaluation, see `Evaluation`.
        info_metrics: keys of the environment's `info` to log, read at each episode's last step.
        seed: of everything random here. None: the resumed run's, or what `seed_everything` set, or a random one.
        ray_address: of a running Ray to join; None starts one on this machine (or takes RAY_ADDRESS).
        placement: what Ray reserves for an env runner and where it puts it, see `Placement`.
        fault_tolerance: which failures of env runners and environments are survived, see `FaultTolerance`.
        torch_threads: of the learner process; None takes OMP_NUM_THREADS, or 1 where that is not set.

    Attributes:
        BUDGET: the option that is its budget.
    """

    BUDGET: str

    evaluation: Evaluation
    info_metrics: tuple[str, ...]
    seed: int | None
    ray_address: str | None
    placement: Placement
    fault_tolerance: FaultTolerance
    torch_threads: int | None

    def __init__(
        self,
        *,
        evaluation: Evaluation = Evaluation(),  # noqa: B008 - it is frozen
        info_metrics: Names = (),
        seed: CountOrZero | None = None,
        ray_address: str | None = None,
        placement: Placement = Placement(),  # noqa: B008
        fault_tolerance: FaultTolerance = FaultTolerance(),  # noqa: B008
        torch_threads: Count | None = None,
    ):
        super().__init__()
        self.take_options()
        self._seed_given = seed is not None
        self.spec: EnvSpec | MultiAgentSpec | None = None
        self._transfer = Transfer()
        self._evaluator: Evaluator | None = None
        self._minimum: tuple[int | None, int | None] | None = None  # the Trainer's, while it is set aside

    def __str__(self) -> str:
        """Not Lightning's, which would iterate over the loaders, and so play episodes."""
        return repr(self)

    # --- what a subclass gives -----------------------------------------------------------------------------------

    @property
    def eval_env(self) -> EnvConfig | None:
        """How to make the environment that evaluation plays; None if it plays none."""
        raise NotImplementedError(f"{type(self).__name__} must define eval_env.")

    def find_spec(self) -> EnvSpec | MultiAgentSpec:
        """The spaces of what is learned from."""
        raise NotImplementedError(f"{type(self).__name__} must define find_spec.")

    # --- Lightning's hooks --------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        if not self._seed_given:
            self.seed = self.attached_trainer.strategy.broadcast(_global_seed(self.seed))
        self.spec = self.spec or self.find_spec()

    def val_dataloader(self) -> "EpisodeLoader":
        return EpisodeLoader(self)

    def test_dataloader(self) -> "EpisodeLoader":
        return EpisodeLoader(self)

    def predict_dataloader(self) -> "EpisodeLoader":
        return EpisodeLoader(self, record=True)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        return self._transfer(batch, device)

    def on_exception(self, exception: BaseException) -> None:
        self.teardown("exception")

    def teardown(self, stage: str) -> None:
        if self._evaluator is not None:
            self._evaluator.close()
        self._restore_minimum()

    # --- evaluation: Source ---------------------------------------------------------------------------------------

    def eval_seed(self, episode: int) -> int:
        """With which evaluation resets the environment for its `episode`-th episode."""
        return int(self._seed_sequence(EVALUATION, episode).generate_state(1)[0])

    def eval_seeds(self) -> list[int]:
        """Those of this rank's share of the episodes."""
        trainer, episodes = self.attached_trainer, self.evaluation.episodes
        return [self.eval_seed(episode) for episode in range(trainer.global_rank, episodes, trainer.world_size)]

    @property
    def evaluator(self) -> Evaluator:
        if self._evaluator is None:
            env = self.eval_env
            assert env is not None
            self._evaluator = Evaluator(
                env,
                self.evaluation,
                info_metrics=self.info_metrics,
                faults=self.fault_tolerance,
                placement=self.placement,
                connect=self._connect_ray,
            )
        return self._evaluator

    def evaluate(self, record: bool = False) -> Iterator[Episode]:
        """This rank's share of an evaluation, episode by episode.

        In process it is that of the policy as it is now. While training goes on beside eval runners, it is the
        evaluation they were at, and the next one is begun.
        """
        trainer, algorithm = self.attached_trainer, self.algorithm
        evaluator, seeds = self.evaluator, self.eval_seeds()
        at, version = algorithm.clock, algorithm.updates_done
        if not self.evaluation.num_env_runners:
            yield from evaluator.play(algorithm.policy, seeds, at, version=version, record=record)
            return
        if not evaluator.is_under_way:
            evaluator.begin(algorithm.policy, seeds, at, version=version, record=record)
        result = distributed.together(evaluator.end, algorithm.device)
        if self.evaluation.parallel and trainer.state.fn == "fit" and not trainer.sanity_checking:
            evaluator.begin(algorithm.policy, seeds, at, version=version)
            if trainer.should_stop:  # no other evaluation follows
                result = distributed.together(evaluator.end, algorithm.device)
        yield from result.episodes

    def begin_evaluation(self) -> None:
        if self.evaluation.parallel and self.eval_env is not None:
            algorithm = self.algorithm
            at, version = algorithm.clock, algorithm.updates_done
            self.evaluator.begin(algorithm.policy, self.eval_seeds(), at, version=version)

    def evaluations(self) -> list[EvaluationResult]:
        return [] if self._evaluator is None else self._evaluator.take_results()

    def end_evaluation(self) -> list[EvaluationResult]:
        if self._evaluator is None or not self._evaluator.is_under_way:
            return []
        distributed.together(self._evaluator.end, self.algorithm.device)
        return self._evaluator.take_results()

    # --- the run --------------------------------------------------------------------------------------------------

    def has_reached_max_steps(self) -> bool:
        """Whether the Trainer's `max_steps` are taken."""
        trainer = self.attached_trainer
        return 0 <= trainer.max_steps <= trainer.global_step

    def stop_at_budget(self) -> None:
        """The budget is spent: training ends after this batch, whatever minimum the Trainer has.

        Called before the last batch ends: Lightning then still validates and saves after it.
        """
        trainer = self.attached_trainer
        loop = trainer.fit_loop
        if self._minimum is None:
            self._minimum = loop.min_epochs, loop.min_steps
            loop.min_epochs, loop.epoch_loop.min_steps = None, None  # Lightning would go on until they are reached
        trainer.should_stop = True

    def _restore_minimum(self) -> None:
        """Give the Trainer its minimum back, and say so if the budget ended the run before it."""
        if self._minimum is None:
            return
        trainer = self.attached_trainer
        loop, (epochs, steps), self._minimum = trainer.fit_loop, self._minimum, None
        loop.min_epochs, loop.epoch_loop.min_steps = epochs, steps
        for name, minimum, done in (
            ("min_epochs", epochs, trainer.current_epoch),
            ("min_steps", steps, trainer.global_step),
        ):
            if done < (minimum or 0):
                rank_zero_warn(
                    f"Training ended at {self.BUDGET}={self.budget}, after {done} of Trainer({name}={minimum}): "
                    f"the budget is never exceeded. Raise {self.BUDGET}, or lower {name}."
                )

    def set_threads(self) -> None:
        """One thread, unless more are asked for: on a machine that others use too, two can be ten times slower."""
        if self.torch_threads is not None:
            torch.set_num_threads(self.torch_threads)
        elif not os.environ.get("OMP_NUM_THREADS"):
            torch.set_num_threads(1)

    @property
    def attached_trainer(self) -> L.Trainer:
        assert self.trainer is not None, "the datamodule is not attached to a Trainer"
        return self.trainer

    @property
    def algorithm(self) -> Algorithm:
        algorithm = self.attached_trainer.lightning_module
        if not isinstance(algorithm, Algorithm):
            raise OptionError(f"model={type(algorithm).__name__}: {type(self).__name__} feeds a lit_rl Algorithm.")
        return algorithm

    def _budget_left(self, clock: int) -> float:
        return float("inf") if self.budget is None else self.budget - clock

    def _say_if_epochs_end_it(self, epoch: int) -> None:
        """Warn if `max_epochs`, of so many steps of the clock each, end before the budget, or if nothing ends it."""
        trainer, epochs = self.attached_trainer, self.attached_trainer.max_epochs
        stops = any(isinstance(callback, Timer | EarlyStopping) for callback in trainer.callbacks)  # type: ignore[attr-defined]
        if self.budget is None and epochs in (None, -1) and trainer.max_steps in (None, -1) and not stops:
            rank_zero_warn(
                f"The run has no end: set {self.BUDGET} on the datamodule, or Trainer(max_time=), max_epochs or "
                "max_steps. Ctrl-C stops it with a checkpoint."
            )
        if epochs is not None and epochs >= 0 and epochs * epoch < (self.budget or 0):
            rank_zero_warn(
                f"Training ends at {epochs * epoch} of {self.BUDGET}={self.budget} {self.clock.replace('_', ' ')}, "
                f"after max_epochs={epochs}. Pass Trainer(max_epochs=-1) to spend the whole budget."
            )

    def _seed_sequence(self, *key: int) -> np.random.SeedSequence:
        return np.random.SeedSequence(self.seed, spawn_key=key)

    def _try_out(self, env: EnvConfig) -> EnvSpec | MultiAgentSpec:
        """An environment's spaces, also of one that fails sometimes."""
        limit = self.fault_tolerance.init_timeout_s
        error = EnvError(
            f"env={env.env_id} was not made, reset and stepped once within fault_tolerance.init_timeout_s={limit:g} "
            "seconds. Mend the environment, or raise it."
        )
        with time_limit(limit, error):
            for _ in range(TRY_OUTS - 1 if self.fault_tolerance.max_restarts else 0):
                with contextlib.suppress(EnvFailure):
                    return env.try_out()
            return env.try_out()

    def _check_eval_env(self, found: EnvSpec | MultiAgentSpec, spec: EnvSpec | MultiAgentSpec) -> None:
        """Refuse an environment to play whose spaces, `found`, are not those of training."""
        name = "env_kwargs" if self.evaluation.env is None else "env"
        option = f"evaluation.{name}={getattr(self.evaluation, name)!r}: the environment {found.env_id}"
        check_same_spaces(option, found, spec)

    def _connect_ray(self) -> None:
        """Rank 0 starts or joins Ray, the others join the same one."""
        from lit_rl.runners import ray_session

        strategy = self.attached_trainer.strategy
        address = ray_session.connect(self.ray_address) if self.attached_trainer.global_rank == 0 else None
        address = strategy.broadcast(address)
        if self.attached_trainer.global_rank:
            ray_session.connect(address)


class EpisodeLoader:
    """A sized iterable over this rank's share of the evaluation episodes, one item per episode.

    Every rank yields equally many items, since each is a collective under DDP: a smaller share ends with an empty one.
    """

    def __init__(self, data: EvaluatingDataModule, *, record: bool = False):
        self._data = data
        self._record = record

    def __len__(self) -> int:
        return self.num_episodes

    @property
    def num_episodes(self) -> int:
        """Items that are episodes."""
        return -(-self._data.evaluation.episodes // self._data.attached_trainer.world_size)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        played = 0
        for episode in self._data.evaluate(self._record):
            played += 1
            yield episode._asdict()
        for _ in range(self.num_episodes - played):
            yield {}


def check_same_spaces(what: str, found: EnvSpec | MultiAgentSpec, spec: EnvSpec | MultiAgentSpec) -> None:
    """Refuse spaces, or agents, that are not those of training.

    Args:
        what: has them.
        found: what it has.
        spec: those of training.

    Raises:
        OptionError: with the difference.
    """
    if isinstance(found, MultiAgentSpec) or isinstance(spec, MultiAgentSpec):
        if _agents(found) != _agents(spec):
            raise OptionError(f"{what} has other agents, or other spaces of theirs: expected those of training.")
    elif (found.observation_space, found.action_space) != (spec.observation_space, spec.action_space):
        raise OptionError(
            f"{what} has observation {found.observation_space}, action {found.action_space}: expected those of "
            f"training, {spec.observation_space} and {spec.action_space}."
        )


def _agents(spec: EnvSpec | MultiAgentSpec) -> dict[str, tuple[gym.Space, gym.Space]]:
    """The spaces of every agent; none of an environment that has one alone."""
    agents = spec.agents if isinstance(spec, MultiAgentSpec) else {}
    return {name: (each.observation_space, each.action_space) for name, each in agents.items()}


def _global_seed(previous: int | None) -> int:
    """What `seed_everything` set, or the previous seed, or a random one, which is logged."""
    from_lightning = os.environ.get("PL_GLOBAL_SEED")
    if from_lightning is not None:
        return int(from_lightning)
    if previous is not None:
        return previous
    seed = int(np.random.SeedSequence().generate_state(1)[0])
    rank_zero_info(f"No seed was given: seed={seed}")
    return seed
