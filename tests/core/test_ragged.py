"""Time lines of different lengths: what follows a row's last step is not looked at, by anything."""

import functools
from collections.abc import Callable
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from envs import CounterEnv, SampleEnv
from gymnasium import spaces
from helpers import make_runner, ragged
from tensordict import TensorDict
from torch import Tensor, nn

from lit_rl import APPO, IMPALA, MLP, PPO, GRUNetwork, LSTMNetwork, Policy, RolloutDataModule
from lit_rl.distributed import masked_mean, standardize
from lit_rl.envs.make import EnvConfig
from lit_rl.normalizer import ReturnNormalizer
from lit_rl.replay import ReplayBuffer
from lit_rl.returns import discounted_sum, gae, running_return
from lit_rl.rollout import (
    Rollout,
    length_of,
    mask_of,
    next_observation,
    next_values,
    next_values_with_memory,
    power_of_2,
    rows,
    sequences,
    states_before,
)
from lit_rl.runners.fragment import Fragment
from lit_rl.runners.gathering import padded, to_rollout
from lit_rl.runners.transport import pack
from lit_rl.trees import iterate, map_tree, nest

F, T, NAN = False, True, float("nan")
COUNTER = EnvConfig(CounterEnv)
SAMPLE = EnvConfig(
    SampleEnv, {"observation_space": spaces.Box(-1, 1, (3,)), "action_space": spaces.Discrete(3)}
)  # fmt: skip
LENGTHS = [7, 16, 0, 1]


# --- returns ----------------------------------------------------------------------------------------------------------

# gamma = lambda = 1/2, so delta_t = r_t + next_value_t / 2 - value_t and A_t = delta_t + A_{t+1} / 4.
TABLE = {
    # rewards, values, next values, terminated, done, advantages
    # delta = 1 + 1 - 1 = 1, 2 + 8/2 - 2 = 4: cut after two steps, whose next value is 8;  A = 1 + 4/4, 4
    "two steps": ([1, 2], [1, 2], [2, 8], [F, F], [F, F], [2.0, 4.0]),
    # delta = 1, 2 + 0 - 2 = 0, 4 + 1/2 - 3 = 1.5, 1 + 4/2 - 1 = 2;  A = 1 + 0, 0, 1.5 + 2/4, 2
    "terminated in the middle": ([1, 2, 4, 1], [1, 2, 3, 1], [2, 6, 1, 4], [F, T, F, F], [F, T, F, F], [1, 0, 2, 2]),
    # A = delta: 3 + 4/2 - 1
    "one step": ([3], [1], [4], [F], [F], [4.0]),
    "no step": ([], [], [], [], [], []),
    # delta = 1 + 6/2 - 1 = 3, 2 + 3/2 - 2 = 1.5, 4 + 0 - 3 = 1;  A = 3, 1.5 + 1/4, 1
    "truncated in the first step, terminated in the last": (
        [1, 2, 4], [1, 2, 3], [6, 3, 9], [F, F, T], [T, F, T], [3, 1.75, 1],
    ),
}  # fmt: skip


def filled(column: int, filling: Any) -> Tensor:
    """A column of the table, [B, T]."""
    return torch.tensor([[*case[column], *[filling] * (4 - len(case[0]))] for case in TABLE.values()])


@pytest.mark.parametrize("rubbish", [NAN, 99.0])
@pytest.mark.parametrize("flag", [F, T])
def test_gae_equals_the_ragged_table_worked_by_hand(rubbish: float, flag: bool) -> None:
    length = torch.tensor([len(case[0]) for case in TABLE.values()])
    reward, value, next_value = (filled(column, rubbish) for column in range(3))
    terminated, done = filled(3, flag), filled(4, flag)
    advantage, target = gae(reward, terminated, done, value, next_value, gamma=0.5, lambda_=0.5, length=length)
    torch.testing.assert_close(advantage, filled(5, 0.0))
    torch.testing.assert_close(target, filled(5, 0.0) + filled(1, 0.0))


@pytest.mark.parametrize("seed", range(3))
def test_ragged_gae_equals_torchrl_row_by_row(seed: int) -> None:
    from torchrl.objectives.value.functional import generalized_advantage_estimate

    draw = torch.Generator().manual_seed(seed)
    reward, value, next_value = torch.randn(3, 6, 12, dtype=torch.float64, generator=draw)
    terminated, truncated = torch.rand(2, 6, 12, generator=draw) < 0.2
    done, length = terminated | truncated, torch.tensor([12, 1, 0, 5, 8, 11])
    behind = torch.arange(12) >= length[:, None]
    columns = [value.masked_fill(behind, NAN), next_value.masked_fill(behind, NAN), reward.masked_fill(behind, NAN)]
    ours = gae(columns[2], terminated, done, *columns[:2], gamma=0.97, lambda_=0.9, length=length)
    for b, n in enumerate(length.tolist()):
        assert not any(x[b, n:].any() for x in ours)
        if n:
            parts = (x[b : b + 1, :n, None] for x in (value, next_value, reward, done, terminated))
            theirs = generalized_advantage_estimate(0.97, 0.9, *parts)
            for x, y in zip(ours, theirs):
                torch.testing.assert_close(x[b, :n], y[0, :, 0], atol=1e-6, rtol=1e-6)


def test_discounted_sums_end_with_their_row() -> None:
    found = discounted_sum(torch.ones(3, 3), torch.full((3, 3), 0.5), torch.tensor([3, 1, 0]))
    assert found.tolist() == [[1.75, 1.5, 1.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]


def test_running_returns_are_carried_on_from_the_last_step_of_each_row() -> None:
    reward = torch.tensor([[1.0, 2.0, NAN], [NAN, NAN, NAN], [1.0, 2.0, 4.0], [5.0, 3.0, 9.0]])
    done = torch.tensor([[F, F, T], [T, T, T], [F, T, F], [F, T, F]])
    sums, carry = running_return(
        reward, done, gamma=0.5, initial=torch.tensor([8.0, 4.0, 0.0, 0.0]), length=torch.tensor([2, 0, 3, 2])
    )
    # 1 + 8, 2 + 9/2, carried on: 6.5/2;  nothing: 4 stays;  1, 2 + 1/2 ends, 4, carried on: 4/2;  5, 3 + 5/2 ends
    assert carry.tolist() == [3.25, 4.0, 2.0, 0.0]
    assert (
        sums[0, :2].tolist() == [9.0, 6.5] and sums[2].tolist() == [1.0, 2.5, 4.0] and sums[3, :2].tolist() == [5, 5.5]
    )


def test_returns_in_ragged_pieces_are_scaled_as_in_one() -> None:
    """What is true of the moments is true of all rewards at the end."""
    draw = torch.Generator().manual_seed(0)
    reward, done = torch.randn(3, 8, generator=draw), torch.rand(3, 8, generator=draw) < 0.3
    whole, apart = ReturnNormalizer(0.9), ReturnNormalizer(0.9)
    whole.scale(reward, done)
    for begin, end in (([0, 0, 0], [8, 3, 0]), ([8, 3, 0], [8, 4, 5]), ([8, 4, 5], [8, 8, 8])):
        length = torch.tensor(end) - torch.tensor(begin)
        mask, part, ends = torch.arange(8) < length[:, None], torch.full((3, 8), NAN), torch.ones(3, 8) == 1
        for b in range(3):
            part[b, : length[b]], ends[b, : length[b]] = reward[b, begin[b] : end[b]], done[b, begin[b] : end[b]]
        scaled = apart.scale(part, ends, mask, length=length)
        assert scaled[mask].isfinite().all()
    assert int(apart.count) == int(whole.count) == 24
    torch.testing.assert_close(apart.running_return, whole.running_return)
    torch.testing.assert_close(apart.var, whole.var)


def test_means_do_not_see_what_is_masked() -> None:
    x, mask = torch.tensor([1.0, NAN], requires_grad=True), torch.tensor([T, F])
    mean = masked_mean(x, mask)
    mean.backward()
    assert mean == 1 and x.grad.tolist() == [1.0, 0.0]
    assert standardize(torch.tensor([1.0, NAN, 3.0]), torch.tensor([T, F, T]))[[0, 2]].isfinite().all()


# --- values and rows --------------------------------------------------------------------------------------------------


def fragment_of(env: EnvConfig, network: Any = None, length: int = 16, num_envs: int = 4, **options: Any) -> Fragment:
    torch.manual_seed(0)
    policy = Policy(env.spec(), network=network)
    runner = make_runner(env, policy, num_envs, length, **options)
    runner.sample()  # the next one begins inside of episodes
    return runner.sample()


def rollouts(env: EnvConfig = COUNTER, length: list[int] = LENGTHS, **options: Any) -> tuple[Rollout, Rollout]:
    """One whole, and the same with padding."""
    fragment = fragment_of(env, **options)
    return to_rollout([fragment], copy=True), to_rollout([ragged(fragment, length)], copy=True)


def of_counter(obs: Tensor) -> Tensor:
    """A critic whose value is the observation, and which is given no rubbish."""
    assert obs.isfinite().all() and len(obs)
    return obs.squeeze(-1)


def test_values_are_those_of_real_rows_alone() -> None:
    whole, cut = rollouts()
    real = mask_of(cut)
    assert real.sum(1).tolist() == LENGTHS == length_of(cut).tolist() and cut.env_steps == 24
    for found, expected in zip(next_values(cut, of_counter), next_values(whole, of_counter)):
        assert torch.equal(found, torch.where(real, expected, 0.0))
    assert torch.equal(next_observation(cut)[real], next_observation(whole)[real])
    assert whole["next", "done"][real].sum() > 3
    empty = cut[2:3]
    assert [value.tolist() for value in next_values(empty, of_counter)] == [[[0.0] * 16]] * 2


def test_rows_are_the_real_ones() -> None:
    whole, cut = rollouts()
    real = mask_of(cut)
    found = rows(cut, "observation", "action", "mask", "advantage")
    assert set(found.keys()) == {"observation", "action", "mask"} and found["mask"].all()
    assert torch.equal(found["observation"], whole["observation"][real])
    assert "mask" not in rows(whole, "action", "mask").keys()  # noqa: SIM118
    del cut["mask"]
    assert torch.equal(mask_of(cut), real) and torch.equal(rows(cut, "mask")["mask"], found["mask"])
    nothing = rows(padded(whole, 5, masked=True)[4:], "observation", "mask")
    assert nothing["mask"].tolist() == [False] and nothing["observation"].isfinite().all()


def test_fragments_with_and_without_padding_make_one_rollout() -> None:
    fragment = fragment_of(COUNTER)
    cut = ragged(fragment, LENGTHS)
    bare = cut._replace(rows=pack({path: x for path, x in cut.rows.views().items() if path != "mask"}))
    rollout = to_rollout([fragment, cut, bare], copy=True)
    assert rollout["length"].tolist() == rollout["mask"].sum(1).tolist() == [16] * 4 + LENGTHS + LENGTHS


@pytest.mark.parametrize("start", [1, 10])
def test_final_observations_of_a_space_without_0_are_evaluated(
    make_trainer: Callable[..., L.Trainer], start: int
) -> None:
    """D2: environments ended different numbers of episodes, and padding is zeros."""
    env_kwargs = {"observation_space": spaces.Discrete(5, start=start), "action_space": spaces.Discrete(3)}
    data = RolloutDataModule(SampleEnv, env_kwargs=env_kwargs, rollout_length=13, max_env_steps=13 * 8, seed=0)
    algorithm = PPO(minibatch_size=16)
    make_trainer(limit_val_batches=0).fit(algorithm, data)
    assert algorithm.updates_done == 1
    rollout = to_rollout([fragment_of(EnvConfig(SampleEnv, env_kwargs))], copy=True)
    value, _ = next_values(padded(rollout, 6, masked=True), algorithm.value)
    assert not value[4:].any()


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("network", [LSTMNetwork, GRUNetwork])
def test_unrolling_a_ragged_rollout_equals_stepping_through_each_of_its_rows(network: Any) -> None:
    _, cut = rollouts(SAMPLE, network=network)
    torch.manual_seed(0)
    policy, head = Policy(SAMPLE.spec(), network=network), nn.Linear(64, 1)
    expected, following = torch.zeros(2, 4, 16)

    def unroll(obs: Tensor, state: Any, is_init: Tensor) -> Any:
        assert obs.isfinite().all()  # also for the time line that has no step
        return policy.unroll(obs, state, is_init)

    with torch.no_grad():
        value, next_value, states, ends = next_values_with_memory(cut, unroll, lambda x: head(x).squeeze(-1))
        for b, length in enumerate(LENGTHS):
            state = map_tree(lambda x, b=b: x[b : b + 1], cut["state"])
            start = map_tree(torch.from_numpy, policy.initial_state(1))
            for t in range(length):
                for name in state:
                    torch.testing.assert_close(states[name][b, t], state[name][0])
                state = start if cut["is_init"][b, t] else state
                features, state = policy.encoder(cut["observation"][b, t : t + 1], state)
                expected[b, t] = head(features)
                after = cut["last_observation"][b] if t == length - 1 else cut["observation"][b, t + 1]
                final = (cut["final_step"][b] == t).nonzero()
                after = cut["final_observation"][b, final[0, 0]] if len(final) else after
                following[b, t] = head(policy.encoder(after[None], state)[0])
            for name in state if length else ():
                torch.testing.assert_close(ends[name][b], state[name][0])
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(next_value[mask_of(cut)], following[mask_of(cut)])
    assert next_value[mask_of(cut)].unique().numel() > 20


def test_sequences_leave_out_pieces_of_padding() -> None:
    whole, cut = rollouts(SAMPLE, network=LSTMNetwork)
    policy = Policy(SAMPLE.spec(), network=LSTMNetwork)
    with torch.no_grad():
        states, whole_states = ({"state": states_before(x, policy.unroll)} for x in (cut, whole))
    found = sequences(cut, states, 4, 2, "observation", "action", "mask")
    expected = sequences(whole, whole_states, 4, 2, "observation", "action", "mask")
    kept = torch.tensor([0, 1, 4, 5, 6, 7, 12])  # of row 0, which has 7 steps, row 1 and row 3, which has 1
    assert found["mask"].sum(1).tolist() == [4, 3, 4, 4, 4, 4, 1] and not found["is_init"][~found["mask"]].any()
    assert found["action"].max() < 3
    with torch.no_grad():
        features, same = policy.features(found), policy.features(expected[kept])
    assert features.isfinite().all()
    torch.testing.assert_close(features[found["mask"]], same[found["mask"]])


# --- algorithms -------------------------------------------------------------------------------------------------------


class Keeps:
    """An algorithm that keeps its minibatches and its gradients in place of stepping."""

    def gradient_step(self, batch: TensorDict) -> tuple[bool, Any]:
        self.seen = [*getattr(self, "seen", []), batch]
        return super().gradient_step(batch)

    def optimize(self, loss: Tensor, optimizer: object = None) -> bool:
        self.zero_grad()
        loss.backward()
        self.gradients = [p.grad.clone() for p in self.parameters() if p.grad is not None]
        return True


def bare(network: Any, cls: type = PPO, **options: Any) -> Any:
    torch.manual_seed(0)
    algorithm = type("Bare", (Keeps, cls), {})(
        **{"network": network, "normalize_observations": True, "normalize_returns": True, "entropy_coef": 0.1} | options
    )
    algorithm.build(SAMPLE.spec())
    return algorithm


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (PPO, {"minibatch_size": 32, "num_epochs": 1, "sequence_length": 4}),
        (IMPALA, {"normalize_advantage": True}),
        (IMPALA, {"vtrace": False, "lambda_": 0.8}),
        (APPO, {"kl_coef": 0.3}),
    ],
    ids=["PPO", "IMPALA", "IMPALA, by GAE", "APPO"],
)
@pytest.mark.parametrize("network", [MLP, functools.partial(LSTMNetwork, hidden_size=6)], ids=["MLP", "LSTM"])
def test_padding_changes_no_gradient_no_statistic_and_no_metric(network: Any, cls: Any, options: Any) -> None:
    short = to_rollout([fragment_of(SAMPLE, network=network, length=8)], copy=True)
    columns: dict[str, Tensor] = {}
    for path, x in iterate(short.to_dict()):  # with 8 steps of padding each, and a time line without any step
        shape = (5, 16, *x.shape[2:]) if x.shape[:2] == (4, 8) else (5, *x.shape[1:])
        columns[path] = torch.full(shape, NAN if x.is_floating_point() else 77).to(x.dtype)
        columns[path][(slice(4), *map(slice, x.shape[1:]))] = x
    columns["final_step"][4] = -1
    columns["length"] = torch.tensor([8, 8, 8, 8, 0])
    long = Rollout(nest(columns), [5])
    ours, theirs = bare(network, cls, **options), bare(network, cls, **options)
    for algorithm in (ours, theirs):  # the policy has moved on
        algorithm.policy.head.bias.data += torch.tensor([0.0, 0.5, 1.0])
    metrics, expected = ours.update(long), theirs.update(short)
    for a, b in zip(ours.gradients, theirs.gradients):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)
    for name, value in expected.items():
        torch.testing.assert_close(torch.as_tensor(metrics[name]), torch.as_tensor(value), msg=name)
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, msg=name)
    if cls is not PPO:
        return
    carried = ours.return_normalizer.running_return
    assert carried[:4].all()  # inside of episodes
    torch.testing.assert_close(carried[:4], theirs.return_normalizer.running_return)


@pytest.mark.parametrize("cls", [IMPALA, APPO])
def test_compiled_time_lines_are_padded_to_powers_of_two_which_changes_no_gradient(cls: Any) -> None:
    rollout = to_rollout([ragged(fragment_of(SAMPLE, length=13, num_envs=5), [7, 13, 0, 1, 9])], copy=True)
    eager, compiled = bare(MLP, cls, normalize_advantage=True), bare(MLP, cls, normalize_advantage=True, compile=True)
    metrics, expected = compiled.update(rollout), eager.update(rollout)
    assert compiled.seen[0]["mask"].shape == (8, 16) and compiled.seen[0]["mask"].sum() == 30
    assert eager.seen[0]["mask"].shape == (5, 13)
    for a, b in zip(compiled.gradients, eager.gradients):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)
    for name, value in expected.items():
        torch.testing.assert_close(torch.as_tensor(metrics[name]), torch.as_tensor(value), msg=name)
    assert [power_of_2(n) for n in (1, 2, 3, 4, 5, 9, 64)] == [1, 2, 4, 4, 8, 16, 64]


@pytest.mark.parametrize("cls", [IMPALA, APPO])
@pytest.mark.parametrize("lengths", [[7, 16, 0, 3], [4, 2, 1, 3], [3, 2, 1, 0]])
def test_burn_in_of_ragged_time_lines_is_that_of_each_by_itself(cls: Any, lengths: list[int]) -> None:
    network = functools.partial(LSTMNetwork, hidden_size=6)
    fragment = fragment_of(SAMPLE, network=network)
    whole, cut = to_rollout([fragment], copy=True), to_rollout([ragged(fragment, lengths)], copy=True)
    algorithm = bare(network, cls, burn_in=3, normalize_returns=False)
    algorithm.update(first_steps(cut, max(lengths)))
    expected, num_rows = [torch.zeros_like(x) for x in algorithm.gradients], sum(max(0, n - 3) for n in lengths)
    for b, n in enumerate(lengths):
        if n > 3:
            alone = bare(network, cls, burn_in=3, normalize_returns=False)
            line = first_steps(whole[b : b + 1], n)
            if n < 16:
                line["last_observation"] = whole["observation"][b : b + 1, n]
            line["final_step"] = torch.where(line["final_step"] < n, line["final_step"], -1)
            alone.update(line)
            expected = [x + (n - 3) / num_rows * y for x, y in zip(expected, alone.gradients)]
    assert any(x.any() for x in expected) == (num_rows > 0)
    for found, gradient in zip(algorithm.gradients, expected):
        torch.testing.assert_close(found, gradient, atol=1e-6, rtol=1e-4)


def first_steps(rollout: Rollout, num: int) -> Rollout:
    """A rollout of 16 steps without those that follow the first `num`."""
    columns = {path: x[:, :num] if x.shape[1:2] == (16,) else x for path, x in iterate(rollout.to_dict())}
    return Rollout(nest(columns), [len(rollout)])


@pytest.mark.parametrize("network", [MLP, functools.partial(LSTMNetwork, hidden_size=6)], ids=["MLP", "LSTM"])
@pytest.mark.parametrize("others", [0, 5])
def test_minibatches_of_masked_rollouts_have_one_size_and_equal_numbers_on_every_rank(
    monkeypatch: pytest.MonkeyPatch, network: Any, others: int
) -> None:
    asked: list[list[int]] = []
    monkeypatch.setattr(
        "lit_rl.modules.ppo.greatest", lambda mine, _: asked.append(mine) or [max(n, others) for n in mine]
    )
    _, cut = rollouts(SAMPLE, network=network)
    algorithm = bare(network, minibatch_size=16, num_epochs=3, sequence_length=4)
    algorithm.update(cut)
    memory = algorithm.policy.has_memory
    units, size = (7, 4) if memory else (24, 16)  # 24 real rows, or 7 pieces of 4 steps with some
    assert asked == [[2]]
    per_pass = max(2, others)
    assert len(algorithm.seen) == 3 * per_pass
    for k in range(3):
        seen = torch.cat([x.select("observation", "mask", "action") for x in algorithm.seen[k * per_pass :][:per_pass]])
        assert len(seen) == per_pass * size
        assert seen["observation"].isfinite().all() and seen["action"].max() < 3
        assert seen["mask"].sum() == 24  # each real row once
        assert not seen["mask"][units:].any()
        found = seen["observation"][seen["mask"]].sort(0).values
        assert torch.equal(found, cut["observation"][mask_of(cut)].sort(0).values)
    assert all(g.isfinite().all() for g in algorithm.gradients)


def test_minibatches_without_a_mask_are_slices_of_all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lit_rl.modules.ppo.greatest", None)  # nobody is asked
    whole, _ = rollouts(SAMPLE)
    algorithm = bare(MLP, minibatch_size=24, num_epochs=1)
    algorithm.update(whole)
    assert [len(x) for x in algorithm.seen] == [24, 24, 16]
    assert not any("mask" in x.keys() for x in algorithm.seen)  # noqa: SIM118
    order = torch.randperm(64, generator=bare(MLP, minibatch_size=24).generator)
    assert torch.equal(torch.cat([x["observation"] for x in algorithm.seen]), whole["observation"].flatten(0, 1)[order])


# --- replay -----------------------------------------------------------------------------------------------------------


def replay(**options: Any) -> ReplayBuffer:
    return ReplayBuffer(COUNTER.spec(), 1000, seed=np.random.SeedSequence(0), **options)


def test_replay_of_ragged_fragments_equals_the_table_worked_by_hand() -> None:
    """Two fragments of three environments, T = 3.

    Environment 0: observations 0, 1 | 2, 3 (terminated, final 4), 50;  1: nothing | 100, 101 (truncated, final 102),
    150;  2: 200 (truncated, final 201) | nothing, the next episode begins at 250 and has no step yet.
    """
    first = {
        "observation": [[0, 1, NAN], [NAN, NAN, NAN], [200, NAN, NAN]], "last_observation": [2, NAN, 250],
        "final_observation": [[NAN], [NAN], [201]], "final_step": [[-1], [-1], [0]], "length": [2, 0, 1],
        "terminated": [[F, F, T], [T, T, T], [F, T, T]], "truncated": [[F, F, T], [T, T, T], [T, T, T]],
        "is_init": [[T, F, T], [T, T, T], [T, T, T]], "reward": [[1, 2, NAN], [NAN] * 3, [7, NAN, NAN]],
    }  # fmt: skip
    second = {
        "observation": [[2, 3, 50], [100, 101, 150], [NAN] * 3], "last_observation": [51, 151, NAN],
        "final_observation": [[4], [102], [NAN]], "final_step": [[1], [1], [-1]], "length": [3, 3, 0],
        "terminated": [[F, T, F], [F, F, F], [T, T, T]], "truncated": [[F, F, F], [F, T, F], [T, T, T]],
        "is_init": [[F, F, T], [T, F, T], [T, T, T]], "reward": [[4, 8, 16], [1, 2, 4], [NAN] * 3],
    }  # fmt: skip
    buffer = replay()
    for fragment, real in ((first, 3), (second, 6)):
        arrays = {name: np.array(x) for name, x in fragment.items()}
        for name in ("observation", "last_observation", "final_observation"):
            arrays[name] = arrays[name].astype(np.float32)[..., None]
        arrays["action"] = np.full((3, 3), 77)
        arrays["mask"] = np.arange(3) < arrays["length"][:, None]
        assert buffer.extend(arrays, range(3)) == real
    # First observation, the one after up to three steps, their discounted sum with gamma 1/2, whether terminated.
    expected = {
        (0, 3, 1 + 2 / 2 + 4 / 4, F), (1, 4, 2 + 4 / 2 + 8 / 4, T), (2, 4, 4 + 8 / 2, T), (3, 4, 8, T), (50, 51, 16, F),
        (100, 102, 1 + 2 / 2, F), (101, 102, 2, F), (150, 151, 4, F), (200, 201, 7, F),
    }  # fmt: skip
    batch = buffer.sample(500, gamma=0.5, num_steps=(3, 3))
    parts = (
        batch["observation"][:, 0],
        batch["next", "observation"][:, 0],
        *(batch["next"][k] for k in ("reward", "terminated")),
    )
    assert set(zip(*(x.tolist() for x in parts))) == expected and len(buffer) == 9
    # One row for each observation: 0 to 3, 4, 50, 51; 100, 101, 102, 150, 151; 200, 201, 250. No chain is begun twice.
    assert buffer._written == 15


@pytest.mark.parametrize("network", [None, LSTMNetwork])
def test_replay_of_time_lines_in_ragged_pieces_is_that_of_whole_ones(network: Any) -> None:
    torch.manual_seed(0)
    policy = Policy(COUNTER.spec(), network=network)
    state = dict(iterate(policy.initial_state(1), "state")) if network else None
    runner = make_runner(COUNTER, policy, 3, 8, keep_states=True)
    whole, apart = replay(state=state), replay(state=state)
    for _ in range(6):
        fragment = runner.sample()
        assert whole.extend(fragment.rows.views() | fragment.finals.views(), range(3)) == 24
        pieces = [
            ragged(fragment, [8, 3, 0]),
            ragged(fragment, [8, 4, 5], [8, 3, 0]),
            ragged(fragment, [8] * 3, [8, 4, 5]),
        ]
        added = [apart.extend(piece.rows.views() | piece.finals.views(), range(3)) for piece in pieces]
        assert added == [11, 6, 7]
    assert len(whole) == len(apart) == 144 and whole._written == apart._written

    def drawn(buffer: ReplayBuffer) -> set[tuple[float, ...]]:
        if network is None:
            batch = buffer.sample(5000, gamma=0.5, num_steps=(4, 4))
            columns = [batch["observation"], batch["next", "observation"], batch["next", "reward"], batch["discount"]]
        else:
            batch = buffer.sample_sequences(5000, length=4, burn_in=2, gamma=0.5)
            columns = [batch[key] for key in ("observation", "mask", "last_observation", ("burn_in", "observation"))]
            columns += [batch["state", "h"][:, :2], batch["burn_in", "real"], batch["next", "reward"]]
        return set(map(tuple, torch.cat([x.float().reshape(5000, -1) for x in columns], 1).tolist()))

    assert drawn(whole) == drawn(apart)
