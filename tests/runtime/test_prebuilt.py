"""The wheel of built kernels: made by ``arfusion build --wheel``, found where it is installed, refused if stale."""

from __future__ import annotations

import email
import zipfile
from pathlib import Path

import pytest
from click.testing import CliRunner

from arfusion_pass.cli import doctor, main
from arfusion_pass.runtime import build, native, prebuilt
from tests.runtime.test_build import WHOLE, Fixture, fake  # noqa: F401  (a fixture)

pytest.importorskip("hatchling")


@pytest.fixture
def installed(fake: Fixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:  # noqa: F811
    """A wheel of sm_80 and sm_90a, unpacked on the path of a machine with another cache and no compiler."""
    done = CliRunner().invoke(main, ["build", "--arch", "80", "--arch", "90a", "--wheel", str(tmp_path / "dist")])
    assert done.exit_code == 0, done.output
    wheel = Path(done.stdout.strip())
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setenv("ARFUSION_CACHE_DIR", str(tmp_path / "another"))
    monkeypatch.setenv("ARFUSION_NVCC", str(tmp_path / "none"))
    monkeypatch.setenv("ARFUSION_ARCH", "90a")
    assert prebuilt.version()
    return wheel


def test_the_wheel_serves_a_machine_without_a_compiler(installed: Path, tmp_path: Path) -> None:
    """Found by name and key, on every way to the library; the doctor says which one it is."""
    path = build.library_path()
    assert path is not None
    assert path.parent == tmp_path / "site" / "arfusion_pass_kernels"
    assert path.read_bytes() == WHOLE
    assert build.is_built()
    assert build.build() == native._find_or_build() == path
    assert build.library_path("80") == path.with_name(build.library_name("80") or "")
    assert not (tmp_path / "another").exists(), "nothing is written"
    facts = doctor.collect()
    assert dict(facts.rows())["kernel library"] == f"built, {path} (arfusion-pass-kernels {prebuilt.version()})"
    assert facts.problems == ()


def test_others_may_write_where_it_is_installed(
    installed: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It is trusted as the Python beside it is; the cache is not."""
    monkeypatch.delenv("ARFUSION_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = build.library_path()
    assert path is not None
    path.parent.chmod(0o777)
    assert build.is_built()


def test_a_wheel_of_other_sources_is_refused(
    installed: Path,
    fake: Fixture,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The doctor and the error name both keys and what to do; nothing of it is loaded."""
    old = build.library_name()
    (fake.sources / "a.cu").write_text("another kernel")
    assert not build.is_built()
    (problem,) = doctor.collect().problems
    assert "built from other sources" in problem
    assert all(name.partition("-sm90a-")[2][:16] in problem for name in (old, build.library_name()))
    with pytest.raises(build.BuildError, match=r"nvcc .* not found.*built from other sources"):
        build.build()
    monkeypatch.setenv("ARFUSION_BUILD", "0")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    with pytest.raises(native.NativeUnavailableError, match=r"built from other sources.*ARFUSION_BUILD=0"):
        native._find_or_build()


def test_another_architecture_is_said(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARFUSION_ARCH", "100a")
    assert not build.is_built()
    assert "holds kernels for sm_80, sm_90a, not for sm_100a" in str(build.why_not_installed())


def test_a_damaged_library_is_not_used(installed: Path) -> None:
    path = build.library_path()
    assert path is not None
    path.write_bytes(WHOLE[:40])
    assert not build.is_built()
    assert "cut short" in doctor.collect().problems[0]
    with pytest.raises(build.BuildError, match="nvcc"):
        build.build()


def test_what_the_wheel_says_of_itself(installed: Path) -> None:
    """For this platform alone, and with the package whose sources it was built from."""
    assert "-py3-none-linux_" in installed.name
    archive = zipfile.ZipFile(installed)
    (name,) = (name for name in archive.namelist() if name.endswith("METADATA"))
    metadata = email.message_from_bytes(archive.read(name))
    assert metadata["Summary"] == "Built CUDA kernels of arfusion-pass, for sm_80, sm_90a"
    assert metadata.get_all("Requires-Dist") == [f"arfusion-pass=={metadata['Version']}"]


def test_without_hatchling_nothing_is_compiled(
    fake: Fixture,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    done = CliRunner().invoke(main, ["build", "--wheel", str(tmp_path)])
    assert done.exit_code == 1
    assert "pip install hatchling" in done.output
    assert fake.calls == []


def test_where_no_wheel_can_be_written_nothing_is_compiled(
    fake: Fixture,  # noqa: F811
    tmp_path: Path,
) -> None:
    (tmp_path / "file").touch()
    done = CliRunner().invoke(main, ["build", "--arch", "90a", "--wheel", str(tmp_path / "file" / "dist")])
    assert done.exit_code == 1
    assert f"no wheel can be written to {tmp_path / 'file' / 'dist'}: Not a directory" in done.output
    assert fake.calls == []


def test_a_library_without_a_key_goes_into_no_wheel(
    fake: Fixture,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    (tmp_path / "mine.so").write_bytes(WHOLE)
    monkeypatch.setenv("ARFUSION_LIBRARY", str(tmp_path / "mine.so"))
    done = CliRunner().invoke(main, ["build", "--wheel", str(tmp_path)])
    assert done.exit_code == 1
    assert "unset ARFUSION_LIBRARY" in done.output


def test_a_wheel_holds_four_architectures_unless_told_otherwise(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    built: list[str] = []
    monkeypatch.setattr(build, "build", lambda arch, **_: built.append(arch) or tmp_path)
    monkeypatch.setattr(prebuilt, "write_wheel", lambda libraries, folder, version: folder / "x.whl")
    done = CliRunner().invoke(main, ["build", "--wheel", str(tmp_path)])
    assert done.stdout == f"{tmp_path / 'x.whl'}\n", "the wheel alone, for scripts"
    assert built == ["80", "90a", "100a", "120a"]
