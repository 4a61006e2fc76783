"""What is refused before vLLM starts, and the command line that vLLM gets."""

from __future__ import annotations

import json
import socket
import stat
import sys
from pathlib import Path

import numpy as np
import pytest
from serve_models import save_tiny

from mmllm.errors import UserError
from mmllm.serve.client import as_openai, audio_part
from mmllm.serve.export import export_model
from mmllm.serve.folder import modalities, model_folder, read_config
from mmllm.serve.launch import VLLM, Server, arguments, check_port, find_vllm, free_port, resolve_dtype


def cpu_vllm() -> VLLM:
    return VLLM(sys.executable, "0.32.0", "vllm.entrypoints.launchers.api_server.entry", on_cpu=True)


def test_a_python_without_vllm_says_how_to_get_it(tmp_path):
    bare = tmp_path / "python"  # the same Python without its installed packages
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n')
    bare.chmod(bare.stat().st_mode | stat.S_IEXEC)
    with pytest.raises(UserError, match="vLLM is not installed.*install_vllm_cpu.sh"):
        find_vllm(str(bare))


def test_the_python_may_come_from_the_environment(monkeypatch):
    monkeypatch.setenv("MMLLM_VLLM_PYTHON", "/nowhere/python")
    with pytest.raises(UserError, match="/nowhere/python"):
        find_vllm()


def test_finds_the_installed_vllm(vllm):
    found = find_vllm()
    assert found.version.startswith("0.32") and found.module.endswith("entry")


def test_a_taken_port_is_refused():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        with pytest.raises(UserError, match="--port"):
            check_port("127.0.0.1", s.getsockname()[1])
    check_port("127.0.0.1", free_port())


def test_command_line_limits_the_media_that_the_model_takes_and_the_users_flags_come_last(tiny_folder):
    command = arguments(tiny_folder, cpu_vllm(), "127.0.0.1", 8001, "tiny", "float32", ["--max-model-len", "77"])
    assert json.loads(command[command.index("--limit-mm-per-prompt") + 1]) == {"image": 8, "audio": 8}
    assert command[command.index("--max-model-len") + 1] == "1024"  # what this LLM can do, not more
    assert command[-2:] == ["--max-model-len", "77"]
    assert "--enforce-eager" in command


def test_a_head_size_without_cpu_attention_is_told_before_the_start(tmp_path):
    folder = save_tiny(tmp_path / "narrow", audio=False, head_size=16)
    with pytest.raises(UserError, match="heads of 16"):
        arguments(folder, cpu_vllm(), "127.0.0.1", 8001, "narrow", "float32", [])
    assert modalities(read_config(folder)) == ["image"]


def test_auto_dtype_keeps_a_float32_model_in_float32(tiny_folder):
    assert resolve_dtype("auto", tiny_folder, on_cpu=True) == "float32"
    assert resolve_dtype("auto", tiny_folder, on_cpu=False) == "float32"
    assert resolve_dtype("bfloat16", tiny_folder, on_cpu=True) == "bfloat16"


def test_auto_dtype_is_that_of_the_llms_weights_not_of_the_towers(tiny_folder, tmp_path):
    halved = export_model(tiny_folder, tmp_path / "halved", dtype="bfloat16")
    config = read_config(halved) | {"dtype": "float32"}  # as transformers writes it here
    (halved / "config.json").write_text(json.dumps(config))
    assert resolve_dtype("auto", halved, on_cpu=False) == "bfloat16"


def write_run(folder: Path, stage: str) -> Path:
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps({"stage": stage, "status": "finished"}))
    return folder


def test_folders_that_cannot_be_served(tmp_path, tiny_folder):
    assert model_folder(tiny_folder) == tiny_folder
    with pytest.raises(UserError, match="no such folder"):
        model_folder(tmp_path / "nothing")
    with pytest.raises(UserError, match="run of 'align'"):
        model_folder(write_run(tmp_path / "aligned", "align"))
    with pytest.raises(UserError, match="not finished"):
        model_folder(write_run(tmp_path / "half", "tune"))
    other = tmp_path / "llama"
    other.mkdir()
    with pytest.raises(UserError, match="config.json"):
        model_folder(other)
    (other / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UserError, match="'llama' model"):
        model_folder(other)
    (other / "config.json").write_text('{"model_type": "mmllm"}')
    with pytest.raises(UserError, match="lacks .*tokenizer_config.json.*model.safetensors"):
        model_folder(other)
    (other / "config.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        model_folder(other)


def test_a_finished_run_is_its_final_folder(tmp_path, tiny_folder):
    run = write_run(tmp_path / "tuned", "tune")
    (run / "final").symlink_to(tiny_folder)
    assert model_folder(run) == run / "final"


def test_sound_survives_the_way_to_the_server_exactly():
    import base64
    import io

    import soundfile

    wave = np.array([-32768, -20000, -1, 0, 1, 20001, 32767], np.float32) / 32768
    part = audio_part(wave)
    back, rate = soundfile.read(io.BytesIO(base64.b64decode(part["input_audio"]["data"])), dtype="float32")
    assert rate == 16000 and np.array_equal(back, wave)


def test_messages_keep_their_order_and_text():
    text = {"type": "text", "text": "a"}
    sound = {"type": "audio", "audio": np.zeros(10, np.float32)}
    [message] = as_openai([{"role": "user", "content": [sound, text, sound]}])
    assert [p["type"] for p in message["content"]] == ["input_audio", "text", "input_audio"]
    assert as_openai([{"role": "user", "content": "plain"}]) == [{"role": "user", "content": "plain"}]


@pytest.mark.parametrize(
    "part, word", [({"injector": {"type": "x"}}, "injected"), ({"vision_connector": {"text_dim": 8}}, "question")]
)
def test_models_whose_media_reach_more_than_the_llms_input_are_refused(tmp_path, tiny_folder, part, word):
    for file in tiny_folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    config = json.loads((tiny_folder / "config.json").read_text()) | part
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=word):
        Server(tmp_path)
