"""Pictures of an environment while a policy plays it: in a window, or as a video file without a display."""

import contextlib
import importlib.util
import io
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np

from lit_rl.envs.make import EnvConfig
from lit_rl.envs.multi_agent import MultiAgentEnv, MultiAgentWrapper, has_agents, metadata_of
from lit_rl.envs.pettingzoo import adapted
from lit_rl.errors import EnvError, OptionError, write_error
from lit_rl.options import check_ending

NEEDED = {".mp4": ("imageio", "imageio_ffmpeg"), ".gif": ("imageio",)}
MAX_GIF_FPS = 50  # viewers show pictures of less than 20 ms far too slowly


def check_format(option: str, path: str | Path) -> None:
    """Refuse a video file that cannot be written.

    Raises:
        OptionError: if its ending is neither .mp4 nor .gif, or what writes it is not installed.
    """
    ending = check_ending(option, path, tuple(NEEDED))
    missing = [name for name in NEEDED[ending] if importlib.util.find_spec(name) is None]
    if missing:
        raise OptionError(f"A {ending} video needs {' and '.join(missing)}: pip install 'lit-rl[video]'.")


def rendering(env: EnvConfig, mode: str) -> EnvConfig:
    """The same environment made with `render_mode=mode`, one at a time.

    Raises:
        OptionError: for a native vector environment, which has no single one to be seen.
    """
    if env.vectorization == "native":
        raise OptionError(
            f"env={env.env_id} with vectorization='native' cannot be rendered: its vector form shows no pictures."
        )
    os.environ.setdefault("SDL_AUDIODRIVER", "dummy")  # pygame's complaints where there is no sound
    if not display_is_there():
        os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
        os.environ.setdefault("MUJOCO_GL", "egl")  # MuJoCo's own choice needs a display
    return replace(env, env_kwargs={**env.env_kwargs, "render_mode": mode}, vectorization="sync")


def check_renders(env: EnvConfig) -> float:
    """Frames per second of an environment that renders "rgb_array", tried out on its first picture.

    Raises:
        OptionError: if it does not.
    """
    refusal = f"env={env.env_id} cannot render pictures for a video"
    try:
        shown = rendering(env, "rgb_array")
        made: Any = shown.make_multi_agent() if env.is_multi_agent else shown.make()
    except EnvError as error:
        raise OptionError(f"{refusal}: with render_mode='rgb_array' it cannot be made ({error})") from error
    try:
        if "rgb_array" not in render_modes(made):
            raise OptionError(f"{refusal}: metadata['render_modes'] has no 'rgb_array'.")
        made.reset(seed=0)
        frame: Any = made.render()
    except OptionError:
        raise
    except Exception as error:
        message = " ".join(str(error).split())
        raise OptionError(f"{refusal}: render() raised {type(error).__name__}: {message}") from error
    finally:
        made.close()
    if not _is_picture(frame):
        got = f"{frame.dtype} {frame.shape}" if isinstance(frame, np.ndarray) else type(frame).__name__
        raise OptionError(f"{refusal}: render() returned {got}, expected uint8 of shape [height, width, 3].")
    return frames_per_s(made)


def render_modes(env: Any) -> tuple[str, ...]:
    """The ways in which an environment, of one agent or several, says that it can be seen."""
    return tuple(metadata_of(env).get("render_modes", ()))


def frames_per_s(env: Any) -> float:
    """What the environment's metadata says; 30 where it says nothing."""
    return float(metadata_of(env).get("render_fps") or 30)


def display_is_there() -> bool:
    """Whether a window can be shown."""
    return sys.platform in ("darwin", "win32") or any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY"))


def shows_window(env: EnvConfig) -> bool:
    """Whether there is a display, and an environment that uses it; says so where not."""
    modes: tuple[str, ...] = ()
    if env.vectorization != "native":
        made: Any = env.make_multi_agent() if env.is_multi_agent else env.make()
        modes = render_modes(made)
        made.close()
    instead = "Record the episodes: --video play.mp4"
    if "human" not in modes:
        print(
            f"{env.env_id} has no window to show. {instead if 'rgb_array' in modes else ''}".rstrip(), file=sys.stderr
        )
        return False
    if not display_is_there():
        print(f"There is no display, so no window is shown. {instead}", file=sys.stderr)
        return False
    return True


def framed(env: Any, add: Callable[[np.ndarray], None]) -> Any:
    """An environment, of one agent or several, that hands a picture to `add` after each reset and step."""
    env = adapted(env)
    return AgentFrames(env, add) if has_agents(env) else Frames(env, add)


class Frames(gym.Wrapper):
    """See `framed`."""

    def __init__(self, env: gym.Env, add: Callable[[np.ndarray], None]):
        super().__init__(env)
        self._picture, self._add = _Pictures(env), add

    def reset(self, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        result = self.env.reset(**kwargs)
        self._add(self._picture())
        return result

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        result = self.env.step(action)
        self._add(self._picture())
        return result


class AgentFrames(MultiAgentWrapper):
    """See `framed`. A reset that no step follows is left out: it was made to look for action masks."""

    def __init__(self, env: MultiAgentEnv, add: Callable[[np.ndarray], None]):
        super().__init__(env)
        self._picture, self._add = _Pictures(env), add
        self._first: np.ndarray | None = None  # of the episode, until a step follows

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[dict, dict]:
        result = super().reset(seed=seed, options=options)
        self._first = np.array(self._picture())
        return result

    def step(self, actions: dict[str, Any]) -> tuple[dict, dict, dict, dict, dict]:
        result = super().step(actions)
        if self._first is not None:
            self._add(self._first)
            self._first = None
        self._add(self._picture())
        return result


class _Pictures:
    """Takes pictures of an environment, all of one size."""

    def __init__(self, env: Any):
        self._env = env
        self._shape: tuple[int, ...] | None = None

    def __call__(self) -> np.ndarray:
        frame: Any = self._env.render()
        if not _is_picture(frame):
            raise EnvError(f"render() of {self._env} returned no picture: expected uint8 of shape [height, width, 3].")
        self._shape = self._shape or frame.shape
        if frame.shape != self._shape:
            raise EnvError(
                f"render() of {self._env} returned a picture of shape {frame.shape} after one of {self._shape}: a "
                "video needs pictures of one size. Mend the environment."
            )
        return frame


class VideoFile(contextlib.AbstractContextManager):
    """An .mp4 or .gif file that pictures are added to. It is whole once it is closed; an error removes it.

    Args:
        path: the file; its folder is made.
        fps: pictures per second. A .gif of more than 50 leaves some out.

    Raises:
        OptionError: if it cannot be written; later too.
    """

    def __init__(self, path: Path, fps: float):
        import imageio.v2 as imageio

        self._path, self._every, self._count = path, 1, 0
        if path.suffix.lower() == ".gif":
            self._every = int(np.ceil(fps / MAX_GIF_FPS))
            # To memory first: imageio tries to write a file again, with a traceback, where it could not.
            self._gif: io.BytesIO | None = io.BytesIO()
            options: dict[str, Any] = {"format": "GIF", "duration": 1000 * self._every / fps, "loop": 0}  # duration: ms
        else:
            self._gif = None
            # The sides must be even, no more. What ffmpeg says of a full disk fills the screen.
            options = {"fps": fps, "macro_block_size": 2, "ffmpeg_log_level": "quiet"}
        with self._writing():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.open("wb").close()  # ffmpeg would not say why it cannot
            self._writer = imageio.get_writer(self._gif or path, mode="I", **options)

    def add(self, frame: np.ndarray) -> None:
        if self._count % self._every == 0:
            with self._writing():
                self._writer.append_data(frame)
        self._count += 1

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        try:
            with self._writing():
                self._writer.close()
                if self._gif is not None:
                    self._path.write_bytes(self._gif.getvalue())
                if kind is None and not self._path.stat().st_size:
                    raise OSError("nothing of it arrived, the disk may be full")
        except OptionError:
            self._remove()
            if kind is None:
                raise
        if kind is not None and issubclass(kind, Exception):  # one that is interrupted is kept
            self._remove()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OptionError(
                f"video={str(self._path)!r} cannot be written: {write_error(error)}. Give another file, or make room."
            ) from error

    def _remove(self) -> None:
        with contextlib.suppress(OSError):
            self._path.unlink()


def _is_picture(frame: Any) -> bool:
    return isinstance(frame, np.ndarray) and frame.dtype == np.uint8 and frame.ndim == 3 and frame.shape[-1] == 3
