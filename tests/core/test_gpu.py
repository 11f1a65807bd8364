"""On a GPU: the learner there, env runners on the CPU. Skipped without one."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from envs import PictureEnv

from lit_rl import DQN, PPO, SAC, LSTMNetwork, Rainbow, ReplayDataModule, RolloutDataModule, load_policy

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
REPLAY = {
    "buffer_size": 500,
    "batch_size": 32,
    "learning_starts": 64,
    "update_to_data": 0.25,
    "env_steps_per_batch": 100,
}
CASES: dict[str, Callable[[], tuple[Any, Any]]] = {
    "PPO": lambda: (
        PPO(minibatch_size=32, normalize_observations=True, normalize_returns=True),
        RolloutDataModule("CartPole-v1", rollout_length=16, max_env_steps=512, seed=0),
    ),
    "PPO with memory": lambda: (
        PPO(minibatch_size=32, network=LSTMNetwork),
        RolloutDataModule("CartPole-v1", rollout_length=16, max_env_steps=512, seed=0),
    ),
    "PPO on pictures": lambda: (
        PPO(minibatch_size=32),
        RolloutDataModule(PictureEnv, env_kwargs={"size": 36}, rollout_length=16, max_env_steps=512, seed=0),
    ),
    "DQN": lambda: (DQN(), ReplayDataModule("CartPole-v1", max_env_steps=300, seed=0, **REPLAY)),
    "Rainbow": lambda: (Rainbow(), ReplayDataModule("CartPole-v1", max_env_steps=300, seed=0, **REPLAY)),
    "DQN with memory": lambda: (
        DQN(network=LSTMNetwork, sequence_length=8, burn_in=4),
        ReplayDataModule("CartPole-v1", max_env_steps=300, seed=0, **REPLAY),
    ),
    "SAC": lambda: (SAC(), ReplayDataModule("Pendulum-v1", max_env_steps=300, seed=0, **REPLAY)),
}


@pytest.mark.parametrize("name", list(CASES))
def test_the_learner_works_on_a_gpu_and_its_policy_on_the_cpu(name: str, make_trainer: Callable) -> None:
    module, data = CASES[name]()
    trainer = make_trainer(accelerator="gpu")
    trainer.fit(module, data)
    assert module.env_steps_done > 250 and trainer.callback_metrics["eval/episodes"] == 10
    before = {key: value.cpu().clone() for key, value in module.state_dict().items()}
    assert all(torch.isfinite(value).all() for value in before.values() if value.is_floating_point())
    trainer.save_checkpoint("gpu.ckpt")
    policy = load_policy("gpu.ckpt")
    assert all(parameter.device.type == "cpu" for parameter in policy.parameters())
    again, data = CASES[name]()
    data.max_env_steps *= 2
    make_trainer(accelerator="gpu").fit(again, data, ckpt_path="gpu.ckpt")
    assert again.env_steps_done > module.env_steps_done


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
def test_env_runners_stay_on_the_cpu(make_trainer: Callable) -> None:
    data = RolloutDataModule("CartPole-v1", num_env_runners=1, prefetch=1, rollout_length=16, max_env_steps=512, seed=0)
    module = PPO(minibatch_size=32)
    make_trainer(accelerator="gpu").fit(module, data)
    assert module.env_steps_done == 512 and data.ledger.delivered >= 512
