"""Several nodes: env runners spread over them, learners by Ray Train and by torchrun, and some of them lost."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
from cluster_script import DQN, TINY
from helpers import TESTS, CommandServer

from lit_rl import cli
from lit_rl.cli.cluster import Cluster
from lit_rl.errors import OptionError


def run_on_nodes(command_server: CommandServer, case: str, folder: Path) -> str:
    """Run a case of cluster_script.py in `folder`; nothing of its Ray may be left. Returns what it printed."""
    environment = {"RAY_AUTH_MODE": "token", "STEPS_FOLDER": str(folder / "steps")}
    printed = command_server.run_script(folder, TESTS / "cluster_script.py", case, **environment)
    session = Path("session.txt").read_text()
    left = [p.info["cmdline"] for p in psutil.process_iter(["cmdline"]) if session in " ".join(p.info["cmdline"] or ())]
    assert left == []
    return printed


def check_ranks_are_equal(env_steps: int) -> None:
    first, second = (torch.load(f"weights-{rank}.pt") for rank in (0, 1))
    for name, value in first.items():
        assert torch.isfinite(value).all() and torch.equal(value, second[name]), name
    assert int(first["env_steps"]) == env_steps


@pytest.mark.slow
@pytest.mark.ray
def test_runners_spread_over_nodes_and_a_lost_node_costs_what_the_ledger_says(
    tmp_path: Path, command_server: CommandServer
) -> None:
    run_on_nodes(command_server, "runners_spread_and_a_node_lost", tmp_path)
    found = json.loads(Path("found.json").read_text())
    before, after, end = found["homes"]
    assert before[0] != before[1]
    assert after == [before[1]]  # training went on with one
    assert end == [before[1]] * 2
    assert found["delivered"] == found["env_steps"]
    # "unread": its fragment had come to an end; "died": it was in the middle of one.
    assert found["discarded"] and set(found["discarded"]) <= {"died", "unread"}
    # The step in which the process was killed was taken by its environments and not written down any more.
    assert 0 <= found["stepped"] - found["delivered"] - sum(found["discarded"].values()) <= 2


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.ddp
@pytest.mark.timeout(600)  # Ray Train starts its processes three times
def test_learners_on_two_nodes_are_equal_and_go_on_after_one_is_lost(
    tmp_path: Path, command_server: CommandServer
) -> None:
    printed = run_on_nodes(command_server, "learners_and_one_lost", tmp_path)
    check_ranks_are_equal(env_steps=1024)
    for rank in (0, 1):
        steps = [int(line) for line in Path(f"steps-{rank}.txt").read_text().split()]
        again = next(i for i in range(1, len(steps)) if steps[i] <= steps[i - 1])
        assert steps[:again] == list(range(128, 641, 128))
        assert steps[again] in (256 + 128, 512 + 128)  # the epoch's checkpoint that Ray Train had taken last
        assert steps[again:] == list(range(steps[again], 1025, 128))
    errors = [line for line in printed.splitlines() if line.startswith("lit-rl: error: ")]
    assert len(errors) == 1 and "max_env_steps=32: expected at least the 64 env steps" in errors[0]
    newest = max(tmp_path.glob("stored/*/*/checkpoint.ckpt"))
    assert f"The last checkpoint is {newest}" in printed
    assert all(list(Path(f"{newest}.d/rank_{rank}").glob("*.pt")) for rank in (0, 1))  # the replay buffers
    cli.main(["validate", *DQN[1:], "--ckpt_path", str(newest)])


@pytest.mark.slow
@pytest.mark.ddp
def test_torchrun_on_two_nodes_trains_equal_ranks(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    torchrun += ["--master-addr", "127.0.0.1", "--master-port", port]
    fit = ["-m", "lit_rl", *TINY, "--trainer.strategy", "ddp", "--trainer.num_nodes", "2"]
    nodes = [
        subprocess.Popen([*torchrun, "--node-rank", str(rank), *fit], stderr=subprocess.PIPE, text=True)
        for rank in (0, 1)
    ]
    for node in nodes:
        _, errors = node.communicate(timeout=280)
        assert node.returncode == 0, errors[-3000:]
    check_ranks_are_equal(env_steps=1024)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--cluster.num_learners", "0"], "cluster.num_learners=0: expected a whole number of at least 1"),
        (["--cluster.num_learner", "2"], "num_learner"),
        (["--cluster.num_learners", "2", "--trainer.strategy", "ddp"], "trainer.strategy='ddp' together with"),
        (
            ["--cluster.num_learners", "2", "--data.env", "CartPole-v7", "--data.rollout_length", "0"],
            "rollout_length=0",
        ),
        (
            ["--cluster.num_learners", "2", "--cluster.ray_address", "a:1", "--data.ray_address", "b:1"],
            "cluster.ray_address='a:1' and data.ray_address='b:1': expected one address",
        ),
    ],
)
def test_a_mistake_is_told_before_ray_starts(
    args: list[str], words: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lit_rl.cli.program.run_learners", lambda *_: pytest.fail("Ray was asked for"))
    with pytest.raises(SystemExit) as caught:
        cli.main(["fit", "--config", "ppo_cartpole", *args])
    assert caught.value.code == 2
    assert words in capsys.readouterr().err.strip().splitlines()[-1]


def test_limits_of_a_cluster() -> None:
    with pytest.raises(OptionError, match=r"cluster\.max_failures=-2"):
        Cluster(max_failures=-2)
    with pytest.raises(OptionError, match=r"cluster\.gpus_per_learner=0\.5: expected a whole number"):
        Cluster(gpus_per_learner=0.5)  # type: ignore[arg-type]
