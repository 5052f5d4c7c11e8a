"""How a plug-in is started: an engine that has asked for nothing must not end because of it."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable

log = logging.getLogger("arfusion_pass")


def harmless(engine: str, start: Callable[[], object]) -> bool:
    """Call ``start``, give whether it did; what it raises is one line at ERROR (its traceback at DEBUG), and the engine
    goes on unfused.

    A server may serve without fusion. Without the line nobody would know that it does.
    """
    try:
        start()
    except Exception as error:
        why = "".join(traceback.format_exception_only(error))
        log.error("arfusion: nothing will fuse in %s: %s", engine, " ".join(why.split()))
        log.debug("arfusion: why", exc_info=True)
        return False
    return True
