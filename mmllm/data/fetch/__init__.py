"""Three ways to get a pinned package's file without installing it: pip, npm and apt, each by its own program."""

from mmllm.data.fetch.apt import fetch_apt
from mmllm.data.fetch.common import Refused, Unavailable
from mmllm.data.fetch.npm import fetch_npm
from mmllm.data.fetch.pip import fetch_pip

__all__ = ["Refused", "Unavailable", "fetch_apt", "fetch_npm", "fetch_pip"]
