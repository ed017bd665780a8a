"""A minimal GLM-4 LoRA trainer under a large convergence-regression harness."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("glm4ft")
except PackageNotFoundError:  # the recorder runs in environments where this package is not installed
    __version__ = "unknown"
