"""Every transition of the counter environment, in every autoreset mode."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import gymnasium as gym
import helpers
import numpy as np
import pytest
import torch
from envs import CounterEnv, FailingEnv, SampleEnv, counter_vector
from gymnasium import spaces
from gymnasium.vector import AutoresetMode
from helpers import next_rollout
from tensordict import TensorDict

from lit_rl.envs.make import EnvConfig, autoreset_mode
from lit_rl.envs.vector import SyncVectorEnv
from lit_rl.errors import EnvError, OptionError, SpaceError
from lit_rl.evaluation.episodes import play
from lit_rl.policy import Policy
from lit_rl.rollout import next_observation, next_values
from lit_rl.runners.faults import FaultTolerance
from lit_rl.runners.fragment import Fragment
from lit_rl.runners.gathering import to_rollout
from lit_rl.spec import EnvSpec

NUM_ENVS, LENGTH, FRAGMENTS = 3, 7, 4
make_runner = functools.partial(helpers.make_runner, num_envs=NUM_ENVS, length=LENGTH)
CONFIGS = {
    "sync": EnvConfig(CounterEnv),
    "async": EnvConfig(CounterEnv, vectorization="async"),
    **{mode.value: EnvConfig(counter_vector, {"mode": mode.value}, vectorization="native") for mode in AutoresetMode},
}


def expected_rows(offset: int) -> Iterator[tuple[float, float, bool, bool, float, bool]]:
    """(obs, reward, terminated, truncated, next obs, is_init) of CounterEnv(offset), from its definition."""
    episode = 0
    while True:
        last = 2 + (episode + offset) % 3
        for t in range(last):
            ended = t + 1 == last
            odd = episode % 2 == 1
            yield 100 * episode + t, t + 1, ended and not odd, ended and odd, 100 * episode + t + 1, t == 0
        episode += 1


def check_rollouts(rollouts: list[TensorDict], offsets: list[int]) -> None:
    """Every real row is the next one that the definition gives, none is missing and none is there twice."""
    for b, offset in enumerate(offsets):
        expected = expected_rows(offset)
        for rollout in rollouts:
            mask = rollout.get("mask", torch.ones_like(rollout["is_init"]))
            following = next_observation(rollout)
            for t in range(rollout["is_init"].shape[1]):
                if not mask[b, t]:
                    assert rollout["next", "reward"][b, t] == 0 and not rollout["next", "done"][b, t]
                    assert not rollout["is_init"][b, t]
                    continue
                row = (
                    rollout["observation"][b, t].item(),
                    rollout["next", "reward"][b, t].item(),
                    rollout["next", "terminated"][b, t].item(),
                    rollout["next", "truncated"][b, t].item(),
                    following[b, t].item(),
                    rollout["is_init"][b, t].item(),
                )
                assert row == next(expected), (b, t)


@pytest.mark.parametrize("name", list(CONFIGS))
def test_every_transition_is_exact_in_every_autoreset_mode(name: str) -> None:
    runner = make_runner(CONFIGS[name])
    try:
        fragments = [runner.sample() for _ in range(FRAGMENTS)]
    finally:
        runner.close()
    offsets = list(range(NUM_ENVS)) if CONFIGS[name].vectorization == "native" else [0] * NUM_ENVS
    check_rollouts([to_rollout([fragment], copy=False) for fragment in fragments], offsets)
    check_episodes(fragments, offsets)


def check_episodes(fragments: list[Fragment], offsets: list[int]) -> None:
    """The finished episodes are those of the definition: length n, return 1 + ... + n."""
    found = sorted((e.length, e.return_) for fragment in fragments for e in fragment.episodes)
    steps = sum(f.rows.views().get("mask", np.ones((NUM_ENVS, LENGTH))).sum(1) for f in fragments)
    expected = []
    for offset, total in zip(offsets, steps):
        episode = 0
        while total >= (length := 2 + (episode + offset) % 3):
            expected.append((length, length * (length + 1) / 2))
            total -= length
            episode += 1
    assert found == sorted(expected)


def test_a_fragment_has_a_rollout_length_for_each_epsilon() -> None:
    whole, parts = (make_runner(EnvConfig("CartPole-v1"), num_envs=2, length=3) for _ in range(2))
    epsilons = [1.0, 0.0, 0.5, 0.0, 1.0]
    whole.set_version(7, epsilons)
    fragment, pieces = whole.sample(), []
    for epsilon in epsilons:
        parts.set_version(7, [epsilon])
        pieces.append(parts.sample())
    found = fragment.rows.views()
    assert fragment.policy_version == 7 and found["reward"].shape == (2, 15)
    for name in ("observation", "action", "action_log_prob", "reward", "terminated", "truncated", "is_init"):
        expected = np.concatenate([piece.rows.views()[name] for piece in pieces], 1)
        np.testing.assert_array_equal(found[name], expected, name)
    assert fragment.episodes == [episode for piece in pieces for episode in piece.episodes]
    assert (fragment.entry.start, fragment.entry.end, fragment.entry.delivered) == (0, 30, 30)


def test_masked_rows_are_exactly_the_reset_rows_of_next_step_mode() -> None:
    runner = make_runner(CONFIGS["NextStep"], num_envs=1, length=9)
    mask = runner.sample().rows.views()["mask"][0]
    # Episodes of 2, 3 and 4 steps, each followed by one reset row.
    assert mask.tolist() == [True, True, False, True, True, True, False, True, True]


def test_next_values_use_the_final_observation_at_an_episode_end() -> None:
    rollout = next_rollout(make_runner(CONFIGS["sync"]))
    value, next_value = next_values(rollout, lambda obs: obs.squeeze(-1))
    assert torch.equal(value, rollout["observation"].squeeze(-1))
    assert torch.equal(next_value, next_observation(rollout).squeeze(-1))
    assert rollout["final_observation"].shape[1] == 2  # episodes of 2 and 3 steps ended within 7


def test_fragments_with_different_numbers_of_finals_join() -> None:
    long, short = make_runner(CONFIGS["sync"]), make_runner(CONFIGS["sync"])
    first, second = long.sample(), short.sample()
    second = long.sample()
    rollout = to_rollout([first, second], copy=True)
    assert rollout.batch_size == (2 * NUM_ENVS,)
    apart = [next_observation(to_rollout([f], copy=False)) for f in (first, second)]
    assert torch.equal(next_observation(rollout), torch.cat(apart))


def test_own_sync_vector_env_equals_gymnasiums() -> None:
    makers = [functools.partial(gym.make, "CartPole-v1", max_episode_steps=12)] * 3
    ours = SyncVectorEnv(makers, autoreset_mode=AutoresetMode.SAME_STEP)
    theirs = gym.vector.SyncVectorEnv(makers, autoreset_mode=AutoresetMode.SAME_STEP)
    np.testing.assert_array_equal(ours.reset(seed=5)[0], theirs.reset(seed=5)[0])
    rng = np.random.default_rng(0)
    ended = 0
    for _ in range(60):
        action = rng.integers(0, 2, 3)
        a, b = ours.step(action), theirs.step(action)
        for x, y in zip(a[:4], b[:4]):
            np.testing.assert_array_equal(x, y)
            assert x.dtype == y.dtype
        assert a[4].keys() == b[4].keys()
        for i in np.flatnonzero(a[2] | a[3]):
            ended += 1
            np.testing.assert_array_equal(a[4]["final_obs"][i], b[4]["final_obs"][i])
    assert ended


def test_a_rollout_is_the_same_for_the_same_seed_and_another_for_another() -> None:
    config = EnvConfig("CartPole-v1")
    spec = config.spec()
    torch.manual_seed(0)
    policies = [Policy(spec) for _ in range(3)]
    for policy in policies[1:]:
        policy.load_state_dict(policies[0].state_dict())
    a, b, c = (
        make_runner(config, policy, length=50, seed=seed).sample().rows.views()["observation"]
        for policy, seed in zip(policies, (1, 1, 2))
    )
    assert np.array_equal(a, b) and not np.array_equal(a, c)


def test_environments_of_a_runner_have_different_seeds() -> None:
    observation = make_runner(EnvConfig("CartPole-v1")).sample().rows.views()["observation"]
    assert len(np.unique(observation[:, 0, 0])) == NUM_ENVS


def test_recorded_log_probs_are_the_policys() -> None:
    for env in ("CartPole-v1", "Pendulum-v1"):
        config = EnvConfig(env)
        policy = Policy(config.spec(), normalize_observations=True)
        policy.update_normalizer(torch.randn(100, *config.spec().observation_space.shape) * 3 + 1)
        rollout = next_rollout(make_runner(config, policy, length=40))
        log_prob, _ = policy.evaluate(rollout)
        torch.testing.assert_close(log_prob, rollout["action_log_prob"], atol=1e-5, rtol=0)


def test_info_metrics_are_read_at_the_last_step_in_every_mode() -> None:
    for name in ("sync", "NextStep", "Disabled"):
        runner = make_runner(CONFIGS[name], num_envs=1, length=12, info_metrics=["score", "absent"])
        episodes = runner.sample().episodes
        assert [e.info for e in episodes] == [{"score": 10.0 * k} for k in range(len(episodes))], name
        assert len(episodes) >= 3


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("raise", ["FailingEnv", "step", "ValueError", "the simulator fell over"]),
        ("nan reward", ["FailingEnv", "reward=nan at step 1 of episode 2 of environment 0"]),
        ("nan observation", ["FailingEnv", ": observation=[nan] at step 2 of episode 2 of environment 0"]),
        ("nan final observation", ["FailingEnv", ": observation=[nan] at step 3 of episode 1 of environment 0"]),
    ],
)
def test_a_bad_environment_is_named_with_what_it_did(how: str, words: list[str]) -> None:
    runner = make_runner(EnvConfig(FailingEnv, {"how": how}), num_envs=2, faults=FaultTolerance(max_restarts=0))
    with pytest.raises(EnvError) as caught:
        [runner.sample() for _ in range(2)]
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: EnvConfig("NoSuchEnv-v0").make(), EnvError, ["NoSuchEnv-v0", "not a registered"]),
        (
            lambda: EnvConfig("CartPole-v1", {"wings": 2}).make(),
            EnvError,
            ["CartPole-v1", "could not be made", "wings"],
        ),
        (lambda: EnvConfig("no.such.module:Env").make(), EnvError, ["no.such.module", "cannot import"]),
        (lambda: EnvConfig(3), OptionError, ["env=3", "gymnasium id"]),
        (lambda: EnvConfig("CartPole-v1", vectorization="fast"), OptionError, ["vectorization='fast'", "'sync'"]),
        (lambda: EnvConfig("Pendulum-v1", vectorization="native").spec(), OptionError, ["Pendulum-v1", "native"]),
        (
            lambda: EnvConfig("CartPole-v1", {}, ["gymnasium.wrappers:TimeAwareObservation"], "native").spec(),
            OptionError,
            ["wrappers: TimeAwareObservation wraps one environment", "vectorization='native'", "VectorWrapper"],
        ),
        (lambda: EnvConfig(CounterEnv, {"offset": 0}, ["nothing:Here"]).make(), EnvError, ["nothing"]),
        (lambda: EnvConfig(lambda: 3).make(), EnvError, ["int", "gymnasium.Env"]),
        (lambda: Policy(EnvSpec("e", spaces.Text(4), spaces.Discrete(2))), SpaceError, ["Text", "not supported"]),
    ],
)
def test_what_cannot_be_made_is_said_in_one_sentence(make: Callable, error: type, words: list[str]) -> None:
    with pytest.raises(error) as caught:
        make()
    assert all(word in str(caught.value) for word in words), caught.value
    assert "\n" not in str(caught.value)


def test_wrappers_and_entry_points_are_found_by_name() -> None:
    config = EnvConfig(
        "envs:CounterEnv", {"offset": 1}, [{"gymnasium.wrappers:TimeLimit": {"max_episode_steps": 1}}, _Doubled]
    )
    env = config.make()
    env.reset()
    obs, reward, _, truncated, _ = env.step(0)
    assert (obs.item(), reward, truncated) == (1.0, 2.0, True)


class _Doubled(gym.RewardWrapper):
    def reward(self, reward: float) -> float:
        return 2 * reward


def test_a_vector_env_that_does_not_say_how_it_resets_is_refused() -> None:
    envs = counter_vector(1, "SameStep")
    envs.metadata = {}
    with pytest.raises(EnvError, match="autoreset_mode"):
        autoreset_mode(envs)


@pytest.mark.parametrize("name", ["sync", "async", "SameStep", "NextStep", "Disabled"])
def test_played_episodes_are_whole_whatever_their_length(name: str) -> None:
    config = CONFIGS[name]
    episodes = list(play(config, Policy(config.spec()), range(6), num_envs=2, record=True))
    # Environment b plays three episodes: 2, 3 and 4 steps if its offset is 0.
    lengths = [2, 3, 4] + ([3, 4, 2] if config.vectorization == "native" else [2, 3, 4])
    assert sorted(e.length for e in episodes) == sorted(lengths)
    for episode in episodes:
        assert episode.return_ == sum(range(1, episode.length + 1))
        assert episode.steps["reward"].tolist() == list(range(1, episode.length + 1))
        assert (episode.steps["observation"][:, 0] % 100).tolist() == list(range(episode.length))
        ends = episode.steps["terminated"] | episode.steps["truncated"]
        assert ends.tolist() == [False] * (episode.length - 1) + [True]


def test_played_episodes_do_not_depend_on_how_many_are_played_at_a_time() -> None:
    config = EnvConfig("CartPole-v1")
    torch.manual_seed(0)
    policy = Policy(config.spec())
    few, many = (sorted(e.return_ for e in play(config, policy, range(100, 112), num_envs=n)) for n in (1, 5))
    assert few == many


def test_an_episode_that_does_not_end_is_said(monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    monkeypatch.setattr("lit_rl.evaluation.episodes.LONG_EPISODE", 3)
    config = EnvConfig(CounterEnv)
    list(play(config, Policy(config.spec()), range(3), num_envs=1))  # of 2, 3 and 4 steps
    assert caplog.text.count("has lasted 3 env steps and goes on") == 1


class NestedCounter(gym.ObservationWrapper):
    """CounterEnv's number n as a Dict of n and of the Tuple (n, n modulo 7)."""

    def __init__(self, env: gym.Env):
        super().__init__(env)
        number = env.observation_space
        self.observation_space = spaces.Dict(pair=spaces.Tuple([number, spaces.Discrete(7)]), n=number)

    def observation(self, observation: np.ndarray) -> dict[str, Any]:
        return {"n": observation, "pair": (observation, int(observation[0]) % 7)}


@pytest.mark.parametrize("vectorization", ["sync", "async"])
def test_next_observations_of_nested_spaces_are_the_true_ones_in_every_part(vectorization: str) -> None:
    env = EnvConfig(CounterEnv, wrappers=[NestedCounter], vectorization=vectorization)
    runner = make_runner(env, length=20)
    try:
        rollout = next_rollout(runner)
    finally:
        runner.close()
    obs, next_obs = rollout["observation"], next_observation(rollout)
    assert rollout["next", "done"].sum() > 9
    assert torch.equal(next_obs["n"], obs["n"] + 1)  # also at the end of episodes, whose first observation is 100 k
    for part in (obs, next_obs):
        assert torch.equal(part["pair"]["0"], part["n"])
        assert torch.equal(part["pair"]["1"], part["n"].squeeze(-1).long() % 7)


def test_a_policys_action_may_name_its_parts_in_any_order() -> None:
    class Reversed(Policy):
        def choose(self, features: torch.Tensor, obs: Any, deterministic: bool) -> Any:
            action, log_prob = super().choose(features, obs, deterministic)
            return {"b": action["b"] * 0 + 1, "a": action["a"] * 0}, log_prob

    space = spaces.Dict(a=spaces.Discrete(2), b=spaces.Discrete(2))
    env = EnvConfig(SampleEnv, {"observation_space": spaces.Box(-1, 1, (2,)), "action_space": space})
    action = next_rollout(make_runner(env, Reversed(env.spec())))["action"]
    assert (action["a"] == 0).all() and (action["b"] == 1).all()


class NestedWrong(NestedCounter):
    """Breaks its own observation space, from the start or at the third step."""

    def __init__(self, env: gym.Env, what: Any, late: bool = False):
        super().__init__(env)
        self._what, self._wait = what, 3 if late else 0

    def observation(self, observation: np.ndarray) -> Any:
        self._wait -= 1
        good = super().observation(observation)
        return self._what(good) if self._wait < 0 else good


@pytest.mark.parametrize(
    ("what", "words"),
    [
        (lambda obs: {"n": obs["n"]}, "observation has no 'pair'"),
        (lambda obs: obs | {"n": np.zeros(2)}, "observation['n'] has shape (2,): expected (1,)"),
        (lambda obs: obs | {"n": None}, "observation['n']=None: expected numbers"),
        (lambda obs: obs | {"pair": (obs["n"],)}, "observation['pair'] is 1 parts"),
        (lambda obs: obs | {"pair": (obs["n"], 0.5)}, "observation['pair'][1]=0.5: expected whole numbers"),
        (lambda obs: [obs], "observation is a list: expected a dict"),
    ],
)
def test_a_nested_observation_outside_its_space_is_told_which_part(what: Callable, words: str) -> None:
    env = EnvConfig(CounterEnv, wrappers=[{"test_env_runner:NestedWrong": {"what": what}}])
    with pytest.raises(EnvError) as error:
        env.spec()
    assert f"env=CounterEnv: reset returned what is not in its observation_space: {words}" in str(error.value)


def test_a_class_that_does_not_exist_names_environment_step_and_part() -> None:
    def wrong(obs: Any) -> Any:
        return obs | {"pair": (obs["n"], 7)}

    env = EnvConfig(CounterEnv, wrappers=[{"test_env_runner:NestedWrong": {"what": wrong, "late": True}}])
    runner = make_runner(env, length=9)
    with pytest.raises(EnvError, match=r"observation\['pair/1'\]=7 of environment 0 at step \d.*Discrete\(7\)"):
        runner.sample()
