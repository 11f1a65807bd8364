"""`Record`: what a run's environments did is in the files, once, and can be told and checked."""

import json
import logging
import os
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from agent_envs import MADE, LoggedAgents, Transition
from envs import CounterEnv, MaskedEnv
from gymnasium import spaces
from helpers import TESTS, CommandServer, quiet_trainer, run_python
from lightning.pytorch.callbacks import ModelCheckpoint

import lit_rl
from lit_rl import (
    BC,
    PPO,
    SAC,
    Evaluation,
    LSTMNetwork,
    OfflineDataModule,
    Record,
    ReplayDataModule,
    RolloutDataModule,
    cli,
)
from lit_rl.errors import DataError, OptionError
from lit_rl.files import episodes
from lit_rl.files.episodes import Rows

SCRIPT = TESTS / "record_script.py"


def read(path: str = "data") -> Rows:
    return episodes.read_rows(episodes.find([path]), ["deterministic", "policy_version"])


def source(env: Any = CounterEnv, **options: Any) -> RolloutDataModule:
    own = {"rollout_length": 16, "num_envs_per_env_runner": 2, "max_env_steps": 128, "seed": 0}
    return RolloutDataModule(env, **own | {"evaluation": Evaluation(episodes=3), "rollouts_per_epoch": 1} | options)


def fit(record: Record, data: Any = None, algorithm: Any = None, **options: Any) -> Any:
    algorithm = algorithm or PPO(minibatch_size=16, num_epochs=1)
    quiet_trainer(callbacks=[record, *options.pop("callbacks", [])], **options).fit(algorithm, data or source())
    return algorithm


def counted(rows: Rows) -> list[tuple[int, int, bool]]:
    """Episodes of `CounterEnv`, checked: number, length, and whether they were greedy."""
    columns, found = rows.columns, []
    for begin, end in zip(rows.begins, rows.begins[1:] - 1):
        obs = columns["observation"][begin : end + 1, 0]
        number, length = int(obs[0]) // 100, int(end - begin)
        np.testing.assert_array_equal(obs, 100 * number + np.arange(length + 1))
        np.testing.assert_array_equal(columns["reward"][begin:end], 1 + np.arange(length))
        assert length == 2 + number % 3
        assert (columns["terminated"][end - 1], columns["truncated"][end - 1]) == (number % 2 == 0, number % 2 == 1)
        found.append((number, length, bool(columns["deterministic"][begin])))
    return found


def test_evaluations_and_training_are_recorded_and_what_has_not_ended_is_counted(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO, "lightning.pytorch"):
        fit(Record("data", training=True))
    found = counted(read())
    training, evaluation = ([one for one in found if one[2] is greedy] for greedy in (False, True))
    numbers = Counter(number for number, *_ in training)
    # 64 env steps of each of 2 environments: 21 whole episodes, and a 22nd that has made one of its steps.
    assert numbers == Counter(list(range(21)) * 2)
    assert len(evaluation) == 3 * 4  # after each rollout
    assert "Recorded 54 episodes, mean return " in caplog.text and ": data. 2 had not ended" in caplog.text
    versions = read().columns["policy_version"]
    assert set(versions.tolist()) == {0, 1, 2, 3, 4}


def test_only_what_is_asked_for_is_recorded() -> None:
    fit(Record("evaluation"))
    fit(Record("training", training=True, evaluation=False))
    assert read("evaluation").columns["deterministic"][~read("evaluation").columns["closing"]].all()
    assert not read("training").columns["deterministic"].any()
    fit(Record("some", training=True, evaluation=False, every=5))
    assert len(read("some").begins) - 1 == 9  # of 44 that began: 0, 5, ..., 40
    fit(Record("some of evaluation", every=5))
    assert len(read("some of evaluation").begins) - 1 == 3


@pytest.mark.parametrize("what", ["validate", "test", "predict"])
def test_whatever_plays_is_recorded(what: str) -> None:
    data = source(evaluation=Evaluation(episodes=3, deterministic=False))
    trainer = quiet_trainer(callbacks=[Record("data", every=2)])
    algorithm = PPO()
    getattr(trainer, what)(algorithm, data)
    rows = read()
    assert len(rows.begins) - 1 == (3 if what == "predict" else 2)
    assert not rows.columns["deterministic"].any()
    assert not list(Path().rglob("*.tmp"))


def test_log_probs_are_those_of_the_steps() -> None:
    torch.manual_seed(0)
    data = source("CartPole-v1", evaluation=Evaluation(episodes=2, deterministic=False))
    algorithm = PPO(minibatch_size=16, num_epochs=1, lr=1e-9)
    fit(Record("data", training=True), data, algorithm)
    columns = read().columns
    steps = ~columns["closing"]
    obs, action = (torch.from_numpy(columns[name][steps]) for name in ("observation", "action"))
    with torch.no_grad():
        log_prob, _ = algorithm.policy.evaluate_actions(algorithm.policy.features({"observation": obs}), obs, action)
    np.testing.assert_allclose(columns["log_prob"][steps], log_prob.numpy(), atol=1e-4)
    assert len(set(np.round(columns["log_prob"][steps], 5).tolist())) > 20


def test_replay_is_recorded_with_actions_as_the_environment_takes_them() -> None:
    data = ReplayDataModule(
        "Pendulum-v1", max_env_steps=500, learning_starts=450, env_steps_per_batch=250, seed=0, reward_scale=0.1,
        reward_clip=0.2, evaluation=Evaluation(episodes=1),
    )  # fmt: skip
    fit(Record("data", training=True, evaluation=False), data, SAC(critic_hidden_sizes=(8,)))
    rows = read()
    assert np.diff(rows.begins).tolist() == [201, 201]
    assert np.abs(rows.columns["action"]).max() > 1.5 and rows.columns["reward"].min() < -3
    steps = ~rows.columns["closing"]
    # What Pendulum does with an action of so much, in its own units.
    cos, sin, speed = rows.columns["observation"].astype(np.float64).T
    angle, torque = np.arctan2(sin, cos), rows.columns["action"][:, 0]
    cost = angle**2 + 0.1 * speed**2 + 0.001 * torque**2
    np.testing.assert_allclose(rows.columns["reward"][steps], -cost[steps], atol=1e-3)


def test_masks_and_memory_are_recorded() -> None:
    algorithm = PPO(minibatch_size=16, num_epochs=1, network=LSTMNetwork, sequence_length=4)
    fit(Record("data", training=True), source(MaskedEnv, env_kwargs={"action_space": spaces.Discrete(3)}), algorithm)
    columns = read().columns
    masks = [name for name in columns if "action_mask" in name]
    assert masks and all(columns[name].any() for name in masks)


@pytest.mark.slow
@pytest.mark.ray
def test_eval_runners_record_each_evaluation_once(ray_session: None) -> None:
    evaluation = Evaluation(episodes=3, num_env_runners=1, parallel=True)
    fit(Record("data"), source(evaluation=evaluation))
    rows = read()
    versions = rows.columns["policy_version"][rows.begins[:-1]]
    assert sorted(Counter(versions.tolist()).values()) == [3] * len(set(versions.tolist()))
    assert set(versions.tolist()) == {0, 1, 2, 3, 4}


@pytest.mark.slow
@pytest.mark.ray
def test_env_runners_in_ray_record_what_their_environments_did(ray_session: None) -> None:
    data = source(num_env_runners=2, num_envs_per_env_runner=1)
    fit(Record("data", training=True, evaluation=False), data)
    found = counted(read())
    # 64 env steps of one environment in each of 2 runners, as in this process.
    assert Counter(number for number, *_ in found) == Counter(list(range(21)) * 2)
    assert not any(greedy for *_, greedy in found)
    assert set(read().columns["policy_version"].tolist()) == {0, 1, 2, 3}


@pytest.mark.parametrize("mode", ["turns", "together", "random", "cars"])
def test_agents_are_recorded_as_the_environment_saw_them(mode: str) -> None:
    MADE.clear()
    data = source(LoggedAgents, env_kwargs={"mode": mode, "num_agents": 3}, evaluation=Evaluation(episodes=6))
    quiet_trainer(callbacks=[Record("data")]).predict(PPO(), data)
    rows, found = read(), []
    columns = rows.columns
    assert rows.agents is not None
    for agent, begin, end in zip(rows.agents, rows.begins, rows.begins[1:] - 1):
        for row in range(begin, end):
            number, index = columns["observation"][row].astype(int).tolist()
            assert index == (0 if mode == "cars" else "abc".index(agent))
            terminated = bool(columns["terminated"][row])
            following = None if terminated else int(columns["observation"][row + 1, 0])
            flags = terminated, bool(columns["truncated"][row])
            found.append(
                Transition(index, number, int(columns["action"][row]), float(columns["reward"][row]), following, *flags)
            )
    assert len(set(columns["episode"].tolist())) == 6
    assert Counter(found) == Counter(one for made in MADE[-6:] for one in made.log)


def test_what_cannot_be_recorded_is_refused() -> None:
    data = source(LoggedAgents, env_kwargs={"mode": "turns"})
    with pytest.raises(OptionError, match=r"^Record\(training=True\): env=LoggedAgents has several agents"):
        fit(Record("data", training=True), data)
    Path("file").touch()
    for folder, message in (
        ("file", r"file"),
        ("other", r"^folder='other' has episodes of CounterEnv with observation"),
    ):
        if folder == "other":
            fit(Record("other"))
        with pytest.raises(DataError, match=message):
            quiet_trainer(callbacks=[Record(folder)]).predict(PPO(), source("CartPole-v1"))
    with pytest.raises(
        OptionError, match=r"^Record: expected a datamodule with an environment: .* with evaluation\.env"
    ):
        fit(Record("data"), OfflineDataModule("other", max_updates=1), BC())
    with pytest.raises(OptionError, match=r"^every=0: expected a whole number of at least 1"):
        Record(every=0)
    with pytest.raises(OptionError, match=r"^EpisodeWriter is called Record now"):
        lit_rl.EpisodeWriter("data")


def test_a_full_disk_costs_episodes_and_a_warning(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lit_rl.files.episode_folder.os.fsync", full)
    fit(Record("data"))
    assert "12 episodes are not recorded: folder='data' cannot be written to: [Errno 28] No space left" in caplog.text
    with pytest.raises(DataError, match="No space left on device"):
        quiet_trainer(callbacks=[Record("data")]).predict(PPO(), source())


def cartpole(**options: Any) -> RolloutDataModule:
    return source("CartPole-v1", max_env_steps=512, **options)


def test_a_run_that_is_begun_anew_or_resumed_writes_nothing_twice(caplog: pytest.LogCaptureFixture) -> None:
    checkpoints = ModelCheckpoint("checkpoints", save_top_k=-1, every_n_epochs=1, save_on_train_epoch_end=True)
    options = {"callbacks": [checkpoints], "enable_checkpointing": True}
    data = cartpole()
    fit(Record("data", training=True), data, **options)
    first = read()
    with caplog.at_level(logging.INFO, "lightning.pytorch"):
        fit(Record("data", training=True), cartpole())
    assert len(read().begins) == len(first.begins) and "of them were there before" in caplog.text
    early = sorted(Path("checkpoints").glob("*.ckpt"), key=lambda path: path.stat().st_mtime)[0]
    trainer = quiet_trainer(callbacks=[Record("data", training=True)])
    trainer.fit(PPO(minibatch_size=16, num_epochs=1), cartpole(), ckpt_path=early)
    assert len(read().begins) == len(first.begins)
    fit(Record("data", training=True), cartpole(seed=1))
    assert len(read().begins) > len(first.begins)


@pytest.mark.ddp
@pytest.mark.slow
def test_two_ranks_record_into_one_folder(tmp_path: Path, command_server: CommandServer) -> None:
    command_server.run_ranks(tmp_path, SCRIPT, "ranks")
    rows = read()
    assert {path.name[:14] for path in episodes.find(["data"])} == {"episodes-rank0", "episodes-rank1"}
    starts = rows.columns["episode"][rows.begins[:-1]]
    assert len(set(starts.tolist())) == len(starts) == starts.max() + 1
    manifest = json.loads(Path("data/_manifest.json").read_text())
    assert manifest["episodes"] == len(starts) and set(manifest["shards"]) == {p.name for p in episodes.find(["data"])}
    is_predicted = ~rows.columns["deterministic"][rows.begins[:-1]]
    assert is_predicted.sum() >= 5
    cli.main(["data", "check", "data"])


@pytest.mark.chaos
@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_who_is_killed_twenty_times_leaves_no_broken_or_second_episode(
    request: pytest.FixtureRequest, tmp_path: Path, command_server: CommandServer
) -> None:
    """Each time after a new shard came, or while one is written; the run goes on from its checkpoint, if it has one."""
    seed = request.config.getoption("--chaos-seed")
    seed = random.SystemRandom().randrange(2**31) if seed is None else seed
    print(f"--chaos-seed {seed}")
    command_server.run_script(tmp_path, SCRIPT, "killed", seed, 20)
    cli.main(["data", "check", "data"])
    assert len(episodes.find(["data"])) > 20


# --- lit-rl data ------------------------------------------------------------------------------------------------------


def test_info_tells_what_episodes_are_like(capsys: pytest.CaptureFixture) -> None:
    data = source("Pendulum-v1", evaluation=Evaluation(episodes=4))
    quiet_trainer(callbacks=[Record("data")]).predict(PPO(), data)
    capsys.readouterr()
    cli.main(["data", "info", "data", "-o", "picture.png"])
    said = capsys.readouterr().out
    rows = read()
    returns = np.add.reduceat(rows.columns["reward"], rows.begins[:-1])
    assert said.startswith("Episodes: 4 of Pendulum-v1, 800 steps, in 1 file\n")
    assert f"Return: mean {returns.mean():.6g}" in said and f"50% {np.median(returns):.6g}" in said
    assert "Length: mean 200, std 0, min 200, max 200" in said and "Ends: 0 terminated, 4 truncated" in said
    assert "Actions: 100% greedy, by policies after 0 to 0 updates" in said
    assert "of [-2, 2] covered" in said and "observation[2]: " in said and said.endswith("Histograms: picture.png\n")
    assert Path("picture.png").read_bytes().startswith(b"\x89PNG") and os.path.getsize("picture.png") > 10_000


def test_info_counts_classes(capsys: pytest.CaptureFixture) -> None:
    fit(Record("data", training=True, evaluation=False))
    capsys.readouterr()
    cli.main(["data", "info", "data"])
    assert "action: 2 of 2 values covered (0: " in capsys.readouterr().out


def test_check_says_all_that_is_wrong_and_fails(capsys: pytest.CaptureFixture) -> None:
    fit(Record("data", rows_per_file=1))
    capsys.readouterr()
    cli.main(["data", "check", "data"])
    assert "12 of 12 files are whole: 12 episodes, " in capsys.readouterr().out
    first, second, third = episodes.find(["data"])[:3]
    first.with_name("episodes-rank0-00099.parquet").write_bytes(first.read_bytes())
    os.truncate(second, 500)
    third.unlink()
    with pytest.raises(SystemExit) as caught:
        cli.main(["data", "check", "data"])
    out, error = capsys.readouterr()
    assert caught.value.code == 1 and "faults." in out
    for words in (
        f"{second} has 500 bytes: data/_manifest.json says", f"{third} is missing: data/_manifest.json has it.",
        "episodes-rank0-00099.parquet has episode 0, which data/episodes-rank0-00000.parquet has too.",
    ):  # fmt: skip
        assert sum(words in line for line in error.splitlines()) == 1, error


def test_check_compares_the_files_of_a_folder(capsys: pytest.CaptureFixture) -> None:
    fit(Record("data", evaluation=False, training=True))
    fit(Record("other"), source("CartPole-v1"))
    (first,), (other,) = (episodes.find([name]) for name in ("data", "other"))
    first.with_name("episodes-rank1-00000.parquet").write_bytes(first.read_bytes())
    first.with_name("episodes-rank2-00000.parquet").write_bytes(other.read_bytes())
    capsys.readouterr()
    with pytest.raises(SystemExit):
        cli.main(["data", "check", "data", "other"])
    out, error = capsys.readouterr()
    assert f"rank1-00000.parquet has 42 episodes, from 0 on, which {first} has too." in error
    assert "episodes-rank2-00000.parquet has observation in Box(" in error
    assert f"{other} has 12 episodes that data/episodes-rank2-00000.parquet has too." in error
    assert "4 of 4 files are whole" in out and len(error.splitlines()) == 4, error


@pytest.mark.parametrize(
    ("args", "words", "code"),
    [
        (["check", ""], "episodes='': expected files, folders or patterns.", 2),
        (["info", "nowhere"], "paths='nowhere': there is no such file or folder.", 1),
        (["info"], "Give their folder: lit-rl data info runs/ppo_cartpole/version_0/episodes", 2),
        (["look", "data"], "info", 2),
        (["info", "data", "-o", "x.txt"], "output='x.txt': expected a name that ends in .png, .svg or .pdf", 2),
    ],
)
def test_bad_commands_are_answered_in_a_sentence(
    args: list[str], words: str, code: int, capsys: pytest.CaptureFixture
) -> None:
    if "data" in args:
        fit(Record("data"))
        capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        cli.main(["data", *args])
    assert caught.value.code == code and words in capsys.readouterr().err


def test_data_needs_no_lightning() -> None:
    fit(Record("data"))
    code = "import sys; from lit_rl.cli import main; main(['data', 'info', 'data']); print(*sys.modules)"
    loaded = run_python("-c", code).stdout.split()
    assert "pyarrow" in loaded and not {"lightning", "ray", "tensordict", "wandb"} & set(loaded)
