from __future__ import annotations

import threading
import time
from collections.abc import Callable

from fedloom.executor.embedded import Call, FunctionThreads


def test_few_threads_do_many_calls_in_their_order_and_end_when_told():
    threads, seen, names = FunctionThreads(1), list[int](), set[threading.Thread]()

    def work(number: int) -> None:
        seen.append(number)
        names.add(threading.current_thread())

    for number in range(200):
        threads.submit(Call("site-1", lambda number=number: work(number)))
    _until(lambda: len(seen) == 200)
    assert seen == list(range(200)) and len(names) == 1
    threads.close()
    _until(lambda: not any(thread.is_alive() for thread in names))


def test_a_call_that_outlives_its_time_holds_nobody_up_and_takes_its_thread_with_it():
    threads, go, stuck = FunctionThreads(1), threading.Event(), list[threading.Thread]()
    at_once, most, done = [0], [0], list[int]()
    lock = threading.Lock()

    def waits() -> None:
        stuck.append(threading.current_thread())
        assert go.wait(20)

    def counts() -> None:
        with lock:
            at_once[0] += 1
            most[0] = max(most[0], at_once[0])
        time.sleep(0.001)
        with lock:
            at_once[0] -= 1
            done.append(1)

    late = Call("site-1", waits)
    threads.submit(late)
    for _ in range(20):
        threads.submit(Call("site-2", counts))
    _until(lambda: stuck)
    assert not done
    threads.give_up(late)
    threads.give_up(late)  # said twice: still one thread more, not two
    _until(lambda: len(done) == 20)
    go.set()
    _until(lambda: not stuck[0].is_alive())
    for _ in range(20):
        threads.submit(Call("site-2", counts))
    _until(lambda: len(done) == 40)
    assert most == [1]
    threads.give_up(late)  # it is over: harmless
    threads.close()


def _until(true: Callable[[], object], timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.001)
