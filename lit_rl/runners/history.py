"""The actions of episodes under way, from which a resumed run comes to the same point again."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

LONGEST = 100_000  # env steps: a longer episode is not kept


class ActionHistory:
    """What each environment was given since its episode began.

    Args:
        num_envs: how many there are.
    """

    def __init__(self, num_envs: int):
        # Pieces of one fragment each, as arrays by path; None if the episode is too long.
        self._pieces: list[list[dict[str, np.ndarray]] | None] = [[] for _ in range(num_envs)]

    def add(self, view: Mapping[str, np.ndarray], ended: np.ndarray, lengths: np.ndarray) -> None:
        """Take in a fragment's rows.

        Args:
            view: with `is_init` and the parts of `action`, each [B, T, ...].
            ended: whether an episode begins after the last row, [B].
            lengths: env steps of the episodes under way, [B].
        """
        paths = [path for path in view if path == "action" or path.startswith("action/")]
        for b, is_init in enumerate(view["is_init"]):
            begun = is_init.nonzero()[0].tolist()
            pieces = [] if begun else self._pieces[b]
            if ended[b]:
                pieces = []
            elif pieces is None or lengths[b] > LONGEST:
                pieces = None
            else:
                first = begun[-1] if begun else 0
                pieces.append({path: view[path][b, first:].copy() for path in paths})
            self._pieces[b] = pieces

    def state(self) -> list[dict[str, torch.Tensor] | None]:
        """Of each environment its actions [n, ...] by path, {} if it made no step yet, None if they are too many."""

        def joined(pieces: list[dict[str, np.ndarray]]) -> dict[str, torch.Tensor]:
            paths = pieces[0] if pieces else ()
            return {path: torch.from_numpy(np.concatenate([piece[path] for piece in pieces])) for path in paths}

        return [None if pieces is None else joined(pieces) for pieces in self._pieces]

    def load(self, b: int, actions: Mapping[str, Any]) -> None:
        """Go on from what `state` said of environment b."""
        self._pieces[b] = [{path: tensor.numpy() for path, tensor in actions.items()}] if actions else []
