"""`lit-rl play --timeline`: what it prints is what would be learned from."""

import re
from collections import Counter
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from agent_envs import MADE, LoggedAgents
from gymnasium import spaces

from lit_rl import PPO, MultiAgent, Policy, Random, RolloutDataModule, cli, load_policy
from lit_rl.envs.make import EnvConfig
from lit_rl.envs.multi_agent import MultiAgentEnv, ReplicatedEnv
from lit_rl.errors import CheckpointError, OptionError
from lit_rl.evaluation.agent_episodes import play_agents
from lit_rl.policy import PolicySet
from lit_rl.spec import MultiAgentSpec
from lit_rl.viewing import timeline
from lit_rl.viewing.playing import play_episodes
from lit_rl.viewing.timeline import Timeline

# Who acts in each env step, the rewards it gives, and who ends after it.
STEPS: list[tuple[str, dict[str, float], dict[str, bool], dict[str, bool]]] = [
    ("a", {"a": 1, "c": 7}, {}, {}),
    ("b", {"b": 2, "a": -3}, {}, {}),
    ("c", {}, {}, {}),
    ("a", {"a": 4, "b": 1}, {}, {"b": True}),
    ("c", {"b": 9, "c": 0.5, "a": 0}, {}, {}),
    ("a", {"a": 1, "c": 2}, {"a": True, "c": True}, {"c": True}),
]
PRINTED = """\
step 0: a does 2; rewards: a 1 (row 0), c 7 (credited to nothing)
step 1: b does 2; rewards: b 2 (row 0), a -3 (row 0)
step 2: c does 2
step 3: a does 2; rewards: a 4 (row 1), b 1 (row 0); b is truncated
step 4: c does 2; rewards: c 0.5 (row 1), b 9 (credited to nothing)
step 5: a does 2; rewards: a 1 (row 2), c 2 (row 1); a is terminated; c is terminated and truncated
a, slot 0: 3 rows
  row 0: acted at step 0, reward 1 - 3 = -2, complete
  row 1: acted at step 3, reward 4, complete
  row 2: acted at step 5, reward 1, terminated
b, slot 1: 1 row
  row 0: acted at step 1, reward 2 + 1 = 3, truncated
c, slot 2: 2 rows
  row 0: acted at step 2, reward 0, complete
  row 1: acted at step 4, reward 0.5 + 2 = 2.5, terminated and truncated"""


class Turns(MultiAgentEnv):
    """Three agents in turns, as `STEPS` says; "b" leaves early."""

    possible_agents = ("a", "b", "c")

    def observation_space(self, agent: str) -> gym.Space:
        return spaces.Box(0, 9, (1,))

    def action_space(self, agent: str) -> gym.Space:
        return spaces.Discrete(3)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[dict, dict]:
        self._t = 0
        return self._show(["a"]), {}

    def step(self, actions: dict[str, Any]) -> tuple[dict, dict, dict, dict, dict]:
        _, reward, terminated, truncated = STEPS[self._t]
        self._t += 1
        following = [agent for agent, *_ in STEPS[self._t : self._t + 1]]
        return self._show([*following, *truncated]), reward, terminated, truncated, {}

    def _show(self, agents: list[str]) -> dict[str, np.ndarray]:
        return {agent: np.full(1, self._t, np.float32) for agent in agents}


def always_2(policy: Policy) -> Policy:
    """The same, that prefers the last of three actions."""
    with torch.no_grad():
        policy.head.weight.zero_()
        policy.head.bias.copy_(torch.tensor([0.0, 0.0, 100.0]))
    return policy


@pytest.fixture
def checkpoint(make_trainer: Any) -> str:
    data = RolloutDataModule("test_timeline:Turns", rollout_length=12, max_env_steps=12, num_envs_per_env_runner=1)
    trainer, algorithm = make_trainer(limit_val_batches=0), PPO(minibatch_size=4, num_epochs=1)
    trainer.fit(algorithm, data)
    always_2(algorithm.policy)
    trainer.save_checkpoint("turns.ckpt")
    return "turns.ckpt"


PLAY = ["--env", "test_timeline:Turns", "--timeline", "--episodes"]


def test_play_prints_who_acted_when_and_what_each_reward_was_credited_to(checkpoint: str, capsys: Any) -> None:
    cli.main(["play", checkpoint, *PLAY, "2"])
    each = "return 24.5 (a 3, b 12, c 9.5), length 6"
    text = "\n".join(f"  {line}" for line in PRINTED.splitlines())
    assert capsys.readouterr().out == (
        f"Episode 1: {each}\n{text}\nEpisode 2: {each}\n{text}\n"
        "Mean of 2 on test_timeline:Turns, greedy: return 24.5, length 6\n"
    )


class Two:
    def act(self, obs: Any) -> int:
        return 2


class Always(Two):
    def __init__(self, action: int):
        self.action = action


TWO = Two()


def mapped(agent: str, info: Any) -> str:
    return "mine" if agent == "c" else "learns"


def test_ones_own_scripts_and_mapping_are_named_to_play(make_trainer: Any, capsys: Any) -> None:
    data = RolloutDataModule("test_timeline:Turns", rollout_length=12, max_env_steps=12, num_envs_per_env_runner=1)
    ppo: Any = PPO(minibatch_size=4, num_epochs=1)
    trainer = make_trainer(limit_val_batches=0)
    trainer.fit(MultiAgent({"learns": ppo, "mine": Two()}, policy_mapping=mapped), data)
    trainer.save_checkpoint("mine.ckpt")
    given = ["--policies", "{mine: test_timeline:Two}", "--policy_mapping", "test_timeline:mapped"]
    for policies in (given[1], "{mine: test_timeline:TWO}"):
        cli.main(["play", "mine.ckpt", *PLAY, "1", "--policies", policies, *given[2:]])
        assert "step 2: c (mine) does 2" in capsys.readouterr().out
    cli.main(["play", "mine.ckpt", *PLAY, "1", *given[:2], "--policy_mapping", "{c: learns, '*': mine}"])
    assert "step 0: a (mine) does 2" in capsys.readouterr().out
    wrong = {
        (): "the policy 'mine' is a script of yours, test_timeline:Two: pass it in policies=, or to lit-rl play by "
        "--policies '{mine: package.module:Class}'.",
        tuple(given[:2]): "its mapping is a function: pass it as policy_mapping=, or to lit-rl play by "
        "--policy_mapping package.module:function.",
        ("--policies", "{mine: test_timeline:Three}"): "policies.mine='test_timeline:Three': expected 'package.module:",
        ("--policies", "{mine: test_timeline:Always}"): "Name an object, if the class needs arguments.",
        ("--policies", "{mine: test_timeline:PRINTED}"): "expected an object with act(obs).",
        (
            "--policies",
            "{learns: test_timeline:Two}",
        ): "'learns': expected some of its policies that are scripts, ['mine']",
        (*given[:3], "test_timeline:map"): "policy_mapping='test_timeline:map': expected 'package.module:function'",
    }
    for arguments, words in wrong.items():
        with pytest.raises(SystemExit):
            cli.main(["play", "mine.ckpt", *PLAY, "1", *arguments])
        assert words in capsys.readouterr().err


def test_scripts_of_a_checkpoint_with_one_policy_are_refused(checkpoint: str) -> None:
    for given in ({"policies": {"a": Two()}}, {"policy_mapping": "a"}, {"policy": "a"}):
        with pytest.raises(CheckpointError, match=f"holds one policy: leave {next(iter(given))}="):
            load_policy(checkpoint, **given)


def test_a_long_episode_is_cut_to_as_many_env_steps_as_one_asks_for(checkpoint: str, capsys: Any) -> None:
    cli.main(["play", checkpoint, *PLAY, "1", "--timeline_steps", "2"])
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()[1:-1]]
    assert lines == [
        "step 0: a does 2; rewards: a 1 (row 0), c 7 (credited to nothing)",
        "step 1: b does 2; rewards: b 2 (row 0), a -3 (row 0)",
        "... 4 more env steps",
        "a, slot 0: 3 rows",
        "row 0: acted at step 0, reward 1 - 3 = -2, complete",
        "... 2 more rows",
        "b, slot 1: 1 row",
        "row 0: acted at step 1, reward 2 + 1 = 3, truncated",
        "c, slot 2: 2 rows",
        "... 2 more rows",
    ]


def spec_of(env: EnvConfig) -> MultiAgentSpec:
    spec = env.try_out()
    assert isinstance(spec, MultiAgentSpec)
    return spec


def test_policies_are_named_and_what_is_not_trained_is_not_learned_from() -> None:
    env = EnvConfig(Turns)
    spec = spec_of(env)
    learner, mapping = always_2(Policy(spec.shared())), {"b": "script", "*": "learner"}
    players = PolicySet(spec, {"learner": learner, "script": Random()}, mapping, trained=["learner"])
    players.rng = np.random.default_rng(0)
    shown = Timeline()
    list(play_episodes(env, players, [0], timeline=shown))
    lines = shown.text().splitlines()
    assert lines[0] == "step 0: a (learner) does 2; rewards: a 1 (row 0), c 7 (credited to nothing)"
    assert re.fullmatch(r"step 1: b \(script\) does [012]; rewards: b 2 \(not learned from\), a -3 \(row 0\)", lines[1])
    assert "b, slot 1, policy script: not learned from" in lines
    at = lines.index("c, slot 2, policy learner: 2 rows")
    assert lines[at + 2] == "  row 1: acted at step 4, reward 0.5 + 2 = 2.5, terminated and truncated"


def test_an_episode_that_is_cut_off_ends_with_open_rows() -> None:
    env, shown = EnvConfig(Turns), Timeline()
    policy = always_2(Policy(spec_of(env).shared()))
    (episode,) = play_episodes(env, policy, [0], timeline=shown, timeout_s=0.0)
    assert episode.cut
    assert shown.text().splitlines()[-1] == "  row 0: acted at step 0, reward 1, open"


def test_agents_that_act_at_once_share_a_line_and_actions_of_arrays_are_short() -> None:
    env, shown = EnvConfig(ReplicatedEnv, {"env": "Pendulum-v1", "num_agents": 2}), Timeline(max_steps=1)
    list(play_episodes(env, Policy(spec_of(env).shared()), [0], timeline=shown))
    number = r"-?\d+\.?\d*(e-\d+)?"
    pattern = rf"step 0: agent_0 does \[{number}\], agent_1 does \[{number}\]; rewards: agent_0 {number} \(row 0\), .*"
    assert re.fullmatch(pattern, shown.text().splitlines()[0])


@pytest.mark.parametrize("flush", [2, 1024])
@pytest.mark.parametrize(
    ("mode", "num_agents"), [("turns", 3), ("together", 2), ("random", 3), ("once", 4), ("cars", 3)]
)
def test_rows_are_the_transitions_that_the_environment_has(
    mode: str, num_agents: int, flush: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timeline, "FLUSH", flush)
    env = EnvConfig(LoggedAgents, {"mode": mode, "num_agents": num_agents})
    policy, shown = Policy(spec_of(env).shared()), Timeline()
    MADE.clear()
    found: list[tuple[float, bool, bool]] = []
    for episode in play_agents(env, policy, range(20), num_envs=1, watcher=shown):
        text = shown.text()
        assert [int(step) for step in re.findall(r"^step (\d+): ", text, re.M)] == list(range(episode.length))
        for reward, ends in re.findall(r"  row \d+: acted at step \d+, reward (?:.* = )?(\S+), (.*)", text):
            found.append((float(reward), "terminated" in ends, "truncated" in ends))
            assert "open" not in ends
    logged = [(row.reward, row.terminated, row.truncated) for made in MADE for row in made.log]
    assert Counter(found) == Counter(logged) and len(found) > 20


def test_an_environment_of_one_agent_is_refused() -> None:
    env = EnvConfig("CartPole-v1")
    with pytest.raises(
        OptionError, match="--timeline: env=CartPole-v1 has one agent, of which every env step is a row"
    ):
        list(play_episodes(env, Policy(env.spec()), [0], timeline=Timeline()))
