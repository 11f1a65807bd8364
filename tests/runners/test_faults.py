"""Environments that raise: rebuilt alone, every env step accounted for. No Ray needed."""

import logging
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from envs import CounterEnv, OurFault, SampleEnv
from gymnasium import spaces
from helpers import make_runner, next_rollout

from lit_rl import DQN, PPO, Evaluation, FaultTolerance, LSTMNetwork, ReplayDataModule, RolloutDataModule
from lit_rl.envs.make import EnvConfig
from lit_rl.errors import EnvError, EnvFailure, OptionError, RunnerError
from lit_rl.policy import Policy
from lit_rl.rollout import next_observation, rows
from lit_rl.runners.env_runner import EnvRunner
from lit_rl.runners.faults import BACKOFF_S, Heartbeat, Phase, Restarts, Watchdog
from lit_rl.runners.gathering import padded, to_rollout
from lit_rl.runners.ledger import Entry, Ledger
from lit_rl.spec import EnvSpec

MANY = FaultTolerance(max_restarts=1_000_000)
COUNTER_SPEC = EnvConfig(CounterEnv).spec()
SPEC = EnvSpec("Sometimes", spaces.Box(-1, 1, (2,)), spaces.Discrete(2))


class BreaksAt(CounterEnv):
    """CounterEnv of one long episode, whose observation tells which copy it is; raises at given steps of copy 0.

    obs = 1000 * copy + 100 * episode + t.
    """

    made = 0

    def __init__(self, at: tuple[int, ...] = (), where: str = "step"):
        super().__init__()
        self.copy, BreaksAt.made = BreaksAt.made, BreaksAt.made + 1
        self._at, self._where = at, where

    def _obs(self) -> np.ndarray:
        return super()._obs() + 1000 * self.copy

    def reset(self, **kwargs: Any) -> tuple:
        if self._where == "reset" and self._episode + 1 in self._at and self.copy == 0:
            raise AssertionError
        return super().reset(**kwargs)

    def step(self, action: int) -> tuple:
        if self._where == "step" and self._episode == 1 and self._t in self._at and self.copy == 0:
            raise ValueError("the simulator fell over")
        return super().step(action)


def runner_of(env: EnvConfig, num_envs: int = 2, length: int = 6, **options: Any) -> EnvRunner:
    spec = env.spec() if env.env_kwargs.get("step", 0.0) == 0.0 else SPEC
    policy = Policy(spec, network=options.pop("network", None))
    BreaksAt.made = 0
    return make_runner(env, policy, num_envs, length, **options)


def test_an_environment_that_raises_is_rebuilt_alone_and_its_episode_cut() -> None:
    # Episodes of 2, 3 and 4 steps. Environment 0 raises at the second step of its second episode: in row 3.
    runner = runner_of(EnvConfig(BreaksAt, {"at": (1,)}))
    fragment = runner.sample()
    rollout = to_rollout([fragment], copy=False)
    obs, next_obs = rollout["observation"].squeeze(-1), next_observation(rollout).squeeze(-1)
    assert obs.tolist() == [[0, 1, 100, 101, 2000, 2001], [1000, 1001, 1100, 1101, 1102, 1200]]
    assert next_obs[0].tolist() == [1, 2, 101, 2000, 2001, 2002]  # of row 3, which is masked, it says nothing
    assert next_obs[1].tolist() == [1001, 1002, 1101, 1102, 1103, 1201]
    assert rollout["mask"].tolist() == [[True, True, True, False, True, True], [True] * 6]
    assert rollout["next", "terminated"].tolist() == [[False, True, *[False] * 3, True], [False, True, *[False] * 4]]
    assert rollout["next", "truncated"].tolist() == [[False, False, True, *[False] * 3], [*[False] * 4, True, False]]
    assert rollout["is_init"].tolist() == [
        [True, False, True, False, True, False],
        [True, False, True, False, False, True],
    ]
    assert sorted(e.length for e in fragment.episodes) == [2, 2, 2, 3]  # the cut one is no finished episode
    assert fragment.entry == Entry(0, 12, 11, {"env_error": 1})
    assert len(fragment.failures) == 1 and "ValueError: the simulator fell over" in fragment.failures[0]
    again = runner.sample()
    assert again.entry == Entry(12, 24, 12, {}) and "mask" not in again.finals.views()


def test_a_failure_at_a_fragments_first_row_leaves_the_last_one_as_it_was() -> None:
    runner = runner_of(EnvConfig(BreaksAt, {"at": (1,)}), num_envs=1, length=3)
    first, second = (next_rollout(runner) for _ in range(2))
    assert first["observation"].flatten().tolist() == [0, 1, 100] and first.get("mask", None) is None
    assert first["last_observation"].item() == 101 and not first["next", "done"][0, 2]
    assert second["observation"].flatten().tolist() == [101, 1000, 1001]
    assert second["mask"].tolist() == [[False, True, True]] and second["is_init"].tolist() == [[False, True, False]]


def test_a_reset_that_raises_costs_no_env_step() -> None:
    runner = runner_of(EnvConfig(BreaksAt, {"at": (1,), "where": "reset"}), num_envs=1)
    fragment = runner.sample()
    rollout = to_rollout([fragment], copy=False)
    assert rollout["observation"].flatten().tolist() == [0, 1, 1000, 1001, 1100, 1101]
    assert next_observation(rollout).flatten().tolist() == [1, 2, 1001, 1002, 1101, 1102]
    assert fragment.entry == Entry(0, 6, 6, {}) and "raised in reset: AssertionError" in fragment.failures[0]


class Sometimes(SampleEnv):
    """Raises in a step or a reset with a given probability, from a generator of its own."""

    def __init__(self, step: float, reset: float, observation_space: Any = None):
        super().__init__(observation_space or spaces.Box(-1, 1, (2,)), spaces.Discrete(2))
        self._step, self._reset = step, reset
        self.first: list[float] = []

    rng = np.random.default_rng(0)

    def reset(self, **kwargs: Any) -> tuple:
        if self.rng.random() < self._reset:
            raise OSError("no reset")
        return super().reset(**kwargs)

    def step(self, action: int) -> tuple:
        if self.rng.random() < self._step:
            raise OSError("no step")
        return super().step(action)


@pytest.mark.parametrize("vectorization", ["sync", "native"])
@pytest.mark.parametrize("network", [None, LSTMNetwork])
def test_every_env_step_is_delivered_once_or_discarded_with_a_reason(
    vectorization: str, network: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lit_rl.runners.survival.time.sleep", lambda seconds: None)
    options = {"step": 0.02, "reset": 0.05}
    env, spec = EnvConfig("test_faults:Sometimes", options), SPEC
    if vectorization == "native":
        env = EnvConfig("test_faults:sometimes_vector", options, vectorization="native")
    ledger, policy, failures = Ledger(), Policy(spec, network=network), 0
    runner = make_runner(env, policy, num_envs=4, length=8, seed=1, faults=MANY)
    for _ in range(60):
        fragment = runner.sample()
        failures += len(fragment.failures)
        ledger.deliver(0, 0, fragment.entry)
        rollout = to_rollout([fragment], copy=False)
        mask = rollout.get("mask", torch.ones(4, 8, dtype=torch.bool))
        assert int(mask.sum()) == fragment.entry.delivered
        log_prob, _ = policy.evaluate(rollout)
        torch.testing.assert_close(log_prob[mask], rollout["action_log_prob"][mask], atol=1e-5, rtol=0)
    assert failures > 20 and ledger.discarded["env_error"] > 10
    assert ledger.executed == runner.executed
    firsts = rollout["observation"][:, 0, 0]
    assert len(set(firsts.tolist())) == 4


def sometimes_vector(num_envs: int, **options: float) -> Any:
    from gymnasium.vector import AutoresetMode, SyncVectorEnv

    return SyncVectorEnv([lambda: Sometimes(**options)] * num_envs, autoreset_mode=AutoresetMode.SAME_STEP)


def test_rebuilt_environments_never_begin_as_another_did(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lit_rl.runners.survival.time.sleep", lambda seconds: None)
    runner = runner_of(EnvConfig("test_faults:Sometimes", {"step": 0.3, "reset": 0.0}), num_envs=4, faults=MANY)
    begins = []
    for _ in range(50):
        view = runner.sample().rows.views()
        begins += view["observation"][view["is_init"]][:, 0].tolist()
    assert len(begins) > 100 and len(set(begins)) == len(begins)


@pytest.mark.parametrize("max_restarts", [0, 3])
def test_the_budget_ends_what_fails_too_often(max_restarts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr("lit_rl.runners.survival.time.sleep", slept.append)
    env = EnvConfig("test_faults:Sometimes", {"step": 1.0, "reset": 0.0})
    runner = make_runner(env, Policy(SPEC), num_envs=1, faults=FaultTolerance(max_restarts=max_restarts))
    with pytest.raises(EnvFailure, match="raised in step: OSError: no step") as caught:
        runner.sample()
    assert ("more than max_restarts=3 in 600 s allows" in str(caught.value)) == bool(max_restarts)
    assert slept == ([1.0, 2.0] if max_restarts else [])  # the first is for nothing, then the wait doubles


def test_the_budget_forgets_failures_of_long_ago(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("lit_rl.runners.faults.time.monotonic", lambda: now[0])
    restarts = Restarts(FaultTolerance(max_restarts=2, restart_window_s=10.0))
    assert [restarts.failed(), restarts.failed()] == [BACKOFF_S, 2 * BACKOFF_S]
    now[0] = 11.0
    restarts.went_well()
    assert [restarts.failed(), restarts.failed(), restarts.failed()] == [BACKOFF_S, 2 * BACKOFF_S, None]
    assert restarts.total == 5


def test_the_ledger_refuses_gaps_and_repeats() -> None:
    ledger = Ledger()
    ledger.deliver(0, 0, Entry(0, 10, 9, {"env_error": 1}))
    for entry in (Entry(0, 10, 10, {}), Entry(12, 20, 8, {}), Entry(10, 20, 9, {})):
        with pytest.raises(RunnerError, match="after step 10"):
            ledger.deliver(0, 0, entry)
    assert ledger.discard(0, 0, 14, "died") == 4
    ledger.deliver(0, 1, Entry(0, 5, 5, {}))
    assert (ledger.delivered, dict(ledger.discarded), ledger.executed) == (14, {"env_error": 1, "died": 4}, 19)


def test_a_heartbeat_is_read_by_others(tmp_path: Any) -> None:
    mine = Heartbeat.create(tmp_path / "beat")
    Heartbeat(tmp_path / "beat").write(7, Phase.RESET)
    assert (mine.executed, mine.phase) == (7, Phase.RESET)


def test_an_alarm_comes_after_the_limit_and_little_later_and_is_seldom_set(monkeypatch: pytest.MonkeyPatch) -> None:
    now, alarms = [100.0], [float("inf")]
    monkeypatch.setattr("lit_rl.runners.faults.signal.signal", lambda *_: None)
    monkeypatch.setattr("lit_rl.runners.faults.time.monotonic", lambda: now[0])
    monkeypatch.setattr(
        "lit_rl.runners.faults.signal.setitimer",
        lambda _, seconds: alarms.append(now[0] + seconds if seconds else float("inf")),
    )
    watchdog = Watchdog(FaultTolerance(init_timeout_s=20.0, reset_timeout_s=6.0, step_timeout_s=5.0))
    limits = {Phase.INIT: 20.0, Phase.RESET: 6.0, Phase.STEP: 5.0}
    rng = np.random.default_rng(0)
    for _ in range(5000):
        phase = Phase(rng.choice(4, p=[0.01, 0.01, 0.02, 0.96]))
        watchdog.enter(phase)
        if phase is Phase.IDLE:
            assert alarms[-1] == float("inf")
        else:
            assert limits[phase] - 1e-9 <= alarms[-1] - now[0] <= limits[phase] * 1.02 + 1e-9
        now[0] += rng.exponential(0.002)
    assert 200 < len(alarms) < 800


@pytest.mark.parametrize("algorithm", ["PPO", "PPO with memory", "DQN", "DQN with memory"])
def test_training_goes_on_past_failures(
    algorithm: str, make_trainer: Callable, caplog: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lit_rl.runners.survival.time.sleep", lambda seconds: None)
    env = {"env": "test_faults:Sometimes", "env_kwargs": {"step": 0.03, "reset": 0.03}, "fault_tolerance": MANY}
    network = LSTMNetwork if "memory" in algorithm else None
    if "PPO" in algorithm:
        module: Any = PPO(minibatch_size=32, num_epochs=1, network=network)
        data: Any = RolloutDataModule(rollout_length=16, max_env_steps=1024, seed=0, **env)
    else:
        module = DQN(network=network, sequence_length=8)
        data = ReplayDataModule(
            rollout_length=4, max_env_steps=600, learning_starts=64, batch_size=32, buffer_size=200, seed=0,
            update_to_data=0.25, **env,
        )  # fmt: skip
    with caplog.at_level(logging.WARNING):
        make_trainer(limit_val_batches=0).fit(module, data)
    ledger = data.ledger
    assert ledger.discarded["env_error"] > 3 and ledger.delivered == module.env_steps_done > 500
    assert "raised in step: OSError: no step. Environment" in caplog.text
    assert all(torch.isfinite(p).all() for p in module.parameters())


class Illegal(Policy):
    """Gives environments an action that does not exist."""

    def to_env(self, action: Any) -> Any:
        return np.full(len(action), 9)


def test_a_fault_of_ours_that_a_test_environment_finds_is_never_survived(make_trainer: Callable) -> None:
    kwargs = {"observation_space": SPEC.observation_space, "action_space": SPEC.action_space}
    data = RolloutDataModule(
        SampleEnv, env_kwargs=kwargs, fault_tolerance=MANY, rollout_length=128, max_env_steps=1024, seed=0
    )
    algorithm = PPO(spec=data.env.spec().to_dict(), policy_class=Illegal)
    for act in (
        make_runner(data.env, Illegal(SPEC), faults=MANY).sample,
        lambda: make_trainer(limit_val_batches=0).fit(algorithm, data),
        lambda: make_trainer().validate(algorithm, data),
    ):
        with pytest.raises(OurFault, match=r"is not in Discrete\(2\)"):
            act()


class EndlessAfter(CounterEnv):
    """The first `whole` episodes of each copy end, the next one never does; a step takes a millisecond."""

    def __init__(self, whole: int):
        super().__init__()
        self._whole = whole

    def step(self, action: int) -> tuple:
        time.sleep(1e-3)
        obs, reward, terminated, truncated, info = super().step(action)
        ends = self._episode < self._whole
        return obs, reward, terminated and ends, truncated and ends, info


@pytest.mark.parametrize(("whole", "episodes", "ended"), [(1, 12, 12), (0, 12, 0), (1, 20, 16)])
def test_an_evaluation_that_does_not_end_is_cut_and_says_so(
    whole: int, episodes: int, ended: int, make_trainer: Callable, caplog: Any
) -> None:
    data = RolloutDataModule(
        EndlessAfter, env_kwargs={"whole": whole}, evaluation=Evaluation(episodes=episodes, timeout_s=0.5), seed=0,
        max_env_steps=64, num_envs_per_env_runner=2, rollout_length=16, rollouts_per_epoch=1,
    )  # fmt: skip
    trainer, module = make_trainer(), PPO(minibatch_size=16)
    with caplog.at_level(logging.WARNING):
        trainer.fit(module, data)
    metrics = trainer.callback_metrics
    assert module.env_steps_done == 64  # training went on
    assert metrics["eval/cut_episodes"] == episodes - ended  # 16 are played at a time
    assert metrics["eval/partial"] == (ended < episodes)
    assert metrics["eval/episodes"] == episodes and torch.isfinite(metrics["eval/return_mean"])
    said = f"Evaluation took longer than evaluation.timeout_s=0.5: only {ended} of {episodes} episodes have ended."
    assert (said in caplog.text) == (ended < episodes)


def test_evaluation_plays_again_what_an_environment_broke_and_in_the_end_does_without(
    make_trainer: Callable, caplog: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lit_rl.evaluation.evaluator.time.sleep", lambda seconds: None)
    algorithm = PPO(minibatch_size=16, spec=SPEC.to_dict())
    results = []
    for step in (0.01, 1.0):
        options = {"step": step, "reset": 0.0}
        data = RolloutDataModule("test_faults:Sometimes", env_kwargs=options, evaluation=Evaluation(episodes=8), seed=0)
        data.spec = SPEC
        data.fault_tolerance = MANY if step < 1 else FaultTolerance(max_restarts=2)
        with caplog.at_level(logging.WARNING):
            results.append(make_trainer().validate(algorithm, data))
    assert results[0][0]["eval/episodes"] == 8 and results[0][0]["eval/partial"] == 0
    assert results[1] == [{"eval/episodes": 0, "eval/cut_episodes": 0, "eval/partial": 1}]
    assert "The evaluation episodes that had not ended are played again." in caplog.text
    assert "Evaluation ends with 0 of 8 episodes." in caplog.text


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_restarts": -1}, "fault_tolerance.max_restarts=-1: expected a whole number of at least 0"),
        ({"min_healthy": 0}, "fault_tolerance.min_healthy=0"),
        ({"step_timeout_s": 0}, "fault_tolerance.step_timeout_s=0: expected a number, above 0"),
        ({"sample_timeout_s": float("inf")}, "fault_tolerance.sample_timeout_s=inf"),
    ],
)
def test_limits_that_cannot_be_are_named(options: dict, words: str) -> None:
    with pytest.raises(OptionError, match=words.replace(".", r"\.")):
        FaultTolerance(**options)


def test_only_env_runners_in_processes_of_their_own_can_be_added() -> None:
    data = RolloutDataModule("CartPole-v1")
    with pytest.raises(OptionError, match="steps its environments in the learner process"):
        data.resize(2)


def test_a_step_that_gives_what_it_must_not_give_is_no_failure_to_survive() -> None:
    env = EnvConfig("envs:FailingEnv", {"how": "nan reward", "at": 3})
    with pytest.raises(EnvError, match="reward=nan") as caught:
        runner_of(env, faults=MANY).sample()
    assert not isinstance(caught.value, EnvFailure)


class WrongLater(CounterEnv):
    """Its third step returns something else."""

    def __init__(self, what: str, value: Any):
        super().__init__()
        self._what, self._value, self._steps = what, value, 0

    def step(self, action: int) -> Any:
        result, self._steps = super().step(action), self._steps + 1
        if self._steps != 3:
            return result
        if self._what == "result":
            return self._value
        parts = dict(zip(("observation", "reward", "terminated", "truncated", "info"), result))
        return tuple((parts | {self._what: self._value}).values())


@pytest.mark.parametrize(
    ("what", "value", "words"),
    [
        ("observation", np.zeros(3, np.float32), "observation has shape (3,): expected (1,)"),
        ("observation", None, "observation=None: expected numbers"),
        ("observation", "left", "observation='left'"),
        ("observation", np.array([np.nan], np.float32), "observation=[nan] at step 1 of episode 1 of environment 0"),
        ("observation", np.array([np.inf], np.float32), "observation=[inf] at step 1 of episode 1 of environment 0"),
        ("reward", None, "reward=None: expected one number"),
        ("reward", [1.0], "reward=[1.0]: expected one number"),
        ("reward", float("nan"), "reward=nan at step 0 of episode 1 of environment 0"),
        ("reward", "much", "reward='much': expected one number"),
        ("terminated", "no", "terminated='no': expected True or False"),
        ("truncated", np.array([True]), "truncated=array([ True]): expected True or False"),
        ("info", None, "expected (observation, reward, terminated, truncated, info)"),
        ("result", (0, 1.0, False, {}), "(0, 1.0, False, {}): expected (observation, reward, terminated, truncated"),
    ],
)
def test_what_an_environment_must_not_give_is_refused_in_the_middle_of_a_run(what: str, value: Any, words: str) -> None:
    """N2."""
    env = EnvConfig("test_faults:WrongLater", {"what": what, "value": value})
    runner = make_runner(env, Policy(COUNTER_SPEC))
    with pytest.raises(EnvError) as caught:
        runner.sample()
    assert not isinstance(caught.value, EnvFailure)
    assert words in str(caught.value) and "env=test_faults:WrongLater" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [np.float32(1.5), 2, np.array(1.5), True])
def test_numbers_of_other_types_are_rewards_too(value: Any) -> None:
    env = EnvConfig("test_faults:WrongLater", {"what": "reward", "value": value})
    assert make_runner(env, Policy(COUNTER_SPEC)).sample().rows.views()["reward"][0, 2] == float(value)


def test_rollouts_of_unequal_ranks_are_filled_up_with_rows_that_do_not_count() -> None:
    space = spaces.Dict(a=spaces.Box(-1, 1, (2,)), b=spaces.Discrete(3))
    env = EnvConfig("test_faults:Sometimes", {"step": 0.0, "reset": 0.0, "observation_space": space})
    runner = runner_of(env, num_envs=2, network=LSTMNetwork)
    rollout = next_rollout(runner)
    filled = padded(rollout, 5, masked=True)
    assert filled.batch_size == (5,) and filled["mask"].sum(1).tolist() == [6, 6, 0, 0, 0]
    assert filled["length"].tolist() == [6, 6, 0, 0, 0]
    assert torch.equal(filled["observation", "a"][:2], rollout["observation", "a"])
    assert torch.equal(filled["observation", "a"][2:], filled["observation", "a"][:1].expand(3, -1, -1))  # legal
    assert (filled["final_step"][2:] == -1).all() and len(rows(filled, "action", "mask")) == 12
    assert filled["state", "h"].shape[0] == 5
    assert padded(rollout, 2, masked=False) is rollout
