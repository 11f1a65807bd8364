"""`info` is the user's: of what environments put there, what was asked for is read, and nothing else."""

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lit_rl.errors import EnvError


def asked_for(info: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    """The values of those keys that are there, as they are now."""
    return {key: copy.copy(info[key]) for key in keys if key in info}


def metric(key: str, value: Any) -> float | None:
    """A value that was asked for as a number; None if it is NaN, which counts as absent.

    Raises:
        EnvError: if it is not a number.
    """
    try:
        number = float(value)
    except (TypeError, ValueError, LookupError) as error:
        raise EnvError(f"info_metrics: info[{key!r}]={value!r} is not a number.") from error
    return None if math.isnan(number) else number


class GathersInfo:
    """For vector environments: puts each environment's value into an array of objects, as it is.

    gymnasium's take the type and the shape of the first environment's value for all.

    Attributes:
        num_envs: how many there are.
        info_keys: what is gathered, of `info` and of `final_info`.
    """

    num_envs: int
    info_keys: Sequence[str] = ()

    def _add_info(self, vector_infos: dict[str, Any], env_info: dict[str, Any], env_num: int) -> dict[str, Any]:
        for key in self.info_keys:
            if key in env_info:
                self._put(vector_infos, key, env_info[key], env_num)
        return vector_infos

    def _add_final(self, infos: dict[str, Any], final_obs: Any, final_info: dict[str, Any], i: int) -> dict[str, Any]:
        """The end of environment i's episode, as autoreset mode SAME_STEP shows it."""
        self._put(infos, "final_obs", final_obs, i)
        infos["final_info"] = self._add_info(infos.get("final_info", {}), final_info, i)
        infos.setdefault("_final_info", np.zeros(self.num_envs, np.bool_))[i] = True
        return infos

    def _put(self, infos: dict[str, Any], key: str, value: Any, i: int) -> None:
        if key not in infos:
            infos[key], infos[f"_{key}"] = np.full(self.num_envs, None, object), np.zeros(self.num_envs, np.bool_)
        infos[key][i] = value
        infos[f"_{key}"][i] = True
