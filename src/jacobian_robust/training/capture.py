"""A training step of a GPU as one launch: loss and gradients captured in a CUDA graph, proven, and replayed.

With a batch of 32 images of a small network a GPU spends most of a step waiting for the hundreds of kernels to be
launched; their number triples with a penalty. ``torch.compile`` cannot help, as it has no double backward (pytorch
#91469); a CUDA graph records the kernels themselves, those of the double backward too (A. Nguyen et al., "Accelerating
PyTorch with CUDA Graphs", 2021).

A graph does again what it was recorded doing: all that changes from step to step is copied into the tensors that it
reads from: images, labels, the penalty's weight and its random numbers. The network's weights are read where they are.
Before a graph is used, its loss and gradients are compared with eager ones, on two batches with numbers of their own.
"""

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from jacobian_robust.randomness import DrawnBefore, SharedGenerator

__all__ = ["CapturedSteps", "CudaGraph", "Graph", "NotCaptured"]

EAGER_FIRST = 3
"""So many steps of a kind are eager: what libraries set up at first use must not be recorded."""

TOLERANCE = 1e-3
"""Largest relative difference of a gradient from the eager one, in norm: what the order of float32 sums may do."""

Outputs = Sequence[Tensor]


class NotCaptured(RuntimeError):
    """A step cannot be captured, or does not do again what it did."""


class Graph(Protocol):
    """What records a computation once and does it again, from and to the same memory."""

    def warm_up(self, compute: Callable[[], Outputs]) -> None:
        """Do a computation where it will be recorded, so that what libraries set up there is not."""

    def capture(self, compute: Callable[[], Outputs]) -> Outputs:
        """Record a computation and return the tensors that each replay fills."""

    def replay(self) -> None:
        """Do it again."""


class CudaGraph:
    """A :class:`torch.cuda.CUDAGraph`."""

    def __init__(self) -> None:
        self._graph = torch.cuda.CUDAGraph()
        self._stream = torch.cuda.Stream()

    def warm_up(self, compute: Callable[[], Outputs]) -> None:
        """Compute on the stream that will be recorded: cuDNN and cuBLAS set up what they need for each."""
        here = torch.cuda.current_stream()
        self._stream.wait_stream(here)
        with torch.cuda.stream(self._stream):
            compute()
        here.wait_stream(self._stream)

    def capture(self, compute: Callable[[], Outputs]) -> Outputs:
        """Record the kernels of a computation; nothing runs."""
        with torch.cuda.graph(self._graph, stream=self._stream):
            return compute()

    def replay(self) -> None:
        """Launch them all."""
        self._graph.replay()


class _Captured(NamedTuple):
    """A graph and the memory that it works on."""

    graph: Graph
    inputs: Tensor
    labels: Tensor
    eta: Tensor
    draws: DrawnBefore
    outputs: Outputs
    weights: list[int]


class _Gradients(torch.autograd.Function):
    """A loss whose gradients are known."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: list[Tensor], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        # New tensors: the graph writes its own again in the next step.
        return None, None, *torch._foreach_mul(ctx.gradients, gradient)


class CapturedSteps:
    """Loss and gradients of training steps, from a graph for each kind of step.

    A step is of another kind if its batch has another shape or the penalty is another; one that is met seldom, as the
    last batch of an epoch, stays eager.

    Args:
        parameters: what the loss is differentiated by; all of them play a part in it.
        generator: source of all random numbers, which are drawn by :func:`drawn`. It is left
            as if the steps had been eager.
        graph: makes a graph.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        generator: SharedGenerator,
        graph: Callable[[], Graph] = CudaGraph,
    ) -> None:
        self._parameters = list(parameters)
        self._generator = generator
        self._graph = graph
        self._met: Counter[Hashable] = Counter()
        self._captured: dict[Hashable, _Captured] = {}

    def __call__(
        self,
        compute: Callable[[Tensor, Tensor, Tensor], Outputs],
        inputs: Float[Tensor, "batch *shape"],
        labels: Int[Tensor, "batch"],
        eta: float,
        kind: Hashable,
    ) -> list[Tensor] | None:
        """Return what ``compute`` returns, the loss with its gradients; nothing if the step is better taken eagerly.

        Args:
            compute: maps inputs, labels and ``η``, a scalar tensor, to tensors, the loss first.
            inputs: the batch.
            labels: its classes.
            eta: weight of the penalty.
            kind: what else ``compute`` depends on.

        Raises:
            NotCaptured: if the step cannot be captured. It has not been taken then.
        """
        kind = (inputs.shape, inputs.dtype, labels.dtype, kind)
        captured = self._captured.get(kind)
        # Whoever exchanges the weights' memory, as an average may, leaves a graph that reads the old one.
        if captured is None or captured.weights != [parameter.data_ptr() for parameter in self._parameters]:
            self._met[kind] += 1
            if self._met[kind] <= EAGER_FIRST:
                return None
            captured = self._captured[kind] = self._capture(compute, inputs, labels)
        outputs = self._replayed(captured, inputs, labels, eta)
        loss, *others = outputs[: len(outputs) - len(self._parameters)]
        gradients = list(outputs[len(outputs) - len(self._parameters) :])
        return [_Gradients.apply(loss, gradients, *self._parameters), *(other.clone() for other in others)]

    def _replayed(self, captured: _Captured, inputs: Tensor, labels: Tensor, eta: float) -> Outputs:
        captured.inputs.copy_(inputs)
        captured.labels.copy_(labels)
        captured.eta.fill_(eta)
        captured.draws.again()
        captured.graph.replay()
        return captured.outputs

    def _capture(
        self, compute: Callable[[Tensor, Tensor, Tensor], Outputs], inputs: Tensor, labels: Tensor
    ) -> _Captured:
        static = inputs.clone(), labels.clone(), torch.zeros((), dtype=inputs.dtype, device=inputs.device)
        draws = DrawnBefore(inputs.device)
        state = self._generator.get_state()

        def differentiated() -> Outputs:
            with torch.enable_grad():
                outputs = compute(*static)
                gradients = torch.autograd.grad(outputs[0], self._parameters)
            return [*(output.detach() for output in outputs), *gradients]

        try:
            graph = self._graph()
            with draws.of(self._generator):
                graph.warm_up(differentiated)  # tells what is drawn, too
            with draws.of(self._generator):
                outputs = graph.capture(differentiated)
            weights = [parameter.data_ptr() for parameter in self._parameters]
            captured = _Captured(graph, *static, draws, outputs, weights)
            for shift, eta in ((0, 0.25), (1, 0.5)):
                self._prove(captured, differentiated, inputs.roll(shift, 0), labels.roll(2 * shift, 0), eta)
        except RuntimeError as error:
            raise NotCaptured(" ".join(str(error).split())) from error
        finally:
            self._generator.set_state(state)
        return captured

    def _prove(
        self, captured: _Captured, eager: Callable[[], Outputs], inputs: Tensor, labels: Tensor, eta: float
    ) -> None:
        """Raise a NotCaptured unless the graph does what the eager computation does, on a batch of its own."""
        replayed = [output.clone() for output in self._replayed(captured, inputs, labels, eta)]
        with captured.draws.of(self._generator):
            expected = eager()  # reads the same tensors
        for found, right in zip(replayed, expected, strict=True):
            error = torch.linalg.vector_norm((found - right).double())
            if not error <= TOLERANCE * torch.linalg.vector_norm(right.double()):
                raise NotCaptured("its replay is not the eager step")
