"""Two learner processes: the gradients, weights and counts of one with all the data."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import ddp_off_policy
import ddp_script
import ddp_teams
import fake_ray
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from envs import counter_vector
from helpers import TESTS, CommandServer, make_runner, ragged

from lit_rl import MLP, LSTMNetwork, MultiAgent, load_policy
from lit_rl.envs.make import EnvConfig
from lit_rl.policy import Policy
from lit_rl.runners.gathering import to_rollout

pytestmark = [pytest.mark.ddp, pytest.mark.slow]
SCRIPT, OFF_POLICY = TESTS / "ddp_script.py", TESTS / "ddp_off_policy.py"


LENGTHS = {"whole": None, "ragged": [13, 6, 0, 1]}
SPLITS = {MLP: ["two", "uneven"], LSTMNetwork: ["two"]}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory, command_server: CommandServer) -> Path:
    """A rollout for each network and each kind of length, from which two ranks have learned."""
    out, runs = tmp_path_factory.mktemp("gradients"), []
    for network, splits in SPLITS.items():
        for kind, length in LENGTHS.items():
            config = EnvConfig(counter_vector, {"mode": "NextStep"}, vectorization="native")
            policy = Policy(config.spec(), network=network)
            fragment = make_runner(config, policy, 4, 16).sample()
            rollout = to_rollout([fragment if length is None else ragged(fragment, length)], copy=False)
            folder = f"{network.__name__}-{kind}"
            (out / folder).mkdir()
            torch.save(rollout.clone().to_dict(), out / folder / "rollout.pt")
            runs += [f"gradients:{folder}:{shares}:{network.__name__}:PPO" for shares in splits]
            runs += [f"gradients:{folder}:{splits[-1]}:{network.__name__}:{name}" for name in ("IMPALA", "APPO")]
    command_server.run_ranks(out, SCRIPT, out, *runs, "gradients:MLP-ragged:uneven:MLP:PPO:compile")
    return out


@pytest.mark.parametrize("kind", LENGTHS)
@pytest.mark.parametrize("network", SPLITS)
@pytest.mark.parametrize("name", ddp_script.ALGORITHMS)
def test_two_ranks_on_half_the_data_give_the_gradients_of_one_on_all_of_it(
    recorded: Path, name: str, network: type, kind: str
) -> None:
    folder = recorded / f"{network.__name__}-{kind}"
    mask = torch.load(folder / "rollout.pt", weights_only=True)["mask"]
    assert mask[:2].sum() != mask[2:].sum()  # the halves hold different numbers of real rows
    ddp_script.gradients(1, folder, "one", network.__name__, name)
    one = torch.load(folder / f"{name}-one-0.pt")
    for shares in SPLITS[network] if name == "PPO" else SPLITS[network][-1:]:
        first, second = (torch.load(folder / f"{name}-{shares}-{rank}.pt") for rank in (0, 1))
        assert one["env_steps"] == first["env_steps"] == 2 * int(mask.sum())
        for step in range(2):
            for a, b, c in zip(one["gradients"][step], first["gradients"][step], second["gradients"][step]):
                assert torch.isfinite(a).all() and torch.equal(b, c)
                torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)
        for key, value in one["weights"].items():  # normalisers too
            torch.testing.assert_close(value, first["weights"][key], atol=1e-5, rtol=1e-4)
    if (name, kind, network) == ("PPO", "ragged", MLP):
        compiled = torch.load(folder / "PPO-uneven-compiled-1.pt")
        assert not compiled["gradients"]  # that hook is not called
        for key, value in one["weights"].items():
            torch.testing.assert_close(value, compiled["weights"][key], atol=2e-4, rtol=1e-3)


@pytest.fixture(scope="module")
def without_ray(tmp_path_factory: pytest.TempPathFactory, command_server: CommandServer) -> tuple[Path, str]:
    """What two ranks without env runners leave: a short run, two that went on from one rank, one that diverged last."""
    out = tmp_path_factory.mktemp("two_ranks")
    for name in ddp_script.RESUMED:
        algorithm, data = ddp_script.small_run(name, 256)
        ddp_script.fit(algorithm, data, 1).save_checkpoint(out / f"{name}-1.ckpt")
        assert algorithm.env_steps_done == 256
    return out, command_server.run_ranks(out, SCRIPT, out, "process", "resume", "nan")


@pytest.fixture(scope="module")
def with_ray(tmp_path_factory: pytest.TempPathFactory, command_server: CommandServer) -> tuple[Path, str]:
    """The same with env runners: a short run, and runs that stream."""
    out = tmp_path_factory.mktemp("with_ray")
    return out, command_server.run_ranks(out, SCRIPT, out, "ray", "streams")


@pytest.mark.parametrize(
    ("case", "ranks"), [("process", "without_ray"), pytest.param("ray", "with_ray", marks=pytest.mark.ray)]
)
def test_two_ranks_train_with_own_environments_and_the_same_weights(
    case: str, ranks: str, request: pytest.FixtureRequest
) -> None:
    out, _ = request.getfixturevalue(ranks)
    first, second = (torch.load(out / f"train-{rank}.pt") for rank in (0, 1))
    for name, value in first["weights"].items():
        assert torch.isfinite(value).all() and torch.equal(value, second["weights"][name]), name
    assert not torch.equal(first["first"], second["first"])  # each rank has seeds of its own
    assert int(first["weights"]["env_steps"]) == 2048  # over both ranks
    steps = 8 * 2 * 4  # rollouts x epochs x minibatches
    if case == "process":  # with a target_kl
        assert 8 < first["global_step"] < steps
    else:
        assert first["global_step"] == steps
    assert first["global_step"] == second["global_step"]
    assert first["averaged"] == first["global_step"]  # by our own reduction, which does not sleep while it waits
    for name in ("rollout/return_mean", "eval/return_mean", "eval/episodes", "loss/value", "policy/kl"):
        assert first["metrics"][name] == second["metrics"][name]
    assert first["metrics"]["eval/episodes"] == 3
    checkpoint = torch.load(out / "ddp.ckpt", weights_only=True)
    assert len(checkpoint["lit_rl"]["ranks"]) == 2
    assert load_policy(out / "ddp.ckpt").act(np.zeros(4))[0] in (0, 1)


def test_a_run_goes_on_with_more_learner_processes_and_with_fewer(
    without_ray: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """RS2: one, then two, then one again."""
    out, printed = without_ray
    assert printed.count("the checkpoint is of 1 learner processes, this run has 2. The new ones begin") == 3
    for name in ddp_script.RESUMED:
        first, second = (torch.load(out / f"resumed-{name}-{rank}.pt") for rank in (0, 1))
        for key, value in first["weights"].items():
            assert torch.isfinite(value).all() and torch.equal(value, second["weights"][key]), key
        assert first["seed"] == second["seed"]
        assert [r["ledger"]["delivered"] for r in (first, second)] == [256 + 128, 128]
        assert int(first["weights"]["env_steps"]) == 512
        for one, other in zip(first["begun"], second["begun"], strict=True):
            assert not torch.equal(one["generator"], other["generator"])
            ours, theirs = one["algorithm"], other["algorithm"]
            if name != "DQN":  # what time lines left behind is a rank's own
                assert ours["running_return"] is not None and theirs["running_return"] is None
            if name == "MultiAgent":
                assert ours["critic_state"] is not None and theirs["critic_state"] is None
                assert ours["kl_coef"] == theirs["kl_coef"] != [0.5, 0.5]  # that of all ranks
        assert name != "DQN" or (first["rows"], second["rows"]) == (256 + 128, 128)
        assert first["metrics"]["eval/return_mean"] == second["metrics"]["eval/return_mean"]
        algorithm, data = ddp_script.small_run(name, 768)
        said: list[str] = []
        monkeypatch.setattr("lit_rl.algorithm.rank_zero_info", said.append)
        ddp_script.fit(algorithm, data, 1, ckpt_path=out / f"{name}-2.ckpt")
        assert any("is of 2 learner processes, this run has 1. The others' random numbers" in line for line in said)
        assert algorithm.env_steps_done == 768 == data.ledger.delivered  # those of the other process are not forgotten
        assert algorithm.updates_done > int(first["weights"]["updates"]) and data.seed == first["seed"]


def test_a_gradient_that_is_not_finite_on_one_rank_is_skipped_by_both(without_ray: tuple[Path, str]) -> None:
    out, _ = without_ray
    first, second = (torch.load(out / f"nan-{rank}.pt") for rank in (0, 1))
    for (weights, _, metrics), (others, _, _), skipped in zip(first["kept"], second["kept"], (1, 5)):
        for name, value in weights.items():
            assert torch.isfinite(value).all() and torch.equal(value, others[name]), name
        assert metrics["optim/skipped_updates"] == skipped and metrics["loss/value"].isfinite()
    assert [step for _, step, _ in first["kept"]] == [step for _, step, _ in second["kept"]] == [7, 11]
    assert "training has diverged" in first["error"] and "training has diverged" in second["error"]
    checkpoint = torch.load(out / "before_divergence.ckpt", weights_only=True)
    assert len(checkpoint["lit_rl"]["ranks"]) == 2
    for name, value in checkpoint["state_dict"].items():
        assert torch.isfinite(value).all()
        assert torch.equal(value, first["kept"][-1][0][name]) or name in ("env_steps", "updates"), name
    names = sorted(path.name for path in out.glob("nonfinite_batch_*"))
    assert names == [f"nonfinite_batch_{steps}_rank{rank}.pt" for steps in (0, 256) for rank in (0, 1)]


def test_a_signal_to_one_rank_ends_both_with_one_checkpoint(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, str(SCRIPT), str(tmp_path), "signal"], cwd=tmp_path, capture_output=True)
    assert done.returncode == 128 + signal.SIGTERM, done.stderr[-3000:]
    stats = [Path("/proc") / path.read_text() / "stat" for path in tmp_path.glob("pid-*")]
    end = time.monotonic() + 120
    while any(stat.exists() and stat.read_text().split()[2] != "Z" for stat in stats):
        assert time.monotonic() < end, "a learner process is left"
        time.sleep(0.1)
    checkpoint = torch.load(tmp_path / "interrupted.ckpt", weights_only=True)
    assert len(stats) == len(checkpoint["lit_rl"]["ranks"]) == 2
    assert int(checkpoint["state_dict"]["updates"]) == 3


@pytest.fixture(scope="module")
def off_policy(tmp_path_factory: pytest.TempPathFactory, command_server: CommandServer) -> Path:
    """Gradients, and what two ranks have after short runs."""
    out = tmp_path_factory.mktemp("off_policy")
    command_server.run_ranks(out, OFF_POLICY, out, "gradients", "Rainbow", "TQC", "SAC", "SAC,compile")
    return out


def test_every_off_policy_algorithm_has_the_same_gradients_on_two_ranks(off_policy: Path) -> None:
    """With memory the ranks hold different numbers of real rows."""
    ddp_off_policy.gradients(0, 1, off_policy)
    one, first, second = (torch.load(off_policy / f"off-policy-{ranks}.pt") for ranks in ("1-0", "2-0", "2-1"))
    assert len(one) > 100 and {name.split(",")[0] for name in one} == {*ddp_off_policy.CASES, "DreamerV3"}
    for name, gradient in one.items():
        assert torch.isfinite(gradient).all() and torch.equal(first[name], second[name]), name
        torch.testing.assert_close(gradient, first[name], atol=1e-6, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


def test_two_ranks_train_sac_by_compiled_steps_as_by_eager_ones(off_policy: Path) -> None:
    eager, compiled = (
        [torch.load(off_policy / f"train-{run}-{rank}.pt")["weights"] for rank in (0, 1)]
        for run in ("SAC", "SAC,compile")
    )
    for key, value in eager[0].items():
        assert torch.equal(compiled[0][key], compiled[1][key]), key
        torch.testing.assert_close(compiled[0][key], value, atol=2e-4, rtol=1e-3, msg=key)


@pytest.mark.parametrize("name", ["Rainbow", "TQC"])
def test_two_ranks_fill_buffers_of_their_own_and_keep_the_same_weights(off_policy: Path, name: str) -> None:
    first, second = (torch.load(off_policy / f"train-{name}-{rank}.pt") for rank in (0, 1))
    for key, value in first["weights"].items():
        assert torch.isfinite(value).all() and torch.equal(value, second["weights"][key]), key
    assert first["stored"] == second["stored"] == 200
    assert not torch.equal(first["obs"], second["obs"])
    assert int(first["weights"]["env_steps"]) == 400
    assert int(first["weights"]["updates"]) == 15  # a tenth of the 150 env steps that each rank took after the warm-up
    assert first["metrics"]["loss/value"] == second["metrics"]["loss/value"]
    for rank in (0, 1):
        assert list((off_policy / f"{name}.ckpt.d" / f"rank_{rank}").glob("*.pt"))


@pytest.mark.ray
def test_two_ranks_with_a_runner_each_learn_what_one_with_two_does(
    with_ray: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, _ = with_ray
    fake_ray.use(monkeypatch, 1.0)
    ddp_script.streamed(1, out)
    one, first, second = (torch.load(out / f"ahead-{name}.pt") for name in ("1-0", "2-0", "2-1"))
    assert int(one["env_steps"]) == 64 * 5 and int(one["updates"]) == 5
    for name, value in one.items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(value, first[name], atol=1e-5, rtol=1e-4, msg=name)
    # Free-running: the rank that has nothing in time joins without rows, and both take the same steps.
    ranks = [torch.load(out / f"free-{rank}.pt") for rank in (0, 1)]
    for name, value in ranks[0]["weights"].items():
        assert torch.equal(value, ranks[1]["weights"][name]), name
    slow, fast = sorted((rank["rows"] for rank in ranks), key=sum)
    assert len(slow) == len(fast) and slow[0] == fast[0] == 8 and slow.count(0) > 10 and fast.count(8) > 30
    delivered = sum(rank["ledger"]["delivered"] for rank in ranks)
    assert int(ranks[0]["weights"]["env_steps"]) == sum(slow) + sum(fast) == delivered <= 16 * 40


@pytest.fixture(scope="module")
def with_several_policies(tmp_path_factory: pytest.TempPathFactory, command_server: CommandServer) -> Path:
    """What two ranks have after runs with several policies."""
    out = tmp_path_factory.mktemp("several")
    command_server.run_ranks(out, TESTS / "ddp_multi_agent.py", out)
    return out


@pytest.mark.parametrize("name", ["on-policy", "mixed", "off-policy"])
def test_policies_that_appear_on_one_rank_and_for_a_while_neither_hang_nor_skew(
    with_several_policies: Path, name: str
) -> None:
    first, second = (torch.load(with_several_policies / f"{name}-{rank}.pt", weights_only=True) for rank in (0, 1))
    assert first["rows"] != second["rows"] and first["updates"] == second["updates"]
    assert first["loss"] == second["loss"] and len(first["loss"]) == {"on-policy": 6, "mixed": 4, "off-policy": 3}[name]
    for key, weight in first["weights"].items():
        assert weight.isfinite().all() and torch.equal(weight, second["weights"][key]), key
    if name == "on-policy":
        assert first["updates"] == dict.fromkeys(("one", "two", "three"), 12)
        return
    assert first["stored"]["two"] == first["stored"]["three"] == 0
    for policy_id in ("two", "three"):  # a quarter for each row that either rank took after the warm-up
        stored, done = second["stored"][policy_id], first["updates"][policy_id]
        assert 0.8 * stored / 8 < done + 64 / 8 < 1.2 * stored / 8


@pytest.fixture(scope="module")
def teams(tmp_path_factory: pytest.TempPathFactory, command_server: CommandServer) -> Path:
    """What two ranks have after runs with policies that share networks."""
    out = tmp_path_factory.mktemp("teams")
    ddp_teams.record(out)
    command_server.run_ranks(out, TESTS / "ddp_teams.py", out)
    return out


@pytest.mark.parametrize("case", ddp_teams.CASES)
def test_policies_that_share_networks_have_the_gradients_of_one_process_on_two_ranks(teams: Path, case: str) -> None:
    masks = [rollout["mask"] for rollout in torch.load(teams / "rollouts.pt", weights_only=True).values()]
    rows = [[int(mask[: len(mask) // 2].sum()), int(mask[len(mask) // 2 :].sum())] for mask in masks]
    (a, b), (c, d) = rows
    assert a * d != b * c  # each policy has another share of its rows on each rank
    ddp_teams.gradients(1, teams, "one", case)
    one = torch.load(teams / f"{case}-one-0.pt")
    assert len(one["gradients"]) == 2
    for shares in ("two", "uneven"):
        first, second = (torch.load(teams / f"{case}-{shares}-{rank}.pt") for rank in (0, 1))
        assert one["env_steps"] == first["env_steps"] == second["env_steps"] == 2 * 64
        for gradients in zip(*(found["gradients"] for found in (one, first, second)), strict=True):
            for x, y, z in zip(*gradients, strict=True):
                assert torch.isfinite(x).all() and torch.equal(y, z)
                torch.testing.assert_close(x, y, atol=1e-6, rtol=1e-4)
        for key, value in one["weights"].items():
            torch.testing.assert_close(value, first["weights"][key], atol=1e-5, rtol=1e-4)


@pytest.fixture(scope="module")
def come_and_go(tmp_path_factory: pytest.TempPathFactory, command_server: CommandServer) -> Path:
    """Runs on two ranks in which policies are added and removed."""
    out = tmp_path_factory.mktemp("come_and_go")
    command_server.run_ranks(out, TESTS / "ddp_membership.py", out)
    return out


@pytest.mark.parametrize("name", ["on-policy", "mixed", "off-policy"])
def test_two_ranks_stay_equal_while_policies_come_and_go(come_and_go: Path, name: str) -> None:
    first, second = (torch.load(come_and_go / f"{name}-{rank}.pt") for rank in (0, 1))
    assert not torch.equal(first["drawn"], second["drawn"])  # each rank gave the algorithm weights of its own
    assert first["ids"] == second["ids"] == ("one", "three", "past") and first["env_steps"] == 768
    for key, value in first["weights"].items():
        assert torch.isfinite(value).all() and torch.equal(value, second["weights"][key]), key
    assert first["updates"] == second["updates"] and first["updates"]["three"] > 5
    assert first["global_step"] == second["global_step"] and first["loss"] == second["loss"] != {}
    assert first["abandoned"] == second["abandoned"] == 2  # both copies of each rank
    assert MultiAgent.load_from_checkpoint(come_and_go / f"{name}.ckpt").ids == first["ids"]


def test_ranks_learn_from_equal_shares_of_recorded_data_and_judge_by_all_that_is_held_out(
    tmp_path: Path, command_server: CommandServer
) -> None:
    rows = np.arange(101)  # the last of each ten is not bootstrapped from: nothing is known of what comes after it
    table = {"row": rows, "zero": 0 * rows, "action": rows % 2, "reward": 0.0 * rows, "end": rows % 10 == 9}
    pq.write_table(pa.table(table), tmp_path / "data.parquet")
    command_server.run_ranks(tmp_path, TESTS / "ddp_offline.py", tmp_path, "memory")
    first, second = (torch.load(tmp_path / f"offline-{rank}.pt", weights_only=True) for rank in (0, 1))
    assert first["updates"] == second["updates"] == 30
    for name, weight in first["weights"].items():
        assert torch.equal(weight, second["weights"][name]) and torch.isfinite(weight).all()
    assert len(first["share"]) == len(second["share"]) >= 30
    shares = [set(one["seen"].int().tolist()) for one in (first, second)]
    assert not shares[0] & shares[1]
    assert all(share <= set(one["share"].tolist()) for share, one in zip(shares, (first, second)))
    held_out = torch.cat([first["judged"], second["judged"]])  # in three evaluations
    assert not set(held_out.int().tolist()) & (shares[0] | shares[1])
    for one in (first, second):
        assert one["metrics"]["eval/row"] == pytest.approx(float(held_out.unique().mean()))


@pytest.mark.ray
def test_ranks_stream_each_recorded_transition_once_in_an_epoch(tmp_path: Path, command_server: CommandServer) -> None:
    (tmp_path / "data").mkdir()
    for number in range(5):  # an odd number: each rank reads three files of one epoch, two of the next
        rows = 24 * number + np.arange(24)
        table = {"row": rows, "zero": 0 * rows, "action": rows % 2, "reward": 0.0 * rows, "end": rows % 6 == 5}
        pq.write_table(pa.table(table), tmp_path / "data" / f"{number}.parquet")
    command_server.run_ranks(tmp_path, TESTS / "ddp_offline.py", tmp_path, "stream")
    first, second = (torch.load(tmp_path / f"streamed-{rank}.pt", weights_only=True) for rank in (0, 1))
    assert first["updates"] == second["updates"] == 30
    for name, weight in first["weights"].items():
        assert torch.equal(weight, second["weights"][name]) and torch.isfinite(weight).all()
    assert len(first["seen"]) == len(second["seen"]) == 30 * 8  # four epochs of 120 rows
    ends = {0: [72, 120, 192, 240], 1: [48, 120, 168, 240]}  # of each epoch, in what each rank was given
    for epoch in range(4):
        parts = [one["seen"][([0] + ends[rank])[epoch] : ends[rank][epoch]] for rank, one in enumerate((first, second))]
        assert sorted(torch.cat(parts).int().tolist()) == list(range(120))
