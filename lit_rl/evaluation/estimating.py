"""How good a policy is, by recorded episodes: which estimators can say so, and what they say.

Shapes: N rows, E episodes, T steps of the longest one.
"""

import functools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from gymnasium import spaces

from lit_rl.errors import DataError, OptionError
from lit_rl.evaluation import fitted_q, offline
from lit_rl.evaluation.by_fitted_q import cross_fitted, fitted, transitions_of
from lit_rl.evaluation.offline import Estimate
from lit_rl.evaluation.policy_rows import PolicyRows, fitted_log_prob, is_greedy
from lit_rl.files.columns import PRESETS
from lit_rl.files.recorded import read_recorded
from lit_rl.options import Count, CountOrZero, Limit, OneOf, TwoOrMore, UnitInterval, check
from lit_rl.policy import Policy
from lit_rl.recorded import Recorded
from lit_rl.spec import EnvSpec, MultiAgentSpec

WEIGHTED: dict[str, Callable[..., Estimate]] = {
    "is": offline.importance_sampling,
    "pdis": offline.per_decision,
    "wis": offline.weighted,
    "wpdis": offline.weighted_per_decision,
}
ESTIMATORS = (*WEIGHTED, "dr", "fqe")
NUM_REFITS = 10  # of FQE, on episodes drawn anew, which make its interval
MOST_CUT = 0.05  # of the episodes may end in neither way, and are left out
MOST_AFTER = 0.01  # discount of what comes after time limits, above which FQE's other meaning is said
ONE_AGENT = "Offline evaluation judges one policy by the episodes of one agent."
BEHAVIORS = {"recorded": "recorded", "fit": "fitted"}  # an option, and how results name it


class ListOfEstimators(Limit):
    """Some of the estimators, each once."""

    def accepts(self, value: Any) -> bool:
        is_list = isinstance(value, list | tuple) and len(value) > 0
        return is_list and set(value) <= set(ESTIMATORS) and len(set(value)) == len(value)

    def kept(self, value: Any) -> tuple[str, ...]:
        return tuple(value)

    def __repr__(self) -> str:
        return f"a list of {', '.join(map(repr, ESTIMATORS))}"


Estimators = Annotated[Sequence[str], ListOfEstimators()]
Behavior = Annotated[str, OneOf(*BEHAVIORS)]


@dataclass(frozen=True)
class OfflineResult:
    """How good a policy is, by recorded episodes.

    Attributes:
        estimates: of the policy's discounted return, one for each estimator and form of the policy.
        data: the mean discounted return of the episodes themselves.
        return_mean: their mean return, not discounted.
        num_episodes: E.
        gamma: discount per env step.
        judged: which policy importance sampling judges: "sampled", "epsilon-greedy", or "greedy" if it judges none.
        behavior: where the densities of the policy that played are from: "recorded", "fitted", or "none" if they are
            not needed.
        notes: what else is to be known, a sentence each.
    """

    estimates: tuple[Estimate, ...]
    data: Estimate
    return_mean: float
    num_episodes: int
    gamma: float
    judged: str
    behavior: str
    notes: tuple[str, ...] = ()

    def to_json(self) -> str:
        """All of it; numbers that are not finite are null."""
        return json.dumps(_finite(asdict(self)), indent=1)

    @property
    def metrics(self) -> dict[str, float]:
        """The values by metric: "is", "fqe_greedy"."""
        names = [each.name.lower().replace(" (", "_").replace(")", "").replace("-", "_") for each in self.estimates]
        return {name: each.value for name, each in zip(names, self.estimates)}


def evaluate_offline(
    policy: Policy,
    paths: str | Path | Sequence[str | Path],
    *,
    columns: Mapping[str, Any] | None = None,
    preset: str | None = None,
    **options: Any,
) -> OfflineResult:
    """How good a policy is, by episodes that others recorded.

    Args:
        policy: what `load_policy` returned.
        paths, columns, preset: of the episodes, see `OfflineDataModule`.
        options: see `estimate`.

    Raises:
        OptionError: if the policy or an option is not one that can be judged by these episodes.
        DataError: if the episodes cannot be read, or do not say what is needed.
    """
    check("preset", preset, Annotated[str, OneOf(*PRESETS)] | None)
    named = [str(path) for path in ([paths] if isinstance(paths, str | Path) else paths)]
    spec = getattr(policy, "spec", None)
    recorded, found = read_recorded(named, columns=columns, preset=preset, spec=spec)
    check_spaces(policy, found, named)
    return estimate(policy, recorded, **options)


def check_spaces(policy: Any, found: EnvSpec | MultiAgentSpec, paths: Sequence[str]) -> None:
    """Refuse several agents, and episodes in other spaces than the policy's.

    Raises:
        OptionError: naming the difference.
    """
    if isinstance(found, MultiAgentSpec):
        raise OptionError(f"paths={list(paths)!r}: the episodes are of {len(found.agents)} agents. {ONE_AGENT}")
    if not isinstance(policy, Policy):
        raise OptionError(f"policy={type(policy).__name__}: expected one policy. {ONE_AGENT}")
    for kind in ("observation", "action"):
        here, there = (getattr(spec, f"{kind}_space") for spec in (found, policy.spec))
        if here != there:
            raise OptionError(
                f"paths={list(paths)!r}: the episodes have the {kind} space {here}, the policy has {there}. Give "
                "episodes of the environment it was trained in."
            )


def estimate(
    policy: Policy,
    recorded: Recorded,
    *,
    gamma: float,
    estimators: Sequence[str] | None = None,
    epsilon: float | None = None,
    behavior: str = "recorded",
    num_updates: int | None = None,
    num_refits: int = NUM_REFITS,
    seed: int = 0,
) -> OfflineResult:
    """How good a policy is, by recorded episodes of its spaces.

    Args:
        policy: on the CPU. It is left as it is.
        recorded: the episodes, of one agent.
        gamma: discount per env step.
        estimators: some of `ESTIMATORS`; None: all that can judge this policy by these episodes.
        epsilon: judge the policy that takes a random legal action with this probability, and else the most probable
            one, instead of the policy as it draws its actions. Discrete actions only.
        behavior: where the densities of the policy that played are from: "recorded" with the episodes, or a "fit" of a
            policy to their actions.
        num_updates: gradient steps of fitted Q evaluation; None takes as many as values need at this discount, see
            `fitted_q.updates_for`.
        num_refits: of it, on episodes drawn anew, which make its interval.
        seed: of everything random here.

    Raises:
        OptionError: if one of the estimators cannot judge this policy, or an option is not what it can be.
        DataError: if the episodes do not say how they end, or hold no transitions.
    """
    check("gamma", gamma, UnitInterval)
    check("estimators", estimators, Estimators | None)
    check("epsilon", epsilon, UnitInterval | None)
    check("behavior", behavior, Behavior)
    check("num_updates", num_updates, Count | None)
    check("num_refits", num_refits, TwoOrMore)
    check("seed", seed, CountOrZero)
    recorded, notes = whole_episodes(recorded)
    refused, problem = refusal(policy, recorded, estimators or ESTIMATORS, epsilon=epsilon, behavior=behavior)
    if refused and estimators is not None:
        raise OptionError(f"{refused[0]}: {problem}")
    if refused:
        notes.append(f"Not estimated: {', '.join(refused)}. {problem}")
    wanted = [name for name in estimators or ESTIMATORS if name not in refused]
    # Trainer.validate is in inference mode, in which nothing can be fitted.
    with torch.inference_mode(False), torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        rows = PolicyRows(policy, recorded, seed)
        form = "epsilon-greedy" if epsilon is not None else "greedy" if is_greedy(policy) else "sampled"
        reward = padded(recorded.reward, recorded)
        found = []
        weighs = set(wanted) - {"fqe"}
        if weighs:
            played = fitted_log_prob(policy, recorded, seed) if behavior == "fit" else recorded.columns["log_prob"]
            log_ratio = padded(rows.log_prob(epsilon) - played, recorded)
            found = [WEIGHTED[name](reward, log_ratio, gamma=gamma, seed=seed) for name in wanted if name in WEIGHTED]
        num_updates = num_updates or fitted_q.updates_for(gamma)
        fit = functools.partial(fitted_q.fit, gamma=gamma, num_updates=num_updates, seed=seed)
        if "dr" in wanted:
            q, value = cross_fitted(fit, transitions_of(recorded, rows, gamma), rows.choices(epsilon), seed)
            values = padded(q, recorded), padded(value, recorded)
            found.append(offline.doubly_robust(reward, log_ratio, *values, gamma=gamma, seed=seed))
        if "fqe" in wanted:
            data = transitions_of(recorded, rows, gamma)
            forms = {form: rows.choices(epsilon)} if form != "greedy" else {}
            for name, choices in (forms | {"greedy": rows.greedy_choices()}).items():
                found.append(fitted(f"FQE ({name})", fit, data, choices, recorded.begins, num_refits, seed))
            notes += _time_limits(recorded, gamma)
    return OfflineResult(
        estimates=tuple(found),
        data=offline.monte_carlo(reward, gamma=gamma, seed=seed),
        return_mean=float(recorded.returns.mean()),
        num_episodes=len(recorded.begins),
        gamma=gamma,
        judged=form,
        behavior=BEHAVIORS[behavior] if weighs else "none",
        notes=tuple(notes),
    )


def whole_episodes(recorded: Recorded) -> tuple[Recorded, list[str]]:
    """The episodes that were terminated or truncated, and a note on others that are left out, if there are any.

    Raises:
        DataError: if there are more than a few others: what was left out would not be like the rest.
    """
    last = recorded.begins + recorded.lengths - 1
    ended = recorded.terminated[last] | recorded.truncated[last]
    cut = int((~ended).sum())
    if cut > MOST_CUT * len(ended):
        raise DataError(
            f"{cut} of {len(ended)} episodes are neither terminated nor truncated in their last step: offline "
            "evaluation must know how episodes end. Give the columns 'terminated' and 'truncated'."
        )
    if not cut:
        return recorded, []
    note = f"{cut} of {len(ended)} episodes are neither terminated nor truncated in their last step, and left out."
    return recorded.only(np.flatnonzero(ended)), [note]


def padded(x: np.ndarray, recorded: Recorded) -> np.ndarray:
    """Numbers of rows [N] by episode and step [E, T], with 0 after the end; closing rows are none of the steps."""
    lengths = recorded.lengths
    found = np.zeros((len(lengths), lengths.max()))
    found[np.arange(lengths.max()) < lengths[:, None]] = x[~recorded.closing]
    return found


# --- what can be said, and what cannot ------------------------------------------------------------------------------


def refusal(
    policy: Policy, recorded: Recorded, wanted: Sequence[str], *, epsilon: float | None, behavior: str
) -> tuple[list[str], str]:
    """Which of the estimators that are wanted cannot judge this policy by these episodes, and why.

    Raises:
        OptionError: if none can: of the episodes of several agents, or with this epsilon.
    """
    if recorded.agents is not None:
        raise OptionError(f"The episodes are of {len(set(recorded.agents))} agents. {ONE_AGENT}")
    if epsilon is not None and not isinstance(policy.spec.action_space, spaces.Discrete):
        raise OptionError(
            f"epsilon={epsilon:g}: expected a Discrete action space, got {policy.spec.action_space}. Leave it out."
        )
    weighing = [name for name in wanted if name != "fqe"]
    if is_greedy(policy) and epsilon is None:
        return weighing, (
            "importance sampling judges a policy that draws its actions, and this one is greedy. Set epsilon, such as "
            "0.05, to judge it with that share of random actions, or take 'fqe' alone."
        )
    missing = _without_densities(recorded) if behavior == "recorded" else 0
    if missing:
        return weighing, (
            f"the probability with which actions were taken is missing in {missing} of {len(recorded.begins)} episodes "
            "(greedy or random actions, or none was recorded). Set behavior='fit' to estimate it, or take 'fqe' alone."
        )
    if len(recorded.begins) < 2:
        return [name for name in wanted if name == "dr"], "half of the episodes are for its Q: expected two or more."
    return [], ""


def _without_densities(recorded: Recorded) -> int:
    """In how many episodes it is not known how probable actions were."""
    if "log_prob" not in recorded.columns:
        return len(recorded.begins)
    by_choice = np.add.reduceat((recorded.columns["log_prob"] != 0) & ~recorded.closing, recorded.begins) > 0
    is_greedy = np.add.reduceat(recorded.columns["deterministic"], recorded.begins) > 0
    return int((~by_choice | is_greedy).sum())


def _time_limits(recorded: Recorded, gamma: float) -> list[str]:
    """A note, if much comes after the time limits."""
    is_truncated = recorded.truncated[recorded.begins + recorded.lengths - 1]
    if np.mean(is_truncated * gamma**recorded.lengths) < MOST_AFTER:
        return []
    return [
        f"{is_truncated.mean():.0%} of the episodes end at a time limit. FQE goes on after it; the other estimators "
        "and the episodes' own return stop there."
    ]


def _finite(value: Any) -> Any:
    """Plain data with None for numbers that are not finite."""
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
