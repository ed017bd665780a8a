"""A minimal GLM-4 LoRA trainer under a large convergence-regression harness."""

from importlib.metadata import version

__version__ = version("glm4ft")
