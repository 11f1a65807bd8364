"""`lit-rl`: runs, options, resuming, and one-sentence errors."""

import csv
import re
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from helpers import ROOT, quiet_trainer, run_python
from lightning.pytorch.cli import LightningCLI

import lit_rl.cli.program
from lit_rl import PPO, SAC, Evaluation, MultiAgent, Policy, Record, Replay, RolloutDataModule, cli, load_policy
from lit_rl.cli.quiet import quieten
from lit_rl.errors import CheckpointError
from lit_rl.replay.feed import ReplayFeeds

RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
OFFLINE = [path for path in RECIPES if "OfflineDataModule" in path.read_text()]
QUICK_RECIPES = {"ppo_cartpole", "ppo_stateless_cartpole_lstm", "rainbow_cartpole", "sac_pendulum"}
TINY = [
    "--config", "ppo_cartpole", "--data.max_env_steps", "512", "--data.rollout_length", "16",
    "--data.rollouts_per_epoch", "2", "--data.evaluation.episodes", "1", "--model.minibatch_size", "64",
    "--model.num_epochs", "1", "--trainer.enable_progress_bar", "false", "--trainer.check_val_every_n_epoch", "1",
]  # fmt: skip


def lit_rl(*args: str) -> "cli.program.CLI":
    """Run the command in this process."""
    return cli.main(list(args))


def fails(capsys: pytest.CaptureFixture, *args: str) -> tuple[int, str]:
    """Run a command that must fail: its exit code and its last line on stderr."""
    with pytest.raises(SystemExit) as caught:
        cli.main(list(args))
    lines = capsys.readouterr().err.strip().splitlines()
    assert not any("Traceback" in line for line in lines)
    return caught.value.code, lines[-1]


def runs() -> list[Path]:
    """The run folders below the working folder, in order."""
    return sorted(Path("runs/ppo_cartpole").glob("version_*"))


@pytest.mark.parametrize(
    "recipe",
    [pytest.param(p, id=p.stem, marks=[] if p.stem in QUICK_RECIPES else pytest.mark.slow) for p in RECIPES
     if p not in OFFLINE],
)  # fmt: skip
def test_every_recipe_trains_for_one_batch(recipe: Path) -> None:
    config = yaml.safe_load(recipe.read_text())
    data = config["data"]["init_args"]
    if data["env"].startswith("lit_rl.envs.dm_control:"):
        pytest.importorskip("dm_control.suite")
    fragments = data.get("fragments_per_batch") or max(1, data.get("num_env_runners", 0))
    steps, updates = fragments * data.get("num_envs_per_env_runner", 1) * data.get("rollout_length", 1), 1
    policies = config["model"]["init_args"].get("policies", {})
    if config["data"]["class_path"] == "ReplayDataModule" and policies:  # of which each has fewer rows
        begin, updates = 8 * data["batch_size"], None
        more = ["--data.learning_starts", str(begin), "--data.update_to_data", "0.1"]
        steps = begin + 128
    elif config["data"]["class_path"] == "ReplayDataModule":
        begin = -(-data["batch_size"] // steps) * steps
        more = ["--data.learning_starts", str(begin), "--data.update_to_data", str(1 / steps)]
        steps += begin
    else:
        more = ["--model.num_epochs", "1"] if config["model"]["class_path"] == "PPO" else []
        updates = data.get("num_reuses", 1)
        for policy_id in data.get("replay", ()):
            more += [f"--data.replay.{policy_id}.learning_starts", str(data["replay"][policy_id]["batch_size"])]
    if config["model"]["init_args"].get("compile"):  # takes half a minute; see test_compiled.py
        more += ["--model.compile", "false"]
    lit_rl(
        "fit", "--config", str(recipe), "--data.max_env_steps", str(steps), "--trainer.enable_progress_bar", "false",
        "--data.evaluation.episodes", "1", *more,
    )  # fmt: skip
    (checkpoint,) = Path("runs").rglob("last.ckpt")
    weights = load_plainly(checkpoint)["state_dict"]
    for path in (*Path("runs").rglob("best.ckpt"), *Path("runs").rglob("rank_0/*.pt")):
        load_plainly(path)
    assert int(weights["env_steps"]) == steps
    if updates is None:
        assert all(0 < int(weights[f"algorithms.{policy_id}.updates"]) <= 13 for policy_id in policies)
    else:
        assert int(weights["updates"]) == updates
    assert recipe.read_text().startswith(f"# lit-rl fit --config recipes/{recipe.name}\n# ")


@pytest.mark.parametrize("recipe", OFFLINE, ids=[path.stem for path in OFFLINE])
def test_every_recipe_of_recorded_data_trains_for_one_update(recipe: Path) -> None:
    config = yaml.safe_load(recipe.read_text())
    env = config["data"]["init_args"]["evaluation"]["env"]
    policy = (PPO if env == "CartPole-v1" else SAC)()
    trainer = quiet_trainer(callbacks=[Record("data")])
    trainer.predict(policy, RolloutDataModule(env, seed=0, evaluation=Evaluation(episodes=4, deterministic=False)))
    lit_rl(
        "fit", "--config", str(recipe), "--data.paths", "data", "--data.max_updates", "1",
        "--trainer.enable_progress_bar", "false", "--data.evaluation.episodes", "1",
    )  # fmt: skip
    (checkpoint,) = Path("runs").rglob("last.ckpt")
    weights = load_plainly(checkpoint)["state_dict"]
    assert (int(weights["updates"]), int(weights["env_steps"])) == (1, 0)
    assert recipe.read_text().startswith(f"# lit-rl fit --config recipes/{recipe.name}\n# ")


def load_plainly(path: Path) -> dict:
    """What `torch.load` returns where no library has made it trust a class."""
    trusted = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    try:
        return torch.load(path, weights_only=True)
    finally:
        torch.serialization.add_safe_globals(trusted)


def test_fit_validate_test_and_predict(capsys: pytest.CaptureFixture) -> None:
    lit_rl("fit", *TINY)
    (run,) = runs()
    assert yaml.safe_load((run / "config.yaml").read_text())["data"]["init_args"]["max_env_steps"] == 512
    assert len(list(csv.DictReader((run / "metrics.csv").open()))) >= 4
    lit_rl("validate", *TINY, "--ckpt_path", "last")
    assert "eval/return_mean" in capsys.readouterr().out
    lit_rl("test", *TINY, "--ckpt_path", "last")
    assert "test/return_mean" in capsys.readouterr().out
    lit_rl("predict", *TINY, "--ckpt_path", "last", "--data.evaluation.episodes", "3")
    check_episodes_file(next(Path("runs").rglob("episodes/episodes-rank0-00000.parquet")))
    lit_rl("predict", *TINY, "--ckpt_path", "last", "--data.evaluation.episodes", "3", "--out", "here")
    check_episodes_file(Path("here/episodes-rank0-00000.parquet"))


def check_episodes_file(path: Path) -> None:
    import json

    import pyarrow.parquet as pq

    table = pq.read_table(path)
    rows = table.to_pydict()
    assert sorted(set(rows["episode"])) == [0, 1, 2]
    for episode in range(3):
        steps = [i for i, e in enumerate(rows["episode"]) if e == episode]
        assert [rows["t"][i] for i in steps] == list(range(len(steps)))
        ends = [rows["terminated"][i] or rows["truncated"][i] for i in steps]
        assert ends == [False] * (len(steps) - 2) + [True, False]
        assert [rows["closing"][i] for i in steps] == [False] * (len(steps) - 1) + [True]
        assert all(len(rows["observation"][i]) == 4 and rows["reward"][i] == 1.0 for i in steps[:-1])
    spec = json.loads(table.schema.metadata[b"lit_rl"])["spec"]
    assert spec["action_space"] == {"type": "Discrete", "n": 2, "start": 0}


def test_short_names_and_nested_options_need_no_config_file() -> None:
    lit_rl(
        "fit", "--model", "PPO", "--model.lr", "0.01", "--model.minibatch_size", "64", "--model.network", "MLP",
        "--model.network.hidden_sizes", "[8]", "--data", "RolloutDataModule", "--data.env", "CartPole-v1",
        "--data.max_env_steps", "256", "--data.rollout_length", "32", "--trainer.enable_progress_bar", "false",
        "--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", "runs", "--trainer.accelerator", "cpu",
    )  # fmt: skip
    (path,) = Path("runs").rglob("*.ckpt")
    checkpoint = torch.load(path, weights_only=True)
    assert checkpoint["hyper_parameters"]["lr"] == 0.01
    assert checkpoint["state_dict"]["policy.head.weight"].shape == (2, 8)
    assert load_policy(path).act([0.0, 0.0, 0.0, 0.0])[0] in (0, 1)


def test_print_config_prints_a_config_that_can_be_run(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["fit", *TINY, "--print_config"])
    assert caught.value.code == 0
    config = yaml.safe_load(capsys.readouterr().out)
    assert config["model"]["class_path"].endswith(".PPO") and config["data"]["init_args"]["max_env_steps"] == 512
    Path("own.yaml").write_text(yaml.safe_dump(config))
    lit_rl("fit", "--config", "own.yaml")


def test_a_run_begins_with_how_it_runs_and_ends_with_what_came_of_it(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr("lit_rl.datamodules.environments.rank_zero_info", said.append)
    lit_rl("fit", *TINY)
    lines = capsys.readouterr().out.splitlines()
    assert said == [
        "Collecting from 8 environments in this process (vectorization=sync). Actions are computed in numpy. Learning "
        "on 1 torch thread (gradient steps are eager; compile=True pays in runs of minutes)."
    ]
    path = runs()[0] / "checkpoints" / "last.ckpt"
    found = re.fullmatch(
        r"Done: 512 env steps in 0:00:\d\d \(collecting \d+%, updating \d+%, evaluating \d+%\), "
        r"rollout/return_mean ([\d.]+), eval/return_mean ([\d.]+), checkpoint (.*)",
        lines[-1],
    )
    assert found is not None and float(found[1]) > 8 and float(found[2]) > 8 and found[3].endswith(".ckpt")
    assert path.exists() and Path(found[3]).parent == path.parent


def test_predict_without_a_config_is_told_of_that_of_the_run(capsys: pytest.CaptureFixture) -> None:
    lit_rl("fit", *TINY)
    run = runs()[0]
    capsys.readouterr()
    with pytest.raises(SystemExit):
        lit_rl("predict", "--ckpt_path", str(run / "checkpoints" / "last.ckpt"))
    assert f"Give the config of its run: --config {run / 'config.yaml'}" in capsys.readouterr().err


def test_early_stopping_on_what_was_never_logged_is_answered_in_a_sentence(capsys: pytest.CaptureFixture) -> None:
    stopping = ["--trainer.callbacks", "EarlyStopping", "--trainer.callbacks.monitor", "eval/return"]
    with pytest.raises(SystemExit):
        lit_rl("fit", *TINY, *stopping)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("lit-rl: error: EarlyStopping(monitor='eval/return'): nothing of this name was logged")


def test_runs_without_a_seed_differ_and_say_theirs(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds = []
    for _ in range(2):
        monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
        lit_rl(
            "fit", "--model", "PPO", "--data", "RolloutDataModule", "--data.env", "CartPole-v1", *TINY[2:],
            "--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", "runs", "--data.max_env_steps", "128",
        )  # fmt: skip
        said = re.search(r"No seed was given: --seed_everything (\d+)", capsys.readouterr().out)
        assert said is not None
        seeds.append(int(said[1]))
        configs = [yaml.safe_load(path.read_text()) for path in Path("runs").rglob("config.yaml")]
        assert {config["seed_everything"] for config in configs} == set(seeds)
    assert seeds[0] != seeds[1]


def test_last_goes_on_and_a_larger_budget_is_spent() -> None:
    lit_rl("fit", *TINY)
    lit_rl("fit", *TINY, "--data.max_env_steps", "1024", "--ckpt_path", "last")
    first, second = runs()
    rows = list(csv.DictReader((second / "metrics.csv").open()))
    assert [int(row["env_steps"].split(".")[0]) for row in rows if row["loss/policy"]] == [640, 768, 896, 1024]
    old, new = (torch.load(run / "checkpoints" / "last.ckpt", weights_only=True) for run in (first, second))
    assert (old["global_step"], new["global_step"]) == (8, 16)
    # A budget that is spent already trains nothing and breaks nothing.
    lit_rl("fit", *TINY, "--data.max_env_steps", "1024", "--ckpt_path", "last")


def test_damage_is_told_in_one_line_and_an_older_checkpoint_is_taken(caplog: pytest.LogCaptureFixture) -> None:
    lit_rl("fit", *TINY, "--data.max_env_steps", "768")
    folder = runs()[0] / "checkpoints"
    (folder / "best.ckpt").unlink()
    (folder / "best.ckpt.previous").unlink(missing_ok=True)
    last, previous = folder / "last.ckpt", folder / "last.ckpt.previous"
    for path, name in ((last, str(last)), (last, "last")):
        path.write_bytes(path.read_bytes()[:1000])
        caplog.clear()
        lit_rl("validate", *TINY, "--ckpt_path", name)
        (line,) = (record.getMessage() for record in caplog.records if record.name.startswith("lit_rl"))
        assert line.startswith(f"Checkpoint {last} is damaged") and line.endswith(f"; {previous} is taken instead.")
    lit_rl("fit", *TINY, "--init_from", str(last))
    lit_rl("fit", *TINY, "--data.max_env_steps", "1024", "--ckpt_path", str(last))
    new = [path for path in sorted(Path("runs").rglob("last.ckpt")) if path != last]
    steps = [int(load_plainly(path)["state_dict"]["env_steps"]) for path in new]
    assert steps == [512, 1024]
    previous.unlink()
    with pytest.raises(SystemExit):
        lit_rl("validate", *TINY, "--ckpt_path", str(last))


def test_init_from_takes_the_weights_and_counts_from_zero() -> None:
    lit_rl("fit", *TINY, "--model.normalize_observations", "true")
    source = runs()[0] / "checkpoints" / "last.ckpt"
    lit_rl(
        "fit", *TINY, "--model.normalize_observations", "true", "--init_from", str(source), "--model.lr", "1e-12",
        "--data.max_env_steps", "128",
    )  # fmt: skip
    old, new = (torch.load(run / "checkpoints" / "last.ckpt", weights_only=True) for run in runs())
    torch.testing.assert_close(new["state_dict"]["policy.head.weight"], old["state_dict"]["policy.head.weight"])
    assert int(new["state_dict"]["env_steps"]) == 128
    assert int(new["state_dict"]["policy.normalizer.moments./.count"]) == 640


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["fit", *TINY, "--ckpt_path", "last"], 1, ["ckpt_path='last'", "runs"]),
        (["fit", *TINY, "--ckpt_path", "gone.ckpt"], 1, ["gone.ckpt", "does not exist"]),
        (["validate", *TINY], 2, ["--ckpt_path"]),
    ],
)
def test_a_mistake_with_checkpoints_is_answered_in_one_sentence(
    capsys, args: list[str], code: int, words: list[str]
) -> None:
    got, line = fails(capsys, *args)
    assert line.startswith("lit-rl: error: ")
    assert all(word in line for word in words), line
    assert got == code


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([], ["subcommand is missing", "recipes, play, plot"]),
        (["foo"], ["subcommand='foo'", "recipes, play, plot"]),
        (["fit"], ["Give a recipe: --config ppo_cartpole"]),
        (["fit", "--confg", "ppo_cartpole"], ["--confg", "Did you mean '--config'?"]),
        (["fit", "ppo_cartpole"], ["It is a recipe: --config ppo_cartpole"]),
        (["fit", "--config", "ppo_cartpole", "--trianer.max_epochs", "1"], ["Did you mean '--trainer'?"]),
        (["evaluate"], ["required: checkpoint", "lit-rl evaluate runs/"]),
        (["play"], ["required: checkpoint", "lit-rl play runs/"]),
        (["plot"], ["required: runs", "lit-rl plot runs/"]),
        (["fit", "--model", "BC", "--data", "OfflineDataModule"], ["required: paths", "--data.paths DIR"]),
    ],
)
def test_what_is_missing_is_told_with_what_to_give(capsys, args: list[str], words: list[str]) -> None:
    got, line = fails(capsys, *args)
    assert got == 2 and line.startswith("lit-rl: error: ")
    assert all(word in line for word in words), line


def test_the_usage_names_every_subcommand(capsys) -> None:
    cli.main(["--help"])
    assert "{fit,validate,test,predict,recipes,play,plot,data,evaluate}" in capsys.readouterr().out


def test_help_and_mistakes_wait_for_no_import() -> None:
    code = """
import sys
from lit_rl.cli import main
from lit_rl.cli.shared import OWN
for command in ("--help", "--version", "recipes", *[f"{name} --help" for name in OWN], "fitt"):
    try:
        main(command.split())
    except SystemExit as end:
        print("code", command, end.code)
print("loaded", *sys.modules)
"""
    said = run_python("-c", code)
    assert "code play --help 0" in said.stdout and "Did you mean 'fit'?" in said.stderr
    assert not {"torch", "lightning", "ray"} & set(said.stdout.partition("loaded")[2].split())


def test_only_the_parser_of_the_given_subcommand_is_made(capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    found, prepare = [], LightningCLI._prepare_subcommand_parser
    monkeypatch.setattr(
        LightningCLI, "_prepare_subcommand_parser", lambda *a, **k: found.append(a[2]) or prepare(*a, **k)
    )
    with pytest.raises(SystemExit):
        cli.main(["fit", "--help"])
    assert found == ["fit"]


@pytest.mark.slow
def test_a_sweeps_command_runs_offline_and_its_parameters_arrive(monkeypatch: pytest.MonkeyPatch) -> None:
    import shlex

    from wandb.sdk.launch.sweeps import utils

    sweep = yaml.safe_load((ROOT / "recipes" / "sweeps" / "ppo_cartpole.yaml").read_text())
    chosen = {"model.init_args.lr": 0.0042, "model.init_args.num_epochs": 4, "data.init_args.rollout_length": 32}
    assert chosen.keys() <= sweep["parameters"].keys()
    made = utils.create_sweep_command_args({"args": {name: {"value": value} for name, value in chosen.items()}})
    command = utils.create_sweep_command(sweep["command"])
    expanded: list[str] = []
    for part in command:
        expanded += {
            "${env}": ["/usr/bin/env"], "${interpreter}": [sys.executable], "${program}": [sweep["program"]],
            "${args}": made["args"],
        }.get(part, [part])  # fmt: skip
    monkeypatch.setenv("WANDB_MODE", "offline")
    Path("recipes").symlink_to(ROOT / "recipes")
    expanded += ["--trainer.max_epochs=1", "--data.rollouts_per_epoch=2", "--trainer.enable_progress_bar=false"]
    done = subprocess.run(expanded, capture_output=True, text=True)
    assert done.returncode == 0, f"{shlex.join(expanded)}\n{done.stderr[-2000:]}"
    (path,) = Path("runs").rglob("last.ckpt")
    checkpoint = torch.load(path, weights_only=True)
    assert checkpoint["hyper_parameters"]["lr"] == 0.0042 and checkpoint["hyper_parameters"]["num_epochs"] == 4
    assert int(checkpoint["state_dict"]["env_steps"]) == 2 * 8 * 32
    assert list(Path("runs").rglob("run-*.wandb"))
    assert [found.name for found in Path("runs").iterdir()] == ["sweeps"]  # not among the recipe's own runs


def test_networks_and_a_policy_class_are_named_on_the_command_line() -> None:
    network = ["--model.network", "LSTMNetwork", "--model.network.hidden_size", "8", "--model.network.encoder", "MLP"]
    own = ["--model.policy_class", "test_cli.Careful", "--model.sequence_length", "8", "--model.share_encoder", "true"]
    lit_rl("fit", *TINY, *network, "--model.network.encoder.hidden_sizes", "[4]", *own)
    path = next(Path("runs").rglob("last.ckpt"))
    policy = load_policy(path, policy_class=Careful)
    assert isinstance(policy, Careful) and policy.encoder.output_size == 8 and policy.encoder.encoder.output_size == 4
    with pytest.raises(CheckpointError, match=r"policy_class=test_cli:Careful"):
        load_policy(path)


def test_a_name_without_a_module_is_lit_rls_own() -> None:
    import torchrl.modules  # which has an MLP too

    assert issubclass(torchrl.modules.MLP, torch.nn.Module)
    lit_rl("fit", *TINY, "--model.network", "MLP", "--model.network.hidden_sizes", "[4]")
    assert load_policy(next(Path("runs").rglob("last.ckpt"))).encoder.output_size == 4


class Careful(Policy):
    """A policy of the user's own."""


def test_a_checkpoint_is_taken_by_its_path() -> None:
    lit_rl("fit", *TINY, "--model.lr", "2e-3")
    path = next(Path("runs").rglob("last.ckpt"))
    lit_rl("validate", *TINY, "--ckpt_path", str(path))
    lit_rl("fit", *TINY, "--ckpt_path", str(path), "--data.max_env_steps", "1024")
    newest = max(Path("runs").rglob("last.ckpt"), key=lambda p: p.stat().st_mtime)
    assert int(torch.load(newest, weights_only=True)["state_dict"]["env_steps"]) == 1024


@pytest.mark.parametrize("encoder", ["{class_path: NatureCN}", "{class_path: NatureCNN, init_args: {hiden_size: 32}}"])
def test_a_mistake_inside_of_a_network_blames_its_inside(capsys: pytest.CaptureFixture, encoder: str) -> None:
    network = f"{{class_path: MultiInput, init_args: {{encoders: {{camera: {encoder}}}}}}}"
    Path("wrong.yaml").write_text(
        f"model: {{class_path: PPO, init_args: {{network: {network}}}}}\n"
        "data: {class_path: RolloutDataModule, init_args: {env: CartPole-v1}}\n"
    )
    _, line = fails(capsys, "fit", "--config", "wrong.yaml")
    assert "MultiInput: a class or option inside its init_args is misspelt" in line


def test_a_warning_is_one_line_without_the_code_it_comes_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    quieten()
    assert (
        warnings.formatwarning("The loss\n is not finite.", UserWarning, "module.py", 3) == "The loss is not finite.\n"
    )


SEVERAL = """
seed_everything: 1
model:
  class_path: MultiAgent
  init_args:
    policies:
      first: {class_path: PPO, init_args: {lr: 1.0e-3, minibatch_size: 32, num_epochs: 1}}
      second: {class_path: Random}
    policy_mapping: {agent_0: first, agent_1: second}
data:
  class_path: RolloutDataModule
  init_args:
    env: lit_rl.envs.multi_agent:ReplicatedEnv
    env_kwargs: {env: CartPole-v1, num_agents: 2}
    rollout_length: 16
    max_env_steps: 256
    evaluation: {episodes: 2}
trainer: {accelerator: cpu, devices: 1, enable_progress_bar: false, enable_model_summary: false, logger: false}
"""


def test_several_policies_run_from_a_config(capsys: pytest.CaptureFixture) -> None:
    Path("several.yaml").write_text(SEVERAL)
    lit_rl("fit", "--config", "several.yaml", "--model.policies.first.lr", "2e-3")
    (checkpoint,) = Path().rglob("*.ckpt")
    saved = torch.load(checkpoint, weights_only=True)
    assert saved["state_dict"]["env_steps"] == 256
    assert saved["hyper_parameters"]["policies"]["first"]["options"]["lr"] == 2e-3
    lit_rl("validate", "--config", "several.yaml", "--ckpt_path", str(checkpoint))
    assert "second/eval/return_mean" in capsys.readouterr().out
    lit_rl("play", str(checkpoint), "--episodes", "1")
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Episode 1: return")]
    assert "(agent_0 " in line and ", agent_1 " in line


TEAM = SEVERAL.replace("{class_path: Random}", "{class_path: PPO, init_args: {minibatch_size: 32}}").replace(
    "    policy_mapping:", "    critic_groups: [[first, second]]\n    policy_mapping:"
)


def test_policies_of_a_config_share_networks() -> None:
    Path("team.yaml").write_text(TEAM)
    lit_rl("fit", "--config", "team.yaml", "--model.encoder_groups", "[[second, first]]")
    (checkpoint,) = Path().rglob("*.ckpt")
    algorithm = MultiAgent.load_from_checkpoint(checkpoint)
    first, second = algorithm.algorithms.values()
    assert first.critic is second.critic and first.policy.encoder is second.policy.encoder
    assert algorithm.hparams["encoder_groups"] == [["second", "first"]]


@pytest.mark.parametrize(
    ("groups", "words"),
    [
        ("[first, second]", "critic_groups=['first', 'second']: expected a list of groups, such as [['a', 'b']]."),
        ("[[first, 2]]", "critic_groups=[['first', 2]]: expected a list of groups, such as [['a', 'b']]."),
        ("[[first, third]]", "critic_groups: 'third': expected policies whose algorithms are trained"),
    ],
)
def test_what_is_wrong_with_groups_is_told(capsys: pytest.CaptureFixture, groups: str, words: str) -> None:
    Path("team.yaml").write_text(TEAM.replace("[[first, second]]", groups))
    assert words in fails(capsys, "fit", "--config", "team.yaml")[1]


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("critic_groups=[a,d]", "critic_groups=['a', 'd']: expected a list of groups, such as [['a', 'b']]."),
        ("encoder_groups=a", "encoder_groups=a: expected a list of groups, such as [['a', 'b']]."),
        ("train=first", "train=first: expected a list of keys."),
    ],
)
def test_a_wrong_form_of_a_list_is_told_in_one_sentence(
    capsys: pytest.CaptureFixture, argument: str, words: str
) -> None:
    Path("team.yaml").write_text(TEAM)
    line = fails(capsys, "fit", "--config", "team.yaml", f"--model.{argument}")[1]
    assert line == f"lit-rl: error: {words}"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("lr: 1.0e-3", "lrr: 1.0e-3"), "policies: there is no option 'lrr'. Did you mean 'lr'?"),
        (("lr: 1.0e-3", "lr: -1"), "lr=-1.0: expected a number, above 0."),
        (("Random", "Randm"), "there is no class Randm"),
        (("agent_1: second", "agent_1: third"), "'third' for 'agent_1': expected one of the policies"),
    ],
)
def test_what_is_wrong_inside_of_policies_is_told(
    capsys: pytest.CaptureFixture, change: tuple[str, str], words: str
) -> None:
    Path("several.yaml").write_text(SEVERAL.replace(*change))
    assert words in fails(capsys, "fit", "--config", "several.yaml")[1]


MIXED = SEVERAL.replace("{class_path: Random}", "{class_path: DQN}").replace(
    "    evaluation:", "    replay: {learning_starts: 64, batch_size: 32, update_to_data: 0.1}\n    evaluation:"
)


@pytest.mark.parametrize("form", ["of all", "by policy", "as a class"])
def test_replay_of_some_policies_is_said_in_a_config(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options = "{learning_starts: 64, batch_size: 32, update_to_data: 0.1}"
    forms = {
        "of all": options,
        "by policy": f"{{second: {options}}}",
        "as a class": f"{{class_path: lit_rl.Replay, init_args: {options}}}",
    }
    Path("mixed.yaml").write_text(MIXED.replace(options, forms[form]))
    more = {"of all": ["--data.replay.n_step", "2"], "by policy": ["--data.replay.second.n_step", "2"]}
    taken = []
    setup = ReplayFeeds.setup
    monkeypatch.setattr(ReplayFeeds, "setup", lambda *x, **more: taken.append(x[2]) or setup(*x, **more))
    lit_rl("fit", "--config", "mixed.yaml", *more.get(form, []))
    n_step = None if form == "as a class" else 2
    assert taken == [{"second": Replay(learning_starts=64, batch_size=32, update_to_data=0.1, n_step=n_step)}]
    (checkpoint,) = Path().rglob("*.ckpt")
    weights = load_plainly(checkpoint)["state_dict"]
    assert int(weights["algorithms.first.updates"]) == 16 // 8 and int(weights["algorithms.second.updates"]) > 5
    assert list(Path(f"{checkpoint}.d").glob("rank_0/*.pt"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ((", batch_size", ", batch_sise"), "replay: there is no option 'batch_sise'. Did you mean 'batch_size'?"),
        (("{learning_starts: 64, ", "{second: {learning_start: 64}, x: {"), "there is no option 'learning_start'"),
        (("batch_size: 32", "batch_size: 128"), "learning_starts=64: expected at least batch_size=128 env steps"),
        (("{learning_starts: 64, batch_size: 32, update_to_data: 0.1}", "3"), "replay=3: "),
    ],
)
def test_what_is_wrong_inside_of_replay_is_told(
    capsys: pytest.CaptureFixture, change: tuple[str, str], words: str
) -> None:
    text = MIXED.replace(*change)
    Path("mixed.yaml").write_text(text.replace("0.1}", "0.1}}") if "x: {" in text else text)
    assert words in fails(capsys, "fit", "--config", "mixed.yaml")[1]


def test_an_unknown_option_of_one_policy_is_named(capsys: pytest.CaptureFixture) -> None:
    Path("several.yaml").write_text(SEVERAL)
    code, line = fails(capsys, "fit", "--config", "several.yaml", "--model.policies.first.lrr", "1")
    assert code == 2 and "policies.first.lrr=1: there is no option 'lrr'. Did you mean 'lr'?" in line


def test_recorded_data_is_learned_from_by_a_config_and_by_options(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    rows = np.arange(40)
    table = {
        "x": rows % 10, "v": rows, "push": rows % 2, "r": rows % 3, "end": rows % 10 == 9, "run": rows // 10
    }  # fmt: skip
    pq.write_table(pa.table(table), tmp_path / "log.parquet")
    columns = {"observation": ["x", "v"], "action": "push", "reward": "r", "terminated": "end", "episode": "run"}
    data = {"paths": str(tmp_path / "log.parquet"), "columns": columns, "max_updates": 20, "updates_per_batch": 5}
    config = {
        "model": {"class_path": "DQN"}, "data": {"class_path": "OfflineDataModule", "init_args": data},
        "trainer": {"logger": False, "accelerator": "cpu", "enable_checkpointing": False},
    }  # fmt: skip
    Path("offline.yaml").write_text(yaml.safe_dump(config))
    lit_rl("fit", "--config", "offline.yaml", "--data.validation_fraction", "0.25")
    assert "20.0/20.0" in capsys.readouterr().out
    for arguments, words in (
        (["--data.max_updates", "null"], "The run has no end: set data.max_updates"),
        (["--data.paths", "gone.parquet"], "paths='gone.parquet': there is no such file or folder."),
        (["--data.paths", f"[{tmp_path}/log.parquet, gone]"], "paths='gone': there is no such file or folder."),
        (["--data.columns.action", "pull"], "there is no column 'pull'. There are 'x', 'v', 'push'"),
        (["--data.preset", "d4lr"], "expected one of 'rllib', 'd4rl', 'lerobot'"),
    ):
        assert words in fails(capsys, "fit", "--config", "offline.yaml", *arguments)[1]
