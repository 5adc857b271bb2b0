"""python -m dig_jax.convert recognizes files of the released DiS and writes them back."""

import dis_reference as reference
import jax
import numpy as np
import pytest
from flax import traverse_util
from safetensors.numpy import load_file, save_file
from upstream_files import refused, run

from dig_jax.checkpoints.reader import read_model
from dig_jax.convert.recognize import recognize
from dig_jax.convert.sources import UpstreamParams
from dig_jax.files.safetensors import StoredArray


@pytest.mark.parametrize("classes", [3, 0])
def test_a_file_of_dis_converts_to_ours_and_back_bit_for_bit(tmp_path, classes):
    arrays = reference.state_dict(classes)
    save_file({f"ema.{name}": array for name, array in arrays.items()}, tmp_path / "theirs.safetensors")
    run(tmp_path / "theirs.safetensors", tmp_path / "ours.safetensors")
    components, _, params = read_model(tmp_path / "ours.safetensors")
    model = components.config.model
    assert (model.name, model.depth, model.hidden_size) == ("DiS-S/2", reference.DEPTH, reference.WIDTH)
    assert model.learn_sigma
    assert components.image_spec.image_shape == (reference.SIZE, reference.SIZE, reference.CHANNELS)
    assert components.image_spec.num_classes == classes
    assert sum(x.size for x in traverse_util.flatten_dict(params).values()) == sum(
        x.size for x in arrays.values()
    )
    run(tmp_path / "ours.safetensors", tmp_path / "back.safetensors")
    back = load_file(tmp_path / "back.safetensors")
    assert back.keys() == arrays.keys()
    jax.tree.map(np.testing.assert_array_equal, back, arrays)


def shapes_of(depth, width, grid):
    """Return the arrays by which a DiS is recognized, without values."""
    blocks = {f"in_blocks.{block}.mixer.A_log": (2 * width, 16) for block in range(depth // 2)}
    shapes = blocks | {
        "patch_embed.proj.weight": (width, 4, 2, 2),
        "pos_embed": (1, 2 + grid[0] * grid[1], width),
        "final_layer.linear.weight": (32, width),
        "label_emb.embedding_table.weight": (1001, width),
    }
    stored = {name: StoredArray(shape, "float32", lambda: np.zeros(())) for name, shape in shapes.items()}
    return UpstreamParams(stored, "ema", {})


@pytest.mark.parametrize(
    ("depth", "width", "name"), [(24, 368, "DiS-S/2"), (48, 1536, "DiS-H/2"), (64, 1152, "DiS-1152x64/2")]
)
def test_a_size_of_dis_is_recognized_by_width_and_depth(depth, width, name):
    settings = recognize(shapes_of(depth, width, (32, 32)))
    assert (settings.model.name, settings.model.depth, settings.model.hidden_size) == (name, None, None)
    assert settings.data.options == {"image_size": 64, "channels": 4, "num_classes": 1000}


def test_a_dis_of_another_aspect_needs_its_size_and_one_line_says_what_is_wrong(tmp_path):
    arrays = reference.state_dict()
    arrays["pos_embed"] = arrays["pos_embed"][:, :-4]
    source = tmp_path / "theirs.safetensors"
    save_file(arrays, source)
    target = tmp_path / "ours.safetensors"
    assert "missing --input_size" in refused(source, target, status=2)
    assert "(1, 14, 24)" in refused(source, target, "--input_size=4x8", status=1)
    assert "num_heads=2 of DiS; expected 1" in refused(
        source, target, "--input_size=6x8", "--num_heads=2", status=2
    )
    assert "does not match the parameters: got parameter names of DiS" in refused(
        source, target, "--model=DiT-S/2", status=2
    )
    run(source, target, "--input_size=6x8")
    assert not list(tmp_path.glob(".*"))
