import subprocess
import sys

import pytest

import prunegraph


def test_import_is_lean() -> None:
    code = (
        "import sys, prunegraph; "
        "print([m for m in ('torch', 'numpy', 'stable_baselines3') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", prunegraph.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert name in dir(prunegraph)
    assert getattr(prunegraph, name).__name__ == name


def test_unknown_names_raise() -> None:
    with pytest.raises(AttributeError, match="no attribute 'prunee'"):
        _ = prunegraph.prunee
