"""Tasks of the DeepMind Control Suite as environments."""

import sys
from typing import Any

import numpy as np
import pytest

from lit_rl.envs.dm_control import DMControl
from lit_rl.envs.make import EnvConfig
from lit_rl.errors import OptionError
from lit_rl.viewing.playing import TRUSTED_ENVS

WRAPPERS = "gymnasium.wrappers"
ENV = "lit_rl.envs.dm_control:DMControl"


def test_the_extra_is_asked_for_if_the_package_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dm_control.suite", None)
    monkeypatch.setenv("MUJOCO_GL", "egl")
    with pytest.raises(OptionError, match=r"DMControl\(domain='cartpole'\) needs dm_control .*lit-rl\[dm-control\]\."):
        EnvConfig(ENV).make()


@pytest.fixture
def suite(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`dm_control.suite`, if it is installed; what its import sets in the environment is undone."""
    monkeypatch.setenv("MUJOCO_GL", "egl")
    return pytest.importorskip("dm_control.suite")


def test_an_env_step_is_the_tasks_own_steps(suite: Any) -> None:
    env, task = DMControl("finger", "turn_hard", action_repeat=3), suite.load("finger", "turn_hard", {"random": 7})
    names = ["position", "velocity", "touch", "target_position", "dist_to_target"]  # not in the order of their names

    def flat(now: Any) -> np.ndarray:
        return np.concatenate([np.ravel(now.observation[name]) for name in names]).astype(np.float32)

    rng, over = np.random.default_rng(0), (False, False)
    obs, _ = env.reset(seed=7)
    assert (obs == flat(task.reset())).all() and obs in env.observation_space and obs.dtype == np.float32
    num_steps = 0
    while not any(over):
        action = rng.uniform(-1, 1, 2).astype(np.float32)
        obs, reward, *over, _ = env.step(action)
        steps = []
        while len(steps) < 3 and not (steps and steps[-1].last()):
            steps.append(task.step(action))
        assert reward == sum(step.reward for step in steps) and (obs == flat(steps[-1])).all()
        num_steps += len(steps)
    assert (num_steps, over) == (1000, [False, True])  # the time limit, in the midst of a repeated action


def test_seeds_decide_the_start_and_the_spaces_fit(suite: Any) -> None:
    config = EnvConfig(ENV, {"domain": "cartpole", "task": "swingup", "action_repeat": 2})
    spec, env = config.spec(), config.make()
    assert ENV in TRUSTED_ENVS and spec.observation_space.shape == (5,) and spec.action_space.low.tolist() == [-1.0]
    starts = [env.reset(seed=seed)[0].tolist() for seed in (1, 2, None, 1)]
    assert starts[0] == starts[3] and len({tuple(start) for start in starts}) == 3


def test_a_task_that_ends_itself_terminates(suite: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    env = DMControl("cartpole", "balance")
    env.reset(seed=0)
    monkeypatch.setattr(env._env.task, "get_termination", lambda physics: 0.0)
    assert env.step(np.zeros(1, np.float32))[2:4] == (True, False)
    env.reset(seed=0)
    monkeypatch.setattr(env._env.task, "get_termination", lambda physics: 1.0)
    assert env.step(np.zeros(1, np.float32))[2:4] == (False, True)


def test_pictures_have_the_size_that_is_asked_for(suite: Any) -> None:
    env = DMControl(action_repeat=2, render_mode="rgb_array", width=64, height=48)
    env.reset(seed=0)
    try:
        picture = env.render()
    except Exception as error:
        pytest.skip(f"nothing draws here: {error}")
    assert picture.shape == (48, 64, 3) and picture.dtype == np.uint8 and len(np.unique(picture)) > 10
    config = EnvConfig(
        ENV, {"width": 64, "height": 48, "render_mode": "rgb_array"}, [f"{WRAPPERS}:AddRenderObservation"]
    )
    assert config.spec().observation_space.shape == (48, 64, 3)
    assert env.metadata["render_fps"] == 50 and "render_fps" not in DMControl.metadata


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"domain": "cartpol"}, "domain='cartpol', task='swingup': expected one .* Did you mean 'cartpole swingup'"),
        ({"action_repeat": 0}, "action_repeat=0: expected a whole number of at least 1"),
    ],
)
def test_what_is_no_task_is_refused(suite: Any, options: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionError, match=said):
        DMControl(**options)
