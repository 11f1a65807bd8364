"""Gradient steps whose outcome is decided on the device, as on a GPU: nobody waits for it at every step.

The form is forced on the CPU here, where it must train as the other does.
"""

from typing import Any

import pytest
import torch
from helpers import assert_same
from test_nonfinite import MODELS, Rows, datamodule, spoiled
from torch.utils._python_dispatch import TorchDispatchMode

from lit_rl.errors import DivergedError
from lit_rl.learner import steps

COMPILED = [False, True]


@pytest.fixture
def deferred(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "DEFERRED_ON", ("cpu",))


@pytest.fixture(autouse=True)
def in_python(monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiled function is run as it is written."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


class Reads(TorchDispatchMode):
    """Counts the numbers that were asked of tensors."""

    num = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.num += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **kwargs or {})


def counted(name: str, found: list[int], **options: Any) -> Any:
    base, own = MODELS[name]

    class Counted(base):  # type: ignore[misc, valid-type]
        def gradient_step(self, batch: Any) -> Any:
            with Reads() as reads:
                result = super().gradient_step(batch)
            found.append(reads.num)
            return result

    class OffPolicy(base):  # type: ignore[misc, valid-type]
        def update(self, batch: Any) -> Any:
            with Reads() as reads:
                result = super().update(batch)
            found.append(reads.num)
            return result

    return (OffPolicy if name in ("DQN", "SAC") else Counted)(**own | options)


@pytest.mark.parametrize("compile", COMPILED)
@pytest.mark.parametrize("name", MODELS)
def test_an_update_asks_the_device_for_nothing(make_trainer, deferred: None, name: str, compile: bool) -> None:
    """Of PPO, IMPALA and APPO each gradient step: before and after them they may ask."""
    found: list[int] = []
    algorithm = counted(name, found, compile=compile)
    make_trainer(limit_val_batches=0).fit(algorithm, datamodule(name))
    assert len(found) > 10 and set(found[1:]) == {0}


@pytest.mark.parametrize("name", MODELS)
def test_a_read_is_noticed(make_trainer, name: str) -> None:
    found: list[int] = []
    make_trainer(limit_val_batches=0).fit(counted(name, found), datamodule(name))
    assert min(found) > 0


@pytest.mark.parametrize("compile", COMPILED)
@pytest.mark.parametrize("name", MODELS)
def test_deferred_steps_train_as_others_do(make_trainer, monkeypatch, name: str, compile: bool) -> None:
    """With steps that are skipped now and then: weights, moments, targets, counts and metrics."""
    found = []
    for devices in ((), ("cpu",)):
        monkeypatch.setattr(steps, "DEFERRED_ON", devices)
        algorithm, rows = spoiled(name, lambda update: update in (1, 3, 4), compile=compile), Rows()
        trainer = make_trainer(limit_val_batches=0, callbacks=[rows])
        with pytest.warns(UserWarning, match="The loss is not finite"):
            trainer.fit(algorithm, datamodule(name))
        optimizer = trainer.optimizers[0].state_dict()["state"]
        metrics = [{key: value for key, value in row.items() if not key.startswith("time/")} for row in rows.rows]
        found.append((algorithm.state_dict(), optimizer, metrics, algorithm.skipped_updates))
    assert found[0][3] == found[1][3] > 0
    for (key, value), other in zip(found[0][0].items(), found[1][0].values()):
        torch.testing.assert_close(value, other, msg=key)
    for state, other in zip(found[0][1].values(), found[1][1].values()):
        assert_same(state, other)
    assert [row.keys() for row in found[0][2]] == [row.keys() for row in found[1][2]]
    for row, other in zip(found[0][2], found[1][2]):
        assert row == pytest.approx(other, rel=1e-4)


@pytest.mark.parametrize("compile", COMPILED)
@pytest.mark.parametrize("name", MODELS)
def test_deferred_steps_that_are_never_taken_end_the_run(
    make_trainer, deferred: None, name: str, compile: bool, tmp_path
) -> None:
    algorithm = spoiled(name, lambda update: update >= 3, compile=compile)
    with (
        pytest.warns(UserWarning, match="The loss is not finite .* skipped"),
        pytest.raises(DivergedError, match=r"The loss is not finite after \d+ env steps, \d times in a row"),
    ):
        make_trainer(limit_val_batches=0).fit(algorithm, datamodule(name))
    assert len(list(tmp_path.glob("nonfinite_batch_*"))) == 1
    checkpoint = torch.load(tmp_path / "before_divergence.ckpt", weights_only=True)
    assert all(value.isfinite().all() for value in checkpoint["state_dict"].values())
