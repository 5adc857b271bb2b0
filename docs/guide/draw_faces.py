"""Draw 12,000 pixel-art faces of 16 × 16 pixels into one folder per class: python draw_faces.py FOLDER

They are DiceBear's style "Pixel Art", which is licensed under CC0 1.0, on colored backgrounds.
Requires: pip install dicebear-core==10.7.0 dicebear-styles==10.6.0 resvg-py==0.5.0
"""

import json
import sys
from importlib.resources import files
from pathlib import Path

import resvg_py
from dicebear import Avatar, Style

IMAGES_PER_CLASS = 2400
BACKGROUNDS = ["ffdfbf", "ffd5dc", "b6e3f4", "c0aede", "c1e8b5"]
SHORT_HAIR = [f"short{i:02}" for i in range(1, 25)]
LONG_HAIR = [f"long{i:02}" for i in range(1, 22)]
NOTHING = {f"{part}Probability": 0 for part in ("accessories", "beard", "glasses", "hat")}
CLASSES = {
    "beard": {"hairVariant": SHORT_HAIR, "beardProbability": 100},
    "glasses": {"glassesProbability": 100},
    "hat": {"hatProbability": 100},
    "long hair": {"hairVariant": LONG_HAIR},
    "short hair": {"hairVariant": SHORT_HAIR},
}


def draw(folder: Path) -> None:
    """Write IMAGES_PER_CLASS PNG files of each class."""
    style = Style(json.loads(files("dicebear_styles").joinpath("pixel-art.json").read_text("utf-8")))
    for name, options in CLASSES.items():
        (folder / name).mkdir(parents=True)
        for index in range(IMAGES_PER_CLASS):
            face = {"seed": f"{name} {index}", "backgroundColor": BACKGROUNDS} | NOTHING | options
            png = resvg_py.svg_to_bytes(svg_string=Avatar(style, face).to_string(), width=16, height=16)
            (folder / name / f"{index:04}.png").write_bytes(bytes(png))


if __name__ == "__main__":
    draw(Path(sys.argv[1]))
