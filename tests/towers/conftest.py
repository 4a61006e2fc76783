"""The folder of each family of encoders, written once a session."""

from __future__ import annotations

import pytest
from tower_families import FAMILIES


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory):
    """name -> folder with a tiny random model and its preprocessor."""
    made = {}

    def get(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            FAMILIES[name].write(made[name])
        return made[name]

    return get
