"""Off-policy algorithms as parts of a MultiAgent: a replay buffer for each, alone and beside on-policy ones."""

import functools
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fake_ray
import lightning as L
import numpy as np
import pytest
import torch
from agent_envs import MADE, LoggedAgents, Transition
from envs import CycleEnv
from helpers import ROOT, assert_same, quiet_trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from tensordict import TensorDict
from test_multi_agent import Pair

from lit_rl import (
    DQN,
    IMPALA,
    MLP,
    PPO,
    SAC,
    TQC,
    EpisodeInfo,
    Evaluation,
    LSTMNetwork,
    MultiAgent,
    Rainbow,
    Random,
    Replay,
    ReplayDataModule,
    RolloutDataModule,
    load_policy,
)
from lit_rl.datamodules.environments import EnvDataModule
from lit_rl.errors import OptionError
from lit_rl.files.checkpoint import LitCheckpointIO
from lit_rl.replay import ReplayBuffer
from lit_rl.replay.feed import MOST_SLOTS
from lit_rl.runners.fragment import Epsilons

TINY: Any = functools.partial(MLP, hidden_sizes=[8])
REPLAY: dict[str, Any] = {"learning_starts": 40, "batch_size": 16, "update_to_data": 0.25}
SMALL: dict[str, Any] = {"minibatch_size": 16, "num_epochs": 1, "network": TINY}


def replay_data(env: Any = LoggedAgents, **options: Any) -> ReplayDataModule:
    if env is LoggedAgents:
        options = {"env_kwargs": {"mode": "turns", "num_agents": 3}} | options
    sizes = {"num_envs_per_env_runner": 2, "rollout_length": 2, "seed": 0, "env_steps_per_batch": 40}
    return ReplayDataModule(env, **sizes | {"max_env_steps": 200} | REPLAY | options)


def rollout_data(env: Any = LoggedAgents, **options: Any) -> RolloutDataModule:
    if env is LoggedAgents:
        options = {"env_kwargs": {"mode": "turns", "num_agents": 3}} | options
    sizes = {"num_envs_per_env_runner": 2, "rollout_length": 10, "seed": 0}
    return RolloutDataModule(env, **sizes | {"max_env_steps": 200, "replay": Replay(**REPLAY)} | options)


def several(first: Any, **others: Any) -> MultiAgent:
    """ "one" acts for all agents but "b", whose policy is "two"; further policies are called as their agents."""
    more = {name: name for name in others if name != "two"}
    return MultiAgent({"one": first, **others}, policy_mapping={"b": "two", **more, "*": "one"})


def fit(algorithm: Any, data: Any, ckpt_path: Any = None, **options: Any) -> L.Trainer:
    trainer = quiet_trainer(**{"limit_val_batches": 0} | options)
    trainer.fit(algorithm, data, ckpt_path=ckpt_path)
    return trainer


# --- every transition -------------------------------------------------------------------------------------------------


def chains() -> Iterator[list[Transition]]:
    """What each agent did in each of its lives, as the environments wrote it down."""
    found: dict[tuple[int, int, int], list[Transition]] = defaultdict(list)
    for number, env in enumerate(MADE):
        for row in env.log:
            found[number, row.agent, row.obs // 100].append(row)
    yield from found.values()


def summed(num_steps: int, agents: set[int]) -> set[tuple[float, ...]]:
    """Those transitions over up to `num_steps` steps, with gamma 1/2: agent, observation, action, reward, next."""
    found = set()
    for chain in chains():
        for i, row in enumerate(chain):
            part = chain[i : i + num_steps]
            reward = sum(step.reward * 0.5**k for k, step in enumerate(part))
            after = part[-1].next if part[-1].next is not None else -1
            if row.agent in agents:
                found.add((row.agent, row.obs, row.action, reward, 0.5 ** len(part), after, part[-1].terminated))
    return found


def stored(buffer: ReplayBuffer, num_steps: int) -> set[tuple[float, ...]]:
    """The same of a buffer."""
    batch = buffer.sample(20_000, gamma=0.5, num_steps=(num_steps, num_steps))
    end = batch["next", "terminated"]
    after = torch.where(end, -1.0, batch["next", "observation"][:, 0])
    obs = batch["observation"]
    columns = (obs[:, 1], obs[:, 0], batch["action"], batch["next", "reward"], batch["discount"], after, end)
    return set(zip(*(column.tolist() for column in columns)))


@pytest.mark.parametrize("mode", [pytest.param("turns", marks=pytest.mark.slow), "random", "once"])
@pytest.mark.parametrize("length", [pytest.param(1, marks=pytest.mark.slow), 3, 7])
@pytest.mark.parametrize("kind", ["replay", "rollout", "in actors"])
def test_each_buffer_holds_every_transition_of_its_own_agents_once(
    kind: str, length: int, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rewards between an agent's turns are summed; it is the same set whatever the fragments' length."""
    if kind == "in actors":
        fake_ray.use(monkeypatch, 1.0)
    MADE.clear()
    make = rollout_data if kind == "rollout" else replay_data
    data = make(
        env_kwargs={"mode": mode, "num_agents": 3}, rollout_length=length, max_env_steps=252,
        num_env_runners=int(kind == "in actors"),
    )  # fmt: skip
    others: Any = {"c": PPO(**SMALL | {"minibatch_size": 2}) if kind == "rollout" else sac()}
    algorithm = several(DQN(network=TINY), two=Rainbow(v_min=-50, v_max=50, network=TINY), **others)
    fit(algorithm, data)
    del MADE[0]  # that was tried out
    assert algorithm.env_steps_done == 252 == data.ledger.delivered
    agents = {"one": {0}, "two": {1}, "c": {2}}
    assert data.feeds.keys() == ({"one", "two"} if kind == "rollout" else set(agents))
    for policy_id, feed in data.feeds.items():
        assert feed.buffer is not None
        mine = [row for chain in chains() for row in chain if row.agent in agents[policy_id]]
        assert len(feed.buffer) == len(mine) > 25
        for num_steps in (1, 3):
            assert stored(feed.buffer, num_steps) == summed(num_steps, agents[policy_id])


def test_turns_in_which_an_agent_does_not_act_take_no_room() -> None:
    MADE.clear()
    data = replay_data(num_envs_per_env_runner=1, rollout_length=1)
    fit(several(DQN(network=TINY), two=DQN(network=TINY)), data)
    for policy_id, agents in (("one", {0, 2}), ("two", {1})):
        buffer = data.feeds[policy_id].buffer
        assert buffer is not None
        lives = [chain for chain in chains() if chain[0].agent in agents]
        # A row for each observation: of each transition, after the last one of a life, and of what is open now.
        assert len(buffer) <= buffer._written <= len(buffer) + 2 * len(lives) + len(agents)


@pytest.mark.slow
@pytest.mark.ray
def test_an_env_runners_buffers_are_those_of_one_in_process(ray_session: Any) -> None:
    found = []
    for num_env_runners in (0, 1):
        data = replay_data("agent_envs:LoggedAgents", env_kwargs={"mode": "random", "num_agents": 3},
            num_env_runners=num_env_runners)  # fmt: skip
        algorithm = several(DQN(network=TINY), two=SAC(network=TINY, critic_hidden_sizes=[8]))
        fit(algorithm, data)
        buffers = {i: columns_of(feed.buffer) for i, feed in data.feeds.items()}
        found.append({"weights": dict(algorithm.state_dict()), "buffers": buffers})
    assert_same(found[1], found[0])


def columns_of(buffer: ReplayBuffer | None) -> dict[str, Any]:
    assert buffer is not None
    return {name: torch.from_numpy(np.array(column)) for name, column in buffer._saved().items()}


# --- proportions, schedules and exploration ---------------------------------------------------------------------------


class Watched(DQN):
    """Notes when it learns, and from whom."""

    def update(self, batch: TensorDict) -> dict:
        self.seen = [*getattr(self, "seen", []), (self.env_steps_done, self.updates_done)]
        self.agents = getattr(self, "agents", set()) | set(batch["observation"][:, 1].int().tolist())
        return super().update(batch)


@pytest.mark.parametrize("make", [replay_data, rollout_data])
def test_updates_are_in_proportion_to_a_policys_own_rows_after_the_warm_up(make: Any) -> None:
    one, two = Watched(network=TINY), Watched(network=TINY, target_update_interval=3)
    data = make(max_env_steps=400, env_kwargs={"mode": "turns", "num_agents": 3, "forgets": True})
    algorithm = several(one, two=two)
    trainer = fit(algorithm, data)
    for policy_id, child, agents in (("one", one, {0, 2}), ("two", two, {1})):
        rows = len(data.feeds[policy_id].buffer)
        assert child.agents == agents and child.env_steps_done == 400
        assert child.updates_done == len(child.seen) == pytest.approx((rows - rows / 10) / 4, abs=3)
        assert [done for _, done in child.seen] == list(range(child.updates_done))
        assert min(steps for steps, _ in child.seen) > 40
        assert float(trainer.callback_metrics[f"{policy_id}/replay/transitions"]) == rows
    assert one.updates_done > 1.7 * two.updates_done
    total = one.updates_done + two.updates_done
    assert trainer.global_step == total and algorithm.env_steps_done == 400
    assert algorithm.updates_done == (total if make is replay_data else 20)


@pytest.mark.parametrize("make", [replay_data, rollout_data])
def test_each_policy_explores_in_its_own_way(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random actions until learning starts, then by each one's schedule; on-policy algorithms never."""
    found: dict[int, Any] = {}
    start = EnvDataModule.start_runners

    def watched(data: Any, epsilons: Epsilons = (0.0,)) -> None:
        found[data.algorithm.env_steps_done if make is rollout_data else data._env_steps] = epsilons
        start(data, epsilons)
        policies = data._pool._runner.policy.learned
        monkeypatch.setattr(data._pool._runner._book, "take", noting(data._pool._runner._book.take, policies))

    acted: set[tuple[float, ...]] = set()

    def noting(take: Any, policies: Any) -> Any:
        def taken(events: Any) -> None:
            acted.add(tuple(policies[policy_id].epsilon for policy_id in sorted(policies)))
            take(events)

        return taken

    monkeypatch.setattr(EnvDataModule, "start_runners", watched)
    one, two = DQN(epsilon_schedule=[[40, 0.5], [140, 0.0]], network=TINY), DQN(epsilon=0.25, network=TINY)
    others = {"c": PPO(**SMALL)} if make is rollout_data else {}
    fit(several(one, two=two, **others), make())
    assert all(epsilons == [{"one": 1.0, "two": 1.0}] for steps, epsilons in found.items() if steps < 40)
    assert found[40] == [{"one": 0.5, "two": 0.25}] and found[100] == [{"one": pytest.approx(0.2), "two": 0.25}]
    assert found[180] == [{"one": 0.0, "two": 0.25}]
    zero = (0.0,) * len(others)
    assert {(*zero, 1.0, 1.0), (*zero, 0.5, 0.25), (*zero, 0.0, 0.25)} <= acted


def test_options_by_policy_and_those_of_the_algorithms_hold_for_each_buffer(tmp_path: Path) -> None:
    replay = {
        "one": Replay(learning_starts=100, batch_size=32, n_step=2, storage_dir=tmp_path / "rows"),
        "two": Replay(**REPLAY | {"update_to_data": 1.0}, prioritized=True, priority_alpha=0.9),
    }
    algorithm = several(DQN(network=TINY), two=TQC(network=TINY, critic_hidden_sizes=[8]))
    data = rollout_data(replay=replay, max_env_steps=300)
    trainer = fit(algorithm, data)
    one, two = (data.feeds[policy_id].options for policy_id in ("one", "two"))
    assert (one.num_steps, one.update_to_data, one.prioritized) == ((2, 2), 0.125, False)
    assert (two.num_steps, two.update_to_data, two.prioritized) == ((1, 1), 1.0, True)
    assert len(data.feeds["one"].draw()) == 32 and data.feeds["two"].buffer._alpha == 0.9
    assert algorithm.algorithms["two"].updates_done > 4 * algorithm.algorithms["one"].updates_done > 0
    assert float(trainer.callback_metrics["two/replay/beta"]) == 1.0
    assert [path.name for path in (tmp_path / "rows").iterdir()] == ["one"]


def test_each_buffer_has_files_of_its_own_in_storage_dir(tmp_path: Path) -> None:
    data = replay_data(storage_dir=str(tmp_path / "rows"))
    fit(several(DQN(network=TINY), two=DQN(network=TINY)), data)
    for policy_id in ("one", "two"):
        assert list((tmp_path / "rows" / policy_id).glob("replay-*/*.bin"))


def test_priorities_go_back_to_the_buffer_they_came_from() -> None:
    data = replay_data(prioritized=True, priority_alpha=1.0)
    fit(several(DQN(network=TINY), two=Rainbow(v_min=-50, v_max=50, network=TINY)), data)
    for feed in data.feeds.values():
        assert feed.buffer is not None and feed.buffer._tree is not None
        leaves = feed.buffer._tree.leaves
        assert len(set(leaves[leaves > 0].tolist())) > 20


def test_metrics_of_each_policy_are_documented() -> None:
    values = fit(several(DQN(network=TINY), two=Rainbow(v_min=-50, v_max=50, network=TINY)), replay_data())
    documented = (ROOT / "docs" / "metrics.md").read_text()
    names = {name.removeprefix("one/").removeprefix("two/") for name in values.callback_metrics}
    assert {"loss/value", "policy/epsilon", "replay/transitions", "replay/beta", "optim/grad_norm"} <= names
    for name in names:
        assert f"`{name.replace('return_mean/', 'return_mean/<agent>').split('<agent>')[0]}" in documented, name


def test_max_steps_ends_in_the_middle_of_a_batch() -> None:
    algorithm = several(DQN(network=TINY), two=DQN(network=TINY))
    trainer = fit(algorithm, replay_data(), max_steps=7)
    assert trainer.global_step == algorithm.updates_done == 7


def test_a_mapping_by_episode_brings_each_life_to_the_buffer_of_its_policy() -> None:
    def in_turns(agent: str, info: EpisodeInfo) -> str:
        return ("one", "two")[(info.number + (agent == "b")) % 2]

    MADE.clear()
    algorithm = MultiAgent({"one": DQN(network=TINY), "two": DQN(network=TINY)}, policy_mapping=in_turns)
    data = replay_data(num_envs_per_env_runner=1, env_kwargs={"mode": "random", "num_agents": 3})
    fit(algorithm, data)
    del MADE[0]
    one, two = (stored(feed.buffer, 3) for feed in data.feeds.values() if feed.buffer is not None)
    assert one | two == summed(3, {0, 1, 2}) and not one & two
    lives = [{(agent, obs // 100) for agent, obs, *_ in rows} for rows in (one, two)]
    assert not lives[0] & lives[1] and min(map(len, lives)) > 10


# --- learning ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_dqn_learns_beside_ppo_and_sac() -> None:
    """ "left" names a number it sees, at best 4 in an episode; "right" gives back one it sees, at best 0."""
    evaluation = Evaluation(episodes=20)
    dqn = {"lr": 5e-3, "gamma": 0.0, "epsilon": 0.3, "target_update_interval": 20}
    replay = {"learning_starts": 200, "batch_size": 32, "update_to_data": 0.25, "n_step": 1}
    ppo = PPO(lr=1e-2, minibatch_size=128, num_epochs=10, gamma=0.0, log_std_init=-1.0)
    sac = SAC(lr=3e-3, gamma=0.0, network=functools.partial(MLP, hidden_sizes=[32]), critic_hidden_sizes=[32])
    mixed = RolloutDataModule(
        Pair, rollout_length=32, num_envs_per_env_runner=4, max_env_steps=3072, seed=1, replay=Replay(**replay),
        evaluation=evaluation,
    )  # fmt: skip
    off_policy = ReplayDataModule(
        Pair, rollout_length=4, num_envs_per_env_runner=4, max_env_steps=2400, seed=1, evaluation=evaluation, **replay
    )
    for right, data in ((ppo, mixed), (sac, off_policy)):
        algorithm = MultiAgent({"left": DQN(**dqn), "right": right})
        fit(algorithm, data)
        (metrics,) = quiet_trainer().validate(algorithm, data, verbose=False)
        assert metrics["left/eval/return_mean"] > 3.8  # a guess's is 4/3
        assert metrics["right/eval/return_mean"] > -0.4  # that of 0 whatever is seen is -4/3


@pytest.mark.parametrize("make", [replay_data, rollout_data])
def test_memory_of_each_policy_is_its_own(make: Any) -> None:
    """Runners keep the state before every step for replay, and before the first alone for rollouts."""
    memory = functools.partial(LSTMNetwork, hidden_size=8)
    one = DQN(network=memory, sequence_length=4, burn_in=2)
    on_policy: dict[str, Any] = {"c": IMPALA(network=memory)} if make is rollout_data else {}
    algorithm = several(one, two=DQN(network=TINY), **on_policy)
    data = make(max_env_steps=300)
    fit(algorithm, data)
    assert data.feeds.keep_states == {"one"}
    batch = data.feeds["one"].draw()
    assert batch["state", "h"].shape == (4, 8) and batch["burn_in", "observation"].shape == (4, 2, 2)
    states = columns_of(data.feeds["one"].buffer)["state/h"]
    assert len(states.unique(dim=0)) > 30
    assert all(child.updates_done > 5 for child in algorithm.algorithms.values())


@pytest.mark.parametrize("make", [replay_data, rollout_data])
def test_compiled_steps_of_each_policy_are_the_eager_ones(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # is run as it is written
    found = []
    for compile in (False, True):
        sac = SAC(network=TINY, critic_hidden_sizes=[8], compile=compile)
        algorithm = several(DQN(network=TINY, compile=compile), two=sac)
        fit(algorithm, make())
        assert algorithm.algorithms["one"].host.steps.is_compiled == compile and sac.updates_done > 5
        found.append(algorithm.state_dict())
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, atol=2e-4, rtol=1e-3, msg=name)


def test_policies_that_are_not_trained_have_no_buffer() -> None:
    policies = {"one": DQN(network=TINY), "two": Random(), "c": SAC(network=TINY, critic_hidden_sizes=[8])}
    algorithm = MultiAgent(policies, policy_mapping={"a": "one", "b": "two", "c": "c"}, train=["one"])
    data = replay_data()
    fit(algorithm, data)
    assert data.feeds.keys() == {"one"} and algorithm.algorithms["c"].updates_done == 0


@pytest.mark.parametrize("prefetch", [0, 1])
@pytest.mark.parametrize("make", [replay_data, rollout_data])
def test_several_env_runners_feed_every_policy(make: Any, prefetch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_ray.use(monkeypatch, 1.0, 1.5)
    on_policy: dict[str, Any] = {"c": IMPALA(network=TINY)} if make is rollout_data else {}
    algorithm = several(DQN(network=TINY), two=DQN(network=TINY), **on_policy)
    data = make(num_env_runners=2, prefetch=prefetch, max_env_steps=400)
    fit(algorithm, data)
    assert algorithm.env_steps_done == 400
    rows = sum(len(feed.buffer) for feed in data.feeds.values())
    assert on_policy or rows == data.ledger.agent_steps
    for policy_id, feed in data.feeds.items():
        agents = {"one": {0} if on_policy else {0, 2}, "two": {1}}[policy_id]  # of three in each of two copies
        slots = {(runner, 3 * copy + agent) for runner in (0, 1) for copy in (0, 1) for agent in agents}
        assert {divmod(env, MOST_SLOTS) for env in feed.buffer._open} == slots


# --- checkpoints ------------------------------------------------------------------------------------------------------


def sac(**options: Any) -> SAC:
    return SAC(network=TINY, critic_hidden_sizes=[8], **options)


@pytest.mark.parametrize(
    "case", ["DQN and PPO", "SAC and SAC", pytest.param("memory and priorities", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("mode", [pytest.param("turns", marks=pytest.mark.slow), "random"])
def test_a_resumed_run_is_the_unbroken_one(case: str, mode: str, tmp_path: Path) -> None:
    def make() -> tuple[MultiAgent, Any]:
        options: dict[str, Any] = {"env_kwargs": {"mode": mode, "num_agents": 3, "forgets": True}}
        if case == "DQN and PPO":
            data: Any = rollout_data(**options, max_env_steps=320, rollouts_per_epoch=4)
            return several(DQN(network=TINY), two=PPO(**SMALL)), data
        options |= {"batches_per_epoch": 2, "rollout_length": 5, "max_env_steps": 320}
        if case == "SAC and SAC":
            return several(sac(lr=1e-3), two=sac()), replay_data(**options)
        memory = functools.partial(LSTMNetwork, hidden_size=8)
        one = DQN(network=memory, sequence_length=4, burn_in=2)
        two = Rainbow(network=TINY, v_min=-50, v_max=50)
        return several(one, two=two), replay_data(**options, prioritized=True, n_step=[1, 3], buffer_size=130)

    class Series(L.Callback):
        def __init__(self) -> None:
            self.rows: list[dict] = []

        def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
            values = trainer.callback_metrics.items()
            self.rows.append({name: float(x) for name, x in values if not name.startswith("time/")})

    whole, first, second = Series(), Series(), Series()
    unbroken, data = make()
    whole_trainer = fit(unbroken, data, callbacks=[whole])
    saver = ModelCheckpoint(tmp_path, save_on_train_epoch_end=True, filename="half")
    fit(*make(), callbacks=[first, saver], enable_checkpointing=True, max_epochs=2)
    assert 100 < first.rows[-1]["env_steps"] < 320
    resumed, again = make()
    trainer = fit(resumed, again, tmp_path / "half.ckpt", callbacks=[second])
    assert first.rows + second.rows == whole.rows and len(second.rows) >= 3
    assert_same(dict(resumed.state_dict()), dict(unbroken.state_dict()))
    for ours, theirs in zip(trainer.optimizers, whole_trainer.optimizers):
        assert_same(ours.state_dict()["state"], theirs.state_dict()["state"])
    for policy_id, feed in again.feeds.items():
        assert_same(columns_of(feed.buffer), columns_of(data.feeds[policy_id].buffer))


def test_checkpoints_hold_every_policys_buffer_and_nothing_of_an_earlier_one() -> None:
    algorithm, data = several(DQN(network=TINY), two=sac()), replay_data()
    trainer = fit(algorithm, data)
    trainer.strategy.checkpoint_io = LitCheckpointIO()  # keeps the file that is replaced, as for a ModelCheckpoint's
    for _ in range(3):
        trainer.save_checkpoint("run.ckpt")
        data.feeds["two"].buffer._snapshots.touch(np.arange(1))
    kept = set()
    for path in ("run.ckpt", "run.ckpt.previous"):
        replays = torch.load(path, weights_only=True)["lit_rl"]["ranks"][0]["data"]["replays"]
        assert replays.keys() == {"one", "two"}
        kept |= {name for replay in replays.values() for name in replay["files"]}
    assert {path.name for path in Path("run.ckpt.d/rank_0").iterdir()} == kept and len(kept) == 3
    trainer.save_checkpoint("weights.ckpt", weights_only=True)
    assert not Path("weights.ckpt.d").exists()
    loaded = MultiAgent.load_from_checkpoint("run.ckpt")
    assert type(loaded.algorithms["one"]) is DQN and type(loaded.algorithms["two"]) is SAC
    assert_same(dict(loaded.state_dict()), dict(algorithm.state_dict()))
    actions, _ = load_policy("run.ckpt").act({agent: np.zeros(2, np.float32) for agent in "abc"})
    assert actions.keys() == set("abc")


def test_without_checkpoint_buffer_a_policy_begins_with_an_empty_one() -> None:
    replay = {"one": Replay(**REPLAY), "two": Replay(**REPLAY, checkpoint_buffer=False)}
    trainer = fit(several(DQN(network=TINY), two=DQN(network=TINY)), rollout_data(replay=replay))
    trainer.save_checkpoint("run.ckpt")
    algorithm, data = several(DQN(network=TINY), two=DQN(network=TINY)), rollout_data(replay=replay, max_env_steps=220)
    fit(algorithm, data, "run.ckpt")
    one, two = (len(feed.buffer) for feed in data.feeds.values())
    assert one > 120 and two < 10


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policies", "replay", "sentence"),
    [
        (
            {"one": DQN(), "two": PPO()},
            None,
            r"policies\['one'\]=DQN\(...\): it learns from a replay buffer. Give",
        ),
        ({"one": DQN(), "two": SAC()}, {"one": Replay()}, r"policies\['two'\]=SAC\(...\): it learns from a replay"),
        (
            {"one": DQN(), "two": PPO()},
            {"one": Replay(), "x": Replay()},
            r"replay\['x'\]: expected some of the policies",
        ),
        ({"one": DQN(), "two": PPO()}, {"two": Replay()}, r"replay\['two'\]: expected none for PPO, which learns from"),
        (
            {"one": PPO(), "two": PPO()},
            Replay(),
            r"replay=...: none of the policies that are trained, \['one', 'two'\]",
        ),
    ],
)
def test_buffers_that_do_not_fit_the_policies_are_refused(policies: Any, replay: Any, sentence: str) -> None:
    algorithm = MultiAgent(policies, policy_mapping={"b": "two", "*": "one"})
    with pytest.raises(OptionError, match=sentence):
        fit(algorithm, rollout_data(replay=replay))


def test_replay_is_for_several_policies() -> None:
    with pytest.raises(
        OptionError, match=r"replay=\.\.\.: expected none with PPO\. It is for the off-policy algorithms of"
    ):
        fit(PPO(), rollout_data())
    with pytest.raises(OptionError, match=r"model=DQN: RolloutDataModule feeds on-policy .* Use ReplayDataModule"):
        fit(DQN(), rollout_data())
    for replay in (3, {"one": 3}, {"one": None}):
        with pytest.raises(OptionError, match=r"replay=.*: expected Replay\(...\), or a dict of them by policy."):
            rollout_data(replay=replay)
    late = rollout_data(replay=Replay(learning_starts=200, batch_size=16))
    with pytest.raises(OptionError, match="learning_starts=200: expected less than max_env_steps=200"):
        fit(several(DQN(), two=PPO(**SMALL)), late)


def test_free_running_runners_fill_no_replay_buffers() -> None:
    algorithm = several(DQN(), two=IMPALA())
    with pytest.raises(OptionError, match="prefetch=2: expected 0 or 1 with replay, or fixed_lag"):
        fit(algorithm, rollout_data(num_env_runners=1, prefetch=2))
    with pytest.raises(OptionError, match="num_reuses=2: DQN does not learn from rollouts again"):
        fit(algorithm, rollout_data(num_reuses=2))


def test_a_replay_data_module_feeds_off_policy_algorithms_alone() -> None:
    sentence = r"policies\['two'\]=PPO\(...\): ReplayDataModule feeds .* Use RolloutDataModule\(replay=Replay\(...\)\)"
    with pytest.raises(OptionError, match=sentence):
        fit(several(DQN(), two=PPO(**SMALL)), replay_data())
    with pytest.raises(OptionError, match="env=CycleEnv has one agent: expected an environment of several"):
        fit(MultiAgent({"one": DQN()}), replay_data(CycleEnv))


def test_saving_by_gradient_steps_is_refused_where_a_batch_has_many() -> None:
    saver = ModelCheckpoint(every_n_train_steps=5)
    with pytest.raises(OptionError, match=r"ModelCheckpoint\(every_n_train_steps=5\): expected every_n_epochs with"):
        fit(several(DQN(), two=DQN()), replay_data(), callbacks=[saver], enable_checkpointing=True)
