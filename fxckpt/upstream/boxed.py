"""Python code of graphs: functions that take their inputs in one list, and empty it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.fx.graph import CodeGen


class BoxedCodeGen(CodeGen):
    """Generates `forward(self, boxed)`, whose body is rewritten by a function from lines to lines."""

    def __init__(self, rewritten: Callable[[list[str]], list[str]]) -> None:
        super().__init__()
        self._body_transformer = rewritten

    def gen_fn_def(self, free_vars: list[str], maybe_return_annotation: str, **_: Any) -> str:
        """The function's first lines: signature, unpacking, clearing."""
        names = [v.split(":")[0].split("=")[0].strip() for v in free_vars if v != "self"]
        unpack = f"    {', '.join(names)}, = boxed\n" if names else ""
        return f"def {self._func_name}(self, boxed){maybe_return_annotation}:\n{unpack}    boxed.clear()"
