"""A replica's part: texts where requests come in, experts from the engine; both are stand-ins."""

import asyncio
import json

import numpy as np
import pytest

from sere_ray.engine.signatures import DIMENSIONS, Signature, unit
from sere_ray.engine.worker_calls import WorkerCalls
from sere_ray.serve.by_experts.report import Report
from sere_ray.serve.by_experts.reporter import BY_TEXT, LEAST_ROWS, Reporter, TextLayer
from sere_ray.serve.by_experts.text import text_vector

SUM, CODE = "Work out 3 * 4 + 5.", "def area(self):\n    return self.width * self.height\n"


class Engine:
    """``AsyncLLM``, whose workers have counted what :meth:`count` says."""

    def __init__(self):
        self.counted, self.go_on, self.asked = [], asyncio.Event(), 0
        self.can_count, self.is_broken = True, False
        self.closed = []

    async def generate(self, prompt, sampling_params, request_id, **options):
        try:
            yield "first"
            await self.go_on.wait()
            yield "last"
        finally:
            self.closed.append(request_id)

    async def signatures(self, name, arguments):
        self.asked += 1
        if self.is_broken:
            raise RuntimeError("lost")
        taken, self.counted = self.counted, []
        answer = {"model": "gates", "signatures": [list(one) for one in taken]}
        return [answer if self.can_count else None]

    def count(self, request, expert, rows=9):
        vector = np.zeros(DIMENSIONS, dtype=np.float32)
        vector[expert] = 1
        self.counted.append(Signature(request, rows, vector.tobytes()))


class Service:
    """The application behind the layer: every request asks the engine once."""

    def __init__(self, engine):
        self.engine, self.number, self.bodies = engine, 0, []
        self.app = TextLayer(self.answer)

    async def answer(self, scope, receive, send):
        message = await receive()
        self.bodies.append(message.get("body"))
        self.number += 1
        async for output in self.engine.generate("prompt", None, f"cmpl-{self.number}"):
            await send(output)

    async def ask(self, text, sent=None, path="/v1/completions", method="POST"):
        body = json.dumps({"prompt": text}).encode()
        messages = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive():
            return messages.pop(0) if messages else {"type": "http.disconnect"}

        async def send(output):
            if sent is not None:
                sent.append(output)

        await self.app({"type": "http", "method": method, "path": path}, receive, send)
        return body


def play(scene):
    async def run():
        engine = Engine()
        service = Service(engine)
        reporter = Reporter(engine, WorkerCalls(engine.signatures), "g1")
        try:
            return await scene(engine, service, reporter)
        finally:
            reporter.close()

    return asyncio.run(run())


async def begun(service, *texts):
    tasks = [asyncio.ensure_future(service.ask(text)) for text in texts]
    for _ in range(3):
        await asyncio.sleep(0)
    return tasks


def test_what_a_rank_reports():
    async def scene(engine, service, reporter):
        assert reporter.stats() == {}, "nothing is known before the engine has answered"
        tasks = await begun(service, SUM, CODE)
        engine.count("cmpl-1-0a1b2c3d", 5)
        engine.count("0_cmpl-2-0a1b2c3d", 6)  # the first of several answers
        engine.count("sere-score-ff-0a1b2c3d", 7)
        await reporter.read()
        report = Report.read(reporter.stats())
        engine.go_on.set()
        await asyncio.gather(*tasks)
        return report, Report.read(reporter.stats())

    during, after = play(scene)
    assert (during.model, during.gang, during.load, after.load) == ("gates", "g1", 2, 0)
    assert after.number > during.number
    both = np.zeros(DIMENSIONS, dtype=np.float32)
    both[[5, 6]] = 1
    assert np.dot(during.likes, unit(both)) > 0.999
    assert np.array_equal(after.likes, during.likes), "it goes on to like what it had"
    for text, expert in ((SUM, 5), (CODE, 6)):
        assert after.kinds.tell(text_vector(text))[expert] > 0.99


def test_a_prompt_that_was_in_the_cache_says_nothing():
    async def scene(engine, service, reporter):
        tasks = await begun(service, SUM)
        engine.count("cmpl-1-0a1b2c3d", 5, rows=LEAST_ROWS - 1)
        await reporter.read()
        engine.go_on.set()
        await asyncio.gather(*tasks)
        return Report.read(reporter.stats())

    assert play(scene).kinds.kinds == []


def test_a_client_that_hangs_up_ends_its_request():
    async def scene(engine, service, reporter):
        (task,) = await begun(service, SUM)
        await reporter.read()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.sleep(0.01)
        return engine.closed, Report.read(reporter.stats()).load

    assert play(scene) == (["cmpl-1"], 0)


@pytest.mark.parametrize(("path", "method"), [("/v1/models", "GET"), ("/sere/policy", "PUT")])
def test_other_requests_pass_as_they_are(path, method):
    async def scene(engine, service, reporter):
        engine.go_on.set()
        sent = []
        body = await service.ask(SUM, sent, path, method)
        return service.bodies == [body], sent

    assert play(scene) == (True, ["first", "last"])


def test_a_device_that_cannot_count():
    """One question; then texts stand for experts."""

    async def scene(engine, service, reporter):
        engine.can_count = False
        await asyncio.sleep(0.01)
        engine.go_on.set()
        for i in range(3):
            await service.ask(SUM.replace("3", str(i)))
            await service.ask(CODE)
        return engine.asked, reporter._task.cancelled(), Report.read(reporter.stats())

    asked, is_over, report = play(scene)
    assert (asked, is_over, report.model, report.load) == (1, True, BY_TEXT, 0)
    assert np.dot(report.kinds.tell(text_vector(SUM)), text_vector(SUM)) > 0.9
    assert np.dot(report.kinds.tell(text_vector(CODE)), text_vector(CODE)) > 0.9
    assert np.dot(report.likes, unit(text_vector(SUM) + text_vector(CODE))) > 0.9


def test_an_engine_that_does_not_answer_harms_nothing():
    async def scene(engine, service, reporter):
        engine.is_broken = True
        await asyncio.sleep(0.01)
        (task,) = await begun(service, SUM)
        engine.go_on.set()
        await task
        return engine.asked, reporter._task.done()

    assert play(scene) == (1, False)
