"""Inductor's caches: a second process is served without the pass, and whatever changes a rewrite changes the key."""

from __future__ import annotations

import compileall
import json
import os
import pathlib
import shutil
import subprocess
import sys
import zipfile
from typing import Any

import grimp
import pytest
import torch
import torch.distributed as dist

import arfusion_pass as arf
from arfusion_pass import cache_key, groups
from arfusion_pass.cache_key import engine_key, pass_key
from tests.simulate import fake_world

SCRIPT = pathlib.Path(__file__).parent / "cache_script.py"
PACKAGE = pathlib.Path(arf.__file__).parent
ROOT = pathlib.Path(__file__).parents[1]


def in_process(cache: pathlib.Path, package: pathlib.Path = ROOT, **settings: Any) -> dict[str, Any]:
    """Run ``cache_script.py`` in a fresh process with its own cache folder; what it printed."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join((str(package), str(ROOT))),
        "TORCHINDUCTOR_CACHE_DIR": str(cache),
        "OMP_NUM_THREADS": "1",
    }
    environment.pop("TORCHINDUCTOR_FORCE_DISABLE_CACHES", None)
    command = [sys.executable, str(SCRIPT), json.dumps(settings)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_second_process(tmp_path: pathlib.Path) -> None:
    """Contract *cached*: the second process hits both caches, never calls the pass, and gives the same bits; another
    source, config or world size misses."""
    cache = tmp_path / "cache"
    first = in_process(cache)
    assert (first["calls"], first["fused"], first["fx_hit"], first["aot_hit"]) == (1, 1, 0, 0)
    assert first["ran"] == 1
    second = in_process(cache)
    assert (second["calls"], second["fx_miss"]) == (0, 0)
    assert second["aot_hit"] == 1
    assert second["result"] == first["result"]
    assert second["ran"] == 1

    changed = tmp_path / "other"
    shutil.copytree(PACKAGE, changed / "arfusion_pass", ignore=shutil.ignore_patterns("__pycache__"))
    source = changed / "arfusion_pass" / "patterns" / "chains.py"
    source.write_text(source.read_text() + "\n# another line\n")
    for package, settings in (
        (changed, {}),
        (ROOT, {"config": {"strategy": "oneshot"}}),
        (ROOT, {"world": 3}),
    ):
        other = in_process(cache, package, **settings)
        assert (other["calls"], other["aot_hit"], other["fx_hit"]) == (1, 0, 0), (package, settings)


@pytest.mark.parametrize(
    "config",
    [
        {"epsilons": (1e-6,)},
        {"dtypes": (torch.bfloat16,)},
        {"quantisers": False},
        {"backend": "reference"},
        {"strategy": "twoshot"},
        {"pdl": False},
    ],
)
def test_config_is_part_of_the_key(config: dict[str, Any]) -> None:
    """Every setting that shapes a rewrite."""
    assert pass_key(arf.FusionConfig(**config)) != pass_key(arf.FusionConfig())
    assert pass_key(arf.FusionConfig(**config)) == pass_key(arf.FusionConfig(**config))


def test_world_is_part_of_the_key() -> None:
    """The sizes of all groups, and the names registered for them."""
    keys = []
    for world in (2, 3):
        with fake_world(world):
            keys.append(pass_key(arf.FusionConfig()))
    assert len({*keys, pass_key(arf.FusionConfig())}) == 3


def test_engine_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """The key for an engine's cache follows the sources, the config and the sizes of the engine's own groups, and stays
    when something makes a group of c10d's."""
    monkeypatch.setattr(groups, "_registered", {})
    config = arf.FusionConfig()
    with fake_world(4):
        engine = {"tp:0": dist.new_group([0, 1])}
        monkeypatch.setattr(groups, "_sources", [lambda: engine])
        before = engine_key(config)
        engine["tp:0"] = dist.new_group([0, 2, 3])
        assert engine_key(config) != before
        engine["tp:0"] = dist.new_group([0, 3])
        assert engine_key(config) == before
        assert engine_key(arf.FusionConfig(strategy="oneshot")) != before
        monkeypatch.setattr(cache_key, "source_hash", lambda: "other sources")
        assert engine_key(config) != before


def test_every_rewriting_source_counts(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Changing any source file changes the key, but for those that only show or drive things."""
    copy = tmp_path / "arfusion_pass"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(cache_key, "PACKAGE", copy)
    hashed = cache_key.source_hash.__wrapped__
    before = hashed()
    for path in sorted(copy.rglob("*.py")):
        text = path.read_text()
        path.write_text(text + "\n")
        outside = path.relative_to(copy).parts[0] in cache_key.OUTSIDE_THE_REWRITE
        assert (hashed() == before) == outside, path
        path.write_text(text)


def test_an_installation_without_sources_has_a_key_too(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An image may hold compiled files alone: another version is another key there as well."""
    monkeypatch.setattr(cache_key, "PACKAGE", tmp_path)
    keys = []
    for version in ("a = 1", "a = 12"):
        (tmp_path / "ops").mkdir(exist_ok=True)
        for name in ("ops/library.py", "publishing.py"):
            (tmp_path / name).write_text(version)
        assert compileall.compile_dir(tmp_path, legacy=True, force=True, quiet=1)
        for path in tmp_path.rglob("*.py"):
            path.unlink()
        keys.append(cache_key.source_hash.__wrapped__())
    (tmp_path / "publishing.pyc").unlink()
    assert keys[0] != keys[1] == cache_key.source_hash.__wrapped__(), "what only tells stays outside"


def test_each_folder_is_on_the_right_side() -> None:
    """The key covers what the pass imports, and nothing that it does not, but for what only tells (the report and where
    it goes, with what that imports) and the ways in (which choose its config)."""
    imports = grimp.build_graph("arfusion_pass", cache_dir=None)
    tells = {"provenance", "publishing", "reporting"}
    for name in imports.modules:
        if name.split(".")[1:2] and name.split(".")[1] in tells:
            imports.remove_module(name)
    read = {name.split(".")[1] for name in imports.find_upstream_modules("arfusion_pass.fusion_pass") if "." in name}
    outside = {name.removesuffix(".py") for name in cache_key.OUTSIDE_THE_REWRITE}
    assert not read & outside
    parts = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert parts - outside - read == {"__init__", "engines", "fusion_pass", "install"}


def test_uuid() -> None:
    """Stable between passes of one config; None (no caching) while a recorder wants to see every graph."""
    fusion = arf.AllReduceFusionPass()
    assert fusion.uuid() == arf.AllReduceFusionPass(arf.FusionConfig()).uuid()
    with arf.inspection.recording():
        assert fusion.uuid() is None
    assert fusion.uuid() is not None


def test_the_key_of_a_package_in_a_zip_file_and_of_a_frozen_one(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Contract *cached*: the zip file's is the folder's, not that of no file at all, which nothing would change; where
    there are no files to read, no other process has the key."""
    archive = pathlib.Path(shutil.make_archive(str(tmp_path / "package"), "zip", ROOT, "arfusion_pass"))
    monkeypatch.setattr(cache_key, "PACKAGE", zipfile.Path(archive, "arfusion_pass/"))
    hashed = cache_key.source_hash.__wrapped__
    assert hashed() == cache_key.source_hash()
    monkeypatch.setattr(cache_key, "PACKAGE", tmp_path / "none")
    assert hashed() != hashed()
