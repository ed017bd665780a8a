"""What all conformance tests share. The options and fixtures of glm4ft come with its pytest plugin by themselves."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the tests need no download, and must not depend on one
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
