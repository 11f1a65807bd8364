"""time/sample_s is the last batch's own."""

import pytest

from lit_rl import DQN, ReplayDataModule

SIZES = {"learning_starts": 20, "batch_size": 8, "buffer_size": 200, "env_steps_per_batch": 50, "batches_per_epoch": 4}


@pytest.mark.parametrize("max_steps", [25, 55, 120])
def test_a_stream_that_ends_by_max_steps_says_how_long_it_waited(make_trainer, max_steps: int) -> None:
    waited: list[float] = []

    class Watch(DQN):
        def learn_from(self, batch):
            metrics = super().learn_from(batch)
            waited.append(batch.waited_s)
            return metrics

    data = ReplayDataModule("CartPole-v1", seed=0, **SIZES)
    trainer = make_trainer(limit_val_batches=0, max_steps=max_steps)
    trainer.fit(Watch(), data)
    assert trainer.global_step == max_steps
    assert data.sample_s == waited[-1] > 0
