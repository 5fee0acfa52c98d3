"""Two real gangs, both ways to them: each kind of request is decoded by one gang; one is killed."""

import os
import signal
import time

import pytest

from sere_ray.serve.by_experts.reporter import PERIOD_SECONDS
from tests.serve.deployment import deployed, wait_for

pytestmark = [pytest.mark.engine, pytest.mark.nightly]
SUM = "Work out {} * 7 + {} - 4."
TABLE = "date,place,count,price\n2021-03-{},Oslo,{},77\n2022-04-11,Lima,812,31\n"


@pytest.mark.parametrize("proxy", ["direct", "default"])
def test_requests_of_a_kind_go_to_a_gang_of_theirs(tmp_path, proxy):
    options = {"keys": False, "num_replicas": 2, "request_router": "experts"}
    with deployed(tmp_path, proxy=proxy, **options) as gangs:

        def rows():
            _, stats, _ = gangs.request("GET", "/sere/stats")
            counted = {r["gang"]: r["counters"] for r in stats["per_replica"]}
            kinds = ("decode_only", "mixed")
            return {gang: sum(c[k]["decode_rows"] for k in kinds) for gang, c in counted.items()}

        def ask(text, count):
            """Rows of each gang for so many requests, as a share."""
            before = rows()
            for number in range(count):
                prompt = text.format(10 + number, 10 + 7 * number)
                assert gangs.complete(prompt, key=None, max_tokens=8)[0] == 200
                time.sleep(0.1)
            now = rows()
            total = sum(now.values()) - sum(before.values())
            return {gang: (count - before[gang]) / total for gang, count in now.items()}

        for _ in range(4):
            ask(SUM, 4)
            ask(TABLE, 4)
        time.sleep(3 * PERIOD_SECONDS)
        sums, tables = ask(SUM, 12), ask(TABLE, 12)
        assert max(sums.values()) > 0.6, (sums, tables)
        assert max(tables.values()) > 0.6, (sums, tables)
        assert max(sums, key=sums.get) != max(tables, key=tables.get)

        os.kill(gangs.processes("VLLM::EngineCore")[0].pid, signal.SIGKILL)
        wait_for(lambda: gangs.complete(SUM.format(1, 2), key=None)[0] == 200, 20, "the other gang")
        assert {gangs.complete(TABLE.format(11, i), key=None)[0] for i in range(8)} == {200}
