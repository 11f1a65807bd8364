"""Checkpoints under kills, full disks and damage: a whole one is always there, and none is read that is not whole."""

import errno
import fcntl
import io
import itertools
import logging
import os
import re
import resource
import signal
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lit_rl import PPO, RolloutDataModule, load_policy
from lit_rl.errors import CheckpointError
from lit_rl.files.checkpoint import LitCheckpointIO, files_beside
from lit_rl.files.loading import previous_of, read_checkpoint, read_first, read_one
from lit_rl.files.snapshots import CHUNK_ROWS, Snapshots

PATH, PREVIOUS = Path("x.ckpt"), Path("x.ckpt.previous")
OPEN = io.open


def content(number: int) -> dict[str, Any]:
    """A checkpoint that can be told from others by its number."""
    return {"state_dict": {"number": torch.tensor(number), "weights": torch.arange(2000) + number}, "text": "words"}


def number_of(checkpoint: dict[str, Any]) -> int:
    number = int(checkpoint["state_dict"]["number"])
    assert torch.equal(checkpoint["state_dict"]["weights"], torch.arange(2000) + number)
    return number


def save(*numbers: int) -> None:
    for number in numbers:
        LitCheckpointIO().save_checkpoint(content(number), PATH)


def temporary_files() -> list[Path]:
    return list(Path().rglob(".*tmp"))


# --- writing --------------------------------------------------------------------------------------------------------


class Faulty(io.FileIO):
    """A file that writes so many bytes, and then has a fault."""

    def __init__(self, path: Any, mode: str, num_bytes: int, fault: Callable[[], None]):
        super().__init__(path, mode)
        self.left, self.fault = num_bytes, fault

    def write(self, data: Any) -> int:
        data = memoryview(data).cast("B")
        if data.nbytes > self.left:
            super().write(data[: self.left])
            self.fault()
        self.left -= data.nbytes
        return super().write(data) or 0


def fail_after(num_bytes: int, fault: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Give new files a fault."""

    def open_(path: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        return Faulty(path, mode, num_bytes, fault) if "x" in mode else OPEN(path, mode, *args, **kwargs)

    monkeypatch.setattr(io, "open", open_)


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def in_child(work: Callable[[], object]) -> int:
    """What a process exits with that does `work`; below zero if it was killed."""
    pid = os.fork()
    if not pid:
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


class Dead(BaseException):
    """Raised where a process would be killed: as fast as 200 of them have to be."""


def test_a_kill_at_any_of_200_bytes_leaves_the_checkpoint_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    save(0)
    for number, num_bytes in enumerate(np.linspace(0, PATH.stat().st_size, 200).astype(int).tolist()):
        with monkeypatch.context() as patch:

            def die() -> None:
                patch.setattr(Path, "unlink", lambda *_, **__: None)
                raise Dead

            fail_after(num_bytes, die, patch)
            with pytest.raises((Dead, CheckpointError)):  # torch may have an error of its own on the way out
                save(number + 1)
        assert number_of(read_one(PATH)) == 0
        assert len(temporary_files()) == 1  # this one's: it has removed that of the one before
    save(201)
    assert number_of(read_one(PATH)) == 201 and number_of(read_one(PREVIOUS)) == 0
    assert not temporary_files()


def test_a_killed_process_leaves_the_checkpoint_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    save(0)
    for num_bytes in np.linspace(0, PATH.stat().st_size, 10).astype(int).tolist():

        def work(num_bytes: int = num_bytes) -> None:
            fail_after(num_bytes, kill, monkeypatch)
            save(1)

        assert in_child(work) == -signal.SIGKILL
        assert number_of(read_one(PATH)) == 0
        assert len(temporary_files()) == 1
    save(1)
    assert not temporary_files()


def save_with_replay(number: int) -> None:
    """A checkpoint with a replay buffer of two chunks, of which the second is another one each time."""
    Path("staging").mkdir(exist_ok=True)
    column = np.zeros(CHUNK_ROWS + 1, np.int64)
    column[-1] = number
    files = SNAPSHOTS.write(Path("staging"), {"column": column}, len(column), {})
    SNAPSHOTS.touch(np.array([CHUNK_ROWS]))
    replay = {"files": files, "folder": "staging"}
    section = {"format": 2, "ranks": [{"data": {"replay": replay}}]}
    LitCheckpointIO().save_checkpoint(content(number) | {"lit_rl": section}, PATH)


SNAPSHOTS = Snapshots(2 * CHUNK_ROWS)


def check_replay(checkpoint: dict[str, Any]) -> set[str]:
    """The names of a checkpoint's replay files, which are whole and its own."""
    files = checkpoint["lit_rl"]["ranks"][0]["data"]["replay"]["files"]
    column = np.zeros(CHUNK_ROWS + 1, np.int64)
    Snapshots(2 * CHUNK_ROWS).read(files_beside(PATH) / "rank_0", files, {"column": column})
    assert column[-1] == number_of(checkpoint)
    return set(files)


OPERATIONS = ("open", "os.link", "os.rename", "os.remove", "os.mkdir", "fcntl.flock")


@pytest.mark.parametrize("hard_links", [True, False])
def test_a_kill_between_any_two_operations_leaves_a_whole_checkpoint(
    hard_links: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not hard_links:

        def refuse(*_: object) -> None:
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))

        monkeypatch.setattr(os, "link", refuse)
    save_with_replay(0)
    save_with_replay(1)
    for last in itertools.count():  # the operation that is not done any more
        number = last + 2

        def work(last: int = last, number: int = number) -> None:
            operations = itertools.count()

            def hook(event: str, _: object) -> None:
                if event in OPERATIONS and next(operations) == last:
                    kill()

            sys.addaudithook(hook)
            save_with_replay(number)

        code = in_child(work)
        found = read_checkpoint(PATH)
        check_replay(found)
        if code == 0:
            break
        assert code == -signal.SIGKILL
        assert PATH.exists() or not hard_links
    assert last > 15 and number_of(found) == number
    kept = read_one(PREVIOUS)
    assert check_replay(found) | check_replay(kept) == {path.name for path in Path("x.ckpt.d/rank_0").iterdir()}
    assert not temporary_files()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_failed_write_is_named_and_leaves_what_was_there(code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def fault() -> None:
        raise OSError(code, os.strerror(code))

    save(0, 1)
    for num_bytes in np.linspace(0, PATH.stat().st_size, 25).astype(int).tolist():
        with monkeypatch.context() as patch:
            fail_after(num_bytes, fault, patch)
            with pytest.raises(CheckpointError, match=rf"^Cannot write the checkpoint x\.ckpt: .*{os.strerror(code)}"):
                save(2)
    for operation in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, operation, lambda *_: fault())
            with pytest.raises(CheckpointError, match=rf"^Cannot write the checkpoint x\.ckpt: .*{os.strerror(code)}"):
                save(2)
    assert number_of(read_one(PATH)) == 1
    assert not temporary_files()


def test_a_disk_that_is_full_in_earnest_leaves_what_was_there() -> None:
    save(0)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(CheckpointError, match=r"Cannot write the checkpoint x\.ckpt: .*File too large"):
            save(1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert number_of(read_one(PATH)) == 0
    assert not temporary_files()


@pytest.mark.parametrize("path", ["/proc/x.ckpt", "/proc/folder/x.ckpt", "file/x.ckpt"])
def test_a_folder_that_cannot_be_written_to_is_named(path: str) -> None:
    Path("file").touch()
    with pytest.raises(CheckpointError, match=f"^Cannot write the checkpoint {path}: "):
        LitCheckpointIO().save_checkpoint(content(0), path)


def test_the_folder_for_temporary_files_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/proc/nowhere")
    monkeypatch.setenv("TMPDIR", "/proc/nowhere")
    save(0, 1)
    assert number_of(read_one(PATH)) == 1


def test_only_temporary_files_that_nobody_writes_are_removed() -> None:
    stray, live, other = Path(".x.ckpt.1.lit_rl.tmp"), Path(".y.ckpt.2.lit_rl.tmp"), Path(".other.tmp")
    for path in (stray, live, other):
        path.touch()
    with live.open("r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        save(0)
        assert not stray.exists() and live.exists() and other.exists()
    save(1)
    assert not live.exists()


# --- the previous one -----------------------------------------------------------------------------------------------


def test_the_checkpoint_that_is_replaced_stays_with_its_replay_files() -> None:
    for number in range(4):
        save_with_replay(number)
    newest, previous = read_one(PATH), read_one(PREVIOUS)
    assert (number_of(newest), number_of(previous)) == (3, 2)
    files = check_replay(newest), check_replay(previous)
    assert (
        len(files[0]) == len(files[1]) == 2 and len(files[0] & files[1]) == 1
    )  # they share the chunk that is the same
    assert {path.name for path in Path("x.ckpt.d/rank_0").iterdir()} == files[0] | files[1]
    LitCheckpointIO().remove_checkpoint(PATH)
    assert not list(Path().glob("*x.ckpt*"))


@pytest.mark.parametrize("same_object", [True, False])
def test_a_damaged_checkpoint_does_not_replace_the_previous_one(same_object: bool) -> None:
    writer = LitCheckpointIO()
    for number in range(2):
        writer.save_checkpoint(content(number), PATH)
    flip(PATH, 5000)
    (writer if same_object else LitCheckpointIO()).save_checkpoint(content(2), PATH)
    assert (number_of(read_one(PATH)), number_of(read_one(PREVIOUS))) == (2, 0)


def test_what_this_process_wrote_is_not_read_again_to_replace_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lit_rl.files.checkpoint.read_one", lambda path: pytest.fail(f"read {path}"))
    writer = LitCheckpointIO()
    with monkeypatch.context() as patch:
        patch.setattr("lit_rl.files.checkpoint.read_one", read_one)
        writer.save_checkpoint(content(0), PATH)
    for number in range(1, 4):
        writer.save_checkpoint(content(number), PATH)
    assert (number_of(read_one(PATH)), number_of(read_one(PREVIOUS))) == (3, 2)


# --- reading --------------------------------------------------------------------------------------------------------


def flip(path: Path, at: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << bit
    path.write_bytes(data)


def damaged(data: bytes, rng: np.random.Generator) -> bytes:
    """Other bytes: of a disk, a transfer or a mistake."""
    at, length = int(rng.integers(len(data))), int(rng.integers(1, 100))
    kind = rng.integers(8)
    if kind <= 2:
        return data[:at] + bytes([data[at] ^ 1 << int(rng.integers(8))]) + data[at + 1 :]
    if kind == 3:
        return data[:at]
    if kind == 4:
        return data[:at] + rng.bytes(length) + data[at + length :]
    if kind == 5:
        return data[:at] + data[at + length :]
    if kind == 6:
        return data + rng.bytes(length)
    return bytes(len(data))


def assert_falls_back(caplog: pytest.LogCaptureFixture) -> None:
    """The damage is told in one sentence, and the previous one is taken with one line."""
    with pytest.raises(CheckpointError, match=r"^Checkpoint x\.ckpt [^\n]*$"):
        read_one(PATH)
    caplog.clear()
    assert number_of(read_checkpoint(PATH)) == 0
    (line,) = caplog.messages
    assert re.fullmatch(r"Checkpoint x\.ckpt (is|holds) .*; x\.ckpt\.previous is taken instead\.", line)


def test_200_damaged_files_are_all_found_and_the_previous_one_is_taken(caplog: pytest.LogCaptureFixture) -> None:
    save(0, 1)
    data, rng = PATH.read_bytes(), np.random.default_rng(0)
    for _ in range(200):
        PATH.write_bytes(damaged(data, rng))
        assert_falls_back(caplog)


@pytest.mark.parametrize("region", ["first", "last"])
def test_every_bit_of_a_files_ends_counts(region: str) -> None:
    save(0)
    data = PATH.read_bytes()
    places = range(150) if region == "first" else range(len(data) - 150, len(data))
    for at in places:  # the zip's records, the comment and the digest in it
        PATH.write_bytes(data)
        flip(PATH, at, at % 8)
        with pytest.raises(CheckpointError, match=r"x\.ckpt is damaged"):
            read_one(PATH)


@pytest.mark.parametrize("what", ["zip", "plain", "digest", "nothing"])
def test_a_foreign_file_is_not_taken_for_the_checkpoint(what: str, caplog: pytest.LogCaptureFixture) -> None:
    save(2)
    other = PATH.read_bytes()
    LitCheckpointIO().remove_checkpoint(PATH)
    save(0, 1)
    if what == "zip":
        with zipfile.ZipFile(PATH, "w") as archive:
            archive.writestr("archive/data.pkl", b"words")
    elif what == "plain":
        torch.save({"weights": torch.ones(3)}, PATH)
    elif what == "digest":  # another file's
        PATH.write_bytes(PATH.read_bytes()[:-64] + other[-64:])
    else:
        PATH.unlink()
        with pytest.raises(CheckpointError, match=r"^Checkpoint x\.ckpt does not exist\.$"):
            read_one(PATH)
        assert number_of(read_checkpoint(PATH)) == 0
        return
    assert_falls_back(caplog)


def test_plain_torch_reads_a_file_with_a_digest_and_a_file_without_one_is_checked_by_its_zip() -> None:
    save(0)
    for mmap in (False, True):
        assert number_of(torch.load(PATH, weights_only=True, mmap=mmap)) == 0
    torch.save(content(1), "plain.ckpt")
    assert number_of(read_one("plain.ckpt")) == 1
    flip(Path("plain.ckpt"), 5000)
    torch.load("plain.ckpt", weights_only=True)  # silently
    with pytest.raises(CheckpointError, match=r"plain\.ckpt is damaged .* contents of plain/data/1 are not"):
        read_one("plain.ckpt")


def test_nothing_is_unpickled_before_it_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    save(0)
    flip(PATH, 5000)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(CheckpointError, match="its contents are not those that were written"):
        read_one(PATH)


def test_two_damaged_files_are_named_in_one_sentence() -> None:
    save(0, 1)
    for path in (PATH, PREVIOUS):
        flip(path, 5000)
    with pytest.raises(CheckpointError, match=r"^Checkpoint x\.ckpt is .*; Checkpoint x\.ckpt\.previous is [^.]*\.$"):
        read_checkpoint(PATH)
    PREVIOUS.unlink()
    with pytest.raises(CheckpointError, match=r"^Checkpoint x\.ckpt is damaged [^;]*\.$"):
        read_checkpoint(PATH)


def test_the_first_whole_one_of_several_is_taken_with_one_line(caplog: pytest.LogCaptureFixture) -> None:
    paths = [Path(f"{number}.ckpt") for number in range(3)]
    for number, path in enumerate(paths):
        LitCheckpointIO().save_checkpoint(content(number), path)
    flip(paths[0], 5000)
    flip(paths[1], 5000)
    path, checkpoint = read_first(paths)
    assert path == paths[2] and number_of(checkpoint) == 2
    assert len(caplog.messages) == 1 and all(path.name in caplog.text for path in paths)


# --- replay files ---------------------------------------------------------------------------------------------------


def replay_files() -> tuple[dict[str, list], list[Path]]:
    """What a checkpoint says of its replay files, and where they are."""
    save_with_replay(0)
    files = read_one(PATH)["lit_rl"]["ranks"][0]["data"]["replay"]["files"]
    return files, [Path("x.ckpt.d/rank_0") / name for name in files]


def read_replay(files: Any) -> None:
    column = np.zeros(CHUNK_ROWS + 1, np.int64)
    Snapshots(2 * CHUNK_ROWS).read(Path("x.ckpt.d/rank_0"), files, {"column": column})


def test_200_damaged_replay_files_are_all_found() -> None:
    files, paths = replay_files()
    read_replay(files)
    rng, whole = np.random.default_rng(0), [path.read_bytes() for path in paths]
    for number in range(200):
        path, data = paths[number % 2], whole[number % 2]
        path.write_bytes(damaged(data, rng))
        with pytest.raises(CheckpointError, match=rf"^The checkpoint's replay buffer {path} is missing or damaged: "):
            read_replay(files)
        path.write_bytes(data)
    read_replay(files)


@pytest.mark.parametrize("damage", ["missing", "swapped", "another checkpoint's"])
def test_replay_files_that_are_not_the_checkpoints_own_are_found(damage: str) -> None:
    files, (first, second) = replay_files()
    if damage == "missing":
        second.unlink()
    elif damage == "swapped":
        first_data = first.read_bytes()
        first.write_bytes(second.read_bytes())
        second.write_bytes(first_data)
    else:
        save_with_replay(1)
        (new,) = set(Path("x.ckpt.d/rank_0").iterdir()) - {first, second}
        second.write_bytes(new.read_bytes())
    with pytest.raises(CheckpointError, match="is missing or damaged"):
        read_replay(files)


def test_replay_files_of_an_older_version_are_checked_by_their_zip() -> None:
    files, (first, _) = replay_files()
    read_replay(list(files))
    flip(first, first.stat().st_size // 2)
    with pytest.raises(CheckpointError, match="is missing or damaged"):
        read_replay(list(files))


def test_a_chunk_is_hashed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from lit_rl.files import digests

    described = []
    monkeypatch.setattr(digests, "describe", lambda file: described.append(file.name) or [0, ""])
    snapshots, columns = Snapshots(4 * CHUNK_ROWS), {"column": np.zeros(4 * CHUNK_ROWS)}
    snapshots.write(Path(), columns, 4 * CHUNK_ROWS, {})
    assert len(described) == 4
    snapshots.touch(np.array([0]))
    snapshots.write(Path(), columns, 4 * CHUNK_ROWS, {})
    assert len(described) == 5


# --- the ways to load -----------------------------------------------------------------------------------------------


def test_every_way_to_load_takes_the_previous_one(make_trainer, caplog: pytest.LogCaptureFixture) -> None:
    options: dict[str, Any] = {"num_envs_per_env_runner": 4, "rollout_length": 32, "seed": 0}
    algorithm, trainer = PPO(minibatch_size=64, num_epochs=1), make_trainer(limit_val_batches=0)
    trainer.fit(algorithm, RolloutDataModule("CartPole-v1", max_env_steps=128, **options))
    trainer.save_checkpoint(PATH)
    trainer.save_checkpoint(PATH)
    assert not previous_of(PATH).exists()  # where the user saves, no file appears that was not asked for
    trainer.strategy.checkpoint_io = LitCheckpointIO()
    trainer.save_checkpoint(PATH)
    flip(PATH, PATH.stat().st_size // 2)
    obs = np.full(4, 0.1, np.float32)
    assert load_policy(PATH).act(obs)[0] == algorithm.policy.act(obs)[0]
    assert PPO.load_from_checkpoint(str(PATH)).env_steps_done == 128
    again = PPO(minibatch_size=64, num_epochs=1)
    data = RolloutDataModule("CartPole-v1", max_env_steps=256, **options)
    make_trainer(limit_val_batches=0).fit(again, data, ckpt_path=PATH)
    assert again.env_steps_done == 256
    lines = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len([line for line in lines if line.endswith(f"{previous_of(PATH)} is taken instead.")]) == 3


@pytest.mark.parametrize("content", [{"state_dict": {}}, {"state_dict": {}, "pytorch-lightning_version": "2.6.6"}])
def test_a_checkpoint_of_another_program_is_named(content: dict, tmp_path: Path, make_trainer) -> None:
    path = tmp_path / "foreign.ckpt"
    torch.save(content, path)
    data = RolloutDataModule("CartPole-v1", rollout_length=16, max_env_steps=128, seed=0)
    with pytest.raises(CheckpointError, match=f"Checkpoint {path} was not written by a lit_rl algorithm"):
        make_trainer().fit(PPO(minibatch_size=16), data, ckpt_path=path)
