"""The comparison of models: its cases, its record and its tables."""

import functools
import json

import jax
import pytest

from benchmarks.compare import page
from benchmarks.compare.attention import attention
from benchmarks.compare.cases import MODELS, Case, cases
from benchmarks.compare.record import Record
from dig_jax.components import Components, param_count
from dig_jax.hardware.chips import CHIPS
from dig_jax.models.mixers import softmax
from dig_jax.training.state import init_params


@functools.cache
def parameters(model):
    components = Components(Case(model, "S", 256, "train").settings())
    return param_count(jax.eval_shape(functools.partial(init_params, components)))


@pytest.mark.parametrize("model", [model for model in MODELS if model != "DiG"])
def test_compared_models_have_the_parameters_of_dig_within_5_percent(model):
    assert parameters(model) == pytest.approx(parameters("DiG"), rel=0.05)


def test_every_step_has_the_same_number_of_pixels():
    pixels = {
        case.images * case.pixels**2 for case in cases(["DiG"], ["S"], [256, 512, 1024, 2048], ["train"])
    }
    assert pixels == {2048**2}
    assert Case("DiG", "S", 1792, "train").images == 1
    assert Case("DiG", "S", 256, "train", batch=3).images == 3
    settings = Case("DiS", "XL", 1792, "sample").settings()
    assert (settings.data.options["image_size"], settings.sampling.batch_size) == (224, 1)


@pytest.mark.parametrize(
    ("model", "chip", "absent", "replaced"),
    [
        ("DiT, plain", "v6e", True, True),
        ("DiT", "h200", True, True),
        ("DiT", "h200", False, False),
        ("DiT", "v6e", True, False),
        ("DiG", "v6e", True, False),
    ],
)
def test_attention_is_replaced_only_where_the_case_says_so(model, chip, absent, replaced):
    own = softmax._attend
    with attention(Case(model, "S", 256, "train"), CHIPS[chip], absent=absent):
        assert (softmax._attend is not own) == replaced
    assert softmax._attend is own


def row(case, **figures):
    about = {"kind": "computed", "device": "v6e", "date": "2026-11-28", "versions": {"jax": "1"}}
    return {
        "model": case.model,
        "size": case.size,
        "pixels": case.pixels,
        "phase": case.phase,
        **about,
        **figures,
    }


def test_rows_of_two_processes_are_kept_and_shown_with_their_versions(tmp_path, monkeypatch):
    first, second = (Record.read(tmp_path / "record.json") for _ in range(2))
    fast, large, wrong = (
        Case("DiG", "S", 256, "train"),
        Case("DiT", "S", 256, "train"),
        Case("DiS", "S", 8, "train"),
    )
    times = {"milliseconds": {"compute": 1.0, "memory": 2.0}, "bound": "memory", "images_per_second": 32000.0}
    for pixels in (1024, 512):
        first.add(str(pixels), row(Case("DiG", "S", pixels, "train"), bytes=2**29, limit=2**32, **times))
    first.add("a", row(fast, bytes=2**30, limit=2**32, **times))
    second.add("b", row(large, bytes=2**33, limit=2**32))
    second.add("c", {"error": "invalid"})
    assert json.loads((tmp_path / "record.json").read_text()).keys() == {*"abc", "512", "1024"}
    monkeypatch.setattr(page, "PAGE", tmp_path / "page.md")
    monkeypatch.setattr(page, "IMAGES", tmp_path)
    (tmp_path / "page.md").write_text(f"Before\n{page.BEGIN}old\n{page.END}After\n")
    page.write(Record.read(tmp_path / "record.json"))
    text = (tmp_path / "page.md").read_text()
    assert text.startswith("Before\n") and text.endswith("After\n") and "old" not in text
    assert "| DiG | 0.0312 ms (memory), 1.00 GiB | 0.0312 ms (memory), 0.50 GiB |" in text
    assert "| DiT, flash attention | does not fit: 8.00 GiB |  |  |" in text
    assert "jax 1, 2026-11-28" in text and wrong.model not in text
    assert {path.name for path in tmp_path.glob("*.png")} == {"compare_memory.png", "compare_time.png"}
