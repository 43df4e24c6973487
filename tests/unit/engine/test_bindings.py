"""How OpenMP's threads wait is set before its library is loaded."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PRINT = "import os; from koala_local.engine import bindings; print(os.environ.get('GOMP_SPINCOUNT'))"


@pytest.mark.parametrize(
    ("own", "expected"),
    [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "None")],
)
def test_threads_spin_shortly_unless_the_user_says_otherwise(own: dict[str, str], expected: str) -> None:
    environment = {
        name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    }
    command = [sys.executable, "-c", PRINT]
    result = subprocess.run(command, env=environment | own, capture_output=True, check=True, text=True)
    assert result.stdout.strip() == expected
