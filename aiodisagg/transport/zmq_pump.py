"""The thread that owns every ZMQ socket of a transport; the only file that imports zmq.

It polls one ROUTER (if this side receives), one DEALER with its monitor per connected peer, and a socket pair that
wakes it up. Other threads hand it closures with :meth:`Pump.call`; it answers through callbacks that run on it.
"""

from __future__ import annotations

import contextlib
import hmac
import logging
import secrets
import select
import socket
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import zmq
from zmq.utils.monitor import parse_monitor_message

from aiodisagg.errors import PeerGone, TransportClosed, TransportError, TransportUnavailable, WriteFailed, WriteRefused
from aiodisagg.transport import chunks
from aiodisagg.transport.chunks import Chunk, Gone, Hello, Lane, Outgoing, Placed, Rejected, Welcome
from aiodisagg.transport.landing import Landing

log = logging.getLogger(__name__)

NAME = "zmq"
Socket = zmq.Socket[bytes]

_ZERO_COPY_BYTES = 64 << 10
_SEND_BUFFER_BYTES = 512 << 10
"""Of the kernel, which doubles it; so much of a connection is under way, which fits a processor's cache, and one call
of the kernel moves no more. Left to itself the buffer grows to 4 MiB, a call copies as much, and a thread in a call
keeps every other one from its processor. 25 MB/s at 40 ms there and back, 5 GB/s at 0.2 ms."""
_TURN = 16
"""Messages taken from one socket before the others get their turn."""
_LOST = (
    zmq.EVENT_DISCONNECTED
    | zmq.EVENT_CLOSED
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)


@dataclass(frozen=True, slots=True)
class Options:
    """See :class:`aiodisagg.transport.zmq.ZmqTransport`."""

    host: str
    port: int
    encrypt: bool
    chunk_bytes: int
    window: int
    heartbeat_s: float
    stall_s: float
    greet_s: float


def has_curve() -> bool:
    return bool(zmq.has("curve"))


def endpoint(host: str, port: int | str) -> str:
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"


class Link:
    """One connection to a peer's ROUTER. ``greeted(error, size_bytes)`` and ``lost(error)`` are each called once."""

    def __init__(
        self,
        peer: str,
        window: int,
        greeted: Callable[[TransportError | None, int], None],
        lost: Callable[[TransportError], None],
    ) -> None:
        self.peer = peer
        self.lane = Lane(window)
        self.session = 0
        self.progress_s = 0.0
        self.dealer: Socket | None = None
        self.monitor: Socket | None = None
        self.greeted: Callable[[TransportError | None, int], None] | None = greeted
        self.lost = lost


class Pump:
    """See the module's text. All methods but ``start``, ``call`` and ``join`` run on its thread.

    Args:
        landing: the pool to receive into; None does not listen.
        started: called once with an error, or None and the port that was bound.
        ended: called when the thread has let go of every source, as its last act.
    """

    def __init__(
        self,
        options: Options,
        landing: Landing | None,
        incarnation: str,
        started: Callable[[TransportError | None, int], None],
        ended: Callable[[], None],
    ) -> None:
        self._options, self._landing, self._incarnation = options, landing, incarnation
        self._started, self._ended = started, ended
        self._session, self.token = secrets.randbits(62), secrets.token_bytes(16)
        self._links: set[Link] = set()
        self._calls: deque[Callable[[], None]] = deque()
        self._held = 0
        self._running = True
        self._router: Socket | None = None
        self._asleep = False
        self._wake, self._woken = socket.socketpair()
        self._wake.setblocking(False)
        self._woken.setblocking(False)
        self.public_key, self._secret_key = zmq.curve_keypair() if options.encrypt else (b"", b"")
        self._thread = threading.Thread(target=self._run, name="aiodisagg-zmq", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def join(self) -> None:
        """After ``ended``."""
        self._thread.join()
        self._wake.close()
        self._woken.close()

    def call(self, action: Callable[[], None]) -> None:
        """From any thread: run this on the pump's thread soon."""
        self._calls.append(action)
        self._rouse()

    def _rouse(self) -> None:
        """After something was appended: whoever falls asleep says so before it looks for the last time."""
        if self._asleep:
            with contextlib.suppress(OSError):  # full: it is awake already; closed: it has ended
                self._wake.send(b"\0")

    def _run(self) -> None:
        self._context: zmq.Context[Socket] = zmq.Context()
        # 65535, in 0.8 MB; the default of 1023 is 170 remotes, each with two links of a DEALER and two monitor sockets.
        self._context.set(zmq.MAX_SOCKETS, self._context.get(zmq.SOCKET_LIMIT))
        self._poller = zmq.Poller()
        self._poller.register(self._woken.fileno(), zmq.POLLIN)
        try:
            self._started(None, self._bind())
        except zmq.ZMQError as error:
            where = endpoint(self._options.host, self._options.port)
            self._started(TransportUnavailable(NAME, f"cannot listen on {where}: {error}"), 0)
        while self._running:
            try:
                self._poll()
            except Exception:  # a bug in one turn must not silence every connection of this process
                log.exception("zmq: a turn failed")
        self._context.destroy(linger=0)
        self._asleep = True
        self._run_calls()
        while self._held:  # pyzmq lets go of sent memory on a thread of its own, and calls when it does
            select.select([self._woken], [], [], 1.0)
            self._forget_wakes()
            self._run_calls()
        self._ended()

    def _bind(self) -> int:
        if self._landing is None:
            return 0
        self._router = router = self._socket(zmq.ROUTER)
        router.setsockopt(zmq.RCVHWM, 2 * (self._options.window + 4))  # header and payload count one each
        router.setsockopt(zmq.MAXMSGSIZE, self._options.chunk_bytes + chunks.MAX_HEADER)
        router.setsockopt(zmq.ROUTER_MANDATORY, 1)
        router.setsockopt(zmq.HANDSHAKE_IVL, int(self._options.greet_s * 1000))
        if self._options.encrypt:
            router.curve_server, router.curve_secretkey = True, self._secret_key
        router.bind(endpoint(self._options.host, self._options.port or "*"))
        self._poller.register(router, zmq.POLLIN)
        return int(router.getsockopt_string(zmq.LAST_ENDPOINT).rpartition(":")[2])

    def _socket(self, kind: zmq.SocketType) -> Socket:
        sock = self._context.socket(kind)
        sock.setsockopt(zmq.LINGER, 0)
        sock.setsockopt(zmq.IPV6, 1)
        sock.setsockopt(zmq.SNDBUF, _SEND_BUFFER_BYTES)
        sock.setsockopt(zmq.HEARTBEAT_IVL, int(self._options.heartbeat_s * 1000))
        sock.setsockopt(zmq.HEARTBEAT_TIMEOUT, int(self._options.heartbeat_s * 5000))
        sock.setsockopt(zmq.HEARTBEAT_TTL, int(self._options.heartbeat_s * 5000))
        return sock

    def _poll(self) -> None:
        pending = any(link.lane.waiting for link in self._links)
        self._asleep = True
        wait_ms = 0 if self._calls else int(min(1000, self._options.stall_s * 250)) if pending else None
        ready = dict(self._poller.poll(wait_ms))
        self._asleep = False
        if self._woken.fileno() in ready:
            self._forget_wakes()
        self._run_calls()
        if self._router is not None and self._router in ready:
            self._receive(self._router)
        for link in list(self._links):
            if link.dealer in ready:
                self._hear(link)
            if link.monitor in ready:
                self._watch(link)
            if link.lane.waiting and time.monotonic() - link.progress_s > self._options.stall_s:
                text = f"no answer in {self._options.stall_s:g} s"
                self.hang_up(link, WriteFailed(NAME, text, peer=link.peer))
            self._fill(link)
        self._run_calls()  # what was let go while an answer was awaited

    def _forget_wakes(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while self._woken.recv(4096):
                pass

    def _run_calls(self) -> None:
        while self._calls:
            self._calls.popleft()()

    def finish(self) -> None:
        """Ends every connection and then the thread."""
        for link in list(self._links):
            self.hang_up(link, TransportClosed(NAME, "closed in mid-write", peer=link.peer))
        self._running = False

    # -- sending --------------------------------------------------------------------------------------------------

    def dial(self, link: Link, address: str, server_key: bytes, token: bytes) -> None:
        self._links.add(link)
        try:
            link.dealer = dealer = self._socket(zmq.DEALER)
            dealer.setsockopt(zmq.RECONNECT_IVL, -1)
            dealer.setsockopt(zmq.MAXMSGSIZE, chunks.MAX_HEADER)
            if server_key:
                dealer.curve_serverkey = server_key
                dealer.curve_publickey, dealer.curve_secretkey = zmq.curve_keypair()
            link.monitor = dealer.get_monitor_socket(_LOST)
            dealer.connect(address)
            dealer.send(chunks.encode(Hello(self._incarnation, link.peer, token)), zmq.NOBLOCK)
        except zmq.ZMQError as error:
            self.hang_up(link, PeerGone(NAME, f"cannot connect to {address}: {error}", peer=link.peer))
            return
        self._poller.register(dealer, zmq.POLLIN)
        self._poller.register(link.monitor, zmq.POLLIN)

    def hang_up(self, link: Link, error: TransportError) -> None:
        """Idempotent. ZMQ forgets what it has not sent; writes end once their memory is let go."""
        if link not in self._links:
            return
        self._links.discard(link)
        dealer, link.dealer = link.dealer, None
        monitor, link.monitor = link.monitor, None
        if dealer is not None and monitor is not None:
            for sock in (dealer, monitor):
                with contextlib.suppress(KeyError):
                    self._poller.unregister(sock)
            dealer.disable_monitor()
            monitor.close(linger=0)
        if dealer is not None:  # else there was none to be had
            dealer.close(linger=0)
        greeted, link.greeted = link.greeted, None
        if greeted is not None:
            greeted(error, 0)
        link.lane.fail(error)
        link.lost(error)

    def send(self, link: Link, write: Outgoing) -> None:
        if link.dealer is None:
            write.fail(PeerGone(NAME, "the connection is lost", peer=link.peer))
            return
        link.lane.add(write)
        self._fill(link)

    def _fill(self, link: Link) -> None:
        """Sends while there is credit."""
        while link.dealer is not None and (turn := link.lane.next()) is not None:
            number, piece, write = turn
            size = piece.source.nbytes
            if len(link.lane) == 1:
                link.progress_s = time.monotonic()
            if zero_copy := size >= _ZERO_COPY_BYTES:
                write.hold()
                self._held += 1
                # The slice is ours alone: when it dies, neither ZMQ nor this frame refers to the source any more.
                weakref.finalize(piece.source, self._on_let_go, link, write).atexit = False
            header = chunks.encode(Chunk(link.session, number, piece.offset, size, piece.lease))
            try:
                link.dealer.send(header, zmq.NOBLOCK | zmq.SNDMORE)
                link.dealer.send(piece.source, zmq.NOBLOCK, copy=not zero_copy)
            except zmq.ZMQError as error:  # the window is smaller than ZMQ's queue: full means no connection
                self.hang_up(link, PeerGone(NAME, f"the connection is lost: {error}", peer=link.peer))
            del piece, turn

    def _on_let_go(self, link: Link, write: Outgoing) -> None:
        """On a thread of pyzmq's. While an answer is awaited, that will wake the pump up; once for both is enough."""
        self._calls.append(partial(self._let_go, write))
        if not link.lane.waiting:
            self._rouse()

    def _let_go(self, write: Outgoing) -> None:
        self._held -= 1
        write.drop()

    def _hear(self, link: Link) -> None:
        for _ in range(_TURN):
            if link.dealer is None:
                return
            try:
                frames = link.dealer.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            known = False
            match chunks.decode(frames[0]):
                case Welcome(session, size_bytes) if link.greeted is not None:
                    greeted, link.greeted = link.greeted, None
                    link.session, known = session, True
                    greeted(None, size_bytes)
                case Gone(message):
                    self.hang_up(link, PeerGone(NAME, message, peer=link.peer))
                    return
                case Placed(number):
                    known = link.lane.placed(number)
                case Rejected(number, gone, message):
                    kind = PeerGone if gone else WriteRefused
                    known = link.lane.rejected(number, kind(NAME, message, peer=link.peer))
            if known:
                link.progress_s = time.monotonic()
            else:
                self.hang_up(link, PeerGone(NAME, "it does not speak this protocol", peer=link.peer))

    def _watch(self, link: Link) -> None:
        """The monitor was asked for nothing but ends."""
        assert link.monitor is not None
        event = zmq.Event(parse_monitor_message(link.monitor.recv_multipart())["event"])
        self.hang_up(link, PeerGone(NAME, f"the connection is lost ({event.name})", peer=link.peer))

    # -- receiving ------------------------------------------------------------------------------------------------

    def _receive(self, router: Socket) -> None:
        for _ in range(_TURN):
            try:
                identity = router.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            answer = self._take(router)
            while router.getsockopt(zmq.RCVMORE):
                router.recv(copy=False)
            try:
                router.send_multipart([identity, chunks.encode(answer)], zmq.NOBLOCK)
            except zmq.ZMQError as error:
                log.debug("zmq: an answer found nobody: %s", error)

    def _take(self, router: Socket) -> chunks.Word:
        """The rest of one message. Whatever it is, it gets an answer and hurts nobody else."""
        head = router.recv(copy=False).buffer if router.getsockopt(zmq.RCVMORE) else memoryview(b"")
        word = chunks.decode(head) if len(head) <= chunks.MAX_HEADER else None
        match word:
            case Hello(_, expected, token):
                known = expected == self._incarnation and hmac.compare_digest(token, self.token)
                if known and self._landing is not None:
                    return Welcome(self._session, self._landing.size_bytes)
                return Gone("another incarnation answers there")
            case Chunk():
                return self._place(router, word)
        log.warning("zmq: dropped a message that is not of this protocol (%d bytes of header)", len(head))
        return Rejected(-1, False, "not understood")

    def _place(self, router: Socket, chunk: Chunk) -> Placed | Rejected:
        if chunk.session != self._session or self._landing is None:
            return Rejected(chunk.number, True, "the session is another incarnation's")
        if not router.getsockopt(zmq.RCVMORE):
            return Rejected(chunk.number, False, "no bytes follow")
        target = self._landing.enter(chunk.offset, chunk.size_bytes, chunk.lease)
        if target is None:
            return Rejected(chunk.number, False, f"lease {chunk.lease} does not cover offset {chunk.offset}")
        try:
            got = router.recv_into(target)
        finally:
            del target
            self._landing.leave(chunk.lease)
        if got != chunk.size_bytes:
            return Rejected(chunk.number, False, f"{got} bytes came, {chunk.size_bytes} were announced")
        return Placed(chunk.number)
