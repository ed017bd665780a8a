"""What the whole test suite shares: Hypothesis profiles, an isolated environment, and the lanes of chat formats."""

from __future__ import annotations

import functools
import gc
import os

# Before anything imports torch. Two processes of two spinning threads were measured 15 times slower than two of one.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import note, settings

settings.register_profile("default", max_examples=100, deadline=None)  # shared machines: no test is timed by one run
settings.register_profile("nightly", max_examples=1000, deadline=None)
settings.register_profile("mutation", max_examples=30, deadline=None, derandomize=True, database=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


@dataclass(frozen=True)
class Lane:
    """A chat format with a tokenizer whose own template renders it.

    Args:
        id: as shown by pytest.
        chat_format: name of the chat format.
        architecture: of the built-in tokenizer; "" for the real one.
    """

    id: str
    chat_format: str
    architecture: str = ""


TINY_LANES = (
    Lane("tiny-9b-chat", "glm-4-9b-chat", "GlmForCausalLM"),
    Lane("tiny-0414", "glm-4-0414", "Glm4ForCausalLM"),
)
REAL_LANE = Lane("real-9b-chat", "glm-4-9b-chat")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run what uses a lane once per lane; the real one exists only where a tokenizer is given."""
    if "lane" in metafunc.fixturenames:
        metafunc.parametrize("lane", lanes(metafunc.config), ids=lambda lane: lane.id, scope="session")


def lanes(config: pytest.Config) -> tuple[Lane, ...]:
    """Those that can run here."""
    from glm4ft.testing.plugin import TOKENIZER

    return (*TINY_LANES, REAL_LANE) if TOKENIZER.value(config) else TINY_LANES


def pytest_collection_finish() -> None:
    """Spare the collector what the imports made: accelerate collects after every run, 0.2 s each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _isolated_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Encoded files of tests go where nobody finds them again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLM4FT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def real_tokenizer(glm4ft_tokenizer: str) -> Any:
    """The real tokenizer; the test is skipped where none is given. Loading takes four seconds, so it is shared."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(glm4ft_tokenizer)


@pytest.fixture(scope="session")
def tokenizer_of(request: pytest.FixtureRequest) -> Callable[[Lane], Any]:
    """Give a lane's tokenizer, always the same one."""

    @functools.cache
    def load(lane: Lane) -> Any:
        if not lane.architecture:
            return request.getfixturevalue("real_tokenizer")
        from glm4ft.model.tiny_tokenizer import tiny_tokenizer

        return tiny_tokenizer(lane.architecture)

    return load


@pytest.fixture(scope="session")
def tokenizer(lane: Lane, tokenizer_of: Callable[[Lane], Any]) -> Any:
    """The tokenizer of the lane."""
    return tokenizer_of(lane)


@pytest.fixture(scope="session")
def in_each_lane(tokenizer_of: Callable[[Lane], Any], pytestconfig: pytest.Config) -> Callable[..., Iterator[Any]]:
    """Go through the chat formats of all lanes, so that Hypothesis generates an example once and not once per lane.

    Called with options of ``ChatFormat``; a failing example is reported with the lane it failed in.
    """
    from glm4ft.data.chat_format import ChatFormat

    def go_through(**options: Any) -> Iterator[Any]:
        for lane in lanes(pytestconfig):
            note(f"lane: {lane.id}")
            yield ChatFormat(lane.chat_format, tokenizer_of(lane), **options)

    return go_through


@pytest.fixture(scope="session")
def chat_format(lane: Lane, tokenizer: Any) -> Any:
    """The lane's chat format with default options."""
    from glm4ft.data.chat_format import ChatFormat

    return ChatFormat(lane.chat_format, tokenizer)


@pytest.fixture(scope="session")
def learnt(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The result of the bundled demo, learnt by heart as ``glm4ft train`` does it; shared, since it takes seconds."""
    import yaml

    from glm4ft.cli.train import DEMO_CONFIG
    from glm4ft.report.observed_run import train_observed
    from glm4ft.train.config import TrainConfig

    options = yaml.safe_load(DEMO_CONFIG.read_text("utf-8"))
    output = tmp_path_factory.mktemp("learnt") / "run"
    return train_observed(TrainConfig(**options, output=str(output)), say=lambda _: None)
