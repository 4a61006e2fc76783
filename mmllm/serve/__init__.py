"""Serving and exporting: the vLLM plugin, the server launcher, a small client, and complete Hugging Face folders."""
