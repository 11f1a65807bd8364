"""An MDP of two states whose values are known, and episodes of it that are terminated or truncated."""

import numpy as np

# Two states, two actions. Action a leads to state a with probability 0.8. Every step is the last one with the
# probabilities TERMINATES; and also, whatever happens, with CUT, and at step T: there episodes are truncated.
T, CUT, GAMMA = 5, 0.15, 0.9
R = np.array([[1.0, 0.0], [-0.5, 2.0]])
TERMINATES = np.array([[0.1, 0.3], [0.0, 0.2]])
MU = np.array([[0.6, 0.4], [0.5, 0.5]])
PI = np.array([[0.4, 0.6], [0.3, 0.7]])


def exact(pi: np.ndarray, cut: float = CUT, horizon: int = T) -> np.ndarray:
    """Q [T, S, A] of steps and their recorded rest; with no `cut` and a far horizon, of terminations alone."""
    q, next_value = [], np.zeros(2)
    to = np.array([[0.8, 0.2], [0.2, 0.8]])  # by action, to which state
    for _ in range(horizon):
        now = R + GAMMA * (1 - TERMINATES) * (1 - cut) * (to @ next_value)
        next_value = (pi * now).sum(1)
        q.insert(0, now)
    return np.array(q)


def play(num: int, seed: int) -> dict[str, np.ndarray]:
    """Episodes of MU, [num, T]; `real` says which steps there were, `state` has one more."""
    rng = np.random.default_rng(seed)
    state = [rng.integers(2, size=num)]
    real, found = np.ones(num, np.bool_), []
    for t in range(T):
        s = state[-1]
        action = (rng.random(num) < MU[s, 1]).astype(int)
        terminated = rng.random(num) < TERMINATES[s, action]
        truncated = ~terminated & ((rng.random(num) < CUT) | (t == T - 1))
        found.append((action, R[s, action] * real, terminated & real, truncated & real, real))
        state.append(np.where(rng.random(num) < 0.8, action, 1 - action))
        real = real & ~terminated & ~truncated
    action, reward, terminated, truncated, was_real = (np.stack(x, 1) for x in zip(*found))
    return {
        "state": np.stack(state, 1), "action": action, "reward": reward, "terminated": terminated,
        "truncated": truncated, "real": was_real,
    }  # fmt: skip
