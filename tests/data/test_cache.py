"""The cache: whole or absent, never half; one maker at a time; damage is found; the disk is checked first."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest

from mmllm.data import cache
from mmllm.errors import UserError

SHA = "ab" * 32


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("MMLLM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def fill(folder):
    (folder / "sub").mkdir()
    (folder / "sub" / "a.txt").write_text("hello")


def test_root_follows_the_environment(monkeypatch, tmp_path):
    assert cache.cache_root() == tmp_path / "cache"
    monkeypatch.delenv("MMLLM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.cache_root() == tmp_path / "xdg" / "mmllm"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache.cache_root() == tmp_path / "home" / ".cache" / "mmllm"


def test_made_once_then_found(root):
    path = cache.install("npm", "@scope/thing", "1.0", SHA, fill)
    assert path == root / "npm" / "scope_thing-1.0-abababab"
    assert json.loads((path / ".ok").read_text())["sha256"] == SHA
    again = cache.install("npm", "@scope/thing", "1.0", SHA, lambda part: pytest.fail("made twice"))
    assert again == path and (path / "sub" / "a.txt").read_text() == "hello"


@pytest.mark.parametrize("error", [RuntimeError("x"), UserError("x"), KeyboardInterrupt()])
def test_a_maker_that_fails_leaves_nothing(root, error):
    def make(part):
        fill(part)
        raise error

    with pytest.raises(type(error)):
        cache.install("models", "m", "1", SHA, make)
    assert cache.entries() == [] and not list((root / "models").iterdir())


def test_leftovers_of_a_killed_process_are_replaced(root):
    code = (
        "import os, sys; from mmllm.data.cache import install\n"
        "def make(part):\n"
        "    (part / 'half').write_text('x'); os.kill(os.getpid(), 9)\n"
        f"install('models', 'm', '1', '{SHA}', make)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == -9
    assert [e.state for e in cache.entries()] == ["unfinished"]
    path = cache.install("models", "m", "1", SHA, fill)
    assert sorted(p.name for p in path.iterdir()) == [".ok", "sub"]
    assert [e.state for e in cache.entries()] == ["whole"]


def test_two_processes_make_it_once(root, tmp_path):
    log = tmp_path / "log"
    code = (
        "import os, time; from mmllm.data.cache import install\n"
        "def make(part):\n"
        f"    open({str(log)!r}, 'a').write('made\\n'); time.sleep(1); (part / 'x').write_text('x')\n"
        f"print(install('models', 'm', '1', '{SHA}', make))"
    )
    both = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    out = [p.communicate()[0].strip() for p in both]
    assert out == [str(root / "models" / "m-1-abababab")] * 2
    assert log.read_text() == "made\n"


def test_no_space_is_said_before_anything_is_made(root):
    with pytest.raises(UserError, match="not enough disk space.*MMLLM_CACHE"):
        cache.install("models", "m", "1", SHA, lambda part: pytest.fail("made"), needs_bytes=10**18)
    assert cache.entries() == []


def test_a_cache_that_cannot_be_written(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MMLLM_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match="cannot write the cache.*set MMLLM_CACHE"):
        cache.install("models", "m", "1", SHA, fill)


def test_verify_finds_changed_added_and_lost_files(root):
    path = cache.install("npm", "thing", "1", SHA, fill)
    entry = cache.entries()[0]
    assert cache.verify(entry) is None
    (path / "sub" / "a.txt").write_text("hellO")
    assert "changed" in cache.verify(entry)
    (path / "sub" / "a.txt").write_text("hello")
    assert cache.verify(entry) is None
    (path / "extra").write_text("")
    assert cache.verify(entry)
    (path / "extra").unlink()
    (path / "sub" / "a.txt").unlink()
    assert cache.verify(entry)


def test_command_line(root):
    def mmllm(*argv):
        done = subprocess.run(
            [sys.executable, "-m", "mmllm.cli", "cache", *argv], capture_output=True, text=True, env=dict(os.environ)
        )
        return done.returncode, done.stdout, done.stderr

    cache.install("npm", "thing", "1", SHA, fill)
    cache.install("models", "net", "2", SHA, fill)
    (root / "models" / "half-1-cdcdcdcd.part").mkdir()
    (root / "features" / "abc").mkdir(parents=True)
    code, out, _ = mmllm("ls")
    assert code == 0 and "whole       npm/thing-1-abababab" in out and "unfinished  models/half" in out
    states = {e["name"]: e["state"] for e in json.loads(mmllm("ls", "--json")[1])}
    assert states == {
        "thing-1-abababab": "whole",
        "net-2-abababab": "whole",
        "half-1-cdcdcdcd.part": "unfinished",
        "abc": "built",
    }
    assert mmllm("verify", "thing")[0] == 0
    (root / "npm" / "thing-1-abababab" / "sub" / "a.txt").write_text("")
    code, out, err = mmllm("verify")
    assert code == 1 and "BAD  npm/thing-1-abababab" in out and "cache rm" in err
    code, _, err = mmllm("rm", "thong")
    assert code == 2 and "did you mean" in err and err.count("\n") == 1
    assert mmllm("rm")[0] == 2
    assert mmllm("rm", "--unfinished")[0] == 0
    assert mmllm("rm", "npm")[0] == 0
    assert sorted(e.label for e in cache.entries()) == ["features/abc", "models/net-2-abababab"]
    assert mmllm("rm", "--all")[0] == 0
    assert cache.entries() == []


def test_removal_waits_for_the_one_who_writes(root):
    path = cache.install("models", "m", "1", SHA, fill)
    code = (
        "import time; from mmllm.data.cache import locked\n"
        "with locked('models-m-1-abababab'):\n    print('held', flush=True); time.sleep(1); print('done', flush=True)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    cache.remove(cache.entries()[0])
    assert holder.stdout.readline() == "done\n"
    assert not path.exists()
    for _ in range(50):
        if holder.poll() is not None:
            break
        time.sleep(0.1)
    holder.stdout.close()
