"""Replace what torch does for the thread that asks for it; all others go on as if nothing had happened.

`unittest.mock` replaces an attribute for the whole process: while one thread captures a model, another would find that
it can't seed, or that its checkpoints do nothing. Here something stands in the place of what is replaced that looks
which thread asks. It is put there when the first thread comes, and what was there is put back, the very same object,
when the last has left, in whatever order they do. Each thread has replacements of its own, which nest; it leaves them
in the thread that entered them.

Three kinds of things are replaced. A Python function keeps its identity, so that who imported it by name is served too:
its code is exchanged. An attribute of a class gives way to a descriptor. For an attribute of an object, such as an
operator or a module, the object's class gets one.

Threads that a thread starts meanwhile see nothing of its replacements. Autograd runs backward on CPU in the thread that
asks for it, and AOTAutograd traces backward in the thread that traces forward.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import CodeType, FrameType, FunctionType, MethodType, ModuleType
from typing import Any

_LOCK = threading.RLock()


@contextlib.contextmanager
def function_replaced(function: Callable[..., Any], by: Callable[..., Any]) -> Iterator[None]:
    """This thread calls `by(original, *args, **kwargs)` wherever it calls `function(*args, **kwargs)`.

    For a generator function, or one made of it by `contextlib.contextmanager`, `by` is a generator function too.
    """
    with _function_entered(function) as site:
        replacement = functools.partial(by, site.current())
        with _seen(site.place, _View(lambda: replacement)):
            yield


def just_yield(_: Callable[..., Any]) -> Iterator[None]:
    """A context manager's replacement that does nothing around what it is entered for."""
    yield


@contextlib.contextmanager
def _function_entered(function: Callable[..., Any]) -> Iterator[_Function]:
    inner = inspect.unwrap(function)
    assert isinstance(inner, FunctionType)
    assert not inner.__code__.co_freevars, f"{inner.__qualname__} reads variables of the function around it"
    with _entered(_Function, inner, "") as site:
        yield site


def caller() -> FrameType:
    """Within the function that replaces another: the frame that called the other."""
    return sys._getframe(3)  # after this function's own, the replacement's and the replaced function's


@contextlib.contextmanager
def attribute_replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """This thread sees `value` as the attribute of a class, or of an object that has it in its `__dict__`.

    In a module only those see it who ask the module for it, not the module's own functions.
    """
    with _attribute_viewed(owner, name, _View(lambda: value)):
        yield


@contextlib.contextmanager
def state_apart(module: ModuleType, *names: str, functions: tuple[Callable[..., Any], ...] = ()) -> Iterator[None]:
    """What a module's functions keep in its global variables they keep apart for this thread, from what it sees now.

    Args:
        module: whose variables.
        names: those that are also read or set from outside; dictionaries among them are copied.
        functions: which functions; by default all of the module.
    """
    seen = {name: getattr(module, name) for name in names}
    apart = vars(module) | {name: value.copy() if isinstance(value, dict) else value for name, value in seen.items()}
    with contextlib.ExitStack() as stack:
        for function in functions or tuple(f for f in vars(module).values() if _is_of(module, f)):
            site = stack.enter_context(_function_entered(function))
            own = _twin(site.original, apart)
            stack.enter_context(_seen(site.place, _View(functools.partial(_itself, own))))
        for name in names:
            view = _View(functools.partial(apart.__getitem__, name), functools.partial(apart.__setitem__, name))
            stack.enter_context(_attribute_viewed(module, name, view))
        yield


def _is_of(module: ModuleType, value: Any) -> bool:
    inner = inspect.unwrap(value) if isinstance(value, FunctionType) else value
    return isinstance(inner, FunctionType) and inner.__globals__ is vars(module) and not inner.__code__.co_freevars


def _itself(function: FunctionType) -> FunctionType:
    return function


def _twin(function: FunctionType, variables: dict[str, Any]) -> FunctionType:
    """The same function with these global variables."""
    twin = FunctionType(function.__code__, variables, function.__name__, function.__defaults__)
    twin.__kwdefaults__ = function.__kwdefaults__
    return twin


# Who sees what


@dataclass(frozen=True, eq=False)
class _View:
    """What a thread sees in a place, and what happens there if it sets something: by default all threads see it."""

    get: Callable[[], Any]
    set: Callable[[Any], None] | None = None


class _Place(threading.local):
    """The views that a thread has in a place: the last one counts."""

    def __init__(self) -> None:
        self.views: list[_View] = []


@contextlib.contextmanager
def _seen(place: _Place, view: _View) -> Iterator[None]:
    place.views.append(view)
    try:
        yield
    finally:
        place.views.remove(view)


@contextlib.contextmanager
def _attribute_viewed(owner: Any, name: str, view: _View) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        if isinstance(owner, type):
            place = stack.enter_context(_entered(_ClassAttribute, owner, name)).place
        else:
            if isinstance(owner, ModuleType):
                stack.enter_context(_entered(_OwnClass, owner, ""))
            place = stack.enter_context(_entered(_ObjectAttribute, type(owner), name)).place_of(owner)
        stack.enter_context(_seen(place, view))
        yield


# What stands in the places


class _Site:
    """Stands in a place from `__init__` until `put_back`."""

    users = 0

    def put_back(self) -> None:
        """Leave the place as it was found, unless somebody else has put something there since."""
        raise NotImplementedError


_SITES: dict[tuple[Any, int, str], Any] = {}


@contextlib.contextmanager
def _entered(kind: Callable[[Any, str], Any], owner: Any, name: str) -> Iterator[Any]:
    """The site of a kind, which stands in its place while at least one thread is in this context."""
    key = (kind, id(owner), name)
    with _LOCK:
        if key not in _SITES:
            _SITES[key] = kind(owner, name)
        site = _SITES[key]
        site.users += 1
    try:
        yield site
    finally:
        with _LOCK:
            site.users -= 1
            if not site.users:
                del _SITES[key]
                site.put_back()


class _Function(_Site):
    """Code of a function that looks which thread calls it."""

    def __init__(self, function: FunctionType, _: str) -> None:
        self.place = _Place()
        self._function, self._code = function, function.__code__
        self.original = _twin(function, function.__globals__)
        self._standing_in = _standing_in(function.__code__, self.current)
        function.__code__ = self._standing_in

    def current(self) -> Callable[..., Any]:
        """What this thread calls."""
        views = self.place.views
        return views[-1].get() if views else self.original

    def put_back(self) -> None:
        if self._function.__code__ is self._standing_in:
            self._function.__code__ = self._code


def _standing_in(code: CodeType, current: Callable[[], Callable[..., Any]]) -> CodeType:
    """Code of the same kind that calls what `current` returns, and pretends to lie where `code` does.

    It holds `current` as a constant: code has nothing else of its own, wherever it lies.
    """

    def plain(*args: Any, **kwargs: Any) -> Any:
        current: Any = "current"
        return current()(*args, **kwargs)

    def generator(*args: Any, **kwargs: Any) -> Any:
        current: Any = "current"
        return (yield from current()(*args, **kwargs))

    template = (generator if code.co_flags & inspect.CO_GENERATOR else plain).__code__
    constants = tuple(current if constant == "current" else constant for constant in template.co_consts)
    return template.replace(
        co_consts=constants,
        co_filename=code.co_filename,
        co_name=code.co_name,
        co_qualname=code.co_qualname,
        co_firstlineno=code.co_firstlineno,
    )


def seen_here(function: FunctionType) -> Any:
    """What this thread calls where it calls a function: itself, or what stands for it now."""
    for constant in function.__code__.co_consts:
        if isinstance(constant, MethodType) and isinstance(constant.__self__, _Function):
            return constant()
    return function


class _ClassAttribute(_Site):
    """A descriptor in the place of a class's attribute, of its own or inherited."""

    def __init__(self, owner: type, name: str) -> None:
        self.place = _Place()
        self._owner, self._name = owner, name
        self._is_own, self._original = name in vars(owner), inspect.getattr_static(owner, name)
        setattr(owner, name, self)

    def __get__(self, instance: Any, owner: type) -> Any:
        views = self.place.views
        value = views[-1].get() if views else self._original
        bind = getattr(type(value), "__get__", None)
        return value if bind is None else bind(value, instance, owner)

    def put_back(self) -> None:
        if vars(self._owner).get(self._name) is not self:
            return
        if self._is_own:
            setattr(self._owner, self._name, self._original)
        else:
            delattr(self._owner, self._name)


class _ObjectAttribute(_Site):
    """A descriptor for an attribute that objects of a class have in their dictionaries."""

    def __init__(self, kind: type, name: str) -> None:
        self._kind, self._name = kind, name
        self._places: dict[int, tuple[Any, _Place]] = {}
        assert name not in vars(kind), f"{kind.__qualname__} has an attribute {name} for all objects"
        setattr(kind, name, self)

    def place_of(self, instance: Any) -> _Place:
        """Where threads have their views of an object's attribute."""
        with _LOCK:
            return self._places.setdefault(id(instance), (instance, _Place()))[1]

    def _view(self, instance: Any) -> _View | None:
        known = self._places.get(id(instance))
        return known[1].views[-1] if known is not None and known[1].views else None

    def __get__(self, instance: Any, owner: type) -> Any:
        view = self._view(instance)
        if view is not None:
            return view.get()
        if instance is None or self._name not in vars(instance):
            raise AttributeError(f"{owner.__name__!r} has no attribute {self._name!r}", name=self._name, obj=instance)
        return vars(instance)[self._name]

    def __set__(self, instance: Any, value: Any) -> None:
        view = self._view(instance)
        if view is not None and view.set is not None:
            view.set(value)
        else:
            vars(instance)[self._name] = value

    def __delete__(self, instance: Any) -> None:
        del vars(instance)[self._name]

    def put_back(self) -> None:
        if vars(self._kind).get(self._name) is self:
            delattr(self._kind, self._name)


class _OwnClass(_Site):
    """A class of its own for a module, which may have descriptors."""

    def __init__(self, module: ModuleType, _: str) -> None:
        self._module, self._original = module, type(module)
        module.__class__ = self._own = type(self._original.__name__, (self._original,), {})

    def put_back(self) -> None:
        if type(self._module) is self._own:
            self._module.__class__ = self._original
