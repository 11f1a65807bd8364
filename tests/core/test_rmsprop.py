"""RMSProp as TensorFlow has it, and its compiled rule, against a table worked by hand."""

import math

import pytest
import torch

from lit_rl.errors import OptionError
from lit_rl.learner.rmsprop import RMSprop
from lit_rl.learner.rules import rule_of

# decay 1/2, eps 1/4, lr 1: s = (1 + g^2) / 2, p = -g / sqrt(s + 1/4), and so on.
# g = 1: s = 1, root = sqrt(1.25).  g = 2: s = 0.5 + 2 = 2.5, root = sqrt(2.75).  g = 0: s = 1.25, p stays.
GRADS, SQUARES = [1.0, 2.0, 0.0], [1.0, 2.5, 1.25]
PLACES = [-1 / math.sqrt(1.25), -1 / math.sqrt(1.25) - 2 / math.sqrt(2.75), -1 / math.sqrt(1.25) - 2 / math.sqrt(2.75)]


def test_rmsprop_equals_a_table_worked_by_hand() -> None:
    parameter, unused = torch.zeros(2, requires_grad=True), torch.ones(1, requires_grad=True)
    optimizer = RMSprop([parameter, unused], lr=1.0, decay=0.5, eps=0.25)
    for number, (grad, square, place) in enumerate(zip(GRADS, SQUARES, PLACES), 1):
        parameter.grad = torch.full((2,), grad)
        assert optimizer.step(lambda: 7.0) == 7.0
        state = optimizer.state[parameter]
        assert state["square_avg"].tolist() == pytest.approx([square] * 2) and state["step"] == number
        assert parameter.tolist() == pytest.approx([place] * 2)
    assert unused.tolist() == [1.0] and not optimizer.state[unused]


def test_rmsprop_leaves_out_a_step_that_the_device_forbids() -> None:
    parameter = torch.zeros(2, requires_grad=True)
    optimizer = RMSprop([parameter], lr=1.0, decay=0.5, eps=0.25)
    for grad, found_inf in [(1.0, 0.0), (math.nan, 1.0), (2.0, 0.0), (math.inf, 1.0)]:
        parameter.grad = torch.full((2,), grad)
        optimizer.found_inf = torch.tensor(found_inf)
        optimizer.step()
        del optimizer.found_inf
    state = optimizer.state[parameter]
    assert state["square_avg"].tolist() == [SQUARES[1]] * 2 and state["step"] == 2
    assert parameter.tolist() == pytest.approx([PLACES[1]] * 2)


def test_the_compiled_rule_of_rmsprop_is_the_optimizer() -> None:
    rule = rule_of(RMSprop([torch.zeros(1)], lr=1.0, decay=0.5, eps=0.25))
    flat, state = torch.zeros(2), [torch.full((2,), at_first) for at_first in rule.STATE.values()]
    for number, (grad, square, place) in enumerate(zip(GRADS, SQUARES, PLACES), 1):
        step = torch.tensor(float(number))
        flat, state = rule(flat, torch.full((2,), grad), state, torch.tensor(1.0), step)
        assert flat.tolist() == pytest.approx([place] * 2) and state[0].tolist() == pytest.approx([square] * 2)


def test_several_epsilons_are_refused_by_a_compiled_step() -> None:
    optimizer = RMSprop([torch.zeros(1)], lr=1.0)
    optimizer.add_param_group({"params": [torch.zeros(1)], "eps": 0.5})
    with pytest.raises(OptionError, match=r"compile=True: expected one eps for all parameters, got 0.1 and 0.5"):
        rule_of(optimizer)
