"""The game of coins, which recipes train two teams on."""

from typing import Any

import numpy as np
import pytest

from lit_rl.envs.coins import FOX, CoinGame, Fox
from lit_rl.envs.make import EnvConfig

STAY = dict.fromkeys(CoinGame.possible_agents, 0)


def placed(places: list[tuple[int, int]], coins: list[tuple[int, int]], **options: Any) -> CoinGame:
    """A game with agents and coins where a test wants them."""
    env = CoinGame(**options)
    env.reset(seed=0)
    env._places, env._coins = np.array(places), np.array(coins)
    return env


def test_the_game_is_what_an_environment_must_be() -> None:
    spec = EnvConfig("lit_rl.envs.coins:CoinGame").try_out()
    assert list(spec.agents) == ["red_0", "red_1", "blue_0", "blue_1", "fox"]


def test_both_players_get_a_coin_of_either_and_nobody_one_of_the_fox() -> None:
    env = placed([(0, 0), (5, 5), (0, 2), (7, 7), (3, 0)], [(1, 0), (0, 3), (3, 1), (7, 0)])
    _, reward, terminated, _, _ = env.step(STAY | {"red_0": 2, "blue_0": 1, FOX: 1})
    assert reward == {"red_0": 1.0, "red_1": 1.0, "blue_0": 1.0, "blue_1": 1.0} and not any(terminated.values())
    assert env._places.tolist() == [[1, 0], [5, 5], [0, 3], [7, 7], [3, 1]]
    squares = {tuple(square) for square in [*env._places.tolist(), *env._coins.tolist()]}
    assert len(squares) == 9  # new coins lie where nobody and nothing else is
    assert env.step(STAY)[1] == dict.fromkeys(reward, 0.0)


def test_a_coin_that_several_reach_goes_to_one_of_them_by_lot() -> None:
    had = set()
    for seed in range(20):
        env = placed([(0, 0), (5, 5), (2, 0), (7, 7), (7, 4)], [(1, 0), (0, 7), (1, 7), (2, 7)])
        env._rng = np.random.default_rng(seed)
        reward = env.step(STAY | {"red_0": 2, "blue_0": 4})[1]
        assert reward["red_0"] + reward["blue_0"] == 1.0
        had.add(max(reward, key=lambda agent: reward[agent]))
    assert had == {"red_0", "blue_0"}


def test_what_an_agent_sees() -> None:
    env = placed([(0, 0), (4, 4), (2, 0), (7, 7), (7, 4)], [(7, 6), (1, 0), (0, 7), (3, 3)], num_steps=4)
    obs = env.step(STAY | {"red_0": 3})[0]  # the wall holds red_0
    coins, others = [(1, 0), (3, 3), (0, 7)], [(4, 4), (2, 0), (7, 7), (7, 4)]
    expected = np.array([*coins, *others, (0, 0)]).ravel() / 8
    np.testing.assert_allclose(obs["red_0"], [*expected, 0.75], rtol=1e-6)
    mates = obs["blue_1"][6:14].reshape(4, 2) * 8 + 7
    np.testing.assert_allclose(mates, [(2, 0), (0, 0), (4, 4), (7, 4)], atol=1e-5)  # mate, opponents, fox


def test_games_of_one_seed_are_equal_and_end_in_time() -> None:
    ends = []
    for _ in range(2):
        env, rng = CoinGame(num_steps=5), np.random.default_rng(0)
        env.reset(seed=3)
        for t in range(5):
            obs, _, over, _, _ = env.step({agent: int(rng.integers(5)) for agent in env.possible_agents})
            assert set(over.values()) == {t == 4}
        ends.append(obs)
    assert all((ends[0][agent] == ends[1][agent]).all() for agent in ends[0])


def test_the_fox_reaches_the_nearest_coin() -> None:
    env = placed([(0, 0), (0, 1), (0, 2), (0, 3), (6, 1)], [(4, 4), (0, 7), (1, 7), (2, 7)])
    obs = env.step(STAY)[0]
    for _ in range(5):
        assert (4, 4) in map(tuple, env._coins.tolist())
        obs = env.step(STAY | {FOX: Fox().act(obs[FOX])})[0]
    assert (4, 4) not in map(tuple, env._coins.tolist())


def test_the_picture_has_all_of_them() -> None:
    env = placed([(0, 0), (5, 5), (0, 2), (7, 7), (3, 0)], [(1, 0), (0, 3), (3, 1), (7, 0)])
    picture = env.render()
    assert picture.shape == (128, 128, 3) and picture.dtype == np.uint8
    assert picture[120, 8].tolist() == [200, 60, 60]  # (0, 0) is at the lower left
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) == 5


def test_a_board_without_room_is_refused() -> None:
    with pytest.raises(ValueError, match="num_coins=2: expected at least 3 of each"):
        CoinGame(num_coins=2)
