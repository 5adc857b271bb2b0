"""MFU, roofline share and peak memory."""

import logging
import types
from unittest import mock

import jax
import jax.numpy as jnp
import pytest

from dig_jax.hardware.chips import CHIPS
from dig_jax.hardware.hlo_cost import count
from dig_jax.hardware.model_flops import training_flops
from dig_jax.hardware.roofline import roofline
from dig_jax.testing import mesh_of, random_params, tiny_components
from dig_jax.training.telemetry import utilization
from dig_jax.training.telemetry.utilization import best_times, peak_memory


@pytest.fixture(scope="module")
def run():
    """(components, mesh of four devices, a compiled step)."""
    x = jnp.ones((64, 64))
    return tiny_components(), mesh_of(4), jax.jit(jnp.matmul).lower(x, x).compile()


def test_utilization_uses_the_peaks_that_a_plan_uses(run, monkeypatch, caplog):
    components, mesh, train_step = run
    chip = CHIPS["h200"]
    monkeypatch.setattr(utilization, "chip_of_kind", lambda kind: chip)
    caplog.set_level(logging.INFO, "dig_jax")
    with jax.set_mesh(mesh):  # as in the loop
        found = best_times(*run)
    image, number = jnp.zeros((1, *components.train_source.image_shape)), jnp.zeros(1, int)
    flops = training_flops(components.denoise, random_params(components), image, number, number)
    step = roofline(count(train_step.as_text()), chip, list(mesh.devices.flat))
    assert found.utilization(1000.0) == {
        "mfu": pytest.approx(1000 * flops / (4 * chip.flops["bfloat16"])),
        "roofline_share": pytest.approx(1000 / 8 * step.seconds),
    }
    assert caplog.messages == [f"roofline of h200: at least {step.seconds:.3g} s per step, bound by memory"]


def test_unknown_chips_have_no_utilization(run, caplog):
    caplog.set_level(logging.INFO, "dig_jax")
    assert best_times(*run).utilization(100.0) == {}
    assert not caplog.messages


def test_an_unreadable_program_is_logged_and_does_not_end_the_run(run, monkeypatch, caplog):
    unreadable = mock.create_autospec(jax.stages.Compiled, instance=True)
    unreadable.as_text.side_effect = ZeroDivisionError("division by zero")
    monkeypatch.setattr(utilization, "chip_of_kind", lambda kind: CHIPS["h200"])
    assert set(best_times(*run[:2], unreadable).utilization(100.0)) == {"mfu"}
    assert caplog.messages == ["could not compute the roofline share: ZeroDivisionError: division by zero"]


def test_peak_memory_is_the_maximum_over_the_devices():
    def device(stats):
        return types.SimpleNamespace(memory_stats=lambda: stats)

    devices = [device({"peak_bytes_in_use": size * 2**30}) for size in (3, 5, 4)]
    assert peak_memory([*devices, device(None), device({})]) == {"peak_memory_gib": 5.0}
    assert peak_memory([device(None)]) == {}
