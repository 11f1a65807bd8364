"""Runners that act by other policies from a fragment on: what is under way goes on, and nothing is lost unseen."""

import functools
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from agent_envs import MADE, LoggedAgents
from test_multi_agent_runner import logged, transitions

from lit_rl import EpisodeInfo, LSTMNetwork, Policy, Random
from lit_rl.envs.make import EnvConfig
from lit_rl.policy import PolicySet
from lit_rl.rollout import mask_of
from lit_rl.runners.fragment import Fragment
from lit_rl.runners.gathering import nothing_of, to_rollout, to_rollouts
from lit_rl.runners.ledger import Ledger
from lit_rl.runners.multi_agent_runner import MultiAgentEnvRunner
from lit_rl.spec import MultiAgentSpec

MEMORY = functools.partial(LSTMNetwork, hidden_size=4)


def config(mode: str = "random", **more: Any) -> EnvConfig:
    return EnvConfig(LoggedAgents, {"mode": mode, "num_agents": 3} | more)


def spec_of(env: EnvConfig) -> MultiAgentSpec:
    spec = env.try_out()
    assert isinstance(spec, MultiAgentSpec)
    return spec


SPEC = spec_of(config())


def policies(mapping: Any, numbers: Mapping[str, int], spec: MultiAgentSpec = SPEC, network: Any = MEMORY) -> PolicySet:
    """Policies that are always the same for the same numbers, all of which are trained."""
    made = {}
    for policy_id, number in numbers.items():
        torch.manual_seed(number)
        made[policy_id] = Policy(spec.shared(), network=network)
        with torch.no_grad():
            made[policy_id].head.weight.normal_()
    specs = dict.fromkeys(numbers, spec.shared())
    return PolicySet(spec, made, mapping, list(numbers), numbers=numbers, specs=specs)


def make(first: PolicySet, env: EnvConfig | None = None, length: int = 7, **options: Any) -> MultiAgentEnvRunner:
    MADE.clear()
    seed = np.random.SeedSequence(options.pop("seed", 0))
    sizes = {"num_envs": 4, "rollout_length": length, "new_seed": np.random.SeedSequence(9)}
    return MultiAgentEnvRunner(env or config(), first, seed=seed, **sizes | options)


def sample(runner: MultiAgentEnvRunner, times: int = 1) -> list[Fragment]:
    return [runner.sample() for _ in range(times)]


def rows(fragments: list[Fragment]) -> Counter[Any]:
    """The transitions of all policies."""
    found: Counter[Any] = Counter()
    for fragment in fragments:
        for policy_id in fragment.parts or ():
            found.update(transitions(to_rollout([fragment.of(policy_id)], copy=False)))
    return found


def same(ours: Fragment, theirs: Fragment, policy_id: str) -> bool:
    """Whether two fragments have the same real rows of a policy, bit for bit."""
    a, b = (to_rollout([fragment.of(policy_id)], copy=False) for fragment in (ours, theirs))
    real, theirs_real = mask_of(a), mask_of(b)
    assert real is not None and theirs_real is not None
    keys = ("observation", "action", "action_log_prob", "is_init", "policy_version", ("next", "reward"))
    return torch.equal(real, theirs_real) and all(torch.equal(a[key][real], b[key][real]) for key in keys)


AS_NAMED = {"a": "one", "b": "two", "c": "three"}


@pytest.mark.parametrize("mode", ["turns", "random", "once"])
def test_whoever_has_nothing_to_do_with_a_new_policy_goes_on_undisturbed(mode: str) -> None:
    """Open rows, memory, random numbers: "two" does what it would have done, also within the episodes under way."""
    before = {"one": 0, "two": 1}
    runner, twin = (make(policies({"b": "two", "*": "one"}, before), config(mode)) for _ in range(2))
    sample(runner, 3), sample(twin, 3)
    runner.follow(policies(AS_NAMED, before | {"three": 2}))
    seen = 0
    for _ in range(8):
        ours, theirs = runner.sample(), twin.sample()
        assert same(ours, theirs, "two") and ours.entry.abandoned == 0
        assert [e.return_ for e in ours.episodes] == [e.return_ for e in theirs.episodes]
        assert ours.parts is not None
        seen += int(ours.parts["three"].rows.views()["mask"].sum())
    assert seen > 10


def test_those_act_whose_weights_are_loaded() -> None:
    before = {"one": 0, "two": 1}
    runner = make(policies({"b": "two", "*": "one"}, before))
    sample(runner, 2)
    runner.follow(policies(AS_NAMED, before | {"three": 2}))
    runner.sample()  # of what is open at its end actions are of the weights before
    with torch.no_grad():
        for parameter in runner.policy.parameters():
            parameter.add_(0.1)
    runner.set_version(1)
    runner.sample()
    fragment = runner.sample()
    for policy_id, policy in runner.policy.learned.items():
        rollout = to_rollout([fragment.of(policy_id)], copy=True)
        real = rollout["mask"]
        with torch.no_grad():
            features, _ = policy.unroll(rollout["observation"], rollout["state"], rollout["is_init"])
            log_prob, _ = policy.evaluate(rollout, features)
        assert real.any()
        torch.testing.assert_close(log_prob[real], rollout["action_log_prob"][real])


@pytest.mark.parametrize("length", [1, 3, 16])
@pytest.mark.parametrize("mode", ["turns", "random", "together"])
def test_agents_keep_their_policies_until_their_episode_ends(mode: str, length: int) -> None:
    runner = make(policies({"*": "one"}, {"one": 0}), config(mode), length)
    fragments = sample(runner, 48 // length)
    lives = [env._lives for env in MADE]
    runner.follow(policies(AS_NAMED, {"one": 0, "two": 1, "three": 2}))
    assert [env._lives for env in MADE] == lives  # nobody was reset
    fragments += sample(runner, 96 // length)
    kept = Counter[int]()
    for fragment in fragments[48 // length :]:
        for policy_id, own in (("one", 0), ("two", 1), ("three", 2)):
            if has(fragment, policy_id):
                agents = {row.agent for row in transitions(to_rollout([fragment.of(policy_id)], copy=False))}
                kept.update(agents - {own} if policy_id == "one" else ())
                assert policy_id == "one" or agents <= {own}
    assert set(kept) == {1, 2} and rows(fragments) == logged()
    assert fragments[-1].parts is not None and fragments[-1].parts["one"].slots.tolist() == [0, 3, 6, 9]


def has(fragment: Fragment, policy_id: str) -> bool:
    return fragment.parts is not None and policy_id in fragment.parts


def sometimes(agent: str, info: EpisodeInfo) -> str:
    """ "two" takes part in one episode of three."""
    return "two" if agent == "b" and (info.seed or 0) % 3 == 0 else "one"


def test_copies_in_whose_episode_a_removed_policy_acts_begin_another_one_and_others_go_on() -> None:
    runner = make(policies(sometimes, {"one": 0, "two": 1}), length=5)
    fragments, found = sample(runner), Counter[bool]()
    for k in range(12):
        at = [(env._t, dict(env._life)) for env in MADE]
        acts = ["two" in (runner._cast.policies_of(b) or {}).values() for b in range(4)]
        numbers = {"one": 0} if k % 2 == 0 else {"one": 0, "two": 2 + k}
        runner.follow(policies("one" if k % 2 == 0 else sometimes, numbers))
        for env, before, affected in zip(MADE, at, acts):
            found[affected] += 1
            assert (env._t == 0) if affected else ((env._t, env._life) == before)
        fragments += sample(runner)
        assert fragments[-1].entry.abandoned == sum(acts)
    assert found[True] > 3 and found[False] > 20
    # What was complete is there once; what was under way in episodes that were broken off is in nobody's log.
    assert rows(fragments) == logged()
    ledger = Ledger()
    for fragment in fragments:
        ledger.deliver(0, 0, fragment.entry)
    assert ledger.executed == ledger.delivered == 13 * 20 and ledger.abandoned == found[True]
    assert ledger.agent_steps == rows(fragments).total()


def test_another_policy_of_the_same_id_is_another_policy() -> None:
    runner = make(policies(AS_NAMED, {"one": 0, "two": 1, "three": 2}))
    first = runner.sample()
    runner.follow(policies(AS_NAMED, {"one": 0, "two": 1, "three": 7}))
    second = runner.sample()
    assert first.has("three", 2) and second.has("three", 7) and not second.has("three", 2)
    assert second.entry.abandoned == 4  # "c" was there in each copy, or may come again
    assert second.parts is not None and second.parts["three"].rows.views()["is_init"][:, 0].any()


def test_a_policy_that_nobody_acts_by_any_more_has_no_part_and_comes_again() -> None:
    numbers = {"one": 0, "two": 1}
    runner = make(policies({"b": "two", "*": "one"}, numbers), config("together"))
    fragments = sample(runner, 2)
    runner.follow(policies("one", numbers))
    fragments += sample(runner, 4)
    assert not has(fragments[-1], "two") and has(fragments[2], "two")  # at first in the episodes under way
    runner.follow(policies({"b": "two", "*": "one"}, numbers))
    fragments += sample(runner, 4)
    assert has(fragments[-1], "two") and rows(fragments) == logged()
    assert sum(fragment.entry.abandoned for fragment in fragments) == 0


def test_agents_whose_ids_are_not_known_beforehand_keep_their_policies_too() -> None:
    env, numbers = config("cars"), {"one": 0, "two": 1}
    spec = spec_of(env)
    runner = make(policies("one", numbers, spec), env, 4)
    fragments = sample(runner, 2)
    runner.follow(policies("two", numbers, spec))
    fragments += sample(runner, 24)
    assert has(fragments[2], "one") and not has(fragments[-1], "one") and rows(fragments) == logged()


class Counts:
    """A script with a state of its own, which nobody else may begin again."""

    begun = 0

    def begin(self, spec: Any, rng: np.random.Generator) -> None:
        type(self).begun += 1
        self._calls = 0

    def act(self, obs: Any) -> int:
        self._calls += 1
        return self._calls % 3


def test_scripts_go_on_too() -> None:
    def acting(numbers: dict[str, int]) -> PolicySet:
        first = policies({"*": "one"}, {"one": 0}, network=None)
        parts = {"one": first.learned["one"], "script": Counts(), "random": Random(), "more": Random()}
        mapping = (
            {"b": "script", "c": "random", "*": "one"}
            if len(numbers) == 3
            else {"b": "script", "c": "more", "*": "one"}
        )
        specs = dict.fromkeys(numbers, SPEC.shared())
        return PolicySet(SPEC, {i: parts[i] for i in numbers}, mapping, ["one"], numbers=numbers, specs=specs)

    runner = make(acting({"one": 0, "script": 1, "random": 2}), config("together"))
    sample(runner, 2)
    script = runner.policy.script("script")
    calls = script._scripted._calls
    runner.follow(acting({"one": 0, "script": 1, "random": 2, "more": 3}))
    assert runner.policy.script("script") is script and calls > 20
    sample(runner)
    assert script._scripted._calls > calls


@pytest.mark.parametrize("mode", ["turns", "random"])
def test_a_runner_that_is_resumed_goes_on_as_one_that_was_not(mode: str) -> None:
    """Also while episodes from before the mapping changed are under way, whose agents keep their policies."""
    env, numbers = config(mode, forgets=True), {"one": 0, "two": 1, "three": 2}
    wider = 0
    for num_fragments in range(1, 6):
        runner = make(policies({"*": "one"}, {"one": 0}), env, 3, replayable=True)
        sample(runner, 4)
        runner.follow(policies(AS_NAMED, numbers))
        sample(runner, num_fragments - 1)
        state = runner.get_state()
        other = make(policies(AS_NAMED, numbers), env, 3, replayable=True, seed=5)
        assert other.set_state(state) == 0
        parts = [each.sample().parts for each in (runner, other)]
        wider += len(parts[0]["one"].slots) > 4
        for _ in range(6):
            for policy_id in numbers:
                ours, theirs = ((part or {}).get(policy_id) for part in parts)
                assert (ours is None) == (theirs is None)
                if ours is not None and theirs is not None:
                    assert ours.slots.tolist() == theirs.slots.tolist()
                    for name, column in ours.rows.views().items():
                        real = ours.rows.views()["mask"]
                        found = theirs.rows.views()[name]
                        assert (column[real] == found[real]).all() if column.shape[:2] == real.shape else True, name
            parts = [each.sample().parts for each in (runner, other)]
    assert wider


def test_a_runner_of_other_policies_than_the_checkpoints_begins_afresh() -> None:
    runner = make(policies({"*": "one"}, {"one": 0}), replayable=True)
    runner.sample()
    other = make(policies(AS_NAMED, {"one": 0, "two": 1, "three": 2}), replayable=True)
    assert other.set_state(runner.get_state()) == 4
    other.sample()


# --- what the learner makes of it -------------------------------------------------------------------------------------


def test_fragments_of_before_and_after_a_change_make_one_rollout_for_each_policy() -> None:
    before, after = {"one": 0, "two": 1}, {"one": 0, "two": 5, "three": 2}
    old = make(policies({"b": "two", "*": "one"}, before)).sample()
    new = make(policies(AS_NAMED, after), seed=1).sample()
    found = to_rollouts([old, new], policies(AS_NAMED, after), list(after), 3, copy=True)
    assert list(found) == list(after) and found.numbers == after
    assert len(found["one"]) == 8 + 4 and len(found["two"]) == 4 and len(found["three"]) == 4
    assert transitions(found["two"]) == transitions(to_rollout([new.of("two")], copy=True))  # not those of number 1
    assert {rollout.env_steps for rollout in found.values()} == {2 * 28}
    found = to_rollouts([old], policies(AS_NAMED, after), list(after), 3, copy=True)
    assert not transitions(found["three"]) and found["three"].env_steps == 28
    assert set(found["three"].keys(True, True)) == set(found["one"].keys(True, True))
    marked = to_rollouts([old, new, new], policies(AS_NAMED, after), list(after), 3, copy=True, num_new=2)
    assert marked["one"]["is_new"].tolist() == [True] * 12 + [False] * 4
    assert marked["three"]["is_new"].tolist() == [True] * 4 + [False] * 4


@pytest.mark.parametrize("network", [None, MEMORY])
def test_nothing_has_the_form_of_something(network: Any) -> None:
    something = make(policies(AS_NAMED, {"one": 0, "two": 1, "three": 2}, network=network)).sample().of("one")
    nothing = nothing_of(Policy(SPEC.shared(), network=network), 3)
    ours, theirs = ({**f.rows.views(), **f.finals.views()} for f in (nothing, something))
    assert ours.keys() == theirs.keys()
    assert {name: x.dtype for name, x in ours.items()} == {name: x.dtype for name, x in theirs.items()}
    assert not ours["mask"].any() and ours["length"].tolist() == [0]
