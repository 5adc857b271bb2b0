"""Hostile and corrupt files give one line and a status; nothing is run or written, and memory is bounded.

As a script, this file reads the files that its tests have made: see `read_all`.
"""

import contextlib
import io
import json
import logging
import os
import resource
import shutil
import struct
import subprocess
import sys
import tempfile
import threading
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load, save
from test_data_images import encoded, noise, png_header
from tiny_autoencoder import write_autoencoder
from torch_files import pickled, tensor, text, tree, write

import dig_jax
from configs import smoke
from dig_jax import autoencoder, config
from dig_jax.cli.logging_setup import start_logging
from dig_jax.convert.command import main as convert
from dig_jax.data import batches, load_source
from dig_jax.encoding.encode import encode
from dig_jax.errors import UserError
from dig_jax.files.pytorch.writer import write_torch

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden" / "dig_plain.npz"
WEIGHTS = "diffusion_pytorch_model.safetensors"
MIB = 2**20
# Bytes per unit of ru_maxrss.
_UNIT = 1 if sys.platform == "darwin" else 1024

# Reader, file, status, and a part of its line, if there is one. Intact files come first: their memory is not
# growth of the others.
CASES = {
    "sound .pt": ("convert", "sound.pt", 0, None),
    "truncated .pt": ("convert", "truncated.pt", 1, "not a PyTorch file, or a truncated one"),
    "pickle with a call": ("convert", "call.pt", 1, "invalid w: got posix.system"),
    "zip bomb": ("convert", "bomb.pt", 1, "compressed member 'x/data.pkl'"),
    "storage of terabytes": ("convert", "storage.pt", 1, "expected 1,099,511,627,776 values of float32"),
    "NaN in a .pt": ("convert", "nan.pt", 1, "finite"),
    "integers in a .pt": ("convert", "integers.pt", 1, "unsupported dtype: "),
    "member twice": ("convert", "members.pt", 1, "duplicate name 'x/data.pkl'"),
    "name twice in a pickle": ("convert", "names.pt", 1, "duplicate name 'w'"),
    "sound safetensors": ("convert", "sound.safetensors", 0, None),
    "truncated safetensors": ("convert", "truncated.safetensors", 1, "invalid safetensors file: "),
    "header of an exabyte": (
        "convert",
        "header.safetensors",
        1,
        "header too large: got 1,152,921,504,606,846,976 bytes",
    ),
    "array of a terabyte": ("convert", "array.safetensors", 1, "invalid safetensors file: "),
    "NaN in safetensors": ("convert", "nan.safetensors", 1, "finite"),
    "integers in safetensors": ("convert", "integers.safetensors", 1, "unsupported dtype: "),
    "name twice in safetensors": ("convert", "names.safetensors", 1, "in the header"),
    "sound autoencoder": ("autoencoder", "vae_sound", 0, None),
    "truncated autoencoder": ("autoencoder", "vae_truncated", 1, "invalid safetensors file: "),
    "autoencoder's header of an exabyte": (
        "autoencoder",
        "vae_header",
        1,
        "header too large: got 1,152,921,504,606,846,976",
    ),
    "autoencoder's array of a terabyte": ("autoencoder", "vae_array", 1, "invalid safetensors file: "),
    "autoencoder with NaN": ("autoencoder", "vae_nan", 1, "finite"),
    "autoencoder of integers": ("autoencoder", "vae_integers", 1, "int64"),
    "autoencoder's name twice": ("autoencoder", "vae_names", 1, "in the header"),
    "sound model": ("sampler", "ours_sound.safetensors", 0, None),
    "truncated model": ("sampler", "ours_truncated.safetensors", 1, "invalid safetensors file: "),
    "model's header of an exabyte": ("sampler", "ours_header.safetensors", 1, "1,152,921,504,606,846,976"),
    "model's array of a terabyte": ("sampler", "ours_array.safetensors", 1, "invalid safetensors file: "),
    "model with NaN": ("sampler", "ours_nan.safetensors", 1, "finite"),
    "model of integers": ("sampler", "ours_integers.safetensors", 1, "int64"),
    "model's name twice": ("sampler", "ours_names.safetensors", 1, "in the header"),
    "sound pictures": ("pictures", "pictures_sound", 0, None),
    "PNG of 60,000 × 60,000 px": ("pictures", "pictures_png", 0, "3600000000 pixels"),
    "JPEG of 60,000 × 60,000 px": ("pictures", "pictures_jpeg", 0, "3600000000 pixels"),
    "directory that loops": ("pictures", "pictures_loop", 0, None),
    "link to itself": ("pictures", "pictures_link", 1, "no such directory"),
    "sound latents": ("latents", "latents_sound", 0, None),
    "flipped byte in a record": ("latents", "latents_flipped", 1, "cannot read image "),
    "truncated records": ("latents", "latents_truncated", 1, " bytes; expected "),
    "flipped byte in an index": ("latents", "latents_index", 1, "index.json is corrupt: "),
}


def damaged_safetensors(content):
    """Return damaged versions of a file by the kind of damage."""
    size = int.from_bytes(content[:8], "little")
    header, data = content[8 : 8 + size].decode(), content[8 + size :]
    entries, arrays = json.loads(header), load(content)
    metadata = entries.pop("__metadata__", None)
    first, second, *_ = entries
    last = max(entries, key=lambda name: entries[name]["data_offsets"])
    begin = entries[last]["data_offsets"][0]
    entries[last] |= {"shape": [2**38], "data_offsets": [begin, begin + 2**40]}
    return {
        "sound": content,
        "truncated": content[:-100],
        "header": struct.pack("<Q", 2**60) + content[8:],
        "array": with_header(json.dumps(entries), data),
        "nan": save(arrays | {last: np.full_like(arrays[last], np.nan)}, metadata),
        "integers": save(arrays | {last: arrays[last].astype(np.int64)}, metadata),
        "names": with_header(header.replace(f'"{second}":', f'"{first}":'), data),
    }


def with_header(header, data):
    return struct.pack("<Q", len(header.encode())) + header.encode() + data


def write_torch_files(folder, arrays):
    values, one = np.arange(6, dtype="<f4").tobytes(), pickled(tree(w=tensor()))
    marker = folder / "executed"
    call = b"cposix\nsystem\n" + text(f"touch {marker}") + b"\x85R"
    write_torch(folder / "sound.pt", arrays)
    content = (folder / "sound.pt").read_bytes()
    (folder / "truncated.pt").write_bytes(content[: len(content) // 2])
    write(folder / "call.pt", pickled(tree(w=call)))
    write(folder / "bomb.pt", one, compression=zipfile.ZIP_DEFLATED)
    with (
        zipfile.ZipFile(folder / "bomb.pt", "a", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("x/data/0", "w") as member,
    ):
        for _ in range(512):
            member.write(bytes(MIB))
    write(folder / "storage.pt", pickled(tree(w=tensor(numel=2**40))), s0=values)
    last = list(arrays)[-1]
    write_torch(folder / "nan.pt", arrays | {last: np.full_like(arrays[last], np.nan)})
    with zipfile.ZipFile(folder / "sound.pt") as sound, zipfile.ZipFile(folder / "integers.pt", "w") as made:
        for name in sound.namelist():
            made.writestr(name, sound.read(name).replace(b"\nFloatStorage\n", b"\nIntStorage\n"))
    write(folder / "names.pt", pickled(b"}(" + 2 * (text("w") + tensor()) + b"u"), s0=values)
    write(folder / "members.pt", one, s0=values)
    with warnings.catch_warnings(action="ignore"), zipfile.ZipFile(folder / "members.pt", "a") as archive:
        archive.writestr("x/data.pkl", one)


def write_autoencoders(folder):
    content = (write_autoencoder(folder / "vae") / WEIGHTS).read_bytes()
    for damage, changed in damaged_safetensors(content).items():
        shutil.copytree(folder / "vae", folder / f"vae_{damage}")
        (folder / f"vae_{damage}" / WEIGHTS).write_bytes(changed)


def jpeg_header(width, height):
    """Return a JPEG with this size in its header and few pixels."""
    small = encoded(Image.fromarray(noise(8, 8)), "JPEG")
    size = small.index(b"\xff\xc0") + 5
    return small[:size] + struct.pack(">HH", height, width) + small[size + 4 :]


def write_pictures(folder):
    huge = {
        "sound": None,
        "png": png_header(60_000, 60_000),
        "jpeg": jpeg_header(60_000, 60_000),
        "large": png_header(12_000, 12_000),  # beyond our bound, but not beyond Pillow's
        "loop": None,
    }
    for name, data in huge.items():
        cats = folder / f"pictures_{name}" / "cat"
        cats.mkdir(parents=True)
        for number in range(3):
            Image.fromarray(noise(20, 24, seed=number)).save(cats / f"{number}.png")
        if data:
            (cats / "huge").with_suffix(".jpg" if name == "jpeg" else ".png").write_bytes(data)
    for name, target in {"up": "..", "here": ".", "itself": "itself"}.items():
        (folder / "pictures_loop" / "cat" / name).symlink_to(target)
    (folder / "pictures_link").symlink_to("pictures_link")


def write_latents(folder):
    """Damage copies of a latent cache."""
    for damage in ("flipped", "truncated", "index"):
        shutil.copytree(folder / "latents_sound", folder / f"latents_{damage}")
    records = "train/00000.array_record"
    for damage, file, change in [
        ("flipped", records, flipped),
        ("truncated", records, lambda content: content[: len(content) // 2]),
        ("index", "index.json", flipped),
    ]:
        path = folder / f"latents_{damage}" / file
        path.write_bytes(change(path.read_bytes()))


def flipped(content):
    """Flip a bit in the middle."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def start(*arguments):
    """Run a Python process; return its status, its output's lines and its peak memory in bytes."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    command = [sys.executable, *map(str, arguments)]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
        limit = threading.Timer(300, process.kill)
        limit.start()
        _, status, usage = os.wait4(process.pid, 0)
        limit.cancel()
        process.returncode = os.waitstatus_to_exitcode(status)
        log.seek(0)
        return process.returncode, log.read().splitlines(), usage.ru_maxrss * _UNIT


def encode_flags(folder, images, autoencoder, target):
    return [
        f"--config.autoencoder.path={folder / autoencoder}",
        "--config.encode.name=image_folder",
        f"--config.encode.options={{'path': '{folder / images}', 'image_size': 16}}",
        "--config.data.name=latents",
        f"--config.data.options={{'path': '{folder / target}'}}",
    ]


def encode_large(folder):
    """Encode images of which one is too large; return the lines of the log."""
    c = smoke.get_config()
    c.autoencoder.path = str(folder / "vae")
    c.encode.name = "image_folder"
    c.encode.options = {"path": str(folder / "pictures_large"), "image_size": 16}
    c.data.name, c.data.options = "latents", {"path": str(folder / "latents_sound")}
    with contextlib.redirect_stderr(io.StringIO()) as log:
        start_logging()
        encode(config.from_dict(c.to_dict()))
    logging.getLogger("dig_jax").setLevel(logging.NOTSET)
    return log.getvalue().splitlines()


def read_all(folder):
    """Read the files of `CASES` one after the other; return the outcomes as JSON.

    An outcome has the status, the lines of the log, the growth of the peak memory in bytes, and the
    names of the files written.
    """
    outcomes = {"encode": encode_large(folder)}
    write_latents(folder)
    target = folder / "written" / "x.safetensors"
    read = {
        "convert": lambda path: convert([str(path), str(target)]),
        "autoencoder": autoencoder.load,
        "sampler": dig_jax.load,
        "pictures": all_pictures,
        "latents": a_batch,
    }
    for name, (reader, file, *_) in CASES.items():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with contextlib.redirect_stderr(io.StringIO()) as log:
            logging.basicConfig(format="%(message)s", level=logging.WARNING, force=True)
            try:
                result = read[reader](folder / file)
            except UserError as error:  # as dig_jax.cli.command_line shows it
                sys.stderr.write(f"error: {error}\n")
                result = 1
        outcomes[name] = {
            "status": result if isinstance(result, int) else 0,
            "lines": log.getvalue().splitlines(),
            "growth": _UNIT * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before),
            "written": [path.name for path in target.parent.iterdir()],
        }
        if name == "sound .pt":  # the target is a file of ours
            for damage, content in damaged_safetensors(target.read_bytes()).items():
                (folder / f"ours_{damage}.safetensors").write_bytes(content)
        target.unlink(missing_ok=True)
    return json.dumps(outcomes)


def all_pictures(path):
    source = load_source("image_folder", "train", path=str(path), image_size=8, heldout_fraction=0)
    assert len(source) == len([file for file in path.rglob("*.*") if not file.is_symlink()])
    assert len({source[index]["image"].tobytes() for index in range(len(source))}) == 3


def a_batch(path):
    """Read all examples in one batch, with the threads of training."""
    source = load_source("latents", "train", path=str(path))
    with contextlib.closing(batches(source, batch_size=len(source), seed=0)) as iterator:
        next(iterator)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    with np.load(GOLDEN) as golden:
        arrays = {
            name.removeprefix("param/"): golden[name].astype(np.float32)
            for name in golden
            if name.startswith("param/")
        }
    write_torch_files(folder, arrays)
    for damage, content in damaged_safetensors(save(arrays)).items():
        (folder / f"{damage}.safetensors").write_bytes(content)
    write_autoencoders(folder)
    write_pictures(folder)
    (folder / "written").mkdir()
    return folder


@pytest.fixture(scope="module")
def finished(folder):
    """(outcomes of `read_all`, peak memory of its process)."""
    status, lines, memory = start(__file__, folder)
    assert status == 0, "\n".join(lines)
    return json.loads(lines[-1]), memory


@pytest.mark.parametrize("case", CASES)
def test_a_hostile_or_corrupt_file_gives_one_line_and_nothing_else(finished, folder, case):
    reader, _, status, message = CASES[case]
    outcome = finished[0][case]
    assert outcome["status"] == status, outcome
    assert not (folder / "executed").exists()
    if status or message:
        assert outcome["growth"] < 256 * MIB
        (line,) = outcome["lines"]
        assert message in line
        assert len(line) < 1000
        assert line.startswith("error: ") == (status != 0)
    if reader != "convert" or status:
        assert not outcome["written"]


def test_a_huge_image_is_skipped_with_one_line(finished):
    lines = finished[0]["encode"]
    (line,) = [line for line in lines if "huge.png" in line or "Warning" in line or "Traceback" in line]
    assert "huge.png: too many pixels: got 12,000 × 12,000; expected at most" in line


def test_the_commands_report_a_hostile_file_in_one_line(folder, finished):
    _, usual = finished
    flags = encode_flags(folder, "pictures_sound", "vae_array", "latents_none")
    commands = {
        2: start("main.py", "--config=configs/smoke.py", "--mode=encode", *flags),
        1: start("-m", "dig_jax.convert", folder / "call.pt", folder / "written" / "x.safetensors"),
    }
    for expected, (status, lines, memory) in commands.items():
        assert status == expected
        assert len(lines) == 1
        assert lines[0].startswith("error: ")
        assert memory < usual + 256 * MIB
    assert not (folder / "latents_none").exists()
    assert not (folder / "executed").exists()
    assert not list((folder / "written").iterdir())


if __name__ == "__main__":
    sys.stdout.write(read_all(Path(sys.argv[1])))
