"""The policy of value-based algorithms: the action with the greatest value."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn

from lit_rl.distributions import Categorical
from lit_rl.errors import SpaceError
from lit_rl.networks import NetworkFactory, orthogonal
from lit_rl.networks.q import QHead, set_noise
from lit_rl.policy.base import Policy, State, built_in
from lit_rl.spec import EnvSpec
from lit_rl.trees import Tree

DISTRIBUTIONAL = (None, "categorical", "quantile")


class Greedy(Categorical):
    """A Discrete action by the values of all: the greatest one's, with log-probability 0."""

    def sample(self, parameters: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        return parameters.argmax(-1), np.zeros(parameters.shape[:-1], np.float32)

    def uniform(self, legal: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return super().sample(legal, rng)[0]

    def evaluate(self, parameters: Tensor, action: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        raise NotImplementedError("A greedy policy has no log-probabilities.")


@built_in
class QPolicy(Policy):
    """Takes the legal action of the greatest value; with probability `epsilon`, while it explores, any legal one.

    Args:
        spec: the environment's spaces; the action space is Discrete.
        network: as in `Policy`.
        dueling, hidden_sizes: see `networks.q.QHead`.
        noisy: sigma0 of noisy layers, by which it then explores; None for plain ones.
        distributional: None, "categorical" or "quantile".
        num_atoms: of the distribution.
        v_min, v_max: the lowest and the greatest return of a categorical distribution.
    """

    head: nn.Linear | QHead

    def __init__(
        self,
        spec: EnvSpec,
        *,
        network: NetworkFactory | dict[str, Any] | None = None,
        dueling: bool = False,
        noisy: float | None = None,
        distributional: str | None = None,
        num_atoms: int = 51,
        v_min: float = -10.0,
        v_max: float = 10.0,
        hidden_sizes: Sequence[int] = (),
    ):
        if not isinstance(spec.action_space, spaces.Discrete):
            raise SpaceError(
                f"A value-based policy needs a Discrete action space, got {spec.action_space} from env "
                f"{spec.env_id!r}. Use SAC for continuous actions, PPO for any."
            )
        arguments: dict[str, Any] = {
            "dueling": dueling,
            "noisy": noisy,
            "distributional": distributional,
            "num_atoms": num_atoms,
            "v_min": v_min,
            "v_max": v_max,
            "hidden_sizes": list(hidden_sizes),
        }
        self._head_arguments = arguments  # what build_head, which is called now, reads
        super().__init__(spec, network=network)
        self._arguments = arguments
        self.distribution = Greedy(int(spec.action_space.n), int(spec.action_space.start))

    def build_head(self, num_features: int) -> None:
        num_actions, options = self.distribution.num_outputs, self._head_arguments
        if not (options["dueling"] or options["distributional"] or options["hidden_sizes"] or options["noisy"]):
            self.head = orthogonal(nn.Linear(num_features, num_actions), gain=1.0)
            return
        support = None
        if options["distributional"] == "categorical":
            support = torch.linspace(options["v_min"], options["v_max"], options["num_atoms"])
        self.head = QHead(
            num_features,
            num_actions,
            num_atoms=options["num_atoms"] if options["distributional"] else 1,
            dueling=options["dueling"],
            noisy=options["noisy"],
            hidden_sizes=options["hidden_sizes"],
            support=support,
        )

    def step(self, obs: Tree, state: State = None, deterministic: bool = False) -> tuple[Tree, np.ndarray, State]:
        if self._head_arguments["noisy"] is not None:
            set_noise(self.head, None if deterministic else self.rng)
        return super().step(obs, state, deterministic)

    def distributions(self, features: Tensor) -> Tensor:
        """What the head says of each action, [*B, A, Z]; see `QHead.distributions`."""
        head = self.head
        return head.distributions(features) if isinstance(head, QHead) else head(features).float().unsqueeze(-1)

    def expectation(self, distributions: Tensor) -> Tensor:
        """Values [*B, A]; those of illegal actions are as the network has them."""
        return self.head.expectation(distributions) if isinstance(self.head, QHead) else distributions.squeeze(-1)
