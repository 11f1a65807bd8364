"""`lit-rl play`."""

import textwrap
from collections.abc import Sequence

from lit_rl.cli.shared import own_parser
from lit_rl.options import Count, CountOrZero, check


def play(args: Sequence[str]) -> None:
    """`lit-rl play`: plays a checkpoint in its own environment, in a window or into a video file.

    Raises:
        OptionError: for options that cannot be, and an environment that cannot be recorded.
        CheckpointError: if the checkpoint cannot be read, or does not say how to make its environment.
        EnvError: if the environment cannot be made, or raises.
    """
    parser = own_parser("play")
    parser.add_argument("checkpoint", help="a file that a lit_rl run wrote")
    parser.add_argument("--episodes", type=int, default=5, help="how many whole episodes")
    parser.add_argument("--video", type=str | None, default=None, help="record them to this .mp4 or .gif file")
    parser.add_argument("--seed", type=int, default=0, help="of the episodes, and of random actions")
    parser.add_argument("--stochastic", action="store_true", help="draw actions instead of the most probable ones")
    parser.add_argument("--timeout_s", type=float | None, default=None, help="cut the episode after so many seconds")
    parser.add_argument(
        "--timeline",
        action="store_true",
        help="of several agents: print who acted when, and which rewards were credited to what",
    )
    parser.add_argument(
        "--timeline_steps", type=int, default=200, help="env steps of each episode that --timeline shows"
    )
    parser.add_argument("--env", type=str | None, default=None, help="in place of the checkpoint's environment")
    parser.add_argument("--env_kwargs", type=dict | None, default=None, help="in place of the checkpoint's")
    parser.add_argument("--wrappers", type=list | None, default=None, help="in place of the checkpoint's")
    parser.add_argument("--network", type=str | None, default=None, help="package.module:Class, if it is your own")
    parser.add_argument("--policy_class", type=str | None, default=None, help="package.module:Class, if it is your own")
    parser.add_argument(
        "--policies",
        type=dict | None,
        default=None,
        help="of several policies your own scripts, as in '{other: package.module:Class}'",
    )
    parser.add_argument(
        "--policy_mapping",
        type=dict | str | None,
        default=None,
        help="package.module:function, if the mapping of several policies is your own",
    )
    options = parser.parse_args(args)

    import numpy as np

    from lit_rl.viewing.playing import environment_of, episode_seeds, load_player, play_episodes
    from lit_rl.viewing.timeline import Timeline
    from lit_rl.viewing.video import check_format, shows_window

    check("episodes", options.episodes, Count)
    check("seed", options.seed, CountOrZero)
    check("timeline_steps", options.timeline_steps, Count)
    if options.video is not None:
        check_format("video", options.video)
    env = environment_of(options.checkpoint, options.env, options.env_kwargs, options.wrappers)
    own = {name: options[name] for name in ("network", "policy_class", "policies", "policy_mapping")}
    policy = load_player(options.checkpoint, options.seed, **own)
    window = options.video is None and shows_window(env)
    timeline = Timeline(options.timeline_steps) if options.timeline else None
    returns, lengths = [], []
    for episode in play_episodes(
        env,
        policy,
        episode_seeds(options.seed, options.episodes),
        deterministic=not options.stochastic,
        video=options.video,
        window=window,
        timeout_s=options.timeout_s,
        timeline=timeline,
    ):
        returns.append(episode.return_)
        lengths.append(episode.length)
        cut = ", cut off" if episode.cut else ""
        agents = ", ".join(f"{agent} {value:g}" for agent, value in (episode.returns or {}).items())
        each = f" ({agents})" if agents else ""
        print(f"Episode {len(returns)}: return {episode.return_:g}{each}, length {episode.length}{cut}", flush=True)
        if timeline is not None:
            print(textwrap.indent(timeline.text(), "  "), flush=True)
    how = "random actions of the policy" if options.stochastic else "greedy"
    print(f"Mean of {len(returns)} on {env.env_id}, {how}: return {np.mean(returns):g}, length {np.mean(lengths):g}")
    if options.video is not None:
        print(f"Video: {options.video}")
