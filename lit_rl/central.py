"""What a central critic sees beside an agent's own observation."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from lit_rl.errors import OptionError
from lit_rl.masks import split_mask
from lit_rl.options import OneOf
from lit_rl.spec import EnvSpec, MultiAgentSpec

CentralInput = Annotated[str, OneOf("state", "observations")]


def central_space(spec: MultiAgentSpec, kind: str) -> spaces.Dict:
    """The space of a central critic's inputs.

    "state": the environment's `state()`. "observations": those of all agents by slot, without action masks, and which
    slots have an agent, `alive`; zeros stand for one that is not there. With both goes `agent_id`, one-hot: the entry
    of `possible_agents` whose value it is.

    Args:
        spec: the agents.
        kind: "state" or "observations".

    Raises:
        OptionError: if the environment does not give it.
    """
    agent_id = spaces.MultiBinary(len(spec.agents))
    if kind == "observations":
        found = spaces.Tuple([split_mask(space)[0] for space in slot_spaces(spec)])
        alive = spaces.MultiBinary(spec.num_slots)
        return spaces.Dict(OrderedDict(observations=found, alive=alive, agent_id=agent_id))
    if spec.state_space is None:
        raise OptionError(
            f"central_critic='state': env={spec.env_id} has no state() with a state_space, an attribute, that "
            "lit_rl handles. Use 'observations', or give the environment both."
        )
    return spaces.Dict(OrderedDict(state=spec.state_space, agent_id=agent_id))


def kind_of(space: gym.Space | None) -> str | None:
    """Of which kind a `central_space` is; None if there is none."""
    if space is None:
        return None
    assert isinstance(space, spaces.Dict)
    return "state" if "state" in space.spaces else "observations"


def slot_spaces(spec: MultiAgentSpec) -> list[gym.Space]:
    """The space of what the agent in each slot observes.

    Raises:
        OptionError: if agents of different patterns, which take each other's slots, have different ones.
    """
    roster, found = spec.roster, list[gym.Space | None]([None] * spec.num_slots)
    for name in roster.names:
        space = spec.agents[name].observation_space
        for slot in roster.slots_of([name]):
            other = found[slot]
            if other is not None and other != space:
                raise OptionError(
                    f"central_critic='observations': env={spec.env_id}: agents {name!r} observe {space}, those of "
                    f"another pattern {other}: expected equal spaces of all that come and go. Use 'state', or pad them."
                )
            found[slot] = space
    return [space for space in found if space is not None]


def with_central(
    spec: MultiAgentSpec, kind: str | None, names: Sequence[str] | None = None, policy_id: str | None = None
) -> EnvSpec:
    """`MultiAgentSpec.shared`, with the space that a critic of one `kind` needs; None: of one that is not central."""
    found = spec.shared(names, policy_id)
    return found if kind is None else replace(found, central_space=central_space(spec, kind))


def absent(space: gym.Space) -> np.ndarray | int:
    """What stands for a leaf of an observation that is not there: zeros, or the first value of Discrete ones."""
    start = getattr(space, "start", None)
    return np.zeros(space.shape or ()) if start is None else np.asarray(start)
