"""What tests do with the page, and what it says."""

UNAUTHORIZED, FORBIDDEN, REFUSED = "status of 401", "status of 403", "status of 422"
"""What Chromium logs of answers that a test provokes."""
NOTHING = "\N{EN DASH}"


def connect(page, token):
    page.get_by_label("Admin token").fill(token)
    page.get_by_role("button", name="Connect").click()


def poll(page):
    """Let the page look at the counters now, not in two seconds; returns when it shows them."""
    last = page.locator("#connection").get_attribute("title")
    page.clock.fast_forward(2100)
    page.locator(f"#connection:not([title='{last}'])").wait_for()


def text(page, selector):
    return page.locator(selector).inner_text()
