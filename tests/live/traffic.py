"""Requests at once, and what the engines counted meanwhile."""

from concurrent.futures import ThreadPoolExecutor


def counted(served, action):
    """What the engines counted of decode-only steps during an action."""
    before = served.sere("stats")["total"]["decode_only"]
    result = action()
    after = served.sere("stats")["total"]["decode_only"]
    names = ("experts_before", "experts_after", "slots_rerouted")
    numbers = {name: sum(after[name]) - sum(before[name]) for name in names}
    for name in ("steps", "steps_counted", "decode_rows"):
        numbers[name] = after[name] - before[name]
    return numbers, result


def at_once(served, count, **options):
    with ThreadPoolExecutor(count) as pool:
        prompts = [f"Work out {i + 3} + {2 * i + 5}." for i in range(count)]
        return list(pool.map(lambda prompt: served.complete(prompt, **options), prompts))
