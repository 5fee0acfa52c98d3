"""Which policies computed each row of the KV cache: recounted from what the scheduler hands out."""

from collections import defaultdict
from types import MethodType

from sere_ray.policy.tiers import asks_exact


class KvOracle:
    """Watches a CPU engine in this process.

    A row is *of* every policy under which it, or a row before it in its request, was re-routed.

    Attributes:
        policy: name of the running one; a test sets it as it changes the engine's.
        seen: block hash -> the sets of policies whose blocks carried it.
        hits: of each new request that found blocks: its tier, the running policy, and of which
            policies the rows were that it found.
        preempted: requests that lost their blocks.
    """

    def __init__(self, engine):
        self.core = engine.llm_engine.engine_core.engine_core
        self.scheduler = self.core.scheduler
        self.block = self.scheduler.hash_block_size
        self.policy, self.rows = None, defaultdict(frozenset)
        self.seen, self.hits, self.preempted = defaultdict(set), [], set()
        executor = self.core.model_executor
        execute = type(executor).execute_model

        def watched(executor, scheduled, *args, **kwargs):
            self._label(scheduled)
            result = execute(executor, scheduled, *args, **kwargs)
            self._look_at_hashes()
            return result

        executor.execute_model = MethodType(watched, executor)

    def _label(self, scheduled):
        cached = scheduled.scheduled_cached_reqs
        computed = dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        for new in scheduled.scheduled_new_reqs:
            computed[new.req_id] = new.num_computed_tokens
            if new.num_computed_tokens:
                request = self.scheduler.requests[new.req_id]
                found = self.rows[self._slot(request, new.num_computed_tokens - 1)]
                self.hits.append((asks_exact(request.sampling_params), self.policy, found))
        for name, count in scheduled.num_scheduled_tokens.items():
            request, start = self.scheduler.requests[name], computed[name]
            if request.num_preemptions:
                self.preempted.add(name)
            exact = asks_exact(request.sampling_params) or self.policy is None
            label = self.rows[self._slot(request, start - 1)] if start else frozenset()
            # As engine/row_kinds.py: all but the newest known token of the request are computed.
            decodes = start >= request.num_prompt_tokens and start + 1 >= request.num_tokens
            for position in range(start, start + count):
                if decodes and not exact:
                    label |= {self.policy}
                self.rows[self._slot(request, position)] = label

    def _slot(self, request, position):
        (blocks,) = self.scheduler.kv_cache_manager.get_block_ids(request.request_id)
        return blocks[position // self.block], position % self.block

    def _look_at_hashes(self):
        for block in self.scheduler.kv_cache_manager.block_pool.blocks:
            if block.block_hash is not None:
                self.seen[block.block_hash].add(self.rows[block.block_id, self.block - 1])
