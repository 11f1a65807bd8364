"""What several tests do: runners, trainers, processes, comparisons."""

import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from tensordict import TensorDict
from torch import Tensor

from lit_rl import Policy
from lit_rl.envs.make import EnvConfig
from lit_rl.off_policy import OffPolicy
from lit_rl.runners.env_runner import EnvRunner
from lit_rl.runners.fragment import Fragment
from lit_rl.runners.gathering import to_rollout
from lit_rl.runners.transport import pack

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent


def make_runner(
    env: EnvConfig, policy: Policy | None = None, num_envs: int = 3, length: int = 16, seed: int = 0, **options: Any
) -> EnvRunner:
    """An env runner; without a policy it gets a new one, always the same."""
    if policy is None:
        torch.manual_seed(0)
        policy = Policy(env.spec())
    seeds = np.random.SeedSequence(seed)
    return EnvRunner(env, policy, num_envs=num_envs, rollout_length=length, seed=seeds, **options)


def next_rollout(runner: EnvRunner) -> TensorDict:
    return to_rollout([runner.sample()], copy=False)


def ragged(fragment: Fragment, end: Sequence[int], begin: Sequence[int] | None = None) -> Fragment:
    """A fragment's steps `begin[b]` (0) to `end[b] - 1` of each time line, and after them what must not be looked at.

    Without `keep_states` the state before step `begin` is not known, so that it must be 0.
    """
    old = fragment.rows.views() | fragment.finals.views()
    num_envs, num_steps = old["reward"].shape
    begin = begin or [0] * num_envs
    old.setdefault("mask", np.ones((num_envs, num_steps), np.bool_))
    new = {path: np.full_like(x, np.nan if x.dtype.kind == "f" else 77) for path, x in old.items()}
    new["mask"][:], new["final_step"][:] = False, -1
    new["length"] = np.subtract(end, begin)
    for b in np.flatnonzero(new["length"]):
        steps, here = slice(begin[b], end[b]), (old["final_step"][b] >= begin[b]) & (old["final_step"][b] < end[b])
        for path, x in old.items():
            if path.startswith("last_"):
                new[path][b] = x[b] if end[b] == num_steps else old[path.removeprefix("last_")][b, end[b]]
            elif path.startswith("final_"):
                new[path][b, here] = x[b, here] - (begin[b] if path == "final_step" else 0)
            elif path.startswith("state") and x.shape[1] != num_steps:
                new[path][b] = x[b]
            else:
                new[path][b, : new["length"][b]] = x[b, steps]
    entry = fragment.entry._replace(delivered=int(new["mask"].sum()))
    finals = {path: new.pop(path) for path in list(new) if path.startswith("final_")}
    return fragment._replace(rows=pack(new), finals=pack(finals), entry=entry)


def quiet_trainer(**options: Any) -> L.Trainer:
    """A Trainer on the CPU that logs, saves and shows nothing unless asked."""
    quiet = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": -1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
    return L.Trainer(**quiet | options)


def greedy_return(algorithm: L.LightningModule, data: L.LightningDataModule, **options: Any) -> float:
    """Train, then evaluate: the mean return."""
    quiet_trainer(limit_val_batches=0, **options).fit(algorithm, data)
    return quiet_trainer().validate(algorithm, data, verbose=False)[0]["eval/return_mean"]


def run_python(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run `python` in a process of its own, which must succeed."""
    done = subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done


COMMAND_SERVER = """
import gc, json, os, sys
sys.path = [folder for folder in sys.path if folder]  # as in a console script that pip writes
import lit_rl.cli.program
from lit_rl.cli import main

gc.freeze()  # else each fork copies what the collector looks at
for request in sys.stdin:
    folder, log, command, only_errors = json.loads(request)
    pid = os.fork()
    if not pid:
        os.chdir(folder)
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(os.open(os.devnull, os.O_WRONLY) if only_errors else output, 1)
        os.dup2(output, 2)
        if command[0] == "python":
            os.execv(sys.executable, command)
        sys.argv = command
        main()
        sys.exit()
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


class CommandServer:
    """lit_rl's command line, imported once in a process of its own; every command runs in a fork of that."""

    def __init__(self) -> None:
        path = [str(ROOT), *filter(None, os.environ["PYTHONPATH"].split(os.pathsep))]  # "" would be the working folder
        self._process = subprocess.Popen(
            [sys.executable, "-c", COMMAND_SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(path)},
        )  # fmt: skip

    def run(self, folder: Path, command: Sequence[str], only_errors: bool = False) -> tuple[int, str]:
        """The exit code and the output, or what is on stderr alone, of a `lit-rl` or `python` command."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with tempfile.NamedTemporaryFile("r") as log:
            self._process.stdin.write(json.dumps([str(folder), log.name, list(command), only_errors]) + "\n")
            self._process.stdin.flush()
            return int(self._process.stdout.readline()), log.read()

    def close(self) -> None:
        self._process.communicate()


class Forked:
    """`lit-rl` beside the test, forked from a process that has imported everything, which takes longer than a run.

    Args:
        folder: the working folder, which is there.
        arguments: of `lit-rl`.
        variables: added to the environment after the start.
    """

    def __init__(self, folder: Path, arguments: Sequence[str], **variables: str):
        self._errors = folder / "stderr.txt"
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["lightning", "lit_rl.cli.program", "helpers", "envs"])
        self._process = context.Process(target=_command, args=(folder, self._errors, list(arguments), variables))
        self._process.start()

    def poll(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        assert self._process.pid is not None
        os.kill(self._process.pid, number)

    def end(self, timeout_s: float = 60.0) -> tuple[int | None, str]:
        """Its exit code, and what it wrote to stderr."""
        self._process.join(timeout_s)
        return self._process.exitcode, self._errors.read_text()


def _command(folder: Path, errors: Path, arguments: list[str], variables: dict[str, str]) -> None:
    from lit_rl import cli

    os.chdir(folder)
    os.environ |= variables
    torch.set_num_threads(1)
    with errors.open("w") as file:
        os.dup2(file.fileno(), 2)
    cli.main(arguments)


def assert_same(found: Any, expected: Any, at: str = "") -> None:
    """Nested dicts and lists are equal, tensors bit for bit; else the place is named."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), at
        for key in expected:
            assert_same(found[key], expected[key], f"{at}/{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), at
        for i, parts in enumerate(zip(found, expected)):
            assert_same(*parts, f"{at}/{i}")
    else:
        assert torch.equal(found, expected) if isinstance(expected, Tensor) else found == expected, at


def check_padding(algorithm: OffPolicy, action: Tensor) -> None:
    """Rows that are masked may hold anything: loss, priorities and metrics of sequences are those of the real rows.

    Args:
        algorithm: built, with memory.
        action: [2, 4, *action].
    """
    g, size = torch.Generator().manual_seed(0), algorithm.spec.observation_space.shape[0]
    batch = TensorDict(
        {
            "observation": torch.randn(2, 4, size, generator=g), "last_observation": torch.randn(2, size, generator=g),
            "action": action, "discount": torch.full((2, 4), 0.5), "bootstrap_row": torch.arange(4).expand(2, 4),
            "is_init": torch.zeros(2, 4, dtype=torch.bool),
            "mask": torch.tensor([[True, True, False, False], [True, True, True, True]]),
            "state": {k: torch.from_numpy(x) for k, x in algorithm.policy.initial_state(2).items()},
            "next": {"reward": torch.randn(2, 4, generator=g), "terminated": torch.zeros(2, 4, dtype=torch.bool)},
            "weight": torch.ones(2),
        },
        [2],
    )  # fmt: skip
    other = batch.clone()
    other["next", "reward"][0, 2:] = 1e6
    other["observation"][0, 3] = 50.0  # row 2 is the observation that row 1 bootstraps from
    other["action"][0, 2:] = (action[0, 2:] == 0).to(action.dtype)
    losses: list[Tensor] = []
    algorithm.optimize = losses.append
    before, metrics = {name: tensor.clone() for name, tensor in algorithm.state_dict().items()}, []
    for one in (batch, other):
        algorithm.load_state_dict(before)
        algorithm.generator.manual_seed(0)
        metrics.append(algorithm.update(one))
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(batch["priority"], other["priority"])
    for name in metrics[0]:
        torch.testing.assert_close(metrics[0][name], metrics[1][name])
