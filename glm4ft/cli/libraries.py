"""What other libraries show on the screen."""

from __future__ import annotations

import logging as standard_logging


def quiet_libraries() -> None:
    """Leave the screen to the account of the run: errors of the libraries still show. Loads transformers."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    standard_logging.getLogger("bitsandbytes").setLevel(standard_logging.ERROR)  # of kernels that it can do without
