"""One gradient step as a single compiled function."""

import time
from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from tensordict import TensorDict
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from lit_rl import distributed
from lit_rl.errors import OptionError
from lit_rl.learner.clipping import Clipping, factor
from lit_rl.learner.rules import rule_of
from lit_rl.trees import iterate, leaves


class CompiledStep:
    """Loss, gradient, clipping and a step of the optimizer, compiled together.

    For small networks most of an eager step is the cost of calling some hundred small operations; here they are one.
    The function sees all parameters as one flat tensor, and so does the optimizer's rule its state: the module's
    parameters and the optimizer's state become views of these, so that checkpoints and the policy's copies are those of
    an eager run. Each group of parameters has its learning rate, which may change. With several ranks there are two
    functions, and the average of the flat gradient between them. On a GPU they are replayed as CUDA graphs, unless
    something in them forbids it: torch then says so, and launches their kernels one by one.

    The arithmetic is that of the eager step, in another order: results agree to rounding, not to the last bit.
    Lightning's `on_before_zero_grad`, `on_before_backward`, `on_after_backward` and `on_before_optimizer_step` are not
    called; `global_step` counts as ever. The first step of each shape of batch compiles, which takes 10 s to a minute.

    Args:
        algorithm: whose `loss(batch)` returns a scalar and, beside it, any tree of tensors. Numbers that it reads from
            the algorithm and that change while training must be tensors, else each new one compiles again.
        optimizer: Lightning's wrapper of the one that holds all its parameters.
        clipping: of gradients.

    Raises:
        OptionError: with memory, or with an optimizer that has no `Rule`.
    """

    def __init__(self, algorithm: Any, optimizer: LightningOptimizer, clipping: Clipping):
        if algorithm.policy.has_memory and not algorithm.COMPILES_MEMORY:  # gradients through time written by hand
            name = type(algorithm.policy.encoder).__name__
            raise OptionError(f"compile=True: expected a network without memory, but {name} has memory. Leave it out.")
        self._algorithm = algorithm
        self.optimizer = optimizer
        self._inner = optimizer.optimizer
        self._rule = rule_of(self._inner)
        self._clipping = clipping
        groups = self._inner.param_groups
        self._parameters: list[nn.Parameter] = [p for group in groups for p in group["params"]]
        names = {parameter: name for name, parameter in algorithm.named_parameters()}
        self._names = [f"algorithm.{names[parameter]}" for parameter in self._parameters]
        self._shapes = [parameter.shape for parameter in self._parameters]
        self._sizes = [parameter.numel() for parameter in self._parameters]
        self._group_sizes = torch.tensor([sum(p.numel() for p in group["params"]) for group in groups])
        self._loss = _Loss(algorithm)
        self._views: list[list[Tensor]] = []
        self._flat: list[Tensor] = []  # parameters, and what the rule keeps of each
        self._steps = torch.zeros(0)  # that each parameter took, as torch's optimizer has them
        self._lrs: list[float] = []  # of the optimizer's groups, and as the rule takes them
        self._lr = torch.zeros(0)
        self._compiled: dict[Any, Callable[..., Any]] = {}  # by the shapes in a batch
        self._compiled_move: Callable[..., Any] | None = None

    def __call__(self, batch: TensorDict) -> tuple[Tensor, Tensor, Any]:
        """Take one step, unless its gradient is not finite: the loss, the gradient's norm, and the rest of `loss`.

        Nothing here waits for the device. Lightning is not told of the step.
        """
        self._attach()
        self._follow_lr()
        moved = (*self._flat, self._steps, self._lr)
        values = batch.to_dict()
        key = tuple((name, leaf.shape, leaf.stride(), leaf.dtype) for name, leaf in iterate(values))
        values |= {("next", name): value for name, value in values.get("next", {}).items()}  # as a TensorDict has it
        if self._on_gpu:
            torch.compiler.cudagraph_mark_step_begin()
        if distributed.world_size() == 1:
            loss, norm, rest = self._call(key, self._step, (*moved, values))
        else:
            loss, grad, rest = self._call(key, self._gradient, (self._flat[0], values))
            distributed.rank_mean(grad)
            if self._compiled_move is None:
                self._compiled_move = self._compile(self._move)
            norm = self._own(self._compiled_move(*moved, grad))
        return loss, norm, rest

    @property
    def device(self) -> torch.device:
        return self._parameters[0].device

    @property
    def _on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def _own(self, results: Any) -> Any:
        """What a function returned, in memory that the next replay of its CUDA graph does not write to."""
        return tree_map_only(Tensor, torch.clone, results) if self._on_gpu else results

    def _follow_lr(self) -> None:
        """Make the rule's learning rate, [] or for several groups [N], that of the optimizer, if it is another."""
        lrs = [float(group["lr"]) for group in self._inner.param_groups]
        if lrs != self._lrs:
            lr = torch.tensor(lrs)
            lr = lr[0] if len(lrs) == 1 else lr.repeat_interleave(self._group_sizes)
            self._lrs, self._lr = lrs, lr.to(self._flat[0].device)

    def _call(self, key: Any, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        """The compiled form of a function of batches, which are the last argument; one for each of their shapes."""
        if key in self._compiled:
            return self._own(self._compiled[key](*arguments))
        size = len(leaves(arguments[-1]["observation"])[0])
        rank_zero_info(f"Compiling the gradient step for a batch of size {size} ...")
        started, self._compiled[key] = time.perf_counter(), self._compile(function)
        try:
            results = self._compiled[key](*arguments)
        except Exception as error:
            reason = str(error).strip().splitlines()[0]
            raise OptionError(
                f"compile=True: the gradient step of {type(self._algorithm).__name__} with this network cannot be "
                f"compiled ({type(error).__name__}: {reason}). Leave it out."
            ) from error
        rank_zero_info(f"... took {time.perf_counter() - started:.0f} s.")
        return self._own(results)

    def _compile(self, function: Any) -> Callable[..., Any]:
        """One of the methods below for arguments of one shape.

        Nothing that it depends on changes, so that it need not be checked before each call whether it did, which takes
        longer than many a step. The compiler keeps what it compiled with the code it was given: a copy of its own.
        """
        own = FunctionType(function.__func__.__code__.replace(), globals())
        options: dict[str, str | int | bool | Callable[..., Any]] = {
            "guard_filter_fn": torch.compiler.skip_all_guards_unsafe,
            "size_asserts": False,
            # Kernels are called from C++ instead of Python: a tenth less for a small network.
            "cpp_wrapper": self.device.type == "cpu",
            "triton.cudagraphs": self._on_gpu,
        }
        return torch.compile(MethodType(own, self), fullgraph=True, dynamic=False, options=options)

    def _step(self, flat: Tensor, *rest: Any) -> Any:
        """Gradient and move in one function, for one rank; not finite where the loss is not, as in an eager step."""
        *state, batch = rest
        value, grad, others = self._gradient(flat, batch)
        return value, self._move(flat, *state, grad), others

    def _gradient(self, flat: Tensor, batch: Any) -> tuple[Tensor, Tensor, Any]:
        """The loss, its gradient by the flat parameters, which is not finite where the loss is not, and the rest."""

        def loss(flat: Tensor) -> Any:
            pieces = (piece.view(shape) for piece, shape in zip(flat.split(self._sizes), self._shapes))
            return torch.func.functional_call(self._loss, dict(zip(self._names, pieces)), (batch,))

        grad, (value, rest) = torch.func.grad_and_value(loss, has_aux=True)(flat)
        return value, grad + 0 * value, rest

    def _move(self, flat: Tensor, *rest: Tensor) -> Tensor:
        """One step of the rule in place, unless the gradient is not finite; returns its norm."""
        *state, steps, lr, grad = rest
        norm = torch.linalg.vector_norm(grad)
        new_flat, new_state = self._rule(flat, self._clipped(grad, norm), state, lr, steps[0] + 1)
        finite = norm.isfinite()
        for old, new in ((flat, new_flat), *zip(state, new_state), (steps, steps + 1)):
            old.copy_(torch.where(finite, new, old))
        return norm

    def _clipped(self, grad: Tensor, norm: Tensor) -> Tensor:
        bound, by = self._clipping.bound, self._clipping.by
        if bound is None:
            return grad
        if by == "value":
            return grad.clamp(-bound, bound)
        if by == "global_norm":
            return grad * factor(norm, bound)
        pieces = grad.split(self._sizes)
        return torch.cat([piece * factor(torch.linalg.vector_norm(piece), bound) for piece in pieces])

    def _attach(self) -> None:
        """Make parameters and the optimizer's state views of flat tensors, if they are not: at first, after loading."""
        first = self._parameters[0]
        state, kept = self._inner.state, list(self._rule.STATE)
        same_memory = bool(self._flat) and first.data_ptr() == self._flat[0].data_ptr()
        if same_memory and state[first].get(kept[0]) is self._views[1][0]:  # else a checkpoint was loaded since
            return
        with torch.no_grad():
            values: list[list[Tensor]] = [[parameter.detach() for parameter in self._parameters]]
            for name, at_first in self._rule.STATE.items():
                values.append([state[p][name] if state[p] else torch.full_like(p, at_first) for p in self._parameters])
            self._flat = [torch.cat([value.flatten() for value in column]) for column in values]
            self._views = [
                [piece.view(shape) for piece, shape in zip(flat.split(self._sizes), self._shapes)]
                for flat in self._flat
            ]
            taken = float(state[first]["step"]) if state[first] else 0.0
            self._steps = torch.full((len(self._parameters),), taken, device=first.device)
            for i, (parameter, step) in enumerate(zip(self._parameters, self._steps.unbind())):
                parameter.data = self._views[0][i]
                state[parameter] = {"step": step, **{name: view[i] for name, view in zip(kept, self._views[1:])}}
        for tensor in (*self._flat, self._steps):  # changed in place, which a CUDA graph does at a fixed address alone
            torch._dynamo.mark_static_address(tensor, guard=False)
        self._algorithm.policy.weights_moved()


class _Loss(nn.Module):
    """An algorithm's loss as a module's forward, whose parameters can be replaced."""

    def __init__(self, algorithm: Any):
        super().__init__()
        self.algorithm = algorithm

    def forward(self, batch: Any) -> Any:
        return self.algorithm.loss(batch)
