"""`mmllm decode` through the real command line: the list, an explanation, a trace, steering directions."""

import json

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file
from tiny_mm import tiny_model

from mmllm.cli.main import main
from mmllm.decode import Decoder, Request, parse_spec
from mmllm.decode.explain import formula, rows_per_token
from mmllm.decode.presets import preset_names


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("decode")
    model, processor = tiny_model()
    model.save_pretrained(path / "model")
    processor.save_pretrained(path / "model")
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 30, 3), np.uint8)).save(path / "a.png")
    return path


def run(capsys, *argv):
    with pytest.raises(SystemExit) as end:
        main(["decode", *map(str, argv)])
    out, err = capsys.readouterr()
    return end.value.code, out, err


@pytest.mark.parametrize("method", [*preset_names(), "vcd+ritual:normalize=true", "icd:where=prefix"])
def test_every_method_has_three_forms_that_read_each_other(method, tmp_path):
    spec = parse_spec(method)
    assert parse_spec(str(spec)) == spec
    assert parse_spec(spec.to_dict()) == spec
    (tmp_path / "spec.yaml").write_text(spec.to_yaml())
    assert parse_spec(f"@{tmp_path / 'spec.yaml'}") == spec
    program = parse_spec(spec.to_dict(expand=True))
    assert (program.views, program.terms, program.masks, program.base) == (
        spec.views,
        spec.terms,
        spec.masks,
        spec.base,
    )
    assert parse_spec(str(program)) == program
    if spec.constant:
        assert sum(spec.weights) == pytest.approx(spec.gain)


def test_the_list_names_every_method_and_what_stays_out(capsys):
    code, out, _ = run(capsys, "list")
    assert code == 0 and all(f"\n{name}\t" in f"\n{out}" for name in preset_names())
    assert "opera" in out


def test_an_explanation_has_formula_cost_gain_and_weakness(capsys):
    code, out, _ = run(capsys, "explain", "ritual:transform=hflip")
    assert code == 0
    for text in ("z_0 + 3 z[hflip]", "2 of one batch", "gain: 4", "places", "is bad at"):
        assert text in out
    assert formula(parse_spec("m3id")).count("growth") == 1
    assert rows_per_token(parse_spec("vcd+blank+no_image")) == 4


def test_a_program_from_yaml_answers_like_its_preset(folder, capsys, tmp_path):
    _, out, _ = run(capsys, "explain", "vcd:step=900", "--yaml")
    (tmp_path / "own.yaml").write_text(out)
    from mmllm.model import load_model

    decoder = Decoder(*load_model(folder / "model"))
    messages = [{"role": "user", "content": [{"type": "image", "path": str(folder / "a.png")}]}]
    both = decoder.generate([Request(messages, d, 6) for d in ("vcd:step=900", f"@{tmp_path / 'own.yaml'}")])
    assert both[0].token_ids == both[1].token_ids


def test_a_trace_shows_views_mix_and_mask(folder, capsys, tmp_path):
    given = (folder / "model", "-i", folder / "a.png", "-q", "What?", "--decode", "vcd+blank", "--max-new-tokens", 3)
    code, out, _ = run(capsys, "trace", *given, "--out", tmp_path / "t.json")
    assert code == 0 and "diffuse" in out
    found = json.loads((tmp_path / "t.json").read_text())
    steps = found["steps"]
    assert found["decode"] == "vcd+blank" and 1 <= len(steps) <= 3
    for step in steps:
        assert list(step["views"]) == ["base", "diffuse", "blank"]
        assert step["mix"][0]["token"] == step["token"] and step["plausible"] >= 1
        assert all(a["p"] >= b["p"] for a, b in zip(step["mix"], step["mix"][1:]))
    run(capsys, "trace", *given, "--out", tmp_path / "t.html")
    page = (tmp_path / "t.html").read_text()
    assert "<svg" in page and "plausible" in page
    code, _, err = run(capsys, "trace", *given, "--out", tmp_path / "t.pdf")
    assert code == 2 and err.count("\n") == 1 and "t.pdf" in err


def test_directions_made_by_the_command_are_used_by_vti(folder, capsys, tmp_path):
    demos = [{"image": str(folder / "a.png"), "right": "a cat.", "hallucinated": "a dog and a bell."}] * 2
    (tmp_path / "demos.jsonl").write_text("".join(json.dumps(d) + "\n" for d in demos))
    target = tmp_path / "d.safetensors"
    code, _, _ = run(capsys, "directions", folder / "model", tmp_path / "demos.jsonl", "--out", target)
    made = load_file(target)["directions"]
    assert code == 0 and made.norm(dim=-1).tolist() == pytest.approx([1] * len(made), abs=1e-4)
    code, out, _ = run(capsys, "trace", folder / "model", "-q", "hi", "--decode", f"vti:vectors={target}")
    assert code == 0 and out
    (tmp_path / "bad.jsonl").write_text('{"right": "x"}\n')
    code, _, err = run(capsys, "directions", folder / "model", tmp_path / "bad.jsonl")
    assert code == 2 and "hallucinated" in err and err.count("\n") == 1


def test_mistakes_are_one_line(capsys):
    for argv, says in (
        (["explain", "vdc"], "vcd"),
        (["explain", "vcd:alpa=1"], "alpha"),
        (["explain", "@no.yaml"], "no.yaml"),
    ):
        code, _, err = run(capsys, *argv)
        assert code == 2 and says in err and err.count("\n") == 1
