import ast
import re
import sys
import tomllib
from importlib import metadata
from pathlib import Path

from dig_jax.doctor import machine

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
# Packages that an extra brings with another one, and packages that storage's extras choose by scheme.
WITH = {"pyarrow": "datasets", "botocore": "s3fs", "fsspec": "gcsfs"}
WITH |= {"fastapi": "gradio", "starlette": "gradio", "uvicorn": "gradio"}


def distribution(requirement):
    return re.split(r"[^\w.-]", requirement)[0].lower().replace("_", "-")


def imports(path, known):
    """Return the top-level packages other than `known` that a file imports."""
    text = path.read_text("utf-8")
    if set(re.findall(r"^ *(?:import|from) (\w+)", text, re.MULTILINE)) <= known:
        return set()
    nodes = list(ast.walk(ast.parse(text)))  # lines of docstrings may look like imports
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom) and not node.level]
    return {name.partition(".")[0] for name in names} - known


def extra_of(name):
    """Return the extra for users with a distribution."""
    extras = [
        extra
        for extra, requirements in EXTRAS.items()
        if name in map(distribution, requirements) and extra != "test"
    ]
    assert extras, f"{name} is in no extra"
    return extras[0]


def extras_that_errors_name():
    """Return the extras in calls of install_command; the doctor's calls take those of its tables."""
    files = {path: path.read_text("utf-8") for path in (ROOT / "dig_jax").rglob("*.py")}
    calls = re.compile(r"\binstall_command\((?!extra: str)(.*?)\)")
    named = {(path.name, argument) for path, text in files.items() for argument in calls.findall(text)}
    computed = {(name, argument) for name, argument in named if argument[0] not in "'\""}
    assert computed == {("machine.py", "name"), ("machine.py", "extra")}
    return {argument[1:-1] for _, argument in named - computed}


def test_each_package_that_is_imported_is_a_dependency_or_in_an_extra_that_an_error_names():
    required = set(map(distribution, PROJECT["dependencies"]))
    distributions = metadata.packages_distributions()
    known = {name for name, found in distributions.items() if required & set(map(distribution, found))}
    known |= sys.stdlib_module_names | {"dig_jax", "pallas_gla", "configs"}
    optional = {"wandb", "libtpu"}  # these are imported by name
    for path in [*(ROOT / "dig_jax").rglob("*.py"), *(ROOT / "kernels" / "pallas_gla").rglob("*.py")]:
        for package in imports(path, known):
            names = distributions.get(package, [package])
            optional.add(WITH.get(package, distribution(names[0])))
    assert {"datasets", "huggingface-hub", "tensorflow-datasets"} <= optional
    assert set(map(extra_of, optional)) == extras_that_errors_name()


def test_the_doctor_looks_for_a_package_of_each_extra_that_an_error_names():
    for extra, (module, _) in machine._EXTRAS.items():
        assert distribution(module) in map(distribution, EXTRAS[extra]), extra
    assert machine._EXTRAS.keys() == extras_that_errors_name() - {"compilers"}
    assert machine._DRIVERS.keys() <= EXTRAS.keys()
