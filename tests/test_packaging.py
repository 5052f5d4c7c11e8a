"""What is in the wheel, what an import costs, and that the documents and CI agree."""

from __future__ import annotations

import configparser
import email
import importlib
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import arfusion_pass
from arfusion_pass import cli

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.skipif(not (ROOT / "pyproject.toml").exists(), reason="needs the source tree")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel, built by the build back-end alone: no isolated environment, so no network."""
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("*.whl")
    return zipfile.ZipFile(path)


def test_wheel_holds_every_module_and_py_typed(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    package = ROOT / "arfusion_pass"
    modules = {str(path.relative_to(ROOT)) for path in package.rglob("*.py")}
    assert modules <= names
    assert "arfusion_pass/py.typed" in names


def test_wheel_holds_the_kernels(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    sources = {path.name for path in (ROOT / "kernels").iterdir() if path.suffix in (".cu", ".cuh", ".h", ".cpp")}
    assert {f"arfusion_pass/_kernels/{name}" for name in sources} <= names
    assert "arfusion_pass/_kernels/README.md" in names


def test_wheel_holds_nothing_else(wheel: zipfile.ZipFile) -> None:
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"arfusion_pass"}
    assert not [name for name in wheel.namelist() if name.endswith((".so", ".o", ".pyc"))]


def test_metadata(wheel: zipfile.ZipFile) -> None:
    (name,) = (name for name in wheel.namelist() if name.endswith("METADATA"))
    metadata = email.message_from_bytes(wheel.read(name))
    assert metadata["Version"] == arfusion_pass.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    required = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert {line.split(">")[0] for line in required} == {"click", "depyf", "jinja2", "platformdirs", "rich", "torch"}
    assert "torch>=2.11" in required, "no upper bound"
    assert set(metadata.get_all("Provides-Extra", [])) == {"bench", "docs", "flashinfer", "hf", "test"}
    assert any(item.endswith("licenses/LICENSE") for item in wheel.namelist())
    entry_points = next(item for item in wheel.namelist() if item.endswith("entry_points.txt"))
    parsed = configparser.ConfigParser()
    parsed.read_string(wheel.read(entry_points).decode())
    assert set(parsed.sections()) == {"console_scripts", "vllm.general_plugins", "sglang.srt.plugins"}
    for group in parsed.sections():
        module, function = parsed[group]["arfusion"].split(":")
        assert callable(getattr(importlib.import_module(module), function))


def test_every_public_name_resolves() -> None:
    for name in arfusion_pass.__all__:
        assert getattr(arfusion_pass, name) is not None
        assert name in dir(arfusion_pass)
    for name in arfusion_pass.inspection.__all__:
        assert getattr(arfusion_pass.inspection, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = arfusion_pass.no_such_name  # type: ignore[attr-defined]


def test_import_registers_the_ops_and_loads_no_tools() -> None:
    """Nor does it say a word where there is no NumPy, as pip leaves torch: torch would, in front of every command."""
    code = (
        "import sys; sys.modules['numpy'] = None;"
        "import arfusion_pass, torch; torch.ops.arfusion.allreduce_rms_norm.default;"
        "heavy = {'torch._inductor.compile_fx', 'rich', 'click', 'depyf', 'jinja2', 'transformers'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("module", ["graph", "inspection.replay", "cli.commands", "demo.run", "comm", "testing"])
def test_a_module_can_be_the_first_that_is_imported(module: str) -> None:
    """No module counts on another's imports: torch makes some op namespaces when their file is first imported."""
    code = f"import arfusion_pass.{module}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_readme_names_what_exists() -> None:
    text = (ROOT / "README.md").read_text()
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        compile(block, "README.md", "exec")
    names = re.findall(r"\barf\.([\w.]+)", text)
    assert names
    for name in names:
        target = arfusion_pass
        for part in name.split("."):
            target = getattr(target, part)
    for path in re.findall(r"\bexamples/\w+\.py", text):
        assert (ROOT / path).is_file()
    options = {
        option for command in cli.main.commands.values() for parameter in command.params for option in parameter.opts
    }
    others = {"--nproc-per-node", "--check", "--its-own", "--model", "--dist"}  # other programs'
    others |= {"--tensor-parallel-size", "--compilation-config"}  # vLLM's
    others |= {"--enable-torch-compile", "--flashinfer-allreduce-fusion-backend"}  # SGLang's
    assert set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text)) - others <= options


def test_ci_runs_the_command_that_the_readme_gives() -> None:
    command = "pip install '.[test]' && pytest -n auto --dist loadfile"
    assert command in (ROOT / "README.md").read_text()
    assert f'bash -c "{command}"' in (ROOT / ".ci" / "run").read_text()
