"""Programs as a plan reads them: the optimized HLO, and the memory that the compiler assigned."""

import dataclasses
import multiprocessing
import re
import tempfile
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import jax

# Of what the compiler dumps, in this order. The last file begins when the others are complete.
_TEXT, _MEMORY, _LAST = (
    f".after_optimizations{end}.txt" for end in ("", "-buffer-assignment", "_after_buffer_assignment")
)


@dataclasses.dataclass(frozen=True)
class CompiledProgram:
    """What a device runs.

    text: an optimized HLO module.
    memory: bytes on a device: arguments, temporaries, outputs that take over no argument's memory, program.
    """

    text: str
    memory: dict[str, int]


def compiled(lowered: jax.stages.Lowered) -> CompiledProgram:
    """Compiles to the end."""
    program = lowered.compile()
    m = program.memory_analysis()
    memory = {
        "arguments": m.argument_size_in_bytes,
        "temporaries": m.temp_size_in_bytes,
        "outputs": m.output_size_in_bytes - m.alias_size_in_bytes,
        "program": m.generated_code_size_in_bytes,
    }
    return CompiledProgram(program.as_text(), memory)


def optimized(lower: Callable[[], jax.stages.Lowered]) -> CompiledProgram:
    """Compiles for TPUs up to the machine code, which takes minutes and tells a plan only its own size.

    The compiler knows no such end, but writes down what it has before it goes on; so it runs in a process
    that is killed then. Of the program, the constants alone are counted.

    Args:
        lower: what to compile; it can be pickled.

    Raises:
        JaxRuntimeError: the compiler refuses the program.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory() as directory:
        process = context.Process(target=_compile, args=(lower, directory, sender), daemon=True)
        process.start()
        sender.close()
        try:
            while not (last := list(Path(directory).glob(f"*{_LAST}"))) and not receiver.poll(0.1):
                pass
            if not last:
                raise jax.errors.JaxRuntimeError(_received(receiver))
        finally:
            process.kill()
            process.join()
        stem = str(last[0]).removesuffix(_LAST)
        return CompiledProgram(Path(stem + _TEXT).read_text(), _assigned(Path(stem + _MEMORY).read_text()))


def _compile(lower: Callable[[], jax.stages.Lowered], directory: str, sender: Connection) -> None:
    lowered = lower()
    try:
        lowered.compile(compiler_options={"xla_dump_to": directory, "xla_dump_hlo_as_text": True})
    except jax.errors.JaxRuntimeError as error:
        sender.send(str(error))


def _received(receiver: Connection) -> str:
    try:
        return receiver.recv()
    except EOFError:
        return "INTERNAL: the compiler's process ended without a word"


def _assigned(text: str) -> dict[str, int]:
    """The sizes in a buffer assignment: of the chip's main memory, which has no colour."""
    memory = dict.fromkeys(("arguments", "temporaries", "outputs", "program"), 0)
    kinds = {
        "parameter": "arguments",
        "preallocated-temp": "temporaries",
        "output shape": "outputs",
        "maybe-live-out": "outputs",
        "constant": "program",
    }
    for size, rest in re.findall(r"^allocation \d+: size (\d+), (.*)", text, re.MULTILINE):
        kind = next((kind for start, kind in kinds.items() if rest.startswith(start)), None)
        if kind:
            memory[kind] += int(size)
    return memory
