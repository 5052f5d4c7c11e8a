"""Agreeing on a backend: the rule itself, and the exchange between real gloo ranks (no GPU)."""

import dataclasses
import datetime
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist
import torch.multiprocessing as mp

from arfusion_pass.runtime import agreement
from arfusion_pass.runtime.agreement import Backend, Facts, decide

FACTS = [Facts(host="h", device=f"GPU-{rank}", capability="9.0") for rank in range(4)]


def test_one_host_with_p2p_is_native():
    assert decide(FACTS).backend is Backend.NATIVE


@pytest.mark.parametrize(
    ("rank", "change", "backend", "reason"),
    [
        (1, {"host": "other"}, Backend.FALLBACK, "2 hosts"),
        (2, {"unreachable": ("GPU-0",)}, Backend.FALLBACK, "rank 2 cannot access that of rank 0"),
        (2, {"unreachable": ("GPU-9",)}, Backend.NATIVE, "P2P"),
        (3, {"device": "GPU-0"}, Backend.FALLBACK, "share a GPU"),
        (3, {"capability": "10.0"}, Backend.FALLBACK, "compute capabilities"),
        (1, {"library": "no nvcc"}, Backend.FALLBACK, "rank 1 has no kernel library: no nvcc"),
    ],
)
def test_what_stands_in_the_way(rank, change, backend, reason):
    everyone = [dataclasses.replace(facts, **change) if r == rank else facts for r, facts in enumerate(FACTS)]
    decision = decide(everyone)
    assert decision.backend is backend
    assert reason in decision.reason


def test_more_than_eight_ranks():
    everyone = [dataclasses.replace(FACTS[0], device=f"GPU-{rank}") for rank in range(9)]
    assert decide(everyone).backend is Backend.FALLBACK


def test_no_library_anywhere_is_the_reference():
    assert decide([dataclasses.replace(facts, library="no nvcc") for facts in FACTS]).backend is Backend.REFERENCE


def test_facts_survive_the_store():
    facts = Facts("h", "GPU-0", "9.0", ("GPU-1",), None, 1 << 27, ((2, 0, 100), (2, 4096, 200)))
    assert Facts.from_json(facts.to_json()) == facts


def _ranks(rank: int, world: int, file: str) -> None:
    timeout = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world, timeout=timeout)
    group = dist.group.WORLD
    assert agreement.group_timeout(group) == timeout
    for _ in range(3):  # rounds do not mix
        assert agreement.exchange(group, "tp:0", {"rank": rank}) == [{"rank": r} for r in range(world)]
    sub = dist.new_group([0, 1])
    if rank < 2:
        assert agreement.exchange(sub, "tp:0", rank) == [0, 1]
    dist.barrier()
    if rank == 0:  # nobody else comes: bounded, and the missing rank is named
        with pytest.raises(
            RuntimeError,
            match="rank 1 of group 'late' did not answer rank 0, which is setting up its workspace, within 1 s",
        ):
            agreement.exchange(group, "late", 0, datetime.timedelta(seconds=1))
    dist.barrier()
    dist.destroy_process_group()


def test_exchange_over_gloo(tmp_path):
    mp.spawn(_ranks, args=(3, str(tmp_path / "store")), nprocs=3)


def test_a_world_of_one_asks_nobody(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        assert agreement.exchange(dist.group.WORLD, "tp:0", 7) == [7]
    finally:
        dist.destroy_process_group()


class _Group:
    """What an exchange asks of a process group of two ranks."""

    def __init__(self, rank: int) -> None:
        self.rank, self.size = lambda: rank, lambda: 2
        self.number = rank


def test_a_world_made_anew_hears_nothing_of_the_one_before_it(monkeypatch):
    """torchrun's store outlives the groups: the next world has the same names, and its rounds begin at one again."""
    store, limit = dist.HashStore(), datetime.timedelta(seconds=20)
    monkeypatch.setattr(dist.distributed_c10d, "_get_process_group_store", lambda group: store)
    with ThreadPoolExecutor(2) as ranks:
        for world in ("first", "second"):
            asked = [
                ranks.submit(agreement.exchange, _Group(rank), "0/graph", world + str(rank), limit) for rank in (0, 1)
            ]
            assert [answer.result() for answer in asked] == [[f"{world}0", f"{world}1"]] * 2
    with pytest.raises(agreement.NoAnswerError, match="rank 1"):
        agreement.exchange(_Group(0), "0/graph", "third", datetime.timedelta(seconds=0.2))


def test_two_threads_exchange_in_opposite_orders(monkeypatch):
    """Contract *never stuck*: a rank's groups share one connection to the store, which a waiting thread would hold.
    Each rank begins with another group, and a second thread says what the other one waits for."""
    limit = datetime.timedelta(seconds=20)
    server = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    clients = [server, dist.TCPStore("localhost", server.port, is_master=False)]
    monkeypatch.setattr(dist.distributed_c10d, "_get_process_group_store", lambda group: clients[group.number])
    with ThreadPoolExecutor(4) as threads:
        asked = []
        for rank, name in ((0, "a"), (1, "b"), (0, "b"), (1, "a")):
            asked.append(threads.submit(agreement.exchange, _Group(rank), f"{name}/graph", rank, limit))
            time.sleep(0.3)
        assert [answer.result() for answer in asked] == [[0, 1]] * 4


def test_a_thread_keeps_its_connection(monkeypatch):
    """Two threads that exchange time after time connect once each: a connection may cost a look-up of names."""
    made = []

    class Store:
        def __init__(self, store: dist.Store) -> None:
            self.store = store

        def clone(self) -> dist.Store:
            made.append(threading.get_ident())
            return self.store

    store = Store(dist.HashStore())
    monkeypatch.setattr(dist.distributed_c10d, "_get_process_group_store", lambda group: store)
    groups = [_Group(0), _Group(1)]
    with ThreadPoolExecutor(2) as ranks:
        for number in range(5):
            asked = [ranks.submit(agreement.exchange, group, "0/graph", number) for group in groups]
            assert [answer.result() for answer in asked] == [[number] * 2] * 2
    assert len(made) <= len(groups) * len(set(made))
