"""The estimate of a run's memory beside what torch really holds."""

import pytest
import torch
from tiny_mm import tiny_llm, tiny_towers

from mmllm.model import build_model
from mmllm.train.memory import estimate_memory, llm_activations, optimizer_bytes
from mmllm.train.params import ParamGroup, set_trainable


@pytest.fixture
def model():
    return build_model(tiny_llm(), tiny_towers()[0], connectors={"vision": {"type": "mlp"}}, dtype=torch.float32)[0]


@pytest.mark.parametrize("optim, make", [("adamw_torch_fused", torch.optim.AdamW), ("sgd", torch.optim.SGD)])
def test_weights_gradients_and_optimizer_are_what_torch_holds(model, optim, make):
    params = list(model.vision_connector.parameters())
    groups = set_trainable(model, [ParamGroup("connector", params)])
    said = estimate_memory(model, groups, optim, 64, 32, 2, False)
    sum(p.sum() for p in params).backward()
    optimizer = make(params)
    optimizer.step()
    held = [t for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t) and t.ndim]
    size = lambda tensors: sum(t.numel() * t.element_size() for t in tensors)  # noqa: E731
    assert said.weights == size([*model.parameters(), *model.buffers()])
    assert said.gradients == size([p.grad for p in params]) and said.optimizer == size(held)
    assert said.total == said.weights + said.gradients + said.optimizer + said.activations


def kept(model, ids):
    """Bytes of all different storages that the LLM's forward keeps, without its weights."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found = {}

    def pack(t):
        if t.untyped_storage().data_ptr() not in own:
            found[t.untyped_storage().data_ptr()] = t.untyped_storage()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = model.model(ids).last_hidden_state  # without the head
    size = sum(s.nbytes() for s in found.values())
    assert out.requires_grad
    return size


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("length", [16, 128])
def test_activations_are_right_within_a_factor_of_two(attention, length):
    llm, _ = tiny_llm()
    llm.set_attn_implementation(attention)
    ids = torch.randint(0, 300, (4, length), generator=torch.Generator().manual_seed(0))
    said, true = llm_activations(llm, ids.numel(), length, False), kept(llm.train(), ids)
    assert 0.5 < said / true < 2, (said, true)
    assert llm_activations(llm, ids.numel(), length, True) < said


def test_optimizers_by_name():
    assert optimizer_bytes("adamw_8bit") == (0.0, 2) and optimizer_bytes("adamw_torch") == (2.0, 0)
    assert optimizer_bytes("paged_lion_8bit") == (0.0, 2) and optimizer_bytes("lion_32bit") == (1.0, 0)
