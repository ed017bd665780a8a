# Rendered by `glm4ft init`, which renders it again.
"""Runs every check of glm4ft on a GPU. Run: tox run -e conformance-gpu."""

import pytest

from glm4ft.testing.conformance import parametrize_with_checks


@pytest.mark.gpu
@parametrize_with_checks("conformance.adapter:Subject")
def test_conformance_on_the_gpu(glm4ft_check):
    """Skipped without CUDA, unless a GPU is required: then it fails."""
    glm4ft_check()
