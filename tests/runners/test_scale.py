"""As many env runners as the learner can use."""

from types import SimpleNamespace
from typing import Any

import pytest

from lit_rl import PPO, RolloutDataModule, ScaleEnvRunners
from lit_rl.errors import OptionError


class Data:
    """Counts its env runners."""

    def __init__(self, num_env_runners: int):
        self.num_env_runners = num_env_runners

    def resize(self, num_env_runners: int) -> None:
        self.num_env_runners = num_env_runners


@pytest.mark.parametrize(
    ("waited", "worked", "counts"),
    [
        (0.9, 0.1, [2, 3, 3, 4, 4, 4, 4, 4]),  # one more every two batches, up to the most
        (0.05, 0.95, [2, 1, 1, 1, 1, 1, 1, 1]),
        (0.4, 0.6, [2] * 8),
    ],
)
def test_runners_are_added_and_taken_away_by_the_share_of_waiting(
    waited: float, worked: float, counts: list[int]
) -> None:
    scale, data = ScaleEnvRunners(max_env_runners=4, every_n_batches=2), Data(2)
    metrics = {"time/sample_s": waited, "time/update_s": worked}
    trainer: Any = SimpleNamespace(callback_metrics=metrics, datamodule=data)
    found = []
    for _ in counts:
        scale.on_train_batch_end(trainer, PPO())
        found.append(data.num_env_runners)
    assert found == counts


def test_what_cannot_be_is_refused(make_trainer) -> None:
    with pytest.raises(OptionError, match=r"remove_below=0.7: expected less than add_above=0.6"):
        ScaleEnvRunners(remove_below=0.7)
    with pytest.raises(OptionError, match="max_env_runners=1: expected a whole number of at least 2"):
        ScaleEnvRunners(min_env_runners=2, max_env_runners=1)
    trainer = make_trainer(callbacks=[ScaleEnvRunners()])
    with pytest.raises(OptionError, match="expected a datamodule with num_env_runners of at least 1"):
        trainer.fit(PPO(minibatch_size=8), RolloutDataModule("CartPole-v1", max_env_steps=2048))


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_a_run_grows_while_it_learns(make_trainer) -> None:
    data = RolloutDataModule(
        "CartPole-v1", num_env_runners=1, num_envs_per_env_runner=2, rollout_length=8, seed=0, max_env_steps=200_000
    )
    seen = set()

    class Watch(PPO):
        def update(self, batch: Any) -> dict:
            seen.add(len(batch))
            if len(seen) > 1:
                self.trainer.should_stop = True
            return super().update(batch)

    scale = ScaleEnvRunners(max_env_runners=2, every_n_batches=2, add_above=0.01, remove_below=0.0)
    make_trainer(limit_val_batches=0, callbacks=[scale]).fit(Watch(minibatch_size=16, num_epochs=1), data)
    assert seen == {2, 4} and data.num_env_runners == 2
    assert data.ledger.executed == data.ledger.delivered + data.ledger.discarded.total()
