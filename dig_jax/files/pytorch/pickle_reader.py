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
        match opcode.name:
            case name if name in _VALUES:
                if isinstance(argument, int) and argument.bit_length() > _MAX_BITS:
                    raise InvalidFile(
                        f"integer too large: got {argument.bit_length()} bits; expected at most {_MAX_BITS}"
                    )
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
                insert(stack[-1], key, value)
            case "SETITEMS":
                items, stack = stack, outer.pop()
                for key, value in zip(items[::2], items[1::2], strict=True):
                    insert(stack[-1], key, value)
            case "APPEND":
                _extend(stack[-2], [stack.pop()])
            case "APPENDS" | "ADDITEMS":
                items, stack = stack, outer.pop()
                _extend(stack[-1], items)
            case "GLOBAL":
                stack.append(_name(*argument.split(" ", 1)))
            case "STACK_GLOBAL":
                name, module = stack.pop(), stack.pop()
                stack.append(_name(module, name))
            case "REDUCE" | "NEWOBJ" | "NEWOBJ_EX":
                if opcode.name == "NEWOBJ_EX":
                    stack.pop()
                arguments, function = stack.pop(), stack.pop()
                stack.append(_call(function, arguments, builders))
            case "BUILD":
                state = stack.pop()
                match stack[-1]:
                    case Opaque() as target if isinstance(state, dict):
                        target.state = state
                    case Stateful() as target:
                        target.set_state(state)
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
                    raise InvalidFile(
                        f"unsupported pickle protocol: got {argument}; expected at most {_MAX_PROTOCOL}"
                    )
            case "FRAME":
                pass
            case "STOP":
                return stack.pop()
            case _:
                raise InvalidFile(f"unsupported pickle opcode {opcode.name}, which PyTorch does not write")
    raise InvalidFile("corrupt pickle: no STOP opcode")


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


def _extend(target: Any, items: list[Any]) -> None:
    if isinstance(target, list):
        target.extend(items)
    elif not isinstance(target, Opaque):
        raise InvalidFile(f"corrupt pickle: item appended to an object of type {type(target).__name__}")
