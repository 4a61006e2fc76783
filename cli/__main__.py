"""Lets `accelerate launch -m mmllm.cli ...` and `python -m mmllm.cli ...` start the command line."""

from mmllm.cli.main import main

if __name__ == "__main__":
    main()
