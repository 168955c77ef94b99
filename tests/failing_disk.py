"""A disk that fails on request: `with FailingDisk(backing, folder) as disk: disk.fail("EIO", "WRITE")`.

It shows a folder under another name, through the kernel's FUSE device (so it needs root) and by its protocol: any
operation of any program can fail as a broken disk or a lost server makes it fail. Told to be `stale`, it remembers for
some seconds lists of folders and names that were not there, as NFS does: what another host makes there is seen late.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import signal
import stat
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

LOOKUP, FORGET, GETATTR, SETATTR, READLINK, SYMLINK, MKNOD, MKDIR = 1, 2, 3, 4, 5, 6, 8, 9
UNLINK, RMDIR, RENAME, LINK, OPEN, READ, WRITE, STATFS, RELEASE = 10, 11, 12, 13, 14, 15, 16, 17, 18
FSYNC, FLUSH, INIT, OPENDIR, READDIR, RELEASEDIR, FSYNCDIR = 20, 25, 26, 27, 28, 29, 30
ACCESS, CREATE, INTERRUPT, DESTROY, BATCH_FORGET, RENAME2 = 34, 35, 36, 38, 42, 45
NAMES = {name: value for name, value in globals().items() if name.isupper() and isinstance(value, int)}
"""Operations, by the numbers of the protocol."""
CHANGES = ("SETATTR", "SYMLINK", "MKNOD", "MKDIR", "UNLINK", "RMDIR", "RENAME", "RENAME2", "LINK", "WRITE", "CREATE")
"""What a disk that may not be written refuses; OPEN for writing, too."""
WITHOUT_ANSWER = {FORGET, BATCH_FORGET, INTERRUPT}

HEADER = struct.Struct("<IIQQIIII")
ANSWER = struct.Struct("<IiQ")
ATTRIBUTES = struct.Struct("<6Q10I")
ENTRY = struct.Struct("<4Q2I")
MAX_WRITE = 1 << 17
KILL = -1
LIBC = ctypes.CDLL(None, use_errno=True)


class FailingDisk:
    """`folder` shows what is in `backing`, until it is told to fail."""

    def __init__(self, backing: Path, folder: Path, stale_seconds: float = 0.0) -> None:
        """Mount it."""
        self.folder = folder
        for path in (backing, folder):
            path.mkdir(parents=True, exist_ok=True)
        self._server = subprocess.Popen(
            [sys.executable, "-S", __file__, backing, folder, str(stale_seconds)], stdin=-1, stdout=-1, text=True
        )
        said = self._server.stdout.readline().strip()
        if said != "mounted":
            raise OSError(f"{folder}: {said}")

    def fail(self, error: str, *operations: str, after: int = 0) -> None:
        """From now on these operations (none: all) give that error; those before the `after`-th still work."""
        self._say(f"fail {error} {after} {','.join(operations) or ','.join(NAMES)}")

    def kill(self, *operations: str, after: int = 0) -> None:
        """Whoever asks for the `after`-th of these operations from now on is killed, before it is done."""
        self._say(f"fail KILL {after} {','.join(operations)}")

    def work(self) -> None:
        """Work again."""
        self._say("work")

    def _say(self, words: str) -> None:
        self._server.stdin.write(f"{words}\n")
        self._server.stdin.flush()
        self._server.stdout.readline()

    def __enter__(self) -> FailingDisk:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._say("work")
        LIBC.umount2(os.fsencode(self.folder), 2)
        self._server.kill()
        self._server.wait()


def is_there() -> str:
    """Why it can't be had here; empty if it can."""
    if os.geteuid() != 0:
        return "needs root"
    return "" if os.access("/dev/fuse", os.R_OK | os.W_OK) else "needs /dev/fuse"


class Server:
    """Answers the kernel, one operation after the other."""

    def __init__(self, backing: str, stale_seconds: float) -> None:
        self.nodes: dict[int, tuple[int, str]] = {1: (0, backing)}
        """Number -> its folder's number and its name."""
        self.numbers: dict[tuple[int, str], int] = {}
        self.stale_seconds = stale_seconds
        self.lists: dict[int, tuple[float, bytes]] = {}
        self.open_files: dict[int, list[int]] = {}
        self.listings: dict[int, bytes] = {}
        self.failing: tuple[int, set[int]] = (0, set())
        self.left_before = 0

    def path(self, node: int) -> str:
        """Where it lies."""
        parent, name = self.nodes[node]
        return name if parent == 0 else f"{self.path(parent)}/{name}"

    def number(self, parent: int, name: str) -> int:
        """Of a file of that name, as long as it has it."""
        if (parent, name) not in self.numbers:
            self.numbers[parent, name] = max(self.nodes) + 1
            self.nodes[self.numbers[parent, name]] = (parent, name)
        return self.numbers[parent, name]

    def found(self, node: int, handle: int | None = None) -> os.stat_result:
        """The file's attributes, by its open handle where it has no name any more."""
        if handle is not None:
            return os.fstat(handle)
        try:
            return os.lstat(self.path(node))
        except FileNotFoundError:
            if self.open_files.get(node):
                return os.fstat(self.open_files[node][-1])
            raise

    def attributes(self, node: int, handle: int | None = None) -> bytes:
        """As the protocol has them."""
        f = self.found(node, handle)
        times = (f.st_atime_ns, f.st_mtime_ns, f.st_ctime_ns)
        return ATTRIBUTES.pack(
            node, f.st_size, f.st_blocks, *(t // 10**9 for t in times), *(t % 10**9 for t in times),
            f.st_mode, f.st_nlink, f.st_uid, f.st_gid, 0, 4096, 0,
        )  # fmt: skip

    def entry(self, parent: int, name: str) -> bytes:
        """A name with its attributes."""
        node = self.number(parent, name)
        return ENTRY.pack(node, 0, 0, 0, 0, 0) + self.attributes(node)

    def answer(self, operation: int, node: int, body: bytes, asker: int) -> bytes:
        """What it gives; OSError where it fails."""
        code, failing = self.failing
        writes = operation == OPEN and struct.unpack_from("<I", body)[0] & (os.O_WRONLY | os.O_RDWR)
        if operation in failing or (code == errno.EROFS and writes):
            self.left_before -= 1
            if self.left_before < 0 and code == KILL:
                self.failing = (0, set())
                os.kill(asker, signal.SIGKILL)
                raise OSError(errno.EINTR, "killed")
            if self.left_before < 0:
                raise OSError(code, "failing")
        if operation in (MKDIR, MKNOD, SYMLINK, LINK, UNLINK, RMDIR, RENAME, RENAME2, CREATE):
            self.lists.clear()  # a host knows what it has done itself
        for part in (self.on_names, self.on_files):
            done = part(operation, node, body)
            if done is not None:
                return done
        raise OSError(errno.ENOSYS, str(operation))

    def on_names(self, operation: int, node: int, body: bytes) -> bytes | None:
        """Operations on folders."""
        if operation == LOOKUP:
            return self.look_up(node, text(body))
        if operation in (MKDIR, MKNOD, SYMLINK, LINK):
            return self.make(operation, node, body)
        if operation in (RENAME, RENAME2):
            return self.rename(operation, node, body)
        if operation in (UNLINK, RMDIR):
            name = text(body)
            (os.unlink if operation == UNLINK else os.rmdir)(f"{self.path(node)}/{name}")
            self.numbers.pop((node, name), None)
            return b""
        if operation == READLINK:
            return os.readlink(self.path(node)).encode()
        if operation == OPENDIR:
            return struct.pack("<QII", 0, 0, 0)
        if operation == READDIR:
            _, offset, size = struct.unpack_from("<QQI", body)
            if offset == 0:
                self.listings[node] = self.listing(node)
            return whole_entries(self.listings[node], offset, size)
        return b"" if operation in (RELEASEDIR, FSYNCDIR, ACCESS, DESTROY) else None

    def look_up(self, node: int, name: str) -> bytes:
        """A name, or that there is none, to be remembered where the disk is stale."""
        try:
            return self.entry(node, name)
        except FileNotFoundError:
            if not self.stale_seconds:
                raise
            seconds, part = divmod(self.stale_seconds, 1)
            return ENTRY.pack(0, 0, int(seconds), 0, int(part * 1e9), 0) + bytes(ATTRIBUTES.size)

    def rename(self, operation: int, node: int, body: bytes) -> bytes:
        """What has the number keeps it, under the new name."""
        (target,) = struct.unpack_from("<Q", body)
        old, new = (part.decode() for part in body[8 if operation == RENAME else 16 :].split(b"\0")[:2])
        if operation == RENAME2 and struct.unpack_from("<I", body, 8)[0]:
            raise OSError(errno.EINVAL, "flags of rename2")
        os.rename(f"{self.path(node)}/{old}", f"{self.path(target)}/{new}")
        self.numbers.pop((target, new), None)
        moved = self.numbers.pop((node, old), None)
        if moved is not None:
            self.nodes[moved] = (target, new)
            self.numbers[target, new] = moved
        return b""

    def make(self, operation: int, node: int, body: bytes) -> bytes:
        """A new name in a folder."""
        if operation == LINK:
            name = text(body[8:])
            os.link(self.path(struct.unpack_from("<Q", body)[0]), f"{self.path(node)}/{name}")
        elif operation == SYMLINK:
            name, target = (part.decode() for part in body.split(b"\0")[:2])
            os.symlink(target, f"{self.path(node)}/{name}")
        else:
            (mode,) = struct.unpack_from("<I", body)
            name = text(body[8 if operation == MKDIR else 16 :])
            place = f"{self.path(node)}/{name}"
            os.mkdir(place, mode & 0o7777) if operation == MKDIR else os.mknod(place, mode)
        return self.entry(node, name)

    def listing(self, node: int) -> bytes:
        """The folder's names; remembered for a while where it is stale."""
        remembered, known = self.lists.get(node, (float("-inf"), b""))
        if time.monotonic() - remembered < self.stale_seconds:
            return known
        packed = b""
        for name in os.listdir(self.path(node)):
            raw = name.encode()
            space = -(-(24 + len(raw)) // 8) * 8
            packed += struct.pack("<QQII", 2**32 - 1, len(packed) + space, len(raw), 0) + raw.ljust(space - 24, b"\0")
        self.lists[node] = (time.monotonic(), packed)
        return packed

    def on_files(self, operation: int, node: int, body: bytes) -> bytes | None:
        """Operations on files."""
        if operation in (OPEN, CREATE):
            return self.open(operation, node, body)
        if operation == READ:
            handle, offset, size = struct.unpack_from("<QQI", body)
            return os.pread(handle, size, offset)
        if operation == WRITE:
            handle, offset, size = struct.unpack_from("<QQI", body)
            return struct.pack("<II", os.pwrite(handle, body[40 : 40 + size], offset), 0)
        if operation == RELEASE:
            (handle,) = struct.unpack_from("<Q", body)
            self.open_files[node].remove(handle)
            os.close(handle)
            return b""
        if operation == FSYNC:
            os.fsync(struct.unpack_from("<Q", body)[0])
            return b""
        if operation == GETATTR:
            flags, _, handle = struct.unpack_from("<IIQ", body)
            return struct.pack("<QII", 0, 0, 0) + self.attributes(node, handle if flags & 1 else None)
        if operation == SETATTR:
            return self.set_attributes(node, body)
        if operation == STATFS:
            f = os.statvfs(self.path(1))
            return struct.pack(
                "<5Q4I24x", f.f_blocks, f.f_bfree, f.f_bavail, f.f_files, f.f_ffree, f.f_bsize, 255, f.f_frsize, 0
            )
        return b"" if operation == FLUSH else None

    def open(self, operation: int, node: int, body: bytes) -> bytes:
        """A handle; a new file's name before it."""
        (flags,) = struct.unpack_from("<I", body)
        flags &= ~(os.O_APPEND | os.O_NOFOLLOW | os.O_DIRECT)  # the kernel says where an append goes
        if operation == OPEN:
            handle, entry = os.open(self.path(node), flags & ~(os.O_CREAT | os.O_EXCL)), b""
        else:
            (mode,) = struct.unpack_from("<I", body, 4)
            name = text(body[16:])
            handle = os.open(f"{self.path(node)}/{name}", flags | os.O_CREAT, mode & 0o7777)
            entry = self.entry(node, name)
            node = self.number(node, name)
        self.open_files.setdefault(node, []).append(handle)
        return entry + struct.pack("<QII", handle, 0, 0)

    def set_attributes(self, node: int, body: bytes) -> bytes:
        """Mode, size, times."""
        valid, _, handle, size = struct.unpack_from("<IIQQ", body)
        atime, mtime, _, atime_ns, mtime_ns, _, mode = struct.unpack_from("<QQQIIII", body, 32)
        known = handle if valid & 64 else None
        target = known if known is not None else self.path(node)
        if valid & 1:
            os.chmod(target, stat.S_IMODE(mode))
        if valid & 8:
            os.truncate(target, size)
        if valid & (16 | 32 | 128 | 256):
            now, was = time.time_ns(), self.found(node, known)
            a = now if valid & 128 else atime * 10**9 + atime_ns if valid & 16 else was.st_atime_ns
            m = now if valid & 256 else mtime * 10**9 + mtime_ns if valid & 32 else was.st_mtime_ns
            os.utime(target, ns=(a, m))
        return struct.pack("<QII", 0, 0, 0) + self.attributes(node, known)

    def obey(self) -> None:
        """Do what the standard input says."""
        for line in sys.stdin:
            word, *more = line.split()
            if word == "fail":
                self.left_before = int(more[1])
                code = KILL if more[0] == "KILL" else getattr(errno, more[0])
                self.failing = (code, {NAMES[name] for name in more[2].split(",") if name in NAMES})
            else:
                self.failing = (0, set())
            print("done", flush=True)  # noqa: T201 - to the one who asked


def text(body: bytes) -> str:
    """A name up to its end."""
    return body.partition(b"\0")[0].decode()


def whole_entries(listing: bytes, start: int, size: int) -> bytes:
    """So many of its entries from `start` on as have room in `size` bytes."""
    end = start
    while end < len(listing):
        (following,) = struct.unpack_from("<Q", listing, end + 8)
        if following - start > size:
            break
        end = following
    return listing[start:end]


def serve(backing: str, folder: str, stale_seconds: float) -> None:
    """Mount, and answer until it is unmounted."""
    os.umask(0)
    device = os.open("/dev/fuse", os.O_RDWR)
    options = f"fd={device},rootmode=40000,user_id=0,group_id=0,allow_other,default_permissions"
    if LIBC.mount(b"failing", os.fsencode(folder), b"fuse.failing", 6, options.encode()) != 0:
        print(os.strerror(ctypes.get_errno()), flush=True)  # noqa: T201 - to the one who asked
        return
    server = Server(backing, stale_seconds)
    print("mounted", flush=True)  # noqa: T201 - to the one who asked
    threading.Thread(target=server.obey, daemon=True).start()
    while True:
        try:
            request = os.read(device, MAX_WRITE + 4096)
        except OSError as error:
            if error.errno in (errno.EINTR, errno.ENOENT, errno.EAGAIN):
                continue
            return  # unmounted
        length, operation, unique, node, _, _, asker, _ = HEADER.unpack_from(request)
        body, code = request[HEADER.size : length], 0
        if operation in WITHOUT_ANSWER:
            continue
        try:
            answer = initial(body) if operation == INIT else server.answer(operation, node, body, asker)
        except OSError as error:
            answer, code = b"", -(error.errno or errno.EIO)
        with contextlib.suppress(OSError):  # who asked was killed
            os.write(device, ANSWER.pack(ANSWER.size + len(answer), code, unique) + answer)


def initial(body: bytes) -> bytes:
    """What the two sides can do."""
    _, _, read_ahead, _ = struct.unpack_from("<4I", body)
    flags = 1 | 8 | 32
    return struct.pack("<4I2H2I2HI28x", 7, 31, read_ahead, flags, 12, 9, MAX_WRITE, 1, 0, 0, 0)


if __name__ == "__main__":
    serve(sys.argv[1], sys.argv[2], float(sys.argv[3]))
