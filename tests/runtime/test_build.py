"""The build cache with stand-in compilers: keys, locking, errors, atomicity; no nvcc, GPU or kernels needed."""

import errno
import os
import signal
import stat
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from pathlib import Path

import pytest

from arfusion_pass.runtime import build as build_module
from arfusion_pass.runtime import files, native
from arfusion_pass.runtime.build import BuildError, build, build_key, library_path, normalise_arch
from arfusion_pass.runtime.files import LockError, locked

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
    out.write("\\x7fELF\\x02" + "\\0" * 59)
"""

WHOLE = b"\x7fELF\x02" + bytes(59)  # a header of a file without sections

as_root = pytest.mark.skipif(os.getuid() != 0, reason="needs to be root, to give files away")
OTHER = 54321  # a user id that nobody has


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
    assert path.read_bytes() == WHOLE
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
    with pytest.raises(LockError, match="another process has held"), locked(path, timeout=0.1):
        pass
    thread.join()
    with locked(path, timeout=0.1):
        pass


def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch):
    """Not waited for until the timeout, as if another process held the lock."""

    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", flock)
    with pytest.raises(LockError, match=r"cannot be locked.*ARFUSION_CACHE_DIR"), locked(tmp_path / "x.lock"):
        pass


@pytest.mark.parametrize(("variable", "what"), [("ARFUSION_NVCC", "nvcc"), ("CXX", r"C\+\+17 compiler")])
def test_missing_compiler_says_what_to_do(fake, monkeypatch, variable, what):
    """The variable that named it as well; a folder is no compiler."""
    for value in (fake.root / "nowhere", fake.root):
        monkeypatch.setenv(variable, str(value))
        with pytest.raises(BuildError, match=rf"{what} .*\(by {variable}={value}\) not found.*ARFUSION_LIBRARY"):
            build("90a")


def test_a_home_folder_of_nobody(fake, monkeypatch):
    for variable in ("ARFUSION_CACHE_DIR", "ARFUSION_LIBRARY"):
        with monkeypatch.context() as patch:
            patch.setenv(variable, "~nobody_is_called_so/x")
            with pytest.raises(BuildError, match=f"{variable}=~nobody_is_called_so"):
                build("90a")


def test_a_relative_cache_home_is_none(monkeypatch):
    """As the XDG specification has it: else the cache would move with the working directory."""
    monkeypatch.delenv("ARFUSION_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "cache")
    assert build_module.cache_dir().is_absolute()


def test_architecture_is_needed_without_a_device(fake, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(BuildError, match="--arch"):
        build()
    monkeypatch.setenv("ARFUSION_ARCH", "foo")
    with pytest.raises(BuildError, match=r"ARFUSION_ARCH: architecture 'foo' is not .* Correct or unset it"):
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
    (tmp_path / "none.so").write_text("cut short")
    with pytest.raises(BuildError, match="no library, or one that was cut short"):
        build()
    (tmp_path / "none.so").write_bytes(WHOLE)
    assert build() == library_path() == tmp_path / "none.so"
    assert fake.calls == []


def test_output_copies_the_library(fake, tmp_path):
    build("90a", output=tmp_path / "image" / "libarfusion.so")
    assert (tmp_path / "image" / "libarfusion.so").read_bytes() == WHOLE


def test_output_leaves_a_mapped_file_alone(fake, tmp_path):
    """A process that runs the old library keeps it: the path gets another file, and nothing else stays behind."""
    target = tmp_path / "image" / "libarfusion.so"
    target.parent.mkdir()
    target.write_bytes(b"the old one")
    with target.open("rb") as mapped:
        build("90a", output=target)
        assert mapped.read() == b"the old one"
    assert target.read_bytes() == WHOLE
    assert [entry.name for entry in target.parent.iterdir()] == ["libarfusion.so"]


def test_a_library_that_was_cut_short_is_built_anew(fake):
    path = build("90a")
    for rest in (b"", WHOLE[:40], WHOLE[:0x28] + (1000).to_bytes(8, "little") + WHOLE[0x30:]):
        path.write_bytes(rest)
        assert not build_module.is_built("90a")
        assert build("90a") == path
        assert path.read_bytes() == WHOLE
    assert files.is_whole_library(Path(sys.executable).resolve()), "a real ELF file"


def test_try_load_says_why_and_raises_nothing(fake, monkeypatch, tmp_path):
    """Contract of try_load: None, whatever the environment says; the reason names it."""
    monkeypatch.setattr(native, "_library", None)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    (tmp_path / "cut.so").write_text("cut short")
    for name, value, why in (
        ("ARFUSION_ARCH", "foo", "ARFUSION_ARCH: architecture 'foo'"),
        ("MAX_JOBS", "abc", "MAX_JOBS must be a positive integer, got 'abc'"),
        ("MAX_JOBS", "0", "MAX_JOBS must be a positive integer, got '0'"),
        ("ARFUSION_LIBRARY", str(tmp_path / "cut.so"), "no library, or one that was cut short"),
    ):
        monkeypatch.setattr(native, "_failure", None)
        with monkeypatch.context() as patch:
            patch.setenv("ARFUSION_ARCH", "90a")
            patch.setenv(name, value)
            assert native.try_load() is None
        assert why in native.failure()


def _default_cache(monkeypatch, root):
    """No cache folder named: the default one lies in ``root``."""
    monkeypatch.delenv("ARFUSION_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(root))
    return root / "arfusion"


@as_root
@pytest.mark.parametrize("whose", ["folder", "file", "link", "writable folder", "writable file"])
def test_another_users_library_is_not_loaded(fake, monkeypatch, tmp_path, whose):
    """In a default place: what another user owns, or could have written, is neither loaded nor called built."""
    folder = _default_cache(monkeypatch, tmp_path / "shared")
    folder.mkdir(parents=True)
    planted = library_path("90a")
    planted.write_bytes(WHOLE)
    if whose == "folder":
        os.chown(folder, OTHER, OTHER)
    elif whose == "file":
        os.chown(planted, OTHER, OTHER)
    elif whose == "link":
        planted.rename(tmp_path / "mine.so")
        planted.symlink_to(tmp_path / "mine.so")
        os.chown(planted, OTHER, OTHER, follow_symlinks=False)
    else:
        (folder if "folder" in whose else planted).chmod(0o777)
    assert not build_module.is_built("90a")
    why = build_module.distrust(planted)
    assert "may be written by others" in why if "writable" in whose else f"belongs to user {OTHER}" in why
    monkeypatch.setattr(native, "_library", None)
    monkeypatch.setattr(native, "_failure", None)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setenv("ARFUSION_ARCH", "90a")
    monkeypatch.setenv("ARFUSION_BUILD", "0")
    assert native.try_load() is None
    assert "Remove it, or set ARFUSION_CACHE_DIR" in native.failure()
    if whose == "folder":
        with pytest.raises(BuildError, match=f"belongs to user {OTHER}, so no library is built there"):
            build("90a")
        return
    if whose == "writable folder":  # its own, and closed: but what lies there may be anybody's, so it is looked at
        os.chown(planted, OTHER, OTHER)
    assert build("90a") == planted
    assert len(fake.calls) == 4
    assert build_module.is_built("90a")
    monkeypatch.setenv("ARFUSION_CACHE_DIR", str(folder))
    os.chown(planted, OTHER, OTHER)
    assert build_module.is_built("90a"), "what the user names is trusted as named"


@as_root
def test_without_a_home_the_folder_in_tmp_is_ones_own(fake, monkeypatch, tmp_path):
    monkeypatch.delenv("ARFUSION_CACHE_DIR")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as for an unknown user id without HOME
    path = build("90a")
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    os.chown(path.parent, OTHER, OTHER)
    with pytest.raises(BuildError, match=f"arfusion-{os.getuid()} belongs to user {OTHER}"):
        build("90a")


def test_any_umask_gives_a_library_that_is_trusted(fake, monkeypatch, tmp_path):
    _default_cache(monkeypatch, tmp_path / "own")
    before = os.umask(0)
    try:
        path = build("90a")
    finally:
        os.umask(before)
    assert build_module.is_built("90a")
    assert stat.S_IMODE(path.stat().st_mode) & 0o022 == 0


@as_root
def test_a_cache_of_two_users(fake, monkeypatch, tmp_path):
    """The lock that one user made can be held by another who may write the folder."""
    folder = tmp_path / "cache"
    path = build("90a")
    os.chmod(folder, 0o777)
    os.chmod(tmp_path, 0o755)
    lock = path.with_suffix(".lock")
    script = (
        "import os\nfrom pathlib import Path\nfrom arfusion_pass.runtime import files\n"
        f"os.setgid({OTHER}); os.setuid({OTHER})\n"
        f"with files.locked(Path({str(lock)!r}), timeout=5): print('held')\n"
    )
    for parent in tmp_path.parents:  # pytest's folders are the user's alone
        if str(parent).startswith(tempfile.gettempdir() + "/"):
            parent.chmod(parent.stat().st_mode | 0o055)
    lock.chmod(0o644)
    environment = {**os.environ, "PYTHONPATH": str(Path(build_module.__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == "held\n", done.stderr


def test_an_interrupt_starts_no_further_compiler(fake):
    """Ctrl-C during a build: the compilers that run are stopped, none follows, nothing stays in the cache."""
    for number in range(20):
        (fake.sources / f"unit{number}.cu").write_text("kernel")
    os.environ["ARFUSION_NVCC"] = fake.compiler("nvcc", delay=60)
    script = textwrap.dedent(
        f"""
        from pathlib import Path
        from arfusion_pass.runtime import build
        build.source_dir = lambda: Path({str(fake.sources)!r})
        build.build("90a")
        """
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(build_module.__file__).parents[2]), "MAX_JOBS": "2"}
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    deadline = time.monotonic() + 300
    while len(fake.calls) < 2 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    started = time.monotonic()
    process.send_signal(signal.SIGINT)
    errors = process.communicate(timeout=300)[1]
    assert time.monotonic() - started < 25, "sooner than the compilers would have ended"
    assert "KeyboardInterrupt" in errors
    assert len(fake.calls) == 2
    assert [entry.suffix for entry in (fake.root / "cache").iterdir()] == [".lock"]


def test_what_a_killed_build_left_is_removed(fake):
    path = library_path("90a")
    left = path.parent / f"build-{path.stem}-killed"
    other = path.parent / "build-libarfusion-sm80-0-running"
    left.mkdir(parents=True)
    other.mkdir()
    build("90a")
    assert not left.exists()
    assert other.exists(), "another build's"


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


@pytest.mark.parametrize("given", ["", "hopper", "75", "sm_", "90aa", "\uff19\uff10"])
def test_architectures_refused(given):
    with pytest.raises(ValueError, match="architecture"):
        normalise_arch(given)
