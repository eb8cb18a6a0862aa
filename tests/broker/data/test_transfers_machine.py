"""Random histories of the data process: real link streams at one end, a played control process at the other.

Messages go through the real codec over a network that loses, repeats, reorders and damages; peers, the data process and
its disk fail. Blocks are 4 KiB instead of 4 MiB, so that a resume can be had with small files.
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import structlog
from fedloom.broker import incoming
from fedloom.broker.linksource import Source
from fedloom.broker.linkstreams import Download, Streams, Upload
from fedloom.broker.transfers import Transfers
from fedloom.serialization import digest
from fedloom.serialization.messages import (
    Abort,
    Chunk,
    PayloadId,
    PayloadRef,
    Put,
    Stored,
    decode,
)
from hypothesis import HealthCheck
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)
from lengths import long, short
from siblings import load

world = load(__file__, "transfers_world")
BLOCK = world.BLOCK
SOURCE = world.SOURCE
SIZES = world.SIZES
LIMITS = world.LIMITS
FAIR_S = world.FAIR_S
Peer = world.Peer


class TransfersMachine(world.TransfersWorld, RuleBasedStateMachine):  # type: ignore[misc]
    """Three peers, one data process over a folder, and what control knows."""

    @initialize(local=st.booleans(), sizes=st.lists(st.sampled_from(SIZES[2:]), min_size=1, max_size=3))
    def begin(self, local: bool, sizes: list[int]) -> None:
        structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
        self.patch = pytest.MonkeyPatch()
        for module in (digest, incoming):
            self.patch.setattr(module, "BLOCK_BYTES", BLOCK)
        self.folder = Path(tempfile.mkdtemp(prefix="transfers"))
        self.limits = replace(LIMITS, trust_local=local)
        self.now = 100.0
        self.epoch = 0
        self.count = 0
        self.boots = 0
        self.rows: dict[str, PayloadRef] = {}  # what control has journaled
        self.bytes: dict[str, bytes] = {}
        self.asked: list[Put] = []
        self.peers = [Peer(f"p{n}") for n in range(3)]
        self.transfers: Transfers
        self.start()
        for peer in self.peers:
            self.connect(peer)
        for at, size in enumerate(sizes):
            self.put(at, size, size % 2 == 0, False, False)
        self.go_well(3)

    def teardown(self) -> None:
        if not hasattr(self, "patch"):
            return
        try:
            if sys.exception() is None:
                self.end_fairly()
        finally:
            self.kill()
            self.patch.undo()
            shutil.rmtree(self.folder)

    # ------------------------------------------------------------ rules: what peers want

    @rule(
        at=st.integers(0, 2),
        size=st.sampled_from(SIZES),
        named=st.booleans(),
        lie=st.sampled_from((False, False, False, True)),
        local=st.booleans(),
    )
    def put(self, at: int, size: int, named: bool, lie: bool, local: bool) -> None:
        """Named by its content (so two peers may put the same), or a result of its own; ``lie``: other bytes come."""
        peer = self.peers[at]
        data = SOURCE[:size]
        root = digest.digest_buffers([data])
        self.count += 1
        if named:
            ref = PayloadRef(PayloadId(f"b3-{root}"), size, root)
        else:
            ref = PayloadRef(PayloadId(f"r-{self.count}.1"), size, root if local else "")
        sent = SOURCE[1 : size + 1] if lie and size and (named or local) else data
        self.bytes[ref.id] = data
        put = Put(ref, f"{self.count:032x}")
        if local and self.limits.trust_local:
            put = replace(put, local=f"{put.stream}.up")
            self.spool.incoming_path(put.local).write_bytes(sent)
            upload = Upload(put, None)
        else:
            upload = Upload(put, Source([sent], size), digest.digest_buffers([sent]))
        peer.wants.append(upload)
        peer.streams.add(upload)

    @rule(at=st.integers(0, 2), which=st.integers(0, 20), known=st.booleans())
    def get(self, at: int, which: int, known: bool) -> None:
        if not self.rows:
            self.go_well(3)
        if not self.rows:
            return
        peer = self.peers[at]
        ref = sorted(self.rows.values(), key=lambda ref: ref.id)[which % len(self.rows)]
        got = bytearray()
        self.count += 1
        download = Download(f"{self.count:032x}", ref if known else replace(ref, digest=""), collector(got))
        download.got = got  # type: ignore[attr-defined]
        peer.wants.append(download)
        peer.streams.add(download)

    # ------------------------------------------------------------ rules: the network and control

    @rule(turns=st.integers(1, 3))
    def go_well(self, turns: int) -> None:
        for _ in range(turns):
            self.move()

    @rule(at=st.integers(0, 2), up=st.booleans(), count=st.integers(1, 6))
    def deliver(self, at: int, up: bool, count: int) -> None:
        peer = self.peers[at]
        self.speak(peer)
        for _ in range(count):
            queue = peer.up if up else peer.down
            if queue:
                (self.tell if up else self.hear)(peer, queue.pop(0))
        self.transfers.work((), self.now, max_bytes=BLOCK, chunks=2)
        self.collect()

    @rule(
        at=st.integers(0, 2),
        up=st.booleans(),
        what=st.sampled_from(("lose", "repeat", "reorder", "damage")),
        where=st.integers(0, 20),
    )
    def misfortune(self, at: int, up: bool, what: str, where: int) -> None:
        peer = self.peers[at]
        self.speak(peer)
        queue = peer.up if up else peer.down
        if not queue:
            return
        index = where % len(queue)
        if not up and any(isinstance(decode(frames, 1 << 20).message, Abort | Stored) for frames in queue):
            # an end is said once: a connection does not lose it, or let anything overtake it, without breaking
            if what == "lose":
                self.connect(peer)
            return
        match what:
            case "lose":
                queue.pop(index)
            case "repeat":
                queue.append(queue[index])
            case "reorder":
                queue.insert(0, queue.pop(index))
            case _ if isinstance(decode(queue[index], 1 << 20).message, Chunk):
                data = bytearray(queue[index][-1])
                data[where % len(data)] ^= 1 << where % 8
                queue[index] = [*queue[index][:-1], bytes(data)]

    @rule(at=st.integers(0, 20), what=st.sampled_from(("", "", "", "quota", "stale", "twice", "forgets")))
    def control(self, at: int, what: str) -> None:
        """One question is answered, in any order, perhaps twice; what is forgotten is asked again."""
        for peer in self.peers:
            self.deliver(self.peers.index(peer), True, 1)
        if what == "forgets":
            self.asked.clear()
        elif self.asked:
            put = self.asked[at % len(self.asked)] if what == "twice" else self.asked.pop(at % len(self.asked))
            self.answer(put, what if what in ("quota", "stale") else "")

    @rule(seconds=st.sampled_from((0.5, 1.1, 2.6, 6.0, 31.0)))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.transfers.tick(self.now)
        self.collect()

    # ------------------------------------------------------------ rules: what dies

    @rule(
        what=st.sampled_from(("gives up", "reconnects", "reconnects", "dies", "data", "data", "data")),
        at=st.integers(0, 2),
        harm=st.sampled_from(("", "", "cut", "flip", "flip", "blocks", "payload")),
        where=st.integers(0, 1 << 16),
    )
    def something_ends(self, what: str, at: int, harm: str, where: int) -> None:
        """A user's patience, a peer's link, a peer (another process takes its name, and wants nothing), all data."""
        peer = self.peers[at]
        match what:
            case "gives up":
                if peer.wants:
                    peer.streams.remove(peer.wants.pop(0))
            case "data":
                self.the_data_process_restarts(harm, where)
            case _:
                if what == "dies":
                    peer.wants.clear()
                    peer.streams = Streams()
                self.connect(peer)

    def the_data_process_restarts(self, harm: str, where: int) -> None:
        """And its disk may have lost what was written last: the end of a part, bytes of it, of the list of blocks."""
        landings = self.transfers.landings()
        self.spool.finish_all([landing for _, landing in landings][: where % 3])  # files without rows, or neither
        for _, landing in landings[where % 3 :]:
            if landing.fd is not None:
                os.close(landing.fd)
        self.kill()
        self.damage(harm, where)
        self.start()
        for peer in self.peers:
            self.connect(peer)

    def damage(self, harm: str, where: int) -> None:
        ending = {"cut": ".part", "flip": ".part", "blocks": ".blocks"}.get(harm, "")
        if harm == "payload":
            # no row yet, and named by its digest: one that has none is trusted, since it was synced before its name
            files = [
                path for path in self.spool.payloads.rglob("b3-*") if path.is_file() and path.name not in self.rows
            ]
        else:
            files = [path for path in self.spool.incoming.iterdir() if harm and path.suffix == ending]
        for path in sorted(files):
            data = bytearray(path.read_bytes())
            if harm == "cut" or not data:
                path.write_bytes(data[: where % (len(data) + 1)])
                continue
            data[where % len(data)] ^= 0x10
            path.write_bytes(data)

    # ------------------------------------------------------------ what always holds

    @invariant()
    def streams_are_bounded(self) -> None:
        uploads, downloads = self.transfers.uploads, self.transfers.downloads
        assert len(uploads) <= self.limits.max_streams and len(downloads) <= self.limits.max_streams
        assert uploads.most_of_a_peer <= self.limits.max_streams_per_peer
        share = max(self.limits.window_bytes, len(uploads) * self.limits.chunk_bytes * self.limits.window)
        assert uploads.window_bytes <= share
        assert self.open_files() <= 2 * len(uploads) + len(downloads)

    @invariant()
    def rows_have_whole_files(self) -> None:
        for row in self.rows.values():
            assert self.spool.exists(row.id, row.size)

    def open_files(self) -> int:
        """Descriptors into the spool."""
        root = str(self.folder)
        count = 0
        for fd in os.listdir("/proc/self/fd"):
            try:
                count += os.readlink(f"/proc/self/fd/{fd}").startswith(root)
            except FileNotFoundError:
                continue
        return count

    # ------------------------------------------------------------ the end

    def move(self) -> bool:
        """Nothing is lost for a turn, and control answers; whether anything moved."""
        moved = False
        for put in list(self.asked):
            self.asked.remove(put)
            self.answer(put)
            moved = True
        for peer in self.peers:
            moved = self.speak(peer) or moved
            for queue, take in ((peer.up, self.tell), (peer.down, self.hear)):
                for _ in range(len(queue)):
                    if queue:  # a session fault empties it
                        take(peer, queue.pop(0))
                        moved = True
        more = self.transfers.work((), self.now, max_bytes=4 * BLOCK, chunks=16)
        self.collect()
        return moved or more

    def end_fairly(self) -> None:
        """From any state a network that loses nothing any more ends every stream of a living peer, soon."""
        begun = self.now
        while any(peer.wants for peer in self.peers):
            for _ in range(200):
                if not self.move():
                    break
            else:
                raise AssertionError("messages without end")
            self.time_passes(0.5)
            assert self.now - begun < FAIR_S, [(p.name, w.stream, p.welcome) for p in self.peers for w in p.wants]
        for _ in range(4):  # what nobody waits for ends too
            self.time_passes(self.limits.stall_s + 1.0)
            self.move()
        assert len(self.transfers.uploads) == len(self.transfers.downloads) == 0
        assert self.open_files() == 0


def collector(into: bytearray) -> Callable[[int, memoryview], None]:
    """A download's sink that takes bytes in order only."""

    def take(offset: int, data: memoryview) -> None:
        assert offset == len(into)
        into.extend(data)

    return take


SHORT = short(100, 40, suppress_health_check=[HealthCheck.too_slow])

TestTransfersMachine = TransfersMachine.TestCase
TestTransfersMachine.settings = SHORT


def test_a_finished_file_that_takes_the_place_of_chunks_leaves_nothing_open() -> None:
    """Found by the machine: the descriptors of the part that the chunks had filled were never closed."""
    machine = TransfersMachine()
    machine.begin(local=True, sizes=[1000])
    machine.put(1, SIZES[-1], named=True, lie=False, local=False)
    machine.go_well(3)
    assert machine.transfers.uploads.window_bytes, "the chunks are on their way"
    machine.put(2, SIZES[-1], named=True, lie=False, local=True)
    machine.go_well(4)
    machine.streams_are_bounded()
    machine.teardown()


@pytest.mark.proof
@pytest.mark.timeout(1500)
def test_many_transfers() -> None:
    """The long form."""
    run_state_machine_as_test(TransfersMachine, settings=long(1100, 60, SHORT))
