"""Each method's effect: two or more arms through ``mmllm align``, paired over seeds, with a verdict."""
