"""Compile a program and return its optimized HLO and memory assignment."""

import dataclasses
import multiprocessing
import re
import tempfile
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import jax

from dig_jax.errors import UserError

# Files that the compiler dumps, in this order. It starts a file after the previous ones are complete.
_TEXT, _MEMORY, _LAST = (
    f".after_optimizations{end}.txt" for end in ("", "-buffer-assignment", "_after_buffer_assignment")
)
# XLA finds no tiles for a Triton product on a GPU whose rows are then split into 258 tokens, as those of DiS.
_NO_TILES = "Couldn't find output tile sizes that satisfy"
# Kinds of allocations in a dumped buffer assignment.
_ALLOCATIONS = {
    "parameter": "arguments",
    "preallocated-temp": "temporaries",
    "output shape": "outputs",
    "maybe-live-out": "outputs",
    "constant": "program",
}


@dataclasses.dataclass(frozen=True)
class CompiledProgram:
    """A compiled program.

    text: the optimized HLO module.
    memory: bytes per device of arguments, temporaries, outputs (without those that reuse an argument's
        memory) and program.
    """

    text: str
    memory: dict[str, int]


def compile_fully(lowered: jax.stages.Lowered) -> CompiledProgram:
    """Compile to machine code.

    Raises:
        UserError: the compiler does not report the program or its memory.
    """
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if _NO_TILES not in str(error):
            raise
        compiled = lowered.compile({"xla_gpu_enable_triton_gemm": False})
    text, m = compiled.as_text(), compiled.memory_analysis()
    if text is None or m is None:
        raise UserError("unsupported platform: its compiler does not report programs and their memory")
    memory = {
        "arguments": m.argument_size_in_bytes,
        "temporaries": m.temp_size_in_bytes,
        "outputs": m.output_size_in_bytes - m.alias_size_in_bytes,
        "program": m.generated_code_size_in_bytes,
    }
    return CompiledProgram(text, memory)


def compile_without_codegen(lower: Callable[[], jax.stages.Lowered]) -> CompiledProgram:
    """Compile for TPUs up to the optimized HLO; code generation takes most of the time.

    The compiler has no option to stop there, but it dumps its results before it continues. So it runs in a
    process that is killed after the dump. The program's memory counts its constants only.

    Args:
        lower: returns what to compile; must be picklable.

    Raises:
        JaxRuntimeError: the compiler rejected the program.
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
                raise jax.errors.JaxRuntimeError(_receive(receiver))
        finally:
            process.kill()
            process.join()
        stem = str(last[0]).removesuffix(_LAST)
        return CompiledProgram(
            Path(stem + _TEXT).read_text(), _parse_memory(Path(stem + _MEMORY).read_text())
        )


def _compile(lower: Callable[[], jax.stages.Lowered], directory: str, sender: Connection) -> None:
    lowered = lower()
    try:
        lowered.compile(compiler_options={"xla_dump_to": directory, "xla_dump_hlo_as_text": True})
    except jax.errors.JaxRuntimeError as error:
        sender.send(str(error))


def _receive(receiver: Connection) -> str:
    try:
        return receiver.recv()
    except EOFError:
        return "INTERNAL: the compiler's process died without an error message"


def _parse_memory(text: str) -> dict[str, int]:
    """Sum a buffer assignment's allocations in main memory, which have no color."""
    memory: dict[str, int] = dict.fromkeys(("arguments", "temporaries", "outputs", "program"), 0)
    for size, rest in re.findall(r"^allocation \d+: size (\d+), (.*)", text, re.MULTILINE):
        for prefix, kind in _ALLOCATIONS.items():
            if rest.startswith(prefix):
                memory[kind] += int(size)
                break
    return memory
