"""The two distributions of this repository: dig-jax depends on pallas-gla, which alone owns the kernels."""

import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def files(archive):
    """Return the paths of a wheel or an sdist, in an sdist without the top folder."""
    if archive.suffix == ".whl":
        return set(zipfile.ZipFile(archive).namelist())
    with tarfile.open(archive) as tar:
        return {name.partition("/")[2] for name in tar.getnames()}


def tracked(source):
    """Return the paths of the files that git tracks in a folder, relative to the root."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a clone")
    command = ["git", "ls-files", "-z", source]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return set(filter(None, listed.split("\0")))


def build(source, target):
    """Build a wheel and an sdist from a copy of the tracked files; return what they hold."""
    pytest.importorskip("setuptools", "77", reason="setuptools builds the distributions")
    for name in tracked(source):
        path = target / "source" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes((ROOT / name).read_bytes())
    for what in ("wheel", "sdist"):
        code = f"import setuptools.build_meta as backend, sys; backend.build_{what}(sys.argv[1])"
        command = [sys.executable, "-c", code, str(target / what)]
        subprocess.run(command, cwd=target / "source" / source, check=True, capture_output=True, text=True)
    [wheel], [sdist] = (list((target / what).iterdir()) for what in ("wheel", "sdist"))
    return files(wheel), files(sdist)


def test_requirements_install_the_kernels_of_the_clone_and_dig_jax_depends_on_them():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert project["dependencies"][0].startswith("pallas-gla")
    assert "-e ./kernels" in (ROOT / "requirements.txt").read_text("utf-8")


def test_the_wheel_of_dig_jax_has_all_of_the_package_its_license_and_no_kernels(tmp_path):
    wheel, _ = build(".", tmp_path)
    assert {"dig_jax/__init__.py", "dig_jax/py.typed"} <= tracked("dig_jax") <= wheel
    assert any(name.endswith("licenses/LICENSE") for name in wheel)
    assert {name.partition("/")[0].partition("-")[0] for name in wheel} == {"dig_jax"}


def test_pallas_gla_ships_its_types_and_license_and_the_sdist_its_tests(tmp_path):
    wheel, sdist = build("kernels", tmp_path)
    assert "pallas_gla/py.typed" in wheel
    assert any(name.endswith("licenses/LICENSE") for name in wheel)
    assert not [name for name in wheel if name.startswith(("tests", "benchmarks"))]
    tests = {f"tests/{path.name}" for path in (ROOT / "kernels" / "tests").glob("*.py")}
    golden = {f"tests/golden/{path.name}" for path in (ROOT / "kernels" / "tests" / "golden").iterdir()}
    assert tests | golden | {"CHANGELOG.md", "LICENSE", "benchmarks/gpu_compiler.py"} <= sdist
