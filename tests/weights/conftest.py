"""The real base, converted once into the user's own cache; without the packages its tests are skipped."""

from __future__ import annotations

from pathlib import Path

import pytest

from glm4ft.data.cache import default_cache
from glm4ft.testing.bases.real_weights import INSTALL, lacking, smollm2

CACHE = default_cache()  # when the module is imported: during tests the cache is a temporary folder


@pytest.fixture(scope="session")
def base() -> Path:
    """The folder of SmolLM2-135M-Instruct."""
    if missing := lacking():
        pytest.skip(f"needs the package{'s' * (len(missing) > 1)} {' and '.join(missing)}: {INSTALL}")
    return smollm2(CACHE)
