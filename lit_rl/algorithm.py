"""What every algorithm shares: a LightningModule whose batches are rollouts and whose validation is episodes."""

import copy
import io
import math
import time
import types
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Self

import lightning as L
import numpy as np
import torch
import torch.distributed as dist
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from tensordict import TensorDict
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from lit_rl import distributed, rescue
from lit_rl.checkpoint import LitCheckpointIO, rng_state, set_rng_state
from lit_rl.compiled import CompiledStep, factor
from lit_rl.envs.make import EnvConfig
from lit_rl.errors import CheckpointError, DivergedError, OptionError
from lit_rl.evaluation.summary import summarize
from lit_rl.loading import FORMAT, SECTION, read_checkpoint, read_first, section, upgrade, with_previous
from lit_rl.networks import NetworkFactory, check_nameable, describe_network
from lit_rl.options import OneOf, Positive, TakesOptions
from lit_rl.policy import Policy, class_name
from lit_rl.rollout import count_rows, mask_of
from lit_rl.schedules import Scheduled
from lit_rl.signals import Interruption
from lit_rl.spec import EnvSpec

ClipBy = Annotated[str, OneOf("global_norm", "norm", "value")]
MAX_SKIPPED = 5  # optimizer steps in a row: one more would be no better
MAX_SAVED_BATCHES = 10
ONLY_INITIAL = {"log_std_init", "noisy"}  # arguments of policies that nothing depends on once there are weights
NOT_SAVED = ("network", "critic_network", "policy_class", "spec")  # as hyper-parameters: they are no plain data
INITIALISATION, MINIBATCHES = 100, 101  # first numbers of SeedSequence keys; the datamodule's are below 100


class Algorithm(TakesOptions, L.LightningModule):
    """Base of every algorithm. A subclass gives `build`, `update` and `configure_optimizers`.

    Optimisation is manual: `update(batch)` is the paper's update, top to bottom, and calls `optimize(loss)` once per
    gradient step. Steps go through Lightning's optimizer wrapper, so `global_step`, `on_before_optimizer_step` and
    precision plugins mean what they mean elsewhere.

    Args:
        max_grad_norm: bound of the gradient; None leaves it as it is.
        grad_clip_by: what is bounded: the "global_norm" of all gradients together, the "norm" of each parameter's, or
            the absolute "value" of each number.
        network: callable `(observation_space) -> nn.Module` with an `output_size`; None for the default of the space
            (two hidden layers of 64 tanh units for a vector).
        policy_class: a subclass of the algorithm's policy that chooses actions in its own way; None for that itself.
        spec: the environment's spaces, an `EnvSpec` in plain data; None takes the datamodule's.

    Attributes:
        policy: what acts.
        lr: the learning rate; None leaves it as `configure_optimizers` sets it.
        env_steps: real transitions learned from, over all ranks.
        updates: calls of `update`; also the version of the policy's weights.
        skipped_updates: optimizer steps that were skipped since a loss or gradient was not finite.
        init_from: a checkpoint whose weights and statistics are taken when the networks are built, and nothing else.
    """

    POLICY: type[Policy] = Policy

    policy: Policy
    lr: Scheduled | None
    env_steps: Tensor
    updates: Tensor

    def __init__(
        self,
        *,
        max_grad_norm: Positive | None = None,
        grad_clip_by: ClipBy = "global_norm",
        network: NetworkFactory | dict[str, Any] | None = None,
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
        self._compiled_step: CompiledStep | None = None
        self.spec = None if spec is None else EnvSpec.from_dict(spec)
        self.max_env_steps: int | None = None
        self.init_from: str | None = None
        self.generator = torch.Generator()
        self.register_buffer("env_steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
        self._resume: dict[str, Any] | None = None
        self._evaluated: list[dict[str, Any]] = []
        self._batch_ended = 0.0
        self._grad_norms: list[Tensor] = []
        self.skipped_updates = 0
        self._skipped_in_a_row: dict[LightningOptimizer, int] = {}
        self._not_finite = ""  # what it was in the last step that was skipped
        self._saved_batches: list[str] = []
        self._interruption: Interruption | None = None
        self._unlogged: dict[str, float] | None = None

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

    def default_network(self, spec: EnvSpec) -> NetworkFactory | None:
        """The policy's network where none is asked for; None for the observation space's default."""
        return None

    # --- what a subclass calls ----------------------------------------------------------------------------------

    def make_policy(self, spec: EnvSpec, **arguments: Any) -> Policy:
        """A new policy of the class and with the network the user asked for."""
        return self.policy_class(spec, network=self.network or self.default_network(spec), **arguments)

    def check_memory(self) -> None:
        """Refuse options that the policy's network, with memory or without, cannot have.

        Raises:
            OptionError: naming the option.
        """
        hp = self.hp
        if hp.burn_in and not self.policy.has_memory:
            raise OptionError(
                f"burn_in={hp.burn_in}: expected a network with memory, such as LSTMNetwork. Leave it out."
            )
        if self.policy.has_memory and hp.get("share_encoder") is False:
            raise OptionError(
                f"share_encoder=False: {type(self.policy.encoder).__name__} has memory, of which an env runner carries "
                "one. Leave it out: policy and critic then share the network."
            )

    def gradient_step(self, batch: TensorDict) -> tuple[bool, Any]:
        """One gradient step on `self.loss(batch)`: whether it was taken, and what `loss` gave beside the loss."""
        if self._compiled_step is not None:
            loss, norm, rest = self._compiled_step(batch)
            return self._note_step(loss, norm, self._compiled_step.optimizer), rest
        loss, rest = self.loss(batch)
        return self.optimize(loss), rest

    def optimize(self, loss: Tensor, optimizer: LightningOptimizer | None = None) -> bool:
        """One gradient step on `loss`: backward (all-reduced over ranks), clip, step; whether it was taken.

        Where the loss or the gradient of any rank is not finite, every rank skips it.
        """
        if optimizer is None:
            optimizer = self.optimizers()  # type: ignore[assignment]
            assert isinstance(optimizer, LightningOptimizer), "several optimizers: say which one"
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for parameter in parameters:  # optimizer.zero_grad(), which takes longer to prepare for it than to do it
            parameter.grad = None
        # A loss that is not finite gives gradients that are not. DDP sums gradients, so that every rank has the same
        # norm: they need not ask each other.
        self.manual_backward(loss, gradient=loss.detach() * 0 + 1)
        grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
        norms = torch._foreach_norm(grads)
        norm = torch.linalg.vector_norm(torch.stack(norms))
        if not self._note_step(loss, norm, optimizer):
            return False
        if self.hp.max_grad_norm is not None:
            clip_gradients(grads, norms, norm, self.hp.max_grad_norm, self.hp.grad_clip_by)
        optimizer.step()
        return True

    def checked_update(self, batch: TensorDict) -> dict[str, Tensor | float]:
        """`update`, and what follows where `optimize` skipped steps of it.

        The batch with which a row of them begins is saved.

        Raises:
            DivergedError: after `MAX_SKIPPED` in a row, with a checkpoint of the weights from before.
        """
        before = self.skipped_updates
        metrics = self.update(batch)
        skipped = self.skipped_updates - before
        if skipped:
            in_a_row = max(self._skipped_in_a_row.values(), default=0)
            if in_a_row <= skipped and len(self._saved_batches) < MAX_SAVED_BATCHES:
                self._save_batch(batch)
            if in_a_row >= MAX_SKIPPED:
                path = rescue.save_checkpoint(self.trainer, "before_divergence.ckpt")
                raise DivergedError(
                    f"{self._not_finite} is not finite after {self.env_steps_done} env steps, {in_a_row} times in a "
                    f"row: training has diverged. Batch: {self._saved_batches[-1]}. Checkpoint from before: {path}. Go "
                    "on from it with a lower lr, or scale the rewards down."
                )
        return metrics

    def acting_copy(self) -> Policy:
        """A copy of the policy, on the CPU, that plays and leaves training as it is."""
        copy = type(self.policy).from_description(self.policy.describe(), network=self.network)
        copy.load_weights({name: tensor.cpu() for name, tensor in self.policy.state_dict().items()})
        return copy.eval()

    def scheduled(self, name: str) -> Scheduled:
        """The option `name` as it changes by `<name>_schedule`. Kept as an attribute, it follows by itself."""
        return Scheduled(name, self.hp[name], self.hp[f"{name}_schedule"])

    def keep_options(self, options: dict[str, Any], caller: types.FrameType) -> None:
        """Keep checked options as hyper-parameters, with all that a subclass was given that keeps none itself."""
        if not self.hparams:
            self.save_hyperparameters(ignore=NOT_SAVED, frame=caller)
        self.hparams.update({name: value for name, value in options.items() if name not in NOT_SAVED})
        self._hparams_initial = copy.deepcopy(self.hparams)

    @property
    def hp(self) -> Any:
        """The hyper-parameters, by name."""
        return self.hparams

    @property
    def starts_anew(self) -> bool:
        """Whether the fit under way counts from 0, as Trainer.global_step does; a resumed one goes on."""
        return self.trainer.global_step == 0 and not self.trainer.ckpt_path

    @property
    def env_steps_done(self) -> int:
        return int(self.env_steps)

    @property
    def updates_done(self) -> int:
        return int(self.updates)

    def count_env_steps(self, batch: TensorDict) -> int:
        """Real transitions in the batches of all ranks."""
        if mask_of(batch) is None:
            return count_rows(batch) * distributed.world_size()
        return int(distributed.all_reduce_sum(torch.tensor(count_rows(batch), device=self.device)))

    # --- Lightning's hooks: building ----------------------------------------------------------------------------

    def configure_model(self) -> None:
        datamodule = getattr(self._trainer, "datamodule", None) if self._trainer is not None else None
        found: EnvSpec | None = getattr(datamodule, "spec", None)
        if self.spec is None and found is None:
            raise OptionError(
                f"{type(self).__name__} does not know its environment: expected a datamodule, as in "
                "trainer.fit(algorithm, RolloutDataModule('CartPole-v1')), or spec=."
            )
        if self.spec is not None and found is not None and not _same_spaces(self.spec, found):
            raise OptionError(
                f"The weights are for {self.spec.env_id} (observation {self.spec.observation_space}, action "
                f"{self.spec.action_space}), but the datamodule's environment {found.env_id} has observation "
                f"{found.observation_space}, action {found.action_space}. Use the environment they were trained on."
            )
        if hasattr(self, "policy"):
            return
        self.spec = self.spec or found
        assert self.spec is not None
        seed = getattr(datamodule, "seed", None)
        with torch.random.fork_rng(devices=[], enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(_seed_for(seed, INITIALISATION))
            self.build(self.spec)
        if self.init_from is not None:
            checkpoint = read_checkpoint(self.init_from)
            self._check_fits(section(checkpoint, self.init_from), checkpoint["state_dict"])
            self.load_state_dict(checkpoint["state_dict"])

    def configure_callbacks(self) -> Sequence[L.Callback]:
        # Called before Lightning's own check, whose message knows nothing of `max_grad_norm`.
        trainer = self.trainer
        if trainer.gradient_clip_val is not None:
            raise OptionError(
                f"Trainer(gradient_clip_val={trainer.gradient_clip_val}): {type(self).__name__} clips gradients "
                f"itself. Leave it out and set {type(self).__name__}(max_grad_norm={trainer.gradient_clip_val})."
            )
        if trainer.accumulate_grad_batches != 1:
            own = (
                f"{type(self).__name__}(minibatch_size"
                if "minibatch_size" in self.hparams
                else "ReplayDataModule(batch_size"
            )
            raise OptionError(
                f"Trainer(accumulate_grad_batches={trainer.accumulate_grad_batches}): expected 1. Set a larger "
                f"{own}=...) instead."
            )
        if trainer.precision not in ("32-true", "bf16-mixed"):
            raise OptionError(f"Trainer(precision={trainer.precision!r}): expected '32-true' or 'bf16-mixed'.")
        return []

    def setup(self, stage: str) -> None:
        strategy = self.trainer.strategy
        if type(strategy.checkpoint_io) is TorchCheckpointIO:
            strategy.checkpoint_io = LitCheckpointIO()
        if stage == "fit":
            self.max_env_steps = getattr(self._datamodule, "max_env_steps", None)
            self._follow_schedules()  # one that cannot be followed is refused now
            if self.trainer.checkpoint_callbacks:
                check_nameable(self.network)  # and so is a network that no checkpoint could name

    # --- Lightning's hooks: training ----------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        if self.starts_anew:
            self.env_steps.zero_()
            self.updates.zero_()
            self.skipped_updates = 0
            if hasattr(self._datamodule, "restart"):
                self._datamodule.restart()
        self._skipped_in_a_row.clear()
        self._saved_batches.clear()
        seed = getattr(self._datamodule, "seed", None)
        self.generator.manual_seed(_seed_for(0 if seed is None else seed, MINIBATCHES, self.global_rank))

    def on_train_start(self) -> None:
        if self._resume is not None:
            ranks, self.skipped_updates = self._resume["ranks"], self._resume.get("skipped_updates", 0)
            self._resume = None
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
                state = ranks[self.global_rank]
                set_rng_state(state["rng"])
                self.generator.set_state(state["generator"])
                self.load_rank_state(state["algorithm"])
        if isinstance(self.trainer.model, DistributedDataParallel) and self.device.type == "cpu":
            self.trainer.model.register_comm_hook(None, distributed.average_gradients)
        self._interruption = Interruption(self.trainer)
        self._compiled_step = CompiledStep(self) if self.hp.get("compile") else None
        if getattr(self._datamodule, "eval_parallel", False) and self.trainer.enable_validation:
            self._datamodule.begin_evaluation()  # the first that is logged
        self._batch_ended = time.perf_counter()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._obey_signals()

    def on_train_epoch_start(self) -> None:
        self._batch_ended = time.perf_counter()  # evaluation and checkpoints are not training time

    def on_train_epoch_end(self) -> None:
        self._obey_signals()  # that came during evaluation

    def on_train_end(self) -> None:
        self._log_update()  # the last one is logged, whatever `log_every_n_steps`
        self._obey_signals()
        if getattr(self._datamodule, "evaluating", False):
            self.log_evaluation([episode._asdict() for episode in self._datamodule.end_evaluation()])

    def learn(self, batch: Any) -> dict[str, Tensor | float]:
        """`update` for each part of what the datamodule gave, here one rollout, and count its env steps."""
        env_steps = self.count_env_steps(batch)
        lag = self.updates_done - float(batch["policy_version"].double().mean())
        metrics = self.checked_update(batch)
        self.env_steps.add_(env_steps)
        self.updates.add_(1)
        return {**metrics, "rollout/policy_lag": lag}

    def training_step(self, batch: Any, batch_idx: int) -> None:
        started, env_steps = time.perf_counter(), self.env_steps_done
        skipped = self.skipped_updates
        self._grad_norms.clear()
        self._follow_schedules()
        metrics = self.learn(batch)
        if self._grad_norms:
            metrics["optim/grad_norm"] = torch.stack(self._grad_norms).mean()
        if distributed.world_size() > 1:
            means = distributed.rank_mean(torch.tensor([float(v) for v in metrics.values()], device=self.device))
            metrics = dict(zip(metrics, means.tolist()))
        if self.skipped_updates > skipped:  # the steps that were taken have finite means
            metrics = {name: value for name, value in metrics.items() if math.isfinite(value)}
        metrics["optim/skipped_updates"] = self.skipped_updates
        metrics["optim/lr"] = self.optimizers(use_pl_optimizer=False).param_groups[0]["lr"]  # type: ignore[union-attr]
        datamodule = self._datamodule
        if hasattr(datamodule, "rollout_metrics"):
            metrics |= datamodule.rollout_metrics()
            metrics["rollout/env_runner_restarts"] = datamodule.ledger.restarts
            metrics["time/sample_s"] = datamodule.sample_s
        ended = time.perf_counter()
        metrics["time/update_s"] = ended - started - getattr(batch, "waited_s", 0.0)
        metrics["time/env_steps_per_s"] = (self.env_steps_done - env_steps) / max(ended - self._batch_ended, 1e-9)
        self._batch_ended = ended
        self._publish(metrics)

    # --- Lightning's hooks: evaluation --------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        self._evaluated = []

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self._add_episode(batch)

    def on_validation_epoch_end(self) -> None:
        self._log_episodes("eval")

    def on_test_epoch_start(self) -> None:
        self._evaluated = []

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self._add_episode(batch)

    def on_test_epoch_end(self) -> None:
        self._log_episodes("test")

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        """The recorded episode itself."""
        return batch

    def log_evaluation(self, episodes: list[dict[str, Any]]) -> None:
        """Log an evaluation that went on beside training and is not this validation's."""
        values = self._summarize(episodes, "eval")
        self.trainer.callback_metrics.update({name: torch.tensor(value) for name, value in values.items()})
        self._log_evaluation(values)

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
        check_nameable(self.network)
        state = {"rng": rng_state(), "generator": self.generator.get_state(), "algorithm": self.rank_state()}
        datamodule = self._datamodule
        if hasattr(datamodule, "rank_state"):
            state["data"] = datamodule.rank_state(weights_only="optimizer_states" not in checkpoint)
        checkpoint[SECTION] = {
            "format": FORMAT,
            "algorithm": type(self).__name__,
            "policy": self.policy.describe(),
            "env": env.to_dict() if isinstance(env := getattr(datamodule, "env", None), EnvConfig) else None,
            "skipped_updates": self.skipped_updates,
            "ranks": _gather(state),
        }
        arguments = checkpoint.setdefault(self.CHECKPOINT_HYPER_PARAMS_KEY, {})
        arguments["spec"] = self.spec.to_dict()
        arguments["network"] = describe_network(self.network)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        upgrade(checkpoint)
        found = section(checkpoint)
        self._check_fits(found, checkpoint["state_dict"])
        if self._trainer is not None and self._trainer.training:
            self._resume = found
            if hasattr(self._datamodule, "load_ranks"):
                states = [rank["data"] for rank in found["ranks"]]
                self._datamodule.load_ranks(states, self.global_rank, self.trainer.world_size)

    def _check_fits(self, found: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> None:
        algorithm, policy_class = found["algorithm"], found["policy"]["class"]
        if algorithm not in (ancestor.__name__ for ancestor in type(self).__mro__):
            raise CheckpointError(
                f"The checkpoint was written by {algorithm}: it cannot be loaded into {type(self).__name__}."
            )
        if policy_class != class_name(self.policy_class):
            raise CheckpointError(
                f"The checkpoint was written with policy_class={policy_class}, not {class_name(self.policy_class)}: "
                "pass that class."
            )
        there, here = found["policy"]["arguments"], self.policy.describe()["arguments"]
        for name in sorted(there.keys() & here.keys() - ONLY_INITIAL):
            if there[name] != here[name]:
                raise CheckpointError(
                    f"The checkpoint's policy was made with {name}={there[name]!r}, this one with {name}="
                    f"{here[name]!r}: use the options it was trained with."
                )
        shapes = {name: tuple(tensor.shape) for name, tensor in self.state_dict().items()}
        saved = {name: tuple(tensor.shape) for name, tensor in state_dict.items()}
        if shapes != saved:
            name = min(name for name in shapes.keys() | saved.keys() if shapes.get(name) != saved.get(name))
            there, here = (f"has shape {found[name]}" if name in found else "is missing" for found in (saved, shapes))
            raise CheckpointError(
                f"The checkpoint does not fit this {algorithm}: {name} {there} in the file and {here} here. Use the "
                "environment, network and options it was trained with."
            )

    def rank_state(self) -> dict[str, Any]:
        """What is this rank's own and no weight, in plain data."""
        return {}

    def load_rank_state(self, state: Mapping[str, Any]) -> None:
        """Go on from what `rank_state` returned."""

    # ------------------------------------------------------------------------------------------------------------

    @property
    def _datamodule(self) -> Any:
        return getattr(self.trainer, "datamodule", None)

    def _obey_signals(self) -> None:
        if self._interruption is not None:
            self._interruption.obey()

    def _note_step(self, loss: Tensor, norm: Tensor, optimizer: LightningOptimizer) -> bool:
        """Whether a step is to be taken: not if the gradient's norm is not finite, which is counted."""
        if math.isfinite(norm):
            self._skipped_in_a_row.pop(optimizer, None)
            self._grad_norms.append(norm)
            return True
        self.skipped_updates += 1
        self._skipped_in_a_row[optimizer] = self._skipped_in_a_row.get(optimizer, 0) + 1
        wrong = (n for n, p in self.named_parameters() if p.grad is not None and not p.grad.isfinite().all())
        self._not_finite = f"The gradient of {next(wrong, 'all parameters')}" if loss.isfinite() else "The loss"
        return False

    def _save_batch(self, batch: TensorDict) -> None:
        name = f"nonfinite_batch_{self.env_steps_done}_rank{self.global_rank}.pt"
        self._saved_batches.append(rescue.save_batch(batch, rescue.log_folder(self.trainer) / name))
        rank_zero_warn(
            f"{self._not_finite} is not finite after {self.env_steps_done} env steps: the optimizer step was skipped. "
            f"Batch: {self._saved_batches[-1]}"
        )

    def _follow_schedules(self) -> None:
        """Set scheduled options, and the optimizer's learning rate, to their values now."""
        env_steps, budget = self.env_steps_done, self.max_env_steps
        for part in self.children():
            if isinstance(part, Scheduled):
                part.follow(env_steps, budget)
        if self.lr is not None and self.trainer.optimizers:
            for group in self.trainer.optimizers[0].param_groups:
                group["lr"] = self.lr.at(env_steps, budget) * group.get("lr_scale", 1.0)

    def _publish(self, metrics: dict[str, Any]) -> None:
        """Hand metrics to loggers (against env steps), callbacks and the progress bar.

        Not by `self.log`, which costs 0.45 ms per key: 15 % of a small PPO update.
        """
        trainer: Any = self.trainer
        env_steps = self.env_steps_done
        values = {name: float(value) for name, value in metrics.items()} | {"env_steps": float(env_steps)}
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in values.items()})
        shown = ("rollout/return_mean", "time/env_steps_per_s")
        trainer.progress_bar_metrics.update({name: values[name] for name in shown if name in values})
        self._unlogged = values
        batches = trainer.fit_loop.total_batch_idx + 1
        if trainer.loggers and (batches % trainer.log_every_n_steps == 0 or trainer.should_stop):
            self._log_update()

    def _log_update(self) -> None:
        """Hand the last update's metrics to the loggers, and have them written."""
        values, self._unlogged = self._unlogged, None
        if values is not None:
            self._log(values, int(values["env_steps"]))

    def _log(self, values: dict[str, float], env_steps: int) -> None:
        for logger in self.trainer.loggers:
            logger.log_metrics(values, step=env_steps)
            logger.save()

    def _add_episode(self, episode: dict[str, Any]) -> None:
        if episode:  # empty: a rank whose share is one episode smaller
            self._evaluated.append(episode)

    def _summarize(self, episodes: list[dict[str, Any]], prefix: str) -> dict[str, float]:
        """The metrics of all ranks' episodes."""
        ranks = _gather((episodes, getattr(self._datamodule, "lost_episodes", 0)))
        metrics = summarize([episode for part, _ in ranks for episode in part], sum(lost for _, lost in ranks))
        return {f"{prefix}/{name}": value for name, value in metrics.items()}

    def _log_episodes(self, prefix: str) -> None:
        values = self._summarize(self._evaluated, prefix)
        in_fit = self.trainer.state.fn == "fit"
        with warnings.catch_warnings():
            # `trainer.validate` returns what was logged, whether there is a logger or not.
            warnings.filterwarnings("ignore", message=".*but have no logger configured.*")
            # Every rank has all episodes: nothing is left to reduce, but Lightning asks for the flag.
            self.log_dict(values, logger=not in_fit, sync_dist=dist.is_available() and dist.is_initialized())
        if in_fit and not self.trainer.sanity_checking:
            self._log_evaluation(values)

    def _log_evaluation(self, values: dict[str, float]) -> None:
        """Hand an evaluation's metrics to the loggers, at the env steps of the policy that played."""
        shown = "eval/return_mean"
        self.trainer.progress_bar_metrics.update({shown: values[shown]} if shown in values else {})
        env_steps = getattr(self._datamodule, "evaluated_at", self.env_steps_done)
        self._log(values | {"env_steps": float(env_steps)}, env_steps)


def clip_gradients(grads: list[Tensor], norms: Sequence[Tensor], norm: Tensor, bound: float, by: str) -> None:
    """Bound gradients in place, whose own norms and global norm are known.

    As `nn.utils.clip_grad_norm_` and `clip_grad_value_` do, in half their time: they sort gradients by device first.
    """
    if by == "value":
        torch._foreach_clamp_min_(grads, -bound)
        torch._foreach_clamp_max_(grads, bound)
    elif by == "norm":
        torch._foreach_mul_(grads, [factor(each, bound) for each in norms])
    else:
        torch._foreach_mul_(grads, factor(norm, bound))


def _same_spaces(a: EnvSpec, b: EnvSpec) -> bool:
    return (a.observation_space, a.action_space) == (b.observation_space, b.action_space)


def _seed_for(seed: int, *key: int) -> int:
    return int(np.random.SeedSequence(seed, spawn_key=key).generate_state(1)[0])


def _gather(value: Any) -> list[Any]:
    """Every rank's `value`, in the order of the ranks."""
    if distributed.world_size() == 1:
        return [value]
    values: list[Any] = [None] * distributed.world_size()
    dist.all_gather_object(values, value)
    return values
