"""Python code of graphs: functions that take their inputs in one list, and empty it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.fx.graph import CodeGen, PythonCode

_OVERLOAD = re.compile(r"\btorch\.ops\.(\w+)\.(\w+)\.(\w+)\(")


class BoxedCodeGen(CodeGen):
    """Generates `forward(self, boxed)`, whose body is rewritten by a function from lines to lines.

    Operators are called by what is behind `torch.ops`: names lead to it that the generated function finds at once.
    Those in `direct` are called by what it says for them ("namespace.name.overload"): Python code, or a function.
    """

    def __init__(
        self, rewritten: Callable[[list[str]], list[str]], direct: Mapping[str, str | Callable[..., Any]]
    ) -> None:
        super().__init__()
        self._body_transformer = self._with_short_calls
        self._rewritten, self._direct = rewritten, direct
        self._called: dict[str, Any] = {}

    def gen_fn_def(self, free_vars: list[str], maybe_return_annotation: str, **_: Any) -> str:
        """The function's first lines: signature, unpacking, clearing."""
        names = [v.split(":")[0].split("=")[0].strip() for v in free_vars if v != "self"]
        unpack = f"    {', '.join(names)}, = boxed\n" if names else ""
        return f"def {self._func_name}(self, boxed){maybe_return_annotation}:\n{unpack}    boxed.clear()"

    def _gen_python_code(self, *args: Any, **kwargs: Any) -> PythonCode:
        code = super()._gen_python_code(*args, **kwargs)
        code.globals.update(self._called)
        return code

    def _with_short_calls(self, lines: list[str]) -> list[str]:
        return [_OVERLOAD.sub(self._short_call, line) for line in self._rewritten(lines)]

    def _short_call(self, call: re.Match[str]) -> str:
        target = self._direct.get(f"{call[1]}.{call[2]}.{call[3]}")
        if isinstance(target, str):
            return f"{target}("
        if target is None:
            target = getattr(getattr(getattr(torch.ops, call[1]), call[2]), call[3])._op
        name = f"OP_{call[1]}_{call[2]}_{call[3]}"  # no node is named in capitals
        self._called[name] = target
        return f"{name}("
