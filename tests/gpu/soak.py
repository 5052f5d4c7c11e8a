"""``python -m tests.gpu.soak``: random fused calls for as long as you like, each checked (suites/soak.py).

python -m tests.gpu.soak                                         # a million calls on two GPUs, about a minute
python -m tests.gpu.soak --operations 100000000 --seed 7 --hours 8
"""

from __future__ import annotations

import argparse
import os
import sys

from tests.gpu import harness


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", type=int, default=2, help="ranks, one GPU each")
    parser.add_argument("--operations", type=int, default=1_000_000, help="fused calls a rank makes at least")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--hours", type=float, default=1.0, help="the end, with or without as many calls")
    parser.add_argument("--dry-run", action="store_true", help="say what would run")
    arguments = parser.parse_args()
    seconds = arguments.hours * 3600
    settings = {
        "ARFUSION_SOAK_OPERATIONS": str(arguments.operations),
        "ARFUSION_SOAK_SECONDS": str(seconds),
        "ARFUSION_SOAK_SEED": str(arguments.seed),
    }
    print(" ".join(f"{name}={value}" for name, value in settings.items()), "python -m tests.gpu.soak", *sys.argv[1:])
    if arguments.dry_run:
        return 0
    os.environ.update(settings)
    outcomes = harness.run(arguments.world, ["soak/random"], timeout=seconds + 120, case_timeout=seconds + 60)
    print(harness.table(outcomes, arguments.world), flush=True)
    return 0 if all(outcome.state == "passed" for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
