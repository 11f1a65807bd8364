"""Runners of several agents: every transition is what the environment wrote down, whatever the fragments' length."""

import functools
from collections import Counter
from collections.abc import Sequence
from typing import Any

import fake_ray
import lightning as L
import numpy as np
import pytest
import torch
from agent_envs import MADE, LoggedAgents, MaskedInTurns, Transition, Wrong
from envs import IdentityEnv
from gymnasium import spaces
from helpers import ROOT, quiet_trainer
from torch import Tensor

from lit_rl import APPO, DQN, IMPALA, PPO, Evaluation, LSTMNetwork, Policy, ReplayDataModule, RolloutDataModule
from lit_rl.envs.make import EnvConfig
from lit_rl.envs.multi_agent import AgentId, MultiAgentEnv, ReplicatedEnv
from lit_rl.errors import EnvError, EnvFailure, OptionError
from lit_rl.evaluation.episodes import play
from lit_rl.rollout import Rollout, length_of, mask_of, next_observation, next_values_with_memory
from lit_rl.runners.faults import FaultTolerance
from lit_rl.runners.fragment import Fragment
from lit_rl.runners.gathering import to_rollout
from lit_rl.runners.ledger import Ledger
from lit_rl.runners.making import make_pool
from lit_rl.runners.multi_agent_runner import MultiAgentEnvRunner
from lit_rl.runners.placement import Placement
from lit_rl.spec import MultiAgentSpec

MODES = [
    ("turns", 2), ("turns", 3), ("together", 2), ("random", 3), ("once", 3), ("cars", 3), ("random", 1), ("turns", 1),
]  # fmt: skip


def make(mode: str, num_agents: int = 2, length: int = 16, num_envs: int = 2, **options: Any) -> MultiAgentEnvRunner:
    """A runner of logged environments, which are in MADE, and a policy that is always the same."""
    env_kwargs, network = options.pop("env_kwargs", {}), options.pop("network", None)
    plain = {"mode": mode, "num_agents": num_agents}
    torch.manual_seed(0)
    policy = Policy(shared(EnvConfig(LoggedAgents, plain)), network=network)
    env = EnvConfig(LoggedAgents, plain | env_kwargs)
    MADE.clear()
    seed = np.random.SeedSequence(options.pop("seed", 0))
    return MultiAgentEnvRunner(env, policy, num_envs=num_envs, rollout_length=length, seed=seed, **options)


def shared(env: EnvConfig) -> Any:
    spec = env.try_out()
    assert isinstance(spec, MultiAgentSpec)
    return spec.shared()


def transitions(rollout: Rollout) -> list[Transition]:
    """The real rows of a rollout, with what is nobody's business left out."""
    real = mask_of(rollout)
    assert real is not None and torch.equal(real.sum(1), rollout["length"])
    following = next_observation(rollout)
    found = []
    for b, t in real.nonzero().tolist():
        obs, next_ = rollout["observation"][b, t], rollout["next"][b, t]
        terminated, truncated = bool(next_["terminated"]), bool(next_["truncated"])
        after = None if terminated else int(following[b, t, 0])
        found.append(
            Transition(
                int(obs[1]),
                int(obs[0]),
                int(rollout["action"][b, t]),
                float(next_["reward"]),
                after,
                terminated,
                truncated,
            )
        )
    return found


def collect(runner: MultiAgentEnvRunner, num_fragments: int) -> tuple[list[Fragment], list[Transition]]:
    fragments = [runner.sample() for _ in range(num_fragments)]
    return fragments, [row for fragment in fragments for row in transitions(to_rollout([fragment], copy=False))]


def logged() -> Counter[Transition]:
    return Counter(row for env in MADE for row in env.log)


# --- every transition -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 2, 3, 7, 64])
@pytest.mark.parametrize(("mode", "num_agents"), MODES)
def test_every_transition_is_recorded_once_as_the_environment_has_it(mode: str, num_agents: int, length: int) -> None:
    runner = make(mode, num_agents, length)
    fragments, found = collect(runner, 128 // length)
    assert Counter(found) == logged() and len(found) > 25
    assert sum(fragment.entry.agent_steps for fragment in fragments) == len(found)
    assert [f.entry.delivered for f in fragments] == [2 * length] * len(fragments)
    episodes = [episode for fragment in fragments for episode in fragment.episodes]
    assert Counter(e.return_ for e in episodes) == Counter(sum(t.values()) for env in MADE for t in env.totals)
    assert len(episodes) > 5
    if mode != "cars":
        expected = Counter(tuple(sorted(t.items())) for env in MADE for t in env.totals)
        assert Counter(tuple(sorted((e.returns or {}).items())) for e in episodes) == expected


@pytest.mark.parametrize(("mode", "num_agents"), [("turns", 3), ("random", 3), ("cars", 3)])
def test_transitions_do_not_depend_on_the_length_of_fragments(mode: str, num_agents: int) -> None:
    sets = [Counter(collect(make(mode, num_agents, length), 126 // length)[1]) for length in (1, 2, 3, 7, 63, 126)]
    assert all(found == sets[0] for found in sets)  # their actions too


def test_turns_in_which_an_agent_does_not_act_take_no_room() -> None:
    runner = make("turns", 3, 30)
    rollout = to_rollout([runner.sample()], copy=False)
    length = length_of(rollout)
    assert length is not None and rollout["action"].shape[1] == int(length.max()) <= 12
    (one,) = (len(f.rows.buffer) for f in (make("turns", 1, 30, num_envs=1).sample(),))
    (three,) = (len(f.rows.buffer) for f in (make("turns", 3, 30, num_envs=1).sample(),))
    assert three < 1.5 * one


@pytest.mark.parametrize("mode", ["turns", "random", "together"])
def test_names_and_the_order_of_dicts_change_nothing(mode: str) -> None:
    plain, other = (
        make(mode, 3, 20, env_kwargs=kwargs) for kwargs in ({}, {"names": ["z", "y", "x"], "shuffled": True})
    )
    for _ in range(3):
        ours, theirs = (runner.sample() for runner in (plain, other))
        for name, array in ours.rows.views().items():
            real = ours.rows.views()["mask"]
            same = theirs.rows.views()[name]
            assert (array[real] == same[real]).all() if array.shape[:2] == real.shape else (array == same).all(), name
        assert [e.return_ for e in ours.episodes] == [e.return_ for e in theirs.episodes]


def test_what_is_carried_over_keeps_the_version_and_the_probability_it_was_sampled_with() -> None:
    runner = make("turns", 3, 4)
    policy, weights, carried = runner.policy, {}, 0
    for version in range(12):
        torch.manual_seed(version)
        with torch.no_grad():
            policy.head.bias.normal_()
        weights[version] = policy.head.bias.detach().clone()
        runner.set_version(version)
        rollout = to_rollout([runner.sample()], copy=True)
        real = mask_of(rollout)
        assert real is not None
        versions, seen = rollout["policy_version"], rollout["observation"]
        assert (versions[~real] == version).all()
        for b, t in real.nonzero().tolist():
            row = int(versions[b, t])
            policy.head.bias.data.copy_(weights[row])
            batch = {"observation": seen[b, t][None], "action": rollout["action"][b, t][None]}
            with torch.no_grad():
                log_prob, _ = policy.evaluate(batch)
            torch.testing.assert_close(rollout["action_log_prob"][b, t], log_prob[0])
            if row < version:
                carried += 1
                assert t == 0 and row == version - 1
        policy.head.bias.data.copy_(weights[version])
    assert carried > 10


@pytest.mark.parametrize("mode", ["turns", "random", "cars"])
def test_memory_is_each_agents_own_also_over_the_end_of_fragments(mode: str) -> None:
    runner = make(mode, 3, 5, network=functools.partial(LSTMNetwork, hidden_size=4))
    policy = runner.policy
    with torch.no_grad():
        policy.head.weight.normal_()
    for _ in range(10):
        rollout = to_rollout([runner.sample()], copy=True)
        rollout["observation"] /= 1  # own memory
        real = mask_of(rollout)
        assert real is not None
        with torch.no_grad():
            features, _ = policy.unroll(rollout["observation"], rollout["state"], rollout["is_init"])
            log_prob, _ = policy.evaluate(rollout, features)
        torch.testing.assert_close(log_prob[real], rollout["action_log_prob"][real])


def test_states_before_every_row_are_those_of_the_agents_past() -> None:
    network = functools.partial(LSTMNetwork, hidden_size=4)
    runner = make("random", 3, 9, network=network, keep_states=True)
    for _ in range(6):
        rollout = to_rollout([runner.sample()], copy=True)
        states = rollout["state"]
        rollout["state"] = {name: x[:, 0] for name, x in states.items()}
        real, policy = mask_of(rollout), runner.policy
        assert real is not None
        with torch.no_grad():
            expected = next_values_with_memory(rollout, policy.unroll, lambda x: x.sum(-1)).before
        inside = real & ~rollout["is_init"]
        for name, state in states.items():
            torch.testing.assert_close(state[inside], expected[name][inside])


def test_the_longest_time_line_decides_also_among_several_runners() -> None:
    fragments = [make(mode, 3, 12).sample() for mode in ("turns", "together")]
    rows = [transitions(to_rollout([fragment], copy=True)) for fragment in fragments]
    rollout = to_rollout(fragments, copy=True)
    assert len({f.rows.views()["mask"].shape[1] for f in fragments}) == 2
    assert Counter(transitions(rollout)) == Counter(rows[0] + rows[1])


# --- what goes wrong --------------------------------------------------------------------------------------------------


def test_a_copy_that_raises_is_rebuilt_alone_and_its_agents_are_truncated_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("lit_rl.runners.survival.time.sleep", lambda seconds: None)
    runner = make("turns", 2, 40, env_kwargs={"raises_at": 33})
    fragment = runner.sample()
    found, expected = transitions(to_rollout([fragment], copy=False)), logged()
    entry = fragment.entry
    assert entry.delivered + entry.discarded["env_error"] == entry.end == 80 and len(fragment.failures) == 2
    assert fragment.failures[0] == (
        "env=LoggedAgents raised in step: ValueError: the simulator fell over. Copy 0 is rebuilt."
    )
    # Rows that go on to an observation whose action never came to anything end there, by truncation.
    cut = [row for row in found if row not in expected]
    assert 1 <= len(cut) <= 4 and all(row.truncated and row._replace(truncated=False) in expected for row in cut)
    assert len(found) == expected.total()


def test_a_copy_that_raises_too_often_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lit_rl.runners.survival.time.sleep", lambda seconds: None)
    runner = make("together", 2, 40, env_kwargs={"raises_at": 1})
    with pytest.raises(EnvFailure, match=r"the simulator fell over. That was failure 6, more than max_restarts=5"):
        runner.sample()


@pytest.mark.parametrize(
    ("how", "sentence"),
    [
        ("nan reward", r"env=Wrong: reward=nan of agent 'b' of copy 0: expected finite numbers. Mend the environment."),
        ("reward", "step returned reward=None for agent 'b': expected one number."),
        ("stranger", "step returned an observation of 'c': expected an agent of possible_agents"),
        ("__all__", "Leave '__all__' out."),
        ("four", "expected .observation, reward, terminated, truncated, info., dicts by agent."),
        ("no final observation", "agent 'b' was truncated without an observation"),
        ("shape", r"agent 'b' of copy 0 was given what is not in its observation_space: observation has shape \(3,\)"),
    ],
)
def test_what_an_environment_gets_wrong_while_training_is_said(how: str, sentence: str) -> None:
    policy, seed = Policy(shared(EnvConfig(Wrong))), np.random.SeedSequence(0)
    with pytest.raises(EnvError, match=sentence):
        MultiAgentEnvRunner(
            EnvConfig(Wrong, {"how": how}), policy, num_envs=2, rollout_length=8, seed=seed
        ).sample()  # fmt: skip


def test_more_agents_than_max_agents_are_refused() -> None:
    class Crowd(LoggedAgents):
        TOO_MANY = 0

        def reset(self, **options: Any) -> Any:
            super().reset(**options)
            self._acting = [f"car_{i}" for i in range(self._num + self.TOO_MANY)]
            self._open = {agent: [0, 0, 0.0] for agent in self._acting}
            self._life = {agent: [0, 0] for agent in self._acting}
            return {agent: np.zeros(2, np.float32) for agent in self._acting}, {}

    env = EnvConfig(Crowd, {"mode": "cars", "num_agents": 2})
    policy, seed = Policy(shared(env)), np.random.SeedSequence(0)
    Crowd.TOO_MANY = 1
    with pytest.raises(
        EnvError, match=r"agent 'car_2' appeared beside \['car_0', 'car_1'\]: expected at most 2 agents"
    ):
        MultiAgentEnvRunner(env, policy, num_envs=1, rollout_length=1, seed=seed)


# --- training ---------------------------------------------------------------------------------------------------------

TURNS: dict[str, Any] = {"env_kwargs": {"mode": "turns", "num_agents": 3}}


def data(env: Any = LoggedAgents, **options: Any) -> RolloutDataModule:
    sizes = {"num_envs_per_env_runner": 2, "rollout_length": 16, "seed": 0, "evaluation": Evaluation(episodes=3)}
    return RolloutDataModule(env, **sizes | options)


class Seen(L.Callback):
    """Keeps what an algorithm is given."""

    def __init__(self) -> None:
        self.batches: list[Rollout] = []

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        self.batches.append(batch.clone())


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (PPO, {"minibatch_size": 32, "num_epochs": 2}),
        (PPO, {"minibatch_size": 32, "num_epochs": 2, "network": LSTMNetwork, "sequence_length": 4, "burn_in": 2}),
        (IMPALA, {}),
        (APPO, {"network": LSTMNetwork}),
    ],
    ids=["PPO", "PPO with memory", "IMPALA", "APPO with memory"],
)
def test_one_policy_learns_from_all_agents(cls: Any, options: dict[str, Any]) -> None:
    MADE.clear()
    seen = Seen()
    trainer = quiet_trainer(callbacks=[seen])
    algorithm = cls(normalize_observations=True, **options)
    source = data(**TURNS, max_env_steps=160)
    trainer.fit(algorithm, source)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert algorithm.env_steps_done == 160 == source.ledger.delivered
    rows = sum(int(batch["mask"].sum()) for batch in seen.batches)
    assert metrics["rollout/agent_steps"] == rows == source.ledger.agent_steps
    assert int(next(iter(algorithm.policy.normalizer.moments.values())).count) == rows
    for prefix in ("rollout", "eval"):
        agents = sum(metrics[f"{prefix}/return_mean/{agent}"] for agent in "abc")
        assert metrics[f"{prefix}/return_mean"] == pytest.approx(agents)
    assert all(np.isfinite(value) for value in metrics.values()) and metrics["optim/skipped_updates"] == 0
    assert all(p.isfinite().all() for p in algorithm.parameters())


def test_fragments_in_which_nothing_is_complete_are_learned_from_later() -> None:
    seen = Seen()
    algorithm = PPO(minibatch_size=4, num_epochs=1)
    quiet_trainer(callbacks=[seen]).fit(algorithm, data(**TURNS, rollout_length=2, max_env_steps=80))
    assert algorithm.env_steps_done == 80 and not seen.batches[0]["mask"].any()
    assert 10 < algorithm.updates_done < 20


@pytest.mark.parametrize("prefetch", [0, 1, 2])
def test_runners_in_actors_give_whole_transitions(monkeypatch: pytest.MonkeyPatch, prefetch: int) -> None:
    fake_ray.use(monkeypatch, 1.0, 1.5)
    MADE.clear()
    seen = Seen()
    source = data(**TURNS, num_env_runners=2, prefetch=prefetch, max_env_steps=640)
    quiet_trainer(callbacks=[seen], limit_val_batches=0).fit(IMPALA(), source)
    found = Counter(row for batch in seen.batches for row in transitions(batch))
    assert found.total() > 500 and found <= logged()
    assert source.ledger.delivered == 640 and source.ledger.agent_steps == found.total()


@pytest.mark.slow
@pytest.mark.ray
def test_an_actors_fragments_are_those_of_a_runner_in_process(ray_session: Any) -> None:
    env = EnvConfig("agent_envs:LoggedAgents", {"mode": "random", "num_agents": 3})
    policy, found = Policy(shared(env)), []
    for num_env_runners in (0, 1):
        pool = make_pool(
            env, policy.maker(), num_env_runners=num_env_runners, num_envs=2, rollout_length=7,
            seed=np.random.SeedSequence(0), rank=0, world_size=1, collected=0, ledger=Ledger(), saved=None,
            faults=FaultTolerance(), placement=Placement(), info_metrics=(), keep_states=False, reward_scale=1.0,
            reward_clip=None,
        )  # fmt: skip
        rows = []
        for version in range(4):
            pool.start(policy, version)
            ((_, fragment),) = pool.finish()
            rows += transitions(to_rollout([fragment], copy=True))
        found.append((rows, pool.ledger.agent_steps, pool.ledger.delivered))
        pool.close()
    assert found[0] == found[1] and found[0][1] == len(found[0][0]) > 20


@pytest.mark.slow
def test_two_agents_learn_to_name_what_they_see() -> None:
    source = data(
        ReplicatedEnv, env_kwargs={"env": IdentityEnv, "num_agents": 2}, wrappers=[AgentId], rollout_length=64,
        num_envs_per_env_runner=4, max_env_steps=4096, evaluation=Evaluation(episodes=20),
    )  # fmt: skip
    trainer = quiet_trainer(limit_val_batches=0)
    algorithm = PPO(lr=5e-3, minibatch_size=128, num_epochs=4, gamma=0.0)
    trainer.fit(algorithm, source)
    (metrics,) = quiet_trainer().validate(algorithm, source, verbose=False)
    assert metrics["eval/return_mean"] > 1.9
    assert metrics["eval/return_mean/agent_0"] > 0.9 and metrics["eval/return_mean/agent_1"] > 0.9


def test_illegal_actions_are_never_taken_in_training_and_evaluation() -> None:
    trainer = quiet_trainer()
    trainer.fit(PPO(minibatch_size=16, num_epochs=2), data(MaskedInTurns, max_env_steps=320))
    assert trainer.callback_metrics["eval/length_mean"] == 9.0


def test_agents_of_different_spaces_need_policies_of_their_own() -> None:
    with pytest.raises(OptionError, match="one policy needs equal spaces"):
        quiet_trainer().fit(PPO(), data(Wrong, env_kwargs={"how": "differ"}))


@pytest.mark.parametrize("options", [{"burn_in": 2, "network": LSTMNetwork}, {"compile": True}])
def test_time_lines_of_many_lengths_are_burnt_in_and_compiled_for_few_shapes(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[Any] = []
    monkeypatch.setattr(torch, "compile", lambda function, **_: compiled.append(function) or function)
    trainer = quiet_trainer(limit_val_batches=0)
    trainer.fit(algorithm := IMPALA(**options), data(**TURNS, max_env_steps=640))
    assert algorithm.updates_done == trainer.global_step == 20  # none was skipped
    assert len(compiled) == (1 if "compile" in options else 0)


def test_a_resumed_run_goes_on_with_its_counts(tmp_path: Any) -> None:
    first, path = PPO(minibatch_size=16, num_epochs=1), tmp_path / "one.ckpt"
    trainer = quiet_trainer(limit_val_batches=0)
    source = data(**TURNS, max_env_steps=64)
    trainer.fit(first, source)
    trainer.save_checkpoint(path)
    steps = source.ledger.agent_steps
    again, resumed = PPO(minibatch_size=16, num_epochs=1), data(**TURNS, max_env_steps=128)
    trainer = quiet_trainer(limit_val_batches=0)
    trainer.fit(again, resumed, ckpt_path=path)
    assert again.env_steps_done == 128 and resumed.ledger.agent_steps > steps
    assert "rollout/return_mean/b" in trainer.callback_metrics


# --- replay -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["turns", "random"])
@pytest.mark.parametrize("length", [1, 5])
def test_the_replay_buffer_holds_every_transition_once(mode: str, length: int) -> None:
    MADE.clear()
    source = ReplayDataModule(
        LoggedAgents, env_kwargs={"mode": mode, "num_agents": 3}, num_envs_per_env_runner=2, rollout_length=length,
        max_env_steps=300, learning_starts=100, batch_size=16, env_steps_per_batch=50, seed=0,
    )  # fmt: skip
    algorithm = DQN()
    quiet_trainer(limit_val_batches=0).fit(algorithm, source)
    assert source.buffer is not None
    sample, size = source.buffer.sample(20_000), len(source.buffer)
    del MADE[0]  # that was tried out
    assert algorithm.env_steps_done == 300 and size == source.ledger.agent_steps == logged().total()
    assert stored(sample) == {row._replace(truncated=False) for row in logged()}


def stored(sample: Any) -> set[Transition]:
    """What was drawn; of a transition that goes on it is not known whether it was truncated."""
    columns: Sequence[Tensor] = (
        sample["observation"], sample["action"], *(sample["next", k] for k in ("reward", "observation", "terminated")),
    )  # fmt: skip
    return {
        Transition(
            int(obs[1]), int(obs[0]), int(action), float(reward), None if end else int(after[0]), bool(end), False
        )
        for obs, action, reward, after, end in zip(*columns)
    }


# --- evaluation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "num_agents"), [("turns", 3), ("random", 3), ("cars", 2)])
def test_the_same_seeds_give_the_same_episodes_however_many_are_played_at_a_time(mode: str, num_agents: int) -> None:
    env = EnvConfig(LoggedAgents, {"mode": mode, "num_agents": num_agents})
    policy, seeds = Policy(shared(env)), [5, 6, 7, 8, 9]
    found = []
    for num_envs in (1, 2, 16):
        MADE.clear()
        episodes = {e.seed: e for e in play(env, policy, seeds, num_envs=num_envs)}
        assert sorted(episodes) == seeds
        assert Counter(e.return_ for e in episodes.values()) == Counter(sum(t.values()) for x in MADE for t in x.totals)
        found.append({seed: (e.return_, e.length, e.returns) for seed, e in episodes.items()})
    assert found[0] == found[1] == found[2]


def test_an_evaluation_that_takes_too_long_gives_what_it_has() -> None:
    env = EnvConfig(LoggedAgents, {"mode": "turns", "num_agents": 2})
    episodes = list(play(env, Policy(shared(env)), [1, 2, 3], timeout_s=0.0))
    assert len(episodes) == 3 and all(e.cut and e.length == 1 and set(e.returns or ()) <= {"a", "b"} for e in episodes)


# --- the picture in docs/multi_agent.md -------------------------------------------------------------------------------


class Pictured(MultiAgentEnv):
    """The agents, turns and rewards of `docs/time_lines.svg`."""

    possible_agents = ("a", "b", "c")
    turns = "abcabcacac" + "a"
    rewards = (
        {"a": 1, "c": 1}, {"a": 2, "b": 1}, {"c": 3}, {"b": 2}, {"a": 4, "b": 5, "c": 1},
        {"a": 1, "c": 2}, {"a": 1}, {"c": 1}, {"c": 1}, {"a": 2, "c": 1},
    )  # fmt: skip

    def observation_space(self, agent: str) -> Any:
        return spaces.Box(0, 10, (1,))

    def action_space(self, agent: str) -> Any:
        return spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[dict, dict]:
        self._t = 0
        return self._show(), {}

    def step(self, actions: dict[str, Any]) -> tuple[dict, dict, dict, dict, dict]:
        reward = self.rewards[self._t]
        self._t += 1
        return self._show(), reward, {"b": self._t == 5}, {}, {}

    def _show(self) -> dict[str, np.ndarray]:
        return {self.turns[self._t]: np.full(1, self._t, np.float32)}


def test_the_picture_of_time_lines_in_the_docs_is_what_is_collected() -> None:
    env = EnvConfig(Pictured)
    runner = MultiAgentEnvRunner(env, Policy(shared(env)), num_envs=1, rollout_length=5, seed=np.random.SeedSequence(0))
    found = []
    for _ in range(2):
        rows = runner.sample().rows.views()
        found.append([rows["reward"][b, : rows["length"][b]].tolist() for b in range(3)])
    assert found == [[[3.0], [3.0, 5.0], [4.0]], [[5.0, 1.0, 2.0], [], [2.0, 2.0]]]
    text = (ROOT / "docs" / "time_lines.svg").read_text()
    sums = ["row 0: 1 + 2 = 3", "4 + 1 = 5", "row 0: 3 + 1 = 4", "row 1: 5", "row 1: 1 + 1 = 2", "row 2: 2"]
    assert all(f">{words}<" in text for words in sums)
