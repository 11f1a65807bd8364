"""Bad input: every case is answered in at most three lines, the last one with key and value, and without a traceback.

In process, and some of them as real commands: config mistakes end with 2, those of a run with 1.
"""

import math
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from envs import CounterEnv
from gymnasium import spaces
from helpers import CommandServer

from lit_rl import cli

TINY = [
    "--config", "ppo_cartpole", "--data.max_env_steps", "512", "--data.rollout_length", "16",
    "--data.evaluation.episodes", "1", "--model.minibatch_size", "64", "--trainer.enable_progress_bar", "false",
    "--trainer.logger", "false", "--trainer.callbacks", "null",
]  # fmt: skip
HEAD = "model: {class_path: PPO}\ndata: {class_path: RolloutDataModule, init_args: {env: CartPole-v1}}\n"


class Case(NamedTuple):
    """What is given, and what must be in the last line of the answer.

    Attributes:
        name: of reference and ids.
        args: options after `fit`; one alone that ends in .yaml is a config that `files` holds.
        words: in the last line.
        code: the process's exit code.
        files: to write into the working folder before.
        command: whether to try it as a real command too.
    """

    name: str
    args: list[str]
    words: list[str]
    code: int = 2
    files: dict[str, bytes] = {}
    command: bool = False


def option(name: str, key: str, value: str, *words: str, command: bool = False) -> Case:
    return Case(name, [*TINY, f"--{key}", value], [key.rpartition(".")[2], *(words or [value])], command=command)


def config(name: str, text: str | bytes, *words: str, command: bool = False) -> Case:
    raw = text.encode() if isinstance(text, str) else text
    return Case(name, ["--config", "wrong.yaml"], list(words), files={"wrong.yaml": raw}, command=command)


CONFIG = [
    option("unknown key", "model.colour", "red", "colour", command=True),
    option("misspelt key", "model.entropy_coeff", "0.1", "entropy_coeff", "It is called 'entropy_coef' here."),
    option("misspelt key of data", "data.rolout_length", "8", "rolout_length", "Did you mean 'rollout_length'?"),
    option("misspelt key of the trainer", "trainer.max_epoch", "3", "max_epoch", "Did you mean 'max_epochs'?"),
    config("misspelt key in a config", HEAD + "trainer: {max_epoch: 3}\n", "max_epoch", "Did you mean 'max_epochs'?"),
    option("wrong type", "model.lr", "high", command=True),
    option("wrong type of a count", "data.rollout_length", "8.5"),
    option("lr negative", "model.lr", "-1"),
    option("lr zero", "model.lr", "0"),
    option("lr NaN", "model.lr", ".nan", "nan"),
    option("lr infinite", "model.lr", ".inf", "inf"),
    option("gamma above 1", "model.gamma", "1.5"),
    option("gamma NaN", "model.gamma", ".nan", "nan"),
    option("clip negative", "model.clip", "-0.2"),
    option("minibatch larger than the batch", "model.minibatch_size", "4096", "128"),
    option("no epochs", "model.num_epochs", "0"),
    option("runners negative", "data.num_env_runners", "-1"),
    option("no environments", "data.num_envs_per_env_runner", "0"),
    option("no rollout", "data.rollout_length", "0"),
    Case("no budget", [*TINY, "--data.max_env_steps", "null"], ["data.max_env_steps", "no end"], command=True),
    option("an option that PPO has itself", "trainer.gradient_clip_val", "1.0", "PPO(max_grad_norm=1.0)"),
    option("unknown algorithm", "model", "PPPO", "PPPO", "Did you mean 'PPO'?"),
    option("an algorithm of others", "model", "TD3", "there is no class TD3. SAC and TQC learn the same tasks."),
    option("unknown datamodule", "data", "Env", "There are OfflineDataModule, ReplayDataModule, RolloutDataModule."),
    option("another library's option", "model.learning_rate", "1e-3", "learning_rate=1e-3", "It is called 'lr' here."),
    option("an option of the data", "model.max_env_steps", "9", "It is an option of RolloutDataModule."),
    Case("misspelt callback", [*TINY, "--trainer.callbacks+", "EarlyStoping"], ["Did you mean 'EarlyStopping'?"]),
    option("misspelt logger", "trainer.logger", "WandBLogger", "WandBLogger", "Did you mean 'WandbLogger'?"),
    option("wrong type is told in words", "model.lr", "[1, 2]", "lr=[1, 2]: expected a number."),
    option("a flag that is none", "model.compile", "maybe", "compile=maybe: expected True or False."),
    option("a list that is none", "data.wrappers", "3", "wrappers=3: expected a list, such as [a, b]."),
    option("a dict that is none", "data.env_kwargs", "3", "env_kwargs=3: expected a dict"),
    option("misspelt network", "model.network", "MPL", "network=MPL", "Did you mean 'MLP'?", "package.module.Class"),
    Case(
        "misspelt network of the critics",
        ["--config", "sac_pendulum", "--model.critic_network", "MPL"],
        ["critic_network=MPL", "Did you mean 'MLP'?"],
    ),
    option("unknown network", "model.network", "Perceptron", "ImpalaResNet", "package.module.Class"),
    option("network of no module", "model.network", "my.Net", "my.Net", "No module named 'my'"),
    option("network that the module has not", "model.network", "lit_rl.MPL", "lit_rl.MPL", "has no attribute 'MPL'"),
    Case(
        "an option before its class",
        ["--data.n_step", "3", "--data", "ReplayDataModule", "--config", "dqn_cartpole"],
        ["data.n_step=3", "Put --data ReplayDataModule before it"],
    ),
    Case("unknown recipe", ["--config", "ppo_cartpol"], ["config='ppo_cartpol'", "'ppo_cartpole'?"], command=True),
    Case("recipe outside", ["--config", "../x"], ["config='../x'", "`lit-rl recipes` lists them."]),
    config("YAML syntax", "model: [", "wrong.yaml", "line 1", command=True),
    config("YAML duplicate key", HEAD + "model: {class_path: DQN}\n", "wrong.yaml", "model", "line 3", command=True),
    config(
        "YAML duplicate key inside", "model:\n  class_path: PPO\n  init_args: {lr: 1.0e-3, gamma: 0.9, lr: 1.0e-4}\n",
        "wrong.yaml", "lr", "line 3",
    ),
    config("YAML tag", HEAD + "trainer: {max_epochs: !!python/object/apply:os.getpid []}\n", "os.getpid", command=True),
    Case("config is a folder", ["--config", "folder"], ["config='folder'"], files={"folder/a.yaml": b""}),
    config("config is not UTF-8", b"model: {class_path: \xff\xfe}\n", "wrong.yaml", "UTF-8"),
    config("config is a list", "- 1\n", "wrong.yaml"),
    config("config is empty", "", "wrong.yaml"),
]  # fmt: skip


class Wrong(CounterEnv):
    """Breaks gymnasium's interface: from its first reset or step, or `late`, in the middle of training."""

    def __init__(self, how: str, late: bool = False):
        super().__init__()
        self._how, self._wait = how, 40 if late else 0
        if how == "raises":
            raise OSError("no simulator here")
        if how == "hangs":
            time.sleep(60)
        box, number = spaces.Box(-1, 1, (2,)), spaces.Discrete(2)
        self.action_space = {"text action": spaces.Text(3), "no action": _discrete(0)}.get(how, number)
        self.observation_space = {
            "no space": None,
            "empty part": spaces.Dict(a=spaces.Dict({}), b=box),
            "low above high": _box(1.0, -1.0),
        }.get(how, self.observation_space)

    def reset(self, **kwargs: Any) -> Any:
        obs, info = super().reset(**kwargs)
        return obs if self._how == "reset gives one" else (self._broken(obs), info)

    def step(self, action: Any) -> Any:
        self._wait -= 1
        obs, reward, terminated, truncated, info = super().step(action)
        if self._wait < 0:
            if self._how == "step gives four":
                return obs, reward, terminated, info
            if self._how == "step gives a list":
                return [obs, reward, terminated, truncated, info]
            if self._how == "last obs None" and (terminated or truncated):
                return None, reward, terminated, truncated, info
            rewards: dict[str, Any] = {
                "reward None": None, "reward array": np.ones(2), "reward string": "much", "reward NaN": math.nan
            }  # fmt: skip
            reward = rewards.get(self._how, reward)
            terminated = "no" if self._how == "flag string" else terminated
        return self._broken(obs), reward, terminated, truncated, info

    def _broken(self, obs: np.ndarray) -> Any:
        if self._wait >= 0:
            return obs
        found: dict[str, Any] = {
            "shape": np.zeros(3, np.float32), "dtype": np.array(["x"]), "obs NaN": obs * np.nan, "obs None": None
        }  # fmt: skip
        return found.get(self._how, obs)


def _discrete(n: int) -> spaces.Discrete:
    """gymnasium's own constructor refuses what a subclass, or an assignment, can make."""
    space = spaces.Discrete(1)
    space.n = np.int64(n)
    return space


def _box(low: float, high: float) -> spaces.Box:
    space = spaces.Box(-1.0, 1.0, (1,))
    space.low, space.high = np.full(1, low, np.float32), np.full(1, high, np.float32)
    return space


def parallel_env() -> Any:
    from pettingzoo.utils.env import ParallelEnv

    return ParallelEnv()


def env(name: str, how: str, *words: str, late: bool = False, command: bool = False) -> Case:
    given = f"{{how: {how}, late: {str(late).lower()}}}"
    args = [*TINY, "--data.env", "test_bad_input:Wrong", "--data.env_kwargs", given]
    return Case(name, args, ["env=test_bad_input:Wrong", *words], 1, command=command)


LATE = ["env runner 0", "episode", "step", "environment 0"]
ENVS = [
    Case("id not registered", [*TINY, "--data.env", "NoSuch-v0"], ["env='NoSuch-v0'"], 1, command=True),
    env("constructor raises", "raises", "OSError", "no simulator here", command=True),
    Case(
        "constructor hangs",
        [*env("", "hangs").args, "--data.fault_tolerance", "{init_timeout_s: 0.5}"],
        ["env=test_bad_input:Wrong", "init_timeout_s=0.5"], 1,
    ),
    env("no observation space", "no space", "observation_space=None", "gymnasium.Space"),
    env("reset gives one value", "reset gives one", "reset returned", "(observation, info)"),
    env("step gives four", "step gives four", "step returned", "truncated"),
    env("step gives a list late", "step gives a list", "step of environment 0", "truncated", late=True),
    env("last observation None", "last obs None", "step of environment 0", "observation=None", late=True),
    env("step gives four late", "step gives four", "step of environment 0", late=True),
    env("observation's shape", "shape", "shape (3,)", "(1,)"),
    env("observation's dtype", "dtype", "'x'"),
    env("observation NaN", "obs NaN", "nan"),
    env("observation NaN late", "obs NaN", "observation=[nan]", *LATE, late=True),
    env("observation None", "obs None", "observation=None"),
    env("reward None", "reward None", "reward=None"),
    env("reward array", "reward array", "reward=array([1., 1.])"),
    env("reward string", "reward string", "reward='much'"),
    env("reward NaN", "reward NaN", "reward=nan"),
    env("reward NaN late", "reward NaN", "reward=nan", *LATE, late=True, command=True),
    env("flag string", "flag string", "terminated='no'"),
    env("action space unsupported", "text action", "Text"),
    env("Dict with an empty part", "empty part", "Dict()", "empty"),
    env("Discrete(0)", "no action", "Discrete(0)"),
    env("low above high", "low above high", "low", "high"),
    Case(
        "several agents", [*TINY, "--data.env", "test_bad_input:parallel_env"],
        ["env=test_bad_input:parallel_env", "ParallelEnv", "possible_agents"], 1,
    ),
]  # fmt: skip
CASES = CONFIG + ENVS


def check(case: Case, code: int | None, errors: str) -> None:
    lines = errors.strip().splitlines()
    assert lines and "Traceback" not in errors, errors
    last = lines[-1]
    assert last.startswith("lit-rl: error: "), errors
    assert all(word.lower() in last.lower() for word in case.words), last
    assert code == case.code, (code, last)


@pytest.fixture
def files(request: pytest.FixtureRequest) -> Case:
    case: Case = request.param
    write(case, Path.cwd())
    return case


def write(case: Case, folder: Path) -> None:
    for name, content in case.files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


@pytest.mark.parametrize("files", CASES, ids=[case.name for case in CASES], indirect=True)
def test_bad_input_is_answered_in_one_sentence(files: Case, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["fit", *files.args])
    check(files, caught.value.code, capsys.readouterr().err)


COMMANDS = [case for case in CASES if case.command]


@pytest.mark.slow
@pytest.mark.parametrize("case", COMMANDS, ids=[case.name for case in COMMANDS])
def test_a_command_answers_in_at_most_three_lines_and_leaves_nothing(
    case: Case, command_server: CommandServer, tmp_path: Path
) -> None:
    assert len(COMMANDS) == 10
    write(case, tmp_path)
    code, errors = command_server.run(tmp_path, ["lit-rl", "fit", *case.args], only_errors=True)
    check(case, code, errors)
    assert len(errors.strip().splitlines()) <= 3, errors
    assert {path.name for path in tmp_path.iterdir()} <= set(case.files)
