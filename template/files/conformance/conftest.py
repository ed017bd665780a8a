"""Settings of all conformance tests. glm4ft's pytest plugin provides its options and fixtures without an import."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the tests need no download, and must not depend on one
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
