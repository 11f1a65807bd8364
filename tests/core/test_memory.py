"""Policies with memory: what the learner computes is what the runner did, and memory ends with its episode."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import gymnasium as gym
import lightning as L
import numpy as np
import pytest
import ray
import torch
from envs import CounterEnv, RepeatPreviousEnv, SampleEnv, counter_vector
from gymnasium import spaces
from helpers import greedy_return, make_runner, next_rollout
from lightning.pytorch.callbacks import EarlyStopping
from torch import Tensor, nn

from lit_rl import (
    MLP,
    PPO,
    Evaluation,
    GRUNetwork,
    ImpalaResNet,
    LSTMNetwork,
    MultiInput,
    NatureCNN,
    Policy,
    RolloutDataModule,
    load_policy,
    returns,
)
from lit_rl.envs.make import EnvConfig
from lit_rl.envs.wrappers import PreviousActionReward
from lit_rl.errors import OptionError
from lit_rl.networks import unroll
from lit_rl.networks.recurrent import _GRUSequence, _LSTMSequence
from lit_rl.policy.numpy_policy import NumpyPolicy
from lit_rl.rollout import next_values_with_memory, sequences
from lit_rl.runners.faults import FaultTolerance
from lit_rl.runners.fragment import Fragment
from lit_rl.runners.gathering import to_rollout
from lit_rl.runners.pool import MakeRunner
from lit_rl.runners.ray_pool import _RunnerActor
from lit_rl.runners.transport import Packed, pack_weights

BOX, IMAGE = spaces.Box(-1, 1, (3,)), spaces.Box(0, 255, (36, 40, 3), np.uint8)
NESTED = spaces.Dict(image=IMAGE, numbers=spaces.Tuple([BOX, spaces.Discrete(3)]))


class OwnMemory(nn.Module):
    """A running mean of what was seen, and a learned state at an episode's start: all that a user has to write."""

    output_size = 6

    def __init__(self, observation_space: gym.Space):
        super().__init__()
        self.linear = nn.Linear(observation_space.shape[0], 6)
        self.start = nn.Parameter(torch.randn(6))

    def initial_state(self, num_envs: int) -> Tensor:
        return self.start.expand(num_envs, 6)

    def forward(self, obs: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        state = 0.5 * state + 0.5 * torch.tanh(self.linear(obs))
        return state, state


NETWORKS = {
    "MLP": (BOX, MLP),
    "NatureCNN": (IMAGE, functools.partial(NatureCNN, hidden_size=16)),
    "ImpalaResNet": (spaces.Box(0, 255, (2, 9, 9), np.uint8), functools.partial(ImpalaResNet, filters=(4, 4))),
    "MultiInput": (NESTED, MultiInput),
    "LSTM": (BOX, LSTMNetwork),
    "GRU": (BOX, GRUNetwork),
    "LSTM of images": (IMAGE, functools.partial(LSTMNetwork, encoder=functools.partial(NatureCNN, hidden_size=16))),
    "GRU of parts": (NESTED, functools.partial(GRUNetwork, hidden_size=8)),
    "own memory": (BOX, OwnMemory),
}
EVERY_NETWORK = pytest.mark.parametrize("name", NETWORKS)


def make_policy(space: gym.Space, network: Any) -> Policy:
    torch.manual_seed(0)
    policy = Policy(EnvConfig(SampleEnv, env_kwargs(space)).spec(), network=network)
    nn.init.normal_(policy.head.weight)
    return policy


def env_kwargs(space: gym.Space) -> dict[str, Any]:
    return {"observation_space": space, "action_space": spaces.Discrete(3)}


@EVERY_NETWORK
def test_the_learner_computes_the_runners_features_and_log_probs(name: str) -> None:
    space, network = NETWORKS[name]
    policy = make_policy(space, network)
    runner = make_runner(EnvConfig(SampleEnv, env_kwargs(space)), policy)
    runner.sample()  # the next fragment begins inside of episodes
    seen: list[Tensor] = []
    if NumpyPolicy.of(policy) is None:
        policy.encoder.register_forward_hook(lambda _, __, out: seen.append(out[0] if isinstance(out, tuple) else out))
    rollout = next_rollout(runner)
    assert rollout["is_init"][:, 1:].sum() > 6  # episodes end inside of the fragment
    in_runner = torch.stack([features.clone() for features in seen], 1) if seen else None
    with torch.no_grad():
        features = policy.features(rollout)
        log_prob, _ = policy.evaluate(rollout, features)
    torch.testing.assert_close(log_prob, rollout["action_log_prob"], atol=1e-5, rtol=1e-5)
    if in_runner is not None:
        torch.testing.assert_close(features, in_runner, atol=1e-5, rtol=1e-5)
    assert log_prob.std() > 1e-3


class SeveralActors:
    """What each would be in a process of its own, in one: starting one takes seconds."""

    def __init__(self, makers: dict[str, MakeRunner]):
        packed = {name: ray.cloudpickle.dumps(maker) for name, maker in makers.items()}
        self._actors = {name: _RunnerActor(maker, 0, 0, FaultTolerance(), "") for name, maker in packed.items()}

    def sample(self, name: str, acts_by: tuple[Packed, int, Sequence[float]]) -> Fragment:
        return self._actors[name].sample(acts_by)


@pytest.mark.ray
@pytest.mark.slow
def test_the_learner_computes_the_log_probs_of_runners_in_ray(ray_session: None) -> None:
    policies = {name: make_policy(space, network) for name, (space, network) in NETWORKS.items()}

    def maker(name: str) -> MakeRunner:
        (space, network), description = NETWORKS[name], policies[name].describe()
        env = EnvConfig(SampleEnv, env_kwargs(space))
        return lambda runner, incarnation, watchdog: make_runner(env, Policy.from_description(description, network))

    actors = ray.remote(SeveralActors).remote({name: maker(name) for name in NETWORKS})
    for version in range(2):
        weights = {name: ray.put((pack_weights(policy), version, (0.0,))) for name, policy in policies.items()}
        fragments = {name: actors.sample.remote(name, weights[name]) for name in NETWORKS}
        for name, policy in policies.items():
            rollout = to_rollout([ray.get(fragments[name])], copy=True)
            with torch.no_grad():
                log_prob, _ = policy.evaluate(rollout)
            torch.testing.assert_close(log_prob, rollout["action_log_prob"], atol=1e-5, rtol=1e-5)
            nn.init.normal_(policy.head.weight)  # for the second time
    ray.kill(actors)


@pytest.mark.parametrize("mode", ["SameStep", "NextStep", "Disabled"])
def test_memory_begins_anew_exactly_where_episodes_do(mode: str) -> None:
    env = EnvConfig(counter_vector, {"mode": mode}, vectorization="native")
    policy = Policy(env.spec(), network=Recorder)
    runner = make_runner(env, policy, length=13)
    for _ in range(3):
        rollout = next_rollout(runner)
        # The state counts the steps since the last start; the observation's last two digits say how many there were.
        mask = rollout.get("mask", torch.ones_like(rollout["is_init"]))
        _, after = policy.unroll(rollout["observation"], rollout["state"], rollout["is_init"])
        t = rollout["observation"][..., 0] % 100
        assert (after[..., 0] == t + 1)[mask].all()
        assert (rollout["is_init"] == (t == 0))[mask].all()


class Recorder(nn.Module):
    """Its state counts steps."""

    output_size = 1

    def __init__(self, observation_space: gym.Space):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def initial_state(self, num_envs: int) -> Tensor:
        return torch.zeros(num_envs, 1)

    def forward(self, obs: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return self.scale * state, state + 1


@pytest.mark.parametrize("network", [LSTMNetwork, GRUNetwork])
@pytest.mark.parametrize("starts", [0.0, 0.15, 1.0])
def test_unrolling_at_once_equals_step_by_step_with_its_gradients(network: Any, starts: float) -> None:
    torch.manual_seed(0)
    memory = network(BOX, hidden_size=5)
    obs, is_init, weight = torch.randn(6, 11, 3), torch.rand(6, 11) < starts, torch.randn(6, 11, 5)
    state = {key: torch.randn(6, 5) for key in memory.STATE}
    results = []
    for features in (unroll(memory, obs, state, is_init)[0], unroll(StepByStep(memory), obs, state, is_init)[0]):
        memory.zero_grad()
        (features * weight).sum().backward()
        results.append([features.detach(), *(p.grad.clone() for p in memory.parameters())])
    for at_once, step_by_step in zip(*results):
        torch.testing.assert_close(at_once, step_by_step, atol=1e-5, rtol=1e-4)


class StepByStep:
    """A network without its own way to unroll."""

    def __init__(self, network: Any):
        self.initial_state, self._network = network.initial_state, network

    def __call__(self, obs: Tensor, state: Any) -> Any:
        return self._network(obs, state)


def test_states_of_unrolling_at_once_are_those_of_step_by_step() -> None:
    for network in (LSTMNetwork, GRUNetwork):
        memory = network(BOX, hidden_size=5)
        obs, is_init, state = torch.randn(6, 11, 3), torch.rand(6, 11) < 0.2, memory.initial_state(6)
        _, states = unroll(memory, obs, state, is_init)
        _, expected = unroll(StepByStep(memory), obs, state, is_init)
        for name in memory.STATE:
            torch.testing.assert_close(states[name], expected[name], atol=1e-6, rtol=1e-5)


def test_written_out_gradients_are_those_of_finite_differences() -> None:
    torch.manual_seed(0)
    is_init = torch.rand(4, 3) < 0.3

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    lstm = (random(4, 3, 8), random(3, 2), random(3, 2), is_init, random(8, 2), random(8))
    assert torch.autograd.gradcheck(lambda *args: _LSTMSequence.apply(*args)[0], lstm)
    assert torch.autograd.gradcheck(
        _GRUSequence.apply, (random(4, 3, 6), random(3, 2), is_init, random(6, 2), random(6))
    )


def test_gradients_do_not_cross_an_episodes_start() -> None:
    memory = OwnMemory(BOX)
    obs = torch.randn(1, 4, 3, requires_grad=True)
    features, _ = unroll(memory, obs, memory.initial_state(1), torch.tensor([[False, False, True, False]]))
    features[:, 3].sum().backward()
    assert obs.grad[0].abs().sum(-1).ne(0).tolist() == [False, False, True, True]


def rollout_of_counters(policy: Policy, length: int = 16) -> Any:
    runner = make_runner(EnvConfig(CounterEnv), policy, length=length)
    runner.sample()
    return next_rollout(runner)


@pytest.mark.parametrize("burn_in", [0, 3, 4])
def test_sequences_continue_the_rollout_they_are_cut_from(burn_in: int) -> None:
    policy = Policy(EnvConfig(CounterEnv).spec(), network=Recorder)
    rollout = rollout_of_counters(policy)
    states = next_values_with_memory(rollout, policy.unroll, lambda x: x.sum(-1)).before
    batch = sequences(rollout, {"state": states}, 4, burn_in, "observation")
    assert batch.batch_size == (12,) and batch["observation"].shape == (12, 4, 1)
    if burn_in:
        batch["state"].fill_(1000.0)  # stale; burning in replaces it, but for the first sequence of each environment
        batch["state"][::4] = states[:, 0]
    features = policy.features(batch)
    assert torch.equal(features[..., 0], batch["observation"][..., 0] % 100)


def test_burnt_in_steps_carry_no_gradient() -> None:
    policy = Policy(EnvConfig(CounterEnv).spec(), network=GRUNetwork)
    rollout = rollout_of_counters(policy)
    states = next_values_with_memory(rollout, policy.unroll, lambda x: x.sum(-1).detach()).before
    batch = sequences(rollout, {"state": states}, 4, 4, "observation")
    batch["burn_in", "observation"].requires_grad_()
    policy.features(batch).sum().backward()
    assert batch["burn_in", "observation"].grad is None


def test_values_after_truncation_remember_the_episode() -> None:
    """Values by hand: the state counts an episode's steps, so V(s_t) = t, and V(final observation) its length."""
    policy = Policy(EnvConfig(CounterEnv).spec(), network=Recorder)
    rollout = rollout_of_counters(policy)
    value, next_value, *_ = next_values_with_memory(rollout, policy.unroll, lambda x: x.squeeze(-1).detach())
    t = rollout["observation"][..., 0] % 100
    assert torch.equal(value, t)
    assert torch.equal(next_value, t + 1)
    assert rollout["next", "truncated"].any() and rollout["next", "terminated"].any()
    next_ = rollout["next"]
    advantage, _ = returns.gae(
        next_["reward"], next_["terminated"], next_["done"], value, next_value, gamma=0.5, lambda_=0.0
    )
    expected = (t + 1) + 0.5 * (t + 1) * ~next_["terminated"] - t  # CounterEnv's reward is t + 1
    torch.testing.assert_close(advantage, expected)


@pytest.mark.slow
@pytest.mark.parametrize("network", [LSTMNetwork, GRUNetwork])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_memory_solves_repeating_the_previous_observation(
    make_trainer: Callable[..., L.Trainer], network: Any, seed: int
) -> None:
    data = RolloutDataModule(
        RepeatPreviousEnv, rollout_length=64, max_env_steps=25_000, rollouts_per_epoch=5, seed=seed
    )
    factory = functools.partial(network, hidden_size=16, encoder=functools.partial(MLP, hidden_sizes=[16]))
    algorithm = PPO(network=factory, lr=5e-3, num_epochs=8, gamma=0.5, minibatch_size=128, sequence_length=8)
    enough = EarlyStopping(
        "eval/return_mean", mode="max", stopping_threshold=7.9, patience=10**6, check_on_train_epoch_end=False
    )
    trainer = make_trainer(callbacks=[enough])
    trainer.fit(algorithm, data)
    data.evaluation = Evaluation(episodes=50)
    assert trainer.validate(algorithm, data, verbose=False)[0]["eval/return_mean"] > 7.5
    trainer.save_checkpoint("memory.ckpt")
    policy = load_policy("memory.ckpt", network=factory)
    env = RepeatPreviousEnv()
    for episode in range(5):
        (obs, _), state, total, done = env.reset(seed=episode), None, 0.0, False
        while not done:
            action, state = policy.act(obs, state)
            obs, reward, done, _, _ = env.step(action)
            total += reward
        assert total >= 7


@pytest.mark.slow
def test_without_memory_the_previous_observation_cannot_be_repeated() -> None:
    data = RolloutDataModule(
        RepeatPreviousEnv, rollout_length=64, max_env_steps=12_000, evaluation=Evaluation(episodes=50), seed=1
    )
    assert greedy_return(PPO(lr=5e-3, num_epochs=8, gamma=0.5), data) < 5.5


def test_the_previous_action_and_reward_are_observed_and_begin_at_zero() -> None:
    env = PreviousActionReward(RepeatPreviousEnv())
    obs, _ = env.reset(seed=0)
    assert env.observation_space.contains(obs)
    assert obs["previous_action"].tolist() == [0, 0] and obs["previous_reward"].tolist() == [0]
    first = obs["observation"]
    obs, *_ = env.step(1)
    assert obs["previous_action"].tolist() == [0, 1]
    obs, reward, *_ = env.step(first)
    assert reward == 1 and obs["previous_reward"].tolist() == [1]


def test_acting_with_a_batch_of_states_equals_acting_one_by_one() -> None:
    policy = make_policy(BOX, LSTMNetwork)
    obs = np.random.default_rng(0).standard_normal((4, 3, 3)).astype(np.float32)
    state, alone = None, [None] * 3
    for step in obs:
        actions, state = policy.act(step, state)
        singles = []
        for b in range(3):
            action, alone[b] = policy.act(step[b], alone[b])
            singles.append(action)
        assert actions.tolist() == singles
    state = policy.reset_state(state, [False, True, False])
    assert state["h"][1].sum() == 0 and state["h"][0].sum() != 0
    with pytest.raises(OptionError, match=r"'state/h': \(3, 64\).*expected.*for 2 observations"):
        policy.act(obs[0][:2], state)


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"sequence_length": 5}, "sequence_length=5: expected a divisor of rollout_length=16"),
        ({"minibatch_size": 4, "sequence_length": 8}, "minibatch_size=4: expected at least one sequence"),
        ({"burn_in": 17}, "burn_in=17: expected at most sequence_length=16"),
        ({"share_encoder": False}, "share_encoder=False: LSTMNetwork has memory"),
        ({"minibatch_size": 512}, "minibatch_size=512: expected at most the 128 rows"),
    ],
)
def test_options_of_memory_that_cannot_be_are_refused_before_training(
    make_trainer: Callable[..., L.Trainer], kwargs: dict[str, Any], words: str
) -> None:
    data = RolloutDataModule(CounterEnv, rollout_length=16, seed=0)
    with pytest.raises(OptionError, match=words):
        make_trainer().fit(PPO(**{"network": LSTMNetwork, "minibatch_size": 64} | kwargs), data)


def test_a_resumed_run_keeps_its_memory_and_its_options(make_trainer: Callable[..., L.Trainer]) -> None:
    network = functools.partial(LSTMNetwork, hidden_size=8)
    data = RolloutDataModule(CounterEnv, rollout_length=16, max_env_steps=512, rollouts_per_epoch=1, seed=0)
    algorithm, trainer = PPO(network=network, minibatch_size=64, burn_in=2), make_trainer(max_epochs=2)
    trainer.fit(algorithm, data)
    trainer.save_checkpoint("half.ckpt")
    restored = PPO.load_from_checkpoint("half.ckpt")
    assert restored.hp.burn_in == 2
    again = RolloutDataModule(CounterEnv, rollout_length=16, max_env_steps=512, rollouts_per_epoch=1, seed=0)
    resumed = PPO(network=network, minibatch_size=64, burn_in=2)
    make_trainer().fit(resumed, again, ckpt_path="half.ckpt")
    assert resumed.env_steps_done == 512
    obs = np.zeros((2, 1), np.float32)
    first, state = load_policy("half.ckpt").act(obs)
    expected, expected_state = algorithm.policy.act(obs)
    assert first.tolist() == expected.tolist()
    np.testing.assert_array_equal(state["c"], expected_state["c"])


class InPlace(OwnMemory):
    """Writes into the state it was given."""

    def initial_state(self, num_envs: int) -> Tensor:
        return torch.zeros(num_envs, 6)

    def forward(self, obs: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        features, after = super().forward(obs, state)
        with torch.no_grad():
            state.copy_(after)
        return features, after


def test_acting_leaves_the_callers_state_as_it_was() -> None:
    policy = make_policy(BOX, InPlace)
    _, state = policy.act(np.ones(3))
    before = state.copy()
    policy.act(np.ones(3), state)
    np.testing.assert_array_equal(state, before)


def test_a_single_state_is_started_afresh_by_a_bare_flag() -> None:
    policy = make_policy(BOX, LSTMNetwork)
    _, state = policy.act(np.ones(3))
    assert policy.reset_state(state, np.array([1]))["h"].sum() == 0
    assert policy.reset_state(state, True)["h"].sum() == 0
    assert policy.reset_state(state, False)["h"].sum() != 0
    with pytest.raises(OptionError, match=r"is_init has shape \(2,\): expected \(1,\)"):
        policy.reset_state(state, [True, False])


@pytest.mark.parametrize("layer", [nn.Dropout(0.5), nn.BatchNorm1d(3)], ids=str)
def test_layers_that_differ_in_training_are_refused(make_trainer: Callable[..., L.Trainer], layer: nn.Module) -> None:
    class Noisy(OwnNetwork):
        def __init__(self, observation_space: gym.Space):
            super().__init__(observation_space)
            self.layer = layer

    data = RolloutDataModule(SampleEnv, env_kwargs=env_kwargs(BOX), seed=0)
    with pytest.raises(OptionError, match=r"network: it holds (Dropout|BatchNorm).*LayerNorm"):
        make_trainer().fit(PPO(network=Noisy), data)


class OwnNetwork(nn.Module):
    output_size = 3

    def __init__(self, observation_space: gym.Space):
        super().__init__()

    def forward(self, obs: Tensor) -> Tensor:
        return obs


def test_policies_act_in_evaluation_mode() -> None:
    policy = make_policy(BOX, LSTMNetwork)
    assert policy.training
    make_runner(EnvConfig(SampleEnv, env_kwargs(BOX)), policy)
    assert not policy.training


def test_burn_in_without_memory_is_refused(make_trainer: Callable[..., L.Trainer]) -> None:
    with pytest.raises(OptionError, match=r"burn_in=2: expected a network with memory"):
        make_trainer().fit(PPO(burn_in=2), RolloutDataModule(CounterEnv, seed=0))
