"""Whose random numbers are drawn: what plays or is thrown away costs training none, and losses draw their own."""

import functools
from typing import Any

import gymnasium as gym
import lightning as L
import numpy as np
import pytest
import torch
from gymnasium import spaces

from lit_rl import MLP, PPO, LSTMNetwork, Policy, RolloutDataModule
from lit_rl.distributions import distribution_for
from lit_rl.evaluation.options import Evaluation
from lit_rl.spec import EnvSpec

SPEC = EnvSpec("Test", spaces.Box(-1, 1, (3,), np.float32), spaces.Box(-2, 2, (2,), np.float32))
SIZES = {"num_envs_per_env_runner": 2, "rollout_length": 16, "rollouts_per_epoch": 2, "max_env_steps": 192, "seed": 3}
MEMORY = functools.partial(LSTMNetwork, hidden_size=8)


class NoisyLoss(PPO):
    """A loss of a user's own, which draws from torch's global generator."""

    def loss(self, minibatch: Any) -> Any:
        loss, terms = super().loss(minibatch)
        return loss + 0.1 * (self.policy.log_std * torch.randn(1)).sum(), terms


class Break(L.Callback):
    """Writes a checkpoint after three batches, and ends the run there."""

    def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
        if trainer.fit_loop.total_batch_idx + 1 == 3:
            trainer.save_checkpoint("broken.ckpt")
            raise KeyboardInterrupt


def weights(make_trainer, make=PPO, ckpt_path=None, callbacks=(), evaluate=False, before=0, **options) -> dict:
    """After a fit that begins with torch's global generator at `before`."""
    data = RolloutDataModule("Pendulum-v1", evaluation=Evaluation(episodes=1), **SIZES)
    algorithm = make(minibatch_size=16, num_epochs=2, entropy_coef=0.01, **options)
    trainer = make_trainer(limit_val_batches=1.0 if evaluate else 0, callbacks=list(callbacks))
    torch.manual_seed(before)
    if callbacks:
        with pytest.raises(SystemExit):
            trainer.fit(algorithm, data, ckpt_path=ckpt_path)
    else:
        trainer.fit(algorithm, data, ckpt_path=ckpt_path)
    return algorithm.state_dict()


CASES = [
    functools.partial(weights, squash_actions=True),
    functools.partial(weights, squash_actions=True, network=MEMORY),
    functools.partial(weights, make=NoisyLoss),
]


@pytest.mark.parametrize("run", CASES)
def test_evaluation_leaves_training_as_it_is_to_the_last_bit(make_trainer, run) -> None:
    without, with_ = run(make_trainer), run(make_trainer, evaluate=True)
    assert all(torch.equal(without[name], with_[name]) for name in without)


@pytest.mark.parametrize("run", CASES)
def test_a_resumed_run_is_the_unbroken_one_to_the_last_bit(make_trainer, run) -> None:
    unbroken = run(make_trainer)
    run(make_trainer, callbacks=[Break()])
    resumed = run(make_trainer, ckpt_path="broken.ckpt", before=7)
    assert all(torch.equal(unbroken[name], resumed[name]) for name in unbroken)


def test_the_noise_of_the_squashed_entropy_is_the_algorithms_own(make_trainer) -> None:
    runs = [weights(make_trainer, squash_actions=True, before=before) for before in (0, 1)]
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


@pytest.mark.parametrize("network", [None, MLP, MEMORY])
def test_policies_made_of_a_description_draw_no_numbers(network) -> None:
    policy = Policy(SPEC, network=network)
    before = torch.get_rng_state()
    Policy.from_description(policy.describe())
    policy.maker()()
    policy.acting_copy()
    assert torch.equal(torch.get_rng_state(), before)


def test_noise_gives_each_part_of_a_joint_action_its_own_share() -> None:
    box = spaces.Box(-1, 1, (2,), np.float32)
    space: gym.Space = spaces.Dict({"a": box, "b": spaces.Discrete(3), "c": box})
    joint = distribution_for(space, squash=True)
    assert joint.num_noise == 4
    parameters, noise = torch.randn(5, joint.num_outputs + joint.num_scales), torch.randn(5, 4)
    action = {"a": torch.zeros(5, 2), "b": torch.zeros(5, dtype=torch.int64), "c": torch.zeros(5, 2)}
    part = distribution_for(box, squash=True)
    means, stds = parameters[:, [0, 1, 5, 6]], parameters[:, 7:]
    expected = sum(
        part.evaluate(torch.cat([means[:, at], stds[:, at]], -1), action["a"], noise[:, at])[1]
        for at in (slice(0, 2), slice(2, 4))
    )
    expected = expected + distribution_for(spaces.Discrete(3)).evaluate(parameters[:, 2:5], action["b"])[1]
    torch.testing.assert_close(joint.evaluate(parameters, action, noise)[1], expected)
