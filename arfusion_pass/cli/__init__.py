"""The command line, ``arfusion``: one module a command that is more than a call."""

from arfusion_pass.cli.commands import main as main
