"""Compare DiG with its rivals: time, memory and throughput of a train step and a guided sampling step.

    python -m benchmarks.compare --chips v6e v5e h200        computed for chips that need not be there
    python -m benchmarks.compare                             measured on this machine's device
    python -m benchmarks.compare --pytorch=PYTHON            beside PyTorch, which is installed elsewhere
    python -m benchmarks.compare --page                      write docs/benchmarks/compare.md and its figures

--models, --sizes, --pixels and --phases select cases. On a CPU, and on a GPU beside PyTorch, the cases are
DiT and DiG in turns with DiT in PyTorch and in diffusers, and on a GPU with DiG over fla, as far as they are
installed: size S at 256 to 1,024 px with one or two images on a CPU. --batch measures the cases of the chips
instead. Rows in benchmarks/compare/*.json are skipped, so an interrupted run can be continued; --again
replaces them.
"""

import argparse
import datetime
import importlib.metadata
import logging
import os
import pathlib
import sys
import time

from benchmarks.compare import computed, measured, page, peers
from benchmarks.compare.cases import MODELS, PHASES, SIZES, Case, cases
from benchmarks.compare.record import Record
from dig_jax.errors import UserError
from dig_jax.progress import Progress

RECORD = pathlib.Path(__file__).with_name("record.json")
VERSIONS = ("jax", "libtpu", "jax-cuda13-plugin")
THIS = "this"
_MOST_PIXELS_OF_CPU = 1024  # a step of more takes minutes


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("--chips", nargs="+", default=[THIS], choices=[THIS, *computed.TOPOLOGIES])
    parser.add_argument("--models", nargs="+", default=[*MODELS], choices=MODELS)
    parser.add_argument("--sizes", nargs="+", default=["S", "XL"], choices=SIZES)
    parser.add_argument("--pixels", nargs="+", type=int, default=[256, 512, 1024, 2048])
    phases = [*dict.fromkeys((*PHASES, *peers.PHASES))]
    parser.add_argument("--phases", nargs="+", default=phases, choices=phases)
    parser.add_argument(
        "--batch", type=int, help="images of a batch, in place of the pixels of one of 2,048 px"
    )
    parser.add_argument("--pytorch", metavar="PYTHON", help="a Python with PyTorch, if this one has none")
    parser.add_argument("--repeats", type=int, default=5, help="rounds beside PyTorch")
    parser.add_argument(
        "--threads", type=int, default=os.cpu_count(), help="on a CPU; 1, by CPU time, if it is not idle"
    )
    parser.add_argument("--record", type=pathlib.Path, default=RECORD)
    parser.add_argument(
        "--peers", type=pathlib.Path, default=peers.RECORD, help="record of the rows beside PyTorch"
    )
    parser.add_argument("--again", action="store_true", help="replace rows that are in the record")
    parser.add_argument(
        "--page", action="store_true", help="write the page from the record, and nothing else"
    )
    return parser


def main() -> None:
    """Add the missing rows to the record, or write the page."""
    parser = make_parser()
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    record = Record.read(options.record)
    if options.page:
        page.write(record, peers.read(options.peers))
        return
    chips = options.chips
    if THIS in chips and options.batch is None and add_peers(options):
        chips = [chip for chip in chips if chip != THIS]
    phases = [phase for phase in options.phases if phase in PHASES]
    if chips and not phases:
        parser.error(f"--phases={options.phases[0]} is for a CPU; expected one of {', '.join(PHASES)}")
    wanted = list(cases(options.models, options.sizes, options.pixels, phases, options.batch))
    work = [(case, chip) for chip in chips for case in wanted]
    missing = [
        pair for pair in work if options.again or f"{pair[0].name} @ {device_of(pair[1])}" not in record.rows
    ]
    progress = Progress("row", first=0, total=len(missing))
    for done, (case, chip) in enumerate(missing, start=1):
        add(record, case, chip)
        progress.show(done)
    progress.close()


def add_peers(options: argparse.Namespace) -> bool:
    """Add the rows beside PyTorch, which may be missing on a CPU. Return whether the device has such rows."""
    device = measured.device_name()
    python, networks = peers.find_networks(options.pytorch, device)
    if device != "cpu" and not networks:
        return False
    if not networks:
        print("this Python has no PyTorch, and --pytorch names no other one: only our models are measured")
    is_cpu = device == "cpu"
    sizes = ["S"] if is_cpu else options.sizes
    pixels = [number for number in options.pixels if not is_cpu or number <= _MOST_PIXELS_OF_CPU]
    peers.add_rows(
        options.peers,
        [peers.Case(device, size, number, options.threads) for size in sizes for number in pixels],
        [model for model in peers.MODELS if model in options.models],
        [phase for phase in peers.PHASES if phase in options.phases],
        python=python,
        networks=networks,
        repeats=options.repeats,
        again=options.again,
    )
    return True


def device_of(chip: str) -> str:
    """Return the device's name in the record."""
    return measured.device_name() if chip == THIS else chip


def add(record: Record, case: Case, chip: str) -> None:
    """Make a row, write it and print it. The row of a case that fails holds the error."""
    began = time.monotonic()
    try:
        row = measured.row(case) if chip == THIS else computed.row(case, chip)
    except UserError as error:
        row = {"error": str(error)}
    row |= {"seconds": round(time.monotonic() - began), "date": datetime.date.today().isoformat()}
    row["versions"] = {
        name: importlib.metadata.version(name)
        for name in VERSIONS
        if any(importlib.metadata.distributions(name=name))
    }
    name = f"{case.name} @ {device_of(chip)}"
    record.add(name, row)
    print(f"{name}: {page.describe(row)}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
