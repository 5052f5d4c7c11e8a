"""Every setting of the pass, validated when it is made and hashable, so that it can be part of a cache key."""

from __future__ import annotations

import dataclasses
import difflib
import json
import logging
import math
import os
import struct
from collections.abc import Iterable
from typing import Any, Literal

import torch

log = logging.getLogger("arfusion_pass")

Backend = Literal["auto", "native", "reference", "flashinfer"]
Strategy = Literal["auto", "oneshot", "twoshot", "sharded"]

BACKENDS: tuple[Backend, ...] = ("auto", "native", "reference", "flashinfer")
STRATEGIES: tuple[Strategy, ...] = ("auto", "oneshot", "twoshot", "sharded")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)

VARIABLES = (
    *("ARFUSION_CONFIG", "ARFUSION_LOG", "ARFUSION_DUMP", "ARFUSION_AGREEMENT", "ARFUSION_VLLM", "ARFUSION_SGLANG"),
    *("ARFUSION_VLLM_COMM", "ARFUSION_SGLANG_COMM", "ARFUSION_CACHE_DIR", "ARFUSION_LIBRARY", "ARFUSION_BUILD"),
    *("ARFUSION_ARCH", "ARFUSION_NVCC", "ARFUSION_WORKSPACE_MIB", "ARFUSION_THRESHOLDS"),
)
"""Every environment variable of the package."""
SWITCHES = (
    *("ARFUSION_AGREEMENT", "ARFUSION_BUILD", "ARFUSION_VLLM", "ARFUSION_VLLM_COMM", "ARFUSION_SGLANG"),
    "ARFUSION_SGLANG_COMM",
)
"""Those that switch something on or off."""
_TESTS = tuple(f"ARFUSION_{suite}_" for suite in ("TEST", "SOAK", "FUZZ"))


@dataclasses.dataclass(frozen=True)
class FusionConfig:
    """Settings of :class:`arfusion_pass.AllReduceFusionPass`.

    Args:
        epsilons: fuse only norms with these epsilons (compared as float32), none whose epsilon is a tensor's value;
            None: whatever a graph holds.
        dtypes: fuse only all-reduces of these dtypes; None: bf16, fp16 and fp32.
        quantisers: also fuse the quantiser that follows a norm.
        backend: what runs a fused call: ``"auto"`` (our kernels on CUDA, the reference elsewhere), ``"native"``,
            ``"reference"`` or ``"flashinfer"``.
        strategy: ``"auto"`` (by the measured tables), ``"oneshot"``, ``"twoshot"``, or ``"sharded"``: in chains of
            sites whose residual nobody else reads, each token's residual lives on one rank (elsewhere as ``"auto"``).
            Never changes a result.
        reassociate: take the linear steps between an all-reduce and a norm out of the way: factors, sums over
            leading dimensions and the sum of two all-reduces before the all-reduce, what is added in between behind
            them or into what is added next (:mod:`arfusion_pass.rewrite.reassociate`). Not bit-exact: it rounds
            elsewhere. Weights of ``[H]`` or one element, and the residual stream, are taken to be the same on all
            ranks of a group. One tensor beside the residual, and a factor of one element or of one for each row, fuse
            exactly without it; with it such a factor goes before the all-reduce where it can.
        sequence_parallel: also fuse ``reduce_scatter -> (add +) RMSNorm -> (quantise) -> all_gather``, as DTensor's
            ``SequenceParallel`` and engines' passes leave it, into one call of the kernels; in a group without peer
            access one kernel between the two collectives.
        pdl: launch with programmatic dependent launch where the GPU has it.
        raise_errors: let an unexpected error inside the pass reach the compiler instead of leaving the graph as it
            came with a note in the report. For tests.

    Raises:
        ValueError: on a setting that is not one of these.
    """

    epsilons: tuple[float, ...] | None = None
    dtypes: tuple[torch.dtype, ...] | None = None
    quantisers: bool = True
    backend: Backend = "auto"
    strategy: Strategy = "auto"
    reassociate: bool = False
    sequence_parallel: bool = True
    pdl: bool = True
    raise_errors: bool = False

    def __post_init__(self) -> None:
        if self.epsilons is not None:
            epsilons = _items("epsilons", self.epsilons)
            for epsilon in epsilons:
                number = isinstance(epsilon, (int, float)) and not isinstance(epsilon, bool)
                if not number or not math.isfinite(canonical_epsilon(epsilon)) or epsilon < 0:
                    raise ValueError(f"FusionConfig.epsilons: expected finite numbers >= 0, got {epsilon!r}")
            object.__setattr__(self, "epsilons", tuple(canonical_epsilon(epsilon) for epsilon in epsilons))
        if self.dtypes is not None:
            dtypes = _items("dtypes", self.dtypes)
            for dtype in dtypes:
                if dtype not in DTYPES:
                    raise ValueError(f"FusionConfig.dtypes: expected a subset of {DTYPES}, got {dtype!r}")
            object.__setattr__(self, "dtypes", dtypes)
        if self.backend not in BACKENDS:
            raise ValueError(f"FusionConfig.backend: expected one of {BACKENDS}, got {self.backend!r}")
        if self.strategy not in STRATEGIES:
            raise ValueError(f"FusionConfig.strategy: expected one of {STRATEGIES}, got {self.strategy!r}")
        for name in ("quantisers", "reassociate", "sequence_parallel", "pdl", "raise_errors"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"FusionConfig.{name}: expected a bool, got {getattr(self, name)!r}")

    @staticmethod
    def from_env() -> FusionConfig:
        """The settings of ``ARFUSION_CONFIG``, a JSON object with any of the fields; the defaults where it is not set.

        A pass that is given no config takes these: ``ARFUSION_CONFIG='{"quantisers": false, "dtypes": ["float16"]}'``.

        Raises:
            ValueError: where it is no such object, or a setting is not one of these.
        """
        _tell_unknown_variables()
        text = os.environ.get("ARFUSION_CONFIG", "").strip()
        if not text:
            return FusionConfig()
        try:
            given = json.loads(text)
        except ValueError as error:
            raise ValueError(f"ARFUSION_CONFIG={text}: no JSON object: {error}") from error
        names = [field.name for field in dataclasses.fields(FusionConfig)]
        unknown = sorted(set(given) - set(names)) if isinstance(given, dict) else None
        if unknown is None or unknown:
            what = f"there is no {', '.join(unknown)}" if unknown else "no JSON object"
            raise ValueError(f"ARFUSION_CONFIG={text}: {what}; expected an object with any of {', '.join(names)}")
        if isinstance(given.get("dtypes"), list):
            known = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}
            given["dtypes"] = tuple(known.get(str(name).removeprefix("torch."), name) for name in given["dtypes"])
        try:
            return FusionConfig(**given)
        except ValueError as error:
            raise ValueError(f"ARFUSION_CONFIG={text}: {error}") from error


_SWITCHES = {"0": False, "false": False, "no": False, "off": False, "1": True, "true": True, "yes": True, "on": True}
_told: set[str] = set()


def switch(variable: str, default: bool) -> bool:
    """What an environment variable says that switches something on or off; ``default`` where it is not set or empty, or
    holds what is neither, which is said once."""
    if variable not in _told and (problem := misread_switch(variable)) is not None:
        _told.add(variable)
        log.warning("arfusion: %s; %d is taken", problem, default)
    return _SWITCHES.get(os.environ.get(variable, "").strip().lower(), default)


def misread_switch(variable: str) -> str | None:
    """What is wrong with a variable that switches something, or None."""
    text = os.environ.get(variable, "").strip().lower()
    return f"{variable}={text} is none of {', '.join(_SWITCHES)}" if text and text not in _SWITCHES else None


def _tell_unknown_variables() -> None:
    """Warn, once a process, of each ``ARFUSION_*`` in the environment that is none of :data:`VARIABLES`."""
    for name in sorted(os.environ):
        if name.startswith("ARFUSION_") and name not in (*VARIABLES, *_told) and not name.startswith(_TESTS):
            _told.add(name)
            words = {known.removeprefix("ARFUSION_"): known for known in VARIABLES}
            close = difflib.get_close_matches(name.removeprefix("ARFUSION_"), words, 1)
            hint = f"; did you mean {words[close[0]]}?" if close else "; settings of the pass go into ARFUSION_CONFIG"
            log.warning("arfusion: there is no variable %s, it is ignored%s", name, hint)


def _items(field: str, value: Any) -> tuple[Any, ...]:
    """``value`` as a tuple; ``ValueError`` where it is no collection of settings."""
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise ValueError(f"FusionConfig.{field}: expected a tuple, got {value!r}")
    return tuple(value)


def canonical_epsilon(epsilon: float) -> float:
    """The float32 nearest to ``epsilon``: 1e-6 and 9.999999974752427e-07 are one epsilon. Beyond float32: infinity."""
    try:
        return float(struct.unpack("<f", struct.pack("<f", float(epsilon)))[0])
    except OverflowError:  # also of an integer that no float holds
        return math.inf if epsilon > 0 else -math.inf
