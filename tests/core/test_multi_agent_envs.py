"""Environments of several agents: PettingZoo's and our own, their wrappers, and what is wrong with some."""

from typing import Any

import gymnasium as gym
import numpy as np
import pettingzoo
import pytest
from agent_envs import LoggedAgents, MaskedInTurns, Wrong
from envs import CounterEnv, IdentityEnv
from gymnasium import spaces

from lit_rl.envs.make import EnvConfig
from lit_rl.envs.multi_agent import AgentId, MultiAgentEnv, MultiAgentWrapper, ReplicatedEnv
from lit_rl.errors import EnvError, OptionError
from lit_rl.roster import Roster, is_pattern, matches_all, may_match
from lit_rl.spec import MultiAgentSpec


def spec_of(env: Any, **options: Any) -> MultiAgentSpec:
    spec = EnvConfig(env, **options).try_out()
    assert isinstance(spec, MultiAgentSpec)
    return spec


# --- PettingZoo -------------------------------------------------------------------------------------------------------


class Parallel(pettingzoo.ParallelEnv):
    """Agent "a" is truncated after two steps, "b" terminated after three."""

    metadata: dict[str, Any] = {"name": "parallel_v0"}

    def __init__(self) -> None:
        self.possible_agents = ["a", "b"]

    def observation_space(self, agent: str) -> gym.Space:
        return spaces.Box(0, 10, (1,))

    def action_space(self, agent: str) -> gym.Space:
        return spaces.Discrete(2)

    def reset(self, seed: int | None = None, options: dict | None = None) -> tuple[dict, dict]:
        self.agents, self._t = list(self.possible_agents), 0
        return {agent: np.zeros(1, np.float32) for agent in self.agents}, {agent: {} for agent in self.agents}

    def step(self, actions: dict[str, Any]) -> tuple[dict, dict, dict, dict, dict]:
        self._t += 1
        obs = {agent: np.full(1, self._t, np.float32) for agent in self.agents}
        truncated, terminated = ({a: a == b and self._t == n for a in self.agents} for b, n in (("a", 2), ("b", 3)))
        reward, info = dict.fromkeys(self.agents, 1.0), {agent: {} for agent in self.agents}
        self.agents = [agent for agent in self.agents if not (terminated[agent] or truncated[agent])]
        return obs, reward, terminated, truncated, info


class InTurns(pettingzoo.AECEnv):
    """Rewards of 1, 10, 100, ... for both at every turn; the episode ends after five turns: "a" is truncated."""

    metadata: dict[str, Any] = {"name": "in_turns_v0"}

    def __init__(self, how: str = "") -> None:
        self.possible_agents, self._how = ["a", "b"], how

    def observation_space(self, agent: str) -> gym.Space:
        return spaces.Box(0, 10, (1,))

    def action_space(self, agent: str) -> gym.Space:
        return spaces.Discrete(2)

    def observe(self, agent: str) -> np.ndarray:
        return np.full(1, self._t, np.float32)

    def reset(self, seed: int | None = None, options: dict | None = None) -> None:
        self.agents, self._t = list(self.possible_agents), 0
        self.rewards, self._cumulative_rewards = ({"a": 0.0, "b": 0.0} for _ in range(2))
        self.terminations, self.truncations = ({"a": False, "b": False} for _ in range(2))
        self.infos: dict[str, dict] = {"a": {}, "b": {}}
        self.agent_selection = "a"

    def step(self, action: Any) -> None:
        agent = self.agent_selection
        if self.terminations[agent] or self.truncations[agent]:
            self._was_dead_step(action)
            return
        assert action is not None
        self._cumulative_rewards[agent] = 0.0
        self._t += 1
        self.rewards = {"a": 10.0**self._t, "b": -(10.0**self._t)}
        self._accumulate_rewards()
        self.agent_selection = "b" if agent == "a" else "a"
        if self._t == 5:
            self.truncations["a"], self.terminations["b"] = True, True
            self._deads_step_first()
        if self._how == "vanishes" and self._t == 3:
            self.agents.remove("b")
            self.agent_selection = "a"


def test_a_parallel_environment_of_pettingzoo_is_recognised() -> None:
    config = EnvConfig(Parallel)
    env = config.make_multi_agent()
    assert config.is_multi_agent and not EnvConfig(CounterEnv).is_multi_agent
    obs, _ = env.reset(seed=1)
    assert list(obs) == ["a", "b"]
    steps = [env.step(dict.fromkeys(agents, 0)) for agents in (["a", "b"], ["a", "b"], ["b"])]
    assert [list(step[0]) for step in steps] == [["a", "b"], ["a", "b"], ["b"]]
    assert steps[1][3] == {"a": True, "b": False} and steps[2][2] == {"b": True}


def test_an_aec_environment_gives_every_reward_once_and_its_dead_agents_leave() -> None:
    env = EnvConfig(InTurns).make_multi_agent()
    obs, _ = env.reset()
    total, turns = {"a": 0.0, "b": 0.0}, []
    while True:
        (agent,) = obs
        turns.append(agent)
        obs, reward, terminated, truncated, _ = env.step({agent: 0})
        assert abs(reward["a"]) == 10.0 ** len(turns)
        total = {name: total[name] + reward[name] for name in total}
        if terminated:
            break
    assert turns == ["a", "b", "a", "b", "a"] and total == {"a": 111110.0, "b": -111110.0}
    assert terminated == {"a": False, "b": True} and truncated == {"a": True, "b": False}
    assert obs["a"] == 5.0  # by which it is bootstrapped


def test_an_agent_that_vanishes_from_an_aec_environment_is_an_error() -> None:
    env = EnvConfig(InTurns, {"how": "vanishes"}).make_multi_agent()
    env.reset()
    env.step({"a": 0})
    env.step({"b": 0})
    with pytest.raises(EnvError, match="let the agent 'b' go without terminating or truncating it"):
        env.step({"a": 0})


@pytest.mark.parametrize("env", ["pettingzoo.classic.rps_v2", "pettingzoo.classic.rps_v2:env"])
def test_modules_of_pettingzoo_are_found_by_name(env: str) -> None:
    spec = spec_of(env)
    assert list(spec.agents) == ["player_0", "player_1"] and spec.num_slots == 2
    assert spec.shared().action_space == spaces.Discrete(3)


def test_a_module_is_as_good_as_its_name_and_masks_of_dicts_stay() -> None:
    from pettingzoo.classic import tictactoe_v3

    config = EnvConfig(tictactoe_v3)
    assert config.to_dict() == EnvConfig("pettingzoo.classic.tictactoe_v3").to_dict() is not None
    assert set(config.try_out().shared().observation_space.spaces) == {"observation", "action_mask"}


# --- our own ----------------------------------------------------------------------------------------------------------


class NoSubclass:
    """A multi-agent environment that only does as the protocol says."""

    possible_agents = ("a",)

    def observation_space(self, agent: str) -> gym.Space:
        return spaces.Discrete(2)

    action_space = observation_space

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[dict, dict]:
        return {"a": 0}, {}

    def step(self, actions: dict[str, Any]) -> tuple[dict, dict, dict, dict, dict]:
        return {}, {"a": 1}, {"a": True}, {}, {}

    def close(self) -> None:
        pass


def test_a_class_that_does_as_the_protocol_says_is_one() -> None:
    assert isinstance(NoSubclass(), MultiAgentEnv)
    assert list(spec_of(NoSubclass).agents) == ["a"]


def test_copies_of_an_environment_leave_one_by_one() -> None:
    env = ReplicatedEnv(CounterEnv, 2)
    obs, _ = env.reset(seed=0)
    assert obs == {"agent_0": [0.0], "agent_1": [0.0]}
    env.step({"agent_0": 0, "agent_1": 0})
    obs, reward, terminated, _, _ = env.step({"agent_1": 1})
    assert obs == {"agent_1": [2.0]} and reward == {"agent_1": 2.0} and terminated == {"agent_1": True}


def test_copies_of_an_environment_begin_with_seeds_of_their_own() -> None:
    env = ReplicatedEnv("CartPole-v1", 2)
    first, again, other = (env.reset(seed=seed)[0] for seed in (1, 1, 2))
    assert (first["agent_0"] != first["agent_1"]).all() and (first["agent_0"] != other["agent_0"]).all()
    assert (first["agent_0"] == again["agent_0"]).all()


def test_copies_of_an_environment_are_wrapped_each() -> None:
    by_name: list = ["lit_rl.envs.cartpole:HideVelocities", {"gymnasium.wrappers:TimeLimit": {"max_episode_steps": 3}}]
    env = ReplicatedEnv("CartPole-v1", 2, wrappers=by_name)
    obs, _ = env.reset(seed=0)
    assert [x.shape for x in obs.values()] == [(2,), (2,)] and env.observation_space("agent_1").shape == (2,)
    for step in range(3):
        truncated = env.step({"agent_0": step % 2, "agent_1": step % 2})[3]
    assert truncated == {"agent_0": True, "agent_1": True}


def test_agent_id_appends_which_agent_sees() -> None:
    vector = EnvConfig(ReplicatedEnv, {"env": CounterEnv}, [AgentId])
    assert vector.try_out().shared().observation_space.shape == (3,)
    obs, _ = vector.make_multi_agent().reset()
    assert [x[1:].tolist() for x in obs.values()] == [[1, 0], [0, 1]] and obs["agent_0"].dtype == np.float32
    other = EnvConfig(ReplicatedEnv, {"env": IdentityEnv}, [AgentId])
    space = other.try_out().shared().observation_space
    assert set(space.spaces) == {"observation", "agent_id"}
    obs, _ = other.make_multi_agent().reset()
    assert space.contains(obs["agent_1"]) and obs["agent_1"]["agent_id"].tolist() == [0, 1]


def test_masks_in_the_info_move_into_the_observation() -> None:
    space = spec_of(MaskedInTurns).shared().observation_space
    assert space["action_mask"] == spaces.MultiBinary(4)
    env = EnvConfig(MaskedInTurns).make_multi_agent()
    obs, info = env.reset(seed=3)
    assert (obs["a"]["action_mask"] == info["a"]["action_mask"]).all() and space.contains(obs["a"])


def test_slots_of_known_agents_are_their_own_and_those_of_patterns_are_used_again() -> None:
    roster = Roster(["boss", "car_*", "b"], 2)
    assert roster.num_slots == 4
    assert [roster.name_of(x) for x in ("boss", "car_7", "b", "c")] == ["boss", "car_*", "b", None]
    assert [roster.free_slot("b", {}), roster.free_slot("boss", {"b": 1})] == [1, 0]
    assert roster.free_slot("car_1", {"car_0": 2}) == 3 and roster.free_slot("car_2", {"x": 2, "y": 3}) is None
    assert roster.free_slot("car_3", {"car_1": 3}) == 2


@pytest.mark.parametrize(
    ("pattern", "name", "may", "all_do"),
    [
        ("wolf_*", "wolf_*", True, True),
        ("wolf_*", "sheep_*", False, False),
        ("*_1", "wolf_*", True, False),
        ("*_1", "wolf_*_2", False, False),
        ("*", "car_?", True, True),
        ("car_?", "car_??", False, False),
        ("car_?", "car_*", True, False),
        ("car_[0-9]", "car_a*", False, False),
        ("car_[0-9]*", "car_7*", True, False),
        ("c*r_*", "car_[ab]", True, True),
        ("*]", "car_[ab]", False, False),
        ("car_*", "car_1", True, True),
        ("c*a*b", "*b*a", False, False),
        ("*a*", "b*c", True, False),
    ],
)
def test_a_pattern_may_match_some_agents_of_another_one_or_all(
    pattern: str, name: str, may: bool, all_do: bool
) -> None:
    assert may_match(pattern, name) == may and matches_all(pattern, name) == all_do
    if is_pattern(name):
        assert may_match(name, pattern) == may


@pytest.mark.parametrize(
    ("wrapper", "sentence"),
    [
        (
            "lit_rl.envs.teams:GroupAgents",
            r"^wrappers: GroupAgents needs groups=\. Give it .* \{'package.module:GroupAgents': \{'groups': \.\.\.",
        ),
        ({"lit_rl.envs.teams:GroupAgents": {"ends": "last"}}, "^wrappers: GroupAgents needs groups="),
        (
            {"lit_rl.envs.teams:GroupAgents": {"gruops": {"x": "*"}}},
            r"^wrappers: GroupAgents\(gruops=\.\.\.\): there is no such option\. Did you mean 'groups'\?$",
        ),
        ({"lit_rl.envs.teams:TeamReward": 0.5}, "^wrappers: TeamReward: 0.5: expected a dict of its options by name"),
        (lambda: 3, "could not be made: TypeError"),
    ],
)
def test_options_of_wrappers_are_checked_by_name(wrapper: Any, sentence: str) -> None:
    with pytest.raises((OptionError, EnvError), match=sentence):
        EnvConfig(Parallel, wrappers=[wrapper]).try_out()


@pytest.mark.parametrize(
    ("wrapper", "sentence"),
    [
        ("gymnasium.wrappers:TimeLimit", "^wrappers: TimeLimit needs max_episode_steps="),
        ({"gymnasium.wrappers:TimeLimit": {"max_steps": 3}}, r"^wrappers: TimeLimit\(max_steps=\.\.\.\): .* Did you"),
    ],
)
def test_options_of_wrappers_of_one_agent_are_checked_too(wrapper: Any, sentence: str) -> None:
    with pytest.raises(OptionError, match=sentence):
        EnvConfig("CartPole-v1", wrappers=[wrapper]).try_out()
    with pytest.raises(OptionError, match=sentence):
        EnvConfig(ReplicatedEnv, {"env": "CartPole-v1", "wrappers": [wrapper]}).try_out()


class Shift(MultiAgentWrapper):
    def observe(self, agent: str, obs: Any, info: Any) -> Any:
        return obs + 1


def test_wrappers_apply_in_order() -> None:
    config = EnvConfig(Parallel, wrappers=[Shift, Shift, AgentId])
    env = config.make_multi_agent()
    assert env.reset()[0]["b"].tolist() == [2, 0, 1]
    assert env.step({"a": 0, "b": 0})[0]["a"].tolist() == [3, 1, 0]


# --- what is wrong ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "sentence"),
    [
        ("no agents", r"env=Wrong: possible_agents=\[\]: expected strings, each of them once."),
        ("numbers", r"possible_agents=\[0, 1\]: expected strings"),
        ("pattern", r"max_agents=None: expected how many agents of \['a\*'\] there are at a time at most."),
        ("no space", r"observation_space\('a'\)=4: expected a gymnasium.Space."),
        ("reset", r"reset returned .*: expected \(observation, info\), dicts by agent."),
        ("all gone", "reset gave no observation: expected those of the agents that act first."),
        ("four", r"step returned .*: expected \(observation, reward, terminated, truncated, info\), dicts by agent."),
        ("stranger", r"step returned an observation of 'c': expected an agent of possible_agents=\['a', 'b'\]."),
        ("reward of a stranger", "step returned a reward for 'c': expected an agent of possible_agents"),
        ("__all__", r"step returned the end of '__all__': .* Leave '__all__' out."),
        ("shape", r"step returned for agent 'b' what is not in its observation_space: observation has shape \(3,\)"),
        ("reward", "step returned for agent 'b' reward=None: expected one number"),
        ("no final observation", "agent 'b' was truncated without an observation: expected its final one"),
        ("spaces change", "the spaces of agent 'a' changed: expected the same ones every time."),
    ],
)
def test_what_an_environment_gets_wrong_is_said_in_one_sentence(how: str, sentence: str) -> None:
    with pytest.raises(EnvError, match=sentence) as caught:
        EnvConfig(Wrong, {"how": how}).try_out()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            {"env": "no.such_v1"},
            "env='no.such_v1' is neither a registered gymnasium environment nor a module to import",
        ),
        ({"env": "pettingzoo.classic"}, "the module has neither parallel_env nor env, as PettingZoo's have."),
        ({"env": Wrong, "wrappers": ["gymnasium.wrappers:TimeLimit"]}, "TimeLimit wraps an environment of one agent"),
        ({"env": CounterEnv, "wrappers": [AgentId]}, "AgentId wraps an environment of several agents, and env=Counter"),
        ({"env": Wrong, "vectorization": "async"}, "vectorization='async': env=Wrong has several agents"),
    ],
)
def test_what_cannot_be_made_is_said_in_one_sentence(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises((EnvError, OptionError), match=sentence):
        EnvConfig(**options).try_out()


def test_one_policy_needs_equal_spaces() -> None:
    with pytest.raises(OptionError, match=r"the action_space of agent 'a' is Discrete\(2\), that of 'b' Discrete\(3\)"):
        spec_of(Wrong, env_kwargs={"how": "differ"}).shared()


def test_an_environment_of_several_agents_is_not_taken_for_one_of_one() -> None:
    with pytest.raises(EnvError, match="made an environment of several agents: expected a gymnasium"):
        EnvConfig(LoggedAgents, {"mode": "turns"}).spec()
