"""What the benchmarks of quality promise; their figures are in benchmarks/README.md."""

import argparse
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import copy_task, half_lives, runs
from benchmarks.digits import settings_of
from dig_jax.components import Components
from dig_jax.training.state import init_params


def test_masked_tokens_of_the_copy_task_name_the_symbols_of_their_mirror_images():
    shown = jnp.array([[4, 1, 3]])
    images, symbols, used = map(np.asarray, copy_task.batch(jax.random.key(0), 8, shown))
    assert (symbols == symbols[..., ::-1]).all()
    assert used.sum(-1).tolist() == [[8, 2, 6]]
    assert (used == used[..., ::-1]).all()
    given = images.argmax(-1)
    mask = copy_task.SYMBOLS
    assert (given[..., :4] == mask).all()
    assert (given[..., 4:] == np.where(used[..., 4:], symbols[..., 4:], mask)).all()


def test_a_benchmark_goes_on_with_the_rows_that_are_missing(tmp_path):
    record, asked = tmp_path / "rows.json", []
    options = argparse.Namespace(names="a,b", seeds="0,1", write=True, folder=None)

    def rows_of(name, seed, workdir):
        asked.append((name, seed, workdir.name))
        if len(asked) == 3:
            raise KeyboardInterrupt
        yield {"accuracy": 1.0}

    with pytest.raises(KeyboardInterrupt):
        runs.run_all(options, record, rows_of)
    runs.run_all(options, record, rows_of)
    assert asked == [("a", 0, "a-0"), ("b", 0, "b-0"), ("a", 1, "a-1"), ("a", 1, "a-1"), ("b", 1, "b-1")]
    rows = json.loads(record.read_text())
    assert [(row["name"], row["seed"]) for row in rows] == [("a", 0), ("b", 0), ("a", 1), ("b", 1)]


@pytest.mark.parametrize(
    "rule, expected",
    [("4,64", [4, 64]), pytest.param("16", [16, 16], marks=pytest.mark.slow)],
)
def test_half_lives_at_initialization_are_those_of_the_config(rule, expected):
    fields = {"model.depth": 2, "model.hidden_size": 64, "model.gate_normalizer": rule}
    components = Components(settings_of("flow", 0, **fields))
    blocks = half_lives.half_lives(components, init_params(components), 4)
    assert [block.shape for block in blocks] == [(4 * 16, 2, 16)] * 2
    for block in blocks:
        np.testing.assert_allclose(np.median(block, axis=(0, 2)), expected, rtol=0.1)
