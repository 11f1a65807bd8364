"""Plays whole episodes with a policy: what evaluation and `predict` do."""

import logging
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode

from lit_rl.envs.async_vector import close
from lit_rl.envs.make import EnvConfig, autoreset_mode
from lit_rl.errors import EnvError
from lit_rl.evaluation.agent_episodes import play_agents
from lit_rl.evaluation.agent_recorder import AgentRecorder
from lit_rl.policy import Policy
from lit_rl.runners.fragment import Episode
from lit_rl.runners.stepping import check_obs, check_spaces, final_obs, read_info, reset, step
from lit_rl.trees import Tree, iterate, map_tree, row_converter

log = logging.getLogger(__name__)
LONG_EPISODE = 100_000  # env steps after which a user is told that an episode does not end


def play(
    env: EnvConfig,
    policy: Policy,
    seeds: Sequence[int],
    *,
    deterministic: bool = True,
    info_metrics: Sequence[str] = (),
    record: bool = False,
    num_envs: int = 16,
    timeout_s: float | None = None,
) -> Iterator[Episode]:
    """Play one whole episode per seed, several at a time, and yield them in the order they end.

    Environment b plays episodes b, b + num_envs, ...: which episodes are counted does not depend on how long they are.
    Each is reset with its own seed, so that the same seeds give the same episodes however many are played at a time.
    (A native vector environment resets itself: there the seeds only decide its first episodes.)

    Args:
        env: how to make the environments.
        policy: what acts, as `policy.act` does.
        seeds: one for each episode.
        deterministic: the most probable action, or a random one.
        info_metrics: keys of `info` to report for each episode.
        record: keep the transitions in `Episode.steps`, or `agent_steps`; the action as the environment was given it,
            its log-probability 0 where there was no choice.
        num_envs: the most environments at a time.
        timeout_s: seconds after which the episodes under way are yielded as they are (`cut`), and no more begun. Those
            without a step were not begun.

    Raises:
        EnvError: if the environment raises.
    """
    if env.is_multi_agent:
        recorder_of_agents = AgentRecorder() if record else None
        for episode in play_agents(
            env,
            policy,
            seeds,
            deterministic=deterministic,
            info_metrics=info_metrics,
            num_envs=num_envs,
            timeout_s=timeout_s,
            watcher=recorder_of_agents,
        ):
            if recorder_of_agents is not None and not episode.cut:
                episode = episode._replace(agent_steps=recorder_of_agents.next_episode())
            yield episode
        return
    num_envs = min(num_envs, len(seeds))
    if not num_envs:
        return
    envs = env.make_vector(num_envs, AutoresetMode.DISABLED, info_metrics)
    started = time.monotonic()
    try:
        check_spaces(envs, policy)
        mode = autoreset_mode(envs)
        remaining = [list(seeds[b::num_envs]) for b in range(num_envs)]
        seed_of = [queue.pop(0) for queue in remaining]
        obs = policy.as_rows(reset(envs, env, seed_of)[0])
        state = policy.initial_state(num_envs)
        playing, left = np.ones(num_envs, np.bool_), len(seeds)
        resetting, is_init = np.zeros(num_envs, np.bool_), np.ones(num_envs, np.bool_)
        returns, lengths = np.zeros(num_envs), np.zeros(num_envs, np.int64)
        recorder, as_action_rows = _Recorder(num_envs) if record else None, row_converter(policy.spec.action_space)
        warned = False
        while left:
            if state is not None and is_init.any():
                state = policy.reset_state(state, is_init)
            check_obs(policy, obs, lengths, resetting)
            _check_finite(env.env_id, dict(iterate(obs, "observation")), playing & ~resetting, lengths, seed_of)
            recorded, log_prob, state = policy.step(obs, state, deterministic)
            action = policy.to_env(recorded)
            if recorder is not None:  # a vector environment may write the next observations into the same arrays
                obs = map_tree(np.copy, obs)
            next_obs, reward, terminated, truncated, info = step(envs, env, action)
            next_obs = policy.as_rows(next_obs)
            real = ~resetting
            returns += np.where(real, reward, 0.0)
            lengths += real
            _check_finite(env.env_id, {"reward": np.asarray(reward)}, playing & real, lengths - 1, seed_of)
            if not warned and (lengths[playing] >= LONG_EPISODE).any():
                warned = True
                log.warning(
                    "An evaluation episode of env=%s has lasted %d env steps and goes on. If it never ends by itself, "
                    "give it a time limit: wrappers=[{'gymnasium.wrappers:TimeLimit': {'max_episode_steps': ...}}].",
                    env.env_id,
                    LONG_EPISODE,
                )
            done = terminated | truncated
            if recorder is not None:
                columns = dict(iterate(obs, "observation"))
                columns |= iterate(as_action_rows(action), "action")
                columns |= {"reward": reward, "terminated": terminated, "truncated": truncated}
                recorder.add(real, columns | {"action_log_prob": log_prob})
            is_init = done
            if mode is AutoresetMode.NEXT_STEP:
                is_init, resetting = resetting, done
            if done.any():
                last_info = info.get("final_info", info) if mode is AutoresetMode.SAME_STEP else info
                for b in np.flatnonzero(done).tolist():
                    steps = None
                    if recorder is not None:
                        steps = recorder.take(b) | _final(policy, mode, next_obs, info, b)
                    if playing[b]:
                        left -= 1
                        infos = read_info(last_info, info_metrics, b)
                        yield Episode(float(returns[b]), int(lengths[b]), infos, steps, seed_of[b])
                returns[done], lengths[done] = 0.0, 0
                next_seeds: list[int | None] = [None] * num_envs
                for b in np.flatnonzero(done & playing).tolist():
                    if remaining[b]:
                        next_seeds[b] = seed_of[b] = remaining[b].pop(0)
                    else:
                        playing[b] = False  # goes on stepping, uncounted, until the others end
                if mode is AutoresetMode.DISABLED:
                    next_obs = policy.as_rows(reset(envs, env, next_seeds, done)[0])
            obs = next_obs
            if timeout_s is not None and left and time.monotonic() - started > timeout_s:
                for b in np.flatnonzero(playing & (lengths > 0)).tolist():
                    steps = recorder.take(b) if recorder is not None else None
                    yield Episode(float(returns[b]), int(lengths[b]), {}, steps, seed_of[b], cut=True)
                return
    finally:
        close(envs)


def _check_finite(
    env_id: str, arrays: dict[str, np.ndarray], counts: np.ndarray, steps: np.ndarray, seeds: Sequence[int]
) -> None:
    """Refuse numbers [B, ...] that are not finite, in environments that count."""
    for name, array in arrays.items():
        if array.dtype.kind == "f" and not np.isfinite(array.sum()):
            wrong = ~np.isfinite(array).reshape(len(array), -1).all(1)
            for b in np.flatnonzero(wrong & counts)[:1]:
                raise EnvError(
                    f"env={env_id}: {name}={array[b].tolist()} at step {steps[b]} of the evaluation episode with seed "
                    f"{seeds[b]}: expected finite numbers. Mend the environment."
                )


def _final(policy: Policy, mode: AutoresetMode, next_obs: Tree, info: dict[str, Any], b: int) -> dict[str, np.ndarray]:
    """The final observation of environment b, whose episode ended in the step that gave `next_obs` and `info`."""
    same_step = mode is AutoresetMode.SAME_STEP  # next_obs is then the next episode's first
    found = final_obs(policy, info, b) if same_step else map_tree(lambda x: x[b], next_obs)
    return {path: np.array(array) for path, array in iterate(found, "final_observation")}


class _Recorder:
    """Keeps the rows of the episodes under way."""

    def __init__(self, num_envs: int):
        self._rows: list[list[dict[str, Any]]] = [[] for _ in range(num_envs)]

    def add(self, real: np.ndarray, columns: dict[str, np.ndarray]) -> None:
        for b in np.flatnonzero(real).tolist():
            self._rows[b].append({name: np.array(column[b]) for name, column in columns.items()})

    def take(self, b: int) -> dict[str, np.ndarray]:
        rows, self._rows[b] = self._rows[b], []
        return {name: np.asarray([row[name] for row in rows]) for name in rows[0]}
