"""``arfusion explain``: run somebody's script with the pass on, then print what it did to each all-reduce."""

from __future__ import annotations

import contextlib
import json
import os
import runpy
import signal
import sys
import traceback

import torch

from arfusion_pass.reporting.reports import Reports


def run_script(script: str, arguments: list[str], *, as_json: bool = False, dump: str | None = None) -> int:
    """Run ``script`` as ``python script arguments...`` would, with everything that it compiles fused.

    The report is printed by rank 0 (by the environment's ``RANK``), also when the script fails or is interrupted.

    Args:
        script: path of a Python file; runs as ``__main__``.
        arguments: its command line.
        as_json: print JSON instead of the table.
        dump: folder for :func:`arfusion_pass.inspection.debug_dump`, or None.

    Returns:
        the script's exit status; 1 if it raised, 130 if it was interrupted (Ctrl-C).
    """
    import arfusion_pass as arf

    known = len(arf.reports())
    argv, path = sys.argv, list(sys.path)
    sys.argv = [script, *arguments]
    sys.path.insert(0, os.path.dirname(os.path.abspath(script)))
    status = 0
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch._inductor.config.patch(fx_graph_cache=False))
            if dump is not None:
                stack.enter_context(arf.inspection.debug_dump(dump))
            stack.enter_context(arf.enable())
            runpy.run_path(script, run_name="__main__")
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
    except KeyboardInterrupt:
        status = 128 + signal.SIGINT
    except Exception:
        traceback.print_exc()
        status = 1
    finally:
        sys.argv, sys.path[:] = argv, path
    if os.environ.get("RANK", "0") == "0":
        reports = Reports(arf.reports()[known:])
        print(json.dumps([report.to_dict() for report in reports], indent=2) if as_json else reports)
    return status
