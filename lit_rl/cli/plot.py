"""`lit-rl plot`."""

from collections.abc import Sequence

from lit_rl.cli.shared import own_parser


def plot(args: Sequence[str]) -> None:
    """`lit-rl plot`: draws learning curves of runs.

    Raises:
        OptionError: if there is no such run or metric, or the picture cannot be drawn.
    """
    parser = own_parser("plot")
    parser.add_argument("runs", nargs="+", help="run folders, or folders of runs, that CSVLogger wrote")
    parser.add_argument("--metric", action="append", help="a logged name; again for another panel")
    parser.add_argument("--x", default="env_steps", help="the logged name of the x axis")
    parser.add_argument("--smooth", type=int, default=1, help="mean over so many points")
    parser.add_argument("-o", "--output", default="curves.png", help="a .png, .svg or .pdf file")
    options = parser.parse_args(args)

    from lit_rl.viewing.curves import draw

    metrics = options.metric or ["rollout/return_mean"]
    for curve in draw(options.runs, metrics, options.x, options.output, options.smooth):
        runs = f"median of {curve.num_runs} runs" if curve.num_runs > 1 else "1 run"
        end = f"{curve.x[-1]:,.0f}" if curve.x[-1].is_integer() else f"{curve.x[-1]:.4g}"
        print(f"{curve.label}: {metrics[0]} {curve.median[-1]:.4g} at {options.x} {end} ({runs})")
    print(f"Curves: {options.output}")
