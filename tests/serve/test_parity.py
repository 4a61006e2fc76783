"""Real vLLM over HTTP gives, token for token, what our own greedy decoding gives: text, pictures, sounds, mixtures."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch
from serve_models import louder

from mmllm.errors import UserError
from mmllm.serve.check import Case, compare, sample_cases, sample_picture, sample_sound
from mmllm.serve.client import as_openai, chat_completion
from mmllm.serve.export import export_model
from mmllm.serve.launch import Server

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server(vllm, tiny_folder, tmp_path_factory):
    exported = export_model(tiny_folder, tmp_path_factory.mktemp("export") / "tiny-exported")
    with Server(exported, dtype="float32", log=tmp_path_factory.mktemp("log") / "serve.log") as running:
        yield running


@pytest.fixture(scope="module")
def rows(server):
    return {row.name: row for row in compare(server, max_new_tokens=24)}


def test_served_tokens_are_our_greedy_tokens(rows):
    assert set(rows) >= {"text", "image", "audio", "image_audio", "audio_image", "image_pair"}
    for row in rows.values():
        assert row.served_prompt == row.our_prompt, row.name
        assert row.served == row.ours, row.name
    assert sum(len(row.ours) for row in rows.values()) > 50  # answers long enough to be able to differ


@pytest.mark.parametrize("medium", ["image", "audio"])
def test_the_comparison_bites_another_medium_gives_other_tokens(rows, medium):
    one, other = rows[medium], rows[f"{medium}_other"]
    assert one.our_prompt == other.our_prompt  # nothing but the medium differs
    assert one.served != other.served


def test_many_requests_at_once_answer_as_alone(server, rows):
    cases = sample_cases(["image", "audio"]) * 2

    def ask(case):
        answer = chat_completion(server.url, server.name, case.messages, 24, temperature=0, return_token_ids=True)
        return case.name, answer["choices"][0]["message"]["content"]

    with ThreadPoolExecutor(len(cases)) as pool:
        for name, text in pool.map(ask, cases):
            assert text == rows[name].text, name


def test_sound_files_of_another_rate_are_resampled_as_in_training(server, tmp_path):
    import soundfile

    path = tmp_path / "low.wav"
    soundfile.write(path, sample_sound(7)[::2], 8000, subtype="PCM_16")
    question = {"type": "text", "text": "What do you hear?"}
    [row] = compare(
        server, [Case("file", [{"role": "user", "content": [{"type": "audio", "path": str(path)}, question]}])]
    )
    assert row.same


def test_a_conversation_with_an_answer_in_it(server):
    picture = {"type": "image", "image": sample_picture(9)}
    messages = [
        {"role": "user", "content": [picture, {"type": "text", "text": "Is there a cat?"}]},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "Where is it?"},
    ]
    [row] = compare(server, [Case("turns", messages)])
    assert row.same


def test_openai_client(server, rows):
    openai = pytest.importorskip("openai", reason="the openai client is part of the dev extra")
    client = openai.OpenAI(base_url=server.url, api_key="none")
    case = next(c for c in sample_cases(["image"]) if c.name == "image")
    answer = client.chat.completions.create(
        model=server.name, messages=as_openai(case.messages), max_tokens=24, temperature=0
    )
    assert answer.choices[0].message.content == rows["image"].text
    pieces = client.chat.completions.create(
        model=server.name, messages=as_openai(case.messages), max_tokens=24, temperature=0, stream=True
    )
    assert "".join(p.choices[0].delta.content or "" for p in pieces if p.choices) == rows["image"].text


def test_a_refused_request_is_one_line(server):
    with pytest.raises(UserError, match="refused"):
        chat_completion(server.url, "another-model", [{"role": "user", "content": "hello"}])


def test_stop_leaves_no_process_and_frees_the_port(server):
    server.stop()
    assert server.process.poll() is not None
    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        s.bind((server.host, server.port))
    with pytest.raises(UserError, match="no answer"):
        chat_completion(server.url, server.name, [{"role": "user", "content": "hello"}])


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_ending_the_command_ends_every_process(vllm, tiny_folder, tmp_path, how):
    log = tmp_path / "log"
    command = [sys.executable, "-m", "mmllm.cli", "serve", str(tiny_folder), "--port", "0", "--log", str(log)]
    # A shell without job control starts background jobs, and so these tests, with SIGINT ignored.
    listen = partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    ours = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, preexec_fn=listen)
    children = Path(f"/proc/{ours.pid}/task/{ours.pid}/children")
    try:
        wait_for(lambda: log.exists() and log.stat().st_size > 0)  # vLLM itself runs, not only the probe before it
        [leader] = map(int, children.read_text().split())
        assert in_session(leader)
        ours.send_signal(how)
        assert ours.wait(60) == (-how if how == signal.SIGKILL else 0)
        wait_for(lambda: not in_session(leader))
    finally:
        ours.kill()


def in_session(leader: int) -> list[int]:
    """Processes of vLLM's session, which its launcher made; zombies do not count."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, _, session = stat.read_text().rpartition(")")[2].split()[:4]
            if int(session) == leader and state != "Z":
                found.append(int(stat.parent.name))
    return found


def wait_for(condition, seconds: float = 120) -> None:
    for _ in range(int(seconds * 5)):
        if condition():
            return
        time.sleep(0.2)
    pytest.fail(f"did not happen within {seconds:.0f} s")


def test_a_flag_that_vllm_refuses_ends_in_one_line(vllm, tiny_folder, tmp_path):
    with pytest.raises(UserError, match="no-such-flag") as error:
        Server(tiny_folder, extra=["--no-such-flag"], log=tmp_path / "log").start()
    assert "\n" not in str(error.value)


def test_real_llm_and_imagenet_tower(vllm, smollm2, efficientnet, tmp_path):
    """SmolLM2, saved in bfloat16 as our runs are, with EfficientNet; random connectors, so answers mean nothing."""
    from mmllm.model import build_model
    from mmllm.towers import load_tower

    torch.manual_seed(0)
    model, processor = build_model(
        smollm2, load_tower(efficientnet, "vision"), load_tower("tiny:audio", "audio"), dtype=torch.bfloat16
    )
    louder(model)
    model.save_pretrained(tmp_path / "smol")
    processor.save_pretrained(tmp_path / "smol")
    with Server(tmp_path / "smol", dtype="float32", log=tmp_path / "log") as server:
        rows = {row.name: row for row in compare(server, max_new_tokens=16)}
    for row in rows.values():
        assert row.served_prompt == row.our_prompt, row.name
        assert row.served == row.ours, row.name
    assert rows["image"].served != rows["image_other"].served
    assert rows["audio"].served != rows["audio_other"].served
