"""A fit after a resumed one goes on: what a checkpoint brought is taken once."""

import pytest
import torch

from lit_rl import DQN, PPO, ReplayDataModule, RolloutDataModule

ROLLOUTS = {"num_envs_per_env_runner": 2, "rollout_length": 20, "rollouts_per_epoch": 1, "seed": 0}
REPLAY = {
    "num_envs_per_env_runner": 2, "rollout_length": 5, "env_steps_per_batch": 40, "batches_per_epoch": 1, "seed": 0,
    "learning_starts": 10, "batch_size": 8, "buffer_size": 400,
}  # fmt: skip


def make(kind: str):
    """An algorithm, its datamodule, and where the first observations of each fragment go."""
    if kind == "PPO":
        data, algorithm = RolloutDataModule("Pendulum-v1", **ROLLOUTS), PPO(minibatch_size=20, num_epochs=1)
    else:
        data, algorithm = ReplayDataModule("CartPole-v1", **REPLAY), DQN()
    seen, took = [], data.took

    def watch(fragments, *times) -> None:
        seen.append(fragments[0][1].rows.views()["observation"][:, 0].copy())
        took(fragments, *times)

    data.took = watch
    return algorithm, data, seen


@pytest.mark.parametrize("kind", ["PPO", "DQN"])
def test_a_second_fit_does_not_go_back_to_the_checkpoints_episodes(make_trainer, kind: str) -> None:
    algorithm, data, _ = make(kind)
    trainer = make_trainer(limit_val_batches=0, max_epochs=2)
    trainer.fit(algorithm, data)
    trainer.save_checkpoint("first.ckpt")
    algorithm, data, seen = make(kind)
    trainer = make_trainer(limit_val_batches=0, max_epochs=3)
    trainer.fit(algorithm, data, ckpt_path="first.ckpt")
    resumed, per_epoch = len(seen), len(seen)
    trainer.fit_loop.max_epochs = 5
    trainer.fit(algorithm, data)
    assert len(seen) == 3 * per_epoch and algorithm.env_steps_done == 5 * 40
    assert not (seen[resumed] == seen[0]).any()
    assert torch.isfinite(algorithm.policy.head.weight).all()
