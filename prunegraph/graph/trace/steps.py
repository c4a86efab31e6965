"""Which operations a forward runs, one after the other."""

from collections.abc import Callable, Collection, Sequence
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from prunegraph.graph.trace.calls import tensors_in

Step = tuple[str, tuple[tuple[bool, ...], ...]]
"""Name of an op, and which axes of its outputs are longer than 1."""


class StepRecorder(TorchDispatchMode):
    """Dispatch mode that notes which operations run.

    Args:
        known: names of ops that are not decomposed.
    """

    def __init__(self, known: Collection[str]) -> None:
        super().__init__()
        self._known = known
        self.steps: list[Step] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run the op, or what it is made of."""
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        if self._runs_whole(name):
            return self._run(func, args, kwargs, name)
        with self:
            decomposed = func.decompose(*args, **kwargs)
        if decomposed is not NotImplemented:
            return decomposed
        return self._run(func, args, kwargs, name)

    def _runs_whole(self, name: str) -> bool:
        return name in self._known

    def _run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> Any:
        out = func(*args, **kwargs)
        self._note(name, tensors_in(out))
        return out

    def _note(self, name: str, outputs: Sequence[Tensor]) -> None:
        self.steps.append((name, tuple(tuple(n > 1 for n in item.shape) for item in outputs)))

    def takes_same_steps(self, run: Callable[[], Any]) -> bool:
        """Return whether a forward runs, takes the steps of the recorded one, and is finite."""
        other = StepRecorder(self._known)
        try:
            with other:
                outputs = tensors_in(run())
        except Exception:  # a forward may raise anything
            return False
        numbers = [item for item in outputs if item.is_floating_point()]
        return other.steps == self.steps and all(bool(n.isfinite().all()) for n in numbers)
