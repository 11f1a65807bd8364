"""What central critics are given: for every row, and for what follows it, the whole as it was then."""

from collections.abc import Collection
from typing import Any

import numpy as np
import pytest
import torch
from agent_envs import MADE, LoggedAgents, MaskedInTurns, Wrong
from gymnasium import spaces
from helpers import quiet_trainer

from lit_rl import APPO, IMPALA, PPO, Evaluation, MultiAgent, Policy, Random, RolloutDataModule
from lit_rl.central import central_space, with_central
from lit_rl.envs.make import EnvConfig
from lit_rl.errors import EnvError, EnvFailure, OptionError
from lit_rl.policy import PolicySet
from lit_rl.rollout import WITH_CENTRAL, bootstrap_values, mask_of, next_values
from lit_rl.runners.gathering import to_rollout, to_rollouts
from lit_rl.runners.multi_agent_runner import MultiAgentEnvRunner
from lit_rl.spec import MultiAgentSpec

MODES = [("turns", 3), ("together", 2), ("random", 3), ("once", 3), ("cars", 3)]
NOBODY = -1


class Watched(LoggedAgents):
    """Notes, for everything that an agent observes, what all agents had observed last then.

    That is its state; in it those are still there who have just been truncated.
    """

    def __init__(self, mode: str, num_agents: int):
        super().__init__(mode, num_agents)
        self._lives = 500 * len(MADE)  # numbers of copies differ
        self.state_space = spaces.Box(-1.0, 1e6, (num_agents,))
        self.joint: dict[str, dict[int, list[int]]] = {"state": {}, "observations": {}}

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[dict, dict]:
        obs, info = super().reset(seed=seed, options=options)
        self._latest: dict[str, int] = {}
        self._slots: dict[str, int] = {}
        self._note(obs, {}, {})
        return obs, info

    def step(self, actions: dict[str, Any]) -> tuple[dict, dict, dict, dict, dict]:
        obs, reward, terminated, truncated, info = super().step(actions)
        self._note(obs, terminated, truncated)
        return obs, reward, terminated, truncated, info

    def state(self) -> np.ndarray:
        return np.array(self._now, np.float32)

    def _note(self, obs: dict, terminated: dict, truncated: dict) -> None:
        gone = {agent for agent in (*terminated, *truncated) if terminated.get(agent) or truncated.get(agent)}
        for agent, seen in obs.items():
            if not terminated.get(agent):
                self._latest[agent] = int(seen[0])
            if agent not in gone and agent not in self._slots:
                self._slots[agent] = self._free(agent, gone)
        for agent in gone:
            if terminated.get(agent):
                self._latest.pop(agent)
        self._now = self._whole(gone)
        for agent in obs.keys() & self._latest.keys():
            self.joint["state"][self._latest[agent]] = self._now
            if agent in gone:
                self.joint["observations"][self._latest[agent]] = self._now
        for agent in gone:
            self._latest.pop(agent, None)
        for agent in obs.keys() & self._latest.keys():
            self.joint["observations"][self._latest[agent]] = self._whole()
        if self._mode == "cars":
            self._slots = {agent: slot for agent, slot in self._slots.items() if agent not in gone}

    def _whole(self, gone: Collection[str] = ()) -> list[int]:
        """By slot. One that is gone is shown before a new one in the same slot."""
        found = [NOBODY] * self._num
        for agent in sorted(self._latest, key=lambda agent: agent in gone):
            found[self._slots[agent]] = self._latest[agent]
        return found

    def _free(self, agent: str, gone: set[str]) -> int:
        if self._mode != "cars":
            return self.possible_agents.index(agent)
        taken = {slot for other, slot in self._slots.items() if other not in gone}
        return min(set(range(self._num)) - taken)


def make(mode: str, num_agents: int, kind: str, length: int = 7, num_envs: int = 2) -> MultiAgentEnvRunner:
    MADE.clear()
    env = EnvConfig(Watched, {"mode": mode, "num_agents": num_agents})
    spec = env.try_out()
    assert isinstance(spec, MultiAgentSpec)
    seed, policy = np.random.SeedSequence(0), Policy(with_central(spec, kind))
    MADE.clear()
    return MultiAgentEnvRunner(env, policy, num_envs=num_envs, rollout_length=length, seed=seed)


@pytest.mark.parametrize("kind", ["state", "observations"])
@pytest.mark.parametrize(("mode", "num_agents"), MODES)
def test_every_row_and_what_follows_it_have_the_whole_as_it_was_then(mode: str, num_agents: int, kind: str) -> None:
    if mode == "cars" and kind == "state":
        pytest.skip("cars take each other's slots within a step, of which the environment's state knows nothing")
    runner, found = make(mode, num_agents, kind), 0
    for _ in range(20):
        rollout = to_rollout([runner.sample()], copy=False)
        joint = {number: x for env in MADE for number, x in env.joint[kind].items()}  # type: ignore[attr-defined]
        real = mask_of(rollout)
        assert real is not None
        number, next_number = next_values(rollout, lambda obs: obs[:, 0])
        for slot in range(num_agents):

            def seen(_: Any, central: Any, slot: int = slot) -> torch.Tensor:
                if kind == "state":
                    return central["state"][:, slot]
                alive = central["alive"][:, slot].bool()
                observed = central["observations"][str(slot)]
                assert not observed[~alive].any()
                return torch.where(alive, observed[:, 0], NOBODY)

            value, next_value = next_values(rollout, seen, WITH_CENTRAL)
            bootstrap = bootstrap_values(rollout, seen, WITH_CENTRAL)
            for b, t in real.nonzero().tolist():
                assert value[b, t] == joint[int(number[b, t])][slot]
                if not rollout["next", "terminated"][b, t]:
                    assert next_value[b, t] == joint[int(next_number[b, t])][slot]
                    found += 1
                    if rollout["next", "truncated"][b, t]:
                        assert bootstrap[b, t] == next_value[b, t]
        agent = rollout["central"]["agent_id"][real].argmax(-1)
        assert torch.equal(agent, rollout["observation"][real][:, 1].long())
        assert (rollout["central"]["agent_id"][real].sum(-1) == 1).all()
    assert found > 50


def test_rows_have_central_inputs_only_where_a_critic_asks_for_them() -> None:
    seen: dict[str, set[str]] = {}

    class Watch(MultiAgent):
        def metrics_of(self, batch: Any) -> Any:
            seen.update({policy_id: set(rollout.keys()) for policy_id, rollout in batch.items()})
            return super().metrics_of(batch)

    small: dict[str, Any] = {"minibatch_size": 8, "num_epochs": 1}
    algorithm = Watch({"a": PPO(**small), "b": PPO(central_critic="observations", **small), "c": IMPALA()})
    data = RolloutDataModule(
        LoggedAgents, env_kwargs={"mode": "turns", "num_agents": 3}, rollout_length=32, max_env_steps=512,
        evaluation=Evaluation(episodes=1),
    )  # fmt: skip
    quiet_trainer().fit(algorithm, data)
    central = {"central", "last_central", "final_central"}
    assert central <= seen["b"] and not central & (seen["a"] | seen["c"])


def test_masks_are_no_part_of_what_all_agents_observe() -> None:
    spec = EnvConfig(MaskedInTurns).try_out()
    assert isinstance(spec, MultiAgentSpec)
    space = central_space(spec, "observations")
    assert space["observations"] == spaces.Tuple([spaces.Box(-1, 1, (2,))] * 2)
    data = RolloutDataModule(MaskedInTurns, rollout_length=32, max_env_steps=512, evaluation=Evaluation(episodes=1))
    quiet_trainer().fit(PPO(central_critic="observations", minibatch_size=16, num_epochs=1), data)


class Stateful(Wrong):
    """Two agents whose environment's state may be wrong."""

    def __init__(self, state: Any = None, space: Any = None):
        super().__init__()
        self.state_space = spaces.Box(-1, 1, (3,)) if space is None else space
        self._state = np.zeros(3, np.float32) if state is None else state

    def state(self) -> Any:
        if isinstance(self._state, Exception):
            raise self._state
        return self._state


def fit(algorithm: Any, env: Any = Wrong, **env_kwargs: Any) -> None:
    data = RolloutDataModule(
        env, env_kwargs=env_kwargs, rollout_length=16, max_env_steps=512, evaluation=Evaluation(episodes=1)
    )
    quiet_trainer().fit(algorithm, data)


@pytest.mark.parametrize(
    ("algorithm", "env", "env_kwargs", "sentence"),
    [
        (PPO(central_critic="state"), Wrong, {}, "central_critic='state': env=.*Wrong has no state\\(\\)"),
        (IMPALA(central_critic="state"), "CartPole-v1", {}, "env=CartPole-v1 has one agent: expected an env"),
        (APPO(central_critic="state", share_encoder=True), Stateful, {}, "share_encoder=True: with central_critic"),
        (PPO(central_critic="state"), Stateful, {"space": spaces.Text(3)}, "no state\\(\\) with a state_space"),
    ],
)  # fmt: skip
def test_a_central_critic_that_cannot_be_is_refused(algorithm: Any, env: Any, env_kwargs: Any, sentence: str) -> None:
    with pytest.raises(OptionError, match=sentence):
        fit(algorithm, env, **env_kwargs)


@pytest.mark.parametrize(
    ("state", "error", "sentence"),
    [
        (np.zeros(2, np.float32), EnvError, "state\\(\\) is not in state_space: .*shape"),
        (np.full(3, np.nan, np.float32), EnvError, "state\\(\\) is not in state_space: .*expected finite numbers"),
        (ValueError("lost"), EnvFailure, "raised in state: ValueError: lost"),
    ],
)
def test_a_state_that_is_wrong_is_said(state: Any, error: Any, sentence: str) -> None:
    with pytest.raises(error, match=sentence):
        fit(PPO(central_critic="state", minibatch_size=8, num_epochs=1), Stateful, state=state)


def test_agents_of_patterns_that_observe_different_things_have_no_joint_observation() -> None:
    class Two(LoggedAgents):
        def __init__(self) -> None:
            super().__init__("cars", 2)
            self.possible_agents = ["car_*", "bus_*"]

        def observation_space(self, agent: str) -> Any:
            return spaces.Box(-1.0, 1e6, (2 if agent == "car_*" else 3,))

    spec = EnvConfig(Two).try_out()
    assert isinstance(spec, MultiAgentSpec)
    with pytest.raises(OptionError, match="those of another pattern"):
        central_space(spec, "observations")


class Classes(Wrong):
    """Two agents that observe classes; what "b" is given, or the state, may be none of them."""

    state_space = spaces.MultiDiscrete([3, 4])

    def __init__(self, seen: Any = (1, 1), state: Any = (1, 1)):
        super().__init__()
        self._seen, self._now = seen, state

    def observation_space(self, agent: str) -> Any:
        return spaces.MultiDiscrete([3, 4])

    def state(self) -> np.ndarray:
        return np.array(self._now if self._t > 12 else (1, 1))

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> Any:
        self._t = 0
        return {agent: np.array([1, 1]) for agent in ("a", "b")}, {}

    def step(self, actions: Any) -> Any:
        self._t += 1
        obs = {"a": np.array([1, 1]), "b": np.array(self._seen if self._t > 12 else (1, 1))}
        return obs, {"a": 1.0, "b": 1.0}, dict.fromkeys(obs, self._t == 20), {}, {}


@pytest.mark.parametrize(
    ("kind", "env_kwargs", "sentence"),
    [
        ("observations", {"seen": (3, 0)}, r"agent 'b' was given .*\[3 0\], expected a value in MultiDiscrete"),
        ("state", {"state": (0, 4)}, r"state\(\) gave \[0 4\], expected a value in MultiDiscrete\(\[3 4\]\)"),
    ],
)
def test_classes_that_there_are_not_are_refused(kind: str, env_kwargs: Any, sentence: str) -> None:
    """Also of an agent whose own policy is a script, which nothing else looks at."""
    policies = {"x": PPO(central_critic=kind, minibatch_size=8, num_epochs=1), "r": Random()}
    with pytest.raises(EnvError, match=sentence):
        fit(MultiAgent(policies, policy_mapping={"a": "x", "b": "r"}), Classes, **env_kwargs)


class Broken(Wrong):
    """What "b" is given is not finite after 12 steps."""

    def step(self, actions: Any) -> Any:
        self._t += 1
        nan = np.array([np.nan, 0.0], np.float32)
        obs = {"a": np.zeros(2, np.float32), "b": nan if self._t > 12 else np.zeros(2, np.float32)}
        return obs, {"a": 1.0}, dict.fromkeys(obs, self._t == 20), {}, {}


def test_a_number_that_is_not_finite_is_of_the_agent_that_was_given_it() -> None:
    policies = {"x": PPO(central_critic="observations", minibatch_size=8, num_epochs=1), "r": Random()}
    with pytest.raises(EnvError, match=r"observations=nan of agent 'b' of copy 0"):
        fit(MultiAgent(policies, policy_mapping={"a": "x", "b": "r"}), Broken)


@pytest.mark.parametrize("kind", ["state", "observations"])
def test_a_rollout_without_a_row_has_central_inputs_too(kind: str) -> None:
    """Another learner process may have rows of the policy: all learn from batches of one form."""
    spec = EnvConfig(Watched, {"mode": "together", "num_agents": 2}).try_out()
    assert isinstance(spec, MultiAgentSpec)
    policies = PolicySet(spec, {"one": Policy(with_central(spec, kind))}, "one", ["one"])
    rollout = to_rollouts([], policies, ["one"], 0, copy=True)["one"]
    assert not mask_of(rollout).any()
    assert set(rollout.keys()) == set(to_rollout([make("together", 2, kind).sample()], copy=False).keys())
