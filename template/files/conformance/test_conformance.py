# Rendered by `glm4ft init`, which renders it again.
"""Runs every check of glm4ft on this repository's pipeline. Run: tox run -e conformance."""

from glm4ft.testing.conformance import parametrize_with_checks


@parametrize_with_checks("conformance.adapter:Subject")
def test_conformance(glm4ft_check):
    """List known failures with their reason: `parametrize_with_checks(..., expected_failures={check: reason})`."""
    glm4ft_check()
