"""The documents keep up with the code: every setting, every public name and every command has its place in them."""

from __future__ import annotations

import ast
import dataclasses
import json
import re
import shlex
from pathlib import Path

import pytest

import arfusion_pass as arf
from arfusion_pass.cli import main
from arfusion_pass.config import VARIABLES
from tests.test_examples import EXAMPLES

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"

pytestmark = pytest.mark.skipif(not DOCS.is_dir(), reason="needs the source tree")


def test_every_variable_is_documented() -> None:
    """Each ``ARFUSION_*`` that the package reads stands in ``settings.md`` and ``VARIABLES``; no other does."""
    source = "\n".join(path.read_text() for path in sorted((ROOT / "arfusion_pass").rglob("*.py")))
    source = re.sub(r"^VARIABLES = \(.*?^\)", "", source, flags=re.MULTILINE | re.DOTALL)
    read = set(re.findall(r"[\"'](ARFUSION_[A-Z_]+)[\"']", source))
    table = set(re.findall(r"^\| `(ARFUSION_[A-Z_]+)`", (DOCS / "settings.md").read_text(), re.MULTILINE))
    assert read == table == set(VARIABLES)


def test_every_setting_is_described() -> None:
    """Each field of ``FusionConfig`` has its line in the class's docstring, which ``settings.md`` shows."""
    assert "::: arfusion_pass.FusionConfig" in (DOCS / "settings.md").read_text()
    for field in dataclasses.fields(arf.FusionConfig):
        assert re.search(rf"^ +{field.name}: ", arf.FusionConfig.__doc__ or "", re.MULTILINE), field.name


def test_every_public_name_has_its_place() -> None:
    """In one of the pages, as ``::: arfusion_pass.<name>``; modules have pages of their own."""
    pages = "\n".join(path.read_text() for path in DOCS.glob("*.md"))
    for name in arf.__all__:
        if name not in ("comm", "inspection", "ops", "testing"):
            assert f"::: arfusion_pass.{name}\n" in pages + "\n", name


def test_every_page_is_in_the_navigation() -> None:
    """mkdocs would build a page that nobody finds."""
    navigation = (ROOT / "mkdocs.yml").read_text()
    for page in DOCS.glob("*.md"):
        assert page.name in navigation, page.name


def test_commands_and_names_in_the_pages_exist() -> None:
    """``arfusion <command>`` and ``arf.<name>`` in the pages, and Python blocks that compile."""
    for page in DOCS.glob("*.md"):
        text = page.read_text()
        for command in re.findall(r"`arfusion (\w+)", text) + re.findall(r"^arfusion (\w+)", text, re.MULTILINE):
            assert command in main.commands, (page.name, command)
        for name in re.findall(r"\barf\.(\w+)", text):
            assert getattr(arf, name) is not None, (page.name, name)
        for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
            compile(block, page.name, "exec")


def commands_of(text: str) -> list[list[str]]:
    """The commands of a page's ``sh`` blocks, in words, without their comments."""
    lines = "\n".join(re.findall(r"```sh\n(.*?)```", text, re.DOTALL)).splitlines()
    return [words for line in lines for part in line.split(" && ") if (words := shlex.split(part, comments=True))]


def test_every_command_of_the_readme_runs_in_a_test(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Examples in ``test_examples``, our commands by their own parsers here and in ``tests/cli``, installs and tests in
    ``.ci/run``; vLLM's own is read as far as that goes without vLLM."""
    monkeypatch.chdir(tmp_path)
    Path("serve.py").touch()
    found = commands_of((ROOT / "README.md").read_text())
    assert len(found) >= 10
    ci = (ROOT / ".ci" / "run").read_text()
    extras = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    for command, *arguments in found:
        if command == "torchrun":
            assert arguments[:2] == ["--nproc-per-node", "2"]
            assert " ".join(arguments[2:]).removeprefix("examples/") in EXAMPLES, arguments
        elif command == "arfusion":
            name, *options = arguments
            with main.commands[name].make_context(name, options):
                pass
            assert name in ("explain", "build") or f"arfusion {name}" in ci, name
        elif command == "vllm":
            assert json.loads(arguments[-1]) == {"pass_config": {"fuse_allreduce_rms": False}}
        elif command == "pytest":
            assert " ".join((command, *arguments)) in ci
        else:
            assert (command, arguments[0]) == ("pip", "install")
            assert set(re.findall(r"\[(\w+)\]", " ".join(arguments))) <= set(extras)


def test_every_command_has_its_row() -> None:
    """Each command stands in ``commands.md``, and each option of a row is the command's."""
    rows = re.findall(r"^\| `arfusion (\w+)[^|]*\|(.*)\|$", (DOCS / "commands.md").read_text(), re.MULTILINE)
    assert {name for name, _ in rows} == set(main.commands)
    for name, said in rows:
        options = {option for parameter in main.commands[name].params for option in parameter.opts}
        assert set(re.findall(r"(?<![\w-])--[a-z][\w-]*", said)) <= options, name


def test_links_between_documents_lead_somewhere() -> None:
    """From what is read outside of the site, whose own links mkdocs checks."""
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "benchmarks" / "README.md"):
        links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text())
        assert [link for link in links if "://" not in link and not (page.parent / link).exists()] == [], page


def test_pages_that_are_named_exist() -> None:
    """Whoever a docstring or a page sends to another page finds it in the tree."""
    there = {page.name for page in ROOT.rglob("*.md")} | {"tpN.md", "siteN.md"}
    for folder in ("arfusion_pass", "tests", "benchmarks", "examples", "docs"):
        for path in (*(ROOT / folder).rglob("*.py"), *(ROOT / folder).glob("*.md")):
            named = set(re.findall(r"\b[\w-]+\.md\b", path.read_text()))
            assert named <= there, path


TORCHS = ("Could not find schema for arfusion::", "object has no attribute 'allreduce_rms_norm'")


def test_what_troubleshooting_quotes_is_said() -> None:
    """Each quotation of its first column, between its dots, stands in a string of the package, or is torch's."""
    said = "\n".join(
        "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in getattr(node, "values", [node]))
        for path in sorted((ROOT / "arfusion_pass").rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))
    )
    rows = re.findall(r"^\| ([^|]+) \|", (DOCS / "troubleshooting.md").read_text(), re.MULTILINE)
    quoted = [part.strip() for row in rows for text in re.findall(r'"([^"]+)"', row) for part in text.split("...")]
    assert len(quoted) > 10
    assert [part for part in quoted if part not in said and part not in TORCHS] == []
