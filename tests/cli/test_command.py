"""The console script: what it imports from the working folder, and commands whose mistake is easily made."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT, CommandServer

from lit_rl import cli

SCRIPT = "import sys; sys.path = [p for p in sys.path if p]; from lit_rl.cli import main; main()"  # as pip writes it
OWN = """
import gymnasium as gym, numpy as np
class MyEnv(gym.Env):
    metadata = {"render_modes": []}
    observation_space, action_space = gym.spaces.Box(-1, 1, (2,)), gym.spaces.Discrete(2)
    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(2, np.float32), {}
    def step(self, action):
        return np.zeros(2, np.float32), 1.0, True, False, {}
"""
FIT = [
    "fit", "--config", "ppo_cartpole", "--data.env", "my_env:MyEnv", "--data.max_env_steps", "256",
    "--data.rollout_length", "16", "--data.evaluation.episodes", "1", "--model.num_epochs", "1",
    "--model.minibatch_size", "64", "--trainer.enable_progress_bar", "false",
]  # fmt: skip


def script(*args: str, **variables: str) -> subprocess.CompletedProcess:
    environ = os.environ | {"PYTHONPATH": str(ROOT)} | variables  # an empty part of PYTHONPATH is the working folder
    command = [sys.executable, "-c", SCRIPT, *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environ)


@pytest.mark.slow
def test_an_environment_in_the_working_folder_is_found(command_server: CommandServer) -> None:
    Path("my_env.py").write_text(OWN)
    code, output = command_server.run(Path.cwd(), ["lit-rl", *FIT])
    assert code == 0, output[-2000:]
    (checkpoint,) = Path("runs").rglob("last.ckpt")
    play = ["lit-rl", "play", str(checkpoint), "--episodes", "1", "--env", "my_env:MyEnv"]
    code, output = command_server.run(Path.cwd(), play)
    assert code == 0 and "my_env:MyEnv" in output, output


@pytest.mark.parametrize(
    "more",
    [
        ["--data.vectorization", "async"],
        pytest.param(["--data.num_env_runners", "2"], marks=[pytest.mark.slow, pytest.mark.ray]),
    ],
)
def test_processes_find_it_too(command_server: CommandServer, more: list[str]) -> None:
    Path("my_env.py").write_text(OWN)
    code, output = command_server.run(Path.cwd(), ["lit-rl", *FIT, *more])
    assert code == 0, output[-2000:]


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
def test_learners_of_a_cluster_find_it_too(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(sys, "path", [folder for folder in sys.path if folder])
    Path("my_env.py").write_text(OWN)
    cli.main([*FIT, "--cluster.num_learners", "1", "--cluster.storage_path", "stored"])
    sys.modules.pop("my_env", None)
    assert list(Path("stored").rglob("checkpoint.ckpt"))
    said = capfd.readouterr()
    assert (said.out + said.err).count("Learning on 1 torch thread") == 1  # by Lightning, Ray Train and at the root
    assert re.search(r"\d+ env steps, rollout/return_mean", said.out)


@pytest.mark.slow
def test_the_working_folder_is_left_out_where_python_is_told_to() -> None:
    Path("my_env.py").write_text(OWN)
    done = script(*FIT, PYTHONSAFEPATH="1")
    assert done.returncode != 0 and "cannot import 'my_env'" in done.stderr


def fails(capsys: pytest.CaptureFixture, *args: str) -> str:
    with pytest.raises(SystemExit) as caught:
        cli.main(list(args))
    assert caught.value.code in (1, 2)
    return capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--config", "ppo_cartpole", "fit"], ["--config before 'fit'", "lit-rl fit --config"]),
        (["--config=ppo_cartpole", "test"], ["--config before 'test'", "lit-rl test --config"]),
        (["--trainer.max_epochs", "1", "fit"], ["--trainer.max_epochs before 'fit'"]),
        (["fit", "--config", "ppo_cartpol"], ["Did you mean 'ppo_cartpole'?"]),
        (["fit", "--config", "ppo_cartpole", "--data.env", "Nobody/Pong-v5"], ["Write package:Nobody/Pong-v5"]),
    ],
)
def test_a_mistake_is_answered_with_what_to_write(capsys, args: list[str], words: list[str]) -> None:
    line = fails(capsys, *args)
    assert all(word in line for word in words), line


def test_atari_without_its_package_is_told_which(command_server: CommandServer) -> None:
    command = ["lit-rl", "fit", "--config", "ppo_cartpole", "--data.env", "ALE/Pong-v5"]
    code, output = command_server.run(Path.cwd(), command)
    assert code != 0 and "Write ale_py:ALE/Pong-v5." in output, output


def test_a_config_with_the_options_of_subcommands_stands_before_them(capsys) -> None:
    Path("all.yaml").write_text("fit:\n  trainer:\n    max_epochs: 7\n")
    with pytest.raises(SystemExit) as caught:
        cli.main(["--config", "all.yaml", "fit", "--config", "ppo_cartpole", "--print_config"])
    assert not caught.value.code


def test_texts_of_the_help_end_with_their_sentence(capsys) -> None:
    cli.main(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "lit-rl {fit,validate,test,predict,recipes,play,plot,data,evaluate} [--config RECIPE]" in said
    for end in ("on the way.", "with a checkpoint.", "instead of eval/.", "each step to a file."):
        assert end in said
