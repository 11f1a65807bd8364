"""Arrays through one flat buffer."""

import pickle

import numpy as np
import pytest
import torch
from torch import nn

from lit_rl.runners.transport import ALIGNMENT, Packed, allocate, load_weights, pack, pack_weights

ARRAYS = {
    "float32": np.arange(6, dtype=np.float32).reshape(2, 3),
    "bool": np.array([True, False, True]),
    "uint8": np.arange(255, dtype=np.uint8),
    "int64 0-dim": np.array(-7),
    "float64 0-dim": np.array(0.1),
    "empty": np.zeros((0, 4), np.float32),
    "empty at the end": np.zeros((3, 0), np.int64),
    "strided": np.arange(24, dtype=np.int16).reshape(4, 6)[::2, ::-1],
    "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "float16": np.array([[1.5]], np.float16),
}


def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert list(found) == list(expected)
    for name, array in expected.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape), name
        np.testing.assert_array_equal(found[name], array, err_msg=name)


def test_arrays_of_any_dtype_and_shape_come_back() -> None:
    assert_same(pack(ARRAYS).views(), ARRAYS)


@pytest.mark.parametrize("name", ARRAYS)
def test_one_array_alone_comes_back(name: str) -> None:
    assert_same(pack({name: ARRAYS[name]}).views(), {name: ARRAYS[name]})


def test_no_arrays_come_back() -> None:
    assert pack({}).views() == {}


def test_views_share_the_buffers_memory_and_do_not_overlap() -> None:
    packed = pack(ARRAYS)
    views = packed.views()
    for view in views.values():
        assert view.ctypes.data % min(ALIGNMENT, view.itemsize) == 0
        view[...] = 0
    assert_same(packed.views(), {name: np.zeros_like(array) for name, array in ARRAYS.items()})
    views["bool"][0] = True
    assert packed.views()["bool"].tolist() == [True, False, False]
    assert not any(packed.views()[name].any() for name in ARRAYS if name != "bool")


def test_pack_copies() -> None:
    array = np.ones(3)
    packed = pack({"x": array})
    array[:] = 2
    assert packed.views()["x"].tolist() == [1, 1, 1]


def test_packed_survives_pickling() -> None:
    assert_same(pickle.loads(pickle.dumps(pack(ARRAYS))).views(), ARRAYS)


def test_allocate_makes_writable_views_of_the_asked_shapes() -> None:
    views = allocate({"a": ("<f4", (2, 3)), "b": ("|b1", (4,)), "c": ("<i8", ())}).views()
    assert {name: (view.dtype.str, view.shape) for name, view in views.items()} == {
        "a": ("<f4", (2, 3)),
        "b": ("|b1", (4,)),
        "c": ("<i8", ()),
    }
    assert all(view.flags.writeable for view in views.values())


def module() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2, bias=False))


def test_weights_and_buffers_are_loaded_in_place_from_read_only_memory() -> None:
    source, target = module(), module()
    source(torch.randn(8, 3))  # moves the buffers, one of which is a 0-dim int64
    packed = pack_weights(source)
    packed.buffer.flags.writeable = False  # as Ray's object store gives it
    addresses = [parameter.data_ptr() for parameter in target.parameters()]
    load_weights(target, Packed(*packed))
    for name, tensor in source.state_dict().items():
        assert torch.equal(target.state_dict()[name], tensor), name
    assert [parameter.data_ptr() for parameter in target.parameters()] == addresses
    assert all(parameter.requires_grad for parameter in target.parameters())


def test_packed_weights_do_not_follow_later_updates() -> None:
    source = module()
    packed = pack_weights(source)
    before = source[0].weight.detach().clone()
    with torch.no_grad():
        source[0].weight.add_(1.0)
    np.testing.assert_array_equal(packed.views()["0.weight"], before)


def test_a_tensor_of_several_names_is_sent_once() -> None:
    shared, bytes_of = nn.Linear(30, 40), []
    for others in ([nn.Linear(30, 40), nn.Linear(30, 40)], [shared, shared]):
        module = nn.ModuleDict({"first": shared, "own": others[0], "same": others[1]})
        packed = pack_weights(module)
        bytes_of.append(len(packed.buffer))
        copy = nn.ModuleDict({name: nn.Linear(30, 40) for name in module})
        load_weights(copy, packed)
        assert list(packed.views()) == list(module.state_dict())
        for name, tensor in module.state_dict().items():
            assert torch.equal(copy.state_dict()[name], tensor), name
    assert bytes_of[0] == 3 * bytes_of[1]


def test_tensors_that_begin_at_one_place_and_differ_are_sent_both() -> None:
    module = nn.Module()
    whole = torch.arange(6.0)
    for name, buffer in (("whole", whole), ("part", whole[:2]), ("strided", whole[::2]), ("square", whole.view(2, 3))):
        module.register_buffer(name, buffer)
    for name, view in pack_weights(module).views().items():
        np.testing.assert_array_equal(view, module.get_buffer(name).numpy(), err_msg=name)
