"""Two whole algorithms inside one LightningModule: each learns by a host of its own, as it does alone."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import TESTS, CommandServer
from host_script import BATCHES, run

SCRIPT = TESTS / "host_script.py"
STEPS = {"ppo": 2 * 1 * BATCHES * 2, "dqn": 3 * BATCHES * 2}  # in two epochs; PPO's minibatch is a rank's whole rollout


def load(folder: Path, name: str) -> dict[str, Any]:
    return torch.load(folder / f"{name}.pt", weights_only=True)


def test_both_learn_and_count_for_themselves(tmp_path: Path) -> None:
    pair = run(tmp_path, "eager", 1)
    found = load(tmp_path, "eager-1-0")
    assert found["global_step"] == sum(STEPS.values()) == len(found["gradients"])
    ppo, dqn = pair.parts["ppo"], pair.parts["dqn"]
    assert (ppo.updates_done, dqn.updates_done) == (BATCHES * 2, STEPS["dqn"])
    real = int(ppo.host.source is dqn.host.source)
    assert real and dqn.env_steps_done == 5 * STEPS["dqn"] and 0 < ppo.env_steps_done < 4 * 16 * BATCHES * 2
    assert all(torch.isfinite(value).all() for value in found["weights"].values() if value.is_floating_point())


def test_a_run_that_goes_on_equals_an_unbroken_one(tmp_path: Path) -> None:
    whole = run(tmp_path, "eager", 1).state_dict()
    run(tmp_path, "eager", 1, max_epochs=1)
    resumed = run(tmp_path, "eager", 1, ckpt_path=tmp_path / "eager-1-1.ckpt").state_dict()
    assert whole.keys() == resumed.keys()
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]), name


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory, command_server: CommandServer) -> Path:
    """Where two ranks have trained, eagerly and with compiled steps."""
    folder = tmp_path_factory.mktemp("two_ranks")
    command_server.run_ranks(folder, SCRIPT, folder, "eager", "compiled")
    return folder


@pytest.mark.slow
@pytest.mark.ddp
def test_two_ranks_give_the_gradients_of_one(two_ranks: Path, tmp_path: Path) -> None:
    run(tmp_path, "eager", 1)
    one, first, second = load(tmp_path, "eager-1-0"), load(two_ranks, "eager-2-0"), load(two_ranks, "eager-2-1")
    assert one["global_step"] == first["global_step"] == second["global_step"]
    for step, (a, b, c) in enumerate(zip(one["gradients"], first["gradients"], second["gradients"])):
        for x, y, z in zip(a, b, c):
            assert torch.isfinite(x).all() and torch.equal(y, z)
            torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-3, msg=lambda m, step=step: f"step {step}: {m}")
    same_weights(one, first, second)


@pytest.mark.slow
@pytest.mark.ddp
def test_compiled_steps_train_both_on_one_and_two_ranks_as_eager_ones_do(two_ranks: Path, tmp_path: Path) -> None:
    run(tmp_path, "eager", 1)
    run(tmp_path, "compiled", 1)
    eager, one = load(tmp_path, "eager-1-0"), load(tmp_path, "compiled-1-0")
    assert eager["global_step"] == one["global_step"] and not one["gradients"]  # that hook is not called
    same_weights(eager, one, one)
    same_weights(eager, load(two_ranks, "compiled-2-0"), load(two_ranks, "compiled-2-1"))


def same_weights(expected: dict[str, Any], first: dict[str, Any], second: dict[str, Any]) -> None:
    for name, value in expected["weights"].items():
        assert torch.equal(first["weights"][name], second["weights"][name]), name
        close = torch.isclose(value, first["weights"][name], atol=2e-4, rtol=1e-3)
        assert close.all(), (name, value, first["weights"][name])


def test_an_algorithm_is_copied_without_its_surroundings(tmp_path: Path) -> None:
    part = run(tmp_path, "eager", 1).parts["ppo"]
    copied = copy.deepcopy(part)
    assert copied._host is None is not part._host
    for name, value in part.state_dict().items():
        assert torch.equal(value, copied.state_dict()[name]), name
