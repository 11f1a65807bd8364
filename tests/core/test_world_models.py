"""The maths of DreamerV3 against tables worked by hand, and against torchrl's."""

import math

import numpy as np
import pytest
import torch
from gymnasium import spaces

from lit_rl.distributions import BoundedGaussian
from lit_rl.errors import SpaceError
from lit_rl.learner.laprop import LaProp
from lit_rl.learner.rules import rule_of
from lit_rl.losses import categorical_kl, kl_losses, symexp, symexp_bins, symlog, two_hot_loss, two_hot_mean
from lit_rl.networks import rssm_scan
from lit_rl.networks.normed import BlockLinear, Convolution, Linear, NormedSiLU
from lit_rl.networks.rssm import RSSM, straight_through
from lit_rl.networks.rssm_scan import sample
from lit_rl.normalizer import ReturnRange
from lit_rl.returns import lambda_returns

F64 = torch.float64


# --- numbers as distributions over bins -----------------------------------------------------------------------------


def test_symlog_and_symexp_are_inverses_at_any_size() -> None:
    x = torch.tensor([-1e6, -1.0, -1e-3, 0.0, 0.5, 3e4], dtype=F64)
    torch.testing.assert_close(symexp(symlog(x)), x)
    torch.testing.assert_close(symlog(torch.tensor([math.e - 1, 1 - math.e])), torch.tensor([1.0, -1.0]))


def test_bins_are_symmetric_and_equal_probabilities_have_the_mean_zero() -> None:
    bins = symexp_bins(255)
    assert len(bins) == 255 and bins[127] == 0 and torch.equal(bins, -bins.flip(0))
    torch.testing.assert_close(bins[-1].item(), math.expm1(20), rtol=1e-5, atol=0.0)
    from torchrl.modules.models.model_based import _default_bins

    torch.testing.assert_close(bins, _default_bins(255))
    equal = torch.zeros(100, 255).log_softmax(-1)
    assert (two_hot_mean(equal, bins) == 0).all()
    assert ((equal.exp() * bins).sum(-1) != 0).any()  # as a plain sum is not


@pytest.mark.parametrize(
    ("target", "shares"),
    [
        (-3.0, [1.0, 0.0, 0.0]),  # beyond the first bin
        (-1.0, [1.0, 0.0, 0.0]),
        (-0.75, [0.75, 0.25, 0.0]),
        (0.0, [0.0, 1.0, 0.0]),
        (0.5, [0.0, 0.75, 0.25]),
        (2.0, [0.0, 0.0, 1.0]),
        (9.0, [0.0, 0.0, 1.0]),
    ],
)
def test_a_number_is_shared_out_between_the_two_bins_beside_it(target: float, shares: list[float]) -> None:
    bins, log_probs = torch.tensor([-1.0, 0.0, 2.0]), torch.tensor([0.2, 0.3, 0.5]).log()
    expected = -(torch.tensor(shares) * log_probs).sum()
    torch.testing.assert_close(two_hot_loss(log_probs, torch.tensor([target]), bins), expected)
    both = two_hot_loss(log_probs, torch.tensor([target, 0.0]), bins)
    torch.testing.assert_close(both, expected - log_probs[1])


def test_two_hot_losses_and_means_are_torchrls() -> None:
    from torchrl.modules.models.model_based import two_hot_decode, two_hot_encode

    g = torch.Generator().manual_seed(0)
    bins = symexp_bins(63).double()  # the last ones are so large that float32 knows little of the mean of noise
    logits, target = (torch.randn(*shape, generator=g, dtype=F64) for shape in ((200, 63), (200,)))
    target = 1e3 * target
    log_probs = logits.log_softmax(-1)
    theirs = -(two_hot_encode(target, bins) * log_probs).sum(-1)
    torch.testing.assert_close(two_hot_loss(log_probs, target.unsqueeze(-1), bins), theirs)
    torch.testing.assert_close(two_hot_mean(log_probs, bins), two_hot_decode(logits, bins))
    best = two_hot_encode(target, bins).clamp(min=1e-30).log()  # the distribution with the least loss
    torch.testing.assert_close(two_hot_mean(best, bins), target)


# --- latents --------------------------------------------------------------------------------------------------------


def test_kl_losses_are_torchrls_and_stop_the_gradient_on_one_side_each() -> None:
    from torchrl.objectives.dreamer_v3 import categorical_kl_terms

    g = torch.Generator().manual_seed(0)
    posterior, prior = (torch.randn(6, 4, 8, generator=g, requires_grad=True) for _ in range(2))
    rssm = RSSM(1, 1, deter=8, stoch=4, classes=8, hidden=4, blocks=1, unimix=0.01)
    probs = [rssm.probs(x.flatten(-2)) for x in (posterior, prior)]
    dynamics, representation = kl_losses(*(x.log() for x in probs), free_bits=1.0)
    theirs = categorical_kl_terms(posterior, prior, free_nats=1.0, unimix=0.01)
    torch.testing.assert_close((dynamics.mean(), representation.mean()), theirs)
    assert (dynamics > 1).all()
    for loss, moved, still in ((dynamics, prior, posterior), (representation, posterior, prior)):
        gradients = torch.autograd.grad(loss.sum(), (moved, still), retain_graph=True, allow_unused=True)
        assert gradients[0].abs().sum() > 0 and gradients[1] is None


def test_free_bits_are_of_the_sum_over_latents_of_each_row() -> None:
    close, far = torch.tensor([[0.6, 0.4]] * 3), torch.tensor([[0.99, 0.01]] * 3)
    even = torch.full((2, 3, 2), 0.5).log()
    posterior = torch.stack([close, far]).log().requires_grad_()
    of_one = 0.99 * math.log(1.98) + 0.01 * math.log(0.02)  # 0.637: below 1 nat, but three of them are not
    torch.testing.assert_close(categorical_kl(posterior, even)[1].item(), 3 * of_one)
    _, representation = kl_losses(posterior, even, free_bits=1.0)
    torch.testing.assert_close(representation.tolist(), [1.0, 3 * of_one])
    gradient = torch.autograd.grad(representation.sum(), posterior)[0]
    assert (gradient[0] == 0).all() and (gradient[1] != 0).any()


def test_one_percent_of_each_latents_distribution_is_uniform() -> None:
    rssm = RSSM(1, 1, deter=8, stoch=1, classes=4, hidden=4, blocks=1, unimix=0.01)
    probs = rssm.probs(torch.tensor([[60.0, 0.0, 0.0, 0.0]]))
    torch.testing.assert_close(probs, torch.tensor([[[0.9925, 0.0025, 0.0025, 0.0025]]]))


def test_samples_have_the_probabilities_and_reach_the_rarest_class() -> None:
    logits = torch.tensor([3.0, 0.0, -2.0, 50.0])  # the last has all but the uniform percent
    uniform = (torch.arange(4000) + 0.5) / 4000
    shares = sample(logits.expand(4000, 4), uniform, unimix=0.04).mean(0)
    torch.testing.assert_close(shares, torch.tensor([0.01, 0.01, 0.01, 0.97]), atol=5e-4, rtol=0.0)
    even = sample(torch.zeros(3, 4), torch.tensor([0.0, 0.26, 1 - 2**-24]), unimix=0.0)
    assert even.argmax(-1).tolist() == [0, 1, 3] and (even.sum(-1) == 1).all()
    plain = sample(logits[:3].expand(4000, 3), uniform, unimix=0.0).mean(0)
    torch.testing.assert_close(plain, logits[:3].softmax(-1), atol=5e-4, rtol=0.0)


def test_gradients_pass_straight_through_a_sample() -> None:
    probs = torch.tensor([[0.2, 0.8]], requires_grad=True)
    drawn = straight_through(torch.tensor([[1.0, 0.0]]), probs)
    assert drawn.tolist() == [[1.0, 0.0]]
    assert torch.autograd.grad((drawn * torch.tensor([3.0, 5.0])).sum(), probs)[0].tolist() == [[3.0, 5.0]]


# --- the recurrent state --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("blocks", [1, 2, 4])
def test_the_recurrent_state_is_torchrls(blocks: int) -> None:
    from torchrl.modules.models.model_based import _DreamerV3BlockGRU

    torch.manual_seed(0)
    own = RSSM(3, 2, deter=8, stoch=3, classes=2, hidden=5, blocks=blocks, unimix=0.01)
    theirs = _DreamerV3BlockGRU(
        state_dim=6, action_dim=2, hidden_dim=5, belief_dim=8, num_blocks=blocks, num_layers=1, norm_eps=1e-4
    )
    for scale in (m.scale for m in own.modules() if isinstance(m, NormedSiLU)):
        torch.nn.init.normal_(scale)
    with torch.no_grad():
        for mine, other in (
            (own.from_deter, theirs.belief_projection), (own.from_stoch, theirs.state_projection),
            (own.from_action, theirs.action_projection), ([own.hidden, own.hidden_norm], theirs.hidden_layers),
        ):  # fmt: skip
            other[0].weight.copy_(mine[0].weight)
            other[0].bias.copy_(mine[0].bias)
            other[1].weight.copy_(mine[1].scale)
        theirs.gates.load_state_dict(own.gates.state_dict())
    deter, stoch, action = torch.randn(4, 8), torch.randn(4, 6), 3 * torch.randn(4, 2)
    assert (action.abs() > 1).any()  # such actions are divided by their size
    torch.testing.assert_close(own.step(deter, stoch, own.embed(action)), theirs(stoch, deter, action))


def test_a_block_linear_layer_is_a_block_diagonal_matrix() -> None:
    layer = BlockLinear(6, 4, blocks=2)
    torch.nn.init.normal_(layer.bias)
    matrix = torch.block_diag(*layer.weight)
    x = torch.randn(3, 6)
    torch.testing.assert_close(layer(x), x @ matrix + layer.bias)


def test_a_convolution_of_the_doubled_image_needs_no_doubled_image() -> None:
    torch.manual_seed(0)
    layer = Convolution(3, 5, scale_up=True).double()
    torch.nn.init.normal_(layer.bias)
    x = torch.randn(2, 3, 4, 6, dtype=F64, requires_grad=True)
    weights = [x, layer.weight, layer.bias]
    doubled = x.repeat_interleave(2, -1).repeat_interleave(2, -2)
    expected = torch.nn.functional.conv2d(doubled, layer.weight, layer.bias, padding=2)
    out = layer(x)
    assert out.shape == (2, 5, 8, 12)
    torch.testing.assert_close(out, expected)
    gradients = (torch.autograd.grad(y.square().sum(), weights) for y in (out, expected))
    for ours, by_definition in zip(*gradients):
        torch.testing.assert_close(ours, by_definition)


def test_rms_norm_divides_by_the_root_mean_square() -> None:
    layer = NormedSiLU(2)
    torch.nn.init.constant_(layer.scale, 2.0)
    x = torch.tensor([[3.0, -4.0]])
    expected = torch.nn.functional.silu(2 * x / math.sqrt(12.5 + 1e-4))
    torch.testing.assert_close(layer(x), expected)


def test_first_weights_have_the_variance_of_one_over_the_inputs() -> None:
    torch.manual_seed(0)
    weight = Linear(400, 300).weight
    torch.testing.assert_close(weight.std().item(), 1 / 20, rtol=0.01, atol=0.0)
    assert weight.abs().max() <= 2 * 1.1368 / 20
    blocks = BlockLinear(400, 300, blocks=4).weight
    torch.testing.assert_close(blocks.std().item(), 1 / 20, rtol=0.02, atol=0.0)
    assert (Linear(4, 3, scale=0.0).weight == 0).all()


def test_an_episodes_start_forgets_state_and_action() -> None:
    torch.manual_seed(0)
    rssm = RSSM(3, 2, deter=8, stoch=3, classes=2, hidden=5, blocks=2, unimix=0.01)
    tokens, action, noise = torch.randn(2, 4, 3), torch.randn(2, 4, 2), torch.rand(2, 4, 3)
    is_first = torch.zeros(2, 4, dtype=torch.bool)
    is_first[:, 2] = True
    start = torch.randn(2, 8), torch.randn(2, 6)
    whole = rssm.observe(tokens, action, is_first, *start, noise)
    zeros = torch.zeros(2, 8), torch.zeros(2, 6)
    action[:, 2] = 0.0
    rest = rssm.observe(tokens[:, 2:], action[:, 2:], torch.zeros(2, 2, dtype=torch.bool), *zeros, noise[:, 2:])
    for found, expected in zip(whole, rest):
        torch.testing.assert_close(found[:, 2:], expected)
    other = rssm.observe(tokens, action, torch.zeros_like(is_first), *start, noise)
    assert not torch.allclose(other[0][:, 2:], rest[0])


@pytest.mark.parametrize("blocks", [1, 2])
def test_the_gradient_that_is_written_out_is_that_of_the_steps(blocks: int) -> None:
    torch.manual_seed(0)
    rssm = RSSM(3, 2, deter=8, stoch=3, classes=4, hidden=5, blocks=blocks, unimix=0.01)
    for parameter in rssm.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    tokens, action, noise = (torch.randn(4, 6, n) for n in (3, 2, 3))
    tokens.requires_grad_()
    is_first = torch.zeros(4, 6, dtype=torch.bool)
    is_first[0, 2] = is_first[1, 0] = True
    start = torch.randn(4, 8), torch.randn(4, 12)
    weights = [torch.randn(4, 6, n) for n in (8, 12, 12)]
    results = []
    for observe in (rssm.observe, rssm.observe_stepwise):
        found = observe(tokens, action, is_first, *start, noise.sigmoid())
        loss = sum((x * weight).sum() for x, weight in zip(found, weights))
        learned = [p for name, p in rssm.named_parameters() if not name.startswith("prior")]
        results.append((found, torch.autograd.grad(loss, [tokens, *learned])))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def test_the_operators_that_compilers_call_have_the_shapes_they_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rssm_scan, "step_of", lambda function, *_: function)
    length, batch = 6, 4
    inputs = [torch.rand(length, batch, n) for n in (5, 8, 1)] + [torch.randn(batch, n) for n in (8, 12)]
    inputs.append(torch.rand(length, batch, 3))
    weights = [torch.randn(5, 8), torch.randn(5), torch.ones(5), torch.randn(5, 12), torch.randn(5), torch.ones(5)]
    weights += [torch.randn(2, 4, 4), torch.randn(10, 8), torch.ones(8), torch.randn(2, 4, 12), torch.randn(24)]
    weights += [torch.randn(5, 8), torch.ones(5), torch.randn(12, 5), torch.randn(12)]
    checks = {"test_utils": ("test_schema", "test_faketensor")}
    torch.library.opcheck(torch.ops.lit_rl.scan.default, (inputs, weights, 0.01, True), **checks)
    found = torch.ops.lit_rl.scan(inputs, weights, 0.01, True)
    saved = [inputs[2], *found, *weights]
    grads = [torch.ones_like(x) for x in found[:3]]
    torch.library.opcheck(torch.ops.lit_rl.scan_backward.default, (grads, saved, 0.01, 3, True), **checks)


# --- returns --------------------------------------------------------------------------------------------------------


def test_lambda_returns_equal_a_table_with_a_termination_and_a_truncation() -> None:
    # Rows 0 1 | 2 3 | 4: row 1 ends by termination, row 3 by truncation. gamma = lambda = 1/2.
    reward = torch.tensor([[7.0, 1.0, 0.0, 2.0, 0.0]])
    discount = 0.5 * torch.tensor([[1.0, 0.0, 1.0, 1.0, 1.0]])
    is_last = torch.tensor([[False, True, False, True, False]])
    bootstrap = torch.tensor([[9.0, 8.0, 4.0, 6.0, 10.0]])
    expected = [
        1.0,  # of row 0: its reward, and nothing after a termination
        0 + 0.5 * (0.5 * 4 + 0.5 * 5),  # of a last row: it has weight 0
        2 + 0.5 * 6.0,  # of row 2: bootstrapped from the truncated row alone
        0 + 0.5 * (0.5 * 10 + 0.5 * 10),
    ]
    found = lambda_returns(reward, discount, is_last, bootstrap, lambda_=0.5)
    torch.testing.assert_close(found, torch.tensor([expected]))


def test_lambda_returns_are_torchrls() -> None:
    from torchrl.objectives.dreamer_v3 import _replay_value_target

    g = torch.Generator().manual_seed(0)
    reward, bootstrap = (torch.randn(5, 20, generator=g) for _ in range(2))
    is_last = torch.rand(5, 20, generator=g) < 0.2
    is_terminal = is_last & (torch.rand(5, 20, generator=g) < 0.5)
    found = lambda_returns(reward, (1 - 1 / 333) * ~is_terminal, is_last, bootstrap, lambda_=0.95)
    theirs = _replay_value_target(reward, is_last, is_terminal, bootstrap, 333, 0.95)
    torch.testing.assert_close(found, theirs)


def test_the_range_of_returns_follows_percentiles_and_never_makes_returns_larger() -> None:
    returns_range = ReturnRange(rate=0.5)
    limits = returns_range.moved(torch.arange(101.0).reshape(1, 101))
    torch.testing.assert_close(limits, torch.tensor([2.5, 47.5]))  # half way from 0 to 5 and to 95
    assert returns_range.limits.tolist() == [0.0, 0.0]  # until they are kept
    assert ReturnRange.scale(limits) == 45 and ReturnRange.scale(limits / 100) == 1


# --- actions --------------------------------------------------------------------------------------------------------


def test_bounded_gaussians_of_runner_and_learner_are_torchs() -> None:
    distribution = BoundedGaussian(spaces.Box(-2, 4, (2,)))
    parameters = torch.randn(50, 4, generator=torch.Generator().manual_seed(0), dtype=F64)
    mean, std = torch.tanh(parameters[:, :2]), 0.1 + 0.9 * torch.sigmoid(parameters[:, 2:] + 2)
    theirs = torch.distributions.Independent(torch.distributions.Normal(mean, std), 1)
    action, log_prob = distribution.sample(parameters.numpy(), np.random.default_rng(0))
    torch.testing.assert_close(torch.from_numpy(log_prob), theirs.log_prob(torch.from_numpy(action)))
    found, entropy = distribution.evaluate(parameters, torch.from_numpy(action))
    torch.testing.assert_close((found, entropy), (theirs.log_prob(torch.from_numpy(action)), theirs.entropy()))
    other = parameters.flip(0)
    kl = torch.distributions.kl_divergence(theirs.base_dist, torch.distributions.Normal(mean.flip(0), std.flip(0))).sum(
        -1
    )
    torch.testing.assert_close(distribution.kl(parameters, other), kl)
    np.testing.assert_allclose(distribution.mode(parameters.numpy()), mean.numpy())
    np.testing.assert_allclose(distribution.to_env(np.array([[-1.5, 0.0], [0.5, 1.0]])), [[-2.0, 1.0], [2.5, 4.0]])
    with pytest.raises(SpaceError, match="has no bounds"):
        BoundedGaussian(spaces.Box(-np.inf, np.inf, (2,)))


# --- the optimizer --------------------------------------------------------------------------------------------------

# p = 4, agc 1/4, so that a gradient of norm 2 becomes 1; betas 1/2, eps 0, lr 1, no warm-up.
# g = 1/2:  v = 1/8, v^ = 1/4, u = 1;  m = 1/2, m^ = 1;            p = 3
# g = 2 -> 3/4:  v = 1/16 + 9/32 = 11/32, v^ = 11/24, u = 3/4 / sqrt(11/24);  m = 1/4 + u / 2, m^ = m / (3/4)
U2 = 0.75 / math.sqrt(11 / 24)
PLACES = [3.0, 3.0 - (0.25 + U2 / 2) / 0.75]


def make_laprop(parameter: torch.Tensor, **options: object) -> LaProp:
    return LaProp([parameter], lr=1.0, **{"betas": (0.5, 0.5), "eps": 0.0, "agc": 0.25, "warmup": 0} | options)


def test_laprop_with_clipping_equals_a_table_worked_by_hand() -> None:
    parameter, unused = torch.tensor([4.0], requires_grad=True), torch.ones(1, requires_grad=True)
    optimizer = make_laprop(parameter)
    optimizer.add_param_group({"params": [unused]})
    for grad, place in zip((0.5, 2.0), PLACES):
        parameter.grad = torch.tensor([grad])
        assert optimizer.step(lambda: 7.0) == 7.0
        torch.testing.assert_close(parameter.item(), place)
    assert optimizer.state[parameter]["step"] == 2 and not optimizer.state[unused]


def test_each_tensor_is_clipped_by_its_own_norm_and_small_ones_by_a_thousandth() -> None:
    large, zero = torch.full((4,), 10.0, requires_grad=True), torch.zeros(1, requires_grad=True)
    optimizer = LaProp([large, zero], lr=1.0, betas=(0.0, 0.0), agc=0.3, warmup=0)
    large.grad, zero.grad = torch.full((4,), 2.0), torch.tensor([1.0])
    optimizer.step()
    torch.testing.assert_close(optimizer.state[large]["exp_avg_sq"], torch.full((4,), 4.0))  # 4 < 0.3 * 20: as it was
    torch.testing.assert_close(optimizer.state[zero]["exp_avg_sq"].sqrt(), torch.tensor([3e-4]))


def test_laprop_warms_up_from_zero() -> None:
    parameter = torch.tensor([4.0], requires_grad=True)
    optimizer = make_laprop(parameter, warmup=2, betas=(0.0, 0.0), agc=None)
    places = []
    for _ in range(4):
        parameter.grad = torch.tensor([5.0])
        optimizer.step()
        places.append(parameter.item())
    assert places == [4.0, 3.5, 2.5, 1.5]  # each step is the sign of the gradient


def test_laprop_leaves_out_a_step_that_the_device_forbids() -> None:
    parameter = torch.tensor([4.0], requires_grad=True)
    optimizer = make_laprop(parameter)
    for grad, found_inf in [(0.5, 0.0), (math.nan, 1.0), (2.0, 0.0), (math.inf, 1.0)]:
        parameter.grad = torch.tensor([grad])
        optimizer.found_inf = torch.tensor(found_inf)
        optimizer.step()
        del optimizer.found_inf
    torch.testing.assert_close(parameter.item(), PLACES[1])
    assert optimizer.state[parameter]["step"] == 2


def test_the_compiled_rule_of_laprop_is_the_optimizer() -> None:
    g = torch.Generator().manual_seed(0)
    parameters = [torch.randn(3, 2, generator=g), torch.zeros(4)]
    optimizer = LaProp(parameters, lr=0.1, warmup=3)
    rule, sizes = rule_of(optimizer), [6, 4]
    flat = torch.cat([p.flatten() for p in parameters])
    state = [torch.full((10,), at_first) for at_first in rule.STATE.values()]
    for number in range(1, 6):
        for p in parameters:
            p.grad = torch.randn(p.shape, generator=g)
        grad = torch.cat([p.grad.flatten() for p in parameters])
        flat, state = rule(flat, grad, state, torch.tensor(0.1), torch.tensor(float(number)))
        optimizer.step()
        for p, piece in zip(parameters, flat.split(sizes)):
            torch.testing.assert_close(piece, p.flatten())
