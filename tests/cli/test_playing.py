"""`lit-rl play` and the Video callback: the right environment, the right episodes, files that can be played."""

import functools
import gc
import importlib
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces

import lit_rl.viewing.video
from lit_rl import PPO, Evaluation, MultiAgent, MultiAgentEnv, Random, RolloutDataModule, Video, cli, load_policy
from lit_rl.envs.make import EnvConfig
from lit_rl.errors import OptionError
from lit_rl.viewing.playing import environment_of, episode_seeds, play_episodes
from lit_rl.viewing.video import check_renders


class Painter(gym.Env):
    """Episodes of `length` steps and pictures of one colour: red grows by 10 a step."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}

    def __init__(self, length: int = 4, render_mode: str | None = None, fail_at: int = -1, grow_at: int = -1):
        self.observation_space = spaces.Box(-1.0, 1.0, (1,), np.float32)
        self.action_space = spaces.Discrete(2)
        self.render_mode, self._length, self._fail_at, self._grow_at = render_mode, length, fail_at, grow_at

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self._t = 0
        return np.zeros(1, np.float32), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
        self._t += 1
        return np.zeros(1, np.float32), 1.0, self._t == self._length, False, {}

    def render(self) -> np.ndarray | None:
        if self.render_mode is None:
            return None
        if self._t == self._fail_at:
            raise ValueError("out of paint")
        return np.full((32, 64 if self._t == self._grow_at else 48, 3), (10 * self._t, 0, 0), np.uint8)


class Blind(Painter):
    """Takes a render_mode, and has none."""

    metadata = {"render_modes": []}


class Painters(MultiAgentEnv):
    """Two agents in turns, "a" leaves after two of four steps; the picture is of one colour: red grows by 10 a step.

    "b" is rewarded for what "a" did first.
    """

    metadata = {"render_modes": ["rgb_array", "human"], "render_fps": 10}
    possible_agents = ("a", "b")
    modes: list[str | None] = []  # of all that were made

    def __init__(self, render_mode: str | None = None):
        self.render_mode = render_mode
        self.modes.append(render_mode)

    def observation_space(self, agent: str) -> gym.Space:
        return spaces.Box(-1.0, 1.0, (1,))

    def action_space(self, agent: str) -> gym.Space:
        return spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[dict, dict]:
        self._t = 0
        return {"a": np.zeros(1, np.float32)}, {}

    def step(self, actions: dict[str, Any]) -> tuple[dict, dict, dict, dict, dict]:
        self._t += 1
        if self._t == 1:
            self._first = float(actions["a"])
        obs = {"a" if self._t == 1 else "b": np.zeros(1, np.float32)} if self._t < 4 else {}
        return obs, {"a": 1.0, "b": self._first}, {"a": self._t == 2, "b": self._t == 4}, {}, {}

    def render(self) -> np.ndarray | None:
        return None if self.render_mode != "rgb_array" else np.full((32, 48, 3), (10 * self._t, 0, 0), np.uint8)


class BlindPainters(Painters):
    """Take a render_mode, and have none."""

    metadata: dict[str, Any] = {}


def train(make_trainer: Any, env: Any = "CartPole-v1", path: str = "a.ckpt", **options: Any) -> str:
    """A checkpoint after one rollout."""
    data = RolloutDataModule(env, num_envs_per_env_runner=2, rollout_length=16, max_env_steps=32, seed=0, **options)
    trainer = make_trainer(limit_val_batches=0)
    trainer.fit(PPO(minibatch_size=32, num_epochs=1), data)
    trainer.save_checkpoint(path)
    return path


def frames_of(path: str | Path) -> list[np.ndarray]:
    import imageio.v2 as imageio

    return [np.asarray(frame)[..., :3] for frame in imageio.get_reader(path)]


def fails(capsys: pytest.CaptureFixture, *args: str) -> str:
    with pytest.raises(SystemExit):
        cli.main(list(args))
    *_, line = capsys.readouterr().err.strip().splitlines()  # before it perhaps that there is no display
    assert line.startswith("lit-rl: error: ")
    return line


def test_play_prints_each_episode_and_the_mean_and_repeats_itself(make_trainer, capsys) -> None:
    path = train(make_trainer)
    cli.main(["play", path, "--episodes", "3", "--seed", "7"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == [
        "Episode 1",
        "Episode 2",
        "Episode 3",
        "Mean of 3 on CartPole-v1, greedy",
    ]
    returns = [float(line.split("return ")[1].split(",")[0]) for line in lines]
    assert returns[-1] == pytest.approx(np.mean(returns[:3]), rel=1e-4)
    cli.main(["play", path, "--episodes", "2", "--seed", "7"])
    assert capsys.readouterr().out.splitlines()[:2] == lines[:2]
    cli.main(["play", path, "--episodes", "3", "--seed", "7", "--stochastic"])
    assert capsys.readouterr().out.splitlines()[:3] != lines[:3]


def test_a_checkpoint_knows_its_environments_options_and_wrappers(make_trainer, capsys) -> None:
    limit = {"gymnasium.wrappers:TimeLimit": {"max_episode_steps": 3}}
    path = train(make_trainer, "Pendulum-v1", env_kwargs={"g": 1.5}, wrappers=[limit])
    found = environment_of(path)
    assert (found.env, found.env_kwargs, found.wrappers) == ("Pendulum-v1", {"g": 1.5}, [limit])
    cli.main(["play", path, "--episodes", "1"])
    assert "length 3" in capsys.readouterr().out
    cli.main(["play", path, "--episodes", "1", "--wrappers", "[]", "--env_kwargs", "{}"])
    assert "length 200" in capsys.readouterr().out


def test_what_was_a_callable_is_refused_with_the_option_that_names_it(make_trainer, capsys) -> None:
    path = train(make_trainer, functools.partial(gym.make, "CartPole-v1"))
    line = fails(capsys, "play", path)
    assert "--env package.module:Class" in line and path in line
    cli.main(["play", path, "--env", "CartPole-v1", "--episodes", "1"])
    assert "Mean of 1 on CartPole-v1" in capsys.readouterr().out


def test_a_file_does_not_decide_what_is_imported(make_trainer, capsys) -> None:
    path = train(make_trainer, "test_playing:Painter", env_kwargs={"length": 6})
    assert fails(capsys, "play", path).endswith("if you trust it, add --env test_playing:Painter.")
    cli.main(["play", path, "--episodes", "1", "--env", "test_playing:Painter"])
    assert "length 6" in capsys.readouterr().out  # the checkpoint's own options
    checkpoint = torch.load(path, weights_only=True)
    for wrapper in ("os:system", "gymnasium.wrappers:no_such", "gymnasium.envs.registration:make"):
        checkpoint["lit_rl"]["env"] = {
            "env": "CartPole-v1",
            "env_kwargs": {},
            "wrappers": [wrapper],
            "vectorization": "sync",
        }
        torch.save(checkpoint, "evil.ckpt")
        assert f"names the wrapper {wrapper}" in fails(capsys, "play", "evil.ckpt")


def test_copies_of_an_environment_import_nothing_unasked_either(make_trainer, capsys) -> None:
    copies, hidden = "lit_rl.envs.multi_agent:ReplicatedEnv", "lit_rl.envs.cartpole:HideVelocities"
    path = train(
        make_trainer, copies, env_kwargs={"env": "CartPole-v1", "wrappers": [hidden]},
        wrappers=["lit_rl.envs.multi_agent:AgentId"],
    )  # fmt: skip
    cli.main(["play", path, "--episodes", "1"])
    assert "agent_1" in capsys.readouterr().out
    checkpoint = torch.load(path, weights_only=True)
    for kwargs, what in (
        ({"env": "evil:Env"}, "names the environment evil:Env"),
        ({"env": "CartPole-v1", "wrappers": ["os:system"]}, "names the wrapper os:system"),
    ):
        checkpoint["lit_rl"]["env"] = {"env": copies, "env_kwargs": kwargs, "wrappers": [], "vectorization": "sync"}
        torch.save(checkpoint, "evil.ckpt")
        assert what in fails(capsys, "play", "evil.ckpt")


def test_an_older_checkpoint_is_played_by_its_id_and_another_environment_is_refused(make_trainer, capsys) -> None:
    checkpoint = torch.load(train(make_trainer), weights_only=True)
    del checkpoint["lit_rl"]["env"]
    torch.save(checkpoint, "old.ckpt")
    cli.main(["play", "old.ckpt", "--episodes", "1"])
    capsys.readouterr()
    checkpoint["lit_rl"]["policy"]["spec"]["env_id"] = "somewhere:Else"
    torch.save(checkpoint, "older.ckpt")
    assert "somewhere:Else: an older lit_rl wrote it. Add --env package.module:Class" in fails(
        capsys, "play", "older.ckpt"
    )
    assert "The policy was made for CartPole-v1" in fails(capsys, "play", "old.ckpt", "--env", "Pendulum-v1")
    checkpoint["lit_rl"] |= {"env": None}  # as of recorded data, or of an environment given as an object
    checkpoint["lit_rl"]["policy"]["spec"]["env_id"] = "CartPole-v1"
    torch.save(checkpoint, "recorded.ckpt")
    said = fails(capsys, "play", "recorded.ckpt")
    assert said.endswith("its run had none, or was given an object in place of a name. Add --env CartPole-v1.")


@pytest.mark.parametrize("ending", ["mp4", "gif"])
def test_a_video_has_every_picture_of_every_episode(make_trainer, ending: str) -> None:
    path = train(make_trainer, "test_playing:Painter")
    cli.main(["play", path, "--env", "test_playing:Painter", "--episodes", "2", "--video", f"new/a.{ending}"])
    red = [frame[..., 0].mean() for frame in frames_of(f"new/a.{ending}")]
    expected = [0, 10, 20, 30, 40, 0, 10, 20, 30, 40]  # two episodes of 4 steps, and no third
    assert red == pytest.approx(expected, abs=3)


def test_a_recorded_policy_plays_as_one_that_is_not(make_trainer) -> None:
    path = train(make_trainer)
    env, seeds = environment_of(path), episode_seeds(0, 2)
    plain = [(e.return_, e.length) for e in play_episodes(env, load_policy(path), seeds)]
    recorded = [(e.return_, e.length) for e in play_episodes(env, load_policy(path), seeds, video="a.mp4")]
    assert recorded == plain
    assert len(frames_of("a.mp4")) == sum(length + 1 for _, length in plain)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--video", "a.avi"], ["video='a.avi'", ".mp4 or .gif"]),
        (["--episodes", "0"], ["episodes=0"]),
        (["--env", "NoSuch-v0"], ["NoSuch-v0"]),
        (["--env", "test_playing:Painter", "--video", "a.mp4", "--env_kwargs", "{fail_at: 0}"], ["out of paint"]),
        (["--network", "nowhere:Net"], ["network='nowhere:Net'"]),
        (["--episode", "3"], ["episode"]),
    ],
)
def test_a_mistake_is_answered_in_one_sentence(make_trainer, capsys, arguments: list, words: list) -> None:
    line = fails(capsys, "play", train(make_trainer), *arguments)
    assert all(word in line for word in words), line
    assert "gone.ckpt does not exist" in fails(capsys, "play", "gone.ckpt")


PAINTER = ["--env", "test_playing:Painter", "--episodes", "1"]


@pytest.mark.parametrize(
    ("video", "words"),
    [
        ("folder.mp4", ["video='folder.mp4' cannot be written", "directory"]),
        ("folder.gif", ["video='folder.gif' cannot be written", "directory"]),
        ("afile/a.mp4", ["video='afile/a.mp4' cannot be written", "afile"]),
        ("full.mp4", ["video='full.mp4' cannot be written", "disk may be full"]),
        ("full.gif", ["video='full.gif' cannot be written", "No space left"]),
    ],
)
def test_a_video_that_cannot_be_written_is_told_and_not_blamed_on_the_environment(
    make_trainer, capfd, video: str, words: list
) -> None:
    path = train(make_trainer, "test_playing:Painter")
    for ending in ("mp4", "gif"):
        Path(f"folder.{ending}").mkdir()
        Path(f"full.{ending}").symlink_to("/dev/full")
    Path("afile").touch()
    capfd.readouterr()
    with pytest.raises(SystemExit) as caught:
        cli.main(["play", path, *PAINTER, "--video", video])
    gc.collect()  # a writer that is left over tries again
    (line,) = capfd.readouterr().err.strip().splitlines()
    assert all(word in line for word in words) and "raised in" not in line, line
    assert caught.value.code == 2


@pytest.mark.parametrize("ending", ["mp4", "gif"])
def test_pictures_that_change_their_size_are_told_and_leave_no_file(make_trainer, capsys, ending: str) -> None:
    path = train(make_trainer, "test_playing:Painter")
    line = fails(capsys, "play", path, *PAINTER, "--env_kwargs", "{grow_at: 3}", "--video", f"a.{ending}")
    assert "picture of shape (32, 64, 3) after one of (32, 48, 3)" in line and "raised in" not in line
    assert not Path(f"a.{ending}").exists()


def test_without_a_display_it_plays_and_says_how_to_record(make_trainer, capsys, monkeypatch) -> None:
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    cli.main(["play", train(make_trainer), "--episodes", "1"])
    assert "--video" in capsys.readouterr().err


def test_with_a_display_the_environment_is_made_to_show_itself(make_trainer, capsys, monkeypatch) -> None:
    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    modes, make = [], gym.make
    monkeypatch.setattr(
        gym, "make", lambda *args, **kwargs: modes.append(kwargs.get("render_mode")) or make(*args, **kwargs)
    )
    cli.main(["play", train(make_trainer), "--episodes", "1"])
    assert modes[-1] == "human"


# --- the callback ------------------------------------------------------------------------------------------------


def fit(make_trainer: Any, env: Any, *callbacks: Any, **options: Any) -> Any:
    data = RolloutDataModule(
        env, num_envs_per_env_runner=2, rollout_length=16, rollouts_per_epoch=1, max_env_steps=160, seed=0,
        **{"evaluation": Evaluation(episodes=1)} | options,
    )  # fmt: skip
    algorithm = PPO(minibatch_size=32, num_epochs=1)
    torch.manual_seed(0)
    make_trainer(callbacks=list(callbacks)).fit(algorithm, data)
    return algorithm


def test_videos_come_after_the_first_every_third_and_the_last_evaluation(make_trainer, tmp_path) -> None:
    fit(make_trainer, Painter, Video(every_n_evaluations=3, format="gif"))
    names = sorted(path.name for path in (tmp_path / "videos").iterdir())
    assert names == [f"{env_steps:09d}.gif" for env_steps in (32, 128, 160)]
    red = [frame[0, 0, 0] for frame in frames_of(tmp_path / "videos" / names[0])]
    assert red == pytest.approx([0, 10, 20, 30, 40], abs=3)


def test_training_goes_on_as_it_would_without_videos(make_trainer, tmp_path) -> None:
    with_, without = fit(make_trainer, "CartPole-v1", Video(every_n_evaluations=2)), fit(make_trainer, "CartPole-v1")
    assert len(list((tmp_path / "videos").glob("*.mp4"))) == 3  # 1st, 3rd and 5th of five
    for a, b in zip(with_.parameters(), without.parameters()):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_an_environment_without_pictures_is_refused_before_training(make_trainer) -> None:
    for env in ("envs:CounterEnv", Blind):
        with pytest.raises(OptionError, match=r"cannot render pictures for a video"):
            fit(make_trainer, env, Video())


def test_a_picture_that_fails_costs_the_video_and_not_the_run(make_trainer, tmp_path, caplog) -> None:
    algorithm = fit(make_trainer, Painter, Video(), env_kwargs={"fail_at": 2})
    assert algorithm.env_steps_done == 160
    assert not list((tmp_path / "videos").iterdir())
    (first, *_) = [r.getMessage() for r in caplog.records if r.getMessage().startswith("No video after")]
    assert "out of paint" in first


def test_the_environment_is_the_evaluations(make_trainer, tmp_path) -> None:
    longer = Evaluation(episodes=1, env_kwargs={"length": 6})
    fit(make_trainer, Painter, Video(every_n_evaluations=9, format="gif"), evaluation=longer)
    assert len(frames_of(tmp_path / "videos" / "000000032.gif")) == 7
    with pytest.raises(OptionError, match="out of paint"):
        fit(make_trainer, Painter, Video(), evaluation=Evaluation(episodes=1, env_kwargs={"fail_at": 0}))


@pytest.mark.parametrize("full", [False, True])
def test_a_file_that_cannot_be_written_costs_the_video_and_not_the_run(make_trainer, tmp_path, caplog, full) -> None:
    if full:
        (tmp_path / "videos").mkdir()
        (tmp_path / "videos" / "000000032.gif").symlink_to("/dev/full")
    else:
        (tmp_path / "videos").touch()
    algorithm = fit(make_trainer, Painter, Video(every_n_evaluations=9, format="gif"))
    assert algorithm.env_steps_done == 160
    told = [r.getMessage() for r in caplog.records if r.getMessage().startswith("No video after")]
    assert len(told) == (1 if full else 2) and "cannot be written" in told[0]


@pytest.mark.slow
def test_wandb_is_handed_the_file(make_trainer, tmp_path, monkeypatch) -> None:
    from lightning.pytorch.loggers import WandbLogger

    logger = WandbLogger(save_dir=tmp_path, project="p", offline=True)
    logged: list[dict] = []
    monkeypatch.setattr(logger, "log_metrics", lambda metrics, step=None: logged.append(metrics))
    data = RolloutDataModule(
        Painter,
        num_envs_per_env_runner=1,
        rollout_length=16,
        max_env_steps=16,
        evaluation=Evaluation(episodes=1),
        seed=0,
    )
    make_trainer(logger=logger, callbacks=[Video()]).fit(PPO(minibatch_size=16, num_epochs=1), data)
    (entry,) = [metrics for metrics in logged if "eval/video" in metrics]
    assert entry["env_steps"] == 16 and entry["eval/video"]._format == "mp4"


def test_the_extra_that_is_missing_is_named_when_it_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lit_rl.viewing.video.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(OptionError, match=r"imageio_ffmpeg: pip install 'lit-rl\[video\]'"):
        Video()


def test_frames_per_second_are_the_environments() -> None:
    assert check_renders(EnvConfig(Painter)) == 10.0


# --- several agents ----------------------------------------------------------------------------------------------


def test_a_video_of_several_agents_has_a_picture_of_every_env_step(make_trainer) -> None:
    path = train(make_trainer, "test_playing:Painters")
    cli.main(["play", path, "--env", "test_playing:Painters", "--episodes", "2", "--video", "a.gif"])
    red = [frame[..., 0].mean() for frame in frames_of("a.gif")]
    assert red == pytest.approx([0, 10, 20, 30, 40, 0, 10, 20, 30, 40], abs=3)


def test_copies_of_an_environment_are_shown_side_by_side(make_trainer) -> None:
    replicated = {"env": Painter, "num_agents": 3, "length": 2}
    path = train(make_trainer, "lit_rl.envs.multi_agent:ReplicatedEnv", env_kwargs=replicated)
    env = EnvConfig("lit_rl.envs.multi_agent:ReplicatedEnv", replicated)
    list(play_episodes(env, load_policy(path), [0], video="a.gif"))
    assert [frame.shape for frame in frames_of("a.gif")] == [(32, 3 * 48, 3)] * 3
    assert env.make_multi_agent().render() is None  # it was not made to render


def test_a_game_of_pettingzoo_is_recorded(make_trainer) -> None:
    game = "pettingzoo.classic.tictactoe_v3"
    path = train(make_trainer, game, env_kwargs={"screen_height": 96})
    cli.main(["play", path, "--env", game, "--episodes", "1", "--video", "a.mp4"])
    first, *others = frames_of("a.mp4")
    assert first.shape == (96, 96, 3) and 5 <= len(others) <= 9
    assert all(np.abs(a.astype(int) - b).max() > 50 for a, b in zip([first, *others], others))  # a square each time


def test_videos_of_several_agents_leave_training_as_it_is_also_beside_random_ones(make_trainer, tmp_path) -> None:
    def trained(*callbacks: Any, limit: float = 1.0) -> MultiAgent:
        algorithm = MultiAgent(
            {"learns": PPO(minibatch_size=16, num_epochs=1), "random": Random()},
            policy_mapping={"a": "random", "b": "learns"},
        )
        data = RolloutDataModule(
            Painters,
            num_envs_per_env_runner=1,
            rollout_length=32,
            rollouts_per_epoch=1,
            max_env_steps=96,
            seed=0,
            evaluation=Evaluation(episodes=1),
        )
        torch.manual_seed(0)
        make_trainer(callbacks=list(callbacks), limit_val_batches=limit).fit(algorithm, data)
        return algorithm

    with_, without = trained(Video(every_n_evaluations=2, format="gif")), trained(limit=0)
    assert [len(frames_of(path)) for path in (tmp_path / "videos").iterdir()] == [5, 5]  # after 32 and 96
    for a, b in zip(with_.parameters(), without.parameters()):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("env", ["test_playing:BlindPainters", "agent_envs:MaskedInTurns"])
def test_several_agents_without_pictures_are_refused_in_one_sentence(make_trainer, capsys, env: str) -> None:
    path = train(make_trainer, env)
    assert f"env={env} cannot render pictures for a video" in fails(
        capsys, "play", path, "--env", env, "--video", "a.mp4"
    )
    with pytest.raises(OptionError, match="cannot render pictures for a video"):
        fit(make_trainer, env, Video())


@pytest.mark.parametrize("display", [True, False])
def test_several_agents_are_shown_in_a_window_where_there_is_a_display(
    make_trainer, capsys, monkeypatch, display: bool
) -> None:
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    if display:
        monkeypatch.setenv("DISPLAY", ":0")
    path, play = train(make_trainer, "test_playing:Painters"), ["--env", "test_playing:Painters", "--episodes", "1"]
    cli.main(["play", path, *play])
    assert (importlib.import_module("test_playing").Painters.modes[-1] == "human") == display
    assert ("--video play.mp4" in capsys.readouterr().err) != display
