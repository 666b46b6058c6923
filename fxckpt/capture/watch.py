"""What a plan depends on, checked at every call in microseconds: forms of inputs and parameters, flags, autocast."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fxckpt.capture.functional import tensor_attributes
from fxckpt.capture.roles import Input, InputKind
from fxckpt.capture.structure import Structure
from fxckpt.errors import RuntimeContractError
from fxckpt.upstream.ambient import Ambient
from fxckpt.upstream.hooks import (
    buffers_of,
    children_of,
    hooks_of,
    parameters_of,
    sizes_of,
    which_have_hooks,
    with_accumulation_hooks,
)

Signature = Hashable

_Place = tuple[dict[str, Any], str]
"""Where something is found: a dictionary and a key."""


@dataclass(frozen=True)
class Watch:
    """A model's parts, listed once, so that looking them over is cheap.

    Attributes:
        modules: all modules with their paths; the root is first.
        children: where each submodule is found, and which it was.
        parameters, buffers: where each is found, by path.
        attributes: where plain tensor attributes are found.
        sizes: how many submodules, parameters and buffers each module had.
    """

    modules: tuple[tuple[str, nn.Module], ...]
    children: tuple[tuple[_Place, nn.Module], ...]
    parameters: dict[str, _Place]
    buffers: dict[str, _Place]
    attributes: tuple[_Place, ...]
    sizes: tuple[int, ...]

    def changed(self) -> bool:
        """Whether submodules, parameters or buffers were added, removed or replaced by others of another name."""
        try:
            return (
                any(owner[name] is not child for (owner, name), child in self.children)
                or sizes_of(self.modules) != self.sizes
            )
        except KeyError:
            return True

    def signature(self, tensors: list[torch.Tensor], structure: Structure) -> Signature:
        """A hashable value that is equal for calls which one plan serves."""
        parameters = [owner[name] for owner, name in self.parameters.values()]
        return (
            structure,
            tuple((t.shape, t.stride(), t.dtype, t.device, t.requires_grad, t.is_leaf) for t in tensors),
            _repeated(tensors),
            tuple([module.training for _, module in self.modules]),
            tuple([(p.requires_grad, p.dtype, p.shape, p.device) for p in parameters if p is not None]),
            tuple([(b.dtype, b.shape, b.device) for o, n in self.buffers.values() if (b := o[n]) is not None]),
            which_have_hooks(self.modules[1:]),
            self.hooked_parameters(),
            tuple([tuple([x for x in vars(m).values() if type(x) in _PLAIN]) for _, m in self.modules]),
            Ambient.now(),
        )

    def hooked_parameters(self) -> frozenset[str]:
        """Paths of the parameters with hooks that run during backward, and may change them there."""
        return with_accumulation_hooks([(path, owner[name]) for path, (owner, name) in self.parameters.items()])

    def gradients_allocated(self) -> bool:
        """Whether some parameter has a gradient, which this step will add to."""
        return any(p is not None and p.grad is not None for o, n in self.parameters.values() for p in (o[n],))

    def given(self, inputs: Sequence[Input], arguments: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The tensors that graph inputs stand for; `arguments` are those of the call."""
        return [arguments[i.index] if i.kind is InputKind.ARGUMENT else self.tensor(i) for i in inputs]

    def tensor(self, role: Input) -> torch.Tensor:
        """The parameter, buffer or attribute that a graph input stands for."""
        if role.kind is InputKind.ATTRIBUTE:
            owner, name = self.attributes[role.index]
        else:
            owner, name = (self.parameters if role.kind is InputKind.PARAMETER else self.buffers)[role.path]
        return owner[name]  # type: ignore[no-any-return]

    def check(self) -> None:
        """Refuse what would be ignored.

        Raises:
            RuntimeContractError: a submodule has hooks that a captured graph would not call.
        """
        for name, module in self.modules[1:]:
            for kind, hook in hooks_of(module):
                if not _is_captured(hook):
                    raise RuntimeContractError(
                        f"submodule {name!r} has a hook ({kind}), which an optimized module would not call "
                        "at every step: remove it, register it on the root module, or use a hook on a parameter"
                    )


_PLAIN = frozenset({bool, int, float, str})
"""Of attributes of these types the values are looked at."""


def _is_captured(hook: Any) -> bool:
    """Whether the hook is the model's own, as those of weight normalisation are: part of what is captured."""
    homes = ("torch.nn.", "transformers.")
    return any((getattr(owner, "__module__", None) or "").startswith(homes) for owner in (type(hook), hook))


def watch(model: nn.Module) -> Watch:
    """List a model's parts."""
    modules = tuple(model.named_modules())
    children = tuple(
        ((children_of(module), name), child)
        for _, module in modules
        for name, child in children_of(module).items()
        if child is not None
    )
    return Watch(
        modules,
        children,
        dict(_places(modules, parameters_of)),
        dict(_places(modules, buffers_of)),
        tuple(tensor_attributes(model)),
        sizes_of(modules),
    )


def _places(
    modules: tuple[tuple[str, nn.Module], ...], kind: Callable[[nn.Module], dict[str, Any]]
) -> list[tuple[str, _Place]]:
    return [
        (f"{path}.{name}" if path else name, (kind(module), name)) for path, module in modules for name in kind(module)
    ]


def _repeated(tensors: list[torch.Tensor]) -> tuple[int, ...]:
    """For each tensor the place of its first occurrence: the same tensor given twice is another graph."""
    first: dict[int, int] = {}
    return tuple([first.setdefault(id(t), i) for i, t in enumerate(tensors)])
