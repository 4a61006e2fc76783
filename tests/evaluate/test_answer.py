"""What a decoder of `mmllm eval` computes with: logits that 16 bits do not round."""

import pytest
import torch
from tiny_mm import tiny_llm

from mmllm.evaluate.answer import wide_head


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_of_16_bits_are_those_of_the_states_and_weights(dtype):
    model = tiny_llm()[0].to(dtype)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        states = model.model(ids).last_hidden_state
        rounded = model(ids).logits
        wide_head(model)
        logits = model(ids).logits
    assert rounded.dtype == dtype and logits.dtype == torch.float32
    torch.testing.assert_close(logits, states.double() @ model.lm_head.weight.double().T, check_dtype=False)
    assert len(logits.unique()) > len(rounded.unique())


def test_a_head_of_32_bits_is_left_alone():
    model = tiny_llm()[0]
    wide_head(model)
    assert "forward" not in vars(model.lm_head)
