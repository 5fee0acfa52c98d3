"""What engines on GPUs record, beside what each layer's rule was given: for their tests."""

import torch


class RoutedRows:
    """Ids before the rule, weights, ids after it, of every pass; copied on the device, in graphs.

    A pass's copies are cloned when the next one begins, in stream order.
    """

    def __init__(self):
        self.buffers, self.passes, self.next, self.running = {}, [], ([], []), None

    def install(self, patch):
        """Engines that are started later are watched.

        Args:
            patch: ``setattr``, or that of pytest's monkeypatch.
        """
        from sere_ray.engine.gpu import patches, union_patches
        from sere_ray.engine.gpu.state import CudaState

        for name in ("reroute", "route_layer"):
            patch(CudaState, name, self._around(getattr(CudaState, name)))
        for name in ("begin_step", "begin_pass", "begin_dummy_step"):
            patch(CudaState, name, self._beginning(getattr(CudaState, name)))
        kinds_of = patches.request_kinds

        def request_kinds(state, batch):
            kinds = kinds_of(state, batch)
            counts = [int(n) for n in batch.num_scheduled_tokens]
            requests = zip(batch.req_ids, counts, kinds.tolist(), strict=True)
            rows = [(r.partition("-")[0], kind) for r, n, kind in requests for _ in range(n)]
            self.next = [request for request, _ in rows], [kind for _, kind in rows]
            return kinds

        for module in (patches, union_patches):
            patch(module, "request_kinds", request_kinds)

    def _around(self, original):
        def recorded(state, layer, ids, weights, *args, **kwargs):
            rows, shape = ids.shape[0], (1024, ids.shape[1])
            if layer not in self.buffers:
                self.buffers[layer] = tuple(
                    torch.full(shape, -9, dtype=kind, device=ids.device)
                    for kind in (torch.int32, torch.float32, torch.int32)
                )
            before, weight, after = self.buffers[layer]
            before[:rows].copy_(ids)
            weight[:rows].copy_(weights)
            result = original(state, layer, ids, weights, *args, **kwargs)
            after[:rows].copy_(ids)
            return result

        return recorded

    def _beginning(self, original):
        def begin(state, *args):
            self.finish()
            self.running, self.next = self.next, ([], [])
            return original(state, *args)

        return begin

    def finish(self):
        """Take over the pass that was launched last."""
        if self.running is not None:
            requests, kinds = self.running
            rows = len(kinds)
            layers = {i: [t[:rows].clone() for t in ts] for i, ts in self.buffers.items()}
            self.passes.append((requests, kinds, layers))
        self.running = None

    def take(self):
        """Passes since the last time: request and kind of each row, and of each layer three lists.

        Passes without rows are among them, so that those of several ranks belong together.
        """
        self.finish()
        found, self.passes = self.passes, []
        return [
            (requests, kinds, {i: [t.tolist() for t in ts] for i, ts in layers.items()})
            for requests, kinds, layers in found
        ]


def recorded_of(outputs):
    """What vLLM returns of each request, by its id: numbers ``[tokens, layers, K]``, and a type."""
    found = {output.request_id: output.outputs[0].routed_experts for output in outputs}
    return {
        request: (str(array.dtype), array.astype("int64").tolist())
        for request, array in found.items()
    }


def record_ranks(rank, ports, folder, key, requests, tokens):
    """Data-parallel engines: stock's answers, then answers, records and passes of each policy."""
    from sere_ray.engine.control import calls_of
    from tests.engine.conftest import generate
    from tests.engine.gpu_ranks import DEMAND, choose_rank, engine_of

    choose_rank(rank)
    watched, report = RoutedRows(), {}
    with engine_of(folder, None, ports[0]) as engine:
        report["stock"] = generate(engine, requests[rank], tokens=tokens[rank])[0]
    watched.install(setattr)
    keys = [key, {**key, **DEMAND, "rule": "margin"}]
    for port, policies in zip(ports[1:], ([{"select_top_k": 4}, {}], [{}]), strict=True):
        key = keys.pop(0)
        with engine_of(folder, key, port, enable_return_routed_experts=True) as engine:
            for changes in policies:
                calls_of(engine).set_policy({**key, **changes})
                watched.take()
                answers, outputs = generate(engine, requests[rank], tokens=tokens[rank])
                policy = {**key, **changes}
                name = "margin" if policy.get("rule") else f"S={policy['select_top_k']}"
                report[name] = answers, recorded_of(outputs), watched.take()
    return report
