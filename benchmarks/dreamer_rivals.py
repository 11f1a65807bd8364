"""Updates of other DreamerV3s on a CPU, one for each line of standard input: what `dreamer_speed.py` times in turns.

    VENV/bin/python benchmarks/dreamer_rivals.py r2dreamer CLONE size1m

Prints the number of parameters first, then for each line the seconds of an update: wall time and CPU time. It runs in
an environment with torch and the rival's own dependencies, and reads the rival's code from a clone of its repository:
github.com/NM512/r2dreamer (546e4fa) and github.com/Eclectic-Sheep/sheeprl (33b6366). Both learn from noise of the
spaces of CartPole: 16 sequences of 64 rows, 15 imagined steps, in float32.
"""

import contextlib
import importlib
import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SEQUENCES, LENGTH, NUM_ACTIONS, NUM_OBSERVED = 16, 64, 2, 4
# deter, hidden, classes, units, depth of `lit_rl.modules.dreamer_v3.SIZES`; sheeprl's recurrent state, which is dense,
# has the size at which all parameters together are closest to ours.
SIZES = {"size1m": (512, 64, 4, 64, 4), "size12m": (2048, 256, 16, 256, 16)}
SHEEPRL_DETER = {"size1m": 308, "size12m": 1280}


def stand_in(name: str, **contents: Any) -> None:
    """A module that the rival imports and an update does not need."""
    module = types.ModuleType(name)
    module.__dict__.update(contents)
    sys.modules[name] = module


def noise(*shape: int) -> dict[str, Tensor]:
    """Rows in which every fiftieth ends an episode."""
    is_last = (torch.rand(*shape, 1) < 0.02).float()
    return {
        "state": torch.randn(*shape, NUM_OBSERVED), "reward": torch.rand(*shape, 1), "is_last": is_last,
        "action": torch.nn.functional.one_hot(torch.randint(NUM_ACTIONS, shape), NUM_ACTIONS).float(),
    }  # fmt: skip


def r2dreamer(clone: Path, size: str) -> tuple[int, Callable[[], Any]]:
    """The number of parameters of r2dreamer with a decoder, and one update of it, eager."""
    from hydra import compose, initialize_config_dir
    from tensordict import TensorDict

    stand_in("torch.utils.tensorboard", SummaryWriter=None)
    dreamer: Any = importlib.import_module("dreamer")
    dreamer.autocast = lambda **_: contextlib.nullcontext()  # which is float16
    numbers = zip(("deter", "hidden", "discrete", "units", "depth"), SIZES[size])
    options = ["env=dmc_proprio", "device=cpu", "model.compile=False", "model.rep_loss=dreamer"]
    with initialize_config_dir(str(clone / "configs"), version_base=None):
        config = compose("configs", [*options, *(f"model.{name}={number}" for name, number in numbers)])
    observed = types.SimpleNamespace(spaces={"state": types.SimpleNamespace(shape=(NUM_OBSERVED,))})
    actions = types.SimpleNamespace(n=NUM_ACTIONS, discrete=True, shape=(NUM_ACTIONS,))
    agent = dreamer.Dreamer(config.model, observed, actions)
    state = agent.get_initial_state(SEQUENCES)

    def sample() -> tuple[Any, None, tuple[Tensor, Tensor]]:
        rows = noise(SEQUENCES, LENGTH)
        last = rows["is_last"].bool()
        rows |= {"is_first": last.roll(1, 1), "is_last": last, "is_terminal": last}
        return TensorDict(rows, [SEQUENCES, LENGTH]), None, (state["stoch"], state["deter"])

    replay = types.SimpleNamespace(sample=sample, update=lambda *_: None)
    return sum(x.numel() for x in agent._named_params.values()), lambda: agent.update(replay)


def sheeprl(clone: Path, size: str) -> tuple[int, Callable[[], Any]]:
    """The number of parameters of sheeprl, and one update of it with a step of its target critic."""
    import numpy as np
    from gymnasium import spaces
    from hydra import compose, initialize_config_dir
    from hydra.utils import instantiate
    from lightning.fabric import Fabric

    # Its __init__ imports all its algorithms.
    for package in ("sheeprl", "sheeprl.algos", "sheeprl.utils", "sheeprl.data", "sheeprl.envs"):
        stand_in(package, __path__=[str(clone / package.replace(".", "/"))])
    stand_in("sheeprl.utils.env", make_env=None)
    stand_in("rich.syntax")
    stand_in("rich.tree")
    stand_in("rich", syntax=sys.modules["rich.syntax"], tree=sys.modules["rich.tree"])
    train: Any = importlib.import_module("sheeprl.algos.dreamer_v3.dreamer_v3")
    utils: Any = importlib.import_module("sheeprl.utils.utils")
    _, hidden, classes, units, _ = SIZES[size]
    numbers = {
        "dense_units": units, "mlp_layers": 3, "world_model.discrete_size": classes,
        "world_model.recurrent_model.recurrent_state_size": SHEEPRL_DETER[size],
        "world_model.transition_model.hidden_size": hidden, "world_model.representation_model.hidden_size": hidden,
        "cnn_keys.encoder": "[]", "cnn_keys.decoder": "[]",
        "mlp_keys.encoder": "[state]", "mlp_keys.decoder": "[state]",
    }  # fmt: skip
    with initialize_config_dir(str(clone / "sheeprl/configs"), version_base=None):
        cfg: Any = compose("config", ["exp=dreamer_v3", "env=gym", *(f"algo.{k}={n}" for k, n in numbers.items())])
    cfg = utils.dotdict({name: _plain(cfg[name]) for name in ("algo", "env", "distribution")})
    fabric = Fabric(accelerator="cpu", devices=1)
    space = spaces.Dict({"state": spaces.Box(-np.inf, np.inf, (NUM_OBSERVED,), np.float32)})
    world_model, actor, critic, target, _ = train.build_agent(fabric, [NUM_ACTIONS], False, cfg, space)
    modules = {"world_model": world_model, "actor": actor, "critic": critic}
    optimizers = [
        fabric.setup_optimizers(instantiate(cfg.algo[name].optimizer, params=module.parameters(), _convert_="all"))
        for name, module in modules.items()
    ]
    own = cfg.algo.actor.moments
    moments = train.Moments(own.decay, own.max, own.percentile.low, own.percentile.high)

    def update() -> None:
        rows = noise(LENGTH, SEQUENCES)
        batch = {
            "state": rows["state"], "rewards": rows["reward"], "actions": rows["action"],
            "terminated": rows["is_last"], "is_first": rows["is_last"].roll(1, 0),
        }  # fmt: skip
        models = (world_model, actor, critic, target)
        train.train(fabric, *models, *optimizers, batch, None, cfg, False, [NUM_ACTIONS], moments)
        for slow, parameter in zip(target.parameters(), critic.parameters()):
            slow.data.copy_(cfg.algo.critic.tau * parameter.data + (1 - cfg.algo.critic.tau) * slow.data)

    return sum(x.numel() for module in modules.values() for x in module.parameters()), update


def _plain(config: Any) -> Any:
    from omegaconf import OmegaConf

    return OmegaConf.to_container(config, resolve=True)


def answers(name: str, clone: Path, size: str) -> Iterator[str]:
    """What is printed."""
    with contextlib.redirect_stdout(sys.stderr):
        number, update = {"r2dreamer": r2dreamer, "sheeprl": sheeprl}[name](clone, size)
    yield str(number)
    for _ in sys.stdin:
        wall, cpu = time.perf_counter(), time.process_time()
        update()
        yield f"{time.perf_counter() - wall} {time.process_time() - cpu}"


if __name__ == "__main__":
    rival, folder, numbers_of, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    sys.path.insert(0, folder)
    for answer in answers(rival, Path(folder).resolve(), numbers_of):
        print(answer, flush=True)
