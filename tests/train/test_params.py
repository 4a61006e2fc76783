"""What trains: exactly the groups, said before step 0."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mmllm.train.params import ParamGroup, as_groups, check_trainable, count_parameters, print_trainable, set_trainable


def model():
    return nn.ModuleDict({"vision": nn.Linear(4, 4), "connector": nn.Linear(4, 2), "llm": nn.Linear(2, 2)})


def test_set_trainable_freezes_the_rest():
    m = model()
    set_trainable(m, [("connector", m["connector"].parameters(), 1e-3)])
    assert [n for n, p in m.named_parameters() if p.requires_grad] == ["connector.weight", "connector.bias"]


def test_counts():
    m = model()
    groups = set_trainable(m, [("connector", m["connector"].parameters(), 1e-3), ("llm.bias", [m["llm"].bias], None)])
    rows = {r["part"]: (r["trainable"], r["frozen"]) for r in count_parameters(m, groups)}
    assert rows == {"connector": (10, 0), "llm.bias": (2, 0), "vision": (0, 20), "llm": (0, 4)}
    assert sum(a + b for a, b in rows.values()) == sum(p.numel() for p in m.parameters())


def test_frozen_parts_have_names_a_reader_knows():
    towers = nn.ModuleDict({"image": nn.Linear(4, 4), "text": nn.Linear(2, 2)})
    wrapped = nn.ModuleDict({"model": nn.ModuleDict({"towers": towers, "scale": nn.Linear(1, 1)})})
    wrapped.register_parameter("bias", nn.Parameter(torch.zeros(3)))
    wrapped.requires_grad_(False)
    rows = {r["part"]: r["frozen"] for r in count_parameters(wrapped, [])}
    assert rows == {"towers.image": 20, "towers.text": 6, "scale": 2, "bias": 3}


def test_each_mistake_is_named():
    m = model()
    c = list(m["connector"].parameters())
    groups = set_trainable(m, [ParamGroup("connector", c)])
    m["llm"].weight.requires_grad_(True)
    with pytest.raises(ValueError, match="outside any group, first llm.weight"):
        check_trainable(m, groups)
    m["llm"].weight.requires_grad_(False)
    c[0].requires_grad_(False)
    with pytest.raises(ValueError, match="connector.weight of group 'connector' is frozen"):
        check_trainable(m, groups)
    with pytest.raises(ValueError, match="connector.weight stands in two groups: 'a' and 'b'"):
        set_trainable(m, [("a", c, None), ("b", c[:1], None)])
    with pytest.raises(ValueError, match="group 'other' holds a parameter of shape .3, 3. outside the model"):
        set_trainable(m, [("other", nn.Linear(3, 3).parameters(), None)])


def test_tied_weights_count_once():
    m = model()
    m["llm"].weight = nn.Parameter(m["llm"].weight.data)
    m["head"] = nn.Linear(2, 2, bias=False)
    m["head"].weight = m["llm"].weight
    groups = set_trainable(m, [("llm", m["llm"].parameters(), None)])
    assert sum(r["trainable"] + r["frozen"] for r in count_parameters(m, groups)) == sum(
        p.numel() for p in m.parameters()
    )


def test_empty_groups_vanish():
    assert [g.name for g in as_groups([("none", [], 1.0), ("some", [nn.Parameter()], None)])] == ["some"]


def test_table_shows_rates_and_counts(capsys):
    m = model()
    groups = set_trainable(m, [("connector", m["connector"].parameters(), 5e-4), ("llm", m["llm"].parameters(), None)])
    print_trainable(m, groups, learning_rate=1e-5)
    lines = [line.replace("│", " ").split() for line in capsys.readouterr().out.splitlines()]
    assert ["connector", "10", "0", "0.0005"] in lines and ["llm", "6", "0", "1e-05"] in lines
    assert ["vision", "0", "20", "-"] in lines and ["all", "16", "20"] in lines


def test_only_process_zero_prints(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    m = model()
    print_trainable(m, set_trainable(m, [("llm", m["llm"].parameters(), None)]))
    assert capsys.readouterr().out == ""
