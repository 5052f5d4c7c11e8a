"""The build cache with stand-in compilers: keys, locking, errors, atomicity; no nvcc, GPU or kernels needed."""

import os
import stat
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from arfusion_pass.runtime import build as build_module
from arfusion_pass.runtime.build import BuildError, build, build_key, library_path, locked, normalise_arch

# A compiler that writes its arguments to the file named after -o, and logs that it ran.
STAND_IN = """\
#!{python}
import os, sys, time
args = sys.argv[1:]
with open({log!r}, "a") as log:
    log.write(" ".join(args) + "\\n")
time.sleep({delay})
source = next((a for a in args if a.endswith((".cu", ".cpp"))), None)
if source and "#error" in open(source).read():
    print(source + "(1): error: this line is wrong")
    sys.exit(2)
with open(args[args.index("-o") + 1], "w") as out:
    out.write("built")
"""


class Fixture:
    def __init__(self, root: Path):
        self.root, self.sources, self.log = root, root / "kernels", root / "log"
        self.sources.mkdir()
        (self.sources / "a.cu").write_text("kernel a")
        (self.sources / "b.cu").write_text("kernel b, longer")
        (self.sources / "shared.cuh").write_text("header")
        (self.sources / "binding.cpp").write_text("binding")

    def compiler(self, name: str, delay: float = 0.0) -> str:
        path = self.root / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(STAND_IN.format(python=sys.executable, log=str(self.log), delay=delay))
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return str(path)

    @property
    def calls(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []


@pytest.fixture
def fake(tmp_path, monkeypatch):
    fixture = Fixture(tmp_path)
    monkeypatch.setenv("ARFUSION_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("ARFUSION_NVCC", fixture.compiler("nvcc"))
    monkeypatch.setenv("CXX", fixture.compiler("g++"))
    monkeypatch.delenv("ARFUSION_LIBRARY", raising=False)
    monkeypatch.delenv("ARFUSION_ARCH", raising=False)
    monkeypatch.setattr(build_module, "source_dir", lambda: fixture.sources)
    return fixture


def test_builds_every_unit_once_and_then_finds_it(fake):
    events = []
    path = build("90a", progress=events.append)
    assert path.read_text() == "built"
    assert len(fake.calls) == 4, "two .cu files, one .cpp file, one link"
    assert [event.done for event in events] == [1, 2, 3, 4]
    assert events[-1].name == "link"
    assert any("arch=compute_90a,code=sm_90a" in call for call in fake.calls)
    assert any("-DTORCH_TARGET_VERSION=0x020b000000000000" in call for call in fake.calls if "binding.cpp" in call)
    assert build("sm_90a") == path
    assert len(fake.calls) == 4
    assert build("90a", force=True, progress=events.append) == path
    assert len(fake.calls) == 8
    assert sorted(entry.suffix for entry in path.parent.iterdir()) == [".lock", ".so"], "nothing is left behind"


def test_key_follows_sources_flags_and_architecture(fake, monkeypatch):
    key = build_key(fake.sources, "90a")
    assert key == build_key(fake.sources, "90a") != build_key(fake.sources, "80")
    (fake.sources / "shared.cuh").write_text("another header")
    changed = build_key(fake.sources, "90a")
    assert changed != key
    (fake.sources / "README.md").write_text("not a source")
    (fake.sources / "tests").mkdir()
    (fake.sources / "tests" / "simulate.cu").write_text("not part of the library")
    assert build_key(fake.sources, "90a") == changed
    monkeypatch.setattr(build_module, "TORCH_TARGET", "0x0300000000000000")
    assert build_key(fake.sources, "90a") != changed


def test_compiler_error_carries_command_and_output(fake):
    (fake.sources / "b.cu").write_text("#error")
    with pytest.raises(BuildError, match=r"b\.cu\(1\): error: this line is wrong") as caught:
        build("90a")
    assert "-c" in str(caught.value)
    assert "exit status 2" in str(caught.value)
    assert not build_module.is_built("90a")
    assert not [entry for entry in (fake.root / "cache").iterdir() if entry.is_dir()], "the work folder is removed"


def test_threads_and_processes_build_once(fake):
    os.environ["ARFUSION_NVCC"] = fake.compiler("nvcc", delay=0.3)
    script = textwrap.dedent(
        f"""
        from pathlib import Path
        from arfusion_pass.runtime import build
        build.source_dir = lambda: Path({str(fake.sources)!r})
        print(build.build("90a"))
        """
    )
    root = str(Path(build_module.__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": root}
    processes = [
        subprocess.Popen([sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE) for _ in range(3)
    ]
    outputs = {process.communicate(timeout=120)[0] for process in processes}
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert len(outputs) == 1
    assert len(fake.calls) == 4


def test_lock_is_bounded(tmp_path):
    path, held = tmp_path / "x.lock", threading.Event()

    def hold():
        with locked(path):
            held.set()
            time.sleep(0.6)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(5)
    with pytest.raises(BuildError, match="another process has held"), locked(path, timeout=0.1):
        pass
    thread.join()
    with locked(path, timeout=0.1):
        pass


def test_missing_compiler_says_what_to_do(fake, monkeypatch):
    monkeypatch.setenv("ARFUSION_NVCC", str(fake.root / "nowhere"))
    with pytest.raises(BuildError, match=r"nvcc .* not found.*ARFUSION_LIBRARY"):
        build("90a")


def test_architecture_is_needed_without_a_device(fake, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(BuildError, match="--arch"):
        build()
    monkeypatch.setenv("ARFUSION_ARCH", "9.0")
    assert build().name.startswith("libarfusion-sm90a-")


def test_no_sources(fake, monkeypatch):
    monkeypatch.setattr(build_module, "source_dir", lambda: None)
    with pytest.raises(BuildError, match="no kernel sources"):
        build("90a")


def test_prebuilt_library(fake, monkeypatch, tmp_path):
    monkeypatch.setenv("ARFUSION_LIBRARY", str(tmp_path / "none.so"))
    with pytest.raises(BuildError, match="ARFUSION_LIBRARY"):
        build()
    (tmp_path / "none.so").write_text("prebuilt")
    assert build() == library_path() == tmp_path / "none.so"
    assert fake.calls == []


def test_output_copies_the_library(fake, tmp_path):
    build("90a", output=tmp_path / "image" / "libarfusion.so")
    assert (tmp_path / "image" / "libarfusion.so").read_text() == "built"


def test_unwritable_cache(fake, monkeypatch):
    (fake.root / "file").write_text("")
    monkeypatch.setenv("ARFUSION_CACHE_DIR", str(fake.root / "file" / "cache"))
    with pytest.raises(BuildError, match="ARFUSION_CACHE_DIR"):
        build("90a")


@pytest.mark.parametrize(
    ("given", "want"), [("sm_90a", "90a"), ("9.0", "90a"), ("80", "80"), ("10.0a", "100a"), ("120", "120a")]
)
def test_architecture_spellings(given, want):
    assert normalise_arch(given) == want


@pytest.mark.parametrize("given", ["", "hopper", "75", "sm_", "90aa"])
def test_architectures_refused(given):
    with pytest.raises(ValueError, match="architecture"):
        normalise_arch(given)
