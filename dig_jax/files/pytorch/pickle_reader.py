"""Read a pickle as data: import nothing and call nothing except the builders passed in.

`_run` is a virtual machine over the opcodes that `pickletools` decodes (PEP 307, PEP 3154). The standard
library's unpickler calls what a file names and allocates what a file claims.
"""

import abc
import dataclasses
import io
import pickletools
import reprlib
from collections.abc import Callable, Mapping
from typing import Any

from dig_jax.errors import InvalidFile, one_line

# Larger integers are never sizes, and they are slow to compute with.
_MAX_BITS = 128
_MAX_PROTOCOL = 5
# Bytes. The pickle of DiG-XL/2 with its average and optimizer state has 0.3 MB.
MAX_PICKLE = 4 * 2**20
# Characters. A memoized text can be used again with every three bytes of a pickle.
MAX_NAME = 300
Builders = Mapping[str, Callable[[tuple], Any]]
_VALUES = {
    *("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT"),
    *("BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
    *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_EMPTY: Mapping[str, Callable[[], Any]] = {
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_SET": lambda: Opaque("set"),
}


@dataclasses.dataclass(frozen=True)
class Name:
    """A class or function that a pickle refers to, such as torch.FloatStorage. It is never imported."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclasses.dataclass(eq=False)
class Opaque:
    """A placeholder for an object of any other class.

    Attributes:
        kind: name of the class.
        state: attributes of the object, if the pickle stores them as a dict.
    """

    kind: str
    state: dict = dataclasses.field(default_factory=dict)


class Stateful(abc.ABC):
    """What a builder may return for an object whose state follows in the pickle."""

    @abc.abstractmethod
    def set_state(self, state: Any) -> None:
        """Set the state of the object.

        Raises:
            InvalidFile: invalid state.
        """


def read_pickle(data: bytes, builders: Builders, persistent: Callable[[Any], Any]) -> Any:
    """Return the object of a pickle: dicts, lists, tuples, numbers, strings and what the builders make.

    Args:
        builders: {"module.name": function of the argument tuple}. Other calls give an `Opaque`.
        persistent: function of a persistent id.

    Raises:
        InvalidFile: the pickle is corrupt or has opcodes that PyTorch does not write.
    """
    try:
        return _run(data, builders, persistent)
    except InvalidFile:
        raise
    except (IndexError, KeyError) as error:
        raise InvalidFile("corrupt pickle: missing stack or memo entry") from error
    except ValueError as error:
        raise InvalidFile(f"corrupt pickle: {one_line(error)[:100]}") from error


def _run(data: bytes, builders: Builders, persistent: Callable[[Any], Any]) -> Any:
    stack: list[Any] = []
    outer: list[list[Any]] = []  # the stacks below each mark
    memo: dict[int, Any] = {}
    argument: Any
    for opcode, argument, _ in pickletools.genops(io.BytesIO(data)):
        _check_argument(opcode.name, argument)
        match opcode.name:
            case name if name in _VALUES:
                stack.append(argument)
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "MARK":
                outer.append(stack)
                stack = []
            case "TUPLE" | "FROZENSET" | "SETITEMS" | "APPENDS" | "ADDITEMS" | "POP_MARK":
                items, stack = stack, outer.pop()
                _take_items(opcode.name, items, stack)
            case "BINPERSID":
                stack.append(persistent(stack.pop()))
            case "GLOBAL":
                stack.append(_name(*argument.split(" ", 1)))
            case "PROTO" | "FRAME":
                pass
            case "STOP":
                return stack.pop()
            case name:
                _step(name, stack, builders)
    raise InvalidFile("corrupt pickle: no STOP opcode")


def _check_argument(name: str, argument: Any) -> None:
    if isinstance(argument, int) and argument.bit_length() > _MAX_BITS:
        raise InvalidFile(
            f"integer too large: got {argument.bit_length()} bits; expected at most {_MAX_BITS}"
        )
    if name == "PROTO" and argument > _MAX_PROTOCOL:
        raise InvalidFile(f"unsupported pickle protocol: got {argument}; expected at most {_MAX_PROTOCOL}")


def _take_items(name: str, items: list[Any], stack: list[Any]) -> None:
    """Run an opcode that takes all items above the last mark."""
    match name:
        case "TUPLE":
            stack.append(tuple(items))
        case "FROZENSET":
            stack.append(Opaque("frozenset"))
        case "SETITEMS":
            for key, value in zip(items[::2], items[1::2], strict=True):
                insert(stack[-1], key, value)
        case "APPENDS" | "ADDITEMS":
            _extend(stack[-1], items)


def _step(name: str, stack: list[Any], builders: Builders) -> None:
    """Run an opcode that has no argument and needs only the stack above the last mark."""
    match name:
        case name if name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        case "TUPLE1" | "TUPLE2" | "TUPLE3":
            items = [stack.pop() for _ in range(int(name[-1]))]
            stack.append(tuple(reversed(items)))
        case name if name in _EMPTY:
            stack.append(_EMPTY[name]())
        case "SETITEM":
            value, key = stack.pop(), stack.pop()
            insert(stack[-1], key, value)
        case "APPEND":
            _extend(stack[-2], [stack.pop()])
        case "STACK_GLOBAL":
            named, module = stack.pop(), stack.pop()
            stack.append(_name(module, named))
        case "REDUCE" | "NEWOBJ" | "NEWOBJ_EX":
            if name == "NEWOBJ_EX":
                stack.pop()
            arguments, function = stack.pop(), stack.pop()
            stack.append(_call(function, arguments, builders))
        case "BUILD":
            state = stack.pop()
            _set_state(stack[-1], state)
        case "POP":
            stack.pop()
        case "DUP":
            stack.append(stack[-1])
        case _:
            raise InvalidFile(f"unsupported pickle opcode {name}, which PyTorch does not write")


def _name(module: Any, name: Any) -> Name:
    if not all(isinstance(part, str) and len(part) <= MAX_NAME for part in (module, name)):
        raise InvalidFile(
            f"corrupt pickle: name of a class that is not text of at most {MAX_NAME} characters"
        )
    return Name(module, name)


def _call(function: Any, arguments: Any, builders: Builders) -> Any:
    if str(function) in builders and isinstance(function, Name) and isinstance(arguments, tuple):
        return builders[str(function)](arguments)
    return Opaque(str(function) if isinstance(function, Name) else type(function).__name__)


def insert(target: Any, key: Any, value: Any) -> None:
    """Set target[key] of a dict; do nothing for an `Opaque`.

    Raises:
        InvalidFile: duplicate key, or a target of another type.
    """
    if not isinstance(target, dict):
        if not isinstance(target, Opaque):
            raise InvalidFile(f"corrupt pickle: item set on an object of type {type(target).__name__}")
        return
    # Keys of other types are never parameters, and a file could slow a dict down by keys with equal hashes.
    if type(key) is not str and (type(key) is not int or key.bit_length() > 63):
        key = Opaque(f"a key of type {type(key).__name__}")
    if key in target:
        raise InvalidFile(f"duplicate name {reprlib.repr(key)}")
    target[key] = value


def _set_state(target: Any, state: Any) -> None:
    match target:
        case Opaque() if isinstance(state, dict):
            target.state = state
        case Stateful():
            target.set_state(state)


def _extend(target: Any, items: list[Any]) -> None:
    if isinstance(target, list):
        target.extend(items)
    elif not isinstance(target, Opaque):
        raise InvalidFile(f"corrupt pickle: item appended to an object of type {type(target).__name__}")
