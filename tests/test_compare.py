"""The comparison of models: its cases, its record and its tables."""

import dataclasses
import functools
import json

import jax
import pytest

from benchmarks.compare import page, peers
from benchmarks.compare.attention import attention
from benchmarks.compare.cases import MODELS, Case, cases
from benchmarks.compare.record import Record
from dig_jax.components import Components, param_count
from dig_jax.hardware.chips import CHIPS
from dig_jax.models.mixers import softmax
from dig_jax.models.registry import resolve_options
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


def peers_row(pixels, phase, threads=2, device="cpu", **seconds):
    seconds = {"PyTorch": 6.0, "DiT": 4.0, "DiG": 5.0} | seconds
    case = peers.Case(device, "S", pixels, threads)
    about = {"PyTorch": {"torch": "2"}, "DiT": {"jax": "1"}, "DiG": {"jax": "1"}}
    return {
        **dataclasses.asdict(case),
        "phase": phase,
        "images": case.images,
        "sampling_steps": case.steps,
        "dtype": case.dtype,
        "clock": case.clock,
        "median": {name: {"cpu": t, "wall": t / 2} for name, t in seconds.items()},
        "about": about,
        "date": "2026-11-28",
    }


def test_a_cpu_measures_in_turns_what_is_missing_and_again_once_pytorch_is_there(tmp_path, monkeypatch):
    commands, record = [], tmp_path / "peers.json"

    class Worker:
        def __init__(self, command, options, environment):
            self.name = options.get("model") or options["network"]
            self.about = {"jax": "1"} if "model" in options else {"torch": "2"}

        def __call__(self, command):
            commands.append((self.name, command.partition("=")[0]))
            return {"difference": 1e-6} if "=" in command else {"wall": 1.0, "cpu": 2.0}

        def close(self):
            commands.append((self.name, "close"))

    monkeypatch.setattr(peers, "Worker", Worker)

    def add(*networks, phases=("forward",), again=False):
        commands.clear()
        options = {"python": "python", "networks": networks, "repeats": 1, "again": again}
        peers.add_rows(record, [peers.Case("cpu", "S", 256, 2)], ["DiT", "DiG"], phases, **options)
        return commands

    pair = [("DiT-S/2", "forward"), ("DiG-S/2", "forward")]
    assert add() == pair * 2 + [("DiG-S/2", "close"), ("DiT-S/2", "close")]
    assert add() == []
    assert add(again=True)[:4] == pair * 2
    checked = [("DiT", "save"), ("DiT-S/2", "check")]
    assert add("DiT")[:5] == [*checked, ("DiT", "forward"), *pair]
    checked += [("diffusers", "save"), ("DiT-S/2", "check")]
    turn = [("DiT", "forward"), ("diffusers", "forward"), *pair]
    assert add("DiT", "diffusers")[:8] == [*checked, *turn]
    assert add("DiT", "diffusers", phases=["forward", "train"])[4] == ("DiT", "train")
    assert [(row["phase"], sorted(row["median"]), row["differences"]) for row in peers.read(record)] == [
        (phase, ["DiG", "DiT", "PyTorch", "diffusers"], {"PyTorch": 1e-6, "diffusers": 1e-6})
        for phase in ("forward", "train")
    ]


def test_each_peer_has_the_sizes_of_ours(monkeypatch):
    started = []

    class Worker:
        def __init__(self, command, options, environment):
            started.append(options)

        def close(self):
            pass

    monkeypatch.setattr(peers, "Worker", Worker)
    for size in peers.SIZES:
        with peers.workers(peers.Case("cpu", size, 256, 1), ["DiT", "DiG"], "python", ["DiT", "DiG"]):
            pass
        *networks, dit, dig = started[-4:]
        for network, own in zip(networks, (dit, dig), strict=True):
            _, options = resolve_options(own["model"])
            ours = {"depth": options.depth, "width": options.hidden_size, "heads": options.num_heads}
            assert ours.items() <= network.items()


def test_a_python_without_pytorch_is_one_line(tmp_path):
    for device, need in (("cpu", "`import torch` works"), ("H100", "PyTorch finds the GPU")):
        with pytest.raises(SystemExit, match=f"error: invalid --pytorch=.*none; .* in which {need}"):
            peers.find_networks(str(tmp_path / "none"), device)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("network", "model"), [("DiT", "DiT-S/2"), ("diffusers", "DiT-S/2"), ("DiG", "DiG-S/2")]
)
def test_a_peer_in_pytorch_gives_the_output_of_ours(tmp_path, monkeypatch, network, model):
    pytest.importorskip("torch")
    if network == "diffusers":
        pytest.importorskip("diffusers")
    from benchmarks.compare import own_model, pytorch_dig, pytorch_worker

    monkeypatch.setattr(pytorch_dig, "FUSED", False)
    monkeypatch.setattr(pytorch_worker, "DEVICE", "cpu")
    sizes = peers.SIZES["S"] | {"side": 8, "batch": 2, "steps": 1}
    peer = pytorch_worker.Peer(network=network, dtype="float32", **sizes)
    peer.train()
    peer.save(tmp_path / "model.npz")
    assert own_model.difference(str(tmp_path / "model.npz"), model, "float32") < 1e-5


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
    for size, parameters in (("B", 10**8), ("XL", 10**9)):
        case = Case("DiG", size, 256, "train")
        first.add(size, row(case, bytes=2**31, limit=2**32, parameters=parameters, **times))
    first.add("a", row(fast, bytes=2**30, limit=2**32, parameters=10**7, **times))
    second.add("b", row(large, bytes=2**33, limit=2**32, parameters=10**7))
    second.add("c", {"error": "invalid"})
    assert json.loads((tmp_path / "record.json").read_text()).keys() == {*"abcB", "XL", "512", "1024"}
    monkeypatch.setattr(page, "PAGE", tmp_path / "page.md")
    monkeypatch.setattr(page, "IMAGES", tmp_path)
    (tmp_path / "page.md").write_text(
        f"Before\n{page.BEGIN}old\n{page.END}{page.BEGIN_CPU}{page.END_CPU}After\n"
    )
    rows = [
        peers_row(256, "train", threads=1),
        peers_row(512, "sample", device="H100", fla=10.0, diffusers=9.0),
    ]
    page.write(Record.read(tmp_path / "record.json"), rows)
    text = (tmp_path / "page.md").read_text()
    assert text.startswith("Before\n") and text.endswith("After\n") and "old" not in text
    assert "| DiG | 0.0312 ms (memory), 1.00 GiB | 0.0312 ms (memory), 0.50 GiB |" in text
    assert "| DiT, flash attention | does not fit: 8.00 GiB |  |  |" in text
    assert "| train step, 256 px | 2 | cpu, 1 thread | 6.00 | 4.00 | 5.00 | 1.50 | 0.80 |" in text
    assert "| 20 steps of Euler's method, 512 px | 4 | wall | 3.00 | 4.50 | 2.00 | 5.00 | 2.50 | 1.50" in text
    assert "**Size S, H100, bfloat16**" in text and "| speed of DiG, ours / DiG, PyTorch with fla |" in text
    assert "*PyTorch 2, JAX 1, 2026-11-28.*" in text
    assert "jax 1, 2026-11-28" in text and wrong.model not in text
    assert {path.name for path in tmp_path.glob("*.png")} == {
        f"compare_{quantity}{kind}.png" for quantity in ("memory", "time") for kind in ("", "_by_size")
    }
