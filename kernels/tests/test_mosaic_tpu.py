"""The TPU kernels: results in interpret mode, and the code that the TPU compiler generates."""

import dataclasses
import functools
import itertools
import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import static_tpu
from gla_test_base import SIZES, GLATestBase
from jax.experimental.pallas import tpu as pltpu
from pallas_gla.mosaic_tpu import backend, launch, tuning
from pallas_gla.scan import Gating, Operands, Scan, saved_shape
from range_tests import NonFiniteTests
from triton_cases import check_uneven

DIRECTIONS = ("row", "row_reversed", "column", "column_reversed")
TOLERANCE = {"float32": 1e-5, "bfloat16": 5e-3, "float16": 5e-3}
GATING = Gating(normalizer=16.0, eps=1e-6)


class TestMosaic(NonFiniteTests, GLATestBase):
    implementation = "mosaic"
    interpret = jax.default_backend() != "tpu"

    # COVERING has more sizes.
    @pytest.mark.parametrize("size", SIZES[-1:], ids=str)
    def test_values_and_gradients_match_the_oracle(self, size):
        super().test_values_and_gradients_match_the_oracle(size)


@dataclasses.dataclass(frozen=True)
class Case:
    grid: tuple[int, int] = (1, 65)
    k: int = 32
    v: int = 64
    gate: str = "dig"
    dtype: str = "bfloat16"
    gate_dtype: str | None = None
    direction: str = "row"
    heads: int = 2
    segments: bool = False
    initial: bool = True
    gated: bool = False
    chunk_size: int | None = None
    batch: int = 1

    def __str__(self):
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return "-".join(f"{k}={v}" for k, v in fields.items() if v != getattr(Case, k)).replace(" ", "")


def expected(case, arrays, cotangents, ids, gates):
    """Return the oracle's results by name."""
    options = {"grid": case.grid, "direction": case.direction, "segment_ids": ids}
    if not case.gated:
        return oracle.recurrence_2d(arrays, cotangents, **options)
    options |= {"normalizer": GATING.normalizer, "eps": GATING.eps}
    return oracle.gated_recurrence(arrays, gates, cotangents, **options)


def inputs(case):
    t = case.grid[0] * case.grid[1]
    rng = np.random.default_rng(t)
    shape = {"b": case.batch, "t": t, "h": case.heads, "k": case.k, "v": case.v}
    types = {"dtype": case.dtype, "gate_dtype": case.gate_dtype or case.dtype}
    arrays, cotangents = oracle.inputs(t, gate=case.gate, **shape, **types)
    if not case.initial:
        arrays = (*arrays[:4], jnp.zeros_like(arrays[4]))
    gates = None
    if case.gated:
        logits = rng.standard_normal(arrays[3].shape) * (3 if case.gate == "strong" else 1)
        arrays = (*arrays[:3], jnp.asarray(logits, types["gate_dtype"]), arrays[4])
        gates = (jnp.asarray(rng.standard_normal(arrays[2].shape), case.dtype),)
        gates += (jnp.asarray(1 + 0.1 * rng.standard_normal((case.batch, case.v)), jnp.float32),)
    ids = np.cumsum(rng.random((case.batch, t)) < 0.05, axis=1).astype(np.int32) if case.segments else None
    return arrays, cotangents, ids, gates


def program(case):
    """Return a jitted function that gives results and gradients by name, for all cases of these shapes."""
    gating = GATING if case.gated else None
    scan = Scan(case.k**-0.5, case.grid, case.direction, case.chunk_size, gating, interpret=True)

    def both(arrays, cotangents, ids, gates):
        operands = Operands(*arrays[:4], *(gates or (None, None)), arrays[4] if case.initial else None, ids)
        assert backend.unsupported(operands, scan) is None
        o, final_state, states = backend.forward(operands, scan, save=True)
        assert (states.shape, str(states.dtype)) == saved_shape(operands, scan)
        gradients = backend.backward(operands, states, *cotangents, scan)
        for gradient, operand in zip(gradients[:-1], operands[:-1], strict=True):
            assert (gradient is None) == (operand is None)
            assert gradient is None or (gradient.shape, gradient.dtype) == (operand.shape, operand.dtype)
        return {"o": o, "final_state": final_state} | {f"d{k}": x for k, x in gradients._asdict().items()}

    return jax.jit(both)


def tolerance(case, name, weight):
    """Return the relative RMS error that a result may have."""
    few = {1: 1e-2, 15: 7e-3}.get(case.grid[0] * case.grid[1])
    if case.dtype == "float32" or not case.gated:
        return TOLERANCE[case.dtype]
    # The norm cancels most of the gradients' terms, so errors are larger where few tokens average them out.
    return few or (weight if name == "dnorm_weight" else TOLERANCE[case.dtype])


def check(case, compiled=None, weight=5e-3):
    arrays, cotangents, ids, gates = inputs(case)
    run = compiled or program(case)
    actual = run(arrays, cotangents, None if ids is None else jnp.asarray(ids), gates)
    wanted = expected(case, arrays, cotangents, ids, gates)
    wanted = {name: x for name, x in wanted.items() if actual[name] is not None}
    for name, x in wanted.items():
        oracle.assert_close([actual[name]], [x], tolerance(case, name, weight), [name])
    assert actual["o"].dtype == case.dtype
    assert actual["final_state"].dtype == jnp.float32


# Every value of every option occurs at least once, and so does every pair of options that share code.
# Columns of (8, 8), (10, 20) and (13, 5) do not fit the tiles; columns of (16, 8), (16, 16) and (32, 8) do.
COVERING = [
    Case((1, 1)),
    Case((1, 15), 16, 32, "strong", direction="row_reversed"),
    Case((1, 63), 64, 64, "reset_60", "float32", heads=3),
    Case((8, 8), 64, 128, "reset_1e4", "float32", direction="column", heads=1),
    Case((1, 65), 60, 60, "none", gate_dtype="float32", heads=1),
    Case((10, 20), gate="strong", dtype="float16", direction="column_reversed"),
    Case((1, 257), heads=1, initial=False),
    Case((1, 200), dtype="float32", direction="row_reversed", segments=True, heads=1),
    Case((13, 5), gate="strong", segments=True, direction="column", batch=2),
    Case((16, 8), gated=True, dtype="float32", direction="column", heads=1),
    Case((1, 65), 60, 60, "strong", "float32", direction="row_reversed", gated=True, segments=True, heads=1),
    Case((16, 16), gate="strong", gate_dtype="float32", direction="column_reversed", heads=1),
    Case((32, 8), gated=True, gate_dtype="float32", direction="column"),
]


@pytest.mark.parametrize("case", COVERING, ids=str)
def test_values_and_gradients_match_the_oracle(case):
    check(case)


@pytest.mark.slow
@pytest.mark.parametrize("widths", [(32, 64), (16, 32), (64, 64), (64, 128), (60, 60)], ids=str)
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("gated", [False, True])
def test_values_and_gradients_of_all_lengths_directions_and_gates(widths, dtype, gated):
    grids = [(1, 1), (1, 15), (7, 9), (4, 16), (13, 5), (10, 20), (1, 257), (16, 24)]
    for grid, direction in itertools.product(grids, DIRECTIONS):
        compiled = program(Case(grid, *widths, "dig", dtype, "float32", direction, 1, gated=gated))
        for gate in ("dig", "strong") if gated else oracle.GATES:
            case = Case(grid, *widths, gate, dtype, "float32", direction, 1, gated=gated)
            check(case, compiled, weight=7e-3)
    jax.clear_caches()


@pytest.mark.slow
def test_the_gradient_of_the_decay_does_not_drift_along_t():
    check(Case((1, 2048), heads=1))


@pytest.mark.slow
@pytest.mark.parametrize("case", [Case((1, 30), heads=5, chunk_size=16), Case((1, 16), 128, 128)], ids=str)
def test_heads_beyond_a_group(case):
    check(case)


def test_the_simulated_chip_finds_no_race_and_no_wrong_memory_space(monkeypatch, capfd):
    interpret = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)
    call = launch.pl.pallas_call
    monkeypatch.setattr(
        launch.pl, "pallas_call", lambda *args, **kw: call(*args, **kw | {"interpret": interpret})
    )
    check(Case((1, 20), heads=1, chunk_size=16, gate="strong", direction="row_reversed", batch=2))
    assert "RACE DETECTED" not in capfd.readouterr().out  # it does not raise


def test_heads_that_do_not_fit_one_block(monkeypatch):
    narrow = dataclasses.replace(tuning.ANY_TPU, lanes=128)
    monkeypatch.setattr(tuning, "ANY_TPU", narrow)
    check(Case((1, 20), heads=6, chunk_size=16))


def test_kernels_have_no_64_bit_types_with_x64_enabled():
    case = Case((1, 20), heads=1, chunk_size=16, segments=True)
    with jax.enable_x64(True):
        jaxpr = str(jax.make_jaxpr(program(case))(*inputs(case)[:2], inputs(case)[2], None))
        assert "f64" not in jaxpr


@pytest.mark.slow
def test_the_decay_gradient_of_every_channel_and_token_is_accurate_in_16_bits():
    @functools.partial(jax.jit, static_argnames="scan")
    def run(operands, cotangents, scan):
        scan = dataclasses.replace(scan, interpret=True)
        o, final_state, states = backend.forward(operands, scan, save=True)
        return (o, final_state), backend.backward(operands, states, *cotangents, scan)

    check_uneven(run, "bfloat16")


def test_scale_may_be_negative():
    case = Case((1, 20), heads=1, chunk_size=16)
    arrays, _, _, _ = inputs(case)
    scan = Scan(-0.5, case.grid, case.direction, 16, None, True)
    run = jax.jit(lambda operands: backend.forward(operands, scan, save=False))
    o, _, states = run(Operands(*arrays[:4], initial_state=arrays[4]))
    assert states is None
    oracle.assert_close([o], [oracle.recurrence(arrays, scale=-0.5)["o"]], 5e-3, ["o"])


@pytest.mark.parametrize(
    ("k", "v", "chunk_size", "message"),
    [
        (8, 64, None, "unsupported K: got 8; expected 16 to 128"),
        (32, 256, None, "unsupported V: got 256; expected 16 to 128"),
        (32, 64, 256, "unsupported chunk_size: got 256; expected None, 16, 32, 64 or 128"),
        (32, 64, None, None),
    ],
)
def test_unsupported_gives_the_reason(k, v, chunk_size, message):
    narrow = jax.ShapeDtypeStruct((1, 64, 2, k), jnp.bfloat16)
    wide = jax.ShapeDtypeStruct((1, 64, 2, v), jnp.bfloat16)
    operands = Operands(narrow, narrow, wide, narrow)
    assert backend.unsupported(operands, Scan(1.0, (1, 64), "row", chunk_size)) == message


def static_figures(cases):
    """Run `static_tpu.py` in a new process, because libtpu reads its environment at the start."""
    pytest.importorskip("libtpu", reason="libtpu, the TPU's compiler, is not installed")
    script = pathlib.Path(__file__).parents[1] / "benchmarks" / "static_tpu.py"
    command = [sys.executable, str(script), "--json", json.dumps([dataclasses.asdict(c) for c in cases])]
    found = subprocess.run(command, capture_output=True, text=True, timeout=3000)
    assert found.returncode == 0, found.stderr[-3000:]
    return json.loads(found.stdout.splitlines()[-1])


def check_recorded_figures(cases):
    record = json.loads(static_tpu.RECORD.read_text())
    for case, figures in zip(cases, static_figures(cases), strict=True):
        recorded = record[case.name]
        for name in ("bundles", "bytes"):
            assert figures[name] == pytest.approx(recorded[name], rel=0.05), (case.name, name)


def test_compiles_for_the_chips_at_the_recorded_cost():
    check_recorded_figures(
        [
            static_tpu.Case(chip, kind, heads=6, side=16, chunks=1)
            for chip, kind in (("v5e", "backward"), ("v6e", "tangent"), ("tpu7x", "forward"))
        ]
    )


@pytest.mark.slow
def test_compiles_everything_at_the_recorded_cost():
    check_recorded_figures([case for case in static_tpu.all_cases() if case.implementation == "mosaic"])


def test_recorded_schedules_stay_near_the_floor_of_memory():
    # Largest allowed ratio of a schedule's time to the memory floor, for XL at T = 4,096.
    limits = {("v5e", "forward"): 1.2, ("v6e", "forward"): 1.2, ("v5e", "backward"): 1.3}
    limits |= {("v6e", "backward"): 1.5}
    record = json.loads(static_tpu.RECORD.read_text())
    for (chip, kind), limit in limits.items():
        case = static_tpu.Case(chip, kind)
        assert static_tpu.times_floor(case, record[case.name]) <= limit
        assert record[case.name]["bytes"] <= 1.15 * case.minimum_bytes
    for chip, direction in itertools.product(("v5e", "v6e"), DIRECTIONS):
        case = static_tpu.Case(chip, "forward", direction=direction, gated=True)
        assert static_tpu.times_floor(case, record[case.name]) <= 1.5
        assert record[case.name]["bytes"] <= 1.15 * case.minimum_bytes


@pytest.mark.parametrize("direction", ["row", "column"])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("chip", ["v5e", "v6e"])
def test_recorded_tangents_cost_few_forward_passes(chip, gated, direction):
    record = json.loads(static_tpu.RECORD.read_text())
    _, clock, bandwidth = static_tpu.CHIPS[chip]

    def nanoseconds(kind):
        figures = record[static_tpu.Case(chip, kind, direction=direction, gated=gated).name]
        return max(figures["bundles"] / clock, figures["bytes"] / bandwidth * 1e9)

    assert nanoseconds("tangent") <= 2.2 * nanoseconds("forward")


LABELS = {
    f"`{'gated_gla_2d' if gated else 'gla'}` {kind}{', columns' * (direction == 'column')}": {
        "gated": gated,
        "kind": kind,
        "direction": direction,
    }
    for gated in (False, True)
    for kind in ("forward", "backward", "tangent")
    for direction in ("row", "column")
}


def rows_of(page):
    """Return the tables of a page as lists of cells, for the rows of these kernels."""
    text = (pathlib.Path(__file__).parents[1] / page).read_text()
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| `")]
    return [row for row in rows if row[0] in LABELS]


def test_the_pages_show_the_recorded_figures():
    record = json.loads(static_tpu.RECORD.read_text())

    def shown(chip, label):
        case = static_tpu.Case(chip, **LABELS[label])
        figures, clock = record[case.name], static_tpu.CHIPS[chip][1]
        unknown = clock is None
        time = "–" if unknown else f"{figures['bundles'] / clock * 1e3:,.0f}"
        floor = "–" if unknown else f"{static_tpu.times_floor(case, figures):.2f}"
        size = f"{figures['bytes'] / case.minimum_bytes:.2f}"
        slow = f"{figures['any_decay_bundles']:.1f}"
        return [f"{figures['bundles']:.2f}", time, floor, figures["busiest"], size, slow]

    details = [row for row in rows_of("benchmarks/README.md") if row[1] in static_tpu.CHIPS]
    assert len(details) == 2 * len(LABELS) + 6
    for label, chip, *cells in details:
        assert cells == shown(chip, label), (label, chip)
    summary = [row for row in rows_of("README.md") if len(row) == 3]
    assert len(summary) == 8
    for label, *cells in summary:
        assert cells == ["{1} ({2})".format(*shown(chip, label)) for chip in ("v5e", "v6e")], label
