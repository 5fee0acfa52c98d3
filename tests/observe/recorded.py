"""A sink that keeps what it is given, as Prometheus would show it."""

from collections import defaultdict


class Recorded:
    """``values[name][labels]``: the sum of a counter, the last value of a gauge, a list."""

    def __init__(self):
        self.values = defaultdict(dict)

    def record(self, metric, value, **labels):
        key, of = frozenset(labels.items()), self.values[metric.name]
        if metric.kind == "counter":
            assert value >= 0, f"{metric.name} may not fall"
            of[key] = of.get(key, 0) + value
        elif metric.kind == "gauge":
            of[key] = value
        else:
            of.setdefault(key, []).append(value)

    def of(self, metric, **labels):
        return self.values[metric.name][frozenset(labels.items())]
