"""Takes torchaudio's compiled extension away where it cannot be loaded: its builds need a CUDA build of torch.

torchaudio is made to work without ("the library file is not found", ``torchaudio/_extension/utils.py``);
it reads sound files, of which text has none. LLaMA-Factory imports it with its plugin for audio in any case.
"""

from importlib.util import find_spec
from pathlib import Path

import torch

spec = find_spec("torchaudio")
if spec and spec.origin and torch.version.cuda is None:
    for library in (Path(spec.origin).parent / "lib").glob("*.so"):
        library.unlink()
