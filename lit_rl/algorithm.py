"""What every algorithm shares: a LightningModule that learns from a source, and whose validation is episodes."""

import contextlib
import copy
import functools
import io
import math
import time
import types
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self

import lightning as L
import numpy as np
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from tensordict import TensorDict
from torch import Tensor

from lit_rl import distributed, peers
from lit_rl.central import with_central
from lit_rl.errors import DivergedError, OptionError
from lit_rl.evaluation.summary import EvaluationResult, summarize
from lit_rl.files import rescue
from lit_rl.files.checkpoint import LitCheckpointIO, rng_state, set_rng_state
from lit_rl.files.fits import changed_options, check_fits, init_from
from lit_rl.files.loading import FORMAT, SECTION, read_first, section, upgrade, with_previous
from lit_rl.learner.host import Host, make_host
from lit_rl.learner.refusals import check_box_options, check_memory, check_trainer
from lit_rl.learner.reporting import Reporter
from lit_rl.learner.signals import Interruption
from lit_rl.learner.steps import MOST_UNREAD
from lit_rl.learner.weight_averaging import keepers
from lit_rl.networks import Network, check_nameable, check_same_in_training, describe_network
from lit_rl.options import OneOf, Positive, TakesOptions
from lit_rl.policy import Policy
from lit_rl.quiet import leave_out_noise
from lit_rl.rollout import Rollout, mask_of
from lit_rl.schedules import Scheduled
from lit_rl.source import Source, source_of
from lit_rl.spec import EnvSpec, MultiAgentSpec

leave_out_noise()
ClipBy = Annotated[str, OneOf("global_norm", "norm", "value")]
MAX_SKIPPED = 5  # optimizer steps in a row: one more would be no better
MAX_SAVED_BATCHES = 10
NOT_SAVED = ("network", "critic_network", "policy_class", "spec")  # as hyper-parameters: they are no plain data
INITIALISATION, MINIBATCHES = 100, 101  # first numbers of SeedSequence keys; the datamodule's are below 100


@dataclass
class Update:
    """A call of `Algorithm.update`.

    Attributes:
        metrics: what it returned.
        skipped: gradient steps of it that were skipped, as far as is known.
        unread: those of which only the device knows.
    """

    metrics: Any
    skipped: int = 0
    unread: int = 0


class Algorithm(TakesOptions, L.LightningModule):
    """Base of every algorithm. A subclass gives `build`, `update` and `configure_optimizers`.

    Optimisation is manual: `update(batch)` is the paper's update, top to bottom. It takes each gradient step by
    `gradient_step(batch)`, which minimises `self.loss(batch)` and can be compiled, or by `optimize(loss)`. Eager steps
    go through Lightning's optimizer wrapper, so `global_step`, `on_before_optimizer_step` and precision plugins mean
    what they mean elsewhere; where nobody listens, its hooks are left out (see `way_of_steps`).

    Args:
        max_grad_norm: bound of the gradient; None leaves it as it is.
        grad_clip_by: what is bounded: the "global_norm" of all gradients together, the "norm" of each parameter's, or
            the absolute "value" of each number.
        network: callable `(observation_space) -> nn.Module` with an `output_size`; None for the default of the space
            (two hidden layers of 64 tanh units for a vector).
        policy_class: a subclass of the algorithm's policy (`QPolicy` for DQN, else `Policy`) that chooses actions in
            its own way; None for that itself.
        spec: the environment's spaces, an `EnvSpec` in plain data; None takes the datamodule's.

    Attributes:
        policy: what acts.
        lr: the learning rate; None leaves it as `configure_optimizers` sets it.
        env_steps: real transitions learned from, over all ranks.
        updates: calls of `update`; also the version of the policy's weights.
        budget: what its clock ends at; None if it does not.
        init_from: a checkpoint; when the networks are built its policy is copied, and all else of equal name and shape.
    """

    BY_NAME = "expected options by name, such as lr=3e-4. The environment goes to the datamodule."
    POLICY: type[Policy] = Policy
    NETWORKS: tuple[str, ...] = ("network",)  # the options that are networks
    LEARNS_AGAIN = False  # whether `update` may be given a rollout again, some of which is not new: see `Rollout`
    COMPILES_MEMORY = False  # whether its loss can be compiled, though its policy has memory
    OF_ONE_RANK: tuple[str, ...] = ()  # the parts of `rank_state` that a new rank does not take from the first

    policy: Policy
    lr: Scheduled | None
    env_steps: Tensor
    updates: Tensor

    def __init__(
        self,
        *,
        max_grad_norm: Positive | None = None,
        grad_clip_by: ClipBy = "global_norm",
        network: Network | None = None,
        policy_class: type[Policy] | None = None,
        spec: dict[str, Any] | None = None,
    ):
        super().__init__()
        self.take_options()
        self.lr = None
        self.automatic_optimization = False
        if not (policy_class is None or (isinstance(policy_class, type) and issubclass(policy_class, self.POLICY))):
            raise OptionError(f"policy_class={policy_class!r}: expected a subclass of lit_rl.{self.POLICY.__name__}.")
        self.network = network
        self.policy_class = policy_class or self.POLICY
        self.spec = None if spec is None else EnvSpec.from_dict(spec)
        self.budget: int | None = None
        self.init_from: str | None = None
        self.generator = torch.Generator()
        self.register_buffer("env_steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
        self._host: Host | None = None
        self._resume: dict[str, Any] | None = None
        self._num_saved = 0  # batches with which skipped steps began
        self._skipped_before = 0  # gradient steps, before the batch
        self._broken_batch = ""  # where the last of them is
        self._unchecked: list[tuple[TensorDict, Update]] = []
        self._numbers: dict[str, tuple[Tensor, int, int]] = {}  # counters, their version, and what they said then
        self._reporter: Reporter | None = None
        self._interruption: Interruption | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Without its surroundings, which belong to the fit that is over: the Trainer, loggers, signal handlers."""
        surroundings: dict[str, Any] = {"_host": None, "_reporter": None, "_interruption": None, "_numbers": {}}
        return {**super().__getstate__(), **surroundings}

    # --- what a subclass gives ----------------------------------------------------------------------------------

    def build(self, spec: EnvSpec) -> None:
        """Make `self.policy` and whatever else has weights."""
        raise NotImplementedError(f"{type(self).__name__} must define build(spec).")

    def update(self, batch: TensorDict) -> dict[str, Tensor | float]:
        """Learn from one batch; returns metrics to log. Takes what it needs from the batch, not from the Trainer."""
        raise NotImplementedError(f"{type(self).__name__} must define update(batch).")

    def loss(self, batch: TensorDict) -> tuple[Tensor, Any]:
        """What `gradient_step` minimises, and any tree of tensors beside it."""
        raise NotImplementedError(f"{type(self).__name__} must define loss(batch) to call gradient_step.")

    def default_network(self, spec: EnvSpec) -> Network | None:
        """The policy's network where none is asked for; None for the observation space's default."""
        return None

    @property
    def central_input(self) -> str | None:
        """What a central critic sees, a kind of `central_space`; None without one."""
        return None

    # --- what a subclass calls ----------------------------------------------------------------------------------

    def make_policy(self, spec: EnvSpec, **arguments: Any) -> Policy:
        """A new policy of the class and with the network the user asked for."""
        return self.policy_class(spec, network=self.network or self.default_network(spec), **arguments)

    def build_actor(self, spec: EnvSpec) -> None:
        """Make `self.policy` as these options ask, which are alike wherever one run may go on with another's policy.

        They are `normalize_observations, state_dependent_std, squash_actions, log_std_init`.
        """
        hp = self.hp
        self.policy = self.make_policy(
            spec,
            normalize_observations=hp.normalize_observations,
            state_dependent_std=hp.state_dependent_std,
            squash=hp.squash_actions,
            log_std_init=hp.log_std_init,
        )
        check_same_in_training(self.policy)
        check_memory(self)
        check_box_options(self)

    def gradient_step(self, batch: TensorDict) -> tuple[bool | Tensor, Any]:
        """One gradient step on `self.loss(batch)`: whether it was taken, and what `loss` gave beside the loss.

        On a GPU the former is a tensor that becomes True or False there: to ask for it in an `if` waits for the GPU.
        """
        mask = mask_of(batch)
        if mask is not None and distributed.world_size() > 1:  # asked once, for all means in the loss
            batch["row_count"] = distributed.mean_count(mask).expand(mask.shape)
        if self._host is not None and self._host.steps.is_compiled:
            return self._host.steps.on_batch(batch)
        loss, rest = self.loss(batch)
        return self.optimize(loss), rest

    def optimize(self, loss: Tensor, optimizer: LightningOptimizer | None = None) -> bool | Tensor:
        """One gradient step on `loss`: backward, the average over ranks, clip, step; whether it was taken.

        On a GPU that is a tensor: see `gradient_step`. Where the loss or the gradient of any rank is not finite, every
        rank skips it.
        """
        return self.host.steps.on_loss(loss, optimizer)

    def checked_update(self, batch: TensorDict, function: Callable[[], Any] | None = None) -> "Update":
        """`update`, and `check_updates` after it: where only a GPU knows what became of the steps, after some more.

        Args:
            batch: what is learned from.
            function: what learns from it in place of `update`, by the gradient steps of the same host.
        """
        steps = self.host.steps
        skipped, unread = steps.skipped, steps.num_unread
        update = Update(self.update(batch) if function is None else function())
        update.skipped, update.unread = steps.skipped - skipped, steps.num_unread - unread
        self._unchecked.append((batch, update))
        if not 0 < steps.num_unread < MOST_UNREAD:
            self.check_updates()
        return update

    def check_updates(self) -> None:
        """Find out which gradient steps were skipped since this was called last, in the order of the updates.

        The batch with which a row of them begins is saved.

        Raises:
            DivergedError: after `MAX_SKIPPED` in a row, with a checkpoint of the weights from before.
        """
        unchecked, self._unchecked = self._unchecked, []
        if not unchecked:
            return
        steps = self.host.steps
        steps.fetch()
        for batch, update in unchecked:
            update.skipped += steps.count(update.unread)
            if not update.skipped:
                continue
            if steps.in_a_row <= update.skipped:
                self._broken_batch = self._save_batch(batch)
            if steps.in_a_row >= MAX_SKIPPED:
                path = self.host.save_checkpoint("before_divergence.ckpt")
                raise DivergedError(
                    f"{steps.not_finite} is not finite after {self.env_steps_done} env steps, {steps.in_a_row} times "
                    f"in a row: training has diverged. Batch: {self._broken_batch}. Checkpoint from before: "
                    f"{path}. Go on from it with a lower lr, or scale the rewards down."
                )

    def scheduled(self, name: str) -> Scheduled:
        """The option `name` as it changes by `<name>_schedule`. Kept as an attribute, it follows by itself."""
        return Scheduled(name, self.hp[name], self.hp[f"{name}_schedule"])

    def keep_options(self, options: dict[str, Any], caller: types.FrameType) -> None:
        """Keep checked options as hyper-parameters, with all that a subclass was given that keeps none itself."""
        if not self.hparams:
            self.save_hyperparameters(ignore=NOT_SAVED, frame=caller)
        self.hparams.update({name: value for name, value in options.items() if name not in NOT_SAVED})
        self._hparams_initial = copy.deepcopy(self.hparams)

    def check_nameable(self) -> None:
        """Refuse networks that no checkpoint could name: see `check_nameable`."""
        for name in self.NETWORKS:
            check_nameable(getattr(self, name))

    def describe_networks(self) -> dict[str, Any]:
        """The options that are networks, in plain data."""
        return {name: describe_network(getattr(self, name)) for name in self.NETWORKS}

    @property
    def hp(self) -> Any:
        """The hyper-parameters, by name."""
        return self.hparams

    @property
    def host(self) -> Host:
        """Its surroundings while it learns."""
        assert self._host is not None, "an algorithm learns while it is attached: see attach"
        return self._host

    @property
    def learners(self) -> Sequence["Algorithm"]:
        """What learns from a batch, each from its own part: itself, if it is not made of several."""
        return [self]

    @property
    def clock(self) -> int:
        """What time it is by the clock of its source: env steps, or updates."""
        by_updates = self._host is not None and self._host.source.clock == "updates"
        return self.updates_done if by_updates else self.env_steps_done

    @property
    def skipped_updates(self) -> int:
        """Gradient steps that were skipped since a loss or gradient was not finite."""
        return 0 if self._host is None else self._host.steps.skipped

    @property
    def env_steps_done(self) -> int:
        return self._number("env_steps")

    @property
    def updates_done(self) -> int:
        return self._number("updates")

    def count(self, name: str, more: int) -> None:
        """Add to `env_steps` or `updates`, whose number stays known: a GPU need not be asked for it."""
        number, counter = self._number(name) + more, getattr(self, name).add_(more)
        self._numbers[name] = counter, counter._version, number

    # --- what a host calls: Lightning's hooks below, or a module that this is a part of -------------------------------

    def build_networks(self, source: Source) -> None:
        """Make the networks, if there are none yet, from the spaces and the seed of a source.

        Raises:
            OptionError: if there are no spaces, or other ones than the networks are for, or those of several agents
                differ.
        """
        found = source.spec
        if isinstance(found, MultiAgentSpec):
            found = with_central(found, self.central_input)
        if self.spec is None and found is None:
            raise OptionError(
                f"{type(self).__name__} does not know its environment: expected a datamodule, as in "
                "trainer.fit(algorithm, RolloutDataModule('CartPole-v1')), or spec=."
            )
        if self.spec is not None and found is not None and not _same_spaces(self.spec, found):
            raise OptionError(
                f"The weights are for {self.spec.env_id} ({_spaces(self.spec)}), but the datamodule's environment "
                f"{found.env_id} has {_spaces(found)}. Use the environment they were trained on."
            )
        if hasattr(self, "policy"):
            return
        self.spec = self.spec or found
        assert self.spec is not None
        with one_thread(), torch.random.fork_rng(devices=[], enabled=source.seed is not None):
            if source.seed is not None:
                torch.manual_seed(seed_for(source.seed, INITIALISATION))
            self.build(self.spec)

    def attach(self, host: Host) -> None:
        """Learn inside of `host` from now on; with counts from 0 unless that goes on with a run."""
        if self._host is not None and host.is_resumed:
            host.steps.skipped = self._host.steps.skipped
        self._host = host
        self._num_saved = 0
        self.budget = host.source.budget
        if not host.is_resumed:
            self.env_steps.zero_()
            self.updates.zero_()
        seed = host.source.seed
        self.generator.manual_seed(seed_for(0 if seed is None else seed, MINIBATCHES, host.rank))

    def follow_schedules(self) -> None:
        """Set scheduled options, and the optimizer's learning rate, to their values now.

        Raises:
            OptionError: if one ends with the budget, and there is none.
        """
        now, budget = self.clock, self.budget
        for part in self.children():
            if isinstance(part, Scheduled):
                part.follow(now, budget)
        if self.lr is not None and self._host is not None:
            lr = self.lr.at(now, budget)
            for group in self._host.param_groups:
                group["lr"] = lr * group.get("lr_scale", 1.0)

    def learn_from(self, batch: Any) -> dict[str, Tensor | float]:
        """`update` for each part of what the datamodule gave, here one rollout, and count its env steps."""
        if not isinstance(batch, Rollout):
            raise OptionError(
                f"{type(self).__name__} was given a {type(batch).__name__} to learn from: expected a "
                "lit_rl.rollout.Rollout that says how many env_steps it brings, as RolloutDataModule gives it."
            )
        if not batch.has_rows:
            self.count("env_steps", batch.env_steps)
            return {}
        lag = self.lag_of(batch)
        update = self.checked_update(batch)
        self.check_updates()
        self.count("env_steps", batch.env_steps)
        self.count("updates", 1)
        return {**update.metrics, "rollout/policy_lag": lag}

    def lag_of(self, rollout: Rollout) -> float:
        """Updates since the weights that acted, the mean over the rows of all ranks."""
        age = self.updates_done - rollout["policy_version"].double()
        return float(distributed.masked_mean(age, mask_of(rollout)))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)  # a subclass may have a module of such a name
        except AttributeError:
            if name not in peers.METHODS:
                raise
            kind = type(self).__name__
            raise AttributeError(f"{kind} has no {name!r}. {peers.METHODS[name].format(kind)}") from None

    def time_shares(self) -> dict[str, float]:
        """What "collecting", "updating" and "evaluating" took of the last `fit`, 0 to 1; {} if it trained nothing."""
        return {} if self._reporter is None else self._reporter.shares()

    def resume_state(self) -> dict[str, Any]:
        """What this rank needs to go on exactly where it is, beside the weights, in plain data."""
        return {"generator": self.generator.get_state(), "algorithm": self.rank_state()}

    def load_resume_state(self, state: Mapping[str, Any]) -> None:
        """Go on from what `resume_state` returned."""
        self.generator.set_state(state["generator"])
        self.load_rank_state(state["algorithm"])

    def resume_skipped(self, skipped: int) -> None:
        """Go on from so many gradient steps that were skipped."""
        self.host.steps.skipped = skipped

    # --- Lightning's hooks: building ----------------------------------------------------------------------------

    def configure_model(self) -> None:
        is_new = not hasattr(self, "policy")
        self.build_networks(source_of(self._trainer))
        if self.init_from is not None and is_new:
            init_from(self, self.init_from)

    def configure_callbacks(self) -> Sequence[L.Callback]:
        check_trainer(self.trainer, self)  # before Lightning's own check, whose message knows nothing of our options
        return keepers(self.trainer)

    def setup(self, stage: str) -> None:
        strategy = self.trainer.strategy
        if type(strategy.checkpoint_io) is TorchCheckpointIO:
            strategy.checkpoint_io = LitCheckpointIO(functools.partial(rescue.is_of_a_callback, self.trainer))
        if stage == "fit":
            self.budget = self.source.budget
            self.follow_schedules()  # one that cannot be followed is refused now
            if self.trainer.checkpoint_callbacks:
                self.check_nameable()  # and so is a network that no checkpoint could name

    # --- Lightning's hooks: training ----------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        optimizers: Any = self.optimizers()
        host = make_host(self, self, optimizers if isinstance(optimizers, list) else [optimizers], self.source)
        if not host.is_resumed:
            host.source.restart()
        self.attach(host)

    def on_train_start(self) -> None:
        if self._resume is not None:
            ranks, skipped, self._resume = self._resume["ranks"], self._resume.get("skipped_updates", 0), None
            if len(ranks) != self.trainer.world_size:
                if self.trainer.world_size < len(ranks):
                    rest = "The others' random numbers, episodes and replay buffers are left out."
                else:
                    rest = "The new ones begin with random numbers, episodes and replay buffers of their own."
                rank_zero_info(
                    f"Resumed: the checkpoint is of {len(ranks)} learner processes, this run has "
                    f"{self.trainer.world_size}. {rest}"
                )
            if self.global_rank < len(ranks):
                set_rng_state(ranks[self.global_rank]["rng"])
                self.load_resume_state(ranks[self.global_rank])
            else:
                self.load_state_of_first(ranks[0]["algorithm"])
            self.resume_skipped(skipped)
        self.follow_schedules()
        self._interruption = Interruption(self.trainer)
        if self.trainer.enable_validation:
            self.source.begin_evaluation()
        self._reporter = Reporter(self.trainer, self.source.clock)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._obey_signals()

    def on_train_epoch_start(self) -> None:
        self.reporter.resume_timing()  # evaluation and checkpoints are not training time

    def on_train_epoch_end(self) -> None:
        self._obey_signals()  # that came during evaluation

    def on_train_end(self) -> None:
        self.reporter.flush()  # the last update is logged, whatever `log_every_n_steps`
        self._obey_signals()
        for result in self.source.end_evaluation():
            self.reporter.evaluation(self.summarized(distributed.gather(result), "eval"), result.at)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        started, before = time.perf_counter(), self.clock
        metrics = self.metrics_of(batch)
        self.follow_schedules()
        self.reporter.update(
            metrics | self.host.source.metrics(),
            started=started,
            waited_s=getattr(batch, "waited_s", 0.0),
            step=self.clock,
            new=self.clock - before,
        )

    def metrics_of(self, batch: Any) -> dict[str, Tensor | float]:
        """Learn from a batch: what is to be logged of that, over all ranks."""
        self.begin_batch()
        return self.end_batch(self.learn_from(batch))

    def begin_batch(self) -> None:
        """Gradient steps on a new batch are to be taken."""
        steps = self.host.steps
        self._skipped_before = steps.skipped
        steps.norms.clear()

    def end_batch(self, metrics: dict[str, Tensor | float]) -> dict[str, Tensor | float]:
        """The metrics of a batch, over all ranks, with those of its gradient steps."""
        steps = self.host.steps
        if steps.norms:
            metrics["optim/grad_norm"] = torch.stack(steps.norms).mean()
        if distributed.world_size() > 1:
            means = distributed.rank_mean(torch.tensor([float(v) for v in metrics.values()], device=self.device))
            metrics = dict(zip(metrics, means.tolist()))
        if steps.skipped > self._skipped_before:  # the steps that were taken have finite means
            metrics = {name: value for name, value in metrics.items() if math.isfinite(value)}
        metrics["optim/skipped_updates"] = steps.skipped
        metrics["optim/lr"] = self.host.param_groups[0]["lr"]
        return metrics

    # --- Lightning's hooks: evaluation --------------------------------------------------------------------------

    def on_validation_start(self) -> None:
        if self._reporter is not None:
            self._reporter.begin_evaluation()

    def on_validation_end(self) -> None:
        if self._reporter is not None:
            self._reporter.end_evaluation()

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Nothing: an episode was played when it became a batch."""

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Nothing, as in validation."""

    def on_validation_epoch_end(self) -> None:
        self._log_evaluations("eval")

    def on_test_epoch_end(self) -> None:
        self._log_evaluations("test")

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        """The recorded episode itself."""
        return batch

    # --- Lightning's hooks: checkpoints -------------------------------------------------------------------------

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Self:
        """Lightning's, which reads a damaged file as if it were whole, of one that is whole: see `read_checkpoint`."""
        if isinstance(checkpoint_path, str | Path):
            checkpoint_path, checkpoint = read_first(with_previous(checkpoint_path))
            if checkpoint.get(SECTION, {}).pop("upgraded", False):  # Lightning would read the options it was made with
                checkpoint_path = io.BytesIO()
                torch.save(checkpoint, checkpoint_path)
                checkpoint_path.seek(0)
        return super().load_from_checkpoint(checkpoint_path, *args, **kwargs)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        assert self.spec is not None
        self.check_nameable()
        state = {"rng": rng_state(), **self.resume_state()}
        state["data"] = self.source.rank_state(weights_only="optimizer_states" not in checkpoint)
        checkpoint[SECTION] = {
            "format": FORMAT,
            "algorithm": type(self).__name__,
            "policy": self.policy.describe(),
            "env": self.source.describe_env(),
            "skipped_updates": self.skipped_updates,
            "ranks": distributed.gather(state),
        }
        arguments = checkpoint.setdefault(self.CHECKPOINT_HYPER_PARAMS_KEY, {})
        arguments["spec"] = self.spec.to_dict()
        arguments |= self.describe_networks()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        upgrade(checkpoint)
        found = section(checkpoint)
        self.check_fits(found, checkpoint["state_dict"])
        if self._trainer is None:
            return
        states = [rank["data"] for rank in found["ranks"]]
        if self._trainer.training:
            self._resume = found
            changed = self.changed_options(checkpoint.get(self.CHECKPOINT_HYPER_PARAMS_KEY, {}))
            if changed:
                rank_zero_info(f"Resumed with other options than the checkpoint's: {', '.join(changed)}.")
            self.source.load_ranks(states, self.global_rank, self.trainer.world_size)
        else:
            self.source.load_evaluated(states)

    def changed_options(self, options: Mapping[str, Any]) -> list[str]:
        """Which options are not those of a checkpoint, in words."""
        return changed_options(self, options)

    def check_fits(self, found: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> None:
        """Refuse a checkpoint of another algorithm, policy or network: see `files.fits`."""
        check_fits(self, found, state_dict)

    def rank_state(self) -> dict[str, Any]:
        """What is this rank's own and no weight, in plain data."""
        return {}

    def load_rank_state(self, state: Mapping[str, Any]) -> None:
        """Go on from what `rank_state` returned."""

    def load_state_of_first(self, state: Mapping[str, Any]) -> None:
        """On a rank that the run did not have before, go on from the first one's `rank_state`, without what is its."""
        self.load_rank_state({name: value for name, value in state.items() if name not in self.OF_ONE_RANK})

    # ------------------------------------------------------------------------------------------------------------

    @property
    def source(self) -> Source:
        """The Trainer's datamodule."""
        return source_of(self.trainer)

    @property
    def reporter(self) -> Reporter:
        assert self._reporter is not None, "there is one while training"
        return self._reporter

    def _number(self, name: str) -> int:
        """What a counter says, which is asked for if it was changed elsewhere."""
        counter = getattr(self, name)
        known = self._numbers.get(name)
        if known is None or known[0] is not counter or known[1] != counter._version:
            known = self._numbers[name] = counter, counter._version, int(counter)
        return known[2]

    def _obey_signals(self) -> None:
        if self._interruption is not None:
            self._interruption.obey()

    def _save_batch(self, batch: TensorDict) -> str:
        """Save a batch with which skipped steps began, and warn; returns where it is, or why it is nowhere."""
        if self._num_saved == MAX_SAVED_BATCHES:
            return f"not saved ({MAX_SAVED_BATCHES} were before it)"
        self._num_saved += 1
        name = f"nonfinite_batch_{self.env_steps_done}_rank{self.host.rank}.pt"
        path = rescue.save_batch(batch, self.host.log_folder() / name)
        rank_zero_warn(
            f"{self.host.steps.not_finite} is not finite after {self.env_steps_done} env steps: the optimizer step was "
            f"skipped. Batch: {path}"
        )
        return path

    def summarized(self, results: Sequence[EvaluationResult], prefix: str) -> dict[str, float]:
        """The metrics of an evaluation, of which each rank has a result."""
        return {f"{prefix}/{name}": value for name, value in summarize(results).items()}

    def log_evaluation(self, values: dict[str, float], at: int) -> None:
        """Log what the validation, or test, under way found of the policy at a time of the clock; on every rank."""
        in_fit = self.trainer.state.fn == "fit"
        with warnings.catch_warnings():
            # `trainer.validate` returns what was logged, whether there is a logger or not.
            warnings.filterwarnings("ignore", message=".*but have no logger configured.*")
            # Every rank has all values: nothing is left to reduce, but Lightning asks for the flag.
            self.log_dict(values, logger=not in_fit, sync_dist=distributed.world_size() > 1)
        if in_fit and not self.trainer.sanity_checking:
            self.reporter.evaluation(values, at)

    def _log_evaluations(self, prefix: str) -> None:
        """Log evaluations that went on beside training, then the one that is Lightning's validation, or test."""
        results = self.source.evaluations()
        for result in results[:-1]:
            self.reporter.evaluation(self.summarized(distributed.gather(result), prefix), result.at)
        now, judged = self.clock, self.source.judged(prefix)
        last = [(self.summarized(distributed.gather(result), prefix), result.at) for result in results[-1:]]
        if judged:
            last = [(last[0][0] | judged, now)] if last and last[0][1] == now else [*last, (judged, now)]
        for values, at in last:
            self.log_evaluation(values, at)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """With one thread of torch: what is computed does not depend on how many there were before, to the last bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _same_spaces(a: EnvSpec, b: EnvSpec) -> bool:
    return (a.observation_space, a.action_space) == (b.observation_space, b.action_space) and (
        a.central_space == b.central_space
    )


def _spaces(spec: EnvSpec) -> str:
    central = "" if spec.central_space is None else f", central inputs {spec.central_space}"
    return f"observation {spec.observation_space}, action {spec.action_space}{central}"


def seed_for(seed: int, *key: int) -> int:
    """A seed for one of several purposes."""
    return int(np.random.SeedSequence(seed, spawn_key=key).generate_state(1)[0])
