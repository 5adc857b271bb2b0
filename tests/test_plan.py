"""--mode=plan: topologies, compilation without chips, and the figures."""

import importlib.util
import json
import math
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from tpu_programs import lower_loop, lower_too_large

from configs import dig_s
from dig_jax import config
from dig_jax.data.features import new_features
from dig_jax.errors import ConfigError, UserError
from dig_jax.hardware.chips import CHIPS, chip_of_kind
from dig_jax.hardware.hlo_cost import count
from dig_jax.planning import plan, planned_run, topology
from dig_jax.planning.compiling import compile_fully, compile_without_codegen
from dig_jax.planning.fitting import SIZES, largest_fitting
from dig_jax.planning.prices import PRICES, Price, cost, find_price
from dig_jax.planning.summary import summary
from dig_jax.testing import tiny_settings

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("start", [1, 4, 5, 64, 4096])
@pytest.mark.parametrize("slope", [0.4, 3.0, 900.0])
def test_the_largest_batch_that_fits_is_found_in_few_measurements(start, slope):
    measured = []

    def needed(size):
        measured.append(size)
        return 300 + slope * size

    found = largest_fitting(needed, start, fixed=200, limit=1000.0, attempts=6)
    fitting = [size for size in (*SIZES, start) if 300 + slope * size <= 1000]
    assert found == max(fitting, default=0)
    assert len(measured) == len(set(measured)) <= 6
    assert found in (0, *measured)


def test_no_batch_fits_if_the_state_does_not():
    assert largest_fitting(lambda size: 2000 + size, 1, fixed=2000, limit=1000.0) == 0


# Topologies.


@pytest.mark.parametrize("name", ["v5", "v5e", "v5e:", "v5e:16x", "v5e:0x4", "v7:2x2", "a100:8", "V5E:2x2"])
def test_an_unknown_topology_lists_the_known_ones(name):
    with pytest.raises(ConfigError, match=rf"unknown --topology={name}.*this.*v5e:16x16.*h100:8x4"):
        topology.find_topology(name)


@pytest.mark.parametrize(("name", "package"), [("v5e:2x2", "libtpu"), ("h200:8", "xla_cuda13")])
def test_a_missing_compiler_is_named(monkeypatch, name, package):
    monkeypatch.setattr(topology, "_installed", lambda module: False)
    with pytest.raises(UserError, match=rf"not installed \(.*{package}.*pip install -e '.\[compilers\]'"):
        topology.find_topology(name)


needs_libtpu = pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="libtpu is not installed")
needs_cuda = pytest.mark.skipif(
    not topology._installed("jax_plugins.xla_cuda13"), reason="jax-cuda13-plugin is not installed"
)


@needs_libtpu
@pytest.mark.parametrize(
    ("name", "devices"), [("v4:2x2x1", 4), ("v6e:2x4", 8), ("tpu7x:2x2x1", 8), ("v6e:1x1", 1)]
)
def test_tpu_topologies_have_their_chips(name, devices):
    found = topology.find_topology(name)
    assert (found.chips, len(found.devices)) == (math.prod(map(int, name.split(":")[1].split("x"))), devices)
    assert chip_of_kind(found.devices[0].device_kind) == found.chip


@needs_libtpu
def test_an_unavailable_size_gives_one_line():
    with pytest.raises(ConfigError, match="--topology=v5e:3x5: .*not divisible"):
        topology.find_topology("v5e:3x5")


@needs_cuda
def test_gpus_are_given_per_host_and_hosts():
    found = topology.find_topology("h100:8x4")
    assert found.chips == 32
    assert [device.process_index for device in found.devices] == [host for host in range(4) for _ in range(8)]
    with pytest.raises(ConfigError, match="--topology=h100:8x4x2: invalid number of GPUs; expected PER_HOST"):
        topology.find_topology("h100:8x4x2")


# Compilation.


@pytest.mark.slow
@needs_libtpu
def test_a_program_for_tpus_is_the_same_without_code_generation():
    early, late = compile_without_codegen(lower_loop), compile_fully(lower_loop())
    assert count(early.text) == count(late.text)
    assert count(early.text).exchanged().keys() == {"all-reduce"}
    assert early.memory["arguments"] == late.memory["arguments"]
    assert sum(early.memory.values()) == pytest.approx(sum(late.memory.values()), rel=0.1)


@needs_libtpu
def test_a_program_that_does_not_fit_reports_its_size():
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED") as refusal:
        compile_without_codegen(lower_too_large)
    assert plan.bytes_of_refusal(refusal.value) == 96 * 2**30


# The plan.


def test_the_largest_bucket_is_planned_on_this_machine_without_a_workdir_or_data(
    tmp_path, monkeypatch, capsys
):
    """As JSON; the config's data does not exist, and nothing is written."""
    monkeypatch.chdir(tmp_path)
    settings = tiny_settings(model__name="DiT-S/2", data__name="not_there", data__buckets="4x4,6x12,8x8")
    plan.show(settings, plan.THIS, as_json=True)
    figures = json.loads(capsys.readouterr().out)
    devices = jax.device_count()
    assert (figures["topology"], figures["chips"], figures["memory_limit"]) == ("this", devices, None)
    train = figures["train"]
    assert 4 * figures["parameters"] == train["memory"]["parameters"] == train["memory"]["averages"] / 2
    assert 2 * train["memory"]["parameters"] <= train["memory"]["optimizer"]
    assert devices * sum(train["flops"].values()) == pytest.approx(
        train["batch_size"] * figures["model_flops_per_image"], rel=0.2
    )
    assert devices * train["memory"]["batch"] == train["batch_size"] * 4 * (6 * 12 + 1)
    assert f"{train['batch_size']} images of 6x12 (the largest bucket)" in summary(figures)
    assert not list(tmp_path.iterdir())


def test_a_plan_takes_the_shape_of_stored_features_without_their_images(tmp_path):
    with new_features(tmp_path / "features", 7, True, {"images": "of another machine"}) as append:
        append(*[np.zeros((7, 2, 2, 3), np.float16)] * 2)
    data = {"data__name": "not_there", "data__batch_size": 4 * jax.device_count()}
    repa = {"auxiliary__repa_weight": 0.5, "auxiliary__repa_features": str(tmp_path / "features")}
    settings = plan.without_data(tiny_settings(model__name="DiT-S/2", **data, **repa))
    run = planned_run.PlannedRun.of(settings, topology.find_topology(plan.THIS))
    (_, batch), _ = planned_run.lower_train_step(run).args_info
    assert batch["features"].shape == (4 * jax.device_count(), 2, 2, 3)


@pytest.fixture(scope="module")
def tpu_plan():
    """A plan for four chips of v5e, and the program that it counted."""
    programs = []

    def recorded(lower):
        programs.append(compile_without_codegen(lower))
        return programs[-1]

    c = dig_s.get_config("256", "ours")
    c.model.depth, c.model.hidden_size, c.model.num_heads = 1, 128, 2
    c.model.dtype = "bfloat16"
    c.data.batch_size = 8
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planned_run, "compile_without_codegen", recorded)
        figures = plan.plan(config.from_dict(c.to_dict()), "v5e:2x2", train_only=True)
    return figures, programs[0]


@needs_libtpu
def test_a_plan_for_tpus_counts_kernels_and_collectives(tpu_plan):
    figures, _ = tpu_plan
    train = figures["train"]
    assert train["collectives"].keys() == {"all-reduce"}
    assert 2 * figures["parameters"] <= train["collectives"]["all-reduce"] <= 6 * figures["parameters"]
    assert 1 <= sum(train["flops"].values()) / (2 * figures["model_flops_per_image"]) <= 1.5
    assert train["memory_needed"] < figures["memory_limit"] == 15.75 * 2**30
    assert train["step_seconds"] == max(train["seconds"].values())
    assert train["days"] * 86400 == pytest.approx(400_000 * train["step_seconds"])
    text = summary(figures)
    assert "4 chips (data 4)" in text and "(bound)" in text and ": fits" in text
    hours = 100_000 * train["step_seconds"] / 3600
    assert train["cost"] == {"steps": 100_000, "hours": hours, "dollars": pytest.approx(4 * 1.2 * hours)}
    assert "at $1.20 per chip and hour (Google Cloud" in text


def test_a_price_replaces_the_list_price_and_an_unknown_one_is_said():
    assert find_price("v5e", 0.5) == Price(0.5, "config.plan.price", "", "")
    assert find_price("h200", None) == PRICES["h200"]
    assert find_price("v4", None) is find_price(None, None) is None
    assert all(price.source.startswith("https://") and price.date for price in PRICES.values())
    assert PRICES.keys() <= CHIPS.keys()
    assert cost(0.036, 8, find_price("v4", 2.0)) == pytest.approx(
        {"steps": 100_000, "hours": 1.0, "dollars": 16.0}
    )
    assert cost(0.036, 8, None)["dollars"] is None


@needs_libtpu
def test_a_program_for_tpus_keeps_heads_together(tpu_plan):
    """A head in a dimension of its own would be padded to 128 lanes, and copied for the kernel."""
    _, program = tpu_plan
    assert "tpu_custom_call" in program.text
    assert not re.search(r"bf16\[2,256,2,(32|64)\]\S* (copy|reshape|fusion|convolution)\(", program.text)


def test_a_batch_that_the_devices_do_not_divide_is_an_error():
    with pytest.raises(ConfigError, match="config.data.batch_size=8"):
        plan.plan(tiny_settings(mesh__data=3), plan.THIS)


def test_a_product_without_tiles_is_compiled_without_triton(monkeypatch):
    compile_, seen = jax.stages.Lowered.compile, []

    def refusing(self, options=None):
        seen.append(options)
        if options is None:
            raise jax.errors.JaxRuntimeError("Couldn't find output tile sizes that satisfy hlo: %dot")
        return compile_(self)

    monkeypatch.setattr(jax.stages.Lowered, "compile", refusing)
    assert compile_fully(jax.jit(jax.lax.sin).lower(1.0)).text
    assert seen == [None, {"xla_gpu_enable_triton_gemm": False}]
