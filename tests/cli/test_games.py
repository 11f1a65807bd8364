"""Games against random actions: who wins, and what is illegal, as `benchmarks/games.py` counts it."""

import importlib
import json
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from helpers import ROOT

from lit_rl import MLP, PPO, Evaluation, Policy, RolloutDataModule
from lit_rl.envs.make import EnvConfig
from lit_rl.envs.pettingzoo import adapted
from lit_rl.spec import MultiAgentSpec

TICTACTOE = EnvConfig("pettingzoo.classic.tictactoe_v3")


@pytest.fixture
def games(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("games")


def first_square_that_is_free() -> Policy:
    """A policy that prefers squares by their number."""
    spec = TICTACTOE.try_out()
    assert isinstance(spec, MultiAgentSpec)
    policy = Policy(spec.shared(), network=MLP)
    with torch.no_grad():
        policy.head.weight.zero_()
        policy.head.bias.copy_(torch.arange(9.0, 0.0, -1.0))
    return policy


def test_games_are_won_drawn_and_lost_and_the_same_seeds_give_the_same(games: ModuleType) -> None:
    policy, seeds = first_square_that_is_free(), list(range(60))
    first, again = (games.play_games(TICTACTOE, policy, games.Match("player_1"), seeds) for _ in range(2))
    assert first == again and set(first.returns) == {-1.0, 0.0, 1.0}
    counts = first.counts
    assert counts["won"] + counts["drawn"] + counts["lost"] == 60 and counts["illegal"] == 0
    assert counts["won"] == list(first.returns).count(1.0) > counts["lost"] == list(first.returns).count(-1.0)
    second = games.play_games(TICTACTOE, policy, games.Match("player_2"), seeds).counts
    assert second["won"] < counts["won"]  # who begins has the better game


def test_actions_that_the_mask_forbids_are_counted(games: ModuleType) -> None:
    counted: list[int] = []
    env = games.CountIllegal(adapted(TICTACTOE.make_multi_agent().env), "player_2", lambda: counted.append(1))  # type: ignore[attr-defined]
    env.reset(seed=0)
    env.step({"player_1": 4})
    assert not counted
    env.step({"player_2": 4})
    assert len(counted) == 1


def test_an_agent_that_is_not_there_is_refused(games: ModuleType) -> None:
    with pytest.raises(ValueError, match=r"--agent player_3: .* has the agents \['player_1', 'player_2'\]"):
        games.play_games(TICTACTOE, first_square_that_is_free(), games.Match("player_3"), [0])


def test_a_checkpoint_plays_from_the_command_line(
    games: ModuleType, make_trainer: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    data = RolloutDataModule(TICTACTOE.env, rollout_length=16, max_env_steps=16, num_envs_per_env_runner=1)
    trainer, algorithm = make_trainer(limit_val_batches=0), PPO(network=MLP, minibatch_size=8, num_epochs=1)
    trainer.fit(algorithm, data)
    trainer.save_checkpoint("a.ckpt")
    options = ["--agent", "player_2", "--games", "7", "--env", str(TICTACTOE.env)]
    monkeypatch.setattr("sys.argv", ["games.py", "a.ckpt", *options])
    games.main()
    line = capsys.readouterr().out
    assert line.startswith("a.ckpt: won ") and line.endswith("illegal 0\n")
    assert sum(int(word.split()[1]) for word in line.split(": ")[1].split(", ")) == 7


def test_a_recipe_of_a_game_is_judged_by_the_games_that_are_not_lost(
    games: ModuleType, make_trainer: Any, tmp_path: Any
) -> None:
    results = importlib.import_module("results")
    folder = tmp_path / "ppo_tictactoe"
    run = folder / "seed_1" / "version_0"
    (run / "checkpoints").mkdir(parents=True)
    data = RolloutDataModule(
        TICTACTOE.env, rollout_length=16, max_env_steps=16, num_envs_per_env_runner=1, evaluation=Evaluation(episodes=1)
    )
    trainer, algorithm = make_trainer(limit_val_batches=0), PPO(network=MLP, minibatch_size=8, num_epochs=1)
    trainer.fit(algorithm, data)
    trainer.save_checkpoint(run / "checkpoints" / "last.ckpt")
    (run / "metrics.csv").write_text("env_steps,rollout/return_mean/player_1\n16,0.5\n")
    (folder / "seed_1" / "trained.json").write_text(json.dumps({"commit": "c", "wall_s": 1.0}))
    found = results.run_seed("ppo_tictactoe", 1, folder, 20)
    games_of = found["games"]["player_1"]
    assert found["return_mean"] == pytest.approx(100 * (games_of["won"] + games_of["drawn"]) / 20)
    assert found["training_return_mean"] == 0.5
    assert np.isfinite(found["return_std"])


class TowardsCoins(Policy):
    """Goes to the nearest coin, as the fox does."""

    def action_parameters(self, features: torch.Tensor, obs: Any) -> torch.Tensor:
        right, up = obs[..., 0], obs[..., 1]
        sideways = right.abs() >= up.abs()
        action = torch.where(sideways, torch.where(right > 0, 2, 4), torch.where(up > 0, 1, 3))
        return 9.0 * torch.nn.functional.one_hot(action, 5).float()


def test_teams_play_against_teams_beside_a_script(games: ModuleType) -> None:
    env = EnvConfig("lit_rl.envs.coins:CoinGame", {"num_steps": 30})
    spec = env.try_out()
    assert isinstance(spec, MultiAgentSpec)
    policy, scripts = TowardsCoins(spec.shared(), network=MLP), {"fox": "lit_rl.envs.coins:Fox"}
    found = {
        team: games.play_games(env, policy, games.Match(f"{team}_*", None, f"{other}_*", scripts), range(10))
        for team, other in (("red", "blue"), ("blue", "red"))
    }
    assert all(played.counts == {"won": 10, "drawn": 0, "lost": 0, "illegal": 0} for played in found.values())
    alone = games.play_games(env, policy, games.Match("red_*", None, "blue_*"), range(10))  # the fox walks at random
    assert sum(alone.returns) > sum(found["red"].returns)
    with pytest.raises(ValueError, match=r"--against green_\*: env=.* has the agents"):
        games.play_games(env, policy, games.Match("red_*", None, "green_*"), [0])


def test_a_recipe_of_teams_is_judged_by_the_worse_one(games: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    results = importlib.import_module("results")
    played = {"red_*": games.Games([1.0, 0.0, 2.0, -1.0], 0), "blue_*": games.Games([1.0, 1.0, 1.0, 0.0], 0)}
    monkeypatch.setattr(results, "play_games", lambda env, policy, match, seeds: played[match.agent])
    monkeypatch.setattr(results, "load_policy", lambda path, policy: policy)
    counts, matches = results.GAMES["mixed_coins"]
    returns, found = results.shares("x.ckpt", None, counts, matches, range(4))
    assert returns == [100.0, 0.0, 100.0, 0.0] and found["blue_*"]["won"] == 3
    assert results.shares("x.ckpt", None, "not lost", matches, range(4))[0] == [100.0, 100.0, 100.0, 0.0]
