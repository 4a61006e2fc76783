"""mmllm: build your own multimodal LLM from encoders, an LLM and data."""

__version__ = "0.1.0"
