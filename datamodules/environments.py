"""What every datamodule with env runners does: make environments and run them."""

import functools
import logging
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lit_rl import distributed
from lit_rl.datamodules.evaluating import REPLAY_BUFFERS, RUNNERS, EvaluatingDataModule
from lit_rl.envs.make import Env, EnvConfig, Vectorization, Wrapper
from lit_rl.errors import CheckpointError, OptionError
from lit_rl.files import rescue
from lit_rl.files.checkpoint import files_beside
from lit_rl.off_policy import OffPolicy
from lit_rl.options import Count, CountOrZero, Positive, check
from lit_rl.policy import PolicySet
from lit_rl.replay.feed import ReplayFeeds
from lit_rl.replay.options import Replay
from lit_rl.runners.fragment import Episode, Epsilons, Fragment
from lit_rl.runners.ledger import Ledger
from lit_rl.runners.making import make_pool
from lit_rl.runners.pool import Pool
from lit_rl.runners.ray_pool import RunnerPool
from lit_rl.spec import EnvSpec, MultiAgentSpec

log = logging.getLogger(__name__)
LARGE_NETWORK = 100_000  # parameters of an algorithm: from here on, a second torch thread can pay
EVALUATION_OPTIONS = ("episodes", "deterministic", "timeout_s", "env_kwargs", "parallel")  # with eval_ before, once


class EnvDataModule(EvaluatingDataModule):
    """Env runners, evaluation, seeds and budget. A subclass gives `train_dataloader` and what it makes of fragments.

    Args:
        env: the environment to learn in: a gymnasium id, `"package.module:Class"` or a callable; of several agents a
            `MultiAgentEnv` or one of PettingZoo's, also as a module or its name.
        env_kwargs: passed on to the environment.
        wrappers: applied in order; each a callable, `"package.module:Class"`, or `{"package.module:Class": kwargs}`.
        vectorization: "sync" (one after the other), "async" (a process for each), or "native" (the environment's own).
        num_env_runners: Ray actors that step environments, per learner process; 0 steps them in the learner process.
        num_envs_per_env_runner: environments in each runner.
        rollout_length: T, env steps per environment that are collected at a time.
        max_env_steps: the budget, summed over learner processes; never exceeded. None: the Trainer's limits alone.
        prefetch: 0: env runners wait while the learner updates. 1: they collect meanwhile, with weights one version
            behind (needs num_env_runners >= 1). More, with a `RolloutDataModule` alone: they never wait, and so many
            fragments may wait for the learner.
        reward_scale: rewards are multiplied by it before the learner sees them. Returns that are logged stay the
            environment's own.
        reward_clip: rewards, as scaled, are clipped to plus or minus this before the learner sees them; 1.0 is usual
            for Atari. None leaves them.
        return_window: finished episodes over which `rollout/return_mean` and its like are averaged.
    """

    BUDGET = "max_env_steps"
    RENAMED = {
        "num_eval_env_runners": "evaluation=Evaluation(num_env_runners=...)",
        **{f"eval_{name}": f"evaluation=Evaluation({name}=...)" for name in EVALUATION_OPTIONS},
    }

    env: EnvConfig
    num_env_runners: int
    num_envs_per_env_runner: int
    rollout_length: int
    max_env_steps: int | None
    prefetch: int
    reward_scale: float
    reward_clip: float | None
    # Told of the fragments that came, and of the env steps of each environment before: what records training episodes.
    fragment_watcher: Callable[[Sequence[tuple[int, Fragment]], int], None] | None = None

    def __init__(
        self,
        env: Env,
        *,
        env_kwargs: dict[str, Any] | None = None,
        wrappers: Sequence[Wrapper] = (),
        vectorization: Vectorization = "sync",
        num_env_runners: CountOrZero = 0,
        num_envs_per_env_runner: Count = 8,
        rollout_length: Count = 256,
        max_env_steps: Count | None = None,
        prefetch: CountOrZero = 0,
        reward_scale: Positive = 1.0,
        reward_clip: Positive | None = None,
        return_window: Count = 100,
        **options: Any,
    ):
        super().__init__(**options)
        self.take_options()
        if prefetch and not num_env_runners:
            raise OptionError(
                f"prefetch={prefetch}: collecting while the learner updates needs num_env_runners of at least 1, got 0."
            )
        self.env = EnvConfig(env, env_kwargs or {}, wrappers, vectorization)
        self.sample_s = 0.0  # seconds the learner waited for the last batch's env steps
        self.ledger = Ledger()
        self.feeds = ReplayFeeds()  # of what learns from replay buffers
        self._pool: Pool | None = None
        self._acting: Any = None  # the policies by which its runners act
        self._runner_states: list[dict[str, Any]] = []
        self._collected = 0  # times `rollout_length` env steps came, over resumes: part of the runners' seeds
        self._episodes: deque[Episode] = deque(maxlen=return_window)
        self._saved_runners: list[dict[str, Any]] | None = None  # of a checkpoint, which the next pool goes on from

    def keep_options(self, options: dict[str, Any], caller: FrameType) -> None:
        """Keep checked options as attributes, but for `env`, which becomes an `EnvConfig`."""
        super().keep_options({name: value for name, value in options.items() if name != "env"}, caller)

    # --- Lightning's hooks --------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        super().setup(stage)
        assert self.spec is not None
        if self.eval_env != self.env:
            self._check_eval_env(self._try_out(self.eval_env), self.spec)
        if stage == "fit":
            self._check_budget()

    def teardown(self, stage: str) -> None:
        if self._pool is not None:
            pool = self._pool if stage == "exception" else self.pool
            self._runner_states = pool.get_state()  # a checkpoint may still be written
            self._pool.close()
            self._pool = None
        self.feeds.close()
        super().teardown(stage)

    # --- what evaluation needs -----------------------------------------------------------------------------------

    def find_spec(self) -> EnvSpec | MultiAgentSpec:
        return self._try_out(self.env)

    @property
    def eval_env(self) -> EnvConfig:
        """How to make the environment that evaluation plays."""
        found = self.evaluation.environment(self.env)
        # It has training's agents and spaces, see `setup`.
        return found if self.spec is None else found.known_to_be(isinstance(self.spec, MultiAgentSpec))

    # --- the run: Source ------------------------------------------------------------------------------------------

    @property
    def budget(self) -> int | None:
        return self.max_env_steps

    def describe_env(self) -> dict[str, Any] | None:
        return self.env.to_dict()

    def metrics(self) -> dict[str, float]:
        """Of episodes that ended, and of what it took to collect."""
        timing = {"rollout/env_runner_restarts": float(self.ledger.restarts), "time/sample_s": self.sample_s}
        return self.rollout_metrics() | timing

    def rollout_metrics(self) -> dict[str, float]:
        """Means over the last `return_window` episodes of every rank; absent before the first one ends."""
        agents = list(self.spec.agents) if isinstance(self.spec, MultiAgentSpec) else []
        names = ["return_mean", "length_mean", *(f"info/{key}_mean" for key in self.info_metrics)]
        names += [f"return_mean/{agent}" for agent in agents]
        rows = [
            [e.return_, e.length, *(e.info.get(key, np.nan) for key in self.info_metrics)]
            + [(e.returns or {}).get(agent, np.nan) for agent in agents]
            for e in self._episodes
        ]
        table = torch.tensor(rows, dtype=torch.float64).reshape(-1, len(names))
        present = ~table.isnan()
        counts = self.step_counts()
        found = torch.cat(
            [table.nan_to_num().sum(0), present.sum(0), torch.tensor(list(counts.values()), dtype=torch.float64)]
        )
        if distributed.world_size() > 1:  # NCCL takes no tensors of the CPU
            found = distributed.all_reduce_sum(found.to(self.algorithm.device))
        sums = found.tolist()
        means = {f"rollout/{name}": t / n for name, t, n in zip(names, sums, sums[len(names) :]) if n}
        return means | dict(zip(counts, sums[-len(counts) :])) | self.feeds.metrics()

    def step_counts(self) -> dict[str, float]:
        """This rank's steps that are no env steps learned from, by the names of the metrics."""
        counts = {"rollout/discarded_steps": float(self.ledger.discarded.total())}
        if isinstance(self.spec, MultiAgentSpec):
            counts["rollout/agent_steps"] = float(self.ledger.agent_steps)
            counts["rollout/abandoned_episodes"] = float(self.ledger.abandoned)
        return counts

    def restart(self) -> None:
        self._collected, self._runner_states, self.ledger = 0, [], Ledger()
        self._saved_runners = None
        self._episodes.clear()
        self.feeds.restart()

    def rank_state(self, weights_only: bool = False) -> dict[str, Any]:
        return {
            "seed": self.seed,
            "rollouts": self._collected,
            "ledger": self.ledger.state(),
            "episodes": [
                [e.return_, e.length, dict(e.info), *([] if e.returns is None else [dict(e.returns)])]
                for e in self._episodes
            ],
            "runners": self._runner_states if self._pool is None else self.pool.get_state(),
            **self.feeds.state(weights_only),
        }

    def load_ranks(self, states: Sequence[dict[str, Any]], rank: int, world_size: int) -> None:
        """Go on from what `rank_state` returned on every rank.

        A rank that there was not has the seed and the position in the run of rank 0, and nothing else. The env steps
        of a rank that is not there any more stay in the ledger of rank 0.

        Raises:
            CheckpointError: if it was `OfflineDataModule`'s, whose clock is updates.
        """
        if "rollouts" not in states[0]:
            raise CheckpointError(
                f"The checkpoint's run learned from recorded data: it cannot be resumed with {type(self).__name__}. "
                "Begin a new run with init_from."
            )
        if rank < len(states):
            self.load_rank_state(states[rank])
        else:
            nothing = {"ledger": Ledger().state(), "episodes": [], "runners": []}
            others = {key: x for key, x in states[0].items() if key not in ("replay", "replays", "recorded")}
            self.load_rank_state(others | nothing)
        self.feeds.share_out(len(states), world_size)
        if rank == 0:
            for state in states[world_size:]:
                self.ledger.add(state["ledger"])

    def load_rank_state(self, state: dict[str, Any]) -> None:
        """Go on from what `rank_state` returned."""
        self._collected = state["rollouts"]
        if "ledger" in state:  # absent from checkpoints of before 0.5
            self.ledger.load(state["ledger"])
        if not self._seed_given:
            self.seed = state["seed"]
        self._episodes.clear()
        for return_, length, info, *returns in state["episodes"]:
            self._episodes.append(Episode(return_, length, info, returns=returns[0] if returns else None))
        self._runner_states = self._saved_runners = state["runners"]
        if self.feeds:
            trainer = self.attached_trainer
            self.feeds.load(state, files_beside(trainer.ckpt_path) / f"rank_{trainer.global_rank}")

    def feed(
        self, algorithms: Mapping[str, OffPolicy], replays: Mapping[str, Replay], added: Mapping[str, int]
    ) -> None:
        """Have replay buffers for algorithms, by policy.

        Args:
            algorithms: by policy.
            replays: options of their buffers.
            added: numbers of the policies with which the run did not begin.

        Raises:
            OptionError: if one of them would never learn.
        """
        budget, trainer = self.max_env_steps, self.attached_trainer
        for policy_id, algorithm in algorithms.items():
            self._check_room(algorithm, replays[policy_id])
            starts = replays[policy_id].completed(algorithm.REPLAY).learning_starts
            if budget is not None and starts >= budget:
                raise OptionError(
                    f"learning_starts={starts}: expected less than max_env_steps={budget}, or nothing "
                    "is ever learned. Lower it."
                )
        self.feeds.setup(
            algorithms,
            replays,
            added=added,
            seed=functools.partial(self._seed_sequence, REPLAY_BUFFERS, trainer.global_rank),
            log_folder=lambda: rescue.log_folder(trainer),
        )

    def _check_room(self, algorithm: OffPolicy, replay: Replay) -> None:
        """Refuse a buffer in which no environment's rows make a sequence before they are overwritten."""
        if not algorithm.ACROSS_EPISODES:
            return
        length, (num_envs, _) = algorithm.hp.sequence_length, self.rollout_shape
        if replay.buffer_size < 2 * num_envs * (length + 1):
            raise OptionError(
                f"sequence_length={length}: expected sequences that fit into buffer_size={replay.buffer_size}: for "
                f"{num_envs} environments at least {2 * num_envs * (length + 1)} rows. Lower it, or raise buffer_size."
            )

    def start_runners(self, epsilons: Epsilons = (0.0,)) -> None:
        """Have the runners that wait begin to collect, with the weights the policy has now.

        Args:
            epsilons: see `EnvRunner.set_version`.
        """
        algorithm = self.algorithm
        self.pool.start(algorithm.policy, algorithm.updates_done, epsilons)

    @property
    def pool(self) -> Pool:
        """This rank's runners, which act by the policies there are now when they are asked for fragments next."""
        policy = self.algorithm.policy
        if self._pool is None:
            self._pool = self._make_pool()
        if policy is not self._acting and isinstance(policy, PolicySet):
            self._pool.follow(policy.maker(), self.feeds.keep_states)
            self._acting = policy
        return self._pool

    def before_change(self) -> None:
        if self._pool is None and self._saved_runners:
            self._pool = self.pool  # the checkpoint's episodes go on, by the policies that it has

    def remove_policy(self, policy_id: str) -> None:
        self.feeds.remove(policy_id)

    def took(self, fragments: Sequence[tuple[int, Fragment]], times: int = 1) -> None:
        """Count what runners collected, `times` their `rollout_length`, and say what they survived."""
        if self.fragment_watcher is not None:
            self.fragment_watcher(fragments, self._collected * self.rollout_length)
        self._collected += times
        for runner, fragment in fragments:
            self._episodes.extend(fragment.episodes)
            for failure in fragment.failures:
                log.warning("Env runner %d: %s", runner, failure)

    def resize(self, num_env_runners: int) -> None:
        """Have so many env runners from now on, also while training. New ones join when they are ready.

        Args:
            num_env_runners: at least 1, of a datamodule that has been made with env runners.

        Raises:
            OptionError: for a number that cannot be.
        """
        if check("num_env_runners", num_env_runners, CountOrZero) and not self.num_env_runners:
            raise OptionError(
                f"resize(num_env_runners={num_env_runners}): this datamodule steps its environments in the learner "
                "process. Make it with num_env_runners of at least 1."
            )
        num_env_runners = check("num_env_runners", num_env_runners, Count)
        if num_env_runners > self.num_env_runners and self._pool is not None:  # no more than the budget has room for
            num_env_runners = max(self.num_env_runners, min(num_env_runners, self._room))
        self.num_env_runners = num_env_runners
        if isinstance(self._pool, RunnerPool):
            self._pool.resize(num_env_runners)

    def say_how_it_runs(self) -> None:
        """One line on what makes the run as fast as it is."""
        learners, num_runners, where = self.algorithm.learners, self.num_env_runners, "this process"
        if num_runners:
            where = f"{'each of ' if num_runners > 1 else ''}{_count(num_runners, 'Ray env runner')}"
        acts = " Actions are computed in numpy." if all(each.policy.acts_in_numpy for each in learners) else ""
        compiled, steps = [each.hparams["compile"] for each in learners if "compile" in each.hparams], "eager"
        if compiled:
            steps = "compiled" if all(compiled) else "eager; compile=True pays in runs of minutes"
        threads, size = torch.get_num_threads(), max(sum(x.numel() for x in each.parameters()) for each in learners)
        if threads == 1 and size >= LARGE_NETWORK:
            steps += "; torch_threads=2 or more pays on a machine that does nothing else"
        rank_zero_info(
            f"Collecting from {_count(self.num_envs_per_env_runner, 'environment')} in {where} "
            f"(vectorization={self.env.vectorization}).{acts} Learning on "
            f"{_count(threads, 'torch thread')} (gradient steps are {steps})."
        )

    def say_if_done(self) -> None:
        """Where the budget is spent before anything is done, end the run and say so."""
        done = self.algorithm.env_steps_done
        if self._budget_left(done) < self._max_rows:
            rank_zero_info(
                f"Nothing to train: env_steps={done} of max_env_steps={self.max_env_steps} are done, and a rollout "
                f"takes {self._max_rows}. Set a larger max_env_steps to go on."
            )
            self.stop_at_budget()

    @property
    def rollout_shape(self) -> tuple[int, int]:
        """B and T of what this rank's runners collect at a time."""
        return max(1, self.num_env_runners) * self.num_envs_per_env_runner * self.num_slots, self.rollout_length

    @property
    def num_slots(self) -> int:
        """Time lines of one environment: agents at a time, at most."""
        return self.spec.num_slots if isinstance(self.spec, MultiAgentSpec) else 1

    @property
    def _max_rows(self) -> int:
        """The most env steps that all ranks take at a time."""
        batch, length = self.rollout_shape
        return batch // self.num_slots * length * self.attached_trainer.world_size

    @property
    def _fragment_rows(self) -> int:
        """Env steps of one fragment of every rank."""
        return self.num_envs_per_env_runner * self.rollout_length * self.attached_trainer.world_size

    @property
    def _room(self) -> int:
        """Fragments of this rank that the budget has room for."""
        left = self._budget_left(self.algorithm.env_steps_done)
        return 2**31 if left == float("inf") else int(left // self._fragment_rows)

    @property
    def _rows_per_epoch(self) -> int:
        """The env steps of a Lightning epoch."""
        raise NotImplementedError(f"{type(self).__name__} must define _rows_per_epoch.")

    def _make_pool(self) -> Pool:
        algorithm = self.algorithm
        if self.num_env_runners:
            self._connect_ray()
        saved, self._saved_runners = self._saved_runners, None
        self._acting = algorithm.policy
        return make_pool(
            self.env,
            algorithm.policy.maker(),
            num_env_runners=self.num_env_runners,
            num_envs=self.num_envs_per_env_runner,
            rollout_length=self.rollout_length,
            seed=self._seed_sequence(RUNNERS),
            rank=self.attached_trainer.global_rank,
            world_size=self.attached_trainer.world_size,
            collected=self._collected,
            ledger=self.ledger,
            faults=self.fault_tolerance,
            placement=self.placement,
            saved=saved,
            info_metrics=self.info_metrics,
            keep_states=self.feeds.keep_states,
            reward_scale=self.reward_scale,
            reward_clip=self.reward_clip,
        )

    def _check_budget(self) -> None:
        if self.max_env_steps is not None and self.max_env_steps < self._max_rows:
            raise OptionError(
                f"max_env_steps={self.max_env_steps}: expected at least the {self._max_rows} env steps that are taken "
                "at a time (runners x num_envs_per_env_runner x rollout_length x ranks). Raise it, or shorten "
                "rollout_length."
            )
        self._say_if_epochs_end_it(self._rows_per_epoch)


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
