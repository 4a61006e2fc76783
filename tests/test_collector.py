"""Short processes collect little garbage, and none when they end."""

import subprocess
import sys

CODE = """
import atexit, gc
atexit.register(lambda: print(gc.get_freeze_count() > 0, gc.get_threshold()))  # runs after what is registered later
from mmllm.collector import few_collections
few_collections()
print(gc.get_freeze_count())
"""


def test_what_is_left_at_the_end_is_not_looked_through():
    told = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    assert told.stdout.splitlines() == ["0", "True (50000, 20, 50)"]
