"""Pickles read as data: nothing is imported and nothing is called but the few builders that are passed in.

A machine of its own over `pickletools`' decoding of the opcodes (PEP 307, PEP 3154). The library's unpickler
calls what a file names, and allocates what a file claims.
"""

import dataclasses
import io
import pickletools
import reprlib
from collections.abc import Callable, Mapping
from typing import Any

from dig_jax.errors import InvalidFile

# Numbers of more bits are no sizes, and slow to compute with.
_MAX_BITS = 128
_MAX_PROTOCOL = 5
_VALUES = {
    *("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT"),
    *("BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
    *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}


@dataclasses.dataclass(frozen=True)
class Name:
    """A class or function that a pickle names, such as torch.FloatStorage; it is never imported."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclasses.dataclass(eq=False)
class Opaque:
    """In place of an object of any class but the known ones.

    Attributes:
        kind: what it would have been.
        state: its attributes, where the pickle gives them as a dict; data, as all that is read.
    """

    kind: str
    state: dict = dataclasses.field(default_factory=dict)


def read_pickle(
    data: bytes, builders: Mapping[str, Callable[[tuple], Any]], persistent: Callable[[Any], Any]
) -> Any:
    """The object of one pickle: dicts, lists, tuples, numbers, strings, and what the builders make.

    Args:
        builders: for "module.name", a function of the tuple of arguments; other calls give an `Opaque`.
        persistent: makes an object of a persistent id.

    Raises:
        InvalidFile: the pickle is damaged or has opcodes that PyTorch does not write.
    """
    try:
        return _run(data, builders, persistent)
    except InvalidFile:
        raise
    except (IndexError, KeyError) as error:
        raise InvalidFile("its pickle is damaged: it takes what is not there") from error
    except ValueError as error:
        raise InvalidFile(f"its pickle is damaged: {str(error).splitlines()[0][:100]}") from error


def _run(
    data: bytes, builders: Mapping[str, Callable[[tuple], Any]], persistent: Callable[[Any], Any]
) -> Any:
    stack: list[Any] = []
    outer: list[list[Any]] = []  # the stacks below each mark
    memo: dict[int, Any] = {}
    for opcode, argument, _ in pickletools.genops(io.BytesIO(data)):
        match opcode.name:
            case name if name in _VALUES:
                if isinstance(argument, int) and argument.bit_length() > _MAX_BITS:
                    raise InvalidFile(f"its pickle has a number of {argument.bit_length()} bits")
                stack.append(argument)
            case name if name in _CONSTANTS:
                stack.append(_CONSTANTS[name])
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "MARK":
                outer.append(stack)
                stack = []
            case "TUPLE":
                items, stack = stack, outer.pop()
                stack.append(tuple(items))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(opcode.name[-1])
                items = [stack.pop() for _ in range(count)]
                stack.append(tuple(reversed(items)))
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_SET":
                stack.append(Opaque("set"))
            case "FROZENSET":
                stack = outer.pop()
                stack.append(Opaque("frozenset"))
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                put(stack[-1], key, value)
            case "SETITEMS":
                items, stack = stack, outer.pop()
                for key, value in zip(items[::2], items[1::2], strict=True):
                    put(stack[-1], key, value)
            case "APPEND":
                _extend(stack[-2], [stack.pop()])
            case "APPENDS" | "ADDITEMS":
                items, stack = stack, outer.pop()
                _extend(stack[-1], items)
            case "GLOBAL":
                stack.append(Name(*argument.split(" ", 1)))
            case "STACK_GLOBAL":
                name, module = stack.pop(), stack.pop()
                stack.append(Name(str(module), str(name)))
            case "REDUCE" | "NEWOBJ" | "NEWOBJ_EX":
                if opcode.name == "NEWOBJ_EX":
                    stack.pop()
                arguments, function = stack.pop(), stack.pop()
                stack.append(_built(function, arguments, builders))
            case "BUILD":
                state = stack.pop()
                if isinstance(stack[-1], Opaque) and isinstance(state, dict):
                    stack[-1].state = state
            case "BINPERSID":
                stack.append(persistent(stack.pop()))
            case "POP":
                stack.pop()
            case "POP_MARK":
                stack = outer.pop()
            case "DUP":
                stack.append(stack[-1])
            case "PROTO":
                if argument > _MAX_PROTOCOL:
                    raise InvalidFile(f"its pickle is of protocol {argument}, and not 2 to {_MAX_PROTOCOL}")
            case "FRAME":
                pass
            case "STOP":
                return stack.pop()
            case _:
                raise InvalidFile(f"its pickle has the opcode {opcode.name}, which PyTorch does not write")
    raise InvalidFile("its pickle has no end")


def _built(function: Any, arguments: Any, builders: Mapping[str, Callable[[tuple], Any]]) -> Any:
    if str(function) in builders and isinstance(function, Name) and isinstance(arguments, tuple):
        return builders[str(function)](arguments)
    return Opaque(str(function) if isinstance(function, Name) else type(function).__name__)


def put(target: Any, key: Any, value: Any) -> None:
    """target[key] = value of a dict; objects that are not known take what they are given.

    Raises:
        InvalidFile: there is such a key.
    """
    if not isinstance(target, dict):
        if not isinstance(target, Opaque):
            raise InvalidFile(f"its pickle sets an item of a {type(target).__name__}")
        return
    # Other keys may be made to have equal hashes, and are none that a parameter has.
    if type(key) is not str and (type(key) is not int or key.bit_length() > 63):
        key = Opaque(f"a key of type {type(key).__name__}")
    if key in target:
        raise InvalidFile(f"the name {reprlib.repr(key)} stands twice in it")
    target[key] = value


def _extend(target: Any, items: list[Any]) -> None:
    if isinstance(target, list):
        target.extend(items)
    elif not isinstance(target, Opaque):
        raise InvalidFile(f"its pickle appends to a {type(target).__name__}")
