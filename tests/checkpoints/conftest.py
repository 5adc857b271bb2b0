"""Workdirs with checkpoints."""

import shutil

import pytest
from checkpoint_states import save


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A workdir with checkpoints 1 and 2, which tests must not change."""
    workdir = tmp_path_factory.mktemp("saved")
    save(workdir, 1, 2)
    return workdir


@pytest.fixture
def workdir(saved, tmp_path):
    """A copy of `saved`."""
    return shutil.copytree(saved, tmp_path / "run")
