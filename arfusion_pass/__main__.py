"""``python -m arfusion_pass``: the same as ``arfusion``."""

from arfusion_pass.cli import main

main(prog_name="arfusion")
