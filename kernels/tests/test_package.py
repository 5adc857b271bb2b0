"""What people get who install `pallas_gla` alone."""

import importlib.resources
import pathlib
import re
import tomllib

import pallas_gla

ROOT = pathlib.Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))


def test_the_readme_links_only_to_the_web_because_pypi_shows_it_too():
    readme = (ROOT / "README.md").read_text("utf-8")
    links = re.findall(r"\]\(([^)]+)\)", readme) + re.findall(r"^\[\w+\]: (\S+)", readme, re.MULTILINE)
    assert links
    assert all(link.startswith(("https://", "#")) for link in links)


def test_type_checkers_use_the_annotations():
    assert importlib.resources.files("pallas_gla").joinpath("py.typed").is_file()
    assert PROJECT["tool"]["setuptools"]["package-data"] == {"pallas_gla": ["py.typed"]}


def test_the_version_stands_in_one_place():
    assert re.fullmatch(r"\d+\.\d+\.\d+", pallas_gla.__version__)
    assert PROJECT["project"]["dynamic"] == ["version"]
    assert PROJECT["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "pallas_gla.__version__"}


def test_the_license_is_whole():
    text = (ROOT / "LICENSE").read_text("utf-8")
    assert text.split()[:2] == ["Apache", "License"]
    assert "END OF TERMS AND CONDITIONS" in text and "APPENDIX" in text


def test_docstrings_name_every_implementation():
    from pallas_gla import dispatch

    names = (*dispatch.PLAIN, *dispatch.KERNEL_NAMES)
    assert all(f'``"{name}"``' in pallas_gla.gla.__doc__ for name in names)
