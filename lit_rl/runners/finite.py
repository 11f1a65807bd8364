"""The numbers of a fragment must be finite; if one is not, the error names the first."""

import math
from collections.abc import Mapping

import numpy as np

from lit_rl.errors import EnvError

ROWS = ("observation", "action", "action_log_prob", "reward")  # numbers of one row each, not of an environment
OF_POLICY = ("action", "action_log_prob", "state")


def check_finite(
    env_id: str, view: Mapping[str, np.ndarray], begun: np.ndarray, lengths: np.ndarray, ended: np.ndarray
) -> None:
    """Refuse a fragment with numbers that are not finite. Named is what was wrong first: the rest follows.

    Once per fragment, so that it costs nothing per step.

    Args:
        env_id: how the message names the environment.
        view: the fragment's arrays by path, of its rows and, if there are any, its finals.
        begun: episodes of each environment before it, [B].
        lengths: env steps by then in the episodes under way, [B].
        ended: whether an episode begins after the last row, [B].

    Raises:
        EnvError: naming the number, the step, the episode and the environment.
    """
    with np.errstate(over="ignore", invalid="ignore"):  # the sum of finite numbers may be infinite
        suspects = [(n, x) for n, x in view.items() if x.dtype.kind == "f" and not math.isfinite(x.sum())]
    wrong = []
    for name, array in suspects:
        if not np.isfinite(array).all():
            places = [(b, k) for b, k, *_ in np.argwhere(~np.isfinite(array[:, None] if array.ndim == 1 else array))]
            wrong += [_where(name.split("/")[0], array, int(b), int(k), view) for b, k in places]
    if not wrong:
        return
    _, _, b, row, after, name, value = min(wrong)
    is_init = view["is_init"][b, : row + 1]
    episode, step = int(begun[b] + is_init.sum()) - 1, row + after
    step += -int(np.flatnonzero(is_init)[-1]) if is_init.any() else int(lengths[b])
    if name == "last_observation" and ended[b]:
        episode, step = episode + 1, 0
    what = name.removeprefix("last_").removeprefix("final_")
    raise EnvError(
        f"env={env_id}: {what}={value} at step {step} of episode {episode} of environment {b}: expected "
        f"finite numbers. {'The policy has diverged: lower lr.' if name in OF_POLICY else 'Mend the environment.'}"
    )


def _where(name: str, array: np.ndarray, b: int, k: int, view: Mapping[str, np.ndarray]) -> tuple:
    """What sorts before what it brought about, and tells the place: time, part of a step, b, row, steps after."""
    if name in ROWS:
        return k, ROWS.index(name), b, k, 0, name, array[b, k].tolist()
    if name == "final_observation":
        row = int(view["final_step"][b, k])
        return row + 1, 0, b, row, 1, name, array[b, k].tolist()
    last = view["is_init"].shape[1] - 1
    return last + 1, 0, b, last, 1, name, array[b].tolist()
