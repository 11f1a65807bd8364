"""What recorded episodes say of a policy, as a table."""

from collections.abc import Iterator

from lit_rl.evaluation.estimating import OfflineResult


def describe(result: OfflineResult) -> Iterator[str]:
    """A result in lines of text: a table, and what is to be known of it."""
    yield f"Data: {result.num_episodes:,} episodes, mean return {result.return_mean:.6g}"
    yield f"Values: discounted returns, gamma {result.gamma:g}"
    if result.behavior != "none":
        yield f"Judged by importance sampling: the policy, {result.judged}; {result.behavior} densities of the actions"
    yield f"{'':<22}{'value':>10}  {'95 % interval':<24}{'effective episodes':>18}"
    for each in (result.data, *result.estimates):
        size = "" if each.effective_sample_size is None else f"{each.effective_sample_size:.1f}"
        interval = f"{each.low:.5g} to {each.high:.5g}"
        mark = " !" if each.warning else ""
        yield f"{each.name:<22}{each.value:>10.5g}  {interval:<24}{size:>18}{mark}".rstrip()
    warnings: dict[str, list[str]] = {}
    for each in result.estimates:
        if each.warning:
            warnings.setdefault(each.warning, []).append(each.name)
    yield from (f"! {', '.join(names)}: {warning}" for warning, names in warnings.items())
    yield from result.notes
