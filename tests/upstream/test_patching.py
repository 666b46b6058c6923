"""Patches are seen by the thread that makes them, by no other, and leave nothing behind."""

from __future__ import annotations

import contextlib
import threading
import types
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import pytest

from fxckpt.upstream.patching import attribute_replaced, caller, function_replaced, state_apart
from fxckpt.upstream.warned import warnings_ignored

Value = TypeVar("Value")


def elsewhere(function: Callable[..., Value], *args: Any) -> Value:
    """What a function returns in another thread."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function, *args).result()


def greet(name: str, *, mark: str = "!") -> str:
    """Say hello."""
    return f"hello {name}{mark}"


greeting_by_name = greet


def louder(original: Callable[..., str], name: str, **kwargs: str) -> str:
    return original(name.upper(), **kwargs)


@contextlib.contextmanager
def announced(name: str) -> Iterator[str]:
    yield f"here is {name}"


class Base:
    inherited = "of the base"

    def where(self) -> str:
        return "in the base"


class Child(Base):
    count = 1

    @classmethod
    def name(cls) -> str:
        return cls.__name__

    @staticmethod
    def add(a: int, b: int) -> int:
        return a + b

    def __bool__(self) -> bool:
        return True


class Holder:
    def __init__(self) -> None:
        self.table = {"one": 1}


def made_module() -> Any:
    """A module with state, functions that keep it, and a function that is a context."""
    module = types.ModuleType("made")
    source = """
import contextlib

depth = 0
notes = {}

def deeper():
    global depth
    depth += 1
    return depth

@contextlib.contextmanager
def noting(name):
    global notes
    before = notes
    notes = {**notes, name: depth}
    yield
    notes = before

def current():
    return notes
"""
    exec(compile(source, "made.py", "exec"), vars(module))
    return module


# Functions


def test_a_function_is_replaced_for_one_thread_whoever_imported_it() -> None:
    with function_replaced(greet, louder):
        assert (greet("you"), greeting_by_name("you", mark="?")) == ("hello YOU!", "hello YOU?")
        assert elsewhere(greet, "you") == "hello you!"
    assert greet("you") == "hello you!"


def test_a_function_gets_its_own_code_back() -> None:
    before = greet.__code__, greet.__defaults__, greet.__kwdefaults__
    with contextlib.suppress(KeyboardInterrupt), function_replaced(greet, louder):
        assert greet.__code__ is not before[0]
        raise KeyboardInterrupt
    assert greet.__code__ is before[0]
    assert (greet.__defaults__, greet.__kwdefaults__) == before[1:]


def test_replacements_of_a_function_nest() -> None:
    def twice(original: Callable[..., str], name: str) -> str:
        return original(name) * 2

    with function_replaced(greet, louder):
        with function_replaced(greet, twice):
            assert greet("a") == "hello A!hello A!"
        assert greet("a") == "hello A!"


def test_what_replaces_a_function_knows_who_called() -> None:
    with function_replaced(greet, lambda _, name: f"{name}: {caller().f_code.co_name}"):
        assert greet("me") == "me: test_what_replaces_a_function_knows_who_called"


def test_the_function_of_a_context() -> None:
    def hushed(original: Callable[..., Iterator[str]], name: str) -> Iterator[str]:
        yield from (text.upper() for text in original(name))

    def announcement() -> str:
        with announced("nobody") as text:
            return text

    with function_replaced(announced, hushed):
        assert announcement() == "HERE IS NOBODY"
        assert elsewhere(announcement) == "here is nobody"
    assert announcement() == "here is nobody"


def test_an_error_in_a_replaced_function_is_shown_in_its_file() -> None:
    def fails(_: Callable[..., str], name: str) -> str:
        raise ValueError(name)

    with function_replaced(greet, fails), pytest.raises(ValueError, match="you") as failure:
        greet("you")
    assert [str(entry.path) for entry in failure.traceback] == [__file__] * 3


def test_a_function_that_reads_variables_around_it_is_refused() -> None:
    outside = 1

    def reads() -> int:
        return outside

    with pytest.raises(AssertionError, match="reads variables of the function around it"):
        contextlib.ExitStack().enter_context(function_replaced(reads, louder))


# Attributes of classes


def test_attributes_of_a_class() -> None:
    own = vars(Child).copy()
    with (
        attribute_replaced(Child, "count", 2),
        attribute_replaced(Child, "inherited", "of the child"),
        attribute_replaced(Child, "where", lambda self: f"in {type(self).__name__}"),
        attribute_replaced(Child, "name", classmethod(lambda cls: cls.__name__.upper())),
        attribute_replaced(Child, "add", staticmethod(lambda a, b: a * b)),
        attribute_replaced(Child, "__bool__", lambda _: False),
    ):
        child = Child()
        seen = (Child.count, child.inherited, child.where(), child.name(), Child.add(2, 3), bool(child))
        assert seen == (2, "of the child", "in Child", "CHILD", 6, False)
        found = elsewhere(
            lambda: (Child.count, child.inherited, child.where(), child.name(), Child.add(2, 3), bool(child))
        )
        assert found == (1, "of the base", "in the base", "Child", 5, True)
    assert vars(Child) == own
    assert all(vars(Child)[name] is value for name, value in own.items())


def test_what_objects_have_themselves_comes_before_what_their_class_has() -> None:
    child = Child()
    child.count = 7
    with attribute_replaced(Child, "count", 2):
        assert (child.count, Child.count) == (7, 2)


# Attributes of objects, and of modules


def test_attributes_of_an_object() -> None:
    first, second = Holder(), Holder()
    table, kind = first.table, vars(Holder).copy()
    with attribute_replaced(first, "table", {"two": 2}):
        assert (first.table, second.table) == ({"two": 2}, {"one": 1})
        assert elsewhere(lambda: first.table is table)
        second.table = {}
        assert elsewhere(lambda: second.table) == {}
        assert Holder().table == {"one": 1}
        del second.table
        with pytest.raises(AttributeError, match="'Holder' has no attribute 'table'"):
            _ = second.table
        with pytest.raises(AttributeError):
            _ = Holder.table  # type: ignore[misc]
    assert first.table is table
    assert vars(Holder) == kind


def test_attributes_of_a_module() -> None:
    module = made_module()
    with attribute_replaced(module, "depth", 10), attribute_replaced(module, "notes", None):
        assert (module.depth, module.notes) == (10, None)
        assert elsewhere(lambda: (module.depth, module.notes)) == (0, {})
        assert elsewhere(module.deeper) == 1
    assert (type(module), module.depth) == (types.ModuleType, 1)


def test_state_of_a_module() -> None:
    module = made_module()
    module.deeper()
    with state_apart(module, "depth", "notes"):
        assert (module.deeper(), module.deeper(), module.depth) == (2, 3, 3)
        assert elsewhere(lambda: (module.deeper(), module.depth)) == (2, 2)
        with module.noting("a"):
            module.notes["b"] = 0
            assert module.current() == module.notes == {"a": 3, "b": 0}
            assert elsewhere(module.current) == elsewhere(lambda: module.notes) == {}
        module.depth = 8
        assert module.deeper() == 9
    assert (module.deeper(), module.notes) == (3, {})


def test_state_within_state() -> None:
    module = made_module()
    with state_apart(module, "depth", "notes"):
        module.deeper()
        with state_apart(module, "depth", "notes"), module.noting("a"):
            assert (module.deeper(), module.notes) == (2, {"a": 1})
        assert (module.deeper(), module.notes) == (2, {})
    assert module.depth == 0


def test_state_of_some_functions_of_a_module() -> None:
    module = made_module()
    with state_apart(module, functions=(module.deeper,)):
        assert (module.deeper(), module.depth) == (1, 0)


# Several threads


@pytest.mark.parametrize("first_out", [0, 1])
@pytest.mark.parametrize("place", ["function", "class", "object", "module"])
def test_threads_that_leave_in_any_order(place: str, first_out: int) -> None:
    """Each sees its own until it leaves; when the last has left all is as it was."""
    holder, module = Holder(), made_module()
    code, table, count = greet.__code__, holder.table, vars(Child)["count"]

    def replaced(number: int) -> contextlib.AbstractContextManager[None]:
        return {
            "function": lambda: function_replaced(greet, lambda _, name: f"{number} {name}"),
            "class": lambda: attribute_replaced(Child, "count", f"{number} you"),
            "object": lambda: attribute_replaced(holder, "table", f"{number} you"),
            "module": lambda: attribute_replaced(module, "notes", f"{number} you"),
        }[place]()

    def seen() -> Any:
        ways: dict[str, Callable[[], Any]] = {
            "function": lambda: greet("you"),
            "class": lambda: Child.count,
            "object": lambda: holder.table,
            "module": lambda: module.notes,
        }
        return ways[place]()

    def is_original() -> bool:
        ways: dict[str, Callable[[], bool]] = {
            "function": lambda: greet.__code__ is code,
            "class": lambda: vars(Child)["count"] is count,
            "object": lambda: holder.table is table and "table" not in vars(Holder),
            "module": lambda: type(module) is types.ModuleType,
        }
        return ways[place]()

    contexts = [replaced(number) for number in range(2)]
    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as other:
        pools = (one, other)
        for pool, context in zip(pools, contexts, strict=True):
            pool.submit(context.__enter__).result()
        assert [pool.submit(seen).result() for pool in pools] == ["0 you", "1 you"]
        pools[first_out].submit(contexts[first_out].__exit__, None, None, None).result()
        last = 1 - first_out
        assert pools[last].submit(seen).result() == f"{last} you"
        assert pools[first_out].submit(seen).result() == seen()
        assert not is_original()
        pools[last].submit(contexts[last].__exit__, None, None, None).result()
    assert is_original()


def test_many_threads_at_once() -> None:
    """Entering and leaving all the time: each sees what it should, and it ends as it began."""
    code, count = greet.__code__, vars(Child)["count"]
    holder = Holder()
    table = holder.table
    start = threading.Barrier(8)

    def work(number: int) -> None:
        start.wait()
        for _ in range(200):
            with (
                function_replaced(greet, lambda _, name: f"{number} {name}"),
                attribute_replaced(Child, "count", number),
                attribute_replaced(holder, "table", number),
            ):
                assert [greet("you"), Child.count, holder.table] == [f"{number} you", number, number]
            assert (greet("you"), Child.count) == ("hello you!", 1)
            assert holder.table is table

    with ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(work, number) for number in range(8)]:
            done.result()
    assert greet.__code__ is code
    assert vars(Child)["count"] is count
    assert holder.table is table


@pytest.mark.parametrize("place", ["function", "class"])
def test_what_others_put_in_a_place_meanwhile_stays(place: str) -> None:
    def theirs(name: str) -> str:
        return f"theirs, {name}"

    code = greet.__code__
    try:
        if place == "function":
            with function_replaced(greet, louder):
                greet.__code__ = theirs.__code__
            assert greet("you") == "theirs, you"
        else:
            with attribute_replaced(Child, "count", 2):
                Child.count = 3
            assert Child.count == 3
    finally:
        greet.__code__, Child.count = code, 1


# Warnings


def warn() -> None:
    warnings.warn("something is odd", UserWarning, stacklevel=2)


def test_warnings_are_ignored_in_one_thread() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with warnings_ignored():
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                warn()
                warn_by_name("odd", UserWarning)
            assert not caught
            elsewhere(warn)
            assert len(caught) == 1
        warn()
        assert [str(warning.message) for warning in caught] == ["something is odd"] * 2
    assert type(warnings) is types.ModuleType


def test_filters_of_other_threads_are_theirs() -> None:
    def strict() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warn()

    with warnings_ignored(), pytest.raises(UserWarning, match="something is odd"):
        elsewhere(strict)


warn_by_name = warnings.warn
