from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

PATH = Path(__file__).parent.parent / "notebooks" / "sampling.ipynb"
CODE = ("install", "model", "images", "denoising", "guidance")
# A model that compiles fast; the held-out loss and a grid of 100 images would take long, too.
TINY = (
    "settings.model.name, settings.model.depth, settings.model.hidden_size = 'DiT-S/2', 1, 64; "
    "settings.model.internal_head, settings.sampling.internal_guidance_scale = 0, 1.0; "
    "settings.logging.heldout_every_steps, settings.sampling.images_per_class = 0, 1"
)


def read():
    return nbformat.read(PATH, as_version=4)


def test_the_notebook_is_stored_without_outputs():
    notebook = read()
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert tuple(cell.id for cell in code) == CODE
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code)


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """{cell: its outputs} of a run with a tiny model, a few steps and another workdir."""
    workdir = tmp_path_factory.mktemp("notebook")
    changes = {
        'root / "runs" / "notebook"': repr(str(workdir)),
        "TRAINING_STEPS = 1500": "TRAINING_STEPS = 3",
        "STEPS = 20": "STEPS = 3",
        "settings = digits.get_config()": "settings = digits.get_config(); " + TINY,
        "scales = (1.0, 1.5, 2.0, 3.0, 5.0)": "scales = (1.5, 5.0)",
    }
    notebook = read()
    for old, new in changes.items():
        (cell,) = [cell for cell in notebook.cells if old in cell.source]
        cell.source = cell.source.replace(old, new)
    with pytest.MonkeyPatch.context() as patch:
        # One device, as most users have, and fast compilation.
        patch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")
        client = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": PATH.parent}})
        client.execute()
    assert {path.name for path in workdir.iterdir()} >= {"samples.png", "denoising.png", "metrics.jsonl"}
    return {cell.id: cell.outputs for cell in notebook.cells if cell.cell_type == "code"}


@pytest.mark.parametrize("cell", ["images", "denoising", "guidance"])
def test_the_notebook_runs_and_shows_images(outputs, cell):
    (output,) = outputs[cell]
    assert len(output.data["image/png"]) > 1000


def test_the_notebook_shows_the_progress_of_training(outputs):
    text = "".join(output.text for output in outputs["model"])
    assert "step 3/3" in text
    assert "Warning" not in text
    assert outputs["install"] == []
