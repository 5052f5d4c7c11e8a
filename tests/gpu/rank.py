"""One rank of a GPU run: ``python -m tests.gpu.rank RANK WORLD PORT RESULTS [PATTERN...]``, started by the harness."""

import sys
from pathlib import Path

from tests.gpu import harness

if __name__ == "__main__":
    harness.rank_main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]), sys.argv[5:])
