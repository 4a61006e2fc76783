"""The vLLM plugin's entry point: makes our model class known to every vLLM process."""

# pyright: reportMissingImports=false

from __future__ import annotations


def register() -> None:
    """Called by vLLM (entry point group ``vllm.general_plugins``) in the API server, the engine and each worker.

    Must be cheap and may run several times: the model class itself is named by a string and imported only when used.
    """
    from vllm import ModelRegistry

    import mmllm.model  # noqa: F401  registers config and processor with transformers' Auto classes

    name = "MMLLMForConditionalGeneration"
    if name not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(name, f"mmllm.serve.vllm_model:{name}")
