"""`lit-rl recipes`."""

from collections.abc import Sequence

from lit_rl.cli import recipe_index
from lit_rl.cli.shared import own_parser


def recipes(args: Sequence[str]) -> None:
    """`lit-rl recipes`: lists the recipes that `--config` finds, with their measured results."""
    parser = own_parser("recipes")
    parser.parse_args(args)
    print(recipe_index.table())
    print("\nMedian over seeds of the mean return of greedy episodes. %: of games against random actions.")
    print("Run one: lit-rl fit --config ppo_cartpole")
