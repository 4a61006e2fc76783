"""Chat templates that keep pictures and sounds where they stand between the words, for any LLM."""

from __future__ import annotations

from typing import Any

IMAGE_TOKEN, AUDIO_TOKEN = "<image>", "<audio>"

# Every template loops over the parts of a message's content, so that servers (vLLM) see that it takes part lists.
PARTS = (
    "{%- macro parts(content) -%}"
    "{%- if content is string -%}{{ content }}{%- else -%}"
    "{%- for part in content -%}"
    "{%- if part['type'] == 'image' or part['type'] == 'image_url' -%}<image>"
    "{%- elif part['type'] == 'audio' or part['type'] == 'input_audio' -%}<audio>"
    "{%- elif part['type'] == 'text' -%}{{ part['text'] }}"
    "{%- endif -%}{%- endfor -%}{%- endif -%}{%- endmacro -%}"
)

# ChatML as SmolLM2 and Qwen were trained with, without a default system prompt (it would cost tokens in every row).
CHATML = (
    PARTS + "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + parts(message['content']) + '<|im_end|>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)

# For a base LLM whose tokenizer knows no chat format at all.
PLAIN = (
    PARTS + "{{- bos_token -}}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'assistant' -%}{{- 'Assistant: ' + parts(message['content']) + eos_token + '\\n' -}}"
    "{%- else -%}{{- message['role'].capitalize() + ': ' + parts(message['content']) + '\\n' -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- 'Assistant: ' -}}{%- endif -%}"
)

# Question, line end, answer, end: one token of marks a question where ChatML has six. For small budgets: a quarter of
# the starter's rows were marks.
SHORT = (
    PARTS + "{{- bos_token -}}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'assistant' -%}{{- parts(message['content']) + eos_token -}}"
    "{%- else -%}{{- parts(message['content']) + '\\n' -}}{%- endif -%}"
    "{%- endfor -%}"
)

NAMED = {"plain": PLAIN, "short": SHORT}

# Around an LLM's own template: every content becomes a string before that template sees it.
FLATTEN = (
    PARTS + "{%- set flat = namespace(messages=[]) -%}"
    "{%- for message in messages -%}"
    "{%- set flat.messages = flat.messages + [{'role': message['role'], 'content': parts(message['content'])}] -%}"
    "{%- endfor -%}"
    "{%- set messages = flat.messages -%}"
)

# Before a template that takes lists of parts alone: a content that is a string becomes such a list.
LISTED = (
    "{%- set listed = namespace(messages=[]) -%}"
    "{%- for message in messages -%}"
    "{%- set content = message['content'] -%}"
    "{%- if content is string -%}{%- set content = [{'type': 'text', 'text': content}] -%}{%- endif -%}"
    "{%- set listed.messages = listed.messages + [{'role': message['role'], 'content': content}] -%}"
    "{%- endfor -%}"
    "{%- set messages = listed.messages -%}"
)


def template_for(tokenizer: Any) -> str:
    """The template for an LLM's tokenizer: ChatML if it has those marks, else its own one wrapped, else a plain one."""
    vocab = tokenizer.get_vocab()
    if "<|im_start|>" in vocab and "<|im_end|>" in vocab:
        return CHATML
    own = tokenizer.chat_template
    if isinstance(own, dict):
        own = own.get("default")
    return FLATTEN + own if own else PLAIN


def placeholder_safe(text: str) -> str:
    """A user's text in which the placeholder marks are only text; otherwise ``<image>`` typed by hand would count."""
    return text.replace(IMAGE_TOKEN, "< image>").replace(AUDIO_TOKEN, "< audio>")


def safe_messages(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages with placeholder marks in their texts broken up."""
    out = []
    for message in messages:
        content = message["content"]
        if isinstance(content, str):
            content = placeholder_safe(content)
        else:
            content = [{**p, "text": placeholder_safe(p["text"])} if p.get("type") == "text" else p for p in content]
        out.append({**message, "content": content})
    return out
