"""What options and classes are called in RLlib, Stable-Baselines3 and CleanRL, for hints in messages.

Light: it names the classes that have an option, and imports them when it is asked.
"""

from collections.abc import Iterable

import lit_rl
from lit_rl.errors import did_you_mean

# By a name of theirs, ours that may be meant, the likeliest first.
OPTIONS: dict[str, tuple[str, ...]] = {
    "actor_learning_rate": ("actor_lr",),
    "alpha": ("initial_alpha", "min_q_weight"),
    "alpha_threshold": ("lagrangian_thresh",),
    "anneal_lr": ("lr_schedule",),
    "batch_size": ("minibatch_size",),
    "bc_logstd_coeff": ("entropy_coef",),
    "bc_steps": ("bc_iters",),
    "buffer_capacity": ("buffer_size",),
    "capacity": ("buffer_size",),
    "clip_coef": ("clip",),
    "clip_param": ("clip",),
    "clip_range": ("clip",),
    "clip_range_vf": ("value_clip",),
    "clip_vloss": ("value_clip",),
    "clip_rewards": ("reward_clip",),
    "conservative_weight": ("min_q_weight",),
    "cql_alpha": ("min_q_weight",),
    "cql_lagrange": ("lagrangian",),
    "cql_n_actions": ("num_actions",),
    "cql_target_action_gap": ("lagrangian_thresh",),
    "cql_temp": ("temperature",),
    "critic_learning_rate": ("critic_lr",),
    "critics": ("num_critics",),
    "dataset_num_iters_per_learner": ("updates_per_batch",),
    "custom_model": ("network",),
    "double_q": ("double",),
    "ent_coef": ("entropy_coef", "initial_alpha"),
    "entropy_coeff": ("entropy_coef",),
    "env": ("evaluation",),
    "env_config": ("env_kwargs",),
    "env_id": ("env",),
    "environment": ("env",),
    "eval_freq": ("evaluation",),
    "evaluation_duration": ("evaluation", "episodes"),
    "evaluation_interval": ("evaluation",),
    "exploration_final_eps": ("epsilon",),
    "exploration_fraction": ("epsilon_schedule",),
    "exploration_initial_eps": ("epsilon_schedule",),
    "features_extractor_class": ("network",),
    "gradient_steps": ("update_to_data",),
    "grad_clip": ("max_grad_norm",),
    "hidden_sizes": ("network",),
    "initial_epsilon": ("epsilon_schedule",),
    "input_": ("paths",),
    "iql_tau": ("expectile",),
    "kl_coeff": ("kl_coef",),
    "lambda": ("gae_lambda", "lambda_"),
    "lambda_": ("gae_lambda",),
    "gae_lambda": ("lambda_",),
    "learning_rate": ("lr",),
    "model": ("network",),
    "model_config": ("network",),
    "n_action_samples": ("num_actions",),
    "n_critics": ("num_critics",),
    "n_envs": ("num_envs_per_env_runner",),
    "n_epochs": ("num_epochs",),
    "n_eval_episodes": ("evaluation", "episodes"),
    "n_quantiles": ("num_quantiles",),
    "n_steps": ("rollout_length", "max_updates", "n_step"),
    "n_steps_per_epoch": ("updates_per_batch",),
    "net_arch": ("network",),
    "num_env_runner": ("num_env_runners",),
    "num_envs": ("num_envs_per_env_runner",),
    "num_sgd_iter": ("num_epochs",),
    "num_steps": ("rollout_length",),
    "num_steps_sampled_before_learning_starts": ("learning_starts",),
    "num_workers": ("num_env_runners",),
    "polyak": ("tau",),
    "policy": ("policy_class", "network"),
    "policy_kwargs": ("network",),
    "prioritized_replay_alpha": ("priority_alpha",),
    "prioritized_replay_beta": ("priority_beta",),
    "q_lr": ("critic_lr",),
    "policy_lr": ("actor_lr",),
    "replay_buffer_config": ("buffer_size",),
    "rollout_fragment_length": ("rollout_length",),
    "rollout_steps": ("rollout_length",),
    "sgd_minibatch_size": ("minibatch_size",),
    "start_steps": ("learning_starts",),
    "target_network_frequency": ("target_update_interval",),
    "target_network_update_freq": ("target_update_interval",),
    "test_size": ("validation_fraction",),
    "timesteps": ("max_env_steps",),
    "total_steps": ("max_env_steps",),
    "total_timesteps": ("max_env_steps",),
    "train_batch_size": ("batch_size", "rollout_length"),
    "train_batch_size_per_learner": ("batch_size", "rollout_length"),
    "train_freq": ("update_to_data",),
    "twin_q": ("num_critics",),
    "update_epochs": ("num_epochs",),
    "use_lstm": ("network",),
    "vec_env": ("vectorization",),
    "vec_env_cls": ("vectorization",),
    "vf_coef": ("value_coef",),
    "vf_loss_coeff": ("value_coef",),
    "vf_share_layers": ("share_encoder",),
    "warmup_steps": ("learning_starts",),
    "weight_temp": ("beta",),
}
# What else is to be known where the meaning is not the same.
NOTES = {
    ("gradient_steps", "update_to_data"): "gradient_steps / train_freq",
    ("train_batch_size", "rollout_length"): "of each environment: theirs is that of all together",
    ("train_batch_size_per_learner", "rollout_length"): "of each environment: theirs is that of all together",
    ("train_freq", "update_to_data"): "gradient_steps / train_freq",
    ("vf_coef", "value_coef"): "of half the squared error: twice the number",
    ("vf_loss_coeff", "value_coef"): "of half the squared error: twice the number",
}
CLASSES = {
    "A2C": "PPO with num_epochs=1 and a minibatch_size of the whole rollout is A2C.",
    "A3C": "IMPALA and APPO learn from runners that do not wait for each other.",
    "C51": "DQN(distributional='categorical') is C51.",
    "DDPG": "SAC and TQC learn the same tasks.",
    "DoubleDQN": "DQN has double=True.",
    "MAPPO": "PPO(central_critic='state') in MultiAgent is MAPPO.",
    "MaskablePPO": "PPO reads action masks.",
    "QRDQN": "DQN(distributional='quantile') is QR-DQN.",
    "RecurrentPPO": "PPO(network=LSTMNetwork) has memory.",
    "TD3": "SAC and TQC learn the same tasks.",
}
_TRAINING = (
    "Training is the Trainer's: lightning.Trainer(max_epochs=-1).fit({0}(), RolloutDataModule('CartPole-v1', "
    "max_env_steps=100_000)), or ReplayDataModule for off-policy algorithms."
)
_ACTING = "Actions are the policy's: action, state = algorithm.policy.act(obs), or load_policy(checkpoint).act(obs)."
_SAVING = "Checkpoints are the Trainer's: trainer.save_checkpoint(path), or the callback ModelCheckpoint."
METHODS = {  # of an algorithm
    "learn": _TRAINING,
    "predict": _ACTING,
    "compute_single_action": _ACTING,
    "compute_actions": _ACTING,
    "get_action": _ACTING,
    "save": _SAVING,
    "save_to_path": _SAVING,
    "restore": "{0}.load_from_checkpoint(path) reads a checkpoint, Trainer.fit(..., ckpt_path=path) goes on from it.",
}
SOURCES = ("RolloutDataModule", "ReplayDataModule", "OfflineDataModule")
OWNERS = ("PPO", "IMPALA", "APPO", "DQN", "Rainbow", "SAC", "TQC", "MARWIL", "CQL", "IQL", "MultiAgent", "Evaluation")
OFF_POLICY = ("DQN", "SAC", "MARWIL", "IQL", "DreamerV3")  # which RolloutDataModule does not feed
OFFLINE = ("MARWIL", "CQL", "DiscreteCQL", "IQL")


def hint_on_class(name: str, known: Iterable[str]) -> str:
    """What a class that is not there may stand for: a sentence after a space, or "".

    Args:
        name: of the class.
        known: names of those that are there.
    """
    if name in CLASSES:
        return f" {CLASSES[name]}"
    return did_you_mean(name, known)


def owners(cls: type) -> list[type]:
    """The classes among whose options one that `cls` does not have is looked for, the likeliest first."""
    first = sum(issubclass(cls, tuple(getattr(lit_rl, name) for name in names)) for names in (OFF_POLICY, OFFLINE))
    return [getattr(lit_rl, name) for name in (*SOURCES[first:], *OWNERS)]
