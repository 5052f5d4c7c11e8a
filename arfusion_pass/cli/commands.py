"""The command line: ``arfusion demo | explain | verify | doctor | build | bench``."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import click

import arfusion_pass
from arfusion_pass.cli.streams import Commands, ended_by_signals

_CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}

_KERNELS = 8
"""The largest group that the exchange kernels take; larger ones run, on NCCL."""


def _ranks(context: click.Context, parameter: click.Parameter, count: int | None) -> int | None:
    """A number of processes that this machine is asked to start, where that is sane."""
    cores = len(os.sched_getaffinity(0))
    if count is not None and count > max(cores, _KERNELS):
        raise click.BadParameter(
            f"{count} ranks are {count} processes, for {cores} cores; the kernels take groups of {_KERNELS} at most. "
            f"Give {max(cores, _KERNELS)} or fewer."
        )
    return count


@click.group(cls=Commands, context_settings=_CONTEXT)
@click.version_option(arfusion_pass.__version__)
def main() -> None:
    """Fuse all-reduce, residual add, RMSNorm and quantisation in models compiled with torch.compile."""


@main.command()
@click.option(
    "--layers", type=click.IntRange(min=1), default=2, show_default=True, help="Decoder layers; n give 2n+1 sites."
)
@click.option(
    "--hidden", type=click.IntRange(min=8), default=256, show_default=True, help="Hidden size, a multiple of 8."
)
@click.option("--tokens", type=click.IntRange(min=1), default=32, show_default=True, help="Tokens a sequence.")
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True, help="Sequences.")
@click.option(
    "--dtype",
    type=click.Choice(["bfloat16", "float16", "float32"]),
    default="bfloat16",
    show_default=True,
    help="Of weights and activations.",
)
@click.option(
    "--norm",
    type=click.Choice(["llama", "gemma", "torch"]),
    default="llama",
    show_default=True,
    help="How RMSNorm is spelled: Hugging Face Llama (two roundings), Gemma (1 + weight), nn.RMSNorm.",
)
@click.option("--epsilon", type=click.FloatRange(min=0), default=1e-6, show_default=True, help="Of the norms.")
@click.option(
    "--world", type=click.IntRange(min=2), default=2, show_default=True, callback=_ranks, help="Tensor-parallel ranks."
)
@click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    show_default=True,
    help="auto: GPUs where there is one for each rank, else the CPU.",
)
@click.option(
    "--backend",
    type=click.Choice(["auto", "native", "reference", "flashinfer"]),
    default="auto",
    show_default=True,
    help="What runs the fused calls; auto: our kernels on GPUs, the reference elsewhere.",
)
@click.option("--dynamic", is_flag=True, help="Mark token counts dynamic, and try torch.compile(dynamic=True) as well.")
@click.option("--diff/--no-diff", default=False, show_default=True, help="Print the graph before and after.")
@click.option("--html", type=click.Path(dir_okay=False, writable=True), help="Also write the diff as a page.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of weights and token ids.")
def demo(**options: object) -> None:
    """Compile a Llama-like tensor-parallel model without and with the pass, and compare.

    Starts the ranks itself. Prints the report, each fused site against its subgraph run eagerly, the whole model's
    error against a more exact one, and what a step takes. Exit status 1 if an all-reduce was missed or a result is not
    exact.
    """
    page = options["html"]
    if page is not None and not os.path.isdir(Path(str(page)).absolute().parent):
        raise click.BadParameter(f"there is no folder {Path(str(page)).absolute().parent}", param_hint="--html")
    from arfusion_pass.demo.run import Options
    from arfusion_pass.demo.run import main as run

    if options["hidden"] % 8:  # type: ignore[operator]
        raise click.BadParameter(f"{options['hidden']} is no multiple of 8", param_hint="--hidden")
    try:
        with ended_by_signals():
            status = run(Options(**options))  # type: ignore[arg-type]
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    sys.exit(status)


@main.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.option(
    "-n",
    "--nproc",
    type=click.IntRange(min=1),
    callback=_ranks,
    help="Start the script on this many ranks, as torchrun does.",
)
@click.option(
    "--json", "as_json", is_flag=True, help="The report as JSON, alone on stdout; the script's goes to stderr."
)
@click.option("-o", "--output", type=click.Path(dir_okay=False), help="Write the report to this file, not to stdout.")
@click.option("--fail-on-missed", is_flag=True, help="Exit status 3 if an all-reduce was missed or none was fused.")
@click.option("--dump", type=click.Path(file_okay=False), help="Also write graphs, a diff page and depyf's dump there.")
@click.option("--verdict", type=click.Path(dir_okay=False), hidden=True)
@click.argument("script", type=click.Path(exists=True, dir_okay=False))
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def explain(
    nproc: int | None,
    as_json: bool,
    output: str | None,
    fail_on_missed: bool,
    dump: str | None,
    verdict: str | None,
    script: str,
    arguments: tuple[str, ...],
) -> None:
    """Run SCRIPT with the pass on and print why each all-reduce was fused or not.

    ARGUMENTS go to the script. Everything that it compiles is fused; Inductor's caches are off, so that every graph
    is seen. Under torchrun, or with --nproc, rank 0 prints. The exit status is the script's own; 2 if it wants ranks
    and was given none.
    """
    if output is not None and not os.path.isdir(Path(output).absolute().parent):
        raise click.BadParameter(f"there is no folder {Path(output).absolute().parent}", param_hint="--output")
    try:
        arfusion_pass.FusionConfig.from_env()
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    if nproc is not None:
        options = [*(["--json"] if as_json else []), *(["--output", output] if output else [])]
        options += ["--dump", dump] if dump else []
        sys.exit(_on_ranks(nproc, options, fail_on_missed, [script, *arguments]))
    from arfusion_pass.cli.explain import run_script

    status = run_script(
        script,
        list(arguments),
        as_json=as_json,
        dump=dump,
        output=output,
        fail_on_missed=fail_on_missed,
        verdict=verdict,
    )
    sys.exit(status)


def _on_ranks(nproc: int, options: list[str], fail_on_missed: bool, script: list[str]) -> int:
    """``arfusion explain`` once a rank, under torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={nproc}"]
    command += ["-m", "arfusion_pass.cli", "explain", *options]
    environment = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // nproc)), **os.environ}
    with tempfile.TemporaryDirectory(prefix="arfusion-explain-") as folder:
        verdict = Path(folder) / "verdict"
        if fail_on_missed:
            command += ["--fail-on-missed", "--verdict", str(verdict)]
        with subprocess.Popen([*command, *script], env=environment) as process:
            status = _wait(process)
        return int(verdict.read_text()) if status == 0 and verdict.is_file() else status


def _wait(process: subprocess.Popen[bytes]) -> int:
    """The exit status of a child that starts others and ends them when it is told to: SIGTERM and SIGHUP, which whoever
    started this command sends to it alone, are passed on, unless they are ignored here, as under nohup."""
    signals = [each for each in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(each) is not signal.SIG_IGN]
    before = [signal.signal(each, lambda number, _: process.send_signal(number)) for each in signals]
    try:
        while True:
            try:
                return process.wait()
            except KeyboardInterrupt:
                pass  # the ranks got it as well: they print what they have and end
    finally:
        for each, handler in zip(signals, before, strict=True):
            signal.signal(each, handler)


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
@click.option("--fail-on-missed", is_flag=True, help="Exit status 3 if an all-reduce was missed.")
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
def verify(as_json: bool, fail_on_missed: bool, folder: Path) -> None:
    """Read FOLDER, which a server filled that ran with ARFUSION_DUMP=FOLDER, and say what was fused, layer by layer.

    Exit status 1 if it holds no report, nothing was fused, or the ranks disagree.
    """
    from arfusion_pass.cli.explain import MISSED
    from arfusion_pass.cli.verify import read

    try:
        verdict = read(folder)
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    if as_json:
        reports = [report.to_dict() for report in verdict.reports]
        click.echo(json.dumps({"ranks": verdict.ranks, "problems": verdict.problems, "reports": reports}, indent=2))
    else:
        click.echo(str(verdict))
    sys.exit(1 if verdict.problems else MISSED if fail_on_missed and verdict.reports.missed else 0)


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def doctor(as_json: bool) -> None:
    """Say what this machine has (torch, CUDA, links, compilers, kernels), which backend would be used, and why.

    Exit status 1 if it names a problem.
    """
    try:
        from arfusion_pass.cli.doctor import collect
    except ImportError as error:
        raise click.ClickException(f"this installation holds no native backend ({error})") from error
    facts = collect()
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(facts), indent=2))
    else:
        rows = facts.rows()
        width = max(len(name) for name, _ in rows)
        for name, value in rows:
            click.echo(f"{name:<{width}}  {value}")
    sys.exit(1 if facts.problems else 0)


@main.command()
@click.option(
    "--arch",
    "archs",
    multiple=True,
    metavar="ARCH",
    help="Such as 90a or sm_100a; repeatable. Default: this machine's GPU; of a wheel 80, 90a, 100a and 120a.",
)
@click.option("--force", is_flag=True, help="Compile even if the library is there.")
@click.option(
    "-o",
    "--output",
    type=click.Path(),
    help="Copy the library here too (for a container image: a file; with several --arch: a folder).",
)
@click.option(
    "--wheel",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="Make the wheel arfusion-pass-kernels of the libraries there, for machines without nvcc. Needs hatchling.",
)
@click.option("-v", "--verbose", is_flag=True, help="Print every compiler command.")
def build(archs: tuple[str, ...], force: bool, output: str | None, wheel: Path | None, verbose: bool) -> None:
    """Compile the CUDA kernels ahead of their first use. Needs nvcc, but no GPU where --arch is given."""
    try:
        from arfusion_pass.runtime import prebuilt
        from arfusion_pass.runtime.build import BuildError
        from arfusion_pass.runtime.build import build as build_library
    except ImportError as error:
        raise click.ClickException(f"this installation holds no native backend ({error})") from error
    try:
        if wheel is not None:
            prebuilt.check_builder(wheel)
            archs = archs or prebuilt.ARCHITECTURES
        paths = []
        for arch in archs or (None,):
            target = Path(output) / f"libarfusion-sm{arch}.so" if output and len(archs) > 1 else output
            paths.append(build_library(arch, force=force, output=target, verbose=verbose))
            click.echo(str(target or paths[-1]), err=wheel is not None)
        if wheel is not None:
            click.echo(str(prebuilt.write_wheel(paths, wheel, arfusion_pass.__version__)))
    except (BuildError, prebuilt.WheelError, ValueError) as error:
        raise click.ClickException(str(error)) from error


@main.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def bench(arguments: tuple[str, ...]) -> None:
    """Measure the fused kernels on this machine's GPUs, side by side with NCCL and what else is installed.

    Runs `python -m benchmarks.bench_allreduce ARGUMENTS` in the source tree, of which alone the benchmarks are a part;
    `arfusion bench -- --help` lists its arguments. `arfusion bench site ARGUMENTS` runs `benchmarks.bench_site`: what a
    site costs between two GEMMs. Exit status 1, and no result is written, if a rank fails.
    """
    root = Path(__file__).resolve().parents[2]
    if not (root / "benchmarks" / "bench_allreduce.py").is_file():
        raise click.ClickException(
            f"there are no benchmarks beside {Path(__file__).parents[1]}: they are part of the source tree, not of the "
            "installed package. Run `python -m arfusion_pass.cli bench` in a checkout."
        )
    site = arguments[:1] == ("site",)
    command = [sys.executable, "-m", "benchmarks.bench_site" if site else "benchmarks.bench_allreduce"]
    command += arguments[site:]
    with subprocess.Popen(command, cwd=root) as process:
        status = _wait(process)
    sys.exit(status)
