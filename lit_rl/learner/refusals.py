"""What an algorithm cannot be asked for, said before anything starts."""

from typing import Any

from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    Callback,
    LearningRateFinder,
    ModelCheckpoint,
    ModelPruning,
    StochasticWeightAveraging,
)

from lit_rl.errors import OptionError
from lit_rl.spec import EnvSpec

PRECISIONS = ("32-true", "bf16-mixed")
# Callbacks that look at the networks in their `setup`, and what to do instead.
TOO_EARLY: dict[type[Callback], str] = {
    StochasticWeightAveraging: "Use EMAWeightAveraging or WeightAveraging.",
    ModelPruning: "Prune the policy after training, with torch.nn.utils.prune.",
}


def check_trainer(trainer: Any, algorithm: Any) -> None:
    """Refuse options of the Trainer that an algorithm has itself, or does not support.

    Raises:
        OptionError: naming the option, and what to set instead.
    """
    name = type(algorithm).__name__
    if trainer.gradient_clip_val is not None:
        raise OptionError(
            f"Trainer(gradient_clip_val={trainer.gradient_clip_val}): {name} clips gradients itself. Leave it out and "
            f"set {name}(max_grad_norm={trainer.gradient_clip_val})."
        )
    if trainer.accumulate_grad_batches != 1:
        own = f"{name}(minibatch_size" if "minibatch_size" in algorithm.hparams else "ReplayDataModule(batch_size"
        if algorithm.LEARNS_AGAIN:  # one gradient step per rollout
            own = "RolloutDataModule(num_envs_per_env_runner"
        raise OptionError(
            f"Trainer(accumulate_grad_batches={trainer.accumulate_grad_batches}): expected 1. Set a larger {own}=...) "
            "instead."
        )
    if trainer.precision not in PRECISIONS:
        raise OptionError(f"Trainer(precision={trainer.precision!r}): expected '32-true' or 'bf16-mixed'.")
    if algorithm.hparams.get("compile") and trainer.precision != "32-true":
        raise OptionError(f"compile=True: expected Trainer(precision='32-true'), got {trainer.precision!r}.")
    for callback in trainer.callbacks:
        for kind, instead in TOO_EARLY.items():
            if isinstance(callback, kind):
                raise OptionError(
                    f"Trainer(callbacks=[{type(callback).__name__}]): it copies the networks before training "
                    f"is set up, and {name}'s networks are made later. {instead}"
                )
        if isinstance(callback, LearningRateFinder | BatchSizeFinder):
            raise OptionError(
                f"Trainer(callbacks=[{type(callback).__name__}]): it tries values out by training with Lightning's own "
                f"optimisation, which {name} does not use. Set {name}'s options, or search with several runs."
            )
        if _saves_by("train_time_interval", callback):
            raise OptionError(
                f"ModelCheckpoint(train_time_interval=...): with {name}, which takes its gradient steps itself, "
                "Lightning saves nothing by it. Use every_n_epochs."
            )


def check_streams(trainer: Any, algorithm: Any) -> None:
    """Refuse options of the Trainer that do nothing if a Lightning batch has many gradient steps.

    Raises:
        OptionError: naming the option, and what to set instead.
    """
    for callback in trainer.callbacks:
        if _saves_by("every_n_train_steps", callback):
            raise OptionError(
                f"ModelCheckpoint(every_n_train_steps={callback._every_n_train_steps}): expected every_n_epochs with "
                f"{type(algorithm).__name__}. Lightning asks after a batch alone, which has many gradient steps. "
                "ReplayDataModule(batches_per_epoch=..., env_steps_per_batch=...) say how long an epoch is."
            )


def _saves_by(option: str, callback: Callback) -> bool:
    """Whether Lightning's own code is to save after batches by this option of `ModelCheckpoint`."""
    own = ModelCheckpoint.on_train_batch_end
    return (
        isinstance(callback, ModelCheckpoint)
        and type(callback).on_train_batch_end is own
        and bool(getattr(callback, f"_{option}"))
    )


def check_critic(algorithm: Any, spec: EnvSpec) -> None:
    """Refuse options that the critic cannot have: see `ActorCritic`.

    Raises:
        OptionError: naming the option.
    """
    hp, kind, network = algorithm.hparams, algorithm.hparams.central_critic, algorithm.critic_network
    if kind is not None and spec.central_space is None:
        raise OptionError(
            f"central_critic={kind!r}: env={spec.env_id} has one agent: expected an environment of several. "
            "Leave it out."
        )
    if kind is not None and hp.share_encoder:
        raise OptionError(
            f"share_encoder=True: with central_critic={kind!r} the critic sees more than the policy does. Leave it out."
        )
    if network is not None and algorithm.shares_encoder:
        raise OptionError("critic_network: expected none, since the critic shares the policy's network.")


def check_memory(algorithm: Any) -> None:
    """Refuse options that the policy's network, with memory or without, cannot have.

    Raises:
        OptionError: naming the option.
    """
    hp, policy = algorithm.hparams, algorithm.policy
    if hp.get("burn_in") and not policy.has_memory:
        raise OptionError(f"burn_in={hp.burn_in}: expected a network with memory, such as LSTMNetwork. Leave it out.")
    if policy.has_memory and hp.get("share_encoder") is False:
        raise OptionError(
            f"share_encoder=False: {type(policy.encoder).__name__} has memory, of which an env runner carries one. "
            "Leave it out: policy and critic then share the network."
        )


def check_box_options(algorithm: Any) -> None:
    """Refuse options of Box actions where actions are of another kind.

    Raises:
        OptionError: naming the option.
    """
    if algorithm.policy.distribution.num_scales:
        return
    for name in ("squash_actions", "log_std_init"):
        value = algorithm.hparams[name]
        if value:
            raise OptionError(
                f"{name}={value}: expected a Box action, got {algorithm.policy.spec.action_space}. Leave it out."
            )
