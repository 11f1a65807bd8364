"""Policies that are written, not learned."""

import copy
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from lit_rl.distributions import distribution_for
from lit_rl.errors import EnvError, LitRLError
from lit_rl.masks import ACTION_MASK, ActionMasks, split_mask
from lit_rl.observations import short
from lit_rl.spec import EnvSpec
from lit_rl.trees import map_tree, row_converter


@runtime_checkable
class Scripted(Protocol):
    """What is asked of a scripted policy. It may also have `begin(spec, rng)`, called once before it acts."""

    def act(self, obs: Any) -> Any:
        """The action for one observation, both as the environment has them."""


class Random(Scripted):
    """Acts at random, by legal actions alone."""

    def begin(self, spec: EnvSpec, rng: np.random.Generator) -> None:
        self._rng = rng
        self._distribution = distribution_for(spec.action_space)
        mask_space = split_mask(spec.observation_space)[1]
        self._masks = None
        if mask_space is not None:
            self._masks = ActionMasks(mask_space, spec.action_space, self._distribution)
            self._as_rows = row_converter(mask_space)

    def act(self, obs: Any) -> Any:
        legal = np.zeros((1, self._distribution.num_outputs), np.float32)
        if self._masks is not None:
            self._masks.apply_numpy(legal, map_tree(lambda x: x[None], self._as_rows(obs[ACTION_MASK])))
        action = self._distribution.uniform(legal, self._rng)
        return self._distribution.to_env(map_tree(lambda x: x[0], action))


class Script:
    """A scripted policy at work: begins it, and looks at what it does.

    Args:
        policy_id: how messages name it.
        scripted: what acts; a copy of it does.
        spec: of the agents that act by it.
        rng: handed to it.
    """

    def __init__(self, policy_id: str, scripted: Scripted, spec: EnvSpec, rng: np.random.Generator):
        self.rng = rng
        # Of its own: what evaluation begins and draws must not change what training does next.
        self._scripted = scripted = copy.deepcopy(scripted)
        self._policy_id, self._spec = policy_id, spec
        mask_space = split_mask(spec.observation_space)[1]
        self._has_mask = mask_space is not None and hasattr(spec.action_space, "n")
        begin = getattr(scripted, "begin", None)
        if begin is not None:
            begin(spec, rng)

    def act(self, observations: Sequence[Any]) -> list[Any]:
        """Actions for observations.

        Raises:
            EnvError: if one is not legal.
        """
        return [self._checked(obs, self._act(obs)) for obs in observations]

    def _act(self, obs: Any) -> Any:
        try:
            return self._scripted.act(obs)
        except LitRLError:
            raise
        except Exception as error:
            raise EnvError(
                f"policies[{self._policy_id!r}] raised in act: {type(error).__name__}: {error}. Mend the policy."
            ) from error

    def _checked(self, obs: Any, action: Any) -> Any:
        space = self._spec.action_space
        problem = None if space.contains(action) else f"expected one of {short(space)}"
        if problem is None and self._has_mask and not obs[ACTION_MASK][int(action) - int(space.start)] > 0:  # type: ignore[attr-defined]
            problem = "the action_mask forbids it"
        if problem:
            raise EnvError(f"policies[{self._policy_id!r}] acted by {short(action)}: {problem}. Mend the policy.")
        return action
