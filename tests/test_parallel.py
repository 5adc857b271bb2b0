import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from jax.sharding import PartitionSpec as P

from dig_jax.errors import ConfigError
from dig_jax.parallel import make_mesh, state_sharding
from dig_jax.testing import tiny_components, tiny_settings
from dig_jax.training.state import fresh_state
from dig_jax.training.train import train

ROOT = Path(__file__).parent.parent
MESHES = {
    "data": {"data": 8},
    "fsdp": {"data": 1, "fsdp": 8},
    "tensor": {"data": 1, "tensor": 2},
    "context": {"data": 1, "context": 4},
    "mixed": {"data": 1, "fsdp": 2, "tensor": 2, "context": 2},
    "without context": {"data": 2, "fsdp": 2, "tensor": 2},
}
# All meshes sum gradients. A tensor axis also gathers weights and modulation vectors, and re-shards a fused
# weight from rows to columns. With split rows, DiG exchanges states, columns and the convolution's neighbors,
# and DiT keys and values.
TENSOR = {"all-gather", "all-to-all"}
CONTEXT = {
    "DiG-S/2": {"all-gather", "reduce-scatter", "all-to-all", "collective-permute"},
    "DiT-S/2": {"all-gather", "reduce-scatter"},
    "DiS-S/2": set(),
}


def collectives(name: str, mesh: str) -> set[str]:
    by_mesh = {
        "data": set(),
        "fsdp": {"all-gather"},
        "tensor": TENSOR,
        "context": CONTEXT[name],
        "mixed": TENSOR | CONTEXT[name],
        "without context": TENSOR,
    }
    return {"all-reduce"} | by_mesh[mesh]


def compare(name: str, depth: int, meshes: tuple[str, ...]) -> dict[str, dict]:
    """The results of mesh_comparison.py with eight devices."""
    flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    env = os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    axes = json.dumps([MESHES[mesh] for mesh in meshes])
    command = [sys.executable, "tests/mesh_comparison.py", name, str(depth), axes]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return dict(zip(meshes, json.loads(done.stdout), strict=True))


def check(name: str, mesh: str, result: dict) -> None:
    assert result["loss"] < 1e-5
    assert result["gradient"] < 1e-5
    # Some gradients are close to zero, so their relative error is larger.
    assert result["worst parameter"] < 1e-3
    assert set(result["collectives"]) == collectives(name, mesh)
    # Only parameters are gathered, no tokens; with split rows also DiG's states and DiT's keys and values.
    if mesh != "context":
        assert result["gathered"] <= result["largest parameter"]


@pytest.mark.parametrize(
    "meshes", [("fsdp", "tensor", "context"), pytest.param(("data", "mixed"), marks=pytest.mark.slow)]
)
def test_gradients_on_meshes_equal_one_devices_and_need_only_the_expected_collectives(meshes):
    for mesh, result in compare("DiT-S/2", 1, meshes).items():
        check("DiT-S/2", mesh, result)


@pytest.mark.slow
def test_gradients_of_scans_on_a_mesh_of_all_axes_equal_one_devices():
    """Three blocks scan rows, rows reversed and columns."""
    check("DiG-S/2", "mixed", compare("DiG-S/2", 3, ("mixed",))["mixed"])


@pytest.mark.slow
def test_gradients_of_scans_on_all_meshes_equal_one_devices():
    for mesh, result in compare("DiG-S/2", 8, tuple(MESHES)).items():
        check("DiG-S/2", mesh, result)


@pytest.mark.slow
def test_gradients_of_dis_on_a_mesh_equal_one_devices():
    check("DiS-S/2", "without context", compare("DiS-S/2", 2, ("without context",))["without context"])


def layout(name: str = "DiG-S/2", **mesh: int) -> dict[str, P]:
    """The partition specs of a tiny model's state on a mesh, by path."""
    fields = {f"mesh__{axis}": size for axis, size in mesh.items()}
    components = tiny_components(
        model__name=name, model__depth=4, model__hidden_size=64, model__num_heads=2, **fields
    )
    made = make_mesh(components.config.mesh, 24)
    shardings = state_sharding(jax.eval_shape(lambda: fresh_state(components)), made)
    named = jax.tree.leaves_with_path(shardings)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf.spec for path, leaf in named}


def test_tensor_splits_heads_and_channels_and_fsdp_the_other_dimension():
    specs, dit = layout(data=1, fsdp=2, tensor=2), layout("DiT-S/2", data=1, fsdp=2, tensor=2)
    block, both = "params/blocks/groups/0", ("tensor", "fsdp")
    columns = ["mixer/q_proj", "mixer/k_proj", "mixer/v_proj", "mixer/gate_proj", "mixer/decay_up"]
    for name in (*columns, "modulation/linear"):
        assert specs[f"{block}/{name}/kernel"] == P(None, "fsdp", "tensor"), name
    for name in ("mixer/o_proj", "mlp/down"):
        assert specs[f"{block}/{name}/kernel"] == P(None, "tensor", "fsdp"), name
    assert dit[f"{block}/mlp/hidden/kernel"] == P(None, "fsdp", "tensor")
    assert dit[f"{block}/mlp/out/kernel"] == P(None, "tensor", "fsdp")
    assert (
        dit[f"{block}/mixer/qkv_proj/kernel"] == specs[f"{block}/mlp/gate_up/kernel"] == P(None, both, None)
    )
    assert specs[f"{block}/conv/kernel"] == P(None, None, None, None)
    assert specs["params/label_embed/table/embedding"] == P(None, both)
    assert specs["step"] == P()


def test_averages_and_moments_are_sharded_like_their_parameters():
    specs = layout(data=1, fsdp=4)
    params = {
        name.removeprefix("params/"): spec for name, spec in specs.items() if name.startswith("params/")
    }
    assert sum("fsdp" in spec for spec in params.values()) > len(params) / 2
    for place in ("ema/0.9", "opt_state/0/mu", "opt_state/0/nu"):
        assert {name: specs[f"{place}/{name}"] for name in params} == params


def test_dimensions_that_an_axis_does_not_divide_are_not_split():
    specs = layout(data=1, fsdp=3)
    assert set(specs.values()) == {P(*[None] * n) for n in range(5)}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"mesh__tensor": 4},
            "config.mesh: invalid num_heads=2; expected a multiple of the 4 devices of mesh axis tensor",
        ),
        (
            {"mesh__context": 4},
            "got 2 rows of tokens; expected a multiple of 4, with 4 devices of mesh axis context",
        ),
    ],
)
def test_a_mesh_that_does_not_divide_the_model_is_rejected_before_anything_is_written(
    tmp_path, fields, message
):
    settings = tiny_settings(
        model__name="DiT-S/2", model__num_heads=2, mesh__data=1, training__steps=0, **fields
    )
    with pytest.raises(ConfigError, match=message):
        train(settings, tmp_path / "run")
    assert not (tmp_path / "run").exists()
