"""Bad flags, configs, options and files: each ends with one clear line.

One process imports everything and forks a child for each command line, so that a case takes the time of its
own work. Run as a program, this file is that process.
"""

import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
import traceback
import warnings
from pathlib import Path

import pytest
from PIL import Image
from test_data_images import noise

ROOT = Path(__file__).parents[1]
SECONDS = 120
SMOKE = "configs/smoke.py"
DEEP = "[" * 100_000


def options(**values):
    return f"--config.data.options={values!r}"


def folder(path="pictures", **values):
    return ["--config.data.name=image_folder", options(path=path, **{"image_size": 4, **values})]


def source(name, /, **values):
    return [f"--config.data.name={name}", options(**values)]


# Arguments after --config=configs/smoke.py, unless they begin with --config=, and a part of the line.
CASES = {
    # Flags
    "unknown flag": (["--stpes=3"], "unknown flag --stpes"),
    "unknown mode": (["--mode=trian"], "invalid --mode='trian'; expected train, "),
    "flag of another mode": (["--labels=3"], "--labels does not apply to --mode=train"),
    "argument without a flag": (["sample"], "unexpected argument 'sample'"),
    "no number": (["--mode=sample", "--seeds=a"], "invalid --seeds='a'"),
    "reversed range": (["--profile_steps=9-3"], "invalid --profile_steps='9-3'"),
    "too many seeds": (["--mode=sample", "--seeds=0-99999999"], "expected at most a million"),
    "no processes": (["--num_processes=0"], "num_processes"),
    "export without a file": (["--mode=export"], "missing --output"),
    "unknown chip": (["--mode=plan", "--topology=v99:2x2"], "v99"),
    "a negative price": (["--mode=plan", "--config.plan.price=-1"], "invalid config.plan.price=-1"),
    "chips of no shape": (["--mode=plan", "--topology=v5e:0x2"], "v5e:0x2"),
    "workdir that is a file": (["--workdir=file.txt"], "file.txt"),
    "workdir below a file": (["--workdir=file.txt/run"], "file.txt"),
    "sampling without a checkpoint": (["--mode=sample"], "no checkpoint in "),
    "export without a checkpoint": (["--mode=export", "--output=x.safetensors"], "no checkpoint in "),
    "evaluation without a checkpoint": (["--mode=evaluate"], "no checkpoint in "),
    "a sweep of images": (["--mode=evaluate", "--images=x", "--sweep=steps=1"], "--sweep does not apply to"),
    "images of training": (["--images=x"], "--images does not apply to --mode=train"),
    "encoding without latents": (["--mode=encode"], "invalid config.data.name='fake'"),
    # Config files
    "no config": (["--config="], "missing --config"),
    "no such config": (["--config=configs/smok.py"], "no such config file: 'configs/smok.py'; did you mean"),
    "directory as config": (["--config=pictures"], "no such config file: 'pictures'"),
    "argument that is not taken": (["--config=configs/smoke.py:5"], "takes no argument"),
    "config that raises": (["--config=raises.py"], "ZeroDivisionError"),
    "config without end": (["--config=recursion.py"], "RecursionError"),
    "config with a syntax error": (["--config=syntax.py"], "SyntaxError"),
    "config that is not text": (["--config=binary.py"], "binary.py"),
    "config without get_config": (["--config=empty.py"], "empty.py: KeyError: 'get_config'"),
    "config that exits": (["--config=exits.py"], "exits.py"),
    "config of nothing": (["--config=nothing.py"], "nothing.py"),
    "config of a dict": (["--config=dict.py"], "dict.py"),
    "config.json that is not JSON": (["--config=binary.json"], "cannot read "),
    "config.json of a list": (["--config=list.json"], "cannot read "),
    "config.json that is deep": (["--config=deep.json"], "cannot read "),
    "config.json with an unknown field": (["--config=unknown.json"], "unknown field config.traning"),
    # Fields
    "unknown field": (["--config.traning.steps=3"], "unknown field config.traning; did you mean 'training'"),
    "group as a number": (["--config.model=3"], "config.model"),
    "no images in a batch": (["--config.data.batch_size=0"], "config.data.batch_size=0"),
    "half an image in a batch": (["--config.data.batch_size=1.5"], "config.data.batch_size=1.5"),
    "odd batch": (["--config.data.batch_size=7", "--config.training.accumulation=2"], "expected a multiple"),
    "batch of 2^40": ([f"--config.data.batch_size={2**40}"], "config.data.batch_size"),
    "negative steps": (["--config.training.steps=-1"], "config.training.steps=-1"),
    "learning rate nan": (["--config.optimizer.learning_rate=nan"], "config.optimizer.learning_rate=nan"),
    "learning rate inf": (["--config.optimizer.learning_rate=inf"], "config.optimizer.learning_rate=inf"),
    "decay of 2": (["--config.optimizer.b2=2."], "config.optimizer.b2=2.0"),
    "averages that are equal": (["--config.training.ema_decays=(0.9,0.9)"], "config.training.ema_decays"),
    "average of text": (["--config.training.ema_decays=('a',)"], "ema_decays"),
    "unknown schedule": (["--config.optimizer.schedule=cosin"], "did you mean 'cosine'"),
    "unknown model": (["--config.model.name=DiG-M/2"], "unknown model 'DiG-M/2'"),
    "patch of 0": (["--config.model.name=DiG-S/0"], "unknown model 'DiG-S/0'"),
    "patch that does not divide": (["--config.model.patch_size=3"], "expected a multiple of patch_size"),
    "heads that do not divide": (["--config.model.num_heads=5"], "num_heads=5"),
    "depth of 10^23": (["--config.model.depth=100000000000000000000000"], "depth"),
    "three directions": (["--config.model.directions=3"], "directions"),
    "unknown dtype": (["--config.model.dtype=float8"], "config.model.dtype='float8'"),
    "unknown rematerialization": (["--config.model.remat=some"], "remat"),
    "unknown noise schedule": (["--config.diffusion.schedule=cosin"], "config.diffusion"),
    "one noise level": (["--config.diffusion.num_steps=1"], "config.diffusion"),
    "unknown sampler": (["--config.sampling.sampler=dmd"], "config.sampling"),
    "more sampling steps than levels": (["--config.sampling.steps=2000"], "config.sampling"),
    "unknown average": (["--config.sampling.ema=0.5"], "config.sampling.ema='0.5'"),
    "too many guided channels": (["--config.sampling.guidance_channels=9"], "guidance_channels=9"),
    "seed of 2^40": ([f"--config.seed={2**40}"], "config.seed"),
    "more devices than there are": (["--config.mesh.data=3"], "config.mesh"),
    "mesh of 0": (["--config.mesh.fsdp=0"], "config.mesh"),
    "two remaining axes": (["--config.mesh.fsdp=-1"], "at most one -1"),
    "parameters that are not there": (["--config.init_from=nowhere"], "nowhere"),
    "parameters in a text file": (["--config.init_from=file.txt"], "file.txt"),
    "parameters in garbage": (["--config.init_from=garbage.safetensors"], "garbage.safetensors"),
    # Data
    "unknown source": (["--config.data.name=digit"], "unknown data source 'digit'"),
    "options that are a number": (["--config.data.options=5"], "config.data.options"),
    "option of another source": (source("digits", size=8), "unknown option 'size'"),
    "size of text": (source("fake", image_size="8"), "invalid config.data.options.image_size='8'"),
    "size of a fraction": (source("fake", image_size=8.5), "invalid config.data.options.image_size=8.5"),
    "size of nothing": (source("fake", image_size=None), "invalid config.data.options.image_size=None"),
    "three sizes": (source("fake", image_size=(8, 8, 8)), "image_size=(8, 8, 8)"),
    "size of a list of lists": (source("fake", image_size=[[8], 8]), "config.data.options.image_size="),
    "huge images": (source("fake", image_size=10**9), "expected at most 89,478,485 pixels"),
    "too many classes": (source("fake", num_classes=10**23), "config.data.options.num_classes=1"),
    "option named split": (source("fake", split="train"), "unknown option 'split'"),
    "option named name": (source("fake", name="x"), "unknown option 'name'"),
    "option named by a number": (source("fake", **{"1": 2}), "unknown option '1'"),
    "option with a dot": (source("fake", **{"a.b": 2}), "does not accept dots in field names"),
    "option with underscores": (source("fake", __class__=2), "__class__"),
    "options 500 deep": (
        ["--config.data.options={'image_size': " + "[" * 90 + "]" * 90 + "}"],
        "image_size=",
    ),
    "folder of a number": (folder(5), "invalid config.data.options.path=5"),
    "no folder": (folder(""), "missing path of the image_folder source"),
    "folder that is not there": (folder("nowhere"), "no such directory: "),
    "folder with a null": (folder("a\0b"), "invalid config.data.options.path='a\\x00b'"),
    "folder with control characters": (folder("\x1b]0;title\x07\nerror: all is well"), "no such directory: "),
    "folder in a bucket": (folder("gs://bucket/images"), "mount the bucket"),
    "folder that is a file": (folder("file.txt"), "no such directory: "),
    "folder without images": (folder("configs"), "no images in "),
    "folder of photos in HEIC": (folder("photos"), "found 2 .heic"),
    "folder of splits": (folder("splits"), "directories named like splits: test, train"),
    "folder with one image": (folder("one"), "too few images"),
    "held-out classes that are new": (folder(heldout_path="one"), "unknown class 'cow'"),
    "fraction of text": (folder(heldout_fraction="0.1"), "heldout_fraction='0.1'"),
    "fraction of 1": (folder(heldout_fraction=1.0), "invalid config.data.options.heldout_fraction=1.0"),
    "unknown crop": (folder(crop="admm"), "invalid config.data.options.crop='admm'"),
    "crop of a number": (folder(crop=5), "invalid config.data.options.crop=5"),
    "faces that are not square": (folder(crop="celeba", image_size=(4, 8)), "expected one number with crop"),
    "two channels": (folder(channels=2), "invalid config.data.options.channels=2"),
    "workdir in the images": ([*folder(), "--workdir=pictures/run"], "invalid --workdir="),
    "no dataset of TFDS": (source("tfds", dataset=""), "missing dataset of the tfds source"),
    "dataset of TFDS that is a list": (source("tfds", dataset=["a"]), "config.data.options.dataset=['a']"),
    "no dataset of the Hub": (source("hub", dataset="nowhere"), "invalid dataset 'nowhere'"),
    "dataset in a bucket": (source("hub", dataset="gs://bucket/shards"), "mount the bucket"),
    "shards that are images": (source("hub", dataset="pictures"), "config.data.name=image_folder"),
    "shards that are garbage": (source("hub", dataset="garbage_shards"), "datasets cannot open "),
    "label of 10^12": (source("hub", dataset="labels"), "got label 1000000000000 in row 1"),
    "no latents": (source("latents", path="pictures"), "no latents in "),
    "latents of nothing": (source("latents", path=""), "missing path of the latents source"),
    "deep latents": (source("latents", path="deep_latents"), "index.json is corrupt"),
    "latents of a list": (source("latents", path="list_latents"), "index.json is corrupt"),
    "encoding without an autoencoder": (
        ["--mode=encode", *source("latents", path="x")],
        "missing config.autoencoder.path",
    ),
    "autoencoder that is not there": (["--config.autoencoder.path=no/where/at/all"], "invalid autoencoder"),
    "autoencoder that is deep": (["--config.autoencoder.path=deep_autoencoder"], "deep_autoencoder"),
}
# They load the autoencoder, unlike synthetic images.
for _name in ("autoencoder that is not there", "autoencoder that is deep"):
    CASES[_name] = ([*CASES[_name][0], *folder()], CASES[_name][1])


def write_files(root):
    (root / "configs").symlink_to(ROOT / "configs")
    for name, text in {
        "file.txt": "hello",
        "garbage.safetensors": "hello" * 100,
        "raises.py": "def get_config(): return 1 / 0",
        "recursion.py": "def get_config(): return get_config()",
        "syntax.py": "def get_config(:",
        "empty.py": "",
        "exits.py": "import sys\ndef get_config(): sys.exit(0)",
        "nothing.py": "def get_config(): pass",
        "dict.py": "def get_config(): return {'seed': 3}",
        "list.json": "[1]",
        "deep.json": DEEP,
        "unknown.json": json.dumps({"config": {"traning": {}}}),
        "deep_latents/index.json": DEEP,
        "list_latents/index.json": "[]",
        "deep_autoencoder/config.json": DEEP,
        "photos/cat/1.heic": "",
        "photos/cat/2.HEIC": "",
        "garbage_shards/train.parquet": "hello",
    }.items():
        path = root / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text(text)
    for name in ("binary.py", "binary.json"):
        (root / name).write_bytes(b"\xff\xfe\x00\x80")
    for name in ("pictures/ant", "pictures/bee", "one/cow", "splits/train", "splits/test"):
        (root / name).mkdir(parents=True)
        for number in range(1 if name.startswith("one") else 3):
            Image.fromarray(noise(8, 8, seed=number)).save(root / name / f"{number}.png")
    import pyarrow
    from pyarrow import parquet

    (root / "labels").mkdir()
    columns = {"image": [b"1", b"2"], "label": [0, 10**12]}
    parquet.write_table(pyarrow.table(columns), root / "labels" / "train.parquet")


def arguments_of(name):
    arguments = CASES[name][0]
    if not any(argument.startswith("--config=") for argument in arguments):
        arguments = [f"--config={SMOKE}", *arguments]
    if not any(argument.startswith("--workdir") for argument in arguments):
        arguments = [*arguments, "--workdir=run"]
    return ["main.py", *arguments]


def run_main(arguments, output):
    """Run main.py in this process, with a file as its streams; return the exit status."""
    for stream in (sys.stdout, sys.stderr):
        os.dup2(output.fileno(), stream.fileno())
    sys.argv = arguments
    try:
        runpy.run_path(str(ROOT / "main.py"), run_name="__main__")
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return status


def child(arguments, path):
    """Run main.py in a forked child; return its status, its seconds and the lines that it printed."""
    started = time.monotonic()
    with open(path, "w+b") as output:
        process = os.fork()
        if not process:
            signal.alarm(SECONDS)
            os._exit(run_main(arguments, output))
        status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        output.seek(0)
        return status, time.monotonic() - started, output.read().decode(errors="replace").split("\n")


def run_all(root):
    """Return the outcomes of all cases."""
    import dig_jax.cli.commands
    import dig_jax.data.hub
    import dig_jax.data.tfds
    import dig_jax.planning.plan
    import dig_jax.sampling.sample
    import dig_jax.training.train  # noqa: F401

    os.environ |= {"XDG_CACHE_HOME": str(root / "cache"), "HF_HUB_OFFLINE": "1"}
    warnings.filterwarnings("ignore", r"os\.fork\(\) was called", RuntimeWarning)
    outcomes = {}
    for name in CASES:
        outcomes[name] = (
            *child(arguments_of(name), root / "output"),
            (root / "run" / "checkpoints").exists(),
        )
        shutil.rmtree(root / "run", ignore_errors=True)
    return outcomes


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    root = tmp_path_factory.mktemp("bad")
    write_files(root)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}:{ROOT / 'tests'}"}
    command = [sys.executable, str(Path(__file__)), str(root / "outcomes.json")]
    subprocess.run(command, cwd=root, env=environment, check=True, timeout=900)
    return json.loads((root / "outcomes.json").read_text())


@pytest.mark.parametrize("name", CASES)
def test_a_bad_input_ends_with_one_clear_line_before_anything_is_trained(outcomes, name):
    status, _, lines, wrote = outcomes[name]
    assert lines[-1] == ""
    assert len(lines) == 2, "\n".join(lines)
    assert status in (1, 2)
    assert lines[0].startswith("error: ")
    assert CASES[name][1] in lines[0]
    assert lines[0].isprintable() and len(lines[0]) < 700
    assert not re.search(r"Traceback|object at 0x", lines[0])
    assert not wrote


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(run_all(Path.cwd())))
