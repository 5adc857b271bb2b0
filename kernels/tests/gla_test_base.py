"""Tests that every implementation must pass. Each implementation's test file subclasses `GLATestBase`."""

import functools
import pathlib

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from pallas_gla import gated_gla_2d, gla, gla_2d

FLOAT32 = 2e-5
SEGMENTS = np.array(
    [[3, 3, 3, 3, 3, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 2, 0, 4, 4], [5] * 17 + [6] * 3], np.int32
)
GOLDEN = sorted((pathlib.Path(__file__).parent / "golden").glob("gla_*.npz"))
# T, K, V and options. Each size is one compilation, which runs with every kind of decay.
SIZES = [
    (16, 60, 60, {"chunk_size": None, "scale": 0.3}),
    (64, 64, 128, {"chunk_size": None}),
    (65, 32, 64, {"chunk_size": 32, "reverse": True}),
]
# A constant decay, or tokens that are 10 or 100 times as large as the others, with a strong decay between.
UNEVEN = [-0.05, -1.0, -5.0, -10.0, -30.0, "10 then 1", "1 then 100"]
examples = hypothesis.settings(
    max_examples=6,
    deadline=None,
    derandomize=True,
    # Subclasses share the test methods, which confuses only the database of failures.
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.differing_executors],
)
seeds = st.tuples(st.integers(0, 2**16), st.sampled_from(oracle.GATES))


def golden_arrays(path):
    """Return (arrays, cotangents, expected) of a golden file, tokens before heads."""
    file = {name: jnp.asarray(x, jnp.float32) for name, x in np.load(path).items()}
    names = ("q", "k", "v", "g", "do", "o", "dq", "dk", "dv", "dg")
    q, k, v, g, d_o, o, *gradients = (file[name].swapaxes(1, 2) for name in names)
    arrays = (q, k, v, g, file.get("h0", jnp.zeros_like(file["ht"])))
    expected = (o, file["ht"], *gradients, *([file["dh0"]] if "dh0" in file else []))
    return arrays, (d_o, file["dht"]), expected


def uneven(decays):
    """Return (arrays, cotangents) for an element of `UNEVEN`."""
    (q, k, v, g, state), (d_o, d_state) = oracle.inputs(5, t=64, h=1, k=16, v=16)
    if not isinstance(decays, str):
        return (q, k, v, jnp.full_like(g, decays), state), (d_o, d_state)
    first, last = map(float, decays.split(" then "))
    size = jnp.where(jnp.arange(64) < 20, first, last)[:, None, None]
    return (size * q, size * k, size * v, g.at[:, 20].set(-38.0), state), (size * d_o, d_state)


def on_golden_files(*fast):
    """Parametrize a test over the golden files; all but the named ones are slow."""
    marks = {True: (), False: pytest.mark.slow}
    return pytest.mark.parametrize(
        "path", [pytest.param(path, id=path.stem, marks=marks[path.stem[:5] in fast]) for path in GOLDEN]
    )


class GLATestBase:
    implementation: str | None
    interpret = False

    @property
    def backend(self):
        return {"implementation": self.implementation, "interpret": self.interpret}

    def scan(self, q, k, v, g, initial_state, **options):
        options = {"chunk_size": 16} | self.backend | options
        return gla(q, k, v, g, initial_state=initial_state, return_final_state=True, **options)

    def results(self, arrays, cotangents, segment_ids=None, **options):
        """Return (o, final_state, dq, dk, dv, dg, dinitial_state)."""
        return self.compiled(**options)(arrays, cotangents, segment_ids)

    @classmethod
    @functools.cache
    def compiled(cls, **options):
        """Return the jitted function behind `results`, shared by the tests of a class."""

        @jax.jit
        def run(arrays, cotangents, segment_ids):
            scan = functools.partial(cls().scan, segment_ids=segment_ids, **options)
            out, vjp = jax.vjp(scan, *arrays)
            return (*out, *vjp(cotangents))

        return run

    @on_golden_files("gla_3", "gla_4")
    def test_matches_the_public_torch_implementation(self, path):
        arrays, cotangents, expected = golden_arrays(path)
        actual = self.results(arrays, cotangents, chunk_size=None)[: len(expected)]
        oracle.assert_close(actual, expected, FLOAT32, oracle.NAMES[: len(expected)])

    @pytest.mark.parametrize("size", SIZES, ids=str)
    def test_values_and_gradients_match_the_oracle(self, size):
        t, k, v, options = size
        expected_options = {name: x for name, x in options.items() if name != "chunk_size"}
        for gate in oracle.GATES:
            arrays, cotangents = oracle.inputs(t, t=t, h=2, k=k, v=v, gate=gate)
            expected = oracle.recurrence(arrays, cotangents, **expected_options)
            actual = self.results(arrays, cotangents, **options)
            terms = oracle.term_sizes(arrays, cotangents, **expected_options).values()
            names = [f"{gate}: {name}" for name in oracle.NAMES]
            oracle.assert_close(actual, expected.values(), FLOAT32, names, terms)

    @pytest.mark.parametrize("decays", UNEVEN, ids=str)
    def test_every_channel_and_token_is_accurate(self, decays):
        names = [name for name in oracle.NAMES if name != "dg"]
        self.check_channels_and_tokens(decays, names)

    @pytest.mark.parametrize("decays", UNEVEN, ids=str)
    def test_the_decay_gradient_of_every_channel_and_token_is_accurate(self, decays):
        self.check_channels_and_tokens(decays, ["dg"])

    def check_channels_and_tokens(self, decays, names):
        arrays, cotangents = uneven(decays)
        actual = dict(zip(oracle.NAMES, self.results(arrays, cotangents, chunk_size=None), strict=True))
        expected, terms = oracle.recurrence(arrays, cotangents), oracle.term_sizes(arrays, cotangents)
        actual, expected, terms = ([x[name] for name in names] for x in (actual, expected, terms))
        oracle.assert_close(actual, expected, FLOAT32, names, terms)

    @pytest.mark.parametrize(("dtype", "gate_dtype"), [("bfloat16", "float32"), ("float16", "float16")])
    def test_16_bit_results_are_accurate_and_keep_their_dtypes(self, dtype, gate_dtype):
        arrays, cotangents = oracle.inputs(0, dtype=dtype, gate_dtype=gate_dtype)
        actual = self.results(arrays, cotangents)
        oracle.assert_close(actual, oracle.recurrence(arrays, cotangents).values(), 5e-3)
        dtypes = [str(x.dtype) for x in actual]
        assert dtypes == [dtype, "float32", dtype, dtype, dtype, gate_dtype, "float32"]

    def test_the_default_initial_state_is_zero(self):
        (q, k, v, g, state), _ = oracle.inputs(1)
        o = gla(q, k, v, g, **self.backend)
        expected = oracle.recurrence((q, k, v, g, jnp.zeros_like(state)))
        oracle.assert_close([o], [expected["o"]], FLOAT32, names=["o"])

    @pytest.mark.parametrize("reverse", [False, True])
    def test_segments_start_from_zero_and_states_enter_and_leave_at_the_ends(self, reverse):
        arrays, cotangents = oracle.inputs(2, gate="strong")
        actual = self.results(arrays, cotangents, jnp.asarray(SEGMENTS), reverse=reverse)
        expected = oracle.recurrence(arrays, cotangents, segment_ids=SEGMENTS, reverse=reverse)
        oracle.assert_close(actual, expected.values(), FLOAT32)
        scanned = SEGMENTS[:, ::-1] if reverse else SEGMENTS
        starts = np.diff(scanned, axis=1, prepend=scanned[:, :1]) != 0
        assert not np.asarray(actual[5])[starts[:, ::-1] if reverse else starts].any()

    def test_resets_of_any_size_are_exact_and_have_no_gradient(self):
        (q, k, v, decays, state), cotangents = oracle.inputs(15)
        # The first tokens of both chunks, and some channels inside a chunk.
        resets = np.zeros(decays.shape, bool)
        resets[:, (0, 16)], resets[:, 19, :, ::3] = True, True
        for reset in (-1e4, -1e30, jnp.finfo(jnp.float32).min):
            arrays = (q, k, v, jnp.where(resets, reset, 1e-3 * decays), state)
            actual = self.results(arrays, cotangents)
            oracle.assert_close(actual, oracle.recurrence(arrays, cotangents).values(), 1e-5)
            assert not np.asarray(actual[5])[resets].any()

    @pytest.mark.parametrize("direction", ["row", "row_reversed", "column", "column_reversed"])
    def test_directions_match_the_oracle(self, direction):
        (*tokens, state), _ = arrays = oracle.inputs(3)
        options = {"grid": (4, 5), "direction": direction}
        expected = oracle.recurrence_2d(arrays[0], segment_ids=SEGMENTS, **options)
        options |= self.backend | {"segment_ids": jnp.asarray(SEGMENTS), "return_final_state": True}
        actual = gla_2d(*tokens, initial_state=state, **options)
        oracle.assert_close(actual, expected.values(), FLOAT32, names=oracle.NAMES[:2])

    @pytest.mark.parametrize(
        ("grid", "direction"),
        [((5, 4), "column_reversed"), pytest.param((5, 13), "row", marks=pytest.mark.slow)],
    )
    def test_gated_scan_matches_the_oracle_in_values_and_gradients(self, grid, direction):
        arrays, cotangents = oracle.inputs(14, t=grid[0] * grid[1], h=2, k=16, v=32)
        q, k, v, logits, state = arrays = (*arrays[:3], 8 * arrays[3], arrays[4])
        gates = (jnp.roll(cotangents[0], 1, axis=1), jnp.linspace(0.5, 2, 32))
        options = {"grid": grid, "direction": direction}

        def scan(q, k, v, logits, state, out_gate, weight):
            gating = {"gate_normalizer": 4, "eps": 1e-3, "chunk_size": 16, "initial_state": state}
            gating |= options | self.backend | {"return_final_state": True}
            return gated_gla_2d(q, k, v, logits, out_gate, weight, **gating)

        @jax.jit
        def results(arrays, gates, cotangents):
            out, vjp = jax.vjp(scan, *arrays, *gates)
            return (*out, *vjp(cotangents))

        expected = oracle.gated_recurrence(arrays, gates, cotangents, normalizer=4, eps=1e-3, **options)
        actual = results(arrays, gates, cotangents)
        oracle.assert_close(actual, expected.values(), FLOAT32, oracle.GATED_NAMES)

    @examples
    @hypothesis.given(seeds)
    def test_reverse_equals_flipping_the_tokens(self, seed):
        (*tokens, state), _ = oracle.inputs(seed[0], gate=seed[1])
        o, final_state = self.scan(*tokens, state, reverse=True)
        flipped, expected = self.scan(*(jnp.flip(x, 1) for x in tokens), state)
        # Kernels turn their masks instead of the tokens, and so add in another order.
        oracle.assert_close([o, final_state], [jnp.flip(flipped, 1), expected], 4e-6, oracle.NAMES[:2])

    @examples
    @hypothesis.given(seeds)
    def test_two_calls_chained_by_their_state_equal_one(self, seed):
        (*tokens, state), _ = oracle.inputs(seed[0], gate=seed[1])
        o, final_state = self.scan(*tokens, state)
        first, middle = self.scan(*(x[:, :10] for x in tokens), state)
        second, last = self.scan(*(x[:, 10:] for x in tokens), middle)
        chained = [jnp.concatenate([first, second], 1), last]
        oracle.assert_close(chained, [o, final_state], FLOAT32, oracle.NAMES[:2])

    @examples
    @hypothesis.given(seeds, st.floats(-2, 2, width=32))
    def test_results_are_linear_in_values_and_initial_state(self, seed, factor):
        (q, k, v, g, state), (v2, state2) = oracle.inputs(seed[0], gate=seed[1])
        mixed = self.scan(q, k, v + factor * v2, g, state + factor * state2)
        one, two = self.scan(q, k, v, g, state), self.scan(q, k, v2, g, state2)
        expected = jax.tree.map(lambda x, y: x + factor * y, one, two)
        oracle.assert_close(mixed, expected, FLOAT32, oracle.NAMES[:2])

    def test_vmap_equals_a_loop(self):
        batches = [oracle.inputs(seed) for seed in (4, 5, 6)]
        stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *batches)
        actual = jax.jit(jax.vmap(lambda batch: self.results(*batch)))(stacked)
        for i, batch in enumerate(batches):
            oracle.assert_close([x[i] for x in actual], oracle.recurrence(*batch).values(), FLOAT32)

    def test_forward_mode_is_the_transpose_of_reverse_mode(self):
        arrays, cotangents = oracle.inputs(7, gate="strong")
        tangents, _ = oracle.inputs(8)
        out_tangents = jax.jit(lambda x, t: jax.jvp(self.scan, x, t)[1])(arrays, tangents)

        def inner(xs, ys):
            return sum(np.vdot(np.float64(x), np.float64(y)) for x, y in zip(xs, ys, strict=True))

        gradients = list(oracle.recurrence(arrays, cotangents).values())[2:]
        assert inner(out_tangents, cotangents) == pytest.approx(inner(tangents, gradients), rel=1e-4)

    @pytest.mark.parametrize("direction", ["row", "row_reversed", "column", "column_reversed"])
    def test_tangents_match_the_oracle_in_every_direction(self, direction):
        grid, gate = (4, 5), "strong" if direction == "row" else "reset_1e4"
        arrays, _ = oracle.inputs(16, gate=gate)
        dots, _ = oracle.inputs(17)
        options = {"grid": grid, "direction": direction}

        def expected(*arrays):
            return oracle.recurrence_2d(arrays, segment_ids=SEGMENTS, **options)

        def scan(q, k, v, g, state):
            rest = {"segment_ids": jnp.asarray(SEGMENTS), "chunk_size": 16, "return_final_state": True}
            return gla_2d(q, k, v, g, initial_state=state, **options, **rest, **self.backend)

        actual = jax.jit(lambda x, dots: jax.jvp(scan, x, dots)[1])(arrays, dots)
        expected = oracle.tangents(expected, arrays, dots).values()
        oracle.assert_close(actual, expected, 1e-5, oracle.NAMES[:2])

    @pytest.mark.parametrize("moving", ["q", "k", "v", "g", "initial_state", "kv"])
    def test_tangents_of_some_operands_match_the_oracle(self, moving):
        arrays, _ = oracle.inputs(18)
        drawn, _ = oracle.inputs(19)
        names = ("q", "k", "v", "g", "initial_state")
        moves = [name in moving if len(moving) < 3 else name == moving for name in names]
        dots = [dot if move else None for dot, move in zip(drawn, moves, strict=True)]

        def scan(*moved):
            moved = iter(moved)
            return self.scan(*(next(moved) if move else x for x, move in zip(arrays, moves, strict=True)))

        primals = tuple(x for x, move in zip(arrays, moves, strict=True) if move)
        actual = jax.jit(lambda x, dots: jax.jvp(scan, x, dots)[1])(
            primals, tuple(dot for dot in dots if dot is not None)
        )
        expected = oracle.tangents(lambda *x: oracle.recurrence(x), arrays, dots).values()
        oracle.assert_close(actual, expected, 1e-5, oracle.NAMES[:2])

    @pytest.mark.parametrize(("grid", "direction", "strength"), [((5, 4), "column", 1), ((1, 20), "row", 30)])
    def test_tangents_of_the_gated_scan_match_the_oracle(self, grid, direction, strength):
        (*tokens, state), (gate, _) = oracle.inputs(20)
        tokens[3] *= strength
        arrays = (*tokens, state, gate, jnp.linspace(0.5, 2, 16))
        (*dots, state_dot), (gate_dot, _) = oracle.inputs(21)
        dots = (*dots, state_dot, gate_dot, jnp.linspace(1, -1, 16))
        options = {"grid": grid, "direction": direction}

        def expected(*arrays):
            return oracle.gated_recurrence(arrays[:5], arrays[5:], normalizer=4, eps=1e-3, **options)

        def scan(q, k, v, logits, state, gate, weight):
            gating = {"gate_normalizer": 4, "eps": 1e-3, "chunk_size": 16, "initial_state": state}
            gating |= options | self.backend | {"return_final_state": True}
            return gated_gla_2d(q, k, v, logits, gate, weight, **gating)

        actual = jax.jit(lambda x, dots: jax.jvp(scan, x, dots)[1])(arrays, dots)
        expected = oracle.tangents(expected, arrays, dots).values()
        oracle.assert_close(actual, expected, 1e-5, oracle.NAMES[:2])

    @pytest.mark.parametrize("change", ["random", "constant"])
    @pytest.mark.parametrize("tokens", [4096, pytest.param(16384, marks=pytest.mark.slow)])
    @pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 8e-3)])
    def test_tangents_stay_accurate_over_long_scans(self, dtype, tolerance, tokens, change):
        options = {"b": 1, "t": tokens, "dtype": dtype}
        arrays, _ = oracle.inputs(22, **options)
        dots, _ = oracle.inputs(23, **options)
        noise = np.random.default_rng(24).standard_normal(dots[3].shape)
        # The sum of a constant tangent of the decay grows to T, and only its differences matter.
        g_dot = jnp.asarray(noise if change == "random" else np.ones_like(noise), jnp.float32)
        dots = (*dots[:3], g_dot, dots[4])
        actual = self.compiled_tangents()(arrays, dots)
        expected = oracle.tangents(lambda *x: oracle.recurrence(x), arrays, dots).values()
        oracle.assert_close(actual, expected, tolerance, oracle.NAMES[:2])

    @classmethod
    @functools.cache
    def compiled_tangents(cls):
        """Return a jitted function that gives the tangents of (o, final_state)."""
        scan = functools.partial(cls().scan, chunk_size=None)
        return jax.jit(lambda arrays, dots: jax.jvp(scan, arrays, dots)[1])

    @pytest.mark.parametrize("order", ["reverse over forward", "forward over reverse"])
    def test_second_derivatives_match_the_oracle(self, order):
        arrays, (weight, _) = oracle.inputs(9)
        tangents, _ = oracle.inputs(10)

        def loss(arrays):
            o, final_state = self.scan(*arrays)
            return jnp.sum(jnp.square(o) * weight) + jnp.sum(jnp.sin(final_state))

        def expected_gradient(step):
            shifted = [np.float64(x) + step * np.float64(t) for x, t in zip(arrays, tangents, strict=True)]
            out = oracle.recurrence(shifted)
            cotangents = (2 * out["o"] * np.float64(weight), np.cos(out["final_state"]))
            return list(oracle.recurrence(shifted, cotangents).values())[2:]

        def product(arrays, tangents):
            if order == "forward over reverse":
                return jax.jvp(jax.grad(loss), (arrays,), (tangents,))[1]
            return jax.grad(lambda x: jax.jvp(loss, (x,), (tangents,))[1])(arrays)

        step = 1e-5
        ends = zip(expected_gradient(step), expected_gradient(-step), strict=True)
        expected = [(after - before) / (2 * step) for after, before in ends]
        oracle.assert_close(jax.jit(product)(arrays, tangents), expected, 1e-4, oracle.NAMES[2:])

    def test_gradients_through_a_checkpointed_scan_over_layers(self):
        (q, k, v, g, state), (d_out, _) = oracle.inputs(11)
        decays = jnp.stack([g, 2 * g])

        @jax.jit
        def gradients(v, decays):
            def layer(x, g):
                return x + self.scan(q, k, x, g, state)[0], None

            def loss(v, decays):
                return jnp.vdot(jax.lax.scan(jax.checkpoint(layer), v, decays)[0], d_out)

            return jax.grad(loss, (0, 1))(v, decays)

        first, second = np.float64(decays)
        middle = np.float64(v) + oracle.recurrence((q, k, v, first, state))["o"]
        no_state = np.zeros_like(state)
        after = oracle.recurrence((q, k, middle, second, state), (d_out, no_state))
        d_middle = np.float64(d_out) + after["dv"]
        before = oracle.recurrence((q, k, v, first, state), (d_middle, no_state))
        expected = [d_middle + before["dv"], np.stack([before["dg"], after["dg"]])]
        oracle.assert_close(gradients(v, decays), expected, FLOAT32, ["v", "decays"])

    @pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
    def test_the_batch_can_be_sharded(self, axis_type):
        mesh = jax.make_mesh((4,), ("data",), axis_types=(axis_type,))
        arrays, cotangents = batch = oracle.inputs(12, b=4)
        expected = oracle.recurrence(arrays, cotangents).values()
        with jax.set_mesh(mesh):
            batch = jax.device_put(batch, NamedSharding(mesh, P("data")))
            if axis_type == AxisType.Auto:
                run = jax.shard_map(self.results, in_specs=P("data"), out_specs=P("data"))
                oracle.assert_close(jax.jit(run)(*batch), expected, FLOAT32)
            else:
                actual = self.results(*batch)
                assert all(x.sharding.spec[0] == "data" for x in actual)
                oracle.assert_close(actual, expected, FLOAT32)

    def test_no_float64_appears_with_x64_enabled(self):
        with jax.enable_x64(True):
            arrays, cotangents = oracle.inputs(13, dtype="bfloat16")
            run = functools.partial(self.results, segment_ids=jnp.asarray(SEGMENTS))
            assert "f64" not in str(jax.make_jaxpr(run)(arrays, cotangents))
            expected = oracle.recurrence(arrays, cotangents, segment_ids=SEGMENTS).values()
            oracle.assert_close(run(arrays, cotangents), expected, 5e-3)
