"""Checkpoints: plain, whole, and enough to go on from."""

import copy
import errno
import random
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from envs import CounterEnv, TargetEnv
from helpers import assert_same
from torch import nn

from lit_rl import MLP, PPO, RolloutDataModule, load_policy
from lit_rl.errors import CheckpointError, OptionError
from lit_rl.files.checkpoint import LitCheckpointIO, check_plain, rng_state, set_rng_state
from lit_rl.files.loading import read_checkpoint

SMALL = {"num_envs_per_env_runner": 4, "rollout_length": 32, "seed": 0}
MODEL = {"minibatch_size": 64, "num_epochs": 1, "normalize_observations": True, "normalize_returns": True}


def fit(make_trainer, steps: int, path: Path | None = None, model: dict | None = None, **data) -> PPO:
    algorithm = PPO(**MODEL | (model or {}))
    module = RolloutDataModule("CartPole-v1", **{"max_env_steps": steps, "rollouts_per_epoch": 2} | SMALL | data)
    trainer = make_trainer(limit_val_batches=0)
    trainer.fit(algorithm, module, ckpt_path=path)
    trainer.save_checkpoint("out.ckpt")
    return algorithm


def test_every_checkpoint_is_plain_data_and_describes_itself(make_trainer) -> None:
    fit(make_trainer, 256)
    checkpoint = torch.load("out.ckpt", weights_only=True)
    check_plain(checkpoint, "checkpoint")
    assert checkpoint["lit_rl"]["algorithm"] == "PPO"
    assert checkpoint["lit_rl"]["policy"]["spec"]["env_id"] == "CartPole-v1"
    assert len(checkpoint["lit_rl"]["ranks"]) == 1


def test_resuming_goes_on_with_everything_that_was_saved(make_trainer) -> None:
    first = fit(make_trainer, 384)
    saved = torch.load("out.ckpt", weights_only=True)
    seen = {}

    class Watch(PPO):
        def on_train_start(self) -> None:
            super().on_train_start()
            if not seen:
                seen["rng"] = rng_state()
                seen["generator"] = self.generator.get_state()
                seen["optimizer"] = copy.deepcopy(self.optimizers(use_pl_optimizer=False).state_dict())
                seen["weights"] = {k: v.clone() for k, v in self.state_dict().items()}
                seen["carry"] = self.return_normalizer.running_return.clone()
                seen["data"] = self.trainer.datamodule.rank_state()

    algorithm = Watch(**MODEL)
    data = RolloutDataModule("CartPole-v1", max_env_steps=1024, rollouts_per_epoch=2, **SMALL)
    make_trainer(limit_val_batches=0).fit(algorithm, data, ckpt_path="out.ckpt")
    rank = saved["lit_rl"]["ranks"][0]
    assert torch.equal(seen["rng"]["torch"], rank["rng"]["torch"]) and seen["rng"]["python"] == rank["rng"]["python"]
    assert torch.equal(seen["rng"]["numpy"][1], rank["rng"]["numpy"][1])
    assert torch.equal(seen["generator"], rank["generator"])
    assert torch.equal(seen["carry"], first.return_normalizer.running_return)
    assert_same(seen["weights"], first.state_dict())  # normalisers and counters too
    assert int(seen["weights"]["env_steps"]) == 384 and int(seen["weights"]["updates"]) == 3
    assert_same(seen["optimizer"]["state"], saved["optimizer_states"][0]["state"])
    assert seen["data"]["rollouts"] == 3 and seen["data"]["episodes"] == rank["data"]["episodes"] != []
    assert algorithm.env_steps_done == 1024 and algorithm.updates_done == 8


def test_options_that_a_resumed_run_has_otherwise_are_said(make_trainer, caplog) -> None:
    fit(make_trainer, 128)
    caplog.set_level("INFO", "lightning.pytorch.utilities.rank_zero")
    for options, said in (
        (MODEL, []),
        (MODEL | {"lr": 0.5, "gamma": 0.5}, ["gamma=0.5 (was 0.99), lr=0.5 (was 0.0003)."]),
    ):
        caplog.clear()
        data = RolloutDataModule("CartPole-v1", max_env_steps=256, rollouts_per_epoch=2, **SMALL)
        make_trainer(limit_val_batches=0).fit(PPO(**options), data, ckpt_path="out.ckpt")
        start = "Resumed with other options than the checkpoint's: "
        lines = [r.getMessage() for r in caplog.records if r.getMessage().startswith("Resumed with")]
        assert lines == [start + end for end in said]


def test_resuming_in_the_middle_of_an_epoch_finishes_that_epoch(make_trainer) -> None:
    class SaveAt(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, module: PPO, *_: object) -> None:
            if module.updates_done == 4:  # the first of three rollouts of the second epoch
                trainer.save_checkpoint("middle.ckpt")

    def data() -> RolloutDataModule:
        return RolloutDataModule("CartPole-v1", max_env_steps=128 * 9, rollouts_per_epoch=3, **SMALL)

    trainer = make_trainer(limit_val_batches=0, callbacks=[SaveAt()])
    trainer.fit(PPO(**MODEL), data())
    assert (trainer.current_epoch, trainer.global_step) == (3, 18)
    algorithm, trainer = PPO(**MODEL), make_trainer(limit_val_batches=0)
    trainer.fit(algorithm, data(), ckpt_path="middle.ckpt")
    assert (trainer.current_epoch, algorithm.updates_done, trainer.global_step) == (3, 9, 18)


def test_an_unseeded_run_keeps_its_seed_when_resumed(make_trainer) -> None:
    fit(make_trainer, 128, seed=None)
    saved = torch.load("out.ckpt", weights_only=True)["lit_rl"]["ranks"][0]["data"]["seed"]
    data = RolloutDataModule("CartPole-v1", max_env_steps=256, num_envs_per_env_runner=4, rollout_length=32)
    make_trainer(limit_val_batches=0).fit(PPO(**MODEL), data, ckpt_path="out.ckpt")
    assert data.seed == saved


def test_a_resumed_run_plays_other_episodes_than_the_first(make_trainer) -> None:
    firsts = []

    class Watch(PPO):
        def update(self, batch) -> dict:
            firsts.append(batch["observation"][:, 0].clone())
            return super().update(batch)

    for steps, path in ((128, None), (256, "out.ckpt")):
        data = RolloutDataModule("CartPole-v1", max_env_steps=steps, **SMALL)
        trainer = make_trainer(limit_val_batches=0)
        trainer.fit(Watch(**MODEL), data, ckpt_path=path)
        trainer.save_checkpoint("out.ckpt")
    assert len(firsts) == 2 and not torch.equal(firsts[0], firsts[1])


def test_a_schedule_goes_on_by_env_steps(make_trainer) -> None:
    fit(make_trainer, 256, model={"lr": 1.0, "lr_schedule": [[0, 1e-3], [1280, 0.0]]})
    rates = []

    class Watch(PPO):
        def training_step(self, batch, batch_idx: int) -> None:
            rates.append(self.optimizers(use_pl_optimizer=False).param_groups[0]["lr"])
            super().training_step(batch, batch_idx)

    data = RolloutDataModule("CartPole-v1", max_env_steps=512, **SMALL)
    algorithm = Watch(**MODEL, lr=1.0, lr_schedule=[[0, 1e-3], [1280, 0.0]])
    make_trainer(limit_val_batches=0).fit(algorithm, data, ckpt_path="out.ckpt")
    assert rates == pytest.approx([0.8e-3, 0.7e-3])


def test_load_from_checkpoint_needs_nothing_else_and_a_new_fit_counts_from_zero(make_trainer) -> None:
    first = fit(make_trainer, 256, model={"lr": 0.01, "network": MLP})
    loaded = PPO.load_from_checkpoint("out.ckpt", lr=0.5)
    assert (loaded.hparams.lr, loaded.hparams.minibatch_size, loaded.env_steps_done) == (0.5, 64, 256)
    assert_same(loaded.state_dict(), first.state_dict())
    data = RolloutDataModule("CartPole-v1", max_env_steps=128, **SMALL)
    make_trainer(limit_val_batches=0).fit(loaded, data)
    assert loaded.env_steps_done == 128


class OwnNetwork(nn.Module):
    """A user's own."""

    def __init__(self, observation_space):
        super().__init__()
        self.layer = nn.Linear(observation_space.shape[0], 16)
        self.output_size = 16

    def forward(self, obs: torch.Tensor) -> torch.Tensor:
        return self.layer(obs).relu()


def test_an_own_network_trains_and_is_passed_again_when_loading(make_trainer) -> None:
    algorithm = fit(make_trainer, 256, model={"network": OwnNetwork})
    obs = np.full(4, 0.1, np.float32)
    assert load_policy("out.ckpt", network=OwnNetwork).act(obs)[0] == algorithm.policy.act(obs)[0]
    with pytest.raises(CheckpointError, match="network of your own, 'test_checkpoint:OwnNetwork': pass it as network="):
        load_policy("out.ckpt")
    with pytest.raises(CheckpointError, match="do not fit the policy's network"):
        load_policy("out.ckpt", network=MLP)
    assert PPO.load_from_checkpoint("out.ckpt", network=OwnNetwork).env_steps_done == 256


def test_a_lambda_is_refused_before_training_if_a_checkpoint_would_be_written(make_trainer) -> None:
    data = RolloutDataModule("CartPole-v1", max_env_steps=128, **SMALL)
    with pytest.raises(CheckpointError, match="network=<lambda>"):
        make_trainer(enable_checkpointing=True).fit(PPO(**MODEL, network=lambda space: MLP(space)), data)
    make_trainer(limit_val_batches=0).fit(PPO(**MODEL, network=lambda space: MLP(space)), data)


@pytest.mark.parametrize(
    "damage", ["missing", "empty", "truncated", "text", "junk", "folder", "pickle", "other", "newer"]
)
def test_a_bad_file_is_named_in_one_sentence(make_trainer, damage: str) -> None:
    import pickle

    path = Path("bad.ckpt")
    fit(make_trainer, 128)
    whole = Path("out.ckpt").read_bytes()
    if damage == "empty":
        path.write_bytes(b"")
    elif damage == "truncated":
        path.write_bytes(whole[: len(whole) // 2])
    elif damage == "text":
        path.write_text("not a checkpoint")
    elif damage == "junk":
        path.write_text("junk")
    elif damage == "folder":
        path.mkdir()
    elif damage == "pickle":
        path.write_bytes(pickle.dumps({"state_dict": _Hostile()}))
    elif damage == "other":
        torch.save({"state_dict": {}}, path)
    elif damage == "newer":
        checkpoint = torch.load("out.ckpt", weights_only=True)
        checkpoint["lit_rl"]["format"] = 99
        torch.save(checkpoint, path)
    with pytest.raises(CheckpointError) as caught:
        load_policy(path)
    assert "bad.ckpt" in str(caught.value) and "\n" not in str(caught.value)
    assert not Path("run_by_a_pickle").exists()


class _Hostile:
    def __reduce__(self) -> tuple:
        return Path("run_by_a_pickle").touch, ()


class OwnTensor(torch.Tensor):
    """A user's own."""


def test_what_cannot_be_loaded_is_refused_when_it_is_saved() -> None:
    own = torch.ones(2).as_subclass(OwnTensor)
    for value in (np.zeros(2), np.float32(1.0), Path("x"), object(), defaultdict(int), deque([1]), own):
        with pytest.raises(CheckpointError, match=r"checkpoint\['a'\]\[0\] is a "):
            LitCheckpointIO().save_checkpoint({"a": [value]}, "x.ckpt")
    assert not Path("x.ckpt").exists()


def test_what_is_not_refused_can_be_loaded() -> None:
    tensors = [
        torch.ones(2),
        nn.Parameter(torch.ones(2)),
        torch.ones(2, dtype=torch.bfloat16),
        torch.ones(2).to_sparse(),
    ]
    plain = [None, True, 1, 10**30, 0.5, "a", b"a", (1, 2), {1}, torch.Size([1]), torch.float32, torch.device("cpu")]
    content = {"state_dict": OrderedDict(a=torch.ones(2)), "tensors": tensors, 1: plain}
    LitCheckpointIO().save_checkpoint(content, "x.ckpt")
    loaded = torch.load("x.ckpt", weights_only=True)
    assert loaded.keys() == content.keys() and loaded[1] == plain


def test_a_failed_save_keeps_the_previous_file_and_leaves_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    io = LitCheckpointIO()
    io.save_checkpoint({"state_dict": {"a": torch.ones(3)}}, "x.ckpt")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("lit_rl.files.checkpoint.os.fsync", full)
    with pytest.raises(CheckpointError, match=r"Cannot write the checkpoint x\.ckpt: .*No space left"):
        io.save_checkpoint({"state_dict": {"a": torch.zeros(3)}}, "x.ckpt")
    assert torch.equal(read_checkpoint("x.ckpt")["state_dict"]["a"], torch.ones(3))
    assert [path.name for path in Path().iterdir()] == ["x.ckpt"]


def test_random_generators_go_on_where_they_were() -> None:
    state = rng_state()
    check_plain(state, "state")
    drawn = [random.random(), np.random.rand(), torch.rand(1).item()]
    set_rng_state(state)
    assert [random.random(), np.random.rand(), torch.rand(1).item()] == drawn


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"env": CounterEnv}, OptionError, "The weights are for CartPole-v1"),
        ({"model": {"normalize_returns": False}}, CheckpointError, "does not fit this PPO: return_normalizer"),
    ],
)
def test_a_checkpoint_of_something_else_is_refused(make_trainer, change: dict, error: type, words: str) -> None:
    fit(make_trainer, 128)
    data = RolloutDataModule(change.get("env", "CartPole-v1"), max_env_steps=512, **SMALL)
    algorithm = PPO(**MODEL | change.get("model", {}))
    if "env" in change:
        algorithm = PPO.load_from_checkpoint("out.ckpt")
    with pytest.raises(error, match=words):
        make_trainer().fit(algorithm, data, ckpt_path=None if "env" in change else "out.ckpt")


def test_a_checkpoint_of_format_1_is_read_as_it_was_meant(make_trainer: Callable[..., L.Trainer]) -> None:
    data = RolloutDataModule(TargetEnv, rollout_length=32, max_env_steps=512, seed=0)
    algorithm, trainer = PPO(normalize_observations=True), make_trainer()
    trainer.fit(algorithm, data)
    trainer.save_checkpoint("new.ckpt")
    checkpoint = torch.load("new.ckpt", weights_only=True)
    checkpoint["lit_rl"]["format"] = 1
    del checkpoint["lit_rl"]["policy"]["class"]
    del checkpoint["lit_rl"]["policy"]["arguments"]["state_dependent_std"]
    names = {"policy.normalizer.moments./.": "policy.normalizer.", "critic.head.linear.": "critic.head."}
    for name in list(checkpoint["state_dict"]):
        for new, old in names.items():
            if name.startswith(new):
                checkpoint["state_dict"][name.replace(new, old)] = checkpoint["state_dict"].pop(name)
    torch.save(checkpoint, "old.ckpt")
    obs = np.array([0.3])
    np.testing.assert_array_equal(load_policy("old.ckpt").act(obs)[0], load_policy("new.ckpt").act(obs)[0])
    restored = PPO.load_from_checkpoint("old.ckpt")
    torch.testing.assert_close(restored.state_dict(), algorithm.state_dict())
