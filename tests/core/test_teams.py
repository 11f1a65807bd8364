"""Teams: shared rewards, and groups of agents that act as one."""

from typing import Any

import gymnasium as gym
import lightning as L
import numpy as np
import pytest
from agent_envs import LoggedAgents, MaskedInTurns
from gymnasium import spaces

from lit_rl import PPO, MultiAgent, Policy, Random, RolloutDataModule
from lit_rl.envs.cooperation import TwoStepGame
from lit_rl.envs.copies import Copies, Events
from lit_rl.envs.groups import _first_alone, _nothing
from lit_rl.envs.make import EnvConfig
from lit_rl.envs.multi_agent import MultiAgentEnv, ReplicatedEnv
from lit_rl.envs.teams import GroupAgents, TeamReward
from lit_rl.errors import EnvError, OptionError, SpaceError
from lit_rl.evaluation.episodes import play
from lit_rl.policy import PolicySet
from lit_rl.spec import MultiAgentSpec
from lit_rl.viewing.playing import environment_of


class Played(MultiAgentEnv):
    """Brings what it was given, whatever the agents do, and keeps what they did.

    Args:
        first: what those see that act first, numbers by agent.
        steps: of each step by agent: the numbers they see, rewards, terminated, truncated, info; those at the end may
            be left out.
        agents: their ids.
    """

    def __init__(self, first: dict[str, Any], *steps: tuple, agents: Any = ("a", "b", "c")):
        self.possible_agents = agents
        self._first, self._steps = first, steps
        self.given: list[dict[str, Any]] = []

    def observation_space(self, agent: str) -> gym.Space:
        return spaces.Box(-100, 100, (1,))

    def action_space(self, agent: str) -> gym.Space:
        return spaces.Discrete(9)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[dict, dict]:
        self.given = []
        return _seen(self._first), {}

    def step(self, actions: dict[str, Any]) -> tuple[dict, dict, dict, dict, dict]:
        obs, *rest = self._steps[len(self.given)]
        self.given.append(actions)
        return (_seen(obs), *rest, *[{} for _ in range(4 - len(rest))])


def _seen(numbers: dict[str, Any]) -> dict[str, np.ndarray]:
    return {agent: np.array([x], np.float32) for agent, x in numbers.items()}


def plain(obs: Any) -> Any:
    """An observation of `Played` as numbers."""
    return tuple(map(plain, obs)) if isinstance(obs, tuple) else float(obs[0])


ALL = {"a": 0, "b": 0, "c": 0}


# --- shared rewards ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("team", "weight", "expected"),
    [
        ("*", 1.0, {"a": 3.0, "b": 3.0, "c": 3.0}),
        ("*", 0.0, {"a": 1.0, "b": 2.0, "c": 6.0}),
        ("*", 0.5, {"a": 2.0, "b": 2.5, "c": 4.5}),
        (["a", "b"], 1, {"a": 1.5, "b": 1.5, "c": 6.0}),
        ("[bc]", 0.25, {"a": 1.0, "b": 2.5, "c": 5.5}),
        ({"one": "a", "two": ["b", "c"]}, 1.0, {"a": 1.0, "b": 4.0, "c": 4.0}),
    ],
)
def test_a_reward_is_mixed_with_the_mean_of_the_team(team: Any, weight: float, expected: dict[str, float]) -> None:
    env = TeamReward(Played(ALL, (ALL, {"a": 1, "b": 2, "c": 6})), team, weight)
    env.reset()
    assert env.step({})[1] == expected


def test_those_that_are_not_in_the_episode_take_no_part_and_keep_their_rewards() -> None:
    played = Played(
        {"a": 0, "b": 0},
        ({"c": 0}, {"a": 1.0, "c": 7.0}),  # c appears after this step, and a and b wait
        ({"a": 1}, {"c": 9.0}),
        ({}, {"b": 6.0}, {"b": True}),  # b leaves with it
        ({"a": 2}, {"a": 2.0, "b": 5.0}),  # b left: its reward stays its own
        ({"b": 0}, {"c": 4.0}, {}, {}),
        ({}, {"a": 3.0}, {"a": True}, {"b": True, "c": True}),
    )
    env = TeamReward(played)
    env.reset()
    assert [env.step({})[1] for _ in range(6)] == [
        {"a": 0.5, "b": 0.5, "c": 7.0},
        {"a": 3.0, "b": 3.0, "c": 3.0},
        {"a": 2.0, "b": 2.0, "c": 2.0},
        {"a": 1.0, "b": 5.0, "c": 1.0},
        {"a": 2.0, "c": 2.0},
        {"a": 1.0, "b": 1.0, "c": 1.0},
    ]


@pytest.mark.parametrize("mode", ["turns", "together", "random", "once", "cars"])
@pytest.mark.parametrize("weight", [1.0, 0.3])
def test_the_sum_over_the_agents_stays_what_it_was(mode: str, weight: float) -> None:
    env = EnvConfig(LoggedAgents, {"mode": mode, "num_agents": 3}).make_multi_agent()
    mixed = TeamReward(env, weight=weight)
    for episode in range(20):
        obs, _ = mixed.reset(seed=episode)
        total, there = 0.0, set(obs)
        while there:
            obs, reward, terminated, truncated, _ = mixed.step(dict.fromkeys(obs, 0))
            total += sum(reward.values())
            over = {agent for agent in {*terminated, *truncated} if terminated.get(agent) or truncated.get(agent)}
            obs = {agent: x for agent, x in obs.items() if agent not in over}
            there = (there - over) | set(obs)
        assert total == pytest.approx(sum(env.totals[-1].values()), abs=1e-9)


def test_the_return_of_an_evaluation_stays_what_it_was() -> None:
    coins, teams = "lit_rl.envs.coins:CoinGame", {"red": "red_*", "blue": ["blue_0", "blue_1"]}
    found = []
    for wrappers in (
        [],
        [{"lit_rl.envs.teams:TeamReward": {"team": "*", "weight": 0.7}}],
        [lambda x: TeamReward(x, teams)],
    ):
        env = EnvConfig(coins, {"num_steps": 20}, wrappers)
        spec = env.try_out()
        assert isinstance(spec, MultiAgentSpec)
        players = PolicySet(spec, {"random": Random()}, "random").eval()
        players.rng = np.random.default_rng(0)
        found.append({episode.seed: episode for episode in play(env, players, range(4))})
    alone, mixed, by_team = found
    for seed, episode in alone.items():
        assert mixed[seed].return_ == pytest.approx(episode.return_) and mixed[seed].returns != episode.returns
        assert by_team[seed].returns == pytest.approx(episode.returns)  # they have one reward anyway


def test_teams_of_agents_whose_ids_are_not_known_beforehand() -> None:
    played = Played({"car_1": 0, "van_1": 0}, ({}, {"car_1": 4.0, "van_1": 2.0}), agents=("car_*", "van_*"))
    env = TeamReward(played, ["car_*", "van_1"])
    env.reset()
    assert env.step({})[1] == {"car_1": 3.0, "van_1": 3.0}
    twice = TeamReward(played, {"one": "car_[12]", "two": "car_[13]"})
    with pytest.raises(OptionError, match=r"the agent 'car_1' is in the teams \['one', 'two'\]: expected one at most."):
        twice.reset()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"weight": 1.5}, "TeamReward: weight=1.5: expected a number from 0 to 1."),
        ({"weight": "much"}, "TeamReward: weight='much': expected a number from 0 to 1."),
        ({"weight": float("nan")}, "TeamReward: weight=nan: expected a number from 0 to 1."),
        ({"team": "d*"}, r"TeamReward: the pattern 'd\*' matches none of the agents \['a', 'b', 'c'\]."),
        (
            {"team": {"x": ["a", "b"], "y": "[bc]"}},
            r"the agent 'b' is in the teams \['x', 'y'\]: expected one at most.",
        ),
        ({"team": []}, r"TeamReward: team=\[\]: expected an agent's id or a pattern, or a list of them."),
        ({"team": {"x": 3}}, "TeamReward: team={'x': 3}: expected an agent's id or a pattern, or a list of them."),
    ],
)
def test_teams_that_cannot_be_are_refused_in_one_sentence(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(OptionError, match=f"^{sentence if sentence[0] != 't' else '.*' + sentence}$"):
        TeamReward(Played(ALL), **options)


def test_a_reward_that_is_no_number_is_left_to_the_check_that_names_its_agent() -> None:
    env = TeamReward(Played(ALL, (ALL, {"a": 1, "b": None})))
    env.reset()
    assert env.step({})[1] == {"a": 1, "b": None}


# --- agents that act as one -------------------------------------------------------------------------------------------


def test_a_group_sees_and_does_what_its_members_do_in_the_order_of_the_list() -> None:
    played = Played({"a": 1, "b": 2, "c": 3}, ({"a": 4, "b": 5, "c": 6}, {"a": 1.0, "b": 0.5, "c": 2.0}))
    env = GroupAgents(played, {"team": ["c", "a"]})
    assert env.possible_agents == ["team", "b"]
    box = spaces.Box(-100, 100, (1,))
    assert env.observation_space("team") == spaces.Tuple([box, box]) and env.observation_space("b") == box
    assert env.action_space("team") == spaces.Tuple([spaces.Discrete(9)] * 2)
    obs, _ = env.reset()
    assert {agent: plain(x) for agent, x in obs.items()} == {"team": (3, 1), "b": 2}
    obs, reward, terminated, truncated, _ = env.step({"team": (7, 8), "b": 0})
    assert played.given == [{"c": 7, "a": 8, "b": 0}]
    assert plain(obs["team"]) == (6, 4) and reward == {"team": 3.0, "b": 0.5} and not terminated and not truncated


def test_patterns_stand_for_the_agents_that_they_match() -> None:
    env = GroupAgents(
        EnvConfig("lit_rl.envs.coins:CoinGame").make_multi_agent(), {"red": "red_*", "others": ["fox", "*e_*"]}
    )
    assert env.possible_agents == ["red", "others"]
    obs, _ = env.reset(seed=0)
    inside, _ = env.env.reset(seed=0)
    assert [x.tolist() for x in obs["others"]] == [inside[agent].tolist() for agent in ("fox", "blue_0", "blue_1")]


def steps_of(env: MultiAgentEnv, action: Any = (1, 2)) -> list[tuple]:
    """What "team" sees, gets and how it ends, in each step of an episode of `Played`; it acts whenever it is asked."""
    obs, _ = env.reset()
    found: list[tuple] = []
    while not found or not any(found[-1][2:]):
        obs, reward, terminated, truncated, _ = env.step({"team": action} if "team" in obs else {})
        flags = terminated.get("team", False), truncated.get("team", False)
        found.append((plain(obs["team"]) if "team" in obs else None, reward.get("team"), *flags))
    return found


def test_a_member_that_waits_shows_what_it_saw_last_and_one_that_has_not_come_yet_zeros() -> None:
    played = Played(
        {"a": 1},
        ({"b": 2}, {"c": 9.0}),
        ({"a": 3}, {"b": 1.0}),
        ({}, {}),  # all wait
        ({"a": 4, "b": 5}, {}),
        ({}, {}, {"a": True, "b": True}),
    )
    env = GroupAgents(played, {"team": ["a", "b"]})
    assert plain(env.reset()[0]["team"]) == (1, 0)
    assert steps_of(env) == [
        ((1, 2), None, False, False),
        ((3, 2), 1.0, False, False),
        (None, None, False, False),
        ((4, 5), None, False, False),
        (None, None, True, False),
    ]
    assert played.given == [{"a": 1}, {"b": 2}, {"a": 1}, {}, {"a": 1, "b": 2}]


def test_members_that_leave_at_different_times_are_an_error_unless_it_is_said_what_becomes_of_the_group() -> None:
    env = GroupAgents(Played(ALL, ({"c": 1}, {}, {"a": True}, {"b": True})), {"team": "*"})
    env.env._steps[0][0].update(b=2)  # type: ignore[attr-defined]
    env.reset()
    with pytest.raises(EnvError) as caught:
        env.step({"team": (0, 0, 0)})
    assert str(caught.value) == (
        "GroupAgents: ['a', 'b'] of the group 'team' left, and ['c'] stayed: expected all to leave at once. Set "
        "ends='last', or 'first'."
    )


TERMINATED, TRUNCATED, BOTH = (True, False), (False, True), (True, True)


@pytest.mark.parametrize(
    ("a", "b", "flags", "final"),
    [
        (TERMINATED, TERMINATED, TERMINATED, None),
        (TRUNCATED, TRUNCATED, TRUNCATED, (7, 8)),
        (TERMINATED, TRUNCATED, TRUNCATED, (0, 8)),  # the future of b is worth something
        (TRUNCATED, TERMINATED, TRUNCATED, (7, 0)),
        (BOTH, TERMINATED, BOTH, None),
        (BOTH, TRUNCATED, TRUNCATED, (0, 8)),
    ],
)
@pytest.mark.parametrize("ends", ["together", "last"])
def test_a_group_is_terminated_if_all_its_members_are(a: Any, b: Any, flags: Any, final: Any, ends: str) -> None:
    end = {"a": 7, "b": 8}, {"a": 1.0, "b": 2.0}, {"a": a[0], "b": b[0]}, {"a": a[1], "b": b[1]}
    env = GroupAgents(Played({"a": 1, "b": 2}, end), {"team": ["a", "b"]}, ends)
    assert steps_of(env) == [(final, 3.0, *flags)]


@pytest.mark.parametrize(
    ("a", "b", "flags", "final"),
    [
        (TERMINATED, TERMINATED, TERMINATED, None),
        (TERMINATED, TRUNCATED, TRUNCATED, (0, 8)),
        (TRUNCATED, TERMINATED, TRUNCATED, (7, 0)),  # what a saw when it was truncated
        (TRUNCATED, TRUNCATED, TRUNCATED, (7, 8)),
    ],
)
def test_a_group_stays_until_the_last_leaves(a: Any, b: Any, flags: Any, final: Any) -> None:
    played = Played(
        {"a": 1, "b": 2},
        ({"a": 7, "b": 4}, {"a": 1.0}, {"a": a[0]}, {"a": a[1]}),
        ({"b": 5}, {"a": 0.5, "b": 2.0}),  # it left: its reward counts all the same
        ({"b": 8}, {"b": 3.0}, {"b": b[0]}, {"b": b[1]}),
    )
    env = GroupAgents(played, {"team": ["a", "b"]}, "last")
    assert steps_of(env) == [((0, 4), 1.0, False, False), ((0, 5), 2.5, False, False), (final, 3.0, *flags)]
    assert played.given == [{"a": 1, "b": 2}, {"b": 2}, {"b": 2}]


def test_a_member_may_leave_and_come_again() -> None:
    played = Played(
        {"a": 1, "b": 2},
        ({"a": 7, "b": 4}, {}, {}, {"a": True}),
        ({"a": 5, "b": 6}, {}),
        ({}, {}, {"a": True, "b": True}),
    )
    env = GroupAgents(played, {"team": ["a", "b"]}, "last")
    assert steps_of(env) == [((0, 4), None, False, False), ((5, 6), None, False, False), (None, None, True, False)]
    assert played.given[-1] == {"a": 1, "b": 2}


@pytest.mark.parametrize(
    ("a", "b", "flags", "final"),
    [
        (TERMINATED, (False, False), TERMINATED, None),
        (TRUNCATED, (False, False), TRUNCATED, (7, 8)),
        (TERMINATED, TRUNCATED, BOTH, None),  # it would have left in any case
        (TRUNCATED, TRUNCATED, TRUNCATED, (7, 8)),
    ],
)
def test_a_group_leaves_with_the_first(a: Any, b: Any, flags: Any, final: Any) -> None:
    end = {"a": 7, "b": 8}, {"a": 1.0}, {"a": a[0], "b": b[0]}, {"a": a[1], "b": b[1]}
    env = GroupAgents(Played({"a": 1, "b": 2}, end, agents=("a", "b")), {"team": ["a", "b"]}, "first")
    assert steps_of(env) == [(final, 1.0, *flags)]
    assert plain(env.reset()[0]["team"]) == (1, 2)


def test_a_member_that_is_truncated_without_a_final_observation_is_named() -> None:
    env = GroupAgents(Played({"a": 1, "b": 2}, ({}, {}, {"a": True}, {"b": True})), {"team": ["a", "b"]})
    with pytest.raises(EnvError, match="agent 'b' of the group 'team' was truncated without an observation: expected"):
        steps_of(env)


def test_a_reward_of_a_member_that_is_no_number_is_named() -> None:
    env = GroupAgents(Played({"a": 1, "b": 2}, ({}, {"a": 1, "b": None})), {"team": ["a", "b"]})
    with pytest.raises(EnvError, match="GroupAgents: step returned reward=None for agent 'b': expected one number"):
        steps_of(env)


def test_the_info_of_a_group_has_the_means_of_the_numbers_in_its_members() -> None:
    infos = [{"a": {"won": True, "name": "x", "score": 4}}, {"b": {"won": False}, "c": {"score": 1}}]
    played = Played({"a": 1, "b": 2}, ({"b": 3}, {}, {"a": True}, {}, infos[0]), ({}, {}, {"b": True}, {}, infos[1]))
    env = GroupAgents(played, {"team": ["a", "b"]}, "last")
    assert env.reset()[1] == {}
    assert env.step({"team": (0, 0)})[4] == {"team": {"won": 1.0, "score": 4.0}}
    assert env.step({"team": (0, 0)})[4] == {"team": {"won": 0.5, "score": 4.0}, "c": {"score": 1}}


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"groups": {"x": "*"}, "ends": "never"}, "ends='never': expected one of 'together', 'first', 'last'."),
        ({"groups": {}}, "groups={}: expected a dict with the members of each group."),
        ({"groups": ["a", "b"]}, r"groups=\['a', 'b'\]: expected a dict with the members of each group."),
        ({"groups": {"x": []}}, r"groups\['x'\]=\[\]: expected an agent's id or a pattern, or a list of them."),
        (
            {"groups": {"x": ["a", "d"]}},
            r"'d' of the group 'x' matches none of the agents \['a', 'b', 'c', 'car_\*'\].",
        ),
        ({"groups": {"x": ["a", "b"], "y": "[bc]"}}, r"'b' is in the groups \['x', 'y'\]: expected one at most."),
        (
            {"groups": {"x": "*"}},
            r"'\*' of the group 'x' matches agents of 'car_\*': expected agents whose ids are known",
        ),
        ({"groups": {"x": "car_1"}}, r"'car_1' of the group 'x' matches agents of 'car_\*': expected agents whose ids"),
        (
            {"groups": {"c": ["a", "b"]}},
            "a group is called 'c': expected a name without wildcards, which no agent that",
        ),
        ({"groups": {"x*": ["a", "b"]}}, r"a group is called 'x\*': expected a name without wildcards, which no agent"),
        (
            {"groups": {"x": ["a", "b"]}, "ends": "first"},
            r"expected one group of all agents, got \['x', 'c', 'car_\*'\].",
        ),
    ],
)
def test_groups_that_cannot_be_are_refused_in_one_sentence(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(OptionError, match=f"^GroupAgents: .*{sentence}") as caught:
        GroupAgents(Played(ALL, agents=("a", "b", "c", "car_*")), **options)
    assert "\n" not in str(caught.value)


# --- their masks ------------------------------------------------------------------------------------------------------


class OneMask(Played):
    """Agent "a" has an action mask; it must not take 0."""

    def observation_space(self, agent: str) -> gym.Space:
        box = spaces.Box(-100, 100, (1,))
        return box if agent == "b" else spaces.Dict(observation=box, action_mask=spaces.MultiBinary(9), more=box)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[dict, dict]:
        return self._with_masks(super().reset()[0]), {}

    def step(self, actions: dict[str, Any]) -> tuple[dict, dict, dict, dict, dict]:
        obs, *rest = super().step(actions)
        return self._with_masks(obs), *rest  # type: ignore[return-value]

    def _with_masks(self, obs: dict[str, Any]) -> dict[str, Any]:
        mask = np.array([0, *[1] * 8], np.int8)
        return {a: x if a == "b" else {"observation": x, "more": x, "action_mask": mask} for a, x in obs.items()}


def test_masks_of_members_are_a_mask_of_the_group() -> None:
    played = OneMask({"a": 1, "b": 2}, ({"b": 4}, {}), ({"b": 3}, {}, {"a": True}), ({}, {}, {"b": True}))
    env = GroupAgents(played, {"team": ["b", "a"]}, "last")
    box = spaces.Box(-100, 100, (1,))
    assert env.observation_space("team") == spaces.Dict(
        observation=spaces.Tuple([box, spaces.Dict(observation=box, more=box)]),
        action_mask=spaces.Dict({"1": spaces.MultiBinary(9)}),
    )
    seen = [env.reset()[0]["team"], *(env.step({"team": (1, 2)})[0]["team"] for _ in range(2))]
    assert all(env.observation_space("team").contains(obs) for obs in seen)
    assert [obs["action_mask"]["1"].tolist() for obs in seen] == [[0, *[1] * 8], [1, *[0] * 8], [1, *[0] * 8]]
    assert [obs["observation"][1]["more"].tolist() for obs in seen] == [[1], [1], [0]]
    assert played.given == [{"b": 1, "a": 2}, {"b": 1}]


def test_a_mask_that_allows_the_first_of_each_choice() -> None:
    action = spaces.Dict(
        kind=spaces.Discrete(3, start=5), where=spaces.Tuple([spaces.MultiDiscrete([2, 3]), spaces.Discrete(2)])
    )
    mask = spaces.Dict(kind=spaces.MultiBinary(3), where=spaces.Tuple([spaces.Box(0, 1, (5,)), spaces.MultiBinary(2)]))
    found = _first_alone(action, mask)
    assert mask.contains(found)
    assert found["kind"].tolist() == [1, 0, 0] and [x.tolist() for x in found["where"]] == [[1, 0, 1, 0, 0], [1, 0]]


def test_what_is_nearest_to_zeros_is_in_its_space() -> None:
    space = spaces.Dict(
        a=spaces.Box(np.array([2.0, -1.0, -9.0], np.float32), np.array([3.0, 1.0, -4.0], np.float32)),
        b=spaces.Tuple(
            [spaces.Discrete(3, start=5), spaces.MultiDiscrete([2, 3], start=[-4, 1]), spaces.MultiBinary(2)]
        ),
        c=spaces.Box(0, 255, (2, 2), np.uint8),
    )
    found = _nothing(space)
    assert space.contains({**found, "b": (np.int64(found["b"][0]), *found["b"][1:])})
    assert found["a"].tolist() == [2, 0, -4] and found["b"][0] == 5 and found["b"][1].tolist() == [-3, 1]


def test_a_mask_that_does_not_fit_its_action_is_refused() -> None:
    class Odd(OneMask):
        def action_space(self, agent: str) -> gym.Space:
            return spaces.Discrete(4)

    with pytest.raises(SpaceError, match=r"action_mask is MultiBinary\(9\): expected a vector of 4 numbers"):
        GroupAgents(Odd({"a": 1, "b": 2}), {"team": ["a", "b"]})


def test_masks_in_the_info_are_found_and_nobody_does_what_is_illegal() -> None:
    env = EnvConfig(MaskedInTurns, wrappers=[{"lit_rl.envs.teams:GroupAgents": {"groups": {"team": ["b", "a"]}}}])
    spec = env.try_out()
    assert isinstance(spec, MultiAgentSpec)
    assert set(spec.shared().observation_space.spaces) == {"observation", "action_mask"}
    for policy in (Random(), Policy(spec.shared())):
        players = PolicySet(spec, {"team": policy}, "team").eval()
        players.rng = np.random.default_rng(0)
        episodes = list(play(env, players, range(20)))  # the environment raises at an illegal action
        assert all(episode.length == 9 for episode in episodes) and sum(e.return_ for e in episodes) > 20


# --- learning ---------------------------------------------------------------------------------------------------------


GROUPED = "lit_rl.envs.teams:GroupAgents"


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_group_learns_what_its_members_must_do_together(seed: int, make_trainer: Any) -> None:
    L.seed_everything(seed, verbose=False)
    wrappers = [{GROUPED: {"groups": {"pair": "*"}}}]
    data = RolloutDataModule(
        TwoStepGame, wrappers=wrappers, num_envs_per_env_runner=4, rollout_length=32, max_env_steps=2048,
    )  # fmt: skip
    trainer = make_trainer()
    trainer.fit(PPO(lr=1e-2, entropy_coef=0.05, num_epochs=4, minibatch_size=64), data)
    assert trainer.callback_metrics["eval/return_mean"] == 8.0
    assert trainer.callback_metrics["eval/return_mean/pair"] == 8.0


@pytest.mark.parametrize(
    ("env", "groups", "ends"),
    [
        (MaskedInTurns, {"team": ["a", "b"]}, "together"),
        ("pettingzoo.classic.tictactoe_v3", {"both": "player_*"}, "together"),
        ("mpe2.simple_spread_v3", {"pair": ["agent_0", "agent_2"]}, "together"),
        (lambda: ReplicatedEnv("CartPole-v1", 2), {"carts": "*"}, "last"),
        (lambda: ReplicatedEnv("CartPole-v1", 2), {"carts": "*"}, "first"),
    ],
)
def test_ppo_updates_the_policy_of_a_group(env: Any, groups: Any, ends: str, make_trainer: Any) -> None:
    wrappers = [{GROUPED: {"groups": groups, "ends": ends}}]
    data = RolloutDataModule(env, wrappers=wrappers, num_envs_per_env_runner=2, rollout_length=64, max_env_steps=128)
    algorithm: Any = PPO(minibatch_size=32, num_epochs=1)
    if len(data.env.try_out().agents) > 1:
        algorithm = MultiAgent({"group": algorithm, "alone": Random()}, policy_mapping={"pair": "group", "*": "alone"})
    trainer = make_trainer(limit_val_batches=0)
    trainer.fit(algorithm, data)
    name = "group/loss/policy" if isinstance(algorithm, MultiAgent) else "loss/policy"
    assert np.isfinite(float(trainer.callback_metrics[name]))


def test_wrappers_of_teams_are_named_in_a_checkpoint_and_trusted(make_trainer: Any) -> None:
    shared = {"lit_rl.envs.teams:TeamReward": {"team": {"red": "red_*", "blue": "blue_*"}, "weight": 0.5}}
    wrappers = [shared, {GROUPED: {"groups": {"red": "red_*", "others": ["blue_*", "fox"]}}}]
    data = RolloutDataModule("lit_rl.envs.coins:CoinGame", wrappers=wrappers, rollout_length=16, max_env_steps=128)
    algorithm = MultiAgent({"red": PPO(minibatch_size=8, num_epochs=1), "others": Random()})
    trainer = make_trainer(limit_val_batches=0)
    trainer.fit(algorithm, data)
    trainer.save_checkpoint("coins.ckpt")
    env = environment_of("coins.ckpt").make_multi_agent()
    assert isinstance(env, GroupAgents) and isinstance(env.env, TeamReward)
    assert env.possible_agents == ["red", "others"]


def test_an_episode_of_a_group_is_begun_again_where_it_was() -> None:
    env = EnvConfig(
        lambda: ReplicatedEnv("CartPole-v1", 2), wrappers=[lambda x: GroupAgents(x, {"carts": "*"}, "last")]
    )
    copies, again = (Copies(env, 1, remembers=True) for _ in range(2))
    copies.begin(0, 3, Events())
    for step in range(12):  # one of the two falls
        copies.step(iter([(1, step % 2)]))
    state = copies.state(0)
    assert again.begin_again(0, state)
    for one, other in zip(copies.asked()[0].obs, again.asked()[0].obs):
        assert (one == other).all()
    assert not copies.asked()[0].obs[0].any() and copies.asked()[0].obs[1].any()
