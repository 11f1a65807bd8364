"""What a policy does in recorded rows: the densities of the recorded actions, and actions of its own.

Shapes: N rows, E episodes, F numbers of an observation, A actions of a Discrete space or D numbers of any other one, S
drawn actions, L steps of the longest of some episodes.
"""

import math
from collections.abc import Iterator

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from lit_rl.distributions import distribution_for
from lit_rl.evaluation.fitted_q import Choices
from lit_rl.networks import as_input
from lit_rl.networks.inputs import FlatInput
from lit_rl.policy import Policy
from lit_rl.policy.q import Greedy
from lit_rl.recorded import Recorded
from lit_rl.replay.recorded_feed import as_policy_acts
from lit_rl.spec import has_images, is_image
from lit_rl.trees import Tree, find, from_env, map_tree, nest, space_leaves, to_torch

BLOCK = 4096  # rows that go through the policy at a time
NUM_DRAWS = 8  # actions that stand for the policy's distribution, where they are not Discrete
MOST = 10.0  # standard deviations: beyond, what Q sees of an observation is clipped
# How the behaviour policy is fitted.
FIT_UPDATES, FIT_INTERVAL, FIT_BATCH_SIZE, FIT_LR, HELD_OUT = 3000, 250, 256, 1e-3, 0.1


class PolicyRows:
    """A policy on the CPU, in the rows of recorded episodes.

    Args:
        policy: without gradients.
        recorded: the episodes, in its spaces.
        seed: of the actions that it draws.

    Attributes:
        is_discrete: whether the actions are those of a Discrete space.
        steps: numbers of the rows that are steps.
    """

    def __init__(self, policy: Policy, recorded: Recorded, seed: int = 0):
        self._policy, self._recorded = policy, recorded
        self._rng = np.random.default_rng(seed)
        self.is_discrete = isinstance(policy.spec.action_space, spaces.Discrete)
        self.steps = np.flatnonzero(~recorded.closing)
        self._obs = _tree(recorded, "observation")
        self._action = _tree(as_policy_acts(policy, recorded), "action")
        with torch.no_grad():
            self._features = self._unrolled() if policy.has_memory else self._encoded()

    # --- what the policy does -----------------------------------------------------------------------------------

    def log_prob(self, epsilon: float | None = None) -> np.ndarray:
        """Log-probabilities of the recorded actions, float64 [N]; 0 in closing rows.

        Args:
            epsilon: of the policy that takes a random legal action with this probability, and else the most probable
                one; None: of the policy as it is.
        """
        found = np.zeros(len(self._features))
        with torch.no_grad():
            if self.is_discrete:
                of_action = self.probs(epsilon)[self.steps].double().gather(1, self._action[self.steps].unsqueeze(1))
                found[self.steps] = of_action.squeeze(1).log()
            else:
                for rows in _blocks(self.steps):
                    action = _at(self._action, rows)
                    found[rows] = self._policy.evaluate_actions(*self._rows(rows), action)[0].double()
        return found

    def probs(self, epsilon: float | None = None) -> Tensor:
        """Probabilities of all actions of a Discrete space, [N, A]; for `epsilon` see `log_prob`."""
        num = self._policy.distribution.num_outputs

        def of_block(rows: np.ndarray) -> Tensor:
            features, obs = self._rows(rows)
            if epsilon is not None:
                legal = self._policy.legal(obs) if self._policy.has_masks else torch.ones(len(rows), num)
                return epsilon * legal / legal.sum(1, keepdim=True) + (1 - epsilon) * self._greedy(rows)
            actions = torch.arange(num).unsqueeze(1).expand(num, len(rows))
            return torch.stack([self._policy.evaluate_actions(features, obs, a)[0] for a in actions], 1).exp()

        return torch.cat([of_block(rows) for rows in self._all_blocks()])

    def choices(self, epsilon: float | None = None) -> Choices:
        """What the policy does in every row, drawn; for `epsilon` see `log_prob`."""
        with torch.no_grad():
            if self.is_discrete:
                return Choices(probs=self.probs(epsilon))
            return Choices(draws=torch.stack([self._chosen(deterministic=False) for _ in range(NUM_DRAWS)]))

    def greedy_choices(self) -> Choices:
        """What the policy does in every row, if it takes the most probable action."""
        with torch.no_grad():
            if self.is_discrete:
                return Choices(probs=torch.cat([self._greedy(rows) for rows in self._all_blocks()]))
            return Choices(draws=self._chosen(deterministic=True).unsqueeze(0))

    # --- what Q sees --------------------------------------------------------------------------------------------

    def inputs(self) -> Tensor:
        """Observations as standardised vectors, [N, F].

        Images are seen through the policy's encoder. With memory its features are there beside the observation.
        """
        policy = self._policy
        if has_images(policy.input_space):
            return _standardised(self._features)
        obs = as_input(policy.input_space, policy.unmasked(self._obs))
        seen = FlatInput(policy.input_space)(obs).float()
        return _standardised(torch.cat([seen, self._features], 1) if policy.has_memory else seen)

    def action(self) -> Tensor:
        """The recorded actions as Q takes them, int64 [N] or float32 [N, D]."""
        return self._action if self.is_discrete else self._as_vectors(_tree(self._recorded, "action"))

    # ------------------------------------------------------------------------------------------------------------

    def _rows(self, rows: np.ndarray) -> tuple[Tensor, Tree]:
        """Features and observations of some rows."""
        return self._features[rows], _at(self._obs, rows)

    def _all_blocks(self) -> Iterator[np.ndarray]:
        return _blocks(np.arange(len(self._features)))

    def _greedy(self, rows: np.ndarray) -> Tensor:
        """1 for the most probable action of a Discrete space and 0 for others, [B, A]."""
        action, _ = self._policy.choose(*self._rows(rows), True)
        return torch.nn.functional.one_hot(torch.as_tensor(action), self._policy.distribution.num_outputs).float()

    def _chosen(self, deterministic: bool) -> Tensor:
        """Actions of the policy as Q takes them, [N, D]."""
        policy, before = self._policy, self._policy.rng
        policy.rng = self._rng
        try:
            parts = [policy.choose(*self._rows(rows), deterministic)[0] for rows in self._all_blocks()]
        finally:
            policy.rng = before
        arrays = map_tree(lambda *x: np.concatenate([np.asarray(part) for part in x]), *parts)
        return self._as_vectors(from_env(policy.spec.action_space, policy.to_env(arrays)))

    def _as_vectors(self, action: Tree) -> Tensor:
        """Actions as the environment takes them, in one vector each, with bounds scaled to [-1, 1]; [N, D]."""
        parts = []
        for path, space in space_leaves(self._policy.spec.action_space).items():
            x = torch.as_tensor(find(action, path))
            if isinstance(space, spaces.Box):
                low, high = (torch.from_numpy(bound.astype(np.float32)) for bound in (space.low, space.high))
                bounded = torch.isfinite(high - low) & (high > low)
                x = torch.where(bounded, (2 * x - low - high) / (high - low), x).flatten(1)
            else:
                x = FlatInput(space)(x)
            parts.append(x.float())
        return torch.cat(parts, 1)

    def _encoded(self) -> Tensor:
        policy = self._policy
        rows = _blocks(np.arange(len(self._recorded.reward)))
        return torch.cat([policy.encoder(policy.inputs(_at(self._obs, block))) for block in rows])

    def _unrolled(self) -> Tensor:
        """The features of a policy with memory, which begins every episode anew, [N, F]."""
        policy, recorded = self._policy, self._recorded
        begins, sizes = recorded.begins, recorded.ends - recorded.begins
        found: Tensor | None = None
        for episodes in np.array_split(np.arange(len(begins)), max(1, len(recorded.reward) // BLOCK)):
            if not len(episodes):
                continue
            step = np.arange(sizes[episodes].max())
            rows = begins[episodes, None] + np.minimum(step, sizes[episodes, None] - 1)  # [B, L]
            real = step < sizes[episodes, None]
            state = policy.encoder.initial_state(len(episodes))
            features, _ = policy.unroll(_at(self._obs, rows), state, torch.zeros(rows.shape, dtype=torch.bool))
            if found is None:
                found = features.new_zeros(len(recorded.reward), features.shape[-1])
            found[rows[real]] = features[torch.from_numpy(real)]
        assert found is not None
        return found


def is_greedy(policy: Policy) -> bool:
    """Whether a policy has no probabilities: it takes the action of the greatest value."""
    return isinstance(policy.distribution, Greedy)


@torch.enable_grad()
def fitted_log_prob(policy: Policy, recorded: Recorded, seed: int = 0) -> np.ndarray:
    """Log-probabilities of the recorded actions by a policy that imitates them, float64 [N]; 0 in closing rows.

    The policy has one of lit_rl's own networks, without memory, and the kind of distribution that `policy` has. Its
    log-likelihood is maximised (Pomerleau 1988) until that of episodes that are held out no longer rises.

    Args:
        policy: in whose units densities are wanted: whether Box actions are squashed.
        recorded: the episodes.
        seed: of first weights, of minibatches, and of which episodes are held out.
    """
    rng = np.random.default_rng(seed)
    num = len(recorded.begins)
    held_out = rng.permutation(num)[: int(HELD_OUT * num)]
    is_step, is_held_out = ~recorded.closing, recorded.rows_of(held_out)
    learned, judged = (np.flatnonzero(is_step & which) for which in (~is_held_out, is_held_out))
    squash = bool(policy.describe()["arguments"].get("squash"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        imitation = Policy(
            policy.spec,
            squash=squash,
            state_dependent_std=bool(distribution_for(policy.spec.action_space, squash=squash).num_scales),
            normalize_observations=_has_vectors(policy),
        )
        obs, action = _tree(recorded, "observation"), _tree(as_policy_acts(imitation, recorded), "action")
        imitation.update_normalizer(obs)

        def log_prob(rows: np.ndarray) -> Tensor:
            return imitation.evaluate({"observation": _at(obs, rows), "action": _at(action, rows)})[0]

        optimizer = torch.optim.Adam(imitation.parameters(), lr=FIT_LR)
        best, weights = -math.inf, imitation.state_dict()
        for update in range(1, FIT_UPDATES + 1):
            optimizer.zero_grad()
            (-log_prob(rng.choice(learned, FIT_BATCH_SIZE)).mean()).backward()
            optimizer.step()
            if len(judged) and update % FIT_INTERVAL == 0:
                with torch.no_grad():
                    now = float(log_prob(judged).mean())
                if now < best:
                    break
                best, weights = now, {name: x.clone() for name, x in imitation.state_dict().items()}
        imitation.load_state_dict(weights)
        found = np.zeros(len(recorded.reward))
        with torch.no_grad():
            for rows in _blocks(np.flatnonzero(is_step)):
                found[rows] = log_prob(rows).double()
    return found


def _has_vectors(policy: Policy) -> bool:
    """Whether observations have a part that can be standardised."""
    parts = space_leaves(policy.input_space).values()
    return any(isinstance(space, spaces.Box) and not is_image(space) for space in parts)


def _tree(recorded: Recorded, name: str) -> Tree:
    """The columns of observations or actions as a tree of tensors [N, ...]."""
    columns = {path: x for path, x in recorded.columns.items() if path.partition("/")[0] == name}
    return to_torch(nest(columns)[name])


def _at(tree: Tree, rows: np.ndarray) -> Tree:
    return map_tree(lambda x: x[rows], tree)


def _blocks(rows: np.ndarray) -> Iterator[np.ndarray]:
    for begin in range(0, len(rows), BLOCK):
        yield rows[begin : begin + BLOCK]


def _standardised(x: Tensor) -> Tensor:
    return ((x - x.mean(0)) / x.std(0, correction=0).clamp(min=1e-6)).clamp(-MOST, MOST)
