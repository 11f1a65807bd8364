"""Benchmarks of environments of several agents: what is measured of a policy, and beside what."""

import importlib
import sys
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from helpers import ROOT

from lit_rl import PPO, Random, RolloutDataModule
from lit_rl.envs.make import EnvConfig

EPISODES = 3


@pytest.fixture
def spread(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("spread")


@pytest.fixture
def waterworld(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The benchmark with an environment that the installed PettingZoo has."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    module = importlib.import_module("waterworld")
    monkeypatch.setattr(module, "ENV", "mpe2.simple_spread_v3")
    monkeypatch.setattr(module, "ENV_KWARGS", {"N": 2, "max_cycles": 5})
    return module


def checkpoint(make_trainer: Any, env: str, **env_kwargs: Any) -> str:
    wrappers = ["lit_rl.envs.multi_agent:AgentId"]
    data = RolloutDataModule(env, env_kwargs=env_kwargs, wrappers=wrappers, rollout_length=8, max_env_steps=64)
    trainer = make_trainer(limit_val_batches=0)
    trainer.fit(PPO(minibatch_size=8, num_epochs=1), data)
    trainer.save_checkpoint("a.ckpt")
    return "a.ckpt"


def test_an_interval_is_of_the_mean(spread: ModuleType) -> None:
    returns = importlib.import_module("agent_returns")
    mean, reach = returns.mean_and_interval([2.0, 4.0, 4.0, 6.0])
    assert mean == 4.0 and reach == pytest.approx(1.96 * np.sqrt(8 / 3) / 2)
    assert returns.line("x", [2.0, 4.0, 4.0, 6.0], 2) == "x: return 4.00 +- 1.60 (of an agent 2.00 +- 0.80), 4 episodes"
    assert spread.percent(np.array([-4.0]), np.array([-6.0, -4.0]), np.array([-1.0])) == 25.0


def test_the_controller_goes_to_the_landmark_that_is_its_own_and_stops_there(spread: ModuleType) -> None:
    def seen(place: Any, velocity: Any = (0, 0)) -> np.ndarray:
        """What an agent sees, of two others at two landmarks and a third landmark at the origin."""
        landmarks, others = np.array([(0, 0), (0, 2), (2, 0)]) - place, np.array([(0, 1.8), (1.9, 0)]) - place
        return np.concatenate([velocity, place, landmarks.ravel(), others.ravel(), np.zeros(4)]).astype(np.float32)

    act = spread.Controller().act
    assert [act(seen(place)) for place in ((0.9, 0.0), (-0.9, 0.0), (0.0, 0.9), (0.0, -0.9))] == [1, 2, 3, 4]
    assert act(seen((0.0, 0.0))) == 0
    assert act(seen((0.1, 0.0), (-1.5, 0.0))) == 2  # it brakes
    env = EnvConfig(spread.ENV, spread.ENV_KWARGS)
    returns = importlib.import_module("agent_returns")
    random, controller = (returns.returns_of(env, one, range(8)) for one in (Random(), spread.Controller()))
    assert (controller > random + 10).all()
    assert (random == returns.returns_of(env, Random(), range(8))).all()


def test_a_checkpoint_is_between_random_actions_and_the_controller(
    spread: ModuleType, make_trainer: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    path = checkpoint(make_trainer, spread.ENV, max_cycles=4)  # the environment's options are those of the benchmark
    monkeypatch.setattr("sys.argv", ["spread.py", "--episodes", str(EPISODES), "--checkpoint", path])
    spread.main()
    alone, random, controller, of_checkpoint = capsys.readouterr().out.splitlines()
    assert alone.startswith("mpe2.simple_spread_v3 by itself: ")
    assert random.startswith("random actions: return -") and controller.startswith("controller: return -")
    assert of_checkpoint.startswith("a.ckpt: return -") and of_checkpoint.endswith(" %")
    returns = importlib.import_module("agent_returns")
    seeds = spread.episode_seeds(0, EPISODES)
    found = returns.checkpoint_returns(path, spread.ENV, spread.ENV_KWARGS, seeds)
    assert returns.line(path, found, 3) in of_checkpoint and found.mean() < -40  # over 25 steps, not 4


@pytest.mark.slow
def test_waterworld_has_random_actions_checkpoints_and_what_rllib_found(
    waterworld: ModuleType, make_trainer: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    path = checkpoint(make_trainer, waterworld.ENV, **waterworld.ENV_KWARGS)
    found = {"returns": [1.0, 3.0], "env_steps": 4000, "seconds": 20.0}
    asked: list[Any] = []
    monkeypatch.setattr(waterworld, "in_its_process", lambda *arguments: asked.append(arguments) or found)
    options = ["--episodes", "2", "--checkpoint", path, "--rllib", "shared", "--rllib-env-steps", "4000"]
    monkeypatch.setattr("sys.argv", ["waterworld.py", *options])
    waterworld.main()
    alone, random, of_checkpoint, of_rllib = capsys.readouterr().out.splitlines()
    assert "env steps/s" in alone and random.startswith("random actions: return -")
    assert of_checkpoint.startswith("a.ckpt: return -")
    assert of_rllib.startswith("RLlib, shared: return 2.00 +- 1.96 (of an agent 1.00") and "200 env steps/s" in of_rllib
    assert asked == [(sys.executable, "shared", 4000, 0, str(waterworld_seeds()))]


def waterworld_seeds() -> list[int]:
    from lit_rl.viewing.playing import episode_seeds

    return episode_seeds(0, 2)


def test_returns_are_summed_over_agents_and_steps(waterworld: ModuleType) -> None:
    env = EnvConfig(waterworld.ENV, waterworld.ENV_KWARGS).make_multi_agent().env  # type: ignore[attr-defined]
    found = waterworld.episode_returns(env, lambda agent, obs: 0, [3, 4, 3])
    assert found[0] == found[2] != found[1]
    obs, _ = env.reset(seed=3)
    total = 0.0
    for _ in range(5):
        total += sum(env.step(dict.fromkeys(obs, 0))[1].values())
    assert found[0] == pytest.approx(total)


def test_rllib_that_fails_ends_the_benchmark(waterworld: ModuleType, tmp_path: Any) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexit 1\n")
    python.chmod(0o755)
    with pytest.raises(SystemExit, match=r"RLlib, shared failed\."):
        waterworld.in_its_process(str(python), "shared", 1, 0, "[]")
    python.write_text('#!/bin/sh\necho noise\necho "RESULT {\\"returns\\": [$3]}"\n')
    assert waterworld.in_its_process(str(python), 7, 1, 0, "[]") == {"returns": [7]}
