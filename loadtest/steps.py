"""Users in steps: beside the locustfile, `-f loadtest/locustfile.py,loadtest/steps.py`.

... ClosedUser --headless --user-steps 30x4,30x16,30x64
"""

from locust import LoadTestShape, events

from sere_ray.loadtest.arrivals import parse_steps


@events.init_command_line_parser.add_listener
def add_option(parser):
    """Option of the shape."""
    parser.add_argument("--user-steps", default="30x1,30x4", help="SECONDSxUSERS, ...")


class Steps(LoadTestShape):
    """So many seconds with so many users, one step after the other; then the test ends."""

    def tick(self):
        """Users and spawn rate now; None = end."""
        left = self.get_run_time()
        for seconds, users in parse_steps(self.runner.environment.parsed_options.user_steps):
            if left < seconds:
                return int(users), max(users, 1)
            left -= seconds
        return None
