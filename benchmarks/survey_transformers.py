"""Which all-reduces of transformers' causal language models fuse: every model with a tensor-parallel plan, made small.

Two layers with random weights (:mod:`tests.real_models.small`), sharded by the model's own ``tp_plan`` over two gloo
ranks and compiled up to Inductor's post-grad passes; then the graph runs as it is. By default, and where something is
left once more with ``FusionConfig(reassociate=True)``. Each fused site is replayed against the subgraph that it
replaced, and the model's logits are compared with an fp32 model's. Many models share a pair of processes; one that
breaks its pair is named, and the rest go on in another.

    python -m benchmarks.survey_transformers [MODEL_TYPE ...] [--seconds 150] [--results FOLDER] [--write]
"""

from __future__ import annotations

import argparse
import collections
import datetime
import json
import os
import platform
import re
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.helpers import run_ranks
from tests.real_models.small import model_types, sharded, small_config, token_ids

WHY_NOT = {
    "doge": "transformers 5.24's plan gives a rank half of the heads and, behind a row-wise `dt_proj`, the mask of all",
    "inkling_text": (
        "transformers 5.24's plan shards the norm inside the embedding, and the shared experts, as DTensors that meet "
        "plain tensors"
    ),
}
"""Why single models do not run by their own plan, in a sentence; of the others, the error."""

RESULTS = Path(__file__).parent / "results" / "transformers.md"


def survey(rank: int, world: int, types: list[str], results: str) -> None:
    """Models one after another on one rank; rank 0 writes what it finds of each into ``results``."""
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    known = model_types()
    for model_type in types:
        begin = time.monotonic()
        if rank == 0:
            (Path(results) / f"{model_type}.started").touch()
        try:
            config, failure = small_config(model_type), None
        except Exception as error:
            failure = f"cannot be made small: {_short(error)}"
        if failure is None:
            with tempfile.TemporaryDirectory() as own:
                folder = [own]
                dist.broadcast_object_list(folder)
                try:
                    outcome: Any = one_model(rank, config, getattr(transformers, known[model_type]), folder[0], results)
                except Exception as error:  # on one rank alone the pair breaks, and the caller goes on without this one
                    traceback.print_exc()
                    outcome = _short(error)
                dist.barrier()
        else:
            outcome = failure
        if rank == 0:
            print(f"{model_type}: {time.monotonic() - begin:.0f} s", flush=True)
            (Path(results) / f"{model_type}.json").write_text(json.dumps(outcome))


def one_model(rank: int, config: Any, model_class: Any, folder: str, results: str) -> dict[str, Any]:
    """What becomes of one model's all-reduces."""
    import arfusion_pass as arf
    from arfusion_pass.inspection import replay
    from tests import post_grad

    exact, model = sharded(rank, model_class, config, folder)
    ids = token_ids(config)

    def error(logits: torch.Tensor) -> float:
        return (logits.float() - wanted).norm().item() / wanted.norm().item()

    def compiled(**settings: bool) -> dict[str, Any]:
        torch._dynamo.reset()
        with replay.recording() as recorder:
            fusion = arf.AllReduceFusionPass(arf.FusionConfig(raise_errors=True, **settings))
            logits = post_grad.compiled(lambda ids: model(ids, use_cache=False).logits, fusion)(ids)
        sites = [site for report in recorder.reports for site in report.sites]
        if rank == 0 and not settings:
            for number, report in enumerate(recorder.reports):
                (Path(results) / f"{config.model_type}.{number}.graph").write_text(report.before or "")
        return {
            "sites": len(sites),
            "fused": sum(site.fused for site in sites),
            "reasons": [str(site.reason) for site in sites if not site.fused],
            "notes": [report.note for report in recorder.reports if report.note],
            "inexact": [check.detail for check in recorder.checks() if not check.ok],
            "error": error(logits),
        }

    with torch.no_grad():
        wanted = exact(ids, use_cache=False).logits
        result = {"unfused": error(model(ids, use_cache=False).logits), "default": compiled(), "moved": None}
        if result["default"]["reasons"]:  # type: ignore[index]
            result["moved"] = compiled(reassociate=True)
    return result


def _short(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return f"{type(error).__name__}: {lines[-1][:110]}".replace("|", "/")


def run_all(types: list[str], results: Path, seconds: float) -> None:
    """Every model that has no result yet; a pair of processes for as many as it survives."""
    waiting = [name for name in types if not (results / f"{name}.json").exists()]
    while waiting:
        try:
            run_ranks(2, survey, waiting, str(results), timeout=seconds * len(waiting))
        except (RuntimeError, TimeoutError) as error:
            begun = [name for name in waiting if (results / f"{name}.started").exists()]
            broken = [name for name in begun if not (results / f"{name}.json").exists()]
            for name in broken or waiting[:1]:
                (results / f"{name}.json").write_text(json.dumps(f"its processes broke: {_short(error)}"))
        waiting = [name for name in waiting if not (results / f"{name}.json").exists()]


def reason_kind(reason: str) -> str:
    """A reason in a few words."""
    step = re.search(r"[(]\w+[.](\w+)[.\w]*[)] stands between", reason)
    if step is not None:
        return f"{step[1]} in front"
    kinds = {"is fused with": "sum of two, one fused", "throughout": "norm in 16 bits", "one head": "norm of heads"}
    kinds |= {"rounds the sum": "sum rounded", "no RMSNorm": "no RMSNorm follows", "epsilon is": "epsilon no number"}
    kinds |= {
        "sums between": "several sums in front",
        "an L2 norm": "L2 norm",
        "nobody reads": "not read",
        "LayerNorm": "LayerNorm",
        "known RMSNorm": "another norm",
    }
    return next((kind for words, kind in kinds.items() if words in reason), reason[:60])


def row(model_type: str, outcome: dict[str, Any] | str) -> str:
    """One line of the table."""
    if isinstance(outcome, str):
        return f"| {model_type} | not run: {WHY_NOT.get(model_type, outcome)} | | | | |"
    default, moved = outcome["default"], outcome["moved"]
    kinds = collections.Counter(map(reason_kind, default["reasons"]))
    left = ", ".join(f"{count} x {kind}" for kind, count in kinds.items())
    left = left or "; ".join(note.replace("|", "/")[:80] for note in default["notes"])
    runs = [default] if moved is None else [default, moved]
    exact = "yes" if not any(run["inexact"] for run in runs) else "NO"
    errors = " / ".join(f"{run['error'] / outcome['unfused']:.2f}" for run in runs)
    with_setting = "" if moved is None else f"{moved['fused']} of {moved['sites']}"
    return f"| {model_type} | {default['fused']} of {default['sites']} | {with_setting} | {exact} | {errors} | {left} |"


def table(types: list[str], results: Path) -> str:
    """The page of results."""
    import transformers

    outcomes = {name: json.loads((results / f"{name}.json").read_text()) for name in types}
    ran = {name: outcome for name, outcome in outcomes.items() if not isinstance(outcome, str)}
    default = [outcome["default"] for outcome in ran.values()]
    best = [outcome["moved"] or outcome["default"] for outcome in ran.values()]
    return (
        "# transformers' causal language models\n\n"
        f"{datetime.date.today()}, {os.cpu_count()} CPU cores, torch {torch.__version__}, transformers "
        f"{transformers.__version__}, Python {platform.python_version()}; `python -m benchmarks.survey_transformers`. "
        f"{len(ran)} of the {len(types)} models asked for ran; transformers has {len(model_types())} with a plan.\n\n"
        f"Fused by default: {sum(run['fused'] for run in default)} of {sum(run['sites'] for run in default)} "
        f"all-reduces; with `reassociate`: {sum(run['fused'] for run in best)} of "
        f"{sum(run['sites'] for run in best)} (an all-reduce that is merged into another one counts as fused).\n\n"
        "*exact*: every fused site equals its subgraph within the *exact* contract. *error*: the fused model's "
        "distance from an fp32 model over the unfused eager one's, by default and with the setting.\n\n"
        "| model | fused | with `reassociate` | exact | error | left alone by default |\n"
        "| --- | --- | --- | --- | --- | --- |\n"
        + "\n".join(row(name, outcome) for name, outcome in outcomes.items())
        + "\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("types", nargs="*", metavar="MODEL_TYPE", help="default: all")
    parser.add_argument("--seconds", type=float, default=150, help="for one model")
    parser.add_argument("--results", type=Path, help="a folder that keeps each model's, to go on from")
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.relative_to(RESULTS.parents[2])}")
    arguments = parser.parse_args()
    types = arguments.types or list(model_types())
    with tempfile.TemporaryDirectory() as folder:
        results = arguments.results or Path(folder)
        results.mkdir(parents=True, exist_ok=True)
        run_all(types, results, arguments.seconds)
        text = table(types, results)
    print(text)
    if arguments.write:
        RESULTS.write_text(text)


if __name__ == "__main__":
    main()
