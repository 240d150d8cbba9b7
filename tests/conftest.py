"""What every test shares: checked shapes, one thread, and the folder of real images."""

from pathlib import Path

import jaxtyping
import pytest

# Before any import of repro: every jaxtyping annotation of the package is checked at every call. But not in
# modules of kernels: Triton looks names up where a kernel is from, which would be the wrapper that checks it.
ROOT = Path(__file__).parents[1]
MODULES = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in ROOT.glob("repro/**/*.py")]
CHECKED = [name for name in MODULES if not name.endswith(("__init__", "_kernels"))]
jaxtyping.install_import_hook(CHECKED, "beartype.beartype")

import torch  # noqa: E402
from kernels import compiles  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture
def unchecked(monkeypatch):
    """Within a test no annotation is checked: torch.compile, asked for one graph, cannot trace the checks."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.fixture(scope="session")
def inductor() -> str:
    """torch.compile's way of compiling for training, for CPUs: tests are skipped where it cannot."""
    if not compiles():
        pytest.skip("torch.compile needs a C++ compiler, such as g++, to compile for a CPU")
    return "inductor"


SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real images beside the repository; tests that need it are skipped where it is not."""
    if not SHARED_DATA.is_dir():
        pytest.skip(
            "the real images are not here: this test needs a folder shared/data beside the repository"
        )
    return SHARED_DATA
