"""The workspace of the eager API: its group, its size, its lifetime; sub-groups on four gloo ranks."""

from __future__ import annotations

import copy
import datetime
import pickle
import threading
import types
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist

from arfusion_pass import comm
from arfusion_pass.groups import find_group, registered_groups, resolve_group
from arfusion_pass.runtime import agreement, c_api, native
from arfusion_pass.runtime import workspace as runtime_workspace
from tests.comm.test_patterns import BF16, FP32, values
from tests.helpers import run_ranks

HIDDEN = 256


def make(**changes: Any) -> comm.AllReduceFusionWorkspace:
    return comm.create_allreduce_fusion_workspace(
        **{"max_token_num": 16, "hidden_dim": HIDDEN, "dtype": BF16, "device": "cpu", **changes}
    )


def message(**changes: Any) -> str:
    """What a wrong workspace says."""
    try:
        make(**changes).destroy()
    except ValueError as error:
        return str(error)
    return ""


class Backend:
    """A comm_backend as FlashInfer's TorchDistBackend is: it keeps its process group."""

    def __init__(self, group: dist.ProcessGroup | None, rank: int, size: int) -> None:
        self._group, self._rank, self._size = group, rank, size

    def Get_rank(self) -> int:
        return self._rank

    def Get_size(self) -> int:
        return self._size


def sums(workspace: comm.AllReduceFusionWorkspace, tokens: int = 3, dtype: torch.dtype = BF16) -> torch.Tensor:
    x = values(dist.get_rank(), (tokens, HIDDEN), dtype)
    return comm.allreduce_fusion(x, workspace, comm.AllReduceFusionPattern.kAllReduce)


def rank_main(rank: int, world: int) -> dict[str, Any]:
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    pair = pairs[rank // 2]
    results: dict[str, Any] = {}
    with make(group=pair, world_size=2, rank=rank % 2) as first, make(group=pair) as second, make() as everyone:
        results["numbers"] = [(w.world_size, w.rank, w.tp_size, w.tp_rank) for w in (first, second, everyone)]
        results["names"] = [w.group_name for w in (first, second, everyone)]
        results["aliases"] = registered_groups()
        results["groups"] = [find_group(w.group_name) is g for w, g in ((first, pair), (everyone, dist.group.WORLD))]
        # Interleaved over sub-groups and the whole, larger than declared, other dtypes, one token, none.
        results["pair"] = [sums(first), sums(second)]
        results["world"] = sums(everyone)
        results["shapes"] = [sums(first, tokens, dtype) for tokens, dtype in ((40, BF16), (1, FP32), (0, BF16))]
        results["after"] = sums(first)
        name = first.group_name
        second.destroy()
        results["other survives"] = sums(first)
        results["reprs"] = (repr(first), repr(second))
    results["forgotten"] = find_group(name) is None
    try:
        resolve_group(name)
    except ValueError as error:
        results["op error"] = str(error)
    with make(comm_backend=Backend(pair, rank % 2, 2)) as held, make(comm_backend=Backend(None, rank, 4)) as default:
        results["comm_backend"] = (sums(held), sums(default))
    results["messages"] = [
        message(world_size=2, rank=rank % 2),
        message(group=pair, world_size=4),
        message(group=pair, rank=rank % 2 + 2),
        message(comm_backend=Backend(None, 0, 2)),
        message(group=pairs[1 - rank // 2]),
    ]
    mapping = type("Mapping", (), {"world_size": 2, "rank": rank % 2})
    mnnvl = comm.MNNVLAllReduceFusionWorkspace(mapping, 16, HIDDEN, BF16, group=pair)
    by_bytes = comm.MNNVLAllReduceFusionWorkspace(
        mapping, dtype=BF16, hidden_dim=HIDDEN, buffer_size_in_bytes=16 * HIDDEN * 2, group=pair
    )
    by_factory = make(backend="mnnvl", group=pair)
    results["mnnvl"] = [
        (isinstance(w, comm.MNNVLAllReduceFusionWorkspace), w.max_token_num, sums(w))
        for w in (mnnvl, by_bytes, by_factory)
    ]
    for workspace in (mnnvl, by_bytes, by_factory):
        workspace.destroy()
    with make(backend="reference") as one, make(backend="trtllm") as two:
        results["backends"] = (one.backend, two.backend)
        results["reference"] = (sums(one), sums(two))
    return results


@pytest.fixture(scope="module")
def results() -> list[dict[str, Any]]:
    return run_ranks(4, rank_main)


def expected(ranks: tuple[int, ...], tokens: int = 3, dtype: torch.dtype = BF16) -> torch.Tensor:
    """The sum in rank order, in fp32."""
    total = torch.zeros(tokens, HIDDEN)
    for rank in ranks:
        total = total + values(rank, (tokens, HIDDEN), dtype).float()
    return total.to(dtype)


@pytest.mark.parametrize("rank", range(4))
def test_sub_groups(results: list, rank: int) -> None:
    """Four ranks as 2 x 2: each pair sums its own, the whole sums all, interleaved on several workspaces."""
    got, pair = results[rank], (0, 1) if rank < 2 else (2, 3)
    assert got["numbers"] == [(2, rank % 2, 2, rank % 2)] * 2 + [(4, rank, 4, rank)]
    assert got["groups"] == [True, True]
    for tensor in (*got["pair"], got["after"], got["other survives"], got["comm_backend"][0]):
        assert torch.equal(tensor, expected(pair))
    for tensor in (got["world"], got["comm_backend"][1], *got["reference"]):
        assert torch.equal(tensor, expected((0, 1, 2, 3)))


def test_any_size(results: list) -> None:
    """One workspace serves more tokens than it was made for, another dtype, one token and none."""
    for tensor, (tokens, dtype) in zip(results[0]["shapes"], ((40, BF16), (1, FP32), (0, BF16)), strict=True):
        assert torch.equal(tensor, expected((0, 1), tokens, dtype))


def test_names(results: list) -> None:
    """A workspace has its own name, the same on all its ranks, gone after destroy, and no alias of the group."""
    assert len(set(results[0]["names"])) == 3
    assert results[0]["names"] == results[1]["names"]
    assert all(result["aliases"] == {} for result in results)
    assert all(result["forgotten"] for result in results)
    assert "no process group is called 'arfusion.comm/" in results[0]["op error"]
    assert "rank 0 of 2, 16 x 256 bfloat16, reference" in results[0]["reprs"][0]
    assert "destroyed" in results[0]["reprs"][1]


def test_group_messages(results: list) -> None:
    """World size, rank or comm_backend that do not fit the group; a group that this rank is not in."""
    size, other_size, other_rank, backend, foreign = results[0]["messages"]
    assert "world_size=2, but in process group" in size
    assert "it is 4; for a sub-group pass group=" in size
    assert "world_size=4, but in process group" in other_size
    assert "rank=2, but in process group" in other_rank
    assert "world_size=2, but in process group" in backend
    assert "group must be a torch.distributed.ProcessGroup of this rank" in foreign


def test_mnnvl_workspace(results: list) -> None:
    """FlashInfer's MNNVL constructor (a mapping with a size or bytes) and backend='mnnvl' give the same thing."""
    for is_mnnvl, tokens, tensor in results[1]["mnnvl"]:
        assert is_mnnvl
        assert tokens == 16
        assert torch.equal(tensor, expected((0, 1)))


def test_backend_names(results: list) -> None:
    """Without CUDA the reference runs, whatever name of FlashInfer's was asked for."""
    assert results[0]["backends"] == ("reference", "reference")


def test_is_buffer_size_sufficient() -> None:
    """Bytes count, not shapes; another world does not fit; the strategy makes no difference."""
    with make(world_size=1) as workspace:
        fits = workspace.is_buffer_size_sufficient
        assert fits(1, 16, HIDDEN, BF16)
        assert fits(1, 32, HIDDEN // 2, BF16)
        assert fits(1, 8, HIDDEN, FP32, use_oneshot=True)
        assert not fits(1, 17, HIDDEN, BF16)
        assert not fits(1, 9, HIDDEN, FP32)
        assert not fits(2, 16, HIDDEN, BF16)
    mapping = type("Mapping", (), {"tp_size": 1, "tp_rank": 0})
    workspace = comm.MNNVLAllReduceFusionWorkspace(mapping, 16, HIDDEN, BF16, device="cpu")
    assert workspace.is_buffer_size_sufficient(1, 16, HIDDEN, BF16, comm.MNNVLAllreduceFusionStrategy.ONESHOT)
    assert not workspace.is_buffer_size_sufficient(1, 17, HIDDEN, BF16)
    assert workspace.get_required_buffer_size_bytes(1, 16, HIDDEN, BF16) == 16 * HIDDEN * 2
    workspace.destroy()
    for arguments in ({}, {"buffer_size_in_bytes": 1.5}):
        with pytest.raises(ValueError, match=r"max_num_tokens, hidden_dim and dtype, or|must be an integer, got 1\.5"):
            comm.MNNVLAllReduceFusionWorkspace(mapping, **arguments)
    with pytest.raises(ValueError, match="mapping must have tp_size and tp_rank"):
        comm.MNNVLAllReduceFusionWorkspace(object(), 16, HIDDEN, BF16)


def test_float_scale_is_no_tensor() -> None:
    """A float scale travels as a number: no host-to-device copy, so a captured graph may hold it."""
    seen: list[Any] = []
    x, gamma = torch.ones(2, HIDDEN, dtype=BF16), torch.ones(HIDDEN, dtype=BF16)

    class Spy(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append((str(func), args))
            return func(*args, **(kwargs or {}))

    with make(world_size=1) as workspace, Spy():
        comm.allreduce_fusion(x, workspace, 2, residual_in=x, rms_gamma=gamma, scale_factor=0.5)
    names = [name for name, _ in seen]
    assert "arfusion.allreduce_rms_norm.default" in names
    before = names[: names.index("arfusion.allreduce_rms_norm.default")]
    assert [name for name in before if name != "aten.view.default"] == ["aten.empty.memory_format"]  # quant_out
    args = next(args for name, args in seen if name.startswith("arfusion"))
    assert args[3] is None  # scale
    assert args[10] == 0.5  # scale_value


def test_one_rank_has_no_name() -> None:
    """A world of one rank communicates with nobody, and needs no torch.distributed."""
    with make(world_size=1) as workspace:
        assert workspace.group_name == ""
        assert workspace.group is None
        assert torch.equal(comm.allreduce_fusion(torch.ones(2, 8), workspace, 0), torch.ones(2, 8))


@pytest.mark.parametrize("dynamic", [False, True])
def test_traces_in_one_graph(dynamic: bool) -> None:
    """The eager call inside ``torch.compile(fullgraph=True)``: one graph, one fused op, the same bits, no warning."""
    x, gamma = values(1, (4, HIDDEN), BF16), values(2, (HIDDEN,), BF16)

    def layer(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        codes = torch.empty_like(x, dtype=torch.float8_e4m3fn)
        norm = comm.allreduce_fusion(x * 2, workspace, 4, quant_out=codes, residual_in=x, rms_gamma=gamma, **options)
        return norm + 1, codes.view(torch.uint8)

    options: dict[str, Any] = {"scale_factor": 0.5, "use_oneshot": True}
    torch._dynamo.reset()
    with make(world_size=1) as workspace, warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*Dynamo.*")
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=dynamic)(x)
        for got, wanted in zip(compiled, layer(x), strict=True):
            assert torch.equal(got, wanted)


def test_symmetric_memory_is_allocated_aside_and_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not in the thread of the first call, whose allocations may be a CUDA graph's (``mode="reduce-overhead"``); what
    goes wrong there is the call's error. One thread of the process logs what kernels report."""
    threads: list[threading.Thread] = []
    watching: list[object] = []

    class Watchdog:
        def __init__(self) -> None:
            watching.append(self)

        def stop(self) -> None:
            pass

    def allocate(made: Any, everyone: Any) -> None:
        threads.append(threading.current_thread())
        if len(threads) > 1:
            raise RuntimeError("no memory")

    made = types.SimpleNamespace(
        name="tp",
        decision=agreement.Decision(agreement.Backend.NATIVE, ""),
        group=None,
        bytes=1 << 20,
        tensor=None,
        device=0,
    )
    for name, stand_in in {
        "_workspaces": {},
        "_allocate": allocate,
        "_agree": lambda *given: (made, []),
        "_tell": lambda workspace: None,
        "find_group": lambda name: None,
        "resolve_group": lambda name: types.SimpleNamespace(size=lambda: 2),
        "_size": lambda *given: 1 << 20,
        "_watchdog": None,
        "Watchdog": Watchdog,
    }.items():
        monkeypatch.setattr(runtime_workspace, name, stand_in)
    monkeypatch.setattr(native, "try_load", lambda: types.SimpleNamespace())
    devices: list[int] = []
    monkeypatch.setattr(torch.cuda, "set_device", devices.append)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert runtime_workspace.on_first_use("tp", 3, 1, HIDDEN, 0) is made
    runtime_workspace._watch()
    assert threads[0] is not threading.current_thread()
    assert len(watching) == 1
    assert devices == [3]
    runtime_workspace._workspaces.clear()
    with pytest.raises(RuntimeError, match="no memory"):
        runtime_workspace.on_first_use("tp", 0, 1, HIDDEN, 0)


@pytest.mark.parametrize("kind", [runtime_workspace.ExchangeTimeout, runtime_workspace.ExchangeOverlap])
def test_an_error_travels_between_processes(kind: type[runtime_workspace.ExchangeError]) -> None:
    """Pickled and copied it says the same: one that could not be read would hide what a worker died of."""
    error = kind("tp:0", c_api.ErrorRecord(state=1, rank=1, peer=3, op=0, generation=7, strategy=1, token=2))
    for again in (pickle.loads(pickle.dumps(error)), copy.deepcopy(error)):
        assert type(again) is kind
        assert str(again) == str(error)
        assert vars(again) == vars(error)
        assert (again.group, again.rank, again.generation) == ("tp:0", 1, 7)


def test_two_groups_that_wait_for_each_others_ctas_are_told_what_may_have_happened(monkeypatch) -> None:
    """Graphs of two groups on two streams are not seen from the host: the error of a wait names the group beside it."""
    made = {
        name: runtime_workspace.Workspace(name, None, device, None)
        for name, device in (("tp", 0), ("ep", 0), ("dp", 1))
    }
    record = c_api.ErrorRecord(state=1, rank=0, peer=1, op=0, generation=7, strategy=1, token=2)
    overlapped = c_api.ErrorRecord(state=c_api.RecordState.OVERLAPPED, rank=0, op=0, generation=7)
    waiting = {"tp", "dp"}
    monkeypatch.setattr(runtime_workspace, "_workspaces", {(name, each.device): each for name, each in made.items()})
    monkeypatch.setattr(runtime_workspace, "_expired", lambda each: record if each.name in waiting else None)
    with pytest.raises(runtime_workspace.ExchangeTimeout) as alone:
        runtime_workspace.check()
    waiting.add("ep")
    with pytest.raises(runtime_workspace.ExchangeTimeout, match="So waited group 'ep' on this GPU") as both:
        runtime_workspace.check()
    assert "max_ctas" in str(both.value)
    assert "max_ctas" not in str(alone.value)
    monkeypatch.setattr(runtime_workspace, "_expired", lambda each: overlapped if each.name == "ep" else record)
    with pytest.raises(runtime_workspace.ExchangeTimeout) as beside_an_overlap:
        runtime_workspace.check()
    assert str(beside_an_overlap.value) == str(alone.value)


def test_a_watchdog_reports_each_workspace_and_outlives_its_callback(monkeypatch, caplog) -> None:
    """The second workspace of a group lies where the first did, and its error counts as well. What a callback raises
    is logged, and ends nothing."""
    record = c_api.ErrorRecord(state=1, rank=0, peer=1, op=0, generation=7, strategy=1, token=2)
    monkeypatch.setattr(runtime_workspace, "_expired", lambda each: record)
    seen = threading.Semaphore(0)

    def report(error: runtime_workspace.ExchangeError) -> None:
        seen.release()
        raise KeyError("of the callback")

    def fail_once() -> None:
        made = runtime_workspace.Workspace("tp", None, 0, None)
        monkeypatch.setattr(runtime_workspace, "_workspaces", {("tp", 0): made})
        assert seen.acquire(timeout=60)
        monkeypatch.setattr(runtime_workspace, "_workspaces", {})

    with runtime_workspace.Watchdog(0.001, report):
        for _ in range(3):  # memory that was freed is taken again
            fail_once()
    assert not seen.acquire(blocking=False), "each once"
    assert sum("on_error failed on group 'tp'" in line for line in caplog.messages) == 3


def test_a_timeout_reaches_a_workspace_that_was_made_before(monkeypatch) -> None:
    """``prepare(timeout=...)`` counts for a group whose first call has made its workspace."""
    native_ = agreement.Decision(agreement.Backend.NATIVE, "")
    made = runtime_workspace.Workspace("tp", None, 0, native_, bytes=1 << 20)
    calls: list[tuple[object, ...]] = []
    monkeypatch.setattr(runtime_workspace, "_names", lambda group: ["tp"])
    monkeypatch.setattr(runtime_workspace, "_device_index", lambda device: 0)
    monkeypatch.setattr(runtime_workspace, "_prepare", lambda *given: made)
    monkeypatch.setattr(native, "load", lambda: None)
    monkeypatch.setattr(c_api, "check", lambda library, *given: calls.append(given))
    assert runtime_workspace.prepare("tp", timeout=datetime.timedelta(seconds=2)) is made
    assert calls == [("arf_set_timeout", b"tp", 0, 2_000_000_000)]
    assert made.timeout == datetime.timedelta(seconds=2)
    with pytest.raises(ValueError, match="timeout must be positive"):
        runtime_workspace.prepare("tp", timeout=datetime.timedelta(0))
