"""Every environment that the installed gymnasium registers."""

from collections.abc import Callable

import gymnasium as gym
import pytest

from lit_rl import PPO, RolloutDataModule
from lit_rl.errors import LitRLError

TRAIN = {"CarRacing-v3", "HalfCheetah-v4", "HalfCheetah-v5", "Humanoid-v5", "LunarLander-v3", "Taxi-v3", "Blackjack-v1"}


def ids() -> list[str]:
    """All in all versions; of ale-py's games, which share one entry point, the first alone."""
    games = [name for name, spec in gym.registry.items() if str(spec.entry_point).startswith("ale_py")]
    return [name for name in gym.registry if name not in games[1:]]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_every_registered_environment_trains_one_update_or_is_refused_in_one_sentence(make_trainer: Callable) -> None:
    trained, refused = set(), {}
    for env in ids():
        data = RolloutDataModule(env, num_envs_per_env_runner=1, rollout_length=8, max_env_steps=8, seed=0)
        algorithm = PPO(minibatch_size=8, num_epochs=1)
        try:
            make_trainer(limit_val_batches=0).fit(algorithm, data)
        except LitRLError as error:
            refused[env] = str(error)
        else:
            assert (algorithm.updates_done, algorithm.env_steps_done) == (1, 8), env
            trained.add(env)
    assert len(trained) + len(refused) >= 60 and trained >= TRAIN, sorted(TRAIN - trained)
    for env, sentence in refused.items():
        assert sentence.startswith(f"env={env} could not be made: ") and "\n" not in sentence
        # What is not installed, or what gymnasium itself does not support any more: never what lit_rl cannot do.
        assert "ImportError: " in sentence or "ModuleNotFoundError: " in sentence, sentence
