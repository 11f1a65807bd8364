"""OpenSpiel's games: dealt by the seed, played by their rules, learned from."""

import sys
from typing import Any

import numpy as np
import pytest
from gymnasium import spaces

from lit_rl import MLP, PPO, MultiAgent, Random, RolloutDataModule
from lit_rl.envs.make import EnvConfig
from lit_rl.errors import OptionError
from lit_rl.evaluation.episodes import play
from lit_rl.policy import PolicySet
from lit_rl.spec import MultiAgentSpec
from lit_rl.viewing.playing import environment_of

pyspiel = pytest.importorskip("pyspiel")

from lit_rl.envs.openspiel import OpenSpielEnv  # noqa: E402

ENV = "lit_rl.envs.openspiel:OpenSpielEnv"
PASS, BET = 0, 1


def cards_of(env: OpenSpielEnv, seed: int) -> tuple[int, int]:
    """What a seed deals at Kuhn poker, read from what the players see of it: their number, and their card."""
    obs, _ = env.reset(seed=seed)
    first = obs["player_0"]["observation"]
    assert first[:2].tolist() == [1, 0] and first[2:5].sum() == 1 and not first[5:].any()
    obs = env.step({"player_0": PASS})[0]
    second = obs["player_1"]["observation"]
    assert second[:2].tolist() == [0, 1] and second[5:7].tolist() == [1, 0]  # it sees that the other passed
    return int(first[2:5].argmax()), int(second[2:5].argmax())


@pytest.mark.parametrize(
    ("line", "stake", "winner"),
    [
        ((PASS, PASS), 1, None),
        ((BET, BET), 2, None),
        ((PASS, BET, BET), 2, None),
        ((BET, PASS), 1, 0),
        ((PASS, BET, PASS), 1, 1),
    ],
)
def test_kuhn_poker_by_its_rules(line: tuple[int, ...], stake: int, winner: int | None) -> None:
    env, deals = OpenSpielEnv(), set()
    for seed in range(40):
        cards = cards_of(env, seed)
        deals.add(cards)
        obs, _ = env.reset(seed=seed)
        for turn, action in enumerate(line):
            ((agent, seen),) = obs.items()
            assert agent == f"player_{turn % 2}" and seen["action_mask"].tolist() == [1, 1]
            obs, reward, terminated, truncated, _ = env.step({agent: action})
            over = turn == len(line) - 1
            assert terminated == dict.fromkeys(env.possible_agents, over) and not truncated
            if not over:
                assert reward == {"player_0": 0.0, "player_1": 0.0}
        won = winner if winner is not None else int(cards[1] > cards[0])  # the higher card
        assert obs == {} and reward == {f"player_{won}": stake, f"player_{1 - won}": -stake}
    assert deals == {(i, j) for i in range(3) for j in range(3) if i != j}


def test_chance_is_drawn_by_its_probabilities() -> None:
    env = OpenSpielEnv("leduc_poker")
    first = [int(env.reset()[0]["player_0"]["observation"][2:8].argmax()) for _ in range(1200)]
    assert np.bincount(first, minlength=6).min() / 200 > 0.7 and np.bincount(first).max() / 200 < 1.3
    uneven = OpenSpielEnv("pig", players=2, diceoutcomes=6)  # 1 ends a turn with nothing: 1 of 6 rolls
    lost = 0
    for seed in range(600):
        uneven.reset(seed=seed)
        lost += "player_1" in uneven.step({"player_0": 0})[0]
    assert 70 < lost < 130


def games_of(env: OpenSpielEnv, seeds: Any) -> list[Any]:
    """Everything that random games show, as plain data."""
    found: list[Any] = []
    for seed in seeds:
        rng = np.random.default_rng(0)
        obs, _ = env.reset(seed=seed)
        while obs:
            found.append({a: (x["observation"].tolist(), x["action_mask"].tolist()) for a, x in obs.items()})
            actions = {a: int(rng.choice(np.flatnonzero(x["action_mask"]))) for a, x in obs.items()}
            obs, reward, *_ = env.step(actions)
            found.append((actions, reward))
    return found


@pytest.mark.parametrize("game", ["leduc_poker", "backgammon", "oshi_zumo", "markov_soccer"])
def test_the_same_seed_is_the_same_game(game: str) -> None:
    env = OpenSpielEnv(game)
    first = games_of(env, [5, 6])
    assert first == games_of(OpenSpielEnv(game), [5, 6])
    assert first != games_of(env, [7, 8]) or game == "oshi_zumo"  # nothing of which is left to chance


def test_players_of_a_joint_move_act_at_once() -> None:
    env = OpenSpielEnv("matrix_pd")
    payoffs = {}
    for row, column in np.ndindex(2, 2):
        obs, _ = env.reset(seed=0)
        assert list(obs) == ["player_0", "player_1"]
        obs, reward, terminated, _, _ = env.step({"player_0": row, "player_1": column})
        assert not obs and all(terminated.values())
        payoffs[row, column] = tuple(reward.values())
    assert payoffs == {(0, 0): (5, 5), (0, 1): (0, 10), (1, 0): (10, 0), (1, 1): (1, 1)}


class Nobody(pyspiel.State):
    """Two joint moves; in the second "player_0" has no choice. Each step pays its actions, whose numbers are kept."""

    def __init__(self, game: Any):
        super().__init__(game)
        self.moves: list[list[int]] = []

    def current_player(self) -> int:
        over = len(self.moves) == 2
        return pyspiel.PlayerId.TERMINAL if over else pyspiel.PlayerId.SIMULTANEOUS

    def _legal_actions(self, player: int) -> list[int]:
        return [] if len(self.moves) == 1 and player == 0 else [0, 1, 2]

    def _apply_actions(self, actions: list[int]) -> None:
        self.moves.append(list(actions))

    def is_terminal(self) -> bool:
        return len(self.moves) == 2

    def returns(self) -> list[float]:
        return [float(sum(move[i] for move in self.moves if move[i] >= 0)) for i in range(2)]

    def _action_to_string(self, player: int, action: int) -> str:
        return str(action)

    def __str__(self) -> str:
        return str(self.moves)


class Observer:
    """A player sees how many moves there were."""

    def __init__(self) -> None:
        self.tensor = np.zeros(1, np.float32)
        self.dict = {"observation": self.tensor}

    def set_from(self, state: Nobody, player: int) -> None:
        self.tensor[0] = len(state.moves)

    def string_from(self, state: Nobody, player: int) -> str:
        return str(len(state.moves))


class NobodyGame(pyspiel.Game):
    """OpenSpiel's form of it."""

    KIND = pyspiel.GameType(
        short_name="python_nobody", long_name="Nobody", dynamics=pyspiel.GameType.Dynamics.SIMULTANEOUS,
        chance_mode=pyspiel.GameType.ChanceMode.DETERMINISTIC,
        information=pyspiel.GameType.Information.PERFECT_INFORMATION, utility=pyspiel.GameType.Utility.GENERAL_SUM,
        reward_model=pyspiel.GameType.RewardModel.REWARDS, max_num_players=2, min_num_players=2,
        provides_information_state_string=False, provides_information_state_tensor=False,
        provides_observation_string=True, provides_observation_tensor=True, provides_factored_observation_string=False,
    )  # fmt: skip

    def __init__(self, parameters: Any = None):
        info = pyspiel.GameInfo(
            num_distinct_actions=3, max_chance_outcomes=0, num_players=2, min_utility=0.0, max_utility=4.0,
            utility_sum=None, max_game_length=2,
        )  # fmt: skip
        super().__init__(self.KIND, info, parameters or {})

    def new_initial_state(self) -> Nobody:
        return Nobody(self)

    def make_py_observer(self, iig_obs_type: Any = None, params: Any = None) -> Observer:
        return Observer()


pyspiel.register_game(NobodyGame.KIND, NobodyGame)


def test_who_has_no_choice_at_a_joint_move_is_not_asked_and_rewards_come_as_they_are_earned() -> None:
    env = OpenSpielEnv("python_nobody")
    obs, _ = env.reset(seed=0)
    assert {agent: x["observation"].tolist() for agent, x in obs.items()} == {"player_0": [0], "player_1": [0]}
    obs, reward, *_ = env.step({"player_0": 2, "player_1": 1})
    assert list(obs) == ["player_1"] and reward == {"player_0": 2.0, "player_1": 1.0}
    obs, reward, terminated, _, _ = env.step({"player_1": 2})
    assert env._state.moves[1] == [-1, 2]
    assert not obs and reward == {"player_0": 0.0, "player_1": 2.0} and all(terminated.values())


def test_the_tensor_is_the_one_that_was_asked_for() -> None:
    sizes = {name: OpenSpielEnv(observation=name).observation_space("player_0")["observation"].shape for name in
             ("information_state", "observation", None)}  # fmt: skip
    assert sizes == {"information_state": (11,), "observation": (7,), None: (11,)}
    board = OpenSpielEnv("tic_tac_toe")  # which has only observations, in planes
    space = board.observation_space("player_0")
    assert space["observation"].shape == (27,) and space["action_mask"] == spaces.MultiBinary(9)
    assert space.contains(board.reset(seed=0)[0]["player_0"])
    assert OpenSpielEnv("kuhn_poker", players=3).possible_agents == ["player_0", "player_1", "player_2"]
    assert OpenSpielEnv("kuhn_poker(players=3)").possible_agents == ["player_0", "player_1", "player_2"]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            {"game": "kuhn_pokr"},
            r"game='kuhn_pokr': expected one of the \d+ games of OpenSpiel\. Did you mean 'kuhn_poker'\?",
        ),
        ({"game": "Kuhn"}, r"games of OpenSpiel\. Did you mean 'kuhn_poker'\?"),
        (
            {"game": "turn_based_simultaneous_game(game=goofspeil())"},
            r": there is no game 'goofspeil'\. Did .*'goofspiel'",
        ),
        ({"game": "nothing_like_it"}, r"expected one of the \d+ games of OpenSpiel\.$"),
        ({"game": 3}, r"game=3: expected one of the \d+ games of OpenSpiel\.$"),
        (
            {"game": "kuhn_poker", "plyers": 3},
            "cannot be made with parameters={'plyers': 3}: there is no parameter 'plyers'. Did you mean 'players'",
        ),
        ({"game": "kuhn_poker", "players": [3]}, r"cannot be made with parameters={'players': \[3\]}"),
        ({"game": "mfg_garnet"}, "game='mfg_garnet' is a mean-field game, whose players are a crowd"),
        ({"game": "cribbage"}, "game='cribbage' describes its states in words alone: expected a tensor of numbers"),
        (
            {"game": "tic_tac_toe", "observation": "information_state"},
            "game='tic_tac_toe' has only 'observation': expected a tensor of numbers, 'information_state'",
        ),
        ({"observation": "picture"}, "observation='picture': expected 'information_state', 'observation' or None"),
    ],
)
def test_games_that_cannot_be_played_are_refused_in_one_sentence(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(OptionError, match=sentence) as caught:
        EnvConfig(ENV, options).try_out()
    assert "\n" not in str(caught.value)


def test_without_openspiel_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyspiel", None)
    with pytest.raises(OptionError, match=r"needs OpenSpiel \(.*\): pip install lit-rl\[openspiel\]\.$"):
        OpenSpielEnv()


def test_one_policy_learns_by_playing_both_sides_and_its_checkpoint_plays(make_trainer: Any) -> None:
    data = RolloutDataModule(ENV, env_kwargs={"game": "leduc_poker"}, rollout_length=64, max_env_steps=512)
    trainer = make_trainer(limit_val_batches=0)
    trainer.fit(PPO(network=MLP, minibatch_size=16, num_epochs=1), data)
    assert np.isfinite(float(trainer.callback_metrics["loss/policy"]))
    trainer.save_checkpoint("leduc.ckpt")
    assert isinstance(environment_of("leduc.ckpt").make_multi_agent(), OpenSpielEnv)


def test_a_policy_learns_against_random_play(make_trainer: Any) -> None:
    data = RolloutDataModule(ENV, env_kwargs={"game": "goofspiel", "num_cards": 4, "players": 2}, rollout_length=64,
                             max_env_steps=512)  # fmt: skip
    algorithm = MultiAgent({"me": PPO(minibatch_size=16, num_epochs=1), "other": Random()},
                           policy_mapping={"player_0": "me", "player_1": "other"})  # fmt: skip
    trainer = make_trainer(limit_val_batches=0)
    trainer.fit(algorithm, data)
    assert np.isfinite(float(trainer.callback_metrics["me/loss/policy"]))


def test_an_evaluation_is_as_long_as_its_games() -> None:
    env = EnvConfig(ENV)
    spec = env.try_out()
    assert isinstance(spec, MultiAgentSpec)
    players = PolicySet(spec, {"random": Random()}, "random").eval()
    players.rng = np.random.default_rng(0)
    episodes = list(play(env, players, range(50)))
    assert {episode.length for episode in episodes} == {2, 3} and {episode.return_ for episode in episodes} == {0.0}
