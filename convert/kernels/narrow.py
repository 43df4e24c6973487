"""blocks.py, search.py and vectors.py once more, as modules of their own, with vectors of one register: numba compiles
the width into everything, so two widths need two sets of types and functions.
"""

from pathlib import Path

__path__ = [str(Path(__file__).parent)]  # what makes a package of it
REGISTERS = 1
