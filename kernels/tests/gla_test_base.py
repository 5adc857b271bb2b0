"""What every implementation must do; a test file per implementation subclasses `GLATestBase`."""

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
examples = hypothesis.settings(
    max_examples=6,
    deadline=None,
    derandomize=True,
    # The laws are the same methods in every subclass, which matters only for a database of failures.
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.differing_executors],
)
seeds = st.tuples(st.integers(0, 2**16), st.sampled_from(oracle.GATES))


def golden_files():
    """Slow are those whose decays others have: each is a size, and so a compilation, of its own."""
    files = sorted((pathlib.Path(__file__).parent / "golden").glob("gla_*.npz"))
    others = ("gla_0_", "gla_1_", "gla_5_")
    marks = [pytest.mark.slow if path.stem.startswith(others) else () for path in files]
    return [pytest.param(path, id=path.stem, marks=mark) for path, mark in zip(files, marks, strict=True)]


class GLATestBase:
    implementation: str | None
    interpret = False

    @property
    def backend(self):
        return {"implementation": self.implementation, "interpret": self.interpret}

    def scan(self, q, k, v, g, initial_state, **options):
        options = {"chunk_size": 16} | self.backend | options
        return gla(q, k, v, g, initial_state=initial_state, return_final_state=True, **options)

    def compiled(self, **options):
        """The function of (arrays, cotangents) with (o, final_state, dq, dk, dv, dg, dinitial_state)."""

        @jax.jit
        def run(arrays, cotangents):
            out, vjp = jax.vjp(functools.partial(self.scan, **options), *arrays)
            return (*out, *vjp(cotangents))

        return run

    def results(self, arrays, cotangents, **options):
        """What `compiled` returns."""
        return self.compiled(**options)(arrays, cotangents)

    @pytest.mark.parametrize("path", golden_files())
    def test_reproduces_the_public_torch_implementation(self, path):
        file = {name: jnp.asarray(x, jnp.float32) for name, x in np.load(path).items()}
        q, k, v, g, o, do, dq, dk, dv, dg = (
            file[name].swapaxes(1, 2) for name in ("q", "k", "v", "g", "o", "do", "dq", "dk", "dv", "dg")
        )
        state = file.get("h0", jnp.zeros_like(file["ht"]))
        actual = self.results((q, k, v, g, state), (do, file["dht"]), chunk_size=None)
        expected = (o, file["ht"], dq, dk, dv, dg, file.get("dh0", actual[-1]))
        oracle.assert_close(actual, expected, FLOAT32)

    @pytest.mark.parametrize(
        ("t", "k", "v", "gate", "options"),
        [
            (1, 32, 64, "dig", {}),
            (15, 16, 32, "strong", {"reverse": True}),
            (16, 60, 60, "none", {"scale": 0.3}),
            (63, 64, 64, "reset_60", {"chunk_size": 16}),
            (64, 64, 128, "reset_1e4", {}),
            (65, 32, 64, "strong", {"chunk_size": 32, "reverse": True}),
        ],
    )
    def test_values_and_gradients_equal_the_recurrence(self, t, k, v, gate, options):
        arrays, cotangents = oracle.inputs(t, t=t, h=2, k=k, v=v, gate=gate)
        actual = self.results(arrays, cotangents, **({"chunk_size": None} | options))
        options.pop("chunk_size", None)
        expected = oracle.recurrence(arrays, cotangents, **options)
        oracle.assert_close(actual, expected.values(), FLOAT32)

    @pytest.mark.parametrize(("dtype", "gate_dtype"), [("bfloat16", "float32"), ("float16", "float16")])
    def test_low_precision_stays_close_and_keeps_the_dtypes(self, dtype, gate_dtype):
        arrays, cotangents = oracle.inputs(0, t=40, h=2, k=32, v=64, dtype=dtype, gate_dtype=gate_dtype)
        actual = self.results(arrays, cotangents)
        oracle.assert_close(actual, oracle.recurrence(arrays, cotangents).values(), 5e-3)
        dtypes = [str(x.dtype) for x in actual]
        assert dtypes == [dtype, "float32", dtype, dtype, dtype, gate_dtype, "float32"]

    def test_without_states_it_starts_from_zero(self):
        (q, k, v, g, state), _ = oracle.inputs(1)
        o = gla(q, k, v, g, **self.backend)
        expected = oracle.recurrence((q, k, v, g, jnp.zeros_like(state)))
        oracle.assert_close([o], [expected["o"]], FLOAT32, names=["o"])

    @pytest.mark.parametrize("reverse", [False, True])
    def test_segments_start_from_zero_and_states_enter_and_leave_at_the_ends(self, reverse):
        arrays, cotangents = oracle.inputs(2, gate="strong")
        options = {"segment_ids": jnp.asarray(SEGMENTS), "reverse": reverse}
        actual = self.results(arrays, cotangents, **options)
        oracle.assert_close(actual, oracle.recurrence(arrays, cotangents, **options).values(), FLOAT32)
        scanned = SEGMENTS[:, ::-1] if reverse else SEGMENTS
        starts = np.diff(scanned, axis=1, prepend=scanned[:, :1]) != 0
        assert not np.asarray(actual[5])[starts[:, ::-1] if reverse else starts].any()

    def test_resets_of_any_size_are_exact_and_have_no_gradient(self):
        (q, k, v, decays, state), cotangents = oracle.inputs(15, t=40)
        # First tokens of chunks, and inside a chunk some of the channels.
        resets = np.zeros(decays.shape, bool)
        resets[:, (0, 16)], resets[:, 39, :, ::3] = True, True
        run = self.compiled()
        for reset in (-1e4, -1e30, jnp.finfo(jnp.float32).min):
            g = jnp.where(resets, reset, 1e-3 * decays)
            actual = run((q, k, v, g, state), cotangents)
            oracle.assert_close(actual, oracle.recurrence((q, k, v, g, state), cotangents).values(), 1e-5)
            assert not np.asarray(actual[5])[resets].any()

    @pytest.mark.parametrize("direction", ["row", "row_reversed", "column", "column_reversed"])
    def test_directions_equal_a_scan_of_reordered_tokens(self, direction):
        rows, columns = 4, 5
        arrays, _ = oracle.inputs(3)
        *tokens, state = arrays
        index = np.arange(rows * columns).reshape(rows, columns)
        index = (index.T if direction.startswith("column") else index).ravel()
        index = index[::-1] if direction.endswith("reversed") else index
        expected = oracle.recurrence((*(x[:, index] for x in tokens), state), segment_ids=SEGMENTS[:, index])
        options = {"grid": (rows, columns), "direction": direction, "segment_ids": jnp.asarray(SEGMENTS)}
        options |= self.backend | {"return_final_state": True}
        o, final_state = gla_2d(*tokens, initial_state=state, **options)
        oracle.assert_close([o[:, index], final_state], expected.values(), FLOAT32, names=oracle.NAMES[:2])

    @pytest.mark.parametrize(("grid", "direction"), [((5, 4), "column_reversed"), ((5, 13), "row")])
    def test_gated_scan_equals_its_formula_in_values_and_gradients(self, grid, direction):
        (q, k, v, logits, state), (d_out, d_state) = oracle.inputs(14, t=grid[0] * grid[1], h=2, k=16, v=32)
        weight, gate = jnp.linspace(0.5, 2, 32), jnp.roll(d_out, 1, axis=1)
        options = {"grid": grid, "direction": direction, "return_final_state": True, "gate_normalizer": 4}

        def fused(q, k, v, logits, gate, weight, state):
            options_here = options | self.backend | {"initial_state": state, "eps": 1e-3}
            return gated_gla_2d(q, k, v, 8 * logits, gate, weight, **options_here)

        def formula(q, k, v, logits, gate, weight, state):
            g = jax.nn.log_sigmoid(8 * logits) / 4
            options_here = {"initial_state": state, "implementation": "reference", "return_final_state": True}
            o, final_state = gla_2d(q, k, v, g, grid=grid, direction=direction, **options_here)
            o = o * jax.lax.rsqrt(jnp.mean(o**2, axis=-1, keepdims=True) + 1e-3)
            return o * weight * gate * jax.nn.sigmoid(gate), final_state

        def results(scan):
            out, vjp = jax.vjp(scan, q, k, v, logits, gate, weight, state)
            return (*out, *vjp((d_out, d_state)))

        names = ["out", "final_state", "dq", "dk", "dv", "dlogits", "dgate", "dweight", "dstate"]
        actual, expected = (jax.jit(results, static_argnums=0)(scan) for scan in (fused, formula))
        oracle.assert_close(actual, expected, FLOAT32, names)

    @examples
    @hypothesis.given(seeds)
    def test_reverse_is_a_flip(self, seed):
        (*tokens, state), _ = oracle.inputs(seed[0], gate=seed[1])
        o, final_state = self.scan(*tokens, state, reverse=True)
        flipped, expected = self.scan(*(jnp.flip(x, 1) for x in tokens), state)
        # Not to the bit: kernels turn their masks and not the tokens, and so add up in another order.
        oracle.assert_close([o, final_state], [jnp.flip(flipped, 1), expected], 4e-6, oracle.NAMES[:2])

    @examples
    @hypothesis.given(seeds)
    def test_two_calls_chained_by_their_state_are_one(self, seed):
        (*tokens, state), _ = oracle.inputs(seed[0], gate=seed[1])
        o, final_state = self.scan(*tokens, state)
        first, middle = self.scan(*(x[:, :7] for x in tokens), state)
        second, last = self.scan(*(x[:, 7:] for x in tokens), middle)
        chained = [jnp.concatenate([first, second], 1), last]
        oracle.assert_close(chained, [o, final_state], FLOAT32, oracle.NAMES[:2])

    @examples
    @hypothesis.given(seeds, st.floats(-2, 2, width=32))
    def test_output_and_state_are_linear_in_values_and_initial_state(self, seed, factor):
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

    def test_reverse_over_forward_equals_forward_over_reverse(self):
        arrays, cotangents = oracle.inputs(9)
        tangents, _ = oracle.inputs(10)

        def loss(arrays):
            o, final_state = self.scan(*arrays)
            return jnp.sum(jnp.square(o) * cotangents[0]) + jnp.sum(jnp.sin(final_state))

        def derivative(arrays):
            return jax.jvp(loss, (arrays,), (tangents,))[1]

        reverse_over_forward = jax.jit(jax.grad(derivative))(arrays)
        forward_over_reverse = jax.jit(lambda x, t: jax.jvp(jax.grad(loss), (x,), (t,))[1])(arrays, tangents)
        oracle.assert_close(reverse_over_forward, forward_over_reverse, 1e-4, oracle.NAMES[2:])

    def test_works_in_a_checkpointed_scan_over_layers(self):
        (q, k, v, g, state), (do, _) = oracle.inputs(11)
        decays = jnp.stack([g, 2 * g])

        def layer(x, g):
            return x + self.scan(q, k, x, g, state)[0], None

        def scanned(v, decays):
            return jnp.vdot(jax.lax.scan(jax.checkpoint(layer), v, decays)[0], do)

        def unrolled(v, decays):
            for g in decays:
                v = layer(v, g)[0]
            return jnp.vdot(v, do)

        actual, expected = (jax.jit(jax.grad(f, (0, 1)))(v, decays) for f in (scanned, unrolled))
        oracle.assert_close(actual, expected, FLOAT32, ["v", "decays"])

    @pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
    def test_batch_can_be_sharded(self, axis_type):
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

    def test_no_float64_appears_when_x64_is_on(self):
        with jax.enable_x64(True):
            arrays, cotangents = oracle.inputs(13, dtype="bfloat16")
            run = functools.partial(self.results, segment_ids=jnp.asarray(SEGMENTS))
            assert "f64" not in str(jax.make_jaxpr(run)(arrays, cotangents))
            expected = oracle.recurrence(arrays, cotangents, segment_ids=SEGMENTS).values()
            oracle.assert_close(run(arrays, cotangents), expected, 5e-3)
