"""Knows which module's code is running."""

import itertools
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import CodeType, FrameType

from torch import nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)

from prunegraph.graph.trace.attribute_reads import Read, custom_functions, is_custom


class ModuleStack:
    """Knows the path of the module whose forward is running."""

    def __init__(self, model: nn.Module) -> None:
        self._modules: dict[str, nn.Module] = dict(model.named_modules())
        self._names = {id(module): name for name, module in self._modules.items()}
        self._kinds: dict[CodeType, set[type]] = {}
        for kind in {type(module) for module in self._modules.values()}:
            for _, function in custom_functions(kind):
                self._kinds.setdefault(function.__code__, set()).add(kind)
        self._by_kind: dict[type, list[str]] = {}
        for name, module in self._modules.items():
            self._by_kind.setdefault(type(module), []).append(name)
        self._stack: list[str] = []

    @property
    def current(self) -> str:
        """Path of the innermost running module of the model."""
        return self._stack[-1] if self._stack else ""

    @property
    def running(self) -> nn.Module:
        """That module."""
        return self._modules[self.current]

    @property
    def running_own_code(self) -> bool:
        """True if that module's class is the user's own, not one of ``torch.nn``."""
        return is_custom(type(self.running))

    def named(self, reads: set[Read]) -> set[tuple[str, str]]:
        """Return reads of the model's modules by path; others of their classes are left out."""
        return {(self._names[owner], name) for owner, name in reads if owner in self._names}

    def caller(self) -> str | None:
        """Return the path of the module whose own method is running, be it its forward or not.

        None if that is one of ``torch.nn``'s modules. Frames' locals are not looked at: that would
        keep the tensors in them alive.
        """
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            kinds = self._kinds.get(frame.f_code)
            if kinds is not None:
                break
            frame = frame.f_back
        else:
            return None
        if isinstance(self.running, tuple(kinds)):
            return self.current
        inside = f"{self.current}." if self.current else ""
        named = (name for kind in kinds for name in self._by_kind[kind])
        found = [*itertools.islice((name for name in named if name.startswith(inside)), 2)]
        return found[0] if len(found) == 1 else None

    def _enter(self, module: nn.Module, _args: object) -> None:
        self._stack.append(self._names.get(id(module), self.current))

    def _leave(self, _module: nn.Module, _args: object, _out: object) -> None:
        self._stack.pop()

    @contextmanager
    def tracking(self) -> Iterator[None]:
        """Follow every module call while the context is open."""
        with ExitStack() as stack:
            stack.callback(register_module_forward_pre_hook(self._enter).remove)
            # called where a forward raises, too: whoever called it may go on
            left = register_module_forward_hook(self._leave, always_call=True)
            stack.callback(left.remove)
            yield
