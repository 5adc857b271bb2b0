import ast
import re
import sys
import tomllib
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
# Packages that an extra brings with another one, and packages that storage's extras choose by scheme.
WITH = {"pyarrow": "datasets", "botocore": "s3fs", "fsspec": "gcsfs"}
WITH |= {"fastapi": "gradio", "starlette": "gradio", "uvicorn": "gradio"}


def distribution(requirement):
    return re.split(r"[^\w.-]", requirement)[0].lower().replace("_", "-")


def imports(path):
    """Yield the top-level packages that a file imports from other distributions."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module]
        else:
            continue
        for name in names:
            top = name.partition(".")[0]
            if top not in sys.stdlib_module_names and top not in ("dig_jax", "pallas_gla", "configs"):
                yield top


def extra_of(name):
    """Return the extra for users with a distribution."""
    extras = [
        extra
        for extra, requirements in PROJECT["optional-dependencies"].items()
        if name in map(distribution, requirements) and extra != "test"
    ]
    assert extras, f"{name} is in no extra"
    return extras[0]


def test_each_package_that_is_imported_is_a_dependency_or_in_an_extra_that_an_error_names():
    required = set(map(distribution, PROJECT["dependencies"]))
    distributions = metadata.packages_distributions()
    files = [*(ROOT / "dig_jax").rglob("*.py"), *(ROOT / "kernels" / "pallas_gla").rglob("*.py")]
    text = "\n".join(path.read_text("utf-8") for path in files)
    optional = set()
    for path in files:
        for package in imports(path):
            names = {distribution(name) for name in distributions.get(package, [package])}
            if not names & required:
                optional.add(WITH.get(package, distribution(package)))
    assert {"datasets", "huggingface-hub", "tensorflow-datasets"} <= optional
    for name in (*optional, "wandb", "libtpu"):  # the last two are imported by name
        assert re.search(rf"install_command\(['\"]{extra_of(name)}['\"]\)", text), name


def test_an_extra_that_an_error_names_exists():
    for path in (ROOT / "dig_jax").rglob("*.py"):
        for extra in re.findall(r"install_command\(['\"](.*?)['\"]\)", path.read_text("utf-8")):
            assert extra in PROJECT["optional-dependencies"], f"{extra} in {path}"
