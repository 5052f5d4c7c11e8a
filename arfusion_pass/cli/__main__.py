"""``python -m arfusion_pass.cli``: the same as ``arfusion``."""

from arfusion_pass.cli.commands import main

main(prog_name="arfusion")
