"""Policies of a MultiAgent that are added and removed while it trains, and algorithms that learn in turns."""

import functools
import itertools
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import fake_ray
import lightning as L
import numpy as np
import pytest
import torch
from agent_envs import MADE, LoggedAgents
from helpers import assert_same, quiet_trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger
from test_multi_agent import Pair, Seen, data

from lit_rl import (
    DQN,
    IMPALA,
    MLP,
    PPO,
    EpisodeInfo,
    Evaluation,
    LSTMNetwork,
    MultiAgent,
    Random,
    Replay,
    ReplayDataModule,
    RolloutDataModule,
    load_policy,
)
from lit_rl.envs.make import EnvConfig
from lit_rl.errors import CheckpointError, OptionError
from lit_rl.evaluation.eval_pool import _EvalActor
from lit_rl.policy import Policy, PolicySet
from lit_rl.rollout import Rollouts
from lit_rl.spec import EnvSpec, MultiAgentSpec

TINY: Any = functools.partial(MLP, hidden_sizes=[8])
SMALL: dict[str, Any] = {"minibatch_size": 4, "num_epochs": 1, "network": TINY}
EACH = {"a": "one", "b": "two", "c": "three"}
Changes = Mapping[int, Callable[[MultiAgent], Any]]


class After(L.Callback):
    """Calls functions of the algorithm, each after so many updates."""

    def __init__(self, changes: Changes, hook: str = "on_train_batch_end"):
        self._changes = changes
        setattr(self, hook, self._change)

    def _change(self, trainer: Any, module: MultiAgent, *_: Any) -> None:
        change = self._changes.get(module.updates_done)
        if change is not None:
            change(module)


class Kept(Seen):
    """Keeps the rollouts of those policies that a batch has."""

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        self.batches.append(Rollouts({policy_id: rollout.clone() for policy_id, rollout in batch.items()}))


def ppo(**options: Any) -> PPO:
    return PPO(**SMALL | options)


def pair(**options: Any) -> MultiAgent:
    """ "one" acts for "a", "two" for the others."""
    return MultiAgent({"one": ppo(), "two": IMPALA(network=TINY)}, policy_mapping={"a": "one", "*": "two"}, **options)


def fit(
    algorithm: MultiAgent, changes: Changes, source: Any = None, ckpt_path: Any = None, **options: Any
) -> L.Trainer:
    more = options.pop("callbacks", [])
    trainer = quiet_trainer(**{"limit_val_batches": 0} | options, callbacks=[*more, After(changes)])
    trainer.fit(algorithm, source or data(max_env_steps=320), ckpt_path=ckpt_path)
    return trainer


def add_three(algorithm: MultiAgent) -> None:
    algorithm.add_policy("three", ppo(), policy_mapping=EACH)


def remove_two(algorithm: MultiAgent) -> None:
    algorithm.remove_policy("two", policy_mapping={"a": "one", "*": "three"})


# --- learning ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["turns", "random", "together"])
def test_a_policy_that_is_added_learns_and_one_that_is_removed_does_not_any_more(mode: str) -> None:
    MADE.clear()
    seen, algorithm, source = Kept(), pair(), data(env_kwargs={"mode": mode, "num_agents": 3}, max_env_steps=320)
    first, two = {}, algorithm.algorithms["two"]

    def add(module: MultiAgent) -> None:
        add_three(module)
        first.update({name: x.clone() for name, x in module.algorithms["three"].state_dict().items()})

    steps: list[int] = []
    trainer = fit(algorithm, {3: add, 6: remove_two}, source, callbacks=[seen, Steps(steps)])
    assert algorithm.ids == ("one", "three") and algorithm.trained == ["one", "three"]
    assert algorithm.env_steps_done == 320 == source.ledger.delivered == source.ledger.executed
    three = algorithm.algorithms["three"]
    assert (three.env_steps_done, three.updates_done, two.updates_done) == (320, 10, 6)
    assert any(not torch.equal(x, first[name]) for name, x in three.policy.state_dict(prefix="policy.").items())
    assert len(trainer.optimizers) == 2 and all(
        "exp_avg" in state for o in trainer.optimizers for state in o.state.values()
    )
    assert trainer.global_step == steps[-1] > 20
    assert [sorted(batch) for batch in seen.batches] == [
        *[["one", "two"]] * 3, *[["one", "three", "two"]] * 3, *[["one", "three"]] * 4
    ]  # fmt: skip
    assert seen_agents(seen, "one").keys() == {0}
    rows = sum(int(rollout["mask"].sum()) for batch in seen.batches for rollout in batch.values())
    assert rows == source.ledger.agent_steps
    assert source.ledger.abandoned == 2  # "two" acted in every episode
    metrics = trainer.callback_metrics
    assert all(
        np.isfinite(float(metrics[f"three/{name}"])) for name in ("loss/policy", "optim/lr", "rollout/policy_lag")
    )
    assert float(metrics["three/rollout/policy_lag"]) < 1 and metrics["rollout/abandoned_episodes"] == 2


class Steps(L.Callback):
    """Counts the steps of all optimizers."""

    def __init__(self, steps: list[int]):
        self._steps = steps

    def on_before_optimizer_step(self, *_: Any) -> None:
        self._steps.append(len(self._steps) + 1)


def seen_agents(seen: Seen, policy_id: str) -> Counter[int]:
    rows = [b[policy_id]["observation"][b[policy_id]["mask"]][:, 1] for b in seen.batches if policy_id in b]
    return Counter(torch.cat(rows).int().tolist())


def test_the_others_learn_what_they_would_have_learned() -> None:
    """Their rows, random numbers and optimizers are their own, bit for bit."""
    found = []
    for changes in (
        {},
        {3: add_three},
        {3: add_three, 5: lambda module: module.remove_policy("three", policy_mapping={"a": "one", "*": "two"})},
    ):
        algorithm = pair()
        fit(algorithm, changes)
        found.append({name: x.clone() for name, x in algorithm.algorithms["one"].state_dict().items()})
    assert_same(found[1], found[0])
    assert not all(torch.equal(x, found[0][name]) for name, x in found[2].items())  # whose episodes were broken off


def test_a_past_version_of_a_policy_is_an_opponent() -> None:
    algorithm, copies = MultiAgent({"main": ppo(lr=1e-2)}, policy_mapping="main"), []

    def add(module: MultiAgent) -> None:
        copies.append({name: x.clone() for name, x in module.policy.learned["main"].state_dict().items()})
        number = len(copies)
        module.add_policy(
            f"past_{number}", module.frozen_copy("main"), policy_mapping={"a": "main", "*": f"past_{number}"}
        )
        if number > 1:
            module.remove_policy(f"past_{number - 1}")

    seen = Kept()
    trainer = fit(algorithm, {2: add, 5: add}, callbacks=[seen], limit_val_batches=1.0)
    assert algorithm.ids == ("main", "past_2") and algorithm.trained == ["main"]
    assert_same(dict(algorithm.frozen["past_2"].state_dict()), copies[1])
    assert not torch.equal(algorithm.policy.learned["main"].head.weight, copies[1]["head.weight"])
    late = Counter(seen.batches[-1]["main"]["observation"][seen.batches[-1]["main"]["mask"]][:, 1].int().tolist())
    assert set(late) == {0} and "past_2/eval/return_mean" in trainer.callback_metrics
    assert not any(parameter.requires_grad for parameter in algorithm.frozen.parameters())


def test_policies_can_come_after_a_validation() -> None:
    """Lightning validates without gradients."""
    algorithm = MultiAgent({"main": ppo()}, policy_mapping="main")

    def add(module: MultiAgent) -> None:
        module.add_policy("other", ppo(), policy_mapping={"a": "main", "*": "other"})
        mapping = {"a": "main", "b": "other", "*": "past"}
        module.add_policy("past", module.policy.learned["main"].acting_copy(), policy_mapping=mapping)

    source = data(rollouts_per_epoch=2, max_env_steps=192)
    trainer = quiet_trainer(callbacks=[After({2: add}, "on_validation_end")], enable_checkpointing=True)
    trainer.fit(algorithm, source)
    assert algorithm.algorithms["other"].updates_done == 6 and algorithm.env_steps_done == 192
    assert all(parameter.requires_grad for parameter in algorithm.algorithms["other"].policy.parameters())


def test_metrics_of_a_removed_policy_are_gone() -> None:
    def remove(module: MultiAgent) -> None:
        assert {"two/loss/policy", "two/eval/return_mean"} <= module.trainer.callback_metrics.keys()
        module.remove_policy("two", policy_mapping={"a": "one", "*": "three"})
        assert not any(name.startswith("two/") for name in module.trainer.callback_metrics)

    source = data(rollouts_per_epoch=2, max_env_steps=320)
    trainer = fit(pair(), {3: add_three, 6: remove}, source, limit_val_batches=None)
    names = trainer.callback_metrics.keys()
    assert {"one/loss/policy", "three/eval/return_mean"} <= names and not any(x.startswith("two/") for x in names)


def test_an_evaluation_that_is_late_says_nothing_of_a_removed_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_ray.use(monkeypatch, 1.0)
    evaluation = Evaluation(episodes=2, num_env_runners=1, parallel=True)
    source = data(rollouts_per_epoch=2, max_env_steps=320, evaluation=evaluation)
    trainer = fit(pair(), {4: add_three, 8: remove_two}, source, limit_val_batches=None)
    names = trainer.callback_metrics.keys()
    assert "one/eval/return_mean" in names and not any(x.startswith("two/") for x in names)


def test_eval_runners_make_policies_anew_once_after_a_change(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_ray.use(monkeypatch, 1.0)
    made, play = list[bool](), _EvalActor.play

    def recorded(actor: Any, *arguments: Any) -> Any:
        made.append(arguments[-1] is not None)
        return play(actor, *arguments)

    monkeypatch.setattr(_EvalActor, "play", recorded)
    evaluation = Evaluation(episodes=4, num_env_runners=2)
    source = data(rollouts_per_epoch=1, max_env_steps=320, evaluation=evaluation)
    trainer = fit(pair(), {3: add_three, 7: remove_two}, source, limit_val_batches=None)
    assert made == [update in (3, 7) for update in range(1, 11) for _ in range(2)]
    assert trainer.callback_metrics["eval/episodes"] == 4


def test_any_kind_of_policy_can_be_added(tmp_path: Path) -> None:
    plain = ppo()
    trainer = quiet_trainer(limit_val_batches=0)
    trainer.fit(plain, data())
    trainer.save_checkpoint(tmp_path / "plain.ckpt")

    class Zero:
        def act(self, obs: Any) -> int:
            return 0

    algorithm, seen = MultiAgent({"one": ppo()}, policy_mapping="one"), Kept()
    changes = {
        1: lambda module: module.add_policy(
            "file", str(tmp_path / "plain.ckpt"), policy_mapping={"b": "file", "*": "one"}
        ),
        2: lambda module: module.add_policy("random", Random(), policy_mapping={"b": "random", "*": "one"}),
        3: lambda module: module.add_policy("script", Zero(), policy_mapping={"b": "script", "*": "one"}),
        5: lambda module: [module.remove_policy(policy_id) for policy_id in ("file", "random")],
        6: lambda module: module.set_policy_mapping(lambda agent, info: ("one", "script")[info.number % 2]),
    }
    fit(algorithm, changes, callbacks=[seen])
    assert algorithm.ids == ("one", "script") and algorithm.trained == ["one"] and algorithm.env_steps_done == 320
    assert_same(dict(plain.policy.state_dict()), dict(load_policy(tmp_path / "plain.ckpt").state_dict()))
    assert seen_agents(seen, "one").keys() == {0, 1, 2}


def test_what_is_done_before_fit_is_as_if_it_had_been_given() -> None:
    given = MultiAgent({"one": ppo(), "two": ppo(), "three": ppo()}, policy_mapping=EACH)
    added = MultiAgent({"one": ppo(), "two": ppo()})
    added.set_policy_mapping({"a": "one", "*": "two"})
    added.add_policy("three", ppo(), policy_mapping=EACH)
    for algorithm in (given, added):
        torch.manual_seed(0)
        fit(algorithm, {})
    assert_same(dict(added.state_dict()), dict(given.state_dict()))
    added.remove_policy("two", policy_mapping={"b": "one", "a": "one", "c": "three"})  # which has its networks now
    fit(added, {})
    assert added.algorithms["three"].updates_done == 10 and list(added.algorithms) == ["one", "three"]


def test_schedules_of_an_added_algorithm_follow_the_runs_clock() -> None:
    algorithm = pair()
    change = lambda module: module.add_policy("three", ppo(lr=1.0, lr_schedule="linear"), policy_mapping=EACH)  # noqa: E731
    rates: list[float] = []

    class Rates(L.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
            if "three" in module.ids:
                rates.append(float(trainer.callback_metrics.get("three/optim/lr", torch.nan)))

    fit(algorithm, {5: change}, callbacks=[Rates()])
    assert rates == pytest.approx([0.5, 0.4, 0.3, 0.2, 0.1])


def test_loggers_monitors_and_checkpoints_take_it(tmp_path: Path) -> None:
    algorithm = pair()
    logger = CSVLogger(tmp_path)
    trainer = quiet_trainer(
        limit_val_batches=0, logger=logger, log_every_n_steps=1, enable_checkpointing=True,
        callbacks=[After({3: add_three, 6: remove_two}), LearningRateMonitor()],
    )  # fmt: skip
    trainer.fit(algorithm, data(max_env_steps=320, rollouts_per_epoch=2))
    assert "three/loss/policy" in (Path(logger.log_dir) / "metrics.csv").read_text()
    assert trainer.checkpoint_callback is not None
    loaded = MultiAgent.load_from_checkpoint(trainer.checkpoint_callback.best_model_path)
    assert loaded.ids == ("one", "three")


# --- env runners ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"prefetch": 1}, {"fixed_lag": 2}, {"prefetch": 2}, {"prefetch": 4}], ids=str)
def test_runners_in_actors_follow(monkeypatch: pytest.MonkeyPatch, options: dict[str, int]) -> None:
    """Rows of fragments under way are left out if their policy was removed; an added one has none in them."""
    fake_ray.use(monkeypatch, 1.0, 1.7)
    algorithm = MultiAgent(
        {"one": IMPALA(network=TINY), "two": IMPALA(network=LSTMNetwork)}, policy_mapping={"a": "one", "*": "two"}
    )
    add = lambda module: module.add_policy("three", IMPALA(network=TINY), policy_mapping=EACH)  # noqa: E731
    again = lambda module: module.add_policy("two", IMPALA(network=TINY), policy_mapping=EACH)  # noqa: E731
    seen, source = Kept(), data(num_env_runners=2, max_env_steps=960, **options)
    fit(algorithm, {4: add, 8: remove_two, 11: again}, source, callbacks=[seen])
    assert algorithm.ids == ("one", "three", "two") and algorithm.env_steps_done == 960 == source.ledger.delivered
    assert source.ledger.executed == source.ledger.delivered + source.ledger.discarded.total()
    assert {policy_id: seen_agents(seen, policy_id).keys() for policy_id in algorithm.ids} == {
        "one": {0}, "two": {1, 2}, "three": {1, 2}
    }  # fmt: skip
    for child in algorithm.algorithms.values():
        assert child.updates_done == algorithm.updates_done and child.env_steps_done == 960
    first = {
        policy_id: next(k for k, b in enumerate(seen.batches) if policy_id in b and b[policy_id]["mask"].any())
        for policy_id in algorithm.ids
    }
    assert first["one"] == 0 and first["three"] >= 4 and all("three" in batch for batch in seen.batches[4:])
    assert seen.batches[-1]["two"]["mask"].any() and "state" not in seen.batches[-1]["two"]  # not the one with memory


def test_past_fragments_and_repeats_are_of_the_policies_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_ray.use(monkeypatch, 1.0)
    for options in ({"replay_fraction": 0.5, "prefetch": 2}, {"num_reuses": 3, "circular_buffer_batches": 2}):
        algorithm = MultiAgent(
            {"one": IMPALA(network=TINY), "two": IMPALA(network=TINY)}, policy_mapping={"a": "one", "*": "two"}
        )
        add = lambda module: module.add_policy("three", IMPALA(network=TINY), policy_mapping=EACH)  # noqa: E731
        seen, source = Kept(), data(num_env_runners=1, max_env_steps=640, **options)
        fit(algorithm, {4: add, 9: remove_two}, source, callbacks=[seen])
        assert algorithm.env_steps_done == 640 and algorithm.algorithms["three"].updates_done == algorithm.updates_done
        if "replay_fraction" in options:
            for batch in seen.batches[1:]:
                for rollout in batch.values():
                    assert len(rollout["is_new"]) == len(rollout) and (
                        rollout["is_new"].any() or not rollout["mask"].any()
                    )


def test_free_running_runners_that_give_nothing_in_time_give_nothing_of_every_policy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake_ray.use(monkeypatch, 1.0)
    algorithm = MultiAgent(
        {"one": IMPALA(network=TINY), "two": IMPALA(network=TINY)}, policy_mapping={"a": "one", "*": "two"}
    )
    source, found = data(num_env_runners=1, prefetch=2, max_env_steps=320), []
    add = lambda module: module.add_policy("three", IMPALA(network=TINY), policy_mapping=EACH)  # noqa: E731

    def look(module: MultiAgent) -> None:
        assert source._template is not None
        found.append(source._nothing_like(source._template))

    fit(algorithm, {2: look, 3: add, 4: remove_two, 5: look}, source)
    assert [sorted(batch) for batch in found] == [["one", "two"], ["one", "three"]]
    assert not any(rollout["mask"].any() for batch in found for rollout in batch.values())


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize("prefetch", [0, 2])
def test_runners_in_processes_follow_also_one_that_dies_after_the_change(prefetch: int, tmp_path: Path) -> None:
    algorithm = MultiAgent(
        {"one": IMPALA(network=TINY), "two": IMPALA(network=TINY)}, policy_mapping={"a": "one", "*": "two"}
    )
    env_kwargs = {"mode": "turns", "num_agents": 3, "marker": str(tmp_path / "died")}
    source = data(
        "agent_envs:DiesOnce", env_kwargs=env_kwargs, num_env_runners=2, prefetch=prefetch, max_env_steps=960,
        evaluation=Evaluation(episodes=2, num_env_runners=1), rollouts_per_epoch=5,
    )  # fmt: skip
    add = lambda module: module.add_policy("three", IMPALA(network=TINY), policy_mapping=EACH)  # noqa: E731
    seen = Kept()
    trainer = fit(algorithm, {2: add, 4: remove_two}, source, callbacks=[seen], limit_val_batches=1.0)
    assert (tmp_path / "died").exists() and source.ledger.restarts == 1
    assert 960 - 64 < algorithm.env_steps_done == source.ledger.delivered <= 960  # a rollout is short while one is away
    assert source.ledger.executed == source.ledger.delivered + source.ledger.discarded.total()
    assert seen_agents(seen, "three").keys() == {1, 2} and "three/eval/return_mean" in trainer.callback_metrics


# --- replay -----------------------------------------------------------------------------------------------------------

REPLAY: dict[str, Any] = {"learning_starts": 40, "batch_size": 8, "update_to_data": 0.25}


def test_an_off_policy_algorithm_that_is_added_gets_a_buffer() -> None:
    dqn = lambda: DQN(network=TINY)  # noqa: E731
    algorithm = MultiAgent({"one": dqn(), "two": dqn()}, policy_mapping={"a": "one", "*": "two"})
    kwargs = {"env_kwargs": {"mode": "turns", "num_agents": 3}, "num_envs_per_env_runner": 2, "rollout_length": 2}
    source = ReplayDataModule(LoggedAgents, seed=0, env_steps_per_batch=40, max_env_steps=400, **kwargs, **REPLAY)

    class Each(L.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 2:
                module.add_policy("three", DQN(network=LSTMNetwork, sequence_length=4), policy_mapping=EACH)
            if batch_idx == 5:
                two = source.feeds["two"].buffer
                assert two is not None and len(two) > 0
                remove_two(module)

    trainer = quiet_trainer(limit_val_batches=0, callbacks=[Each()])
    trainer.fit(algorithm, source)
    assert list(source.feeds) == ["one", "three"] and algorithm.env_steps_done == 400
    three = source.feeds["three"]
    assert three.buffer is not None and 50 < len(three.buffer) < 200
    assert three.buffer.sample(500)["observation"][:, 1].unique().tolist() == [1.0, 2.0]
    assert algorithm.algorithms["three"].updates_done == pytest.approx(0.25 * len(three.buffer), abs=5)
    assert np.isfinite(float(trainer.callback_metrics["three/loss/value"]))


def test_a_buffer_is_made_and_dropped_beside_on_policy_algorithms() -> None:
    algorithm = MultiAgent({"one": ppo(), "two": DQN(network=TINY)}, policy_mapping={"a": "one", "*": "two"})
    source = data(max_env_steps=640, replay=Replay(**REPLAY))
    add = lambda module: module.add_policy("three", DQN(network=TINY), policy_mapping=EACH)  # noqa: E731
    fit(algorithm, {3: add, 8: remove_two}, source)
    assert list(source.feeds) == ["three"] and algorithm.algorithms["three"].updates_done > 20
    for changes, left in (({3: add_three, 5: remove_two}, ["one", "three"]), ({4: remove_one}, ["two"])):
        algorithm = MultiAgent({"one": ppo(), "two": DQN(network=TINY)}, policy_mapping={"a": "one", "*": "two"})
        fit(algorithm, changes, data(max_env_steps=320, replay=Replay(**REPLAY)))
        assert algorithm.trained == left and algorithm.env_steps_done == 320


def remove_one(algorithm: MultiAgent) -> None:
    algorithm.remove_policy("one", policy_mapping="two")


def test_a_past_version_of_another_class_is_in_a_checkpoint(tmp_path: Path) -> None:
    algorithm = MultiAgent({"one": ppo(), "two": DQN(network=TINY)}, policy_mapping={"a": "one", "*": "two"})
    add = lambda module: module.add_policy("past", module.frozen_copy("two"), policy_mapping=EACH | {"c": "past"})  # noqa: E731
    trainer = fit(algorithm, {3: add}, data(max_env_steps=128, replay=Replay(**REPLAY)))
    trainer.save_checkpoint(tmp_path / "past.ckpt")
    loaded = MultiAgent.load_from_checkpoint(tmp_path / "past.ckpt")
    assert_same(dict(loaded.frozen["past"].state_dict()), dict(algorithm.frozen["past"].state_dict()))


@pytest.mark.parametrize("replay", [None, {"two": Replay(**REPLAY)}])
def test_a_buffer_that_there_are_no_options_for_is_refused(replay: Any) -> None:
    policies = {"one": ppo(), "two": ppo() if replay is None else DQN(network=TINY)}
    algorithm = MultiAgent(policies, policy_mapping={"a": "one", "*": "two"})
    add = lambda module: module.add_policy("three", DQN(network=TINY), policy_mapping=EACH)  # noqa: E731
    with pytest.raises(OptionError, match=r"policies\['three'\]=DQN\(...\): it learns from a replay buffer, for which"):
        fit(algorithm, {1: add}, data(replay=replay))


def test_an_on_policy_algorithm_is_refused_where_all_learn_from_replay() -> None:
    class Add(L.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
            module.add_policy("three", ppo(), policy_mapping={"c": "three", "*": "one"})

    kwargs = {"env_kwargs": {"mode": "turns", "num_agents": 3}, "env_steps_per_batch": 40}
    source = ReplayDataModule(LoggedAgents, max_env_steps=400, **kwargs, **REPLAY)
    trainer = quiet_trainer(limit_val_batches=0, callbacks=[Add()])
    with pytest.raises(OptionError, match="ReplayDataModule feeds off-policy algorithms such as DQN and SAC alone"):
        trainer.fit(MultiAgent({"one": DQN(network=TINY)}, policy_mapping="one"), source)


# --- learning in turns ------------------------------------------------------------------------------------------------


def test_algorithms_learn_in_the_updates_that_a_function_names() -> None:
    asked: list[int] = []

    def turns(update: int) -> list[str]:
        asked.append(update)
        return ["one"] if update // 2 % 2 == 0 else ["two"]

    weights: dict[str, list[Any]] = {"one": [], "two": []}

    class Keep(L.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
            for policy_id, found in weights.items():
                found.append(
                    torch.cat([x.detach().flatten().clone() for x in module.algorithms[policy_id].parameters()])
                )
            learned = turns(module.updates_done - 1)
            asked.pop()
            assert {name.split("/")[0] for name in trainer.callback_metrics if "/loss/" in name} >= set(learned)

    algorithm = pair(train=turns)
    fit(algorithm, {}, callbacks=[Keep()])
    assert asked == list(range(10)) and algorithm.trained == ["one", "two"]
    for policy_id, mine in (("one", lambda update: update // 2 % 2 == 0), ("two", lambda update: update // 2 % 2)):
        for update in range(1, 10):
            moved = not torch.equal(weights[policy_id][update], weights[policy_id][update - 1])
            assert moved == bool(mine(update))
        child = algorithm.algorithms[policy_id]
        assert child.updates_done == 10 and child.env_steps_done == 320


def test_a_function_that_names_all_changes_nothing() -> None:
    found = []
    for train in (None, lambda update: {"two", "one"}):
        algorithm = pair(train=train)
        fit(algorithm, {})
        found.append(dict(algorithm.state_dict()))
    assert_same(*found)


def test_replay_goes_on_without_updates_while_others_learn() -> None:
    turns = lambda update: "one" if update < 5 else ["two"]  # noqa: E731
    algorithm = MultiAgent(
        {"one": ppo(), "two": DQN(network=TINY)}, policy_mapping={"a": "one", "*": "two"}, train=turns
    )
    source = data(max_env_steps=320, replay=Replay(**REPLAY))
    updates: list[tuple[int, int]] = []

    class Keep(L.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
            buffer = source.feeds["two"].buffer
            assert buffer is not None
            updates.append((module.algorithms["two"].updates_done, len(buffer)))

    fit(algorithm, {}, source, callbacks=[Keep()])
    assert [made for made, _ in updates[:5]] == [0] * 5 and 0 < updates[5][0] <= 8  # none are made up for
    assert all(rows > before for (_, before), (_, rows) in itertools.pairwise(updates))
    kwargs = {"env_kwargs": {"mode": "turns", "num_agents": 3}, "num_envs_per_env_runner": 2, "rollout_length": 2}
    source = ReplayDataModule(LoggedAgents, seed=0, env_steps_per_batch=40, max_env_steps=400, **kwargs, **REPLAY)
    turns = lambda update: ["one"] if update < 20 else ["two"]  # noqa: E731
    algorithm = MultiAgent(
        {"one": DQN(network=TINY), "two": DQN(network=TINY)}, policy_mapping={"a": "one", "*": "two"}, train=turns
    )
    quiet_trainer(limit_val_batches=0).fit(algorithm, source)
    one, two = (algorithm.algorithms[policy_id].updates_done for policy_id in ("one", "two"))
    assert 20 <= one < 24 and two > 10 and one + two == algorithm.updates_done  # asked once in each Lightning batch


@pytest.mark.parametrize(
    ("train", "sentence"),
    [
        (
            lambda update: ["three"],
            r"train returned \['three'\] for update 0: expected the ids of some of the policies",
        ),
        (lambda update: [], r"train returned \[\] for update 0: expected the ids of some of .* \['one', 'two'\]."),
        (lambda update: [["one"]], r"train returned \[\['one'\]\] for update 0: expected the ids"),
        (lambda update: None, "train returned None for update 0: expected the ids"),
        (lambda: ["one"], "train raised for update 0: TypeError: .* Expected a function of an update's number"),
    ],
)
def test_what_a_function_gets_wrong_is_said(train: Any, sentence: str) -> None:
    with pytest.raises(OptionError, match=sentence):
        fit(pair(train=train), {})


# --- checkpoints ------------------------------------------------------------------------------------------------------


def forgetful(max_env_steps: int, **options: Any) -> RolloutDataModule:
    """Episodes that depend on their seeds and actions alone, and end after several rollouts of 8 env steps."""
    env_kwargs = {"mode": "random", "num_agents": 3, "forgets": True}
    return data(env_kwargs=env_kwargs, rollout_length=4, max_env_steps=max_env_steps, **options)


def recurrent() -> PPO:
    memory = functools.partial(LSTMNetwork, hidden_size=4)
    return PPO(network=memory, normalize_observations=True, minibatch_size=4, num_epochs=1, sequence_length=4)


def four() -> MultiAgent:
    policies = {"one": recurrent(), "two": IMPALA(network=TINY), "random": Random()}
    return MultiAgent(policies, policy_mapping={"a": "one", "b": "two", "*": "random"})


HISTORY: Changes = {
    3: lambda module: module.add_policy("three", recurrent(), policy_mapping={"a": "one", "b": "two", "c": "three"}),
    5: lambda module: module.add_policy(
        "past", module.frozen_copy("one"), policy_mapping={"a": "one", "b": "past", "c": "three"}
    ),
    7: lambda module: module.remove_policy("two"),
    9: lambda module: module.add_policy("two", ppo(), policy_mapping={"a": "one", "b": "two", "c": "three"}),
    11: lambda module: module.set_policy_mapping({"a": "two", "b": "one", "c": "past"}),  # "three" has no agent now
}


class Save(L.Callback):
    """Writes a checkpoint after so many updates, once they changed policies."""

    def __init__(self, at: int, path: Path):
        self._at, self._path = at, path

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        if module.updates_done == self._at:
            trainer.save_checkpoint(self._path)


@pytest.mark.parametrize("ended", [True, False])
@pytest.mark.parametrize("at", [2, 3, 4, 6, 7, 8, 10, 11, 12])
def test_a_resumed_run_has_the_policies_it_had_and_is_the_unbroken_one(at: int, ended: bool, tmp_path: Path) -> None:
    def source(num_updates: int) -> RolloutDataModule:
        return forgetful(8 * num_updates, rollouts_per_epoch=1)

    whole, broken, resumed, path = four(), four(), four(), tmp_path / "broken.ckpt"
    trainer = fit(whole, HISTORY, source(15))
    if ended:
        fit(broken, HISTORY, source(at)).save_checkpoint(path)
    else:
        fit(broken, HISTORY, source(15), callbacks=[Save(at, path)])
    again = fit(resumed, HISTORY, source(15), path)
    assert resumed.ids == whole.ids == ("one", "random", "three", "past", "two")
    assert resumed.trained == whole.trained == ["one", "three", "two"] and resumed.updates_done == 15
    assert_same(dict(resumed.state_dict()), dict(whole.state_dict()))
    states = [[optimizer.state_dict() for optimizer in each.optimizers] for each in (again, trainer)]
    assert_same(*states)
    assert again.global_step == trainer.global_step


def test_a_resumed_run_goes_on_with_the_buffers_of_added_policies(tmp_path: Path) -> None:
    def make() -> MultiAgent:
        return MultiAgent({"one": ppo(), "two": DQN(network=TINY)}, policy_mapping={"a": "one", "*": "two"})

    changes: Changes = {
        4: lambda module: module.add_policy("three", DQN(network=TINY), policy_mapping=EACH), 8: remove_two,
    }  # fmt: skip
    found = []
    for at in (None, 4, 6, 9):
        replay = Replay(learning_starts=8, batch_size=4, update_to_data=0.5)
        algorithm, path = make(), None
        if at is not None:
            path = tmp_path / f"{at}.ckpt"
            fit(make(), changes, forgetful(8 * at, replay=replay)).save_checkpoint(path)
        fit(algorithm, changes, forgetful(8 * 14, replay=replay), path)
        found.append(dict(algorithm.state_dict()))
    for other in found[1:]:
        assert_same(other, found[0])


@pytest.fixture(scope="module")
def changed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, MultiAgent]:
    """The checkpoint of a run in which policies were added and removed, and one of them has no agent."""
    algorithm, path = four(), tmp_path_factory.mktemp("changed") / "changed.ckpt"
    fit(algorithm, HISTORY, forgetful(8 * 12)).save_checkpoint(path)
    return path, algorithm


def test_a_checkpoint_holds_the_policies_there_are(changed: tuple[Path, MultiAgent]) -> None:
    path, algorithm = changed
    loaded = MultiAgent.load_from_checkpoint(path)
    assert loaded.ids == algorithm.ids and loaded.given_mapping == {"a": "two", "b": "one", "c": "past"}
    assert loaded.register.state() == algorithm.register.state() and loaded.policy.numbers == algorithm.policy.numbers
    assert_same(dict(loaded.state_dict()), dict(algorithm.state_dict()))
    policies = load_policy(path)
    assert isinstance(policies, PolicySet) and policies.ids == algorithm.ids
    obs = {agent: np.array([100.0, i], np.float32) for i, agent in enumerate("abc")}
    assert policies.act(obs)[0]["c"] == algorithm.frozen["past"].act(obs["c"])[0]
    fit(loaded, {}, forgetful(8 * 14), path)  # it has all policies already
    assert loaded.updates_done == 14
    (metrics,) = quiet_trainer().validate(four(), forgetful(8), ckpt_path=path, verbose=False)
    assert "past/eval/return_mean" in metrics


def test_a_resumed_run_needs_the_policies_that_it_began_with(changed: tuple[Path, MultiAgent]) -> None:
    sentence = (
        r"policies=\['one', 'two'\]: the checkpoint has \['one', 'random', 'three', 'past', 'two'\], and its run began"
    )
    with pytest.raises(CheckpointError, match=sentence + r" with \['one', 'two', 'random'\]."):
        fit(pair(), {}, forgetful(8 * 14), changed[0])


class Zero:
    """A script of one's own."""

    def act(self, obs: Any) -> int:
        return 0


def by_number(agent: str, info: EpisodeInfo) -> str:
    return ("one", "script")[info.number % 2]


def test_what_no_file_holds_is_asked_for(tmp_path: Path) -> None:
    named = {"b": "script", "*": "one"}
    changes: Changes = {
        1: lambda module: module.add_policy("script", Zero(), policy_mapping=named),
        3: lambda module: module.set_policy_mapping(by_number),
    }

    def make(mapping: Any = "one", **more: Any) -> MultiAgent:
        return MultiAgent({"one": ppo(), **more}, policy_mapping=mapping)

    def go_on(algorithm: MultiAgent, at: int) -> dict[str, Any]:
        fit(algorithm, changes, forgetful(8 * 6), tmp_path / f"{at}.ckpt" if at else None)
        return dict(algorithm.state_dict())

    whole = go_on(make(), 0)
    for at in (2, 4):
        fit(make(), changes, forgetful(8 * at)).save_checkpoint(tmp_path / f"{at}.ckpt")
        with pytest.raises(
            CheckpointError, match=r"policies: 'script' was added while .* policies=\{..., 'script': ...\}"
        ):
            go_on(make(), at)
    assert_same(go_on(make(named, script=Zero()), 2), whole)
    with pytest.raises(CheckpointError, match="policy_mapping: it was changed to a function while the run trained"):
        go_on(make(named, script=Zero()), 4)
    assert_same(go_on(make(by_number, script=Zero()), 4), whole)


class Own(MLP):
    """A network of one's own."""


def test_an_added_policy_with_a_network_of_ones_own_is_asked_for(tmp_path: Path) -> None:
    changes: Changes = {1: lambda module: module.add_policy("three", ppo(network=Own), policy_mapping=EACH)}
    fit(pair(), changes, forgetful(16)).save_checkpoint(tmp_path / "own.ckpt")
    with pytest.raises(CheckpointError, match=r"'three' was added while .* with a network of your own"):
        fit(pair(), {}, forgetful(24), tmp_path / "own.ckpt")
    policies = {"one": ppo(), "two": IMPALA(network=TINY), "three": ppo(network=Own)}
    given = MultiAgent(policies, policy_mapping=EACH)
    fit(given, {}, forgetful(24), tmp_path / "own.ckpt")
    assert given.updates_done == 3


def test_policies_can_change_between_the_resume_and_the_first_rollout(tmp_path: Path, caplog: Any) -> None:
    fit(four(), {}, forgetful(32)).save_checkpoint(tmp_path / "four.ckpt")

    class Start(L.Callback):
        def on_train_start(self, trainer: Any, module: Any) -> None:
            module.remove_policy("random", policy_mapping={"a": "one", "*": "two"})
            module.remove_policy("two", policy_mapping="one")
            module.add_policy("two", ppo(), policy_mapping={"a": "one", "*": "two"})

    algorithm, source = four(), forgetful(64)
    fit(algorithm, {}, source, tmp_path / "four.ckpt", callbacks=[Start()])
    assert algorithm.updates_done == 8 and algorithm.ids == ("one", "two") and source.ledger.abandoned == 2
    assert "begin afresh" not in caplog.text  # they were gone on with before


# --- what cannot be ---------------------------------------------------------------------------------------------------

REFUSED: list[tuple[Callable[[MultiAgent], Any], str]] = [
    (lambda m: m.add_policy("one", ppo()), r"add_policy\('one'\): expected another id than .* \['one', 'two'\]."),
    (lambda m: m.add_policy("a/b", ppo()), "the id 'a/b': expected a word"),
    (lambda m: m.add_policy("x", 3), r"policies\['x'\]=3: expected an algorithm such as PPO\(\)"),
    (lambda m: m.add_policy("x", m.algorithms["one"]), r"policies\['x'\] is the same object as policies\['one'\]"),
    (lambda m: m.add_policy("x", MultiAgent({"y": PPO()})), r"policies\['x'\]: a MultiAgent: expected an algorithm"),
    (lambda m: m.add_policy("x", ppo(), policy_mapping={"*": "y"}), "policy_mapping: 'y' for .*: expected one of"),
    (lambda m: m.add_policy("x", ppo(), policy_mapping=3), "policy_mapping=3: expected a policy's id"),
    (lambda m: m.remove_policy("x"), r"remove_policy\('x'\): expected one of the policies \['one', 'two'\]."),
    (lambda m: m.remove_policy("two"), r"remove_policy\('two'\): policy_mapping still names it. Pass another one"),
    (lambda m: m.remove_policy("two", policy_mapping={"a": "two"}), "policy_mapping: 'two' for 'a': expected one of"),
    (lambda m: m.set_policy_mapping({"*": "x"}), r"policy_mapping: 'x' for '\*': expected one of the policies"),
]


def right() -> EnvSpec:
    """Other spaces."""
    spec = EnvConfig(Pair).try_out()
    assert isinstance(spec, MultiAgentSpec)
    return spec.agents["right"]


OTHERS = {"a": "one", "b": "two", "c": "x"}
WHILE_IT_TRAINS: list[tuple[Callable[[MultiAgent], Any], str]] = [
    (lambda m: m.add_policy("x", ppo()), r"policies\['x'\]: policy_mapping gives it no agent. Leave it out, or map"),
    (
        lambda m: m.add_policy("x", m.policy.learned["one"]),
        r"policies\['x'\] is the policy that policies\['one'\] learn",
    ),
    (
        lambda m: m.add_policy("x", ppo(minibatch_size=999), policy_mapping=OTHERS),
        "minibatch_size=999: expected at most",
    ),
    (lambda m: m.frozen_copy("x"), r"frozen_copy\('x'\): expected one of the policies with weights, \['one', 'two'\]."),
    (lambda m: m.add_policy("x", Policy(right()), policy_mapping=OTHERS), r"policies\['x'\]: .* has observation_space"),
    (lambda m: m.add_policy("x", ppo(spec=right().to_dict()), policy_mapping=OTHERS), "The weights are for Pair"),
    (lambda m: m.set_policy_mapping({"a": "one"}), "policy_mapping: agent 'b' matches none of"),
    (lambda m: m.set_policy_mapping(lambda agent, info: "x"), "policy_mapping: 'x' for agent 'a': expected one of"),
]


@pytest.mark.parametrize(("call", "sentence"), REFUSED)
def test_what_cannot_be_is_refused_before_and_while_it_trains(call: Any, sentence: str) -> None:
    with pytest.raises(OptionError, match=sentence):
        call(pair())
    refused(call, sentence)


@pytest.mark.parametrize(("call", "sentence"), WHILE_IT_TRAINS)
def test_what_cannot_be_is_refused_while_it_trains(call: Any, sentence: str) -> None:
    refused(call, sentence)


def refused(call: Any, sentence: str) -> None:
    """Nothing is changed by it: training goes on as if it had not been tried."""
    found = []
    for is_tried in (False, True):
        algorithm, tries = pair(), []

        def change(module: MultiAgent) -> None:
            with pytest.raises(OptionError, match=sentence):
                call(module)
            tries.append(1)  # noqa: B023

        trainer = fit(algorithm, {2: change} if is_tried else {}, data(max_env_steps=128))
        assert len(tries) == is_tried and len(trainer.optimizers) == 2
        found.append(dict(algorithm.state_dict()))
    assert_same(*found)


@pytest.mark.parametrize("hook", ["on_before_optimizer_step", "on_before_backward"])
def test_no_policy_comes_or_goes_during_an_update(hook: str) -> None:
    trainer = quiet_trainer(limit_val_batches=0, callbacks=[After({1: add_three}, hook)])
    with pytest.raises(OptionError, match=r"add_policy\('three'\): an update is under way. Call it between updates"):
        trainer.fit(pair(), data())


@pytest.mark.parametrize("hook", ["setup", "on_fit_start"])
def test_no_policy_comes_or_goes_while_a_fit_is_set_up(hook: str) -> None:
    class Call(L.Callback):
        pass

    setattr(Call, hook, lambda self, trainer, module, *_, **__: module.remove_policy("two"))
    with pytest.raises(
        OptionError, match=r"remove_policy\('two'\): the Trainer does not train yet. Call it before trai"
    ):
        fit(pair(), {}, callbacks=[Call()])


def test_no_policy_comes_or_goes_in_a_validation_by_itself() -> None:
    algorithm, source = pair(), data()
    fit(algorithm, {}, source)
    trainer = quiet_trainer(callbacks=[After({3: remove_two}, "on_validation_end")])
    with pytest.raises(OptionError, match="the Trainer does not train yet"):
        trainer.validate(algorithm, source, verbose=False)


def test_the_last_policy_that_is_trained_stays() -> None:
    algorithm = MultiAgent({"one": ppo(), "random": Random()}, policy_mapping={"a": "one", "*": "random"})
    with pytest.raises(
        OptionError, match=r"remove_policy\('one'\): it is the only policy that is trained. Add another"
    ):
        algorithm.remove_policy("one", policy_mapping="random")
    with pytest.raises(OptionError, match=r"frozen_copy\('one'\): there are no networks yet."):
        algorithm.frozen_copy("one")


def test_agents_of_other_spaces_are_refused() -> None:
    algorithm = MultiAgent({"left": ppo(), "right": ppo()})
    source = data(Pair, max_env_steps=128)
    for change, sentence in (
        (
            lambda m: m.set_policy_mapping({"left": "right", "right": "left"}),
            r"policies\['left'\]: policy_mapping gives",
        ),
        (lambda m: m.add_policy("x", ppo(), policy_mapping="x"), r"policies\['x'\] needs equal spaces"),
    ):
        with pytest.raises(OptionError, match=sentence):
            fit(algorithm, {1: change}, source)


def test_weights_that_a_callback_averages_do_not_come_and_go() -> None:
    with pytest.raises(OptionError, match=r"add_policy\('three'\): EMAWeightAveraging averages the weights that there"):
        fit(pair(), {1: add_three}, callbacks=[EMAWeightAveraging()])


def test_one_mapping_of_names_needs_an_agent_for_each() -> None:
    algorithm = MultiAgent({policy_id: ppo() for policy_id in "abc"})
    with pytest.raises(OptionError, match=r"remove_policy\('c'\): policy_mapping still names it."):
        fit(algorithm, {1: lambda module: module.remove_policy("c")})


# --- beside central critics and shared networks -----------------------------------------------------------------------


def teammates(**options: Any) -> MultiAgent:
    """ "one" and "two" share a central critic, "three" has one of its own."""
    central: dict[str, Any] = {"central_critic": "observations"}
    policies = {"one": ppo(**central), "two": ppo(**central), "three": ppo(**central)}
    return MultiAgent(policies, policy_mapping=EACH, critic_groups=[["one", "two"]], **options)


def test_a_past_version_plays_against_policies_with_central_critics(tmp_path: Path) -> None:
    """The others learn what they would have learned, in turns and over a resume: central inputs go on too."""

    def add(module: MultiAgent) -> None:
        module.add_policy("past", module.frozen_copy("three"), policy_mapping=EACH | {"c": "past"})
        module.remove_policy("three")

    whole, half, resumed = teammates(), teammates(), teammates()
    fit(whole, {3: add}, forgetful(8 * 12))
    assert whole.ids == ("one", "two", "past") and whole.algorithms["one"].critic is whole.algorithms["two"].critic
    fit(half, {3: add}, forgetful(8 * 7)).save_checkpoint(tmp_path / "half.ckpt")
    fit(resumed, {}, forgetful(8 * 12), tmp_path / "half.ckpt")
    assert_same(resumed.state_dict(), whole.state_dict())


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (
            lambda algorithm: algorithm.remove_policy("two", policy_mapping=EACH | {"b": "one"}),
            r"remove_policy\('two'\): it shares networks with \['one'\]",
        ),
        (
            lambda algorithm: algorithm.add_policy("four", ppo(central_critic="state"), policy_mapping={"*": "four"}),
            r"add_policy\('four'\): central_critic='state': what a central critic sees is collected from the beginning",
        ),
    ],
)
def test_what_cannot_be_with_central_critics_and_shared_networks_is_refused(call: Any, sentence: str) -> None:
    with pytest.raises(OptionError, match=sentence):
        fit(teammates(), {2: call})


def test_policies_that_share_networks_do_not_learn_in_turns() -> None:
    with pytest.raises(OptionError, match="train: expected ids, not a function, with critic_groups"):
        teammates(train=lambda update: ["one"])


def test_a_policy_with_a_central_critic_can_be_added_between_two_fits() -> None:
    algorithm = MultiAgent({"one": ppo()}, policy_mapping="one")
    quiet_trainer().validate(algorithm, data(), verbose=False)
    algorithm.add_policy("two", ppo(central_critic="observations"), policy_mapping={"a": "one", "*": "two"})
    fit(algorithm, {})
    assert algorithm.algorithms["two"].updates_done > 0
