"""Plan the train steps of the shipped configs for every kind of chip; write the table in docs/guide/plan.md.

    python benchmarks/plan_table.py [--only WORDS]

Each plan runs in its own process and takes a minute or more. Plans in plan_table.json are not repeated, so an
interrupted run can be continued; delete the file when the model changes.
"""

import argparse
import datetime
import importlib.metadata
import json
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
RECORD = pathlib.Path(__file__).with_suffix(".json")
PAGE = ROOT / "docs" / "guide" / "plan.md"
BEGIN, END = "<!-- table -->\n", "<!-- end of table -->\n"
CONFIGS = (
    *(f"dig_{size}:256,paper" for size in ("s", "b", "l", "xl")),
    "dig_xl:512,paper",
    *("cifar10:paper", "celeba64:paper", "smoke"),
    *(f"{model}:{pixels},ours" for pixels in (256, 512, 1024) for model in ("dig_xl", "dit_xl")),
)
TOPOLOGIES = ("v4:4x4x4", "v5e:16x16", "v5p:4x4x4", "v6e:8x8", "tpu7x:2x2x1", "h200:8", "h100:8x4")
HEADER = (
    "| config | chips | images per device | GiB of memory per device | compute, memory, interconnect, ms |"
    " images/s | MFU | chip-hours |\n|---|---|---|---|---|---|---|---|\n"
)
PLAN = """
import json, runpy, sys
sys.path.insert(0, ".")
from dig_jax import config
from dig_jax.planning import plan
from dig_jax.errors import UserError
name, _, arguments = sys.argv[1].partition(":")
settings = runpy.run_path(f"configs/{name}.py")["get_config"](*filter(None, arguments.split(",")))
try:
    found = plan.plan(config.from_dict(settings.to_dict()), sys.argv[2], train_only=True)
except UserError as error:
    found = {"refused": str(error)}
print(json.dumps(found))
"""


def main() -> None:
    """Make the missing plans and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", default=[], help="names of configs, of topologies, or of both")
    only = set(parser.parse_args().only)
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    for key in _keys():
        if key in record or not _selected(key, only):
            continue
        record[key] = _plan(*key.split())
        print(_row(key, record[key]), flush=True)
        RECORD.write_text(json.dumps(record, indent=1) + "\n")
    rows = [_row(key, record[key]) for key in _keys() if key in record]
    before, _, rest = PAGE.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "libtpu"))
    caption = (
        f"`python benchmarks/plan_table.py`, {versions}, {datetime.date.today()}; compiled without chips.\n\n"
    )
    PAGE.write_text(before + BEGIN + caption + HEADER + "\n".join(rows) + "\n" + END + after)


def _selected(key: str, only: set[str]) -> bool:
    """Whether `only` has the key's config and topology; a kind of name that it does not have selects all."""
    names = zip(key.split(), (CONFIGS, TOPOLOGIES), strict=True)
    return all(name in only or not only & set(kind) for name, kind in names)


def _keys() -> list[str]:
    return [f"{name} {topology}" for name in CONFIGS for topology in TOPOLOGIES]


def _plan(name: str, topology: str) -> dict:
    done = subprocess.run(
        [sys.executable, "-c", PLAN, name, topology], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{name} {topology}: {done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def _row(key: str, plan: dict) -> str:
    name, topology = key.split()
    if "refused" in plan:
        return f"| {name} | {topology} | {plan['refused'].split(';')[0]} | | | | | |"
    train, limit = plan["train"], plan["memory_limit"]
    over = train["memory_needed"] - limit
    memory = f"{train['memory_needed'] / 2**30:.1f} of {limit / 2**30:.1f}"
    cells = [name, topology, str(train["images_per_device"])]
    cells.append(f"{memory}: {over / 2**30:.1f} too much" if over > 0 else memory)
    if "seconds" in train:
        times = [
            f"**{1e3 * seconds:,.1f}**" if kind == train["bound"] else f"{1e3 * seconds:,.1f}"
            for kind, seconds in train["seconds"].items()
        ]
        cells += [", ".join(times), f"{train['images_per_second']:,.0f}", f"{train['mfu']:.0%}"]
        cells.append(f"{train['chip_hours']:,.0f}")
    else:
        cells += [""] * 4
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
