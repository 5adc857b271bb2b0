"""The notebooks, executed without a browser."""

import ast
import contextlib
import queue
from pathlib import Path

import nbformat
import pytest
from flax import nnx
from nbclient import NotebookClient

import dig_jax
from dig_jax.files.pytorch.writer import write_torch

FOLDER = Path(__file__).parent.parent / "notebooks"
CODE = {
    "sampling": ("install", "model", "images", "denoising", "interpolation", "guidance"),
    "gla_kernel": ("install", "recurrence", "toy", "gradients", "directions", "speed"),
}
# A model that compiles fast; the held-out loss and a grid of 100 images would take long, too.
TINY = (
    "settings.model.name, settings.model.depth, settings.model.hidden_size = 'DiT-S/2', 1, 64; "
    "settings.model.internal_head, settings.sampling.internal_guidance_scale = 0, 1.0; "
    "settings.logging.heldout_every_steps, settings.sampling.images_per_class = 0, 1"
)


def read(name):
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def in_seconds(get_msg):
    """Return `get_msg` that looks every second: a poll may miss a reply until it times out."""

    async def get(timeout):
        for _ in range(round(timeout)):
            with contextlib.suppress(queue.Empty):
                return await get_msg(timeout=1)
        raise queue.Empty

    return get


def execute(name, changes, timeout):
    """Return the notebook after a run with these changes of its source."""
    notebook = read(name)
    for old, new in changes.items():
        (cell,) = [cell for cell in notebook.cells if old in cell.source]
        cell.source = cell.source.replace(old, new)
    client = NotebookClient(notebook, timeout=timeout, resources={"metadata": {"path": FOLDER}})
    with client.setup_kernel():
        client.kc.shell_channel.get_msg = in_seconds(client.kc.shell_channel.get_msg)
        for index, cell in enumerate(notebook.cells):
            client.execute_cell(cell, index)
        client.set_widgets_metadata()
    return notebook


@pytest.mark.parametrize("name", CODE)
def test_a_notebook_is_stored_without_outputs_and_opens_in_colab(name):
    notebook = read(name)
    nbformat.validate(notebook)
    assert tuple(cell.id for cell in code_cells(notebook)) == CODE[name]
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code_cells(notebook))
    address = f"https://colab.research.google.com/github/dig-jax/dig-jax/blob/main/notebooks/{name}.ipynb"
    assert f"]({address})" in notebook.cells[0].source


def test_the_notebook_of_the_kernel_needs_the_kernel_alone():
    source = "\n".join(
        line
        for cell in code_cells(read("gla_kernel"))
        for line in cell.source.splitlines()
        if not line.strip().startswith("%")
    )
    source = source.replace("is None:\n\n", "is None:\n    pass\n\n")
    imported = {
        name.split(".")[0]
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in (
            [node.module] if isinstance(node, ast.ImportFrom) else [each.name for each in node.names]
        )
    }
    assert imported == {"importlib", "time", "jax", "matplotlib", "numpy", "pallas_gla"}


@pytest.fixture(scope="module")
def sampling(tmp_path_factory):
    """The notebook after a run with a tiny model, a few steps and another workdir."""
    workdir = tmp_path_factory.mktemp("notebook") / "run"
    changes = {
        'root / "runs" / "notebook"': repr(str(workdir)),
        "TRAINING_STEPS = 1500": "TRAINING_STEPS = 3",
        "\nSTEPS = 20": "\nSTEPS = 3",
        "IntSlider(20, min=5": "IntSlider(3, min=3",
        "settings = digits.get_config()": "settings = digits.get_config(); " + TINY,
        "scales = (1.0, 1.5, 2.0, 3.0, 5.0)": "scales = (1.5, 5.0)",
    }
    with pytest.MonkeyPatch.context() as patch:
        # One device, as most users have, and fast compilation.
        patch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")
        notebook = execute("sampling", changes, timeout=300)
    assert {path.name for path in workdir.iterdir()} >= {"samples.png", "metrics.jsonl"}
    return notebook


@pytest.fixture
def outputs(sampling):
    """{cell: its outputs}."""
    return {cell.id: cell.outputs for cell in code_cells(sampling)}


@pytest.mark.parametrize(
    ("cell", "kinds"), [("denoising", ["gif", "png"]), ("interpolation", ["png"]), ("guidance", ["png"])]
)
def test_the_notebook_runs_and_shows_images(outputs, cell, kinds):
    assert [
        kind for output in outputs[cell] for kind in ("gif", "png") if f"image/{kind}" in output.data
    ] == kinds
    assert all(
        len(output.data[f"image/{kind}"]) > 1000 for output, kind in zip(outputs[cell], kinds, strict=True)
    )


def test_the_sliders_draw_images(sampling, outputs):
    assert "application/vnd.jupyter.widget-view+json" in outputs["images"][0].data
    models = sampling.metadata.widgets["application/vnd.jupyter.widget-state+json"].state.values()
    (drawn,) = [model.state.outputs for model in models if model.model_name == "OutputModel"]
    assert [output.output_type for output in drawn] == ["display_data"]
    assert "image/png" in drawn[0].data
    assert {"FloatSliderModel", "IntSliderModel", "DropdownModel"} <= {model.model_name for model in models}


def test_the_notebook_shows_the_progress_of_training(outputs):
    text = "".join(output.text for output in outputs["model"])
    assert "step 3/3" in text
    assert "Warning" not in text
    assert outputs["install"] == []


@pytest.mark.slow
def test_the_notebook_of_the_kernel_runs_and_learns():
    notebook = execute(
        "gla_kernel", {"LENGTHS = (256, 512, 1024, 2048, 4096)": "LENGTHS = (64, 128)"}, timeout=600
    )
    outputs = {cell.id: cell.outputs for cell in code_cells(notebook)}
    assert float(outputs["recurrence"][0].text.split()[-1]) < 1e-4
    assert all("image/png" in outputs[cell][-1].data for cell in ("toy", "gradients", "directions", "speed"))


@pytest.mark.slow
def test_the_notebook_of_sampling_draws_from_weights_of_pytorch(tmp_path):
    model = dig_jax.create_model(
        "DiG-S/2",
        input_size=8,
        num_classes=10,
        in_channels=1,
        depth=4,
        hidden_size=64,
        num_heads=1,
        rngs=nnx.Rngs(0),
    )
    write_torch(tmp_path / "dig.pt", dig_jax.convert.to_torch_state_dict(model))
    changes = {
        'MODEL = ""': f"MODEL = {str(tmp_path / 'dig.pt')!r}",
        'root / "runs" / (': f"Path({str(tmp_path)!r}) / (",
        "IntSlider(20, min=5": "IntSlider(3, min=3",
        "\nSTEPS = 20": "\nSTEPS = 3",
        "scales = (1.0, 1.5, 2.0, 3.0, 5.0)": "scales = (1.5, 5.0)",
    }
    notebook = execute("sampling", changes, timeout=600)
    assert (tmp_path / "dig.pt.safetensors").exists()
    assert "image/gif" in next(
        cell.outputs[0].data for cell in code_cells(notebook) if cell.id == "denoising"
    )
