"""The KL penalty's weight follows what the last pass measured."""

import functools

import pytest
import torch

from lit_rl import PPO, LSTMNetwork, RolloutDataModule

MEMORY = functools.partial(LSTMNetwork, hidden_size=8)


@pytest.mark.parametrize(
    ("network", "minibatch_size", "expected"),
    [(None, 30, 18), (None, 64, 8), (MEMORY, 30, 32), (MEMORY, 32, 16), (MEMORY, 48, 11), (MEMORY, 512, 1)],
)
def test_the_penalty_adapts_to_all_steps_of_the_last_pass(make_trainer, network, minibatch_size, expected) -> None:
    found: list[tuple[int, int]] = []

    class Watch(PPO):
        steps = 0

        def gradient_step(self, batch):
            self.steps += 1
            return super().gradient_step(batch)

        def adapt_kl_coef(self, kl_coef: torch.Tensor, terms: list[torch.Tensor]) -> None:
            found.append((len(terms), self.steps // self.hp.num_epochs))

    algorithm = Watch(minibatch_size=minibatch_size, num_epochs=2, kl_coef=0.1, network=network)  # 512 rows, L = 16
    sizes = {"num_envs_per_env_runner": 4, "rollout_length": 128, "max_env_steps": 512, "rollouts_per_epoch": 1}
    make_trainer(limit_val_batches=0).fit(algorithm, RolloutDataModule("CartPole-v1", seed=0, **sizes))
    assert found == [(expected, expected)]
