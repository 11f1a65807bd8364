"""OpenSpiel's games as environments of several agents. Needs lit-rl[openspiel]."""

import difflib
import re
from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from lit_rl.envs.multi_agent import MultiAgentEnv
from lit_rl.errors import OptionError
from lit_rl.masks import ACTION_MASK
from lit_rl.observations import short

TENSORS = ("information_state", "observation")


class OpenSpielEnv(MultiAgentEnv):
    """A game of OpenSpiel, played by "player_0", "player_1", ...

    Players act in turns, or all at once where the game asks all of them. An observation is a Dict: `observation` is the
    game's tensor of what the player knows, as a vector, and `action_mask` says which actions are legal. Rewards are
    given to all players as they come. At the end all are terminated.

    What the game leaves to chance is drawn by its probabilities, from random numbers that the seed of `reset` begins. A
    few games draw themselves, behind one outcome of probability 1 ("sampled stochastic"): those do not depend on it.

    Args:
        game: its name, such as "kuhn_poker", or with parameters, "turn_based_simultaneous_game(game=goofspiel())".
        observation: which tensor: "information_state", which has all that the player has seen, or "observation", which
            has what it sees now. None takes the first that the game has.
        **parameters: of the game.

    Raises:
        OptionError: if there is no such game or tensor, or its players cannot be asked one by one.
    """

    def __init__(self, game: str = "kuhn_poker", observation: str | None = None, **parameters: Any):
        try:
            import pyspiel
        except ImportError as error:
            raise OptionError(
                f"OpenSpielEnv(game={short(game)}) needs OpenSpiel ({error}): pip install lit-rl[openspiel]."
            ) from error
        self._game = _loaded(pyspiel, game, parameters)
        kind = self._game.get_type()
        if kind.dynamics == pyspiel.GameType.Dynamics.MEAN_FIELD:
            raise OptionError(f"game={game!r} is a mean-field game, whose players are a crowd: expected one of others.")
        self._tensor = _tensor_of(game, kind, observation)
        size = getattr(self._game, f"{self._tensor}_size")()
        num_actions = self._game.num_distinct_actions()
        self.possible_agents: Sequence[str] = [f"player_{i}" for i in range(self._game.num_players())]
        self._nothing = pyspiel.INVALID_ACTION  # what a player does at a joint move who has no choice
        self._observation_space = spaces.Dict(
            {"observation": spaces.Box(-np.inf, np.inf, (size,)), ACTION_MASK: spaces.MultiBinary(num_actions)}
        )
        self._action_space: gym.Space = spaces.Discrete(num_actions)
        self._rng = np.random.default_rng()

    def observation_space(self, agent: str) -> gym.Space:
        return self._observation_space

    def action_space(self, agent: str) -> gym.Space:
        return self._action_space

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[dict, dict]:
        if seed is not None:
            self._rng = np.random.default_rng(seed)
        self._state = self._game.new_initial_state()
        self._returns = np.zeros(len(self.possible_agents))
        self._let_chance_act()
        return self._observe(), {}

    def step(self, actions: dict[str, Any]) -> tuple[dict, dict, dict, dict, dict]:
        if self._state.is_simultaneous_node():
            chosen = [int(actions.get(agent, self._nothing)) for agent in self.possible_agents]
            self._state.apply_actions(chosen)
        else:
            (action,) = actions.values()
            self._state.apply_action(int(action))
        self._let_chance_act()
        # The difference, as `rewards()` would leave out those before a move of chance.
        before, self._returns = self._returns, np.array(self._state.returns())
        reward = dict(zip(self.possible_agents, (self._returns - before).tolist()))
        over = dict.fromkeys(self.possible_agents, self._state.is_terminal())
        return self._observe(), reward, over, {}, {}

    def _let_chance_act(self) -> None:
        while self._state.is_chance_node():
            outcomes, probabilities = zip(*self._state.chance_outcomes())
            up_to = np.cumsum(probabilities)
            drawn = np.searchsorted(up_to, self._rng.random() * up_to[-1], side="right")
            self._state.apply_action(outcomes[drawn])

    def _observe(self) -> dict[str, dict[str, np.ndarray]]:
        """What those see that act next."""
        state = self._state
        if state.is_terminal():
            return {}
        players = range(len(self.possible_agents)) if state.is_simultaneous_node() else [state.current_player()]
        return {self.possible_agents[player]: self._seen(player) for player in players if state.legal_actions(player)}

    def _seen(self, player: int) -> dict[str, np.ndarray]:
        tensor = getattr(self._state, self._tensor)(player)
        mask = self._state.legal_actions_mask(player)
        return {"observation": np.array(tensor, np.float32), ACTION_MASK: np.array(mask, np.int8)}


def _loaded(pyspiel: Any, game: str, parameters: dict[str, Any]) -> Any:
    """OpenSpiel's game of a name."""
    name = game.partition("(")[0] if isinstance(game, str) else game
    known = pyspiel.registered_names()
    if name not in known:
        hint = _hint(name, known)
        raise OptionError(f"game={short(game)}: expected one of the {len(known)} games of OpenSpiel.{hint}")
    try:
        return pyspiel.load_game(game, parameters) if parameters else pyspiel.load_game(game)
    except (pyspiel.SpielError, TypeError, ValueError, LookupError) as error:
        message = " ".join(str(error).split())
        listed = re.match(r"Unknown (game|parameter) '(.*?)'\. Available \w+ are: (.*)", message)
        if listed:  # also a game inside of the name
            kind, unknown, there = listed.groups()
            message = f"there is no {kind} {unknown!r}.{_hint(unknown, re.split(r'[ ,]+', there))}"
        raise OptionError(
            f"game={short(game)} cannot be made with parameters={short(parameters)}: {message}"
        ) from error


def _hint(name: Any, known: Sequence[str]) -> str:
    """A sentence, after a space, with the name that may be meant; "" if none is like it."""
    if not isinstance(name, str):
        return ""
    alike = difflib.get_close_matches(name, known, n=1) or [x for x in known if name.lower() in x]
    return f" Did you mean {alike[0]!r}?" if alike else ""


def _tensor_of(game: str, kind: Any, observation: str | None) -> str:
    """The method of a state that gives a player's observation."""
    if observation is not None and observation not in TENSORS:
        raise OptionError(f"observation={short(observation)}: expected 'information_state', 'observation' or None.")
    there = [name for name in TENSORS if getattr(kind, f"provides_{name}_tensor")]
    wanted = TENSORS if observation is None else (observation,)
    found = [name for name in wanted if name in there]
    if not found:
        has = f"has only {there[0]!r}" if there else "describes its states in words alone"
        raise OptionError(f"game={game!r} {has}: expected a tensor of numbers, {' or '.join(map(repr, wanted))}.")
    return f"{found[0]}_tensor"
