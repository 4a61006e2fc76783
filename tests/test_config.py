"""Configs and the command line's errors: every mistake is one line with file, key and remedy, and exit code 2."""

from __future__ import annotations

import subprocess
import sys
import types
from pathlib import Path
from typing import Any, Literal

import click
import pytest
import yaml
from pydantic import Field, field_validator

from mmllm.cli import main as cli_main
from mmllm.config import PACKAGED, StrictModel, dump_config, find_config, load_config, parse_config
from mmllm.errors import UserError


class Head(StrictModel):
    hidden_dim: int | None = None
    dropout: float = Field(default=0.0, ge=0, lt=1)


class Stream(StrictModel):
    tower: str
    head: Head | None = None

    @field_validator("tower")
    @classmethod
    def _known(cls, value: str) -> str:
        if value == "nonsense":
            raise UserError("no such tower", "tower", "use tiny:vit")
        if value == "bad":
            raise ValueError("A tower must be good")
        return value


class Phase(StrictModel):
    max_steps: int = 10
    trains: list[str] = []


class Config(StrictModel):
    dataset: str = "starter:full"
    limit: int | None = 5
    rate: float = 0.1
    kind: Literal["Fast", "Full"] = "Full"
    options: dict[str, Any] = {}
    streams: dict[str, Stream] = {}
    phases: list[Phase] = []
    out: Path | None = None


@pytest.fixture
def write(tmp_path):
    def to_file(text: str) -> Path:
        file = tmp_path / "a.yaml"
        file.write_text(text)
        return file

    return to_file


BASE = "streams:\n  image: {tower: tiny:vit, head: {dropout: 0.1}}\nphases:\n  - {max_steps: 1}\n  - {max_steps: 2}\n"


# ---- finding a file ----


def test_packaged_configs_are_found_by_three_spellings(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("configs/starter/align.yaml", "starter/align.yaml", "starter/align"):
        assert find_config(name) == PACKAGED / "starter/align.yaml"


def test_a_local_file_wins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "starter").mkdir()
    (tmp_path / "starter/align.yaml").write_text("{}")
    assert find_config("starter/align.yaml") == Path("starter/align.yaml")


def test_missing_file_names_the_nearest(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"starter/algin: no such config file; did you mean 'starter/align'\?"):
        find_config("starter/algin")
    with pytest.raises(UserError, match="no such config file"):
        find_config(tmp_path / "mine.yaml")


# ---- reading ----


@pytest.mark.parametrize(
    "text, message",
    [
        ("a: [1,", r"a.yaml:2: not valid YAML"),
        ("dataset: x\nlimit: 1\ndataset: y\n", r"a.yaml:3: not valid YAML \(found duplicate key dataset\)"),
        ("- a\n- b\n", "a.yaml: a config is a mapping of keys"),
        ("dataset: ${nowhere}", "a.yaml: Interpolation key 'nowhere' not found"),
    ],
)
def test_what_is_no_config(write, text, message):
    with pytest.raises(UserError, match=message):
        load_config(write(text), [], Config)


def test_binary_file(tmp_path):
    (tmp_path / "a.yaml").write_bytes(b"\x89PNG\xff\xfe")
    with pytest.raises(UserError, match="not a text file; give a YAML config"):
        load_config(tmp_path / "a.yaml", [], Config)


def test_empty_file_means_defaults(write):
    assert load_config(write(""), [], Config) == Config()


def test_numbers_without_a_point_and_interpolation(write):
    config = load_config(write("dataset: mine\nrate: 1e-3\noptions: {lr: 1e-4, name: 'of ${dataset}'}\n"), [], Config)
    assert config.rate == 1e-3 and config.options == {"lr": 1e-4, "name": "of mine"}


# ---- overrides ----


def test_overrides_go_deep_and_keep_their_neighbours(write):
    overrides = ["streams.image.head.hidden_dim=64", "phases.1.max_steps=7", "limit=null", "rate=1e-4"]
    overrides += ["phases.0.trains=[a,b]", "dataset=a=b", "streams.audio.tower=tiny:audio", "options.x.y=true"]
    config = load_config(write(BASE), overrides, Config)
    assert config.streams["image"].head == Head(hidden_dim=64, dropout=0.1)
    assert [p.max_steps for p in config.phases] == [1, 7] and config.phases[0].trains == ["a", "b"]
    assert config.limit is None and config.rate == 1e-4 and config.dataset == "a=b"
    assert config.streams["audio"].tower == "tiny:audio" and config.options == {"x": {"y": True}}


def test_the_last_override_wins(write):
    assert load_config(write("limit: 1"), ["limit=2", "limit=3"], Config).limit == 3


@pytest.mark.parametrize("item", ["limit", "=3", ""])
def test_malformed_override(write, item):
    with pytest.raises(UserError, match=f"override '{item}' is not key=value; write e.g. train.max_steps=100"):
        load_config(write(""), [item], Config)


@pytest.mark.parametrize("item", ["phases.9.max_steps=1", "limit=[1", "phases.x.max_steps=1"])
def test_impossible_override_is_quoted(write, item):
    with pytest.raises(UserError) as e:
        load_config(write(BASE), [item], Config)
    assert f"override '{item}'" in str(e.value) and "a.yaml" in str(e.value)


# ---- validation ----


@pytest.mark.parametrize(
    "text, message",
    [
        ("datset: x", "unknown key 'datset'; did you mean 'dataset'?"),
        ("streams: {image: {towr: x}}", "unknown key 'streams.image.towr'; did you mean 'tower'?"),
        (
            "streams: {image: {tower: x, head: {drop: 1}}}",
            "unknown key 'streams.image.head.drop'; did you mean 'dropout'?",
        ),
        ("phases: [{max_steps: 1}, {maxsteps: 2}]", "unknown key 'phases.1.maxsteps'; did you mean 'max_steps'?"),
        ("phases: [{qqq: 2}]", "unknown key 'phases.0.qqq'; valid here: max_steps, trains"),
        ("streams: {image: {}}", "missing key 'streams.image.tower'; add it to the file or give it as key=value"),
        (
            "limit: many",
            "key 'limit': input should be a valid integer, unable to parse string as an integer (got 'many')",
        ),
        ("kind: fast", "key 'kind': input should be 'Fast' or 'Full' (got 'fast')"),
        ("streams: {image: {tower: bad}}", "key 'streams.image.tower': a tower must be good (got 'bad')"),
    ],
)
def test_wrong_keys_and_values(write, text, message):
    file = write(text)
    with pytest.raises(UserError) as e:
        load_config(file, [], Config)
    assert str(e.value) == f"{file}: {message}"


def test_unknown_key_in_an_override_is_told_likewise(write):
    with pytest.raises(UserError, match=r"unknown key 'phases.0.trian'; did you mean 'trains'\?"):
        load_config(write(BASE), ["phases.0.trian=[a]"], Config)


def test_a_sections_own_check_keeps_its_words_and_gains_the_file(write):
    with pytest.raises(UserError, match=r"a.yaml: tower: no such tower; use tiny:vit$"):
        load_config(write("streams: {image: {tower: nonsense}}"), [], Config)


def test_long_values_are_not_repeated():
    with pytest.raises(UserError) as e:
        parse_config({"limit": list(range(1000))}, Config)
    assert len(str(e.value)) < 120


# ---- writing ----


def test_dump_is_enough_to_run_again(write, tmp_path):
    overrides = ["limit=null", "rate=1e-7", "out=runs/a", "dataset='été: 1'", "options.n=null"]
    config = load_config(write(BASE), overrides, Config)
    dump_config(config, tmp_path / "b.yaml")
    assert load_config(tmp_path / "b.yaml", [], Config) == config
    assert config.limit is None  # None is not the default here, so it must be written
    assert (
        "été" in (tmp_path / "b.yaml").read_text()
        and list(yaml.safe_load((tmp_path / "b.yaml").read_text()))[0] == "dataset"
    )


def test_assignment_is_checked():
    config = Config()
    with pytest.raises(ValueError):
        config.limit = "many"  # type: ignore[assignment]


# ---- the command line ----


def run_main(*argv: str) -> int:
    with pytest.raises(SystemExit) as e:
        cli_main.main(list(argv))
    return int(e.value.code or 0)


@pytest.mark.parametrize(
    "argv, words",
    [
        (["algin"], ["no command 'algin'", "did you mean 'align'?"]),
        (["align"], ["Missing argument 'CONFIG'"]),
        (["align", "starter/algin"], ["no such config file", "starter/align"]),
        (["align", "starter/align", "--outt", "x"], ["No such option", "--out"]),
        (["align", "starter/align", "embeding_dim=3"], ["unknown key 'embeding_dim'", "did you mean 'embedding_dim'?"]),
        (["align", "starter/align", "train.learnig_rate=3"], ["unknown key 'train.learnig_rate'", "'learning_rate'"]),
        (["align", "starter/align", "train"], ["is not key=value"]),
    ],
)
def test_mistakes_end_in_one_line_and_exit_code_2(argv, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run_main(*argv) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("error: ") and said.err.count("\n") == 1
    for word in words:
        assert word in said.err
    assert not list(tmp_path.iterdir())  # nothing half-written


def test_exit_codes(capsys, monkeypatch):
    def command(function) -> None:
        module = types.ModuleType("mmllm.cli.doctor")
        module.command = click.command("doctor")(function)  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "mmllm.cli.doctor", module)

    def user_error():
        raise UserError("broken")

    def interrupt():
        raise KeyboardInterrupt

    for function, code in (((lambda: None), 0), ((lambda: 3), 3), (user_error, 2), (interrupt, 130)):
        command(function)
        assert run_main("doctor") == code
    assert run_main("--help") == 0 and run_main("--version") == 0


def test_help_lists_every_command(capsys):
    run_main("--help")
    out = capsys.readouterr().out
    for name, line in cli_main.COMMANDS.items():
        assert name in out and line.rstrip(".").split()[-1] in out


def test_help_imports_nothing_heavy():
    """Neither `mmllm --help` nor the help of any command imports torch, transformers or vllm."""
    code = (
        "import sys\n"
        "from mmllm.cli import main as m\n"
        "for argv in [['--help'], *([c, '--help'] for c in m.COMMANDS)]:\n"
        "    try: m.main(argv)\n"
        "    except SystemExit as e: assert not e.code, argv\n"
        "    heavy = {'torch', 'transformers', 'vllm', 'numpy', 'scipy', 'omegaconf'} & set(sys.modules)\n"
        "    assert not heavy, (argv, heavy)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
