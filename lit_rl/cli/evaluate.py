"""`lit-rl evaluate`: how good a checkpoint's policy is, by recorded episodes, without an environment."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lit_rl.cli.shared import own_parser
from lit_rl.errors import OptionError, write_error
from lit_rl.options import check_ending


def evaluate(args: Sequence[str]) -> None:
    """`lit-rl evaluate`: estimates a checkpoint's discounted return from episodes that another policy played.

    Raises:
        OptionError: if an estimator cannot judge this policy by these episodes, or an option is not what it can be.
        CheckpointError: if the checkpoint cannot be read.
        DataError: if the episodes cannot be read, or do not say what is needed.
    """
    parser = own_parser("evaluate")
    parser.add_argument("checkpoint", help="a file that a lit_rl run wrote")
    parser.add_argument("episodes", nargs="+", help="files, folders or patterns, such as 'runs/*/*/episodes'")
    parser.add_argument(
        "--estimators",
        nargs="+",
        default=None,
        help="last on the line: some of is, pdis, wis, wpdis, dr, fqe; all that can judge this policy if left out",
    )
    parser.add_argument("--gamma", type=float | None, default=None, help="discount; the checkpoint's own if left out")
    parser.add_argument(
        "--epsilon",
        type=float | None,
        default=None,
        help="judge the most probable actions, with this share of random ones, in place of drawn ones",
    )
    parser.add_argument(
        "--behavior",
        default="recorded",
        help="where the densities of the policy that played are from: 'recorded', or a 'fit' to its actions",
    )
    parser.add_argument(
        "--num_updates",
        type=int | None,
        default=None,
        help="gradient steps of dr and fqe; if left out, 10,000 where gamma is 0.99",
    )
    parser.add_argument("--seed", type=int, default=0, help="of everything random")
    parser.add_argument("--columns", type=dict | None, default=None, help="of tables: see OfflineDataModule")
    parser.add_argument("--preset", type=str | None, default=None, help="of tables: see OfflineDataModule")
    parser.add_argument("--network", type=str | None, default=None, help="package.module:Class, if it is your own")
    parser.add_argument("--policy_class", type=str | None, default=None, help="package.module:Class, if it is your own")
    parser.add_argument("-o", "--output", type=str | None, default=None, help="write all figures into this .json file")
    options = parser.parse_args(args)

    from lit_rl.evaluation.estimating import evaluate_offline
    from lit_rl.viewing.estimates import describe
    from lit_rl.viewing.playing import load_player

    if options.output is not None:
        check_ending("output", options.output, (".json",))
    own = {name: options[name] for name in ("network", "policy_class")}
    if options.estimators is None or {"dr", "fqe"} & set(options.estimators):
        print("Fitting Q for dr and fqe takes a minute or more; --estimators wis pdis does without.", flush=True)
    given = ("estimators", "epsilon", "behavior", "num_updates", "seed")
    result = evaluate_offline(
        load_player(options.checkpoint, options.seed, **own),
        options.episodes,
        columns=options.columns,
        preset=options.preset,
        gamma=_gamma_of(options.checkpoint) if options.gamma is None else options.gamma,
        **{name: options[name] for name in given if options[name] is not None},
    )
    print("\n".join(describe(result)))
    if options.output is not None:
        try:
            Path(options.output).write_text(result.to_json() + "\n")
        except OSError as error:
            raise OptionError(f"output={options.output!r} cannot be written: {write_error(error)}.") from error
        print(f"Figures: {options.output}")


def _gamma_of(path: str) -> float:
    """The discount of a checkpoint's algorithm.

    Raises:
        OptionError: if it has none, or several.
    """
    from lit_rl.files.loading import read_checkpoint

    found: Any = read_checkpoint(path).get("hyper_parameters", {}).get("gamma")
    if not isinstance(found, int | float):
        raise OptionError(f"Checkpoint {path} does not say what gamma is: expected --gamma, such as --gamma 0.99.")
    return float(found)
