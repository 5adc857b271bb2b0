"""The commands and examples of the README and the tutorial, run in order with fewer steps."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent
FEW = [
    "--config.training.steps=2",
    "--config.sampling.images_per_class=1",
    "--config.logging.heldout_every_steps=0",
]
FEW += ["--config.data.batch_size=8", "--config.evaluation.num_images=20", "--config.sampling.batch_size=20"]

# These need an extra, and have tests of their own.
EXTRA = ("--mode=demo", ".stablehlo", ".onnx")

pytestmark = pytest.mark.slow


def run_blocks(text: str, folder: Path, fewer: list[str]) -> int:
    """Run commands of main.py and Python examples of a page in a folder; return how many there were."""
    count = 0
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "MPLBACKEND": "agg"}
    script = ""
    for language, body in re.findall(r"^```(bash|python)\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        lines = [
            line.strip()
            for line in body.splitlines()
            if "python main.py" in line and not any(extra in line for extra in EXTRA)
        ]
        commands = [shlex.split(line.partition("python ")[2], comments=True) for line in lines]
        for _, config, *flags in commands:
            config = config.replace("--config=configs/", f"--config={ROOT}/configs/")
            own = {flag.partition("=")[0] for flag in flags}
            added = [flag for flag in fewer if flag.partition("=")[0] not in own]
            run(
                [str(ROOT / "main.py"), config, *flags, *(added if "configs/" in config else [])],
                folder,
                environment,
            )
        if language == "python":
            script += body
            run(["-c", script], folder, environment)
        count += len(commands) + (language == "python")
    return count


def run(arguments: list[str], folder: Path, environment: dict[str, str]) -> None:
    result = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, f"{arguments}: {result.stderr[-2000:]}"


def test_the_tutorial_runs_from_a_folder_of_pictures_to_an_exported_file(tmp_path):
    random = np.random.default_rng(0)
    for name in ("beard", "glasses", "hat", "long hair", "short hair"):
        (tmp_path / "faces" / name).mkdir(parents=True)
        for index in range(4):
            pixels = random.integers(0, 256, (16, 16, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "faces" / name / f"{index}.png")
    assert run_blocks((ROOT / "docs/guide/tutorial.md").read_text(), tmp_path, FEW) == 5
    written = {"faces.safetensors", "hats.png", "runs/faces/generated.npz", "runs/faces/report.html"}
    assert all((tmp_path / name).exists() for name in written)


def test_the_commands_of_the_readme_run_in_order(tmp_path):
    text = (ROOT / "README.md").read_text().split("## Your own images")[0]
    assert run_blocks(text, tmp_path, FEW) >= 6
    assert all(
        (tmp_path / name).exists() for name in ("runs/digits/scores.json", "digits.safetensors", "runs/wide")
    )
