"""Pictures: ale-py's vector environment, what a rollout of them weighs, wrappers that make them small."""

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from envs import PictureEnv
from gymnasium import spaces
from helpers import greedy_return, make_runner, next_rollout

from lit_rl import PPO, Evaluation, ImpalaResNet, Policy, RolloutDataModule
from lit_rl.envs.make import EnvConfig
from lit_rl.evaluation.episodes import play
from lit_rl.rollout import next_observation
from lit_rl.trees import iterate


def pong(mode: str, **kwargs: Any) -> EnvConfig:
    """Pong in episodes of 30 frames, which end by truncation after eight steps or so."""
    small = {"autoreset_mode": mode, "max_num_frames_per_episode": 30, "noop_max": 0, "num_threads": 1} | kwargs
    return EnvConfig("ale_py:ALE/Pong-v5", small, vectorization="native")


def test_both_autoreset_modes_of_ale_give_the_same_transitions() -> None:
    """The true final picture is the next observation of an episode's last step, however ale-py hands it over."""
    same, next_ = (next_rollout(make_runner(pong(mode), num_envs=2, length=30)) for mode in ("SameStep", "NextStep"))
    assert same["next", "truncated"].sum() >= 4 and "mask" not in same.keys()  # noqa: SIM118
    mask = next_["mask"]
    assert mask.logical_not().sum() >= 4
    for b in range(2):
        # The first episode: the same actions, so the same pictures.
        end = int(same["next", "done"][b].nonzero()[0])
        assert int(next_["next", "done"][b].nonzero()[0]) == end
        assert torch.equal(same["action"][b, : end + 1], next_["action"][b, : end + 1])
        for name in ("observation", "action_log_prob"):
            torch.testing.assert_close(same[name][b, : end + 1], next_[name][b, : end + 1])
        assert torch.equal(next_observation(same)[b, : end + 1], next_observation(next_)[b, : end + 1])
        assert not torch.equal(next_observation(same)[b, end], same["observation"][b, end + 1])
        assert mask[b, : end + 1].all() and not mask[b, end + 1]
        assert next_["is_init"][b, end + 2] and same["is_init"][b, end + 1]


def test_evaluation_plays_whole_episodes_of_ales_vector_environment() -> None:
    for mode in ("SameStep", "NextStep"):
        env = pong(mode)
        lengths = {episode.length for episode in play(env, Policy(env.spec()), range(3))}
        assert lengths <= {7, 8}


def test_a_rollout_of_pictures_holds_them_once_as_bytes() -> None:
    env = EnvConfig("ale_py:ALE/Pong-v5", {"autoreset_mode": "SameStep", "num_threads": 1}, vectorization="native")
    rollout = next_rollout(make_runner(env, num_envs=8, length=64))
    obs = rollout["observation"]
    assert obs.shape == (8, 64, 4, 84, 84) and obs.dtype == torch.uint8
    storages = {leaf.untyped_storage().data_ptr(): leaf.untyped_storage().nbytes() for _, leaf in iterate(rollout)}
    assert sum(storages.values()) <= 1.05 * obs.numel()


def test_the_critic_is_given_a_bounded_number_of_pictures_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lit_rl.rollout.CHUNK", 16)
    env = pong("SameStep")
    rollout = next_rollout(make_runner(env, num_envs=2, length=20))
    algorithm = PPO(spec=env.spec().to_dict(), share_encoder=True)
    algorithm.configure_model()
    sizes: list[int] = []
    algorithm.policy.encoder.register_forward_hook(lambda _, args, __: sizes.append(len(args[0])))
    with torch.no_grad():
        value, next_value, _ = algorithm.values(rollout)
    assert value.shape == next_value.shape == (2, 20) and max(sizes) == 16 < sum(sizes)


def test_gymnasiums_wrappers_make_pictures_small() -> None:
    wrappers = [
        "gymnasium.wrappers:GrayscaleObservation",
        {"gymnasium.wrappers:ResizeObservation": {"shape": [36, 36]}},
        {"gymnasium.wrappers:MaxAndSkipObservation": {"skip": 2}},
        {"gymnasium.wrappers:FrameStackObservation": {"stack_size": 3}},
        {"gymnasium.wrappers:ClipReward": {"min_reward": -1, "max_reward": 1}},
    ]
    env = EnvConfig(PictureEnv, {"size": 48}, wrappers)
    assert env.spec().observation_space == spaces.Box(0, 255, (3, 36, 36), np.uint8)


def test_atari_preprocessing_of_gymnasium_is_a_wrapper_like_any_other() -> None:
    wrappers = [
        {"gymnasium.wrappers:AtariPreprocessing": {"frame_skip": 4}},
        {"gymnasium.wrappers:FrameStackObservation": {"stack_size": 4}},
    ]
    env = EnvConfig("ale_py:ALE/Pong-v5", {"frameskip": 1}, wrappers)
    rollout = next_rollout(make_runner(env, num_envs=2, length=8))
    assert rollout["observation"].shape == (2, 8, 4, 84, 84) and rollout["observation"].dtype == torch.uint8


@pytest.mark.slow
@pytest.mark.parametrize("channels_first", [False, True])
def test_ppo_learns_to_tell_pictures_apart(channels_first: bool) -> None:
    data = RolloutDataModule(
        PictureEnv,
        env_kwargs={"channels_first": channels_first},
        rollout_length=32,
        max_env_steps=2_560,
        evaluation=Evaluation(episodes=40),
        seed=0,
    )
    assert greedy_return(PPO(lr=1e-3, network=small_resnet, num_epochs=4), data) > 0.95


def small_resnet(observation_space: gym.Space) -> ImpalaResNet:
    return ImpalaResNet(observation_space, filters=(8,), hidden_size=32)
