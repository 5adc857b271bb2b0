import errno
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dig_jax.reporting.grids import (
    GridLayout,
    draw_grid,
    save_denoising,
    save_grid,
    save_pair_grid,
    save_small_grid,
)
from dig_jax.reporting.loss_curve import save_loss_curve


def random_images(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def enlarged(images, scale):
    return np.broadcast_to(images, (*images.shape[:-1], 3)).repeat(scale, axis=-3).repeat(scale, axis=-2)


def find(picture, image):
    """(x, y) of the one place where the picture holds exactly this image."""
    height, width = image.shape[:2]
    windows = np.lib.stride_tricks.sliding_window_view(picture, (height, width, 3))[:, :, 0]
    candidates = np.argwhere((windows[:, :, 0, 0] == image[0, 0]).all(-1))
    places = [(int(x), int(y)) for y, x in candidates if (windows[y, x] == image).all()]
    assert len(places) == 1
    return places[0]


@given(st.integers(1, 7), st.integers(1, 4), st.sampled_from([1, 3]), st.booleans(), st.booleans())
@settings(max_examples=25)
def test_every_image_is_in_its_row_and_column_and_uncovered(count, columns, channels, labels, titles):
    """Exact pixels: neither a label nor another image covers any of them."""
    images = random_images(count, 3, 5, channels)
    rows = -(-count // columns)
    picture = draw_grid(
        images,
        columns=columns,
        row_labels=["a label, gÅ"] * rows if labels else (),
        column_labels=["quite a wide label"] * columns if labels else (),
        titles=["a title that is wider than its image"] * count if titles else (),
        caption="A caption of many words that needs several lines." if titles else "",
        scale=4,
    )
    places = [find(np.asarray(picture), image) for image in enlarged(images, 4)]
    for index, (x, y) in enumerate(places):
        row, column = divmod(index, columns)
        assert x == places[column][0] if row else y == places[0][1]
        if column:
            assert x > places[index - 1][0] + 5 * 4
            assert y == places[index - 1][1]
        if row:
            assert y > places[index - columns][1] + 3 * 4


def test_texts_are_drawn_outside_of_the_images():
    images = random_images(6, 8, 8, 1)
    texts = {
        "row_labels": ["0", "1"],
        "column_labels": ["a", "b", "c"],
        "titles": list("uvwxyz"),
        "caption": "d",
    }
    blank = {name: [" "] * len(text) if name != "caption" else " " for name, text in texts.items()}
    places = [
        find(np.asarray(draw_grid(images, columns=3, **texts)), image) for image in enlarged(images, 10)
    ]
    for name, text in texts.items():
        with_text = np.asarray(draw_grid(images, columns=3, **{**blank, name: text}))
        ink = np.argwhere((with_text < 100).all(-1))
        outside = [
            not any(x <= column < x + 80 and y <= row < y + 80 for x, y in places) for row, column in ink
        ]
        assert sum(outside) > 5, name


def test_the_layout_has_room_for_all_cells():
    layout = GridLayout(count=5, columns=3, height=10, width=20, left=30, top=40, title=7)
    assert layout.rows == 2
    assert layout.corner(0) == (30, 47)
    assert layout.corner(4) == (30 + 20 + layout.gutter, 47 + 10 + 7 + layout.gutter)
    x, y = layout.corner(5)
    assert layout.size > (x + 20, y + 10)


@pytest.mark.parametrize("size, scale", [((8, 8), 10), ((32, 16), 2), ((64, 64), 1), ((256, 256), 1)])
def test_small_images_are_enlarged_by_an_integer_factor(size, scale):
    images = random_images(1, *size, 3)
    find(np.asarray(draw_grid(images, columns=1)), enlarged(images, scale)[0])


def test_each_neighbor_is_to_the_right_of_its_image(tmp_path):
    images, neighbors = random_images(4, 8, 8, 1), random_images(4, 8, 8, 1, seed=1)
    save_pair_grid(tmp_path / "pairs.png", images, neighbors, columns=2, row_labels=["0", "1"])
    picture = np.asarray(Image.open(tmp_path / "pairs.png"))
    for image, neighbor in zip(enlarged(images, 10), enlarged(neighbors, 10), strict=True):
        x, y = find(picture, image)
        assert find(picture, neighbor) == (x + 80 + 1, y)


def test_denoising_shows_the_first_step_to_the_last(tmp_path):
    trajectory = random_images(31, 2, 4, 4, 3)
    save_denoising(tmp_path / "strip.png", trajectory, row_labels=["3", "7"], frames=4, caption="steps")
    picture = np.asarray(Image.open(tmp_path / "strip.png"))
    for number in range(2):
        shown = [find(picture, enlarged(trajectory[step, number], 20)) for step in (0, 10, 20, 30)]
        assert shown == sorted(shown)
        assert len({y for _, y in shown}) == 1
    save_denoising(tmp_path / "short.png", trajectory[:3], frames=10)
    find(np.asarray(Image.open(tmp_path / "short.png")), enlarged(trajectory[2, 1], 20))


def test_a_failed_write_keeps_the_old_file_and_leaves_no_other(tmp_path, monkeypatch):
    path = tmp_path / "grid.png"
    save_grid(path, random_images(1, 4, 4, 1), columns=1)
    old = path.read_bytes()

    def fail(self, file, **options):
        file.write(b"half a picture")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="No space left"):
        save_grid(path, random_images(2, 4, 4, 1), columns=1)
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]


def test_an_unwritable_path_is_an_oserror(tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text('{"step": 1, "loss": 1.0}\n')
    with pytest.raises(OSError, match="missing"):
        save_grid(tmp_path / "missing" / "grid.png", random_images(1, 4, 4, 1), columns=1)
    with pytest.raises(OSError, match="metrics.jsonl"):
        save_loss_curve(metrics / "loss.png", metrics)


@pytest.mark.parametrize(
    "shape, options, message",
    [
        ((0, 4, 4, 1), {}, "expected one or more with 1 or 3 channels"),
        ((2, 4, 4, 4), {}, "invalid images: got shape"),
        ((3, 4, 4, 1), {"row_labels": ["0"]}, "invalid row_labels: got 1; expected 2 for this grid"),
        ((3, 4, 4, 1), {"column_labels": ["0"] * 3}, "invalid column_labels: got 3; expected 2"),
        ((3, 4, 4, 1), {"columns": 0}, "invalid columns: got 0; expected at least 1"),
        ((3, 4, 4, 1), {"titles": ["0"] * 4}, "invalid titles: got 4; expected 3"),
    ],
)
def test_a_grid_names_invalid_arguments(shape, options, message):
    with pytest.raises(ValueError, match=message):
        draw_grid(np.zeros(shape, np.uint8), **{"columns": 2, **options})


def test_pairs_must_have_one_shape():
    with pytest.raises(ValueError, match="shapes of images and neighbors differ"):
        save_pair_grid("never.png", random_images(1, 4, 4, 1), random_images(2, 4, 4, 1), columns=1)


def curve(tmp_path, lines):
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    save_loss_curve(tmp_path / "loss.png", tmp_path / "metrics.jsonl")
    return np.asarray(Image.open(tmp_path / "loss.png").convert("RGB"))


def test_the_loss_curve_shows_each_loss_and_skips_invalid_lines(tmp_path):
    names = ["loss", "heldout_loss", "loss_q1", "loss_q2", "loss_q3", "loss_q4"]
    lines = [json.dumps({"step": step, **dict.fromkeys(names[:1], 2.0 / step)}) for step in range(1, 100)]
    alone = curve(tmp_path, lines)
    broken = [
        '{"step": 50, "lo{"step": 51}',
        "[]",
        '{"note": 1}',
        '{"step": 60, "loss": NaN, "loss_q1": null}',
    ]
    np.testing.assert_array_equal(curve(tmp_path, [*lines, '{"step": 100, "lo']), alone)
    curve(tmp_path, lines[:30] + broken + lines[30:])
    pictures = [alone]
    for name in names[1:]:
        pictures.append(curve(tmp_path, [*lines, json.dumps({"step": 99, name: 0.1})]))
    assert len({picture.tobytes() for picture in pictures}) == len(names)
    assert [file.name for file in sorted(tmp_path.iterdir())] == ["loss.png", "metrics.jsonl"]


def test_the_later_line_of_a_step_counts(tmp_path):
    lines = [json.dumps({"step": step, "loss": loss}) for step, loss in [(1, 3.0), (2, 2.0), (3, 1.0)]]
    stray = json.dumps({"step": 2, "loss": 1e4})
    np.testing.assert_array_equal(curve(tmp_path, [stray, *lines]), curve(tmp_path, lines))


@pytest.mark.parametrize(
    "lines", [[], ['{"step": 1, "images_per_second": 3.0}'], ['{"step": 1, "loss": NaN}']]
)
def test_a_metrics_file_without_losses_is_rejected(tmp_path, lines):
    with pytest.raises(ValueError, match="no losses in"):
        curve(tmp_path, lines)


def test_the_loss_curve_leaves_matplotlib_settings_alone(tmp_path):
    import matplotlib

    before = dict(matplotlib.rcParams)
    curve(tmp_path, ['{"step": 1, "loss": 1.0}'])
    assert dict(matplotlib.rcParams) == before


def test_imports_are_light():
    """`main.py --help` must not wait for scikit-learn and matplotlib."""
    modules = "dig_jax.data.source, dig_jax.evaluation, dig_jax.reporting.grids"
    check = f"import sys, {modules}; print({{'sklearn', 'matplotlib'}} & set(sys.modules))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", check]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


@pytest.mark.parametrize(
    ("shape", "cell"),
    [((96, 64, 3), (48, 32)), ((256, 256, 1), (48, 48)), ((8, 8, 1), (48, 48)), ((20, 20, 3), (40, 40))],
)
def test_images_in_a_small_grid_are_at_most_48_pixels_per_side(tmp_path, shape, cell):
    images = np.full((4, *shape), 200, np.uint8)
    save_small_grid(tmp_path / "small.png", images, columns=2)
    layout = GridLayout(count=4, columns=2, height=cell[0], width=cell[1])
    with Image.open(tmp_path / "small.png") as picture:
        assert picture.size == layout.size
        for index in range(4):
            x, y = layout.corner(index)
            inside = np.asarray(picture.crop((x, y, x + cell[1], y + cell[0])))
            assert (inside == 200).all()
