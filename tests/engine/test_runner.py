"""The engine behind asyncio: streams, cancellation, back-pressure, failures, the end."""

import asyncio
import random
import threading
import time

import pytest

from tests.engine.workloads import at_rest, oracle, requests, small, squeezed
from trimaran.engine.engine import Engine
from trimaran.engine.request import EngineSettings, Request
from trimaran.engine.runner import Busy, Runner
from trimaran.engine.sampler import Sampling
from trimaran.errors import Refusal

LONG = Sampling(temperature=0, max_tokens=3000, seed=1, ignore_eos=True)


@pytest.fixture
def runner():
    model = small("latent", 7)
    settings = squeezed(EngineSettings(rows=4, tokens_per_pass=24, page=4, snapshots=6, drafter="mtp"), model, 1200)
    runner = Runner(Engine(model, settings=settings), queue_limit=40)
    yield runner
    runner.close()
    assert not runner.thread.is_alive()
    at_rest(runner.engine)


def settled(runner: Runner) -> None:
    """Waits until the engine has nothing left to do."""
    deadline = time.monotonic() + 20
    while (runner.inbox or not runner.engine.idle) and time.monotonic() < deadline:
        time.sleep(0.005)


def test_many_streams_at_once(runner):
    asked = requests(random.Random(1), 7, 12)

    async def read(one: Request) -> list:
        pieces = [piece async for piece in runner.stream(one)]
        outputs = sorted((piece.output for piece in pieces if piece.output), key=lambda output: output.sample)
        for output in outputs:
            said = [token for piece in pieces if piece.sample == output.sample for token in piece.tokens]
            assert said == output.tokens
        return outputs

    async def everything() -> list:
        return await asyncio.gather(*(read(one) for one in asked), *(runner.generate(one) for one in again))

    again = [Request(one.prompt, one.sampling) for one in asked]
    results = asyncio.run(everything())
    expected = oracle(runner.engine.model, asked)
    for place, outputs in enumerate(results):
        assert [o.tokens for o in outputs] == [o.tokens for o in expected if o.prompt == place % len(asked)]


def test_a_closed_or_cancelled_stream_aborts_its_request(runner):
    async def leave() -> None:
        stream = runner.stream(Request((1, 2, 3), LONG))
        async for _ in stream:
            break
        await stream.aclose()
        task = asyncio.create_task(runner.generate(Request((3, 4), LONG)))
        await asyncio.sleep(0.02)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        runner.stream(Request((5,), LONG))  # never begun: nothing to give back

    asyncio.run(leave())
    settled(runner)
    assert runner.engine.idle and not runner.open


def test_a_loop_that_is_gone_takes_its_requests_along(runner):
    """A client whose event loop ended without closing its streams."""
    loop = asyncio.new_event_loop()
    stream = runner.stream(Request((1, 2), LONG))
    loop.run_until_complete(stream.__anext__())
    loop.close()
    settled(runner)
    assert runner.engine.idle


def test_refusals_and_back_pressure(runner):
    with pytest.raises(Refusal, match="prompt 0 is empty"):
        runner.stream(Request(()))

    async def crowd() -> None:
        tasks = []
        for number in range(60):
            tasks.append(asyncio.create_task(runner.generate(Request((1, number % 7), LONG))))
            await asyncio.sleep(0.005)
        results = await asyncio.gather(
            *(asyncio.wait_for(asyncio.shield(t), 0.01) for t in tasks), return_exceptions=True
        )
        busy = [result for result in results if isinstance(result, Busy)]
        assert 14 <= len(busy) <= 16 and not busy[0].closing
        assert all("40 requests wait already, and 40 may" in str(problem) for problem in busy)
        with pytest.raises(Busy):
            runner.stream(Request((1,), LONG))  # at once, before anything is begun
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(crowd())
    settled(runner)


def test_a_failing_pass_fails_what_was_in_it(runner):
    model = runner.engine.model

    async def fail() -> None:
        tasks = [asyncio.create_task(runner.generate(Request((n, 2), LONG))) for n in range(3)]
        await asyncio.sleep(0.1)

        def break_down(*_):
            handle.remove()
            raise MemoryError("out of memory")

        handle = model.backbone.layers[-1].register_forward_hook(break_down)
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(result, MemoryError)
        one = Request((1, 2, 3), Sampling(max_tokens=4, seed=1))
        assert [o.tokens for o in await runner.generate(one)] == [o.tokens for o in oracle(model, [one])]

    asyncio.run(fail())
    assert runner.broken is None


def test_memory_that_cannot_be_trusted_ends_the_runner():
    engine = Engine(small("dense", 7))
    runner = Runner(engine)

    async def fail() -> None:
        def lose_a_slot(*_):
            engine.memory._slots.take()
            raise MemoryError("out of memory")

        handle = engine.model.backbone.layers[0].register_forward_hook(lose_a_slot)
        with pytest.raises(MemoryError):
            await runner.generate(Request((1, 2), LONG))
        handle.remove()
        runner.thread.join(5)
        with pytest.raises(Busy, match="the engine has stopped") as busy:
            await runner.generate(Request((1, 2), LONG))
        assert busy.value.closing

    asyncio.run(fail())
    assert runner.stalled(1000)
    runner.close()


class Leaving(dict):
    """Open streams, each of which leaves just after the engine's thread has asked whether it is there."""

    def __contains__(self, one: object) -> bool:
        if threading.current_thread().name == "trimaran-engine":
            return self.pop(one, None) is not None
        return super().__contains__(one)


def test_a_stream_may_leave_at_any_moment(runner):
    async def leave() -> None:
        task = asyncio.create_task(runner.generate(Request((1, 2), LONG)))
        while not runner.engine.jobs:
            await asyncio.sleep(0.001)
        runner.open = Leaving(runner.open)
        await asyncio.sleep(0.1)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert runner.thread.is_alive()

    asyncio.run(leave())
    settled(runner)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_dies_leaves_nobody_waiting():
    runner = Runner(Engine(small("dense", 7)))

    async def die() -> None:
        task = asyncio.create_task(runner.generate(Request((1, 2), LONG)))
        while not runner.engine.jobs:
            await asyncio.sleep(0.001)
        runner.engine.abort = lambda request: 1 / 0  # what nobody expects to fail
        runner.inbox.append("some request")
        with pytest.raises(Busy, match="died"):
            await asyncio.wait_for(task, 10)

    asyncio.run(die())
    runner.thread.join(5)
    assert runner.stalled(1000)


def test_the_heart_beats_while_idle_and_stops_with_the_thread(runner):
    before = runner.heartbeat
    time.sleep(0.6)
    assert runner.heartbeat > before and not runner.stalled(5)
    held = threading.Event()
    handle = runner.engine.model.backbone.layers[0].register_forward_hook(lambda *_: held.wait(10) and None)

    async def hang() -> None:
        task = asyncio.create_task(runner.generate(Request((1, 2), Sampling(max_tokens=2, seed=1))))
        await asyncio.sleep(0.5)
        assert runner.stalled(0.3)
        held.set()
        await task

    asyncio.run(hang())
    handle.remove()
    assert not runner.stalled(5)


@pytest.mark.parametrize(("tokens", "finished"), [(5, True), (3000, False)])
def test_draining(runner, tokens, finished):
    async def drain() -> None:
        one = Request((1, 2), LONG.replace(max_tokens=tokens))
        task = asyncio.create_task(runner.generate(one))
        await asyncio.sleep(0.05)
        assert await runner.drain(10 if finished else 0.1) == finished
        with pytest.raises(Busy, match="shutting down"):
            runner.stream(Request((1,), LONG))
        result = (await asyncio.gather(task, return_exceptions=True))[0]
        assert len(result[0].tokens) == tokens if finished else isinstance(result, Busy)

    asyncio.run(drain())
    settled(runner)


def test_closing_fails_what_runs():
    runner = Runner(Engine(small("dense", 7)))

    async def close() -> None:
        task = asyncio.create_task(runner.generate(Request((1, 2), LONG)))
        await asyncio.sleep(0.1)
        await asyncio.to_thread(runner.close)
        with pytest.raises(Busy, match="closed"):
            await task

    asyncio.run(close())
    assert runner.stalled(1000)
