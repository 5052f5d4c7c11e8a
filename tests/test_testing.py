"""``arf.testing``: what engines' and models' tests use; and the settings and hints that reach the user first."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import arfusion_pass as arf
from arfusion_pass import testing
from arfusion_pass.ops.marks import without_mark
from arfusion_pass.ops.spec import Flags
from tests.models import Tensor, reduce

H = 32


class Layer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(H))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        total = x + reduce(x * 2)
        return F.rms_norm(total, (H,), self.weight, 1e-6), total


def test_capture_and_assert(golden: Callable[[Path, str], None], tmp_path: Path) -> None:
    """A module on a fake group: op counts before and after, a deterministic difference, and a count that must hold."""
    captured = testing.capture(Layer(), torch.ones(4, H))
    testing.assert_fused(captured.reports, 1, pattern="AllReduceFusedAddRMSNorm")
    assert captured.before["_c10d_functional.all_reduce.default"] == 1
    assert captured.after["_c10d_functional.all_reduce.default"] == 0
    assert captured.after["arfusion.allreduce_rms_norm.default"] == 1
    assert captured.result[0].shape == (4, H)
    assert "-  %all_reduce" in captured.diff
    assert not torch.distributed.is_initialized()
    with pytest.raises(AssertionError, match=r"1 sites are fused, expected 2[\s\S]*AllReduce fusion: 1 of 1"):
        testing.assert_fused(captured.reports, 2)
    with pytest.raises(AssertionError, match="0 sites of Other"):
        testing.assert_fused(captured.reports[0], 1, pattern="Other")
    file = tmp_path / "diff.txt"
    with pytest.raises(pytest.fail.Exception, match="--update-golden"):
        golden(file, captured.diff)
    file.write_text(captured.diff)
    golden(file, captured.diff)
    file.write_text("another\n")
    with pytest.raises(pytest.fail.Exception, match="differs"):
        golden(file, captured.diff)


def test_capture_with_settings() -> None:
    """With a config and an option of Inductor's own, on a group of another size; the call says how it is to run."""
    sizes: list[int] = []

    def model(x: Tensor) -> Tensor:
        sizes.append(torch.distributed.get_world_size())
        return F.rms_norm(reduce(x * 2), (H,), None, 1e-6)

    config = arf.FusionConfig(pdl=False, backend="reference", strategy="oneshot")
    captured = testing.capture(model, torch.ones(4, H), config=config, world=4, shape_padding=False)
    testing.assert_fused(captured.reports, 1)
    assert set(sizes) == {4}
    (call,) = re.findall(r"allreduce_rms_norm.*flags=(\d+)", captured.reports[0].after or "")
    wanted = Flags.NO_PDL | Flags.REFERENCE | Flags.ONESHOT
    assert without_mark(int(call)) == wanted


def test_missed_sites_count_unless_they_may(fusion: arf.AllReduceFusionPass) -> None:
    """The fixture fuses what the test compiles."""
    with testing.fake_group(), torch.no_grad():
        torch.compile(lambda x: reduce(x) * 2)(torch.ones(4, H))
    with pytest.raises(AssertionError, match="1 sites are missed, expected 0"):
        testing.assert_fused(fusion.reports, 0)
    testing.assert_fused(fusion.reports, 0, missed=None)
    with testing.fake_group(), pytest.raises(RuntimeError, match="initialised already"), testing.fake_group():
        pass


@pytest.mark.parametrize(
    ("text", "config"),
    [
        ("", arf.FusionConfig()),
        ('{"reassociate": true, "backend": "reference"}', arf.FusionConfig(reassociate=True, backend="reference")),
        ('{"dtypes": ["float16", "torch.bfloat16"]}', arf.FusionConfig(dtypes=(torch.float16, torch.bfloat16))),
        ('{"epsilons": [1e-6], "pdl": false}', arf.FusionConfig(epsilons=(1e-6,), pdl=False)),
    ],
)
def test_settings_from_the_environment(text: str, config: arf.FusionConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every pass that is given no config takes them; one that is given a config does not."""
    monkeypatch.setenv("ARFUSION_CONFIG", text)
    assert arf.FusionConfig.from_env() == config
    assert arf.AllReduceFusionPass().config == config
    assert arf.AllReduceFusionPass(arf.FusionConfig()).config == arf.FusionConfig()


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("reassociate=true", "no JSON object"),
        ("[1]", "no JSON object"),
        ('{"reasociate": true}', "there is no reasociate; expected an object with any of epsilons"),
        ('{"dtypes": ["int8"]}', "FusionConfig.dtypes"),
        ('{"pdl": 1}', "FusionConfig.pdl"),
    ],
)
def test_settings_that_cannot_be(text: str, complaint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARFUSION_CONFIG", text)
    with pytest.raises(ValueError, match=complaint) as caught:
        arf.AllReduceFusionPass()
    assert "ARFUSION_CONFIG" in str(caught.value)


def test_a_setting_in_the_wrong_place_is_one_line() -> None:
    with pytest.raises(ValueError, match=r"inductor_options\(FusionConfig\(reassociate=True\)\)"):
        arf.inductor_options(reassociate=True)
    with pytest.raises(ValueError, match=r"no option 'max_autotun'; close to it: max_autotune") as caught:
        arf.inductor_options(max_autotun=True)
    assert len(str(caught.value)) < 300
    assert arf.inductor_options(**{"triton.cudagraphs": False})["triton.cudagraphs"] is False


def test_a_name_that_is_nearly_right_is_told() -> None:
    with pytest.raises(AttributeError, match="did you mean reports"):
        _ = arf.report  # type: ignore[attr-defined]


@pytest.mark.skipif(torch.cuda.is_available(), reason="what is said where there is no GPU")
@pytest.mark.usefixtures("world")
def test_prepare_without_a_gpu_says_that_none_is_needed() -> None:
    with pytest.raises(ValueError, match="the CPU reference needs no workspace"):
        arf.prepare(max_token_num=8, hidden_dim=64)
    with pytest.raises(ValueError, match="the CPU reference needs no workspace"):
        arf.prepare(max_token_num=8, hidden_dim=64, device=0)
