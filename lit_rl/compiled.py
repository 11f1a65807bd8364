"""One gradient step as a single compiled function."""

import math
import time
from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from tensordict import TensorDict
from torch import Tensor, nn

from lit_rl import distributed
from lit_rl.errors import OptionError
from lit_rl.trees import iterate


class CompiledStep:
    """Loss, gradient, clipping and a step of Adam, compiled together.

    For small networks most of an eager step is the cost of calling some hundred small operations; here they are one.
    The function sees all parameters as one flat tensor, and so do Adam's moments: the module's parameters and the
    optimizer's state become views of these, so that checkpoints and the policy's copies are those of an eager run.

    The arithmetic is that of the eager step, in another order: results agree to rounding, not to the last bit.
    Lightning's `on_before_zero_grad`, `on_before_backward`, `on_after_backward` and `on_before_optimizer_step` are not
    called; `global_step` counts as ever. The first step of each shape of batch compiles, which takes 10 s to a minute.

    Args:
        algorithm: whose `loss(batch)` returns a scalar and, beside it, any tree of tensors. Numbers that it reads from
            the algorithm and that change while training must be tensors, else each new one compiles again.

    Raises:
        OptionError: with more than one learner process, in mixed precision, with memory, or with an optimizer other
            than one Adam.
    """

    def __init__(self, algorithm: Any):
        trainer = algorithm.trainer
        if distributed.world_size() > 1:
            raise OptionError("compile=True: expected one learner process. Leave it out, or train with devices=1.")
        if trainer.precision != "32-true":
            raise OptionError(f"compile=True: expected Trainer(precision='32-true'), got {trainer.precision!r}.")
        if algorithm.policy.has_memory:  # whose gradients through time are written by hand
            name = type(algorithm.policy.encoder).__name__
            raise OptionError(f"compile=True: expected a network without memory, but {name} has memory. Leave it out.")
        self._algorithm = algorithm
        self.optimizer: LightningOptimizer = algorithm.optimizers()
        optimizer = getattr(self.optimizer, "optimizer", None)
        if type(optimizer) is not torch.optim.Adam or len(optimizer.param_groups) != 1:
            raise OptionError(
                f"compile=True: expected configure_optimizers to return torch.optim.Adam with one group of parameters, "
                f"got {type(optimizer).__name__}. Leave it out."
            )
        self._adam = optimizer
        self._group = group = optimizer.param_groups[0]
        for name in ("weight_decay", "amsgrad", "maximize"):
            if group[name]:
                raise OptionError(f"compile=True: expected Adam without {name}, got {group[name]!r}. Leave it out.")
        self._parameters: list[nn.Parameter] = group["params"]
        names = {parameter: name for name, parameter in algorithm.named_parameters()}
        self._names = [f"algorithm.{names[parameter]}" for parameter in self._parameters]
        self._shapes = [parameter.shape for parameter in self._parameters]
        self._sizes = [parameter.numel() for parameter in self._parameters]
        self._loss = _Loss(algorithm)
        self._views: list[list[Tensor]] = []
        self._flat: list[Tensor] = []  # parameters and Adam's two moments
        self._scalars = torch.zeros(2)  # learning rate, number of this step; what is written to on the CPU
        self._written = self._scalars.numpy()
        self._steps = torch.zeros(0)  # of each parameter, as Adam has them
        self._taken = 0
        self._compiled: dict[Any, Callable[..., Any]] = {}  # by the shapes in a batch

    def __call__(self, batch: TensorDict) -> tuple[Tensor, Tensor, Any]:
        """Take one step, unless its gradient is not finite: the loss, the gradient's norm, and the rest of `loss`."""
        self._attach()
        self._written[:] = self._group["lr"], self._taken + 1
        scalars = self._scalars.to(self._flat[0].device)
        values = batch.to_dict()
        key = tuple((name, leaf.shape, leaf.dtype) for name, leaf in iterate(values))
        values |= {("next", name): value for name, value in values.get("next", {}).items()}  # as a TensorDict has it
        arguments = (*self._flat, scalars, values)
        if key in self._compiled:
            loss, norm, rest = self._compiled[key](*arguments)
        else:
            loss, norm, rest = self._first_call(key, arguments)
        if math.isfinite(norm):
            self.optimizer._on_before_step()
            self._steps.add_(1.0)
            self._taken += 1
            self.optimizer._on_after_step()
        return loss, norm, rest

    def _first_call(self, key: Any, arguments: tuple[Any, ...]) -> Any:
        rank_zero_info(f"Compiling the gradient step for a batch of {arguments[-1]['action'].shape[0]} rows ...")
        started, self._compiled[key] = time.perf_counter(), self._compile()
        try:
            results = self._compiled[key](*arguments)
        except Exception as error:
            reason = str(error).strip().splitlines()[0]
            raise OptionError(
                f"compile=True: the gradient step of {type(self._algorithm).__name__} with this network cannot be "
                f"compiled ({type(error).__name__}: {reason}). Leave it out."
            ) from error
        rank_zero_info(f"... took {time.perf_counter() - started:.0f} s.")
        return results

    def _compile(self) -> Callable[..., Any]:
        """`_step` for batches of one shape.

        Nothing that it depends on changes, so that it need not be checked before each call whether it did, which takes
        longer than many a step. The compiler keeps what it compiled with the code it was given: a copy of its own.
        """
        own = FunctionType(type(self)._step.__code__.replace(), globals())
        options: dict[str, str | int | bool | Callable[..., Any]] = {
            "guard_filter_fn": torch.compiler.skip_all_guards_unsafe,
            "size_asserts": False,
            # Kernels are called from C++ instead of Python: a tenth less for a small network.
            "cpp_wrapper": self._flat[0].device.type == "cpu",
        }
        return torch.compile(MethodType(own, self), fullgraph=True, dynamic=False, options=options)

    def _step(self, flat: Tensor, mean: Tensor, square: Tensor, scalars: Tensor, batch: Any) -> Any:
        """One step of Adam in place: algorithm 1 of Kingma and Ba 2015, arXiv:1412.6980."""

        def loss(flat: Tensor) -> Any:
            pieces = (piece.view(shape) for piece, shape in zip(flat.split(self._sizes), self._shapes))
            return torch.func.functional_call(self._loss, dict(zip(self._names, pieces)), (batch,))

        grad, (value, rest) = torch.func.grad_and_value(loss, has_aux=True)(flat)
        norm = torch.linalg.vector_norm(grad) + 0 * value  # not finite where the loss is not, as in an eager step
        grad = self._clipped(grad, norm)
        lr, step = scalars.unbind()
        beta1, beta2 = self._group["betas"]
        new_mean = torch.lerp(mean, grad, 1 - beta1)
        new_square = beta2 * square + (1 - beta2) * grad * grad
        denominator = (new_square / (1 - beta2**step)).sqrt() + self._group["eps"]
        new_flat = flat - lr / (1 - beta1**step) * new_mean / denominator
        finite = norm.isfinite()
        for old, new in ((flat, new_flat), (mean, new_mean), (square, new_square)):
            old.copy_(torch.where(finite, new, old))
        return value, norm, rest

    def _clipped(self, grad: Tensor, norm: Tensor) -> Tensor:
        bound, by = self._algorithm.hp.max_grad_norm, self._algorithm.hp.grad_clip_by
        if bound is None:
            return grad
        if by == "value":
            return grad.clamp(-bound, bound)
        if by == "global_norm":
            return grad * factor(norm, bound)
        pieces = grad.split(self._sizes)
        return torch.cat([piece * factor(torch.linalg.vector_norm(piece), bound) for piece in pieces])

    def _attach(self) -> None:
        """Make parameters and Adam's state views of flat tensors, if they are not (or no longer, after loading)."""
        first = self._parameters[0]
        state = self._adam.state
        same_memory = bool(self._flat) and first.data_ptr() == self._flat[0].data_ptr()
        if same_memory and state[first].get("exp_avg") is self._views[1][0]:  # else a checkpoint was loaded since
            return
        with torch.no_grad():
            values: list[list[Tensor]] = [[parameter.detach() for parameter in self._parameters]]
            for name in ("exp_avg", "exp_avg_sq"):
                values.append([state[p][name] if state[p] else torch.zeros_like(p) for p in self._parameters])
            self._flat = [torch.cat([value.flatten() for value in column]) for column in values]
            self._views = [
                [piece.view(shape) for piece, shape in zip(flat.split(self._sizes), self._shapes)]
                for flat in self._flat
            ]
            self._taken = int(state[first]["step"]) if state[first] else 0
            on_device = self._group.get("fused") or self._group.get("capturable")
            device = first.device if on_device else torch.device("cpu")
            self._steps = torch.full((len(self._parameters),), float(self._taken), device=device)
            for parameter, view, step, mean, square in zip(
                self._parameters, self._views[0], self._steps.unbind(), *self._views[1:]
            ):
                parameter.data = view
                state[parameter] = {"step": step, "exp_avg": mean, "exp_avg_sq": square}
        self._algorithm.policy.weights_moved()


def factor(norm: Tensor, bound: float) -> Tensor:
    """What a gradient of some norm is multiplied by, so that its norm is at most `bound`."""
    return (bound / (norm + 1e-6)).clamp(max=1.0)


class _Loss(nn.Module):
    """An algorithm's loss as a module's forward, whose parameters can be replaced."""

    def __init__(self, algorithm: Any):
        super().__init__()
        self.algorithm = algorithm

    def forward(self, batch: Any) -> Any:
        return self.algorithm.loss(batch)
