"""The benchmark of several agents in small, and what the docs say of it."""

import json
import sys
from typing import Any

import fake_ray
import numpy as np
import pytest
from helpers import ROOT

sys.path.append(str(ROOT / "benchmarks"))  # they find each other by name

import multi_agent_speed
from four_points import FourPoints

from lit_rl.envs.make import EnvConfig

RESULT = ROOT / "docs" / "results" / "multi_agent_speed.json"


def test_a_point_goes_where_it_is_pushed_and_all_get_one_reward() -> None:
    env = FourPoints()
    before, _ = env.reset(seed=0)
    obs, reward, terminated, truncated, _ = env.step(dict(zip(env.possible_agents, (1, 2, 3, 4))))
    moved = np.stack([obs[agent][:2] - before[agent][:2] for agent in env.possible_agents])
    np.testing.assert_allclose(moved, [[0.01, 0], [-0.01, 0], [0, 0.01], [0, -0.01]], atol=1e-6)
    for agent in env.possible_agents:
        np.testing.assert_allclose(obs[agent][4:], np.mean([obs[a][:2] for a in obs], 0) - obs[agent][:2], atol=1e-6)
    distance = np.mean([np.hypot(*obs[agent][4:]) for agent in obs])
    assert reward == pytest.approx(dict.fromkeys(env.possible_agents, -distance), rel=1e-5)
    assert not any(terminated.values()) and not any(truncated.values())


def test_an_episode_of_points_is_truncated_after_100_steps() -> None:
    spec = EnvConfig(FourPoints).try_out()
    env = FourPoints()
    env.reset(seed=0)
    actions = dict.fromkeys(env.possible_agents, 0)
    ends = [env.step(actions)[3] for _ in range(100)]
    assert not any(any(over.values()) for over in ends[:-1]) and all(ends[-1].values())
    assert list(spec.agents) == env.possible_agents
    assert multi_agent_speed.env_alone(0.01) > 100


@pytest.mark.parametrize("num_env_runners", [0, 2])
def test_each_agent_brings_a_row_that_is_learned_from_in_each_pass(
    num_env_runners: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_ray.use(monkeypatch, 1.0, 1.001)
    found = multi_agent_speed.lit_rl(0.1, shape=(2, 8, 3, 16), num_env_runners=num_env_runners)
    assert found["learned_rows_per_env_step"] == 4 * 3 and found["env_steps_per_s"] > 0
    # Of runners in processes of their own this one's time says nothing.
    assert ("env_steps_per_cpu_s" in found) == (num_env_runners == 0)


def test_an_environment_is_trained_as_it_is_and_as_the_only_agent() -> None:
    found = {name: measure(0.1) for name, measure in multi_agent_speed.TASKS["CartPole-v1"].items()}
    assert list(found) == ["multi-agent", "single-agent"]
    assert {one["learned_rows_per_env_step"] for one in found.values()} == {4.0}


def speeds(*env_steps_per_s: float) -> list[dict[str, Any]]:
    return [{"env_steps_per_s": speed} for speed in env_steps_per_s]


def test_ours_are_compared_to_the_others_within_each_round() -> None:
    runs = {
        "lit_rl": speeds(100, 300, 200),
        "lit_rl, compiled": speeds(200, 200, 800),
        "RLlib": speeds(50, 50, 400),
    }
    assert multi_agent_speed.ratios(runs) == {
        "lit_rl / RLlib": [2.0, 6.0, 0.5],
        "lit_rl, compiled / RLlib": [4.0, 4.0, 2.0],
    }
    alone = {"multi-agent": speeds(80), "single-agent": speeds(100)}
    assert multi_agent_speed.table({"runners": runs, "CartPole-v1": alone}).splitlines()[2:] == [
        "| runners | lit_rl | 200 |  |  |",
        "| runners | lit_rl, compiled | 200 |  |  |",
        "| runners | RLlib | 50 | 2.00 | 4.00 |",
        "| CartPole-v1 | multi-agent | 80 |  |  |",
        "| CartPole-v1 | single-agent | 100 | 0.80 |  |",
    ]


def test_the_table_in_the_docs_is_what_was_measured() -> None:
    page = (ROOT / "docs" / "multi_agent.md").read_text()
    assert ("<!-- speed -->" in page) == RESULT.exists()
    if RESULT.exists():
        tasks = json.loads(RESULT.read_text())["tasks"]
        table = multi_agent_speed.table({task: found["runs"] for task, found in tasks.items()})
        assert page.split("<!-- speed -->\n")[1].split("\n<!-- end -->")[0] == table
