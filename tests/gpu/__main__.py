"""``python -m tests.gpu``: a chosen part of the GPU tests on so many ranks, and a short table.

python -m tests.gpu --world 2                                   # everything for two ranks
python -m tests.gpu --world 2 --select epilogues,shapes/bf16 --timeout 110 --json results.json
python -m tests.gpu --list
ARFUSION_TEST_SHARE_GPU=1 python -m tests.gpu --world 4

The last shares what GPUs there are among the ranks, which take turns on each: slow, but with one GPU all except P2P
itself is as with four.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

from tests.gpu import failures, harness


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", type=int, default=2, help="ranks, one GPU each")
    parser.add_argument("--select", default="", help="suites or id prefixes, comma-separated; default: all but soak")
    parser.add_argument("--timeout", type=float, default=240, help="seconds for all of it")
    parser.add_argument("--case-timeout", type=float, default=60, help="seconds without a result")
    parser.add_argument("--json", type=Path, help="write the outcomes here too")
    parser.add_argument("--list", action="store_true", help="print the ids")
    arguments = parser.parse_args()
    patterns = [part for part in arguments.select.split(",") if part]
    if arguments.list:
        print("\n".join(case.id for case in harness.select(arguments.world, patterns)))
        return 0
    if not patterns:
        suites = dict.fromkeys(case.suite for case in harness.select(arguments.world, []))
        patterns = [suite for suite in suites if suite != "soak"]
    wants_failures = "failures" in patterns
    patterns = [pattern for pattern in patterns if pattern != "failures"]
    outcomes = []
    if patterns:
        outcomes += harness.run(arguments.world, patterns, arguments.timeout, arguments.case_timeout)
    if wants_failures:
        outcomes += failures.run(arguments.world)
    print(harness.table(outcomes, arguments.world), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps([dataclasses.asdict(outcome) for outcome in outcomes], indent=1))
    return 0 if all(outcome.state == "passed" for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
