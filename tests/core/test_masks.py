"""Action masks: nothing illegal is ever chosen, and what is learned knows it."""

from collections.abc import Callable
from typing import Any

import gymnasium as gym
import lightning as L
import numpy as np
import pytest
import torch
from envs import MaskedEnv
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from helpers import make_runner, next_rollout

from lit_rl import PPO, LSTMNetwork, Policy, RolloutDataModule, load_policy
from lit_rl.envs.make import EnvConfig
from lit_rl.envs.wrappers import ActionMaskFromInfo
from lit_rl.errors import EnvError, SpaceError
from lit_rl.evaluation.episodes import play
from lit_rl.spec import EnvSpec

DISCRETE = spaces.Discrete(6, start=2)
MULTI = spaces.MultiDiscrete([3, 4], start=[0, 1])
NESTED = spaces.Dict(kind=DISCRETE, force=spaces.Box(-1, 1, (2,)), where=spaces.Tuple([MULTI, spaces.Discrete(3)]))
EVERY_ACTION = pytest.mark.parametrize("space", [DISCRETE, MULTI, NESTED], ids=["discrete", "multi", "nested"])


def sharp_policy(env: EnvConfig, **kwargs: Any) -> Policy:
    """Prefers some actions strongly, among them illegal ones."""
    torch.manual_seed(0)
    policy = Policy(env.spec(), **kwargs)
    torch.nn.init.normal_(policy.head.weight, std=3.0)
    return policy


@pytest.mark.slow
@EVERY_ACTION
def test_no_illegal_action_in_100_000_steps(space: gym.Space) -> None:
    env = EnvConfig(MaskedEnv, {"action_space": space})
    runner = make_runner(env, sharp_policy(env), 10, 10_000 if space is DISCRETE else 500)
    assert runner.sample().failures == ()  # the environment raises at the first one


@EVERY_ACTION
@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("network", [None, LSTMNetwork])
def test_evaluation_and_inference_choose_legal_actions(space: gym.Space, deterministic: bool, network: Any) -> None:
    env = EnvConfig(MaskedEnv, {"action_space": space})
    policy = sharp_policy(env, network=network)
    assert len(list(play(env, policy, range(8), deterministic=deterministic))) == 8
    alone = env.make()
    obs, _ = alone.reset(seed=3)
    state, done = None, False
    while not done:
        action, state = policy.act(obs, state, deterministic)
        obs, _, done, _, _ = alone.step(action)


@pytest.mark.parametrize("network", [None, LSTMNetwork])
def test_log_prob_and_entropy_are_those_of_the_legal_actions_alone(network: Any) -> None:
    env = EnvConfig(MaskedEnv, {"action_space": DISCRETE})
    policy = sharp_policy(env, network=network)
    rollout = next_rollout(make_runner(env, policy, 4, 32))
    features = policy.features(rollout)
    log_prob, entropy = policy.evaluate(rollout, features)
    logits = policy.head(features).masked_fill(rollout["observation", "action_mask"] == 0, -torch.inf)
    probs = torch.softmax(logits, -1)
    expected = torch.log(probs.gather(-1, rollout["action"].unsqueeze(-1)).squeeze(-1))
    torch.testing.assert_close(log_prob, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(log_prob, rollout["action_log_prob"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(entropy, torch.special.entr(probs).sum(-1), atol=1e-5, rtol=1e-5)
    (log_prob.sum() + entropy.sum()).backward()
    assert all(p.grad.isfinite().all() for p in policy.parameters())


def test_illegal_actions_get_no_gradient() -> None:
    policy = Policy(EnvConfig(MaskedEnv, {"action_space": DISCRETE}).spec())
    obs = {"observation": torch.zeros(1, 2), "action_mask": torch.tensor([[1, 0, 1, 0, 0, 0]])}
    log_prob, entropy = policy.evaluate({"observation": obs, "action": torch.tensor([0])})
    (log_prob + entropy).sum().backward()
    assert policy.head.bias.grad.ne(0).tolist() == [True, False, True, False, False, False]


def test_a_mask_that_allows_nothing_names_env_and_step() -> None:
    env = EnvConfig(MaskedEnv, {"action_space": DISCRETE, "nothing_at": 5})
    policy = sharp_policy(env)
    for collect in (make_runner(env, policy).sample, lambda: list(play(env, policy, range(3)))):
        with pytest.raises(EnvError, match=r"env=MaskedEnv.*environment 0 allows no action at step 5 of its episode"):
            collect()
    obs = {"observation": np.zeros(2), "action_mask": np.zeros(6)}
    with pytest.raises(EnvError, match=r"env=MaskedEnv.*allows no action"):
        policy.act(obs)


def masked_vector(num_envs: int) -> gym.vector.VectorEnv:
    makers = [lambda: MaskedEnv(DISCRETE, nothing_at=9)] * num_envs
    return SyncVectorEnv(makers, autoreset_mode=AutoresetMode.NEXT_STEP)


def test_a_final_observation_may_allow_nothing() -> None:
    for env in (
        EnvConfig(MaskedEnv, {"action_space": DISCRETE, "nothing_at": 9}),
        EnvConfig(masked_vector, {}, (), "native"),
    ):
        policy = sharp_policy(env)
        rollout = next_rollout(make_runner(env, policy, length=40))
        log_prob, entropy = policy.evaluate(rollout)
        assert log_prob.isfinite().all() and entropy.isfinite().all()
        assert len(list(play(env, policy, range(3)))) == 3


@pytest.mark.parametrize(
    ("mask", "action", "words"),
    [
        (spaces.MultiBinary(3), spaces.Discrete(4), ["MultiBinary(3)", "4 numbers"]),
        (spaces.MultiBinary(2), spaces.Box(-1, 1, (2,)), ["none", "Box"]),
        (spaces.MultiBinary(7), spaces.MultiDiscrete([3, 3]), ["6 numbers"]),
        (spaces.Dict(x=spaces.MultiBinary(2)), spaces.Dict(y=spaces.Discrete(2)), ["action_mask['x']", "none"]),
    ],
)
def test_a_mask_that_does_not_fit_the_action_is_refused(mask: gym.Space, action: gym.Space, words: list[str]) -> None:
    space = spaces.Dict(observation=spaces.Box(-1, 1, (2,)), action_mask=mask)
    with pytest.raises(SpaceError) as error:
        Policy(EnvSpec("e", space, action))
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize("illegal", [-1, 0])
def test_only_numbers_above_0_make_an_action_legal(illegal: int) -> None:
    space = spaces.Dict(observation=spaces.Box(-1, 1, (2,)), action_mask=spaces.Box(-1, 1, (6,), np.int8))
    policy = Policy(EnvSpec("e", space, DISCRETE))
    mask = np.full((64, 6), illegal, np.int8)
    assert policy.blocked({"action_mask": mask}).all()
    mask[:, 2] = 1
    obs = {"observation": np.zeros((64, 2), np.float32), "action_mask": mask}
    assert (policy.sample(obs, None)[0] == 2).all()
    batch = {"observation": {key: torch.from_numpy(x) for key, x in obs.items()}, "action": torch.full((64,), 2)}
    assert (policy.evaluate(batch)[0] == 0).all()


def test_the_encoder_does_not_see_the_mask() -> None:
    policy = Policy(EnvConfig(MaskedEnv, {"action_space": DISCRETE}).spec())
    assert policy.input_space == spaces.Box(-1, 1, (2,))
    wider = spaces.Dict(action_mask=spaces.MultiBinary(2), b=spaces.Discrete(2), a=spaces.Box(-1, 1, (2,)))
    policy = Policy(EnvSpec("e", wider, spaces.Discrete(2)))
    assert set(policy.input_space.spaces) == {"a", "b"}


def test_a_mask_in_info_is_moved_into_the_observation() -> None:
    env = EnvConfig("Taxi-v3", wrappers=["lit_rl.envs.wrappers:ActionMaskFromInfo"])
    taxi = env.make()
    obs, info = taxi.reset(seed=0)
    assert obs["action_mask"].tolist() == info["action_mask"].tolist() and taxi.observation_space.contains(obs)
    rollout = next_rollout(make_runner(env, sharp_policy(env), length=300))
    mask = rollout["observation", "action_mask"]
    assert (mask == 0).any()
    assert mask.gather(-1, rollout["action"].unsqueeze(-1)).all()


def test_a_mask_that_info_does_not_hold_is_named() -> None:
    with pytest.raises(EnvError, match=r"info has no 'action_mask'.*key="):
        ActionMaskFromInfo(gym.make("CartPole-v1")).reset()
    with pytest.raises(EnvError, match=r"expected a Discrete.*Box"):
        ActionMaskFromInfo(gym.make("Pendulum-v1"))


@pytest.mark.slow
@pytest.mark.parametrize("space", [DISCRETE, NESTED], ids=["discrete", "nested"])
def test_ppo_learns_which_of_the_legal_actions_are_good(
    make_trainer: Callable[..., L.Trainer], space: gym.Space
) -> None:
    data = RolloutDataModule(
        MaskedEnv, env_kwargs={"action_space": space}, rollout_length=64, max_env_steps=10_000, seed=0
    )
    algorithm, trainer = PPO(lr=3e-3, num_epochs=6, gamma=0.5), make_trainer(enable_checkpointing=True)
    trainer.fit(algorithm, data)
    # Random legal actions give 3 of 9, always a good one where one is legal about 6.8.
    assert trainer.validate(algorithm, data, verbose=False)[0]["eval/return_mean"] > 5.5
    trainer.save_checkpoint("masked.ckpt")
    policy = load_policy("masked.ckpt")
    env = MaskedEnv(space)
    obs, _ = env.reset(seed=0)
    for _ in range(9):
        obs, *_ = env.step(policy.act(obs)[0])
