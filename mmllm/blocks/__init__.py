"""Pure torch pieces that know nothing of mmllm."""
