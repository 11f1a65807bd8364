"""MultiAgent: several algorithms in one run, beside policies that are not trained."""

import functools
from collections import Counter
from pathlib import Path
from typing import Any

import fake_ray
import lightning as L
import numpy as np
import pytest
import torch
from agent_envs import MADE, LoggedAgents, MaskedInTurns, Wrong
from envs import CounterEnv, IdentityEnv, TargetEnv
from gymnasium import spaces
from helpers import assert_same, quiet_trainer

from lit_rl import (
    APPO,
    IMPALA,
    MLP,
    PPO,
    EpisodeInfo,
    Evaluation,
    LSTMNetwork,
    MultiAgent,
    MultiAgentEnv,
    Random,
    RolloutDataModule,
    load_policy,
)
from lit_rl.errors import CheckpointError, EnvError, OptionError
from lit_rl.evaluation.episodes import play
from lit_rl.policy import PolicySet
from lit_rl.policy.mapping import PolicyMapping
from lit_rl.rollout import Rollouts

SMALL: dict[str, Any] = {"minibatch_size": 16, "num_epochs": 1}


class Pair(MultiAgentEnv):
    """ "left" names a number it sees, "right" gives back one it sees: spaces differ. Episodes last four steps."""

    possible_agents = ("left", "right")

    def __init__(self) -> None:
        self._left, self._right = IdentityEnv(3), TargetEnv()

    def observation_space(self, agent: str) -> Any:
        return (self._left if agent == "left" else self._right).observation_space

    def action_space(self, agent: str) -> Any:
        return (self._left if agent == "left" else self._right).action_space

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[dict, dict]:
        self._t = 0
        return {"left": self._left.reset(seed=seed)[0], "right": self._right.reset(seed=seed)[0]}, {}

    def step(self, actions: dict[str, Any]) -> tuple[dict, dict, dict, dict, dict]:
        self._t += 1
        reward = {"left": self._left.step(actions["left"])[1], "right": self._right.step(actions["right"])[1]}
        obs = {"left": self._left.reset()[0], "right": self._right.reset()[0]}
        done = dict.fromkeys(self.possible_agents, self._t == 4)
        return obs, reward, done, {}, {}


def data(env: Any = LoggedAgents, **options: Any) -> RolloutDataModule:
    if env is LoggedAgents:
        options = {"env_kwargs": {"mode": "turns", "num_agents": 3}} | options
    sizes = {"num_envs_per_env_runner": 2, "rollout_length": 16, "seed": 0, "evaluation": Evaluation(episodes=3)}
    return RolloutDataModule(env, **sizes | {"max_env_steps": 96} | options)


def fit(algorithm: MultiAgent, source: Any = None, ckpt_path: Any = None, **options: Any) -> dict[str, float]:
    trainer = quiet_trainer(**options)
    trainer.fit(algorithm, source or data(), ckpt_path=ckpt_path)
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


class Seen(L.Callback):
    """Keeps what an algorithm is given."""

    def __init__(self) -> None:
        self.batches: list[Rollouts] = []

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        assert isinstance(batch, Rollouts)
        self.batches.append(Rollouts({policy_id: rollout.clone() for policy_id, rollout in batch.items()}))


def seen_agents(seen: Seen, policy_id: str) -> Counter[int]:
    """How many real rows a policy was given of each agent."""
    rows = [batch[policy_id]["observation"][batch[policy_id]["mask"]][:, 1] for batch in seen.batches]
    return Counter(torch.cat(rows).int().tolist())


# --- learning ---------------------------------------------------------------------------------------------------------


def test_each_policy_learns_from_the_rows_of_its_own_agents() -> None:
    MADE.clear()
    seen = Seen()
    algorithm = MultiAgent({"one": PPO(**SMALL), "two": IMPALA()}, policy_mapping={"b": "two", "*": "one"})
    source = data()
    metrics = fit(algorithm, source, callbacks=[seen])
    one, two = seen_agents(seen, "one"), seen_agents(seen, "two")
    assert set(one) == {0, 2} and set(two) == {1} and one.total() + two.total() == source.ledger.agent_steps
    assert {batch["two"]["mask"].shape[0] for batch in seen.batches} == {2}  # of "b" alone, in two copies
    assert algorithm.env_steps_done == 96 == source.ledger.delivered
    for policy_id in ("one", "two"):
        child = algorithm.algorithms[policy_id]
        assert child.env_steps_done == 96 and child.updates_done == algorithm.updates_done == 3
        assert np.isfinite(metrics[f"{policy_id}/loss/policy"]) and metrics[f"{policy_id}/rollout/policy_lag"] < 1
        assert metrics[f"{policy_id}/optim/skipped_updates"] == 0
    total = sum(metrics[f"eval/return_mean/{agent}"] for agent in "abc")
    assert metrics["eval/return_mean"] == pytest.approx(total)
    assert metrics["two/eval/return_mean"] == pytest.approx(metrics["eval/return_mean/b"])
    both = (metrics["eval/return_mean/a"] + metrics["eval/return_mean/c"]) / 2
    assert metrics["one/eval/return_mean"] == pytest.approx(both)


def test_agents_of_different_spaces_learn_by_algorithms_of_different_kinds() -> None:
    algorithm = MultiAgent(
        {
            "left": PPO(lr=1e-2, minibatch_size=128, num_epochs=4, gamma=0.0),
            "right": PPO(lr=1e-2, minibatch_size=128, num_epochs=10, gamma=0.0, log_std_init=-1.0),
        }
    )  # without a mapping agents are called as their policies
    source = data(Pair, rollout_length=64, num_envs_per_env_runner=4, max_env_steps=4096)
    fit(algorithm, source, limit_val_batches=0)
    (metrics,) = quiet_trainer().validate(algorithm, source, verbose=False)
    assert metrics["left/eval/return_mean"] > 3.8  # at best 4; a guess's is 4/3
    assert metrics["right/eval/return_mean"] > -0.4  # at best 0; that of 0 whatever is seen is -4/3


class Herd(MultiAgentEnv):
    """Wolves and sheep of other spaces, each with an id that is new, which take each other's slots as they leave.

    A wolf sees its number and 1, a sheep its number, 0 and 0. Every fourth agent is a wolf. Each acts three times.
    """

    possible_agents = ("wolf_*", "sheep_*")
    max_agents = 3

    def observation_space(self, agent: str) -> Any:
        return spaces.Box(-1.0, 1e6, (2 if agent.startswith("wolf") else 3,))

    def action_space(self, agent: str) -> Any:
        return spaces.Discrete(2) if agent.startswith("wolf") else spaces.Box(-1.0, 1.0, (1,))

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[dict, dict]:
        self._num, self._turns = 0, dict[str, int]()
        return self._shown(), {}

    def step(self, actions: dict[str, Any]) -> tuple[dict, dict, dict, dict, dict]:
        for agent, action in actions.items():
            assert self.action_space(agent).contains(action), (agent, action)
            self._turns[agent] += 1
        gone = {agent: True for agent, turns in self._turns.items() if turns == 3 or self._num > 20}
        self._turns = {agent: turns for agent, turns in self._turns.items() if agent not in gone}
        reward = {agent: 1.0 if agent.startswith("wolf") else -1.0 for agent in actions}
        return self._shown(), reward, gone, {}, {}

    def _shown(self) -> dict[str, np.ndarray]:
        if len(self._turns) < 3 and self._num <= 20:  # one comes at a time
            self._turns[f"{'sheep' if self._num % 4 else 'wolf'}_{self._num}"] = 0
            self._num += 1
        return {
            agent: np.array([agent.split("_")[1], *([1] if agent.startswith("wolf") else [0, 0])], np.float32)
            for agent in self._turns
        }


class HerdWithState(Herd):
    """The same, with how many came yet as its state."""

    state_space = spaces.Box(0.0, 1e6, (1,))

    def state(self) -> np.ndarray:
        return np.array([self._num], np.float32)


@pytest.mark.parametrize("mapping", [{"wolf_*": "wolves", "*": "sheep"}, {"sheep_*": "sheep", "w*": "wolves"}])
def test_agents_of_two_patterns_may_have_different_spaces(mapping: dict[str, str]) -> None:
    seen, options = Seen(), {"central_critic": "state"} if "*" in mapping else {}
    algorithm = MultiAgent({"wolves": PPO(**SMALL), "sheep": PPO(**SMALL, **options)}, policy_mapping=mapping)
    source = data(HerdWithState if options else Herd)
    metrics = fit(algorithm, source, callbacks=[seen])
    rows = {i: [batch[i]["observation"][batch[i]["mask"]] for batch in seen.batches] for i in algorithm.ids}
    wolves, sheep = torch.cat(rows["wolves"]), torch.cat(rows["sheep"])
    assert (wolves[:, 1] == 1).all() and (wolves[:, 0] % 4 == 0).all() and len(set(wolves[:, 0].tolist())) > 2
    assert (sheep[:, 1] == 0).all() and (sheep[:, 0] % 4 != 0).all()
    assert len(wolves) + len(sheep) == source.ledger.agent_steps
    assert metrics["wolves/eval/return_mean"] > 0 > metrics["sheep/eval/return_mean"]


def test_one_policy_in_a_multi_agent_is_that_algorithm_by_itself() -> None:
    found = []
    for wrap in (lambda ppo: ppo, lambda ppo: MultiAgent({"all": ppo})):
        torch.manual_seed(0)
        ppo = PPO(**SMALL)
        seen: Any = []

        class Keep(L.Callback):
            def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
                seen.append(batch["all"] if isinstance(batch, Rollouts) else batch)  # noqa: B023

        fit(wrap(ppo), callbacks=[Keep()], limit_val_batches=0)
        found.append([rollout["mask"].sum(1).tolist() for rollout in seen])
    assert found[0] == found[1]


@pytest.mark.parametrize("network", [None, LSTMNetwork])
def test_policies_that_are_not_trained_act_and_stay_as_they_are(network: Any, tmp_path: Path) -> None:
    first = MultiAgent({"one": PPO(network=network, **SMALL)})
    trainer = quiet_trainer(limit_val_batches=0)
    trainer.fit(first, data())
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    alone = load_policy(tmp_path / "one.ckpt", policy="one")
    plain = PPO(network=network, **SMALL)
    trainer = quiet_trainer(limit_val_batches=0)
    trainer.fit(plain, data())
    trainer.save_checkpoint(tmp_path / "plain.ckpt")
    policies = {
        "team": APPO(network=network), "left": PPO(**SMALL), "old": str(tmp_path / "plain.ckpt"), "random": Random(),
    }  # fmt: skip
    algorithm = MultiAgent(
        policies, policy_mapping={"a": "team", "b": "old", "c": "random", "d": "left"}, train=["team"]
    )
    seen = Seen()
    metrics = fit(algorithm, data(env_kwargs={"mode": "together", "num_agents": 4}), callbacks=[seen])
    assert set(seen_agents(seen, "team")) == {0} and set(seen.batches[0]) == {"team"}
    assert {name.split("/")[0] for name in metrics if "/loss/" in name} == {"team"}
    assert_same(dict(algorithm.frozen["old"].state_dict()), dict(plain.policy.state_dict()))
    assert alone.has_memory == (network is not None)


class Alternate:
    """Policies of "a" and "b" in turns from episode to episode; "c" is anybody's. Keeps whom it was asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, int]] = []

    def __call__(self, agent: str, info: EpisodeInfo) -> str:
        self.asked.append((agent, info.number))
        if agent == "c":
            return ("one", "two")[info.rng.integers(2)]
        return ("one", "two")[(info.number + (agent == "b")) % 2]


def test_a_function_maps_anew_in_each_episode_and_never_within() -> None:
    mapping = Alternate()
    algorithm = MultiAgent({"one": PPO(**SMALL), "two": PPO(**SMALL)}, policy_mapping=mapping)
    seen = Seen()
    source = data(env_kwargs={"mode": "random", "num_agents": 3}, num_envs_per_env_runner=1, max_env_steps=320)
    fit(algorithm, source, callbacks=[seen], limit_val_batches=0)
    rows: dict[int, set[str]] = {}
    for batch in seen.batches:
        for policy_id, rollout in batch.items():
            for number, _ in rollout["observation"][rollout["mask"]].int().tolist():
                rows.setdefault(number // 100, set()).add(policy_id)
    assert len(rows) > 50 and all(len(policies) == 1 for policies in rows.values())  # a life has one policy
    assert all(len(seen_agents(seen, policy_id)) == 3 for policy_id in ("one", "two"))
    first = len(mapping.asked) - mapping.asked[::-1].index(("c", 19))  # until then it is asked who may act for whom
    asked = Counter(mapping.asked[first:])
    assert max(asked.values()) == 1 and len(asked) > 40  # also where an agent is reborn
    total = sum(batch[policy_id]["mask"].sum() for batch in seen.batches for policy_id in batch)
    assert int(total) == source.ledger.agent_steps


@pytest.mark.parametrize("prefetch", [0, 1, 2])
def test_runners_in_actors_feed_every_policy(monkeypatch: pytest.MonkeyPatch, prefetch: int) -> None:
    fake_ray.use(monkeypatch, 1.0, 1.5)
    seen = Seen()
    algorithm = MultiAgent({"one": IMPALA(), "two": APPO()}, policy_mapping={"a": "one", "*": "two"})
    source = data(num_env_runners=2, prefetch=prefetch, max_env_steps=320)
    fit(algorithm, source, callbacks=[seen], limit_val_batches=0)
    assert set(seen_agents(seen, "one")) == {0} and set(seen_agents(seen, "two")) == {1, 2}
    assert algorithm.env_steps_done == 320
    if prefetch:  # rows are of older weights, which all policies have the same count of
        ages = [
            k - int(batch["one"]["policy_version"][batch["one"]["mask"]].min()) for k, batch in enumerate(seen.batches)
        ]
        assert ages[0] == 0 and max(ages) >= 1


@pytest.mark.parametrize("prefetch", [0, 2])
def test_every_policy_learns_from_each_rollout_again(monkeypatch: pytest.MonkeyPatch, prefetch: int) -> None:
    fake_ray.use(monkeypatch, 1.0, 1.5)
    seen = Seen()
    algorithm = MultiAgent({"one": IMPALA(), "two": APPO()}, policy_mapping={"a": "one", "*": "two"})
    source = data(num_env_runners=min(prefetch, 1), prefetch=prefetch, num_reuses=2, max_env_steps=320)
    fit(algorithm, source, callbacks=[seen], limit_val_batches=0)
    assert algorithm.env_steps_done == 320 == source.ledger.delivered and len(seen.batches) == 20
    for policy_id in ("one", "two"):
        assert algorithm.algorithms[policy_id].updates_done == 20
        for first, again in zip(seen.batches[::2], seen.batches[1::2]):
            assert "is_new" not in first[policy_id] and not again[policy_id]["is_new"].any()
            assert_same(first[policy_id]["observation"], again[policy_id]["observation"])
    assert seen_agents(seen, "one")[0] + seen_agents(seen, "two").total() == 2 * source.ledger.agent_steps


def test_how_old_rows_are_counts_the_gradient_steps_of_one_policy(recwarn: pytest.WarningsRecorder) -> None:
    algorithm = MultiAgent({"one": IMPALA(), "two": APPO()}, policy_mapping={"a": "one", "*": "two"})
    fit(algorithm, data(num_reuses=25, max_env_steps=32), limit_val_batches=0)
    assert not [each for each in recwarn if "gradient steps old" in str(each.message)]  # at most 24, of two policies 48


def test_past_fragments_join_every_policys_rollout(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_ray.use(monkeypatch, 1.0)
    seen = Seen()
    algorithm = MultiAgent({"one": IMPALA(), "two": APPO()}, policy_mapping={"a": "one", "*": "two"})
    source = data(num_env_runners=1, prefetch=2, replay_fraction=0.5, max_env_steps=320)
    fit(algorithm, source, callbacks=[seen], limit_val_batches=0)
    assert algorithm.env_steps_done == 320 == source.ledger.delivered
    later, past = seen.batches[1:], 0
    for batch in later:
        assert batch["one"]["is_new"].tolist() == [True] * 2 + [False] * 2  # of one agent in two copies
        assert batch["two"]["is_new"].tolist() == [True] * 4 + [False] * 4
        for policy_id in ("one", "two"):
            new, mask = batch[policy_id]["is_new"], batch[policy_id]["mask"]
            past += int(mask[~new].sum())
    new_rows = sum(int(r["mask"][: len(r) // 2].sum()) for batch in later for r in batch.values())
    first = sum(int(rollout["mask"].sum()) for rollout in seen.batches[0].values())
    assert past > 100 and first + new_rows == source.ledger.agent_steps


def test_no_policy_learns_from_rows_that_are_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_ray.use(monkeypatch, 1.0, 9.0)  # one is nine times slower
    seen = Seen()
    algorithm = MultiAgent({"one": IMPALA(), "two": APPO()}, policy_mapping={"a": "one", "*": "two"})
    source = data(num_env_runners=2, prefetch=2, fragments_per_batch=1, max_policy_lag=4, max_env_steps=960)
    fit(algorithm, source, callbacks=[seen], limit_val_batches=0)
    assert source.ledger.dropped > 0 and algorithm.env_steps_done == source.ledger.delivered
    for k, batch in enumerate(seen.batches):
        for rollout in batch.values():
            # An open action keeps the version it was sampled with: it may be one fragment older than the rest.
            assert (k - rollout["policy_version"][rollout["mask"]]).median() <= 4


def test_a_policy_that_nobody_acts_by_for_a_while_keeps_the_clock() -> None:
    def late(agent: str, info: EpisodeInfo) -> str:
        return "two" if agent == "b" and info.number % 4 == 3 else "one"

    small = SMALL | {"minibatch_size": 4}
    algorithm = MultiAgent({"one": PPO(**small), "two": PPO(**small)}, policy_mapping=late)
    source = data(rollout_length=4, max_env_steps=160, env_kwargs={"mode": "together", "num_agents": 2})
    seen = Seen()
    fit(algorithm, source, callbacks=[seen], limit_val_batches=0)
    assert not seen.batches[0]["two"]["mask"].any() and any(batch["two"]["mask"].any() for batch in seen.batches)
    assert algorithm.algorithms["two"].updates_done == algorithm.updates_done == 20
    assert algorithm.algorithms["two"].env_steps_done == 160


# --- scripted policies ------------------------------------------------------------------------------------------------


class Lowest:
    """The lowest legal action."""

    def act(self, obs: Any) -> int:
        return int(np.argmax(obs["action_mask"]))


class Illegal:
    def act(self, obs: Any) -> int:
        return int(np.argmin(obs["action_mask"])) if not obs["action_mask"].all() else 7


def test_scripted_policies_act_by_their_masks() -> None:
    algorithm = MultiAgent({"learns": PPO(**SMALL), "lowest": Lowest()}, policy_mapping={"a": "learns", "b": "lowest"})
    metrics = fit(algorithm, data(MaskedInTurns))
    assert metrics["eval/return_mean/b"] == 4.0  # all its turns
    fit(MultiAgent({"learns": PPO(**SMALL), "random": Random()}, policy_mapping={"a": "learns", "b": "random"}),
        data(MaskedInTurns))  # an illegal action would be OurFault  # fmt: skip


def test_what_evaluation_draws_at_random_changes_nothing_in_training() -> None:
    def trained(episodes: int) -> MultiAgent:
        players = {"learns": PPO(network=MLP, **SMALL), "random": Random()}
        algorithm = MultiAgent(players, policy_mapping={"player_1": "learns", "*": "random"})
        torch.manual_seed(0)
        source = data("pettingzoo.classic.tictactoe_v3", rollouts_per_epoch=1, evaluation=Evaluation(episodes=episodes))
        fit(algorithm, source)
        return algorithm

    one, five = trained(1), trained(5)
    for a, b in zip(one.parameters(), five.parameters()):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_an_illegal_action_of_a_scripted_policy_is_named() -> None:
    algorithm = MultiAgent({"learns": PPO(**SMALL), "wrong": Illegal()}, policy_mapping={"a": "learns", "b": "wrong"})
    with pytest.raises(EnvError, match=r"policies\['wrong'\] acted by \d: .*. Mend the policy."):
        fit(algorithm, data(MaskedInTurns))


# --- checkpoints ------------------------------------------------------------------------------------------------------


def pair(**options: Any) -> MultiAgent:
    policies = {
        "one": PPO(lr=1e-3, max_grad_norm=None, **SMALL),
        "two": IMPALA(network=functools.partial(LSTMNetwork, hidden_size=8)),
    }
    mapping = {"a": "one", "b": "two", "c": "random"}
    return MultiAgent({**policies, "random": Random()}, policy_mapping=mapping, **options)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, MultiAgent]:
    algorithm, path = pair(), tmp_path_factory.mktemp("multi") / "pair.ckpt"
    trainer = quiet_trainer(limit_val_batches=0)
    trainer.fit(algorithm, data())
    trainer.save_checkpoint(path)
    return path, algorithm


def test_a_checkpoint_holds_its_algorithms_as_plain_data(saved: tuple[Path, MultiAgent]) -> None:
    path, algorithm = saved
    loaded = MultiAgent.load_from_checkpoint(path)
    assert type(loaded.algorithms["one"]) is PPO and type(loaded.algorithms["two"]) is IMPALA
    assert loaded.algorithms["one"].hp.lr == 1e-3 and loaded.env_steps_done == 96
    assert loaded.algorithms["one"].hparams == algorithm.algorithms["one"].hparams
    assert isinstance(loaded.scripted["random"], Random)
    assert_same(dict(loaded.state_dict()), dict(algorithm.state_dict()))
    policies = torch.load(path, weights_only=True)["hyper_parameters"]["policies"]
    assert policies["one"]["class"] == "PPO" and policies["two"]["options"]["network"]["name"] == "LSTMNetwork"


def test_a_set_of_policies_acts_for_each_agent_by_its_own(saved: tuple[Path, MultiAgent]) -> None:
    path, algorithm = saved
    policies = load_policy(path)
    assert isinstance(policies, PolicySet)
    obs = {agent: np.array([100.0, i], np.float32) for i, agent in enumerate("abc")}
    actions, states = policies.act(obs)
    again, states = policies.act({"b": obs["b"]}, states)
    two = algorithm.algorithms["two"].policy
    first, state = two.act(obs["b"])
    second, _ = two.act(obs["b"], state)
    assert (actions["b"], again["b"]) == (first, second)
    assert actions["a"] == algorithm.algorithms["one"].policy.act(obs["a"])[0] and actions["c"] in range(3)
    alone = load_policy(path, policy="two")
    assert alone.act(obs["b"])[0] == first
    with pytest.raises(CheckpointError, match=r"has no policy 'random' with weights, only \['one', 'two'\]"):
        load_policy(path, policy="random")


@pytest.mark.parametrize("name", ["Evil", "os:system", "load_policy", "ReplayDataModule", "Scripted"])
def test_a_checkpoint_names_no_class_but_algorithms_of_lit_rl(name: str) -> None:
    with pytest.raises(CheckpointError, match=f"policy 'one' is of the class {name}, which is none of lit_rl's own"):
        MultiAgent({"one": {"class": name, "options": {"storage_dir": "x"}}})


def test_a_resumed_run_goes_on_with_every_algorithm(saved: tuple[Path, MultiAgent]) -> None:
    path, first = saved
    again = pair()
    fit(again, data(max_env_steps=192), path, limit_val_batches=0)
    assert again.env_steps_done == 192 and again.algorithms["two"].updates_done == 6
    with pytest.raises(CheckpointError, match=r"policies=\['one'\]: the checkpoint has \['one', 'two', 'random'\]"):
        fit(MultiAgent({"one": PPO(**SMALL)}), data(max_env_steps=192), path)
    assert first.env_steps_done == 96


def test_a_resumed_run_says_which_policys_options_are_others(saved: tuple[Path, MultiAgent], caplog: Any) -> None:
    caplog.set_level("INFO", "lightning.pytorch.utilities.rank_zero")
    for change, said in ((False, []), (True, ["two: gamma=0.5 (was 0.99)."])):
        caplog.clear()
        again = pair()
        if change:
            again.algorithms["two"].hparams["gamma"] = 0.5
        fit(again, data(max_env_steps=128), saved[0], limit_val_batches=0)
        start = "Resumed with other options than the checkpoint's: "
        lines = [r.getMessage() for r in caplog.records if r.getMessage().startswith("Resumed with")]
        assert lines == [start + end for end in said]


def test_a_resumed_run_begins_with_what_every_algorithm_had(saved: tuple[Path, MultiAgent]) -> None:
    path, first = saved
    found: list[Any] = []

    class Keep(L.Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
            if not found:
                weights = {name: x.clone() for name, x in module.state_dict().items()}
                found.append((weights, module.algorithms["one"].resume_state()))

    fit(pair(), data(max_env_steps=128), path, callbacks=[Keep()], limit_val_batches=0)
    ((weights, state),) = found
    assert_same(weights, dict(first.state_dict()))
    assert_same(state, first.algorithms["one"].resume_state())


@pytest.mark.parametrize("mode", ["turns", "random", "cars"])
@pytest.mark.parametrize("several", [False, True])
def test_a_resumed_run_is_the_unbroken_one(mode: str, several: bool, tmp_path: Path) -> None:
    def make() -> Any:
        memory = functools.partial(LSTMNetwork, hidden_size=8)
        one = PPO(network=memory, normalize_observations=True, minibatch_size=16, num_epochs=1, sequence_length=4)
        if not several:
            return one
        names = {"car_*": "one"} if mode == "cars" else {"a": "one", "b": "random"}
        policies = {"one": one, "random": Random(), "two": IMPALA(network=memory)}
        return MultiAgent(policies, policy_mapping=functools.partial(_by_episode, names))

    def source(max_env_steps: int) -> RolloutDataModule:
        env_kwargs = {"mode": mode, "num_agents": 3, "forgets": True}
        return data(env_kwargs=env_kwargs, rollout_length=8, max_env_steps=max_env_steps)

    unbroken, broken, resumed = make(), make(), make()
    fit(unbroken, source(128), limit_val_batches=0)
    trainer = quiet_trainer(limit_val_batches=0)
    trainer.fit(broken, source(64))
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    fit(resumed, source(128), tmp_path / "half.ckpt", limit_val_batches=0)
    assert_same(dict(resumed.state_dict()), dict(unbroken.state_dict()))
    assert not torch.equal(next(resumed.parameters()), next(broken.parameters()))


def _by_episode(names: dict[str, str], agent: str, info: EpisodeInfo) -> str:
    """A policy that depends on the agent, the episode's number and chance."""
    return names.get(agent, ("one", "two")[(info.number + int(info.rng.integers(2))) % 2])


def test_episodes_that_cannot_be_begun_again_begin_afresh(saved: tuple[Path, MultiAgent], caplog: Any) -> None:
    fit(pair(), data(max_env_steps=128), saved[0], limit_val_batches=0)
    assert "Resumed: 2 of the 2 episodes under way begin afresh, since their environment" in caplog.text


def test_a_policy_can_begin_from_another_runs_checkpoint(tmp_path: Path) -> None:
    plain = PPO(**SMALL)
    trainer = quiet_trainer(limit_val_batches=0)
    trainer.fit(plain, data())
    trainer.save_checkpoint(tmp_path / "plain.ckpt")
    algorithm = MultiAgent(
        {"one": PPO(lr=1e-9, **SMALL), "two": PPO(**SMALL)}, policy_mapping={"a": "one", "*": "two"},
        init_from={"one": str(tmp_path / "plain.ckpt")},
    )  # fmt: skip
    fit(algorithm, limit_val_batches=0)
    weight = algorithm.algorithms["one"].policy.head.weight
    torch.testing.assert_close(weight, plain.policy.head.weight, atol=1e-5, rtol=0)
    assert not torch.allclose(algorithm.algorithms["two"].policy.head.weight, weight, atol=1e-3)


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: MultiAgent({}), "policies={}: expected a dict of algorithms"),
        (lambda: MultiAgent({"a/b": PPO()}), "the id 'a/b': expected a word"),
        (lambda: MultiAgent({"one": 3}), r"policies\['one'\]=3: expected an algorithm such as PPO\(\)"),
        (lambda: MultiAgent({"one": Random}), "expected an algorithm such as"),
        (lambda: MultiAgent({"one": PPO()}, train=["two"]), r"train: 'two' is no policy with an algorithm"),
        (lambda: MultiAgent({"one": Random()}), r"none of the policies \['one'\] is trained. Give one of them"),
        (lambda: MultiAgent({"one": PPO()}, init_from={"two": "x.ckpt"}), "init_from: 'two': expected one of"),
    ],
)
def test_what_cannot_be_is_refused_when_it_is_made(make: Any, sentence: str) -> None:
    with pytest.raises(OptionError, match=sentence):
        make()


BOTH: dict[str, Any] = {"one": PPO(**SMALL), "two": PPO(**SMALL)}


@pytest.mark.parametrize(
    ("mapping", "env", "sentence"),
    [
        ({"a": "one"}, LoggedAgents, r"policy_mapping: agent 'b' matches none of \['a'\]. Add a pattern."),
        ({"wolf_*": "one", "w*": "two"}, Herd, r"policy_mapping: agents 'sheep_\*' match none of .* Add a pattern."),
        ({"*": "one", "w*": "two"}, Herd, r"env=Herd: .* policies\['one'\] needs equal spaces"),
        ({"*": "three"}, LoggedAgents, r"policy_mapping: 'three' for '\*': expected one of the policies"),
        (None, LoggedAgents, "policy_mapping: expected it, since no policy is called 'a' as the agent is."),
        (3, LoggedAgents, "policy_mapping=3: expected a policy's id"),
        ({"*": "one"}, LoggedAgents, r"policies\['two'\]: policy_mapping gives it no agent. Leave it out, or map one."),
        ({"left": "one", "*": "one"}, Pair, r"policies\['one'\] needs equal spaces. .* MultiAgent\(\{'left': PPO\(\)"),
        ("one", CounterEnv, "env=CounterEnv has one agent: expected an environment of several."),
        (lambda agent, info: "four", LoggedAgents, "policy_mapping: 'four' for agent 'a': expected one of"),
    ],
)
def test_what_does_not_fit_the_environment_is_refused(mapping: Any, env: Any, sentence: str) -> None:
    with pytest.raises(OptionError, match=sentence):
        fit(MultiAgent(BOTH, policy_mapping=mapping), data(env))


def test_a_path_for_all_policies_is_refused() -> None:
    algorithm = MultiAgent({"one": PPO(**SMALL)})
    algorithm.init_from = "x.ckpt"  # as the command line's --init_from does
    with pytest.raises(OptionError, match="expected a dict of checkpoints by policy with MultiAgent"):
        fit(algorithm)


def test_what_is_not_there_yet_is_refused() -> None:
    with pytest.raises(OptionError, match="num_reuses=2: PPO does not learn from rollouts again"):
        fit(MultiAgent({"one": PPO(), "two": IMPALA()}, policy_mapping={"a": "one", "*": "two"}), data(num_reuses=2))


def test_a_plain_algorithm_is_pointed_to_multi_agent_where_spaces_differ() -> None:
    with pytest.raises(
        OptionError, match=r"one policy needs equal spaces. .* MultiAgent\(\{'a': PPO\(\), 'b': PPO\(\)"
    ):
        quiet_trainer().fit(PPO(), data(Wrong, env_kwargs={"how": "differ"}))


def test_a_checkpoints_policy_of_other_spaces_is_refused(saved: tuple[Path, MultiAgent], tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="holds several policies: load one with load_policy"):
        MultiAgent({"one": PPO(), "old": str(saved[0])})
    old = load_policy(saved[0], policy="one")
    algorithm = MultiAgent({"one": PPO(**SMALL), "old": old}, policy_mapping={"left": "one", "right": "old"})
    with pytest.raises(OptionError, match=r"policies\['old'\]: the checkpoint's policy has observation_space Box"):
        fit(algorithm, data(Pair))


def test_the_first_pattern_that_matches_wins() -> None:
    mapping = PolicyMapping({"red_1": "x", "red_*": "y", "*": "z"}, ["x", "y", "z"])
    info = EpisodeInfo(0, None, np.random.default_rng(0))
    assert [mapping.policy_of(agent, info) for agent in ("red_1", "red_2", "blue")] == ["x", "y", "z"]
    assert mapping.may_be("red_*") == {"x", "y"} and mapping.may_be("red_2") == {"y"}
    assert mapping.may_be("blue_*") == {"z"} and mapping.may_be("*_1") == {"x", "y", "z"}
    assert PolicyMapping({"red_*": "x", "red_1": "y"}, ["x", "y"]).may_be("red_?") == {"x"}
    assert PolicyMapping("x", ["x"]).plain == "x" and PolicyMapping(lambda agent, info: "x", ["x"]).plain is None


# --- what the users' own code does wrong ------------------------------------------------------------------------------


class Raises:
    def act(self, obs: Any) -> Any:
        raise KeyError("board")


def test_a_script_and_a_mapping_that_raise_are_named() -> None:
    algorithm = MultiAgent({"learns": PPO(**SMALL), "s": Raises()}, policy_mapping={"a": "learns", "*": "s"})
    with pytest.raises(EnvError, match=r"policies\['s'\] raised in act: KeyError: 'board'. Mend the policy."):
        fit(algorithm)
    with pytest.raises(OptionError, match=r"policy_mapping raised for agent 'a': TypeError: .* a function of an"):
        fit(MultiAgent({"x": PPO(**SMALL)}, policy_mapping=lambda agent: "x"))  # type: ignore[arg-type,misc]


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: MultiAgent({"eval": PPO()}), "the id 'eval': torch's modules have an attribute of that name"),
        (lambda: MultiAgent({"x": PPO()}, init_from="old.ckpt"), r"expected a dict of checkpoints by policy, as in"),  # type: ignore[arg-type]
        (lambda: MultiAgent(dict.fromkeys("xy", PPO())), r"policies\['y'\] is the same object as policies\['x'\]"),
        (lambda: MultiAgent({"x": MultiAgent({"y": PPO()})}), r"policies\['x'\]: a MultiAgent: expected an algorithm"),
    ],
)
def test_policies_that_cannot_be_are_refused(make: Any, sentence: str) -> None:
    with pytest.raises(OptionError, match=sentence):
        make()


class Rewards(Pair):
    """Gives "right" always one reward, or asks nobody any more."""

    def __init__(self, reward: float = 0.0, silent: bool = False):
        super().__init__()
        self._reward, self._silent = reward, silent

    def step(self, actions: dict[str, Any]) -> tuple[dict, dict, dict, dict, dict]:
        if self._silent:
            return {}, {}, {}, {}, {}
        obs, reward, *rest = super().step(actions)
        return obs, reward | {"right": self._reward}, *rest


def test_a_reward_that_is_no_number_is_refused_also_where_nobody_learns_from_it() -> None:
    algorithm = MultiAgent({"left": PPO(**SMALL), "right": Random()})
    with pytest.raises(EnvError, match="reward=nan of agent 'right' of copy 0, whose policy is not trained: expected"):
        fit(algorithm, data(lambda: Rewards(float("nan"))), limit_val_batches=0)


def test_an_environment_in_which_nobody_is_asked_any_more_is_refused() -> None:
    algorithm = MultiAgent({"left": PPO(**SMALL), "right": Random()})
    with pytest.raises(EnvError, match=r"nobody was asked to act for 1000 steps, though \['left', 'right'\] are there"):
        fit(algorithm, data(lambda: Rewards(silent=True), max_env_steps=4096), limit_val_batches=0)


def test_a_policy_begins_as_the_one_of_its_name_in_a_file_of_several(saved: tuple[Path, MultiAgent]) -> None:
    path, first = saved
    other = MultiAgent(
        {"one": PPO(**SMALL), "r": Random()}, policy_mapping={"a": "one", "*": "r"}, init_from={"one": str(path)}
    )
    trainer = quiet_trainer(max_epochs=0)
    trainer.fit(other, data())
    assert_same(other.algorithms["one"].policy.state_dict(), first.algorithms["one"].policy.state_dict())
    mapping = {"b": "three", "*": "r"}
    wrong = MultiAgent({"three": IMPALA(), "r": Random()}, policy_mapping=mapping, init_from={"three": str(path)})
    with pytest.raises(CheckpointError, match=r"holds the policies \['one', 'two', 'random'\], and none is .* 'three'"):
        fit(wrong)
    env: dict[str, Any] = {"env_kwargs": {"mode": "turns", "num_agents": 3}}
    alone = PPO(**SMALL)
    alone.init_from = str(path)  # as the command line's --init_from does
    with pytest.raises(CheckpointError, match=r"MultiAgent alone takes one of them. Name a checkpoint of one policy"):
        quiet_trainer().fit(alone, data(LoggedAgents, **env))


def test_resuming_with_other_policies_that_are_trained_is_refused(tmp_path: Path) -> None:
    mapping = {"a": "one", "*": "two"}
    trainer = quiet_trainer(limit_val_batches=0)
    trainer.fit(MultiAgent({"one": PPO(**SMALL), "two": PPO(**SMALL)}, policy_mapping=mapping, train=["one"]), data())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    both = MultiAgent({"one": PPO(**SMALL), "two": PPO(**SMALL)}, policy_mapping=mapping)
    with pytest.raises(CheckpointError, match=r"train=\['one', 'two'\]: the checkpoint has \['one'\]. Resume with the"):
        fit(both, data(max_env_steps=192), ckpt_path=tmp_path / "a.ckpt")


def test_episodes_begin_afresh_where_a_resumed_run_has_another_mapping(tmp_path: Path) -> None:
    def algorithm(first: str, others: str) -> MultiAgent:
        policies = {"one": PPO(**SMALL), "two": PPO(**SMALL)}
        return MultiAgent(policies, policy_mapping={"a": first, "*": others})

    env_kwargs = {"mode": "turns", "num_agents": 3, "forgets": True}
    trainer = quiet_trainer(limit_val_batches=0)
    trainer.fit(algorithm("one", "two"), data(env_kwargs=env_kwargs))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    seen, other = Seen(), algorithm("two", "one")
    source = data(env_kwargs=env_kwargs, max_env_steps=192)
    fit(other, source, ckpt_path=tmp_path / "a.ckpt", callbacks=[seen], limit_val_batches=0)
    assert other.env_steps_done == 192 and set(seen_agents(seen, "two")) == {0}


class Cars(MultiAgentEnv):
    """Two cars, one of which is paid and the other not."""

    possible_agents = ("car_*",)
    max_agents = 2

    def observation_space(self, agent: str) -> Any:
        return IdentityEnv(3).observation_space

    def action_space(self, agent: str) -> Any:
        return IdentityEnv(3).action_space

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[dict, dict]:
        self._t = 0
        return {car: IdentityEnv(3).reset(seed=0)[0] for car in ("car_1", "car_2")}, {}

    def step(self, actions: dict[str, Any]) -> tuple[dict, dict, dict, dict, dict]:
        self._t += 1
        obs = {car: IdentityEnv(3).reset(seed=0)[0] for car in actions}
        return obs, {"car_1": 5.0, "car_2": -1.0}, dict.fromkeys(actions, self._t == 4), {}, {}


def test_returns_of_policies_are_those_of_their_own_agents_also_of_one_pattern() -> None:
    policies = {"paid": PPO(**SMALL), "unpaid": PPO(**SMALL)}
    algorithm = MultiAgent(policies, policy_mapping={"car_1": "paid", "*": "unpaid"})
    metrics = fit(algorithm, data(Cars))
    assert metrics["paid/eval/return_mean"] == 20.0 and metrics["unpaid/eval/return_mean"] == -4.0
    assert metrics["eval/return_mean/car_*"] == 8.0


def test_an_episode_says_who_acted_by_which_policy_and_what_each_got() -> None:
    algorithm = MultiAgent({"left": PPO(**SMALL), "right": Random()})
    source = data(lambda: Rewards(2.0))
    fit(algorithm, source, limit_val_batches=0)
    (episode,) = play(source.env, algorithm.policy, [0])
    assert episode.returns is not None and episode.returns["right"] == 8.0  # of four steps
    assert episode.policies == {"left": "left", "right": "right"}
    assert episode.by_policy == {"left": [episode.returns["left"]], "right": [8.0]}
