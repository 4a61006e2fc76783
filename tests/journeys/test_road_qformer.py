"""The road from an align run to a model that answers, with the connector `qformer`."""

import pytest
from connector_road import check

pytestmark = pytest.mark.slow


def test_what_is_seen_beats_what_is_guessed_by_the_stated_margins(tmp_path):
    check("qformer", tmp_path)
