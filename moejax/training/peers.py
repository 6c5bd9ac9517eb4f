"""The processes of one run: all there when it starts, and none lost while it goes on.

jax's distributed runtime ends a process by an abort that names nobody, both where a process does not come in time and
where one is lost, and takes no callback from Python (jax 0.10.2: std::bad_cast). So process 0 has a connection to every
other process beside jax's: it counts them in before jax connects, and afterwards a connection that closes, or that
nothing comes from, is a process to be missed by name. Messages are JSON, one a line.
"""

import contextlib
import ctypes
import dataclasses
import json
import multiprocessing
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from moejax import config as config_lib

SIGN_OF_LIFE = 5.0  # seconds between two messages
SILENCE = 60.0  # seconds without a message after which a process is lost; one that is killed is noticed at once
GRACE = 4.0  # seconds that a process has to fail by itself, with a message of its own, after another one has failed
PATIENCE = 10.0  # seconds after which the log says who is waited for
LONGEST = 2**20  # bytes of a message; what sends more is no moejax


class PeerError(RuntimeError):
    """A process did not come, or is lost; the message is one line that names it."""


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a process stands: coordinator is HOST:PORT of process 0, process_id lies in [0, num_processes).

    local_devices: which of its host's devices the process takes; None: all. hosts: of processes 0, 1, ..., or () where
    the cluster does not say.
    """

    coordinator: str
    num_processes: int
    process_id: int
    local_devices: tuple[int, ...] | None = None
    hosts: tuple[str, ...] = ()

    @property
    def address(self) -> tuple[str, int]:
        """The coordinator's host and port."""
        host, _, port = self.coordinator.rpartition(":")
        return host.strip("[]"), int(port)


class _Connection:
    """Messages to and from another process."""

    def __init__(self, channel: socket.socket):
        self.socket = channel
        self.heard = time.monotonic()
        self._rest = b""
        channel.settimeout(SIGN_OF_LIFE)
        channel.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self, **message: Any) -> None:
        """Raises OSError if the other end is gone."""
        self.socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[dict[str, Any]] | None:
        """What has come, or comes within the socket's time limit; None if the other end is gone or no moejax."""
        try:
            data = self.socket.recv(2**16)
        except TimeoutError:
            return []
        except OSError:
            return None
        *lines, self._rest = (self._rest + data).split(b"\n")
        if not data or len(self._rest) > LONGEST:
            return None
        self.heard = time.monotonic()
        try:
            messages = [json.loads(line) for line in lines]
        except ValueError:
            return None
        return messages if all(isinstance(message, dict) for message in messages) else None

    def wait(self, deadline: float) -> dict[str, Any] | None:
        """The first message; None if there is none by then (`time.monotonic`), or the other end is gone."""
        while time.monotonic() < deadline:
            messages = self.receive()
            if messages is None:
                return None
            if messages:
                return messages[0]
        return None

    def is_open(self) -> bool:
        """Whether the other end has not closed, where nothing is to be read."""
        ready = select.select([self.socket], [], [], 0)[0]
        with contextlib.suppress(OSError):
            return not ready or bool(self.socket.recv(1, socket.MSG_PEEK))
        return False


class Peers:
    """The other processes that this one is connected to: process 0 to all, the others to process 0."""

    def __init__(self, place: Place, hosts: dict[int, str], connections: dict[int, _Connection]):
        self.hosts = hosts
        self._place, self._connections = place, connections
        self._ended: set[int] = set()  # they have said so: their connections may close
        self._failure: tuple[float, str] | None = None  # when to end because another process has failed, and its line
        self._closed = threading.Event()
        self._sending = threading.Lock()
        self._ending = threading.Lock()  # whoever has it ends this process: the watch, or the run itself

    def watch(self) -> None:
        """Ends this process, with one line that says whom it misses and status 1, once another one is lost."""
        hold_aborts()
        threading.Thread(target=self._watch, name="peers", daemon=True).start()

    def end(self, status: int) -> None:
        """Tells the others that this process ends and with which status; 0: it has done its part of the run."""
        if status:
            self._ending.acquire()
        self._tell(ended=status)
        if status and self._place.process_id == 0:
            self._linger()

    def close(self) -> None:
        """Stops the watch."""
        self._closed.set()
        for connection in self._connections.values():
            connection.socket.close()

    def name(self, process: int) -> str:
        """A process as messages name it."""
        return f"process {process} on {self.hosts[process]}"

    def _tell(self, **message: Any) -> None:
        with self._sending:
            _answer(self._connections, **message)

    def _watch(self) -> None:
        told = 0.0
        while not (self._closed.is_set() or self._ending.locked()):
            now = time.monotonic()
            if now - told >= SIGN_OF_LIFE:
                self._tell(alive=True)
                told = now
            if self._failure is not None and now >= self._failure[0]:
                self._leave(self._failure[1])
            here = {c.socket: process for process, c in self._connections.items() if process not in self._ended}
            try:
                ready = select.select(list(here), [], [], 0.5)[0]
            except (OSError, ValueError):  # closed meanwhile
                continue
            for channel in ready:
                self._read(here[channel])
            for process in here.values():
                if now - self._connections[process].heard > SILENCE and process not in self._ended:
                    self._leave(f"{self.name(process)} is lost: nothing was heard of it for {SILENCE:.0f} s")

    def _read(self, process: int) -> None:
        messages = self._connections[process].receive()
        for message in messages or []:
            if "lost" in message:
                self._leave(message["lost"])
            if "failed" in message:
                self._fail(message["failed"])
            if "ended" in message:
                self._ended.add(process)
                if message["ended"]:
                    self._fail(f"{self.name(process)} has failed with status {message['ended']}; its log says why")
        if messages is None and process not in self._ended and not self._closed.is_set():
            self._leave(f"{self.name(process)} is lost: its connection has closed")

    def _fail(self, line: str) -> None:
        """After a moment: where all fail alike, e.g. on a setting, each says so itself."""
        if self._failure is None:
            self._failure = time.monotonic() + GRACE, line
            self._tell(failed=line)

    def _leave(self, line: str) -> None:
        """Ends this process now, whatever its other threads are doing: they wait for one that does not come."""
        if not self._ending.acquire(blocking=False):
            return
        print(f"moejax: {line}; run the same command again to go on from the last checkpoint", file=sys.stderr)
        self._tell(lost=line)
        if self._place.process_id == 0:
            self._linger()
        leave(1)

    def _linger(self) -> None:
        """Waits until the others have read the last message: jax aborts them when process 0 is gone."""
        deadline = time.monotonic() + GRACE + 1
        for connection in self._connections.values():
            with contextlib.suppress(OSError):
                connection.socket.shutdown(socket.SHUT_WR)
            while time.monotonic() < deadline and connection.receive() is not None:
                pass


def leave(status: int) -> None:
    """Ends the process without waiting for the others, for threads, or for jax, which would wait for the others."""
    for child in multiprocessing.active_children():  # workers that read data
        child.kill()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def hold_aborts() -> None:
    """Lets a thread that calls abort() wait for six seconds before the process ends.

    When process 0 is gone, jax's client aborts within milliseconds; this is the time in which the watch says so. The
    handler must not be Python's, which would not run before the process ends: it is libc's sleep, for as many seconds
    as the number of the signal, 6.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
        libc.signal(signal.SIGABRT, ctypes.cast(libc.sleep, ctypes.c_void_p))


def meet(place: Place, settings: dict[str, Any], *, time_limit: float, say: Callable[[str], None]) -> Peers:
    """Returns once every process is there.

    Args:
      place: of this process.
      settings: must be the same in every process.
      time_limit: seconds.
      say: told, after a while, who is waited for.

    Raises:
      ConfigError: the coordinator can't be reached or its port is taken; two processes have one id, or other settings.
      PeerError: processes did not come in time.
    """
    deadline = time.monotonic() + time_limit
    settings = json.loads(json.dumps({"--num_processes": place.num_processes, **settings}))
    if place.process_id == 0:
        return _gather(place, settings, time_limit, deadline, say)
    connection = _reach(place, time_limit, deadline, say)
    hello = {"process_id": place.process_id, "host": socket.gethostname(), "settings": settings}
    answer = None
    with contextlib.suppress(OSError):
        connection.send(moejax=hello)
        # Process 0 may have started that much later than this one.
        answer = connection.wait(time.monotonic() + time_limit + SIGN_OF_LIFE)
    if answer is None:
        raise PeerError(f"process 0 at {place.coordinator} is gone before the start, or is no moejax; see its log")
    if "refused" in answer:
        raise config_lib.ConfigError(answer["refused"])
    if "missing" in answer:
        raise PeerError(answer["missing"])
    hosts = {int(process): host for process, host in answer["hosts"].items()}
    return Peers(place, hosts, {0: connection})


def _reach(place: Place, time_limit: float, deadline: float, say: Callable[[str], None]) -> _Connection:
    """The connection to process 0, which may start later than this one."""
    patience = time.monotonic() + PATIENCE
    while True:
        try:
            return _Connection(socket.create_connection(place.address, timeout=SIGN_OF_LIFE))
        except OSError as error:
            reason = error.strerror or str(error)
        now = time.monotonic()
        if now >= deadline:
            raise config_lib.ConfigError(
                f"coordinator={place.coordinator} was not reached within {time_limit:g} s ({reason}); check the "
                "address, and that process 0 runs there, or raise --start_timeout"
            )
        if now >= patience:
            say(f"waiting for process 0 at {place.coordinator} ({reason})")
            patience = deadline
        time.sleep(min(0.5, deadline - now))


def _gather(
    place: Place, settings: dict[str, Any], time_limit: float, deadline: float, say: Callable[[str], None]
) -> Peers:
    """Process 0: counts the others in, and tells them who is there."""
    hosts, connections = {0: socket.gethostname()}, dict[int, _Connection]()
    patience = time.monotonic() + PATIENCE
    with _listen(place) as server:
        while len(hosts) < place.num_processes:
            now = time.monotonic()
            missing = sorted(set(range(place.num_processes)) - set(hosts))
            if now >= deadline:
                here = ", ".join(f"{process} on {hosts[process]}" for process in sorted(hosts))
                line = (
                    f"{_processes(missing, place)} of {place.num_processes} did not come within {time_limit:g} s; here "
                    f"are {here}; look at the logs of the missing, or raise --start_timeout"
                )
                _answer(connections, missing=line)
                raise PeerError(line)
            if now >= patience:
                say(f"waiting for {_processes(missing, place)} of {place.num_processes}")
                patience = deadline
            server.settimeout(min(1.0, deadline - now))
            try:
                connection = _Connection(server.accept()[0])
            except TimeoutError:
                continue
            hello = (connection.wait(time.monotonic() + SIGN_OF_LIFE) or {}).get("moejax")
            if not hello:
                continue  # a port scan, or a health check
            process = hello["process_id"]
            problem = _problem(settings, hello)
            if problem:
                _answer({**connections, process: connection}, refused=problem)
                raise config_lib.ConfigError(problem)
            if process in connections and connections[process].is_open():
                _answer(
                    {process: connection},
                    refused=f"--process_id={process} is taken by a process on {hosts[process]}; give each its own",
                )
                continue
            hosts[process], connections[process] = hello["host"], connection
    _answer(connections, hosts=hosts)
    return Peers(place, hosts, connections)


def _problem(settings: dict[str, Any], hello: dict[str, Any]) -> str | None:
    """Why a process cannot take part."""
    process, host, theirs = hello["process_id"], hello["host"], hello["settings"]
    for name, value in settings.items():
        if theirs.get(name) != value:
            return (
                f"process {process} on {host} has {name}={theirs.get(name)} and process 0 has {name}={value}; "
                "start every process with the same command"
            )
    return None


def _listen(place: Place) -> socket.socket:
    port = place.address[1]
    both = socket.has_dualstack_ipv6()
    try:
        return socket.create_server(("", port), family=socket.AF_INET6 if both else socket.AF_INET, dualstack_ipv6=both)
    except OSError as error:
        raise config_lib.ConfigError(
            f"coordinator={place.coordinator}: process 0 cannot listen on port {port} "
            f"({os.strerror(error.errno) if error.errno else error}); choose another port"
        ) from None


def _answer(connections: dict[int, _Connection], **message: Any) -> None:
    for connection in connections.values():
        with contextlib.suppress(OSError):  # gone meanwhile: the watch sees that
            connection.send(**message)


def _processes(ids: list[int], place: Place) -> str:
    names = (f"{process} on {place.hosts[process]}" if place.hosts else str(process) for process in ids)
    return f"process{'es' * (len(ids) > 1)} {', '.join(names)}"
