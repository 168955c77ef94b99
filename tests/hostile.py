"""Programs that a sandbox must survive: none is right, and none may pass, reach out, stay, or slow its neighbours."""

from __future__ import annotations

import os

TESTS = ["assert double(2) == 4", "assert double(5) == 10"]
HONEST = "def double(x):\n    return 2 * x"

_FUNCTION = "def double(x):\n    "

CHEATS = {
    "ends before the assertions": "import os\nos._exit(0)",
    "ends inside of the call": f"import os\n{_FUNCTION}os._exit(0)",
    "exits politely": f"import sys\n{HONEST}\nsys.exit(0)",
    "exits politely inside of the call": f"import sys\n{_FUNCTION}sys.exit(0)",
    "equals everything": (
        "class Anything:\n    def __eq__(self, other): return True\n    def __hash__(self): return 4\n"
        f"    def __bool__(self): return True\n{_FUNCTION}return Anything()"
    ),
    "an integer that equals everything": (
        f"class Four(int):\n    __eq__ = lambda self, other: True\n    __ne__ = lambda self, other: False\n"
        f"    __hash__ = int.__hash__\n{_FUNCTION}return Four(7)"
    ),
    "redefines the builtins": (
        "import builtins\nclass Never(BaseException): pass\nbuiltins.AssertionError = Never\n"
        f"builtins.int = builtins.set = builtins.len = lambda *a: 4\n{_FUNCTION}return 7"
    ),
    "compiles assertions away": (
        "import builtins, ast, sys\nreal = builtins.compile\n"
        "builtins.compile = lambda *a, **k: real('pass', 'x', 'exec')\n"
        "builtins.exec = lambda *a: None\nast.parse = None\nsys.flags = None\n" + _FUNCTION + "return 7"
    ),
    "says that it passed": f"print('passed', True, 0, flush=True)\n{_FUNCTION}print('passed')\n    return True",
    "raises what the judge may expect": f"{_FUNCTION}raise AssertionError('passed')",
    "raises the end of an iteration": f"{_FUNCTION}raise StopIteration(4)",
    "says on every descriptor that it passed": (
        "import os, json, struct\n"
        "body = json.dumps({'passed': True, 'reason': 'passed', 'has_ended': False, 'value': 4}).encode()\n"
        "for descriptor in range(64):\n    try: os.write(descriptor, struct.pack('!I', len(body)) + body)\n"
        f"    except OSError: pass\n{_FUNCTION}return 7"
    ),
    "patches the code that serves it": (
        "import sys\nfor name, module in list(sys.modules.items()):\n"
        "    if 'inside' in name:\n        for key in ('encode', 'decode', 'verdict', 'findings'):\n"
        f"            if key in vars(module): setattr(module, key, lambda *a, **k: True)\n{_FUNCTION}return 7"
    ),
    "looks for the expected value": (
        "import gc, sys\ndef double(x):\n    frame = sys._getframe()\n    while frame:\n"
        "        for value in list(frame.f_locals.values()) + gc.get_objects():\n"
        "            if type(value).__name__ == 'Compare': return value.comparators[0].value\n"
        "        frame = frame.f_back\n    return 7"
    ),
    "returns what never ends": f"{_FUNCTION}while True:\n        yield 4",
    "returns itself without end": f"{_FUNCTION}endless = []\n    endless.append(endless)\n    return endless",
    "returns too much": f"{_FUNCTION}return 'x' * 40_000_000",
    "closes its connection": f"import os\n{_FUNCTION}os.closerange(0, 64)\n    return 4",
    "sends rubbish": f"import os\n{_FUNCTION}[os.write(d, b'\\xff' * 4096) for d in range(3, 8)]\n    return 4",
    "crashes the interpreter": f"import ctypes\n{_FUNCTION}ctypes.string_at(1)",
    "recurses": f"{_FUNCTION}return double(x)",
}
"""Those that want to pass, or break what judges them."""

GREEDY = {
    "fork bomb": "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
    "fork bomb of sleepers": f"import os, time\n{_FUNCTION}while True:\n        if not os.fork(): time.sleep(1000)",
    "thread bomb": (
        "import threading, time\n"
        f"{_FUNCTION}while True: threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()"
    ),
    "10 GB": f"{_FUNCTION}return len(bytearray(10 * 2**30)) and 4",
    "10 GB in many processes": (
        f"import os, time\n{_FUNCTION}for _ in range(11):\n        if os.fork() == 0: break\n"
        "    block = b'x' * (900 * 2**20)\n    time.sleep(1000)"
    ),
    "fills /tmp": (f"{_FUNCTION}for n in range(10_000): open(f'/tmp/{{n}}', 'wb').write(bytes(10**6))\n    return 4"),
    "one huge file": f"{_FUNCTION}file = open('/tmp/x', 'wb')\n    while True: file.write(bytes(10**6))",
    "infinite output": "while True:\n    print('x' * 10_000)",
    "infinite errors": "import os\nwhile True:\n    os.write(2, b'x' * 10_000)\n    os.write(1, b'x' * 10_000)",
    "endless loop": f"{_FUNCTION}while True: pass",
    "endless loops of many": f"import os\n{_FUNCTION}for _ in range(3): os.fork()\n    while True: pass",
}
"""Those that take all they can."""

STUBBORN = {
    "catches every signal": (
        "import signal, time\nfor number in range(1, 65):\n    try: signal.signal(number, lambda *a: None)\n"
        f"    except (OSError, ValueError): pass\n{_FUNCTION}while True: time.sleep(1000)"
    ),
    "leaves a daemon": (
        "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0: time.sleep(1000)\n"
        f"    os._exit(0)\n{_FUNCTION}return 7"
    ),
    "kills its parent": (
        "import os, signal\nfor number in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGSTOP):\n"
        f"    os.kill(os.getppid(), number)\n{_FUNCTION}return 7"
    ),
    "kills everything": f"import os, signal\nos.kill(-1, signal.SIGKILL)\n{_FUNCTION}return 7",
    "sleeps": f"import time\n{_FUNCTION}time.sleep(1000)",
}
"""Those that do not want to end, or want others to end."""


def reads(path: str) -> str:
    """Gives what a file of the host holds."""
    return f"{_FUNCTION}return open({path!r}).read()"


def writes(path: str) -> str:
    """Writes a file of the host."""
    return f"{_FUNCTION}open({path!r}, 'w').write('written')\n    return 4"


def connects(port: int) -> str:
    """Talks to a server on the host."""
    return f"import socket\n{_FUNCTION}return 4 if socket.create_connection(('127.0.0.1', {port})) else 7"


def achieves(statement: str) -> str:
    """Right if `statement` does what it says: raises nothing and gives nothing below 0."""
    return (
        "import ctypes, os, resource\nlibc = ctypes.CDLL(None)\n"
        f"{_FUNCTION}done = {statement}\n    return 2 * x if done is None or done >= 0 else 'refused'"
    )


REFUSED = [
    "os.open('/proc/1/mem', os.O_RDWR)",
    "os.open('/proc/1/environ', os.O_RDONLY)",
    "len(os.listdir('/proc/1/fd'))",
    "libc.ptrace(16, 1, 0, 0)",
    "libc.unshare(0x10000000)",
    "libc.syscall(56, 0x10000000 | 17, 0, 0, 0, 0)",
    "libc.mount(b'tmpfs', b'/tmp', b'tmpfs', 0, None)",
    "os.memfd_create('x')",
    "libc.socket(1, 1, 0)",
    "libc.shmget(0, 4096, 0o1600)",
    "os.setuid(0)",
    "os.nice(-1)",
    "os.chroot('/tmp')",
    "os.mkdir('/new')",
    "os.mkdir('/dev/new')",
    "os.mkdir('/usr/new')",
    "os.remove('/guest/spd_dist/sandbox/inside/judge.py')",
    "resource.setrlimit(resource.RLIMIT_AS, (2 ** 40, 2 ** 40))",
    "resource.setrlimit(resource.RLIMIT_CORE, (0, 0))",
    "os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))",
    "os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})",
    "os.setpriority(os.PRIO_PROCESS, 0, 19)",
    "os.open('/proc/self/autogroup', os.O_WRONLY)",
    "os.open('/proc/self/mem', os.O_RDWR)",
    "libc.syncfs(os.open('/tmp', os.O_RDONLY))",
]
"""What `achieves` must not."""


_BURN = "import ctypes, mmap, os, signal, socket, sys, threading, time\nlibc = ctypes.CDLL(None, use_errno=True)\n"
_SPIN = (
    "def spin(seconds):\n    end = time.process_time() + seconds\n    while time.process_time() < end: pass\n"
    "def children(fork):\n    reader, writer = os.pipe()\n    for _ in range(12):\n"
    "        if fork() == 0:\n            spin(0.4)\n            os.write(writer, b'x')\n            os._exit(0)\n"
    "        os.read(reader, 1)\n        time.sleep(0.05)\n"
)
X86 = os.uname().machine == "x86_64"
CLONE = 56 if X86 else 220
_DOUBLE = "\n    return 2 * x"


def _using(body: str, before: str = "") -> str:
    """A right program, but for what it takes on its way to the answer."""
    return f"{_BURN}{_SPIN}{before}\n{_FUNCTION}{body}{_DOUBLE}"


OVER_CPU = {
    "children that the kernel reaps": _using("signal.signal(signal.SIGCHLD, signal.SIG_IGN); children(os.fork)"),
    "children that nobody waits for": _using(
        f"libc.syscall({13 if X86 else 134}, 17, (ctypes.c_uint64 * 4)(0, 2, 0, 0), None, 8); children(os.fork)"
    ),
    "grandchildren in sessions of their own": _using(
        "children(grandchild)",
        "def grandchild():\n    if os.fork(): return 1\n    os.setsid()\n    return os.fork() and os._exit(0)",
    ),
    "children whose end gives no signal": _using(f"children(lambda: libc.syscall({CLONE}, 0, 0, 0, 0, 0))"),
    "brothers for children": _using(f"children(lambda: libc.syscall({CLONE}, 0x8000 | 17, 0, 0, 0, 0))"),
    "a reaper of its own": _using("libc.prctl(36, 1, 0, 0, 0); children(os.fork)"),
    "threads": _using(
        "threads = [threading.Thread(target=spin, args=(6,)) for _ in range(4)]\n"
        "    for one in threads: one.start()\n    for one in threads: one.join()"
    ),
    "other programs": _using(
        "import subprocess\n    for _ in range(40): subprocess.run("
        "[sys.executable, '-S', '-c', 'n = 0\\nwhile n < 3_000_000: n += 1'])"
    ),
}
"""Right programs that use more than 4 s of CPU, each in a way in which it might not be seen."""

_TOUCH = "for at in range(0, size, 4096): block[at] = 1"

OVER_MEMORY = {
    "empty files": _using("for n in range(60_000): os.mknod(f'/tmp/{n}' + 'y' * 200, 0o100600)"),
    "empty files in shared memory": _using("for n in range(60_000): os.mknod(f'/dev/shm/{n}' + 'y' * 200, 0o100600)"),
    "folders": _using("for n in range(60_000): os.mkdir(f'/tmp/{n}')"),
    "names for one file": _using(
        "open('/tmp/x', 'w').close()\n    for n in range(60_000): os.link('/tmp/x', f'/tmp/{n}' + 'y' * 200)"
    ),
    "memory that is shared and not looked at": _using(
        "size = 100 * 2 ** 20\n    for _ in range(8):\n        if os.fork() == 0:\n"
        f"            block = mmap.mmap(-1, size)\n            {_TOUCH}\n            block.madvise(4)\n"
        "            time.sleep(3); os._exit(0)\n"
        "    if any(status for _, status in [os.wait() for _ in range(8)]): os._exit(1)"
    ),
    "memory of /dev/zero": _using(
        f"size = 100 * 2 ** 20; block = mmap.mmap(os.open('/dev/zero', os.O_RDWR), size)\n    {_TOUCH}"
    ),
    "huge pages": _using("block = mmap.mmap(-1, 2 ** 21, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x40000)"),
    "pages that a pipe holds": _using(
        "reader, writer = os.pipe(); block = ctypes.create_string_buffer(4096)\n"
        "    vector = (ctypes.c_uint64 * 2)(ctypes.addressof(block), 4096)\n"
        "    if libc.vmsplice(writer, vector, 1, 0) < 0: raise OSError(ctypes.get_errno())"
    ),
    "larger pipes": _using("import fcntl\n    fcntl.fcntl(os.pipe()[1], 1031, 2 ** 20)"),
    "larger sockets": _using("socket.socketpair()[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 ** 20)"),
    "a list of who may read, with each file": _using(
        "import struct\n    users = [(1, 7, 2**32 - 1), *[(2, 7, os.getuid())] * 8180, (4, 7, 2**32 - 1), "
        "(16, 7, 2**32 - 1), (32, 7, 2**32 - 1)]\n"
        "    value = struct.pack('<I', 2) + b''.join(struct.pack('<HHI', *each) for each in users)\n"
        "    for n in range(3000):\n        open(f'/tmp/{n}', 'w').close()\n"
        "        os.setxattr(f'/tmp/{n}', 'system.posix_acl_access', value)"
    ),
    "threads whose first has ended": _using(
        "for _ in range(5):\n        if os.fork() == 0:\n            threading.Thread(target=held).start()\n"
        f"            libc.syscall({60 if X86 else 93}, 0)\n    time.sleep(3)",
        "def held():\n    time.sleep(0.3)\n    block = bytearray(100 * 2 ** 20)\n"
        "    for at in range(0, len(block), 4096): block[at] = 1\n    time.sleep(3)\n",
    ),
    "filters for its own calls": _using(
        "import struct\n    body = ctypes.create_string_buffer(struct.pack('HBBI', 6, 0, 0, 0x7fff0000) * 4000)\n"
        "    rules = ctypes.create_string_buffer(struct.pack('HxxxxxxP', 4000, ctypes.addressof(body)))\n"
        "    if libc.prctl(22, 2, rules, 0, 0) < 0: raise OSError(ctypes.get_errno())"
    ),
    "watches": _using("if libc.inotify_init1(0) < 0: raise OSError(ctypes.get_errno())"),
    "rules": _using("if libc.syscall(444, (ctypes.c_uint64 * 1)(4), 8, 0) < 0: raise OSError(ctypes.get_errno())"),
}
"""Right programs that take memory which is in no process's share."""


CUNNING = {
    "a tree of forks that each say it": (
        f"import os\n{_FUNCTION}[os.fork() for _ in range(3)]\n    os.write(1, b'passed')\n    return 7"
    ),
    "a child that answers in its place": f"import os\n{_FUNCTION}if os.fork() == 0: return 4\n    return 7",
    "a signal to all of its group": f"import os, signal\n{_FUNCTION}os.killpg(0, signal.SIGTERM)\n    return 4",
    "stops its supervisor": f"import os, signal\n{_FUNCTION}os.kill(1, signal.SIGSTOP)\n    return 7",
    "an alarm in the middle": (
        f"import signal, time\n{_FUNCTION}signal.signal(signal.SIGALRM, lambda *a: 4)\n    signal.setitimer(0, 0.01)\n"
        "    time.sleep(0.1)\n    return 7"
    ),
    "the memory of the first process": f"{_FUNCTION}return open('/proc/1/mem', 'rb').read(8) and 4",
    "files of the first process": f"import os\n{_FUNCTION}return os.listdir('/proc/1/fd') and 4",
    "the root of the first process": f"import os\n{_FUNCTION}return os.listdir('/proc/1/root/home') and 4",
    "what the judge was asked": (
        "import os\ndef double(x):\n    for pid in filter(str.isdigit, os.listdir('/proc')):\n"
        "        try: words = open(f'/proc/{pid}/cmdline').read()\n        except OSError: continue\n"
        "        if 'assert' in words: return 4 if x == 2 else 10\n    return 7"
    ),
    "traces its parent": "import ctypes, os\nlibc = ctypes.CDLL(None)\n"
    f"{_FUNCTION}return 4 if libc.ptrace(16, os.getppid(), 0, 0) == 0 else 7",
    "reads its parent": "import ctypes, os\nlibc = ctypes.CDLL(None)\nblock = (ctypes.c_uint64 * 2)(0, 8)\n"
    f"{_FUNCTION}return 4 if libc.process_vm_readv(os.getppid(), block, 1, block, 1, 0) > 0 else 7",
    "a ring to the kernel": "import ctypes\nlibc = ctypes.CDLL(None)\n"
    f"{_FUNCTION}return 4 if libc.syscall(425, 8, (ctypes.c_uint64 * 15)()) >= 0 else 7",
    "faults of its own": f"import ctypes\nlibc = ctypes.CDLL(None)\n{_FUNCTION}"
    f"return 4 if libc.syscall({323 if X86 else 282}, 1) >= 0 else 7",
    "a program for the kernel": f"import ctypes\nlibc = ctypes.CDLL(None)\n{_FUNCTION}"
    f"return 4 if libc.syscall({321 if X86 else 280}, 0, (ctypes.c_uint64 * 16)(2, 4, 4, 1), 64) >= 0 else 7",
    "a name that every process sees": f"import socket\n{_FUNCTION}"
    "socket.socket(socket.AF_UNIX).bind(chr(0) + 'name')\n    return 4",
    "a packet": f"import socket\n{_FUNCTION}socket.socket(socket.AF_PACKET, socket.SOCK_RAW)\n    return 4",
    "a connection to itself": f"import socket\n{_FUNCTION}socket.create_server(('127.0.0.1', 0))\n    return 4",
    "shared memory that stays": "import ctypes\nlibc = ctypes.CDLL(None)\n"
    f"{_FUNCTION}return 4 if libc.shmget(4711, 4096, 0o1666) >= 0 else 7",
    "a queue that stays": "import ctypes\nlibc = ctypes.CDLL(None)\n"
    f"{_FUNCTION}return 4 if libc.mq_open(b'/x', 0o102, 0o600, None) >= 0 else 7",
    "tells the answer by its time": (
        "import time\ndef double(x):\n    begun = time.perf_counter()\n"
        "    while time.perf_counter() - begun < 0.3: pass\n    return 7"
    ),
    "floods the judge with what it has": f"{_FUNCTION}return [[0] * 1000 for _ in range(100_000)]",
    "a text as long as memory": f"{_FUNCTION}return {{i: 'x' * 1000 for i in range(30_000)}}",
    "forges a verdict": (
        "import json, os, socket, struct\nbody = json.dumps({'passed': True, 'reason': 'passed', 'has_ended': False})\n"
        "for number in range(3, 64):\n    try: socket.socket(fileno=os.dup(number)).sendall("
        f"struct.pack('!I', len(body)) + body.encode())\n    except OSError: pass\n{_FUNCTION}return 7"
    ),
    "a hook on every import": (
        "import sys\nclass Hook:\n    def find_spec(self, name, path=None, target=None):\n"
        "        sys.modules[name] = type(sys)(name)\n        raise SystemExit(0)\n"
        f"sys.meta_path.insert(0, Hook())\n{_FUNCTION}import nothing_like_it\n    return 7"
    ),
    "a module in the judge's way": (
        "import os\nfor folder in ('/tmp', '/dev/shm', '/guest', '.'):\n    try: open(f'{folder}/json.py', 'w')"
        f".write('raise SystemExit(0)')\n    except OSError: pass\n{_FUNCTION}return 7"
    ),
    "a pickle for the judge": (
        "import os\nclass Bomb:\n    def __reduce__(self): return os.system, ('touch /tmp/escaped',)\n"
        f"    def __eq__(self, other): return True\n{_FUNCTION}import pickle\n    return pickle.dumps(Bomb())"
    ),
    "an object whose copy is right": (
        "class Four:\n    def __reduce__(self): return int, (4,)\n    def __int__(self): return 4\n"
        f"    __index__ = __int__\n    def __eq__(self, other): return True\n{_FUNCTION}return Four()"
    ),
    "a name that is a word of the judge": f"{_FUNCTION}return ['object', 0]\n__assertion_held__ = lambda *a: True",
    "numbers at an address of the judge": (
        "class Numbers:\n    __array_interface__ = {'shape': (1,), 'typestr': '<f8', 'version': 3, 'data': (1, True)}\n"
        f"{_FUNCTION}return Numbers()"
    ),
    "writes on its descriptor while the judge waits": (
        "import json, os, struct, time\nbody = json.dumps({'value': 7}).encode()\nif os.fork() == 0:\n"
        "    time.sleep(0.05)\n    for _ in range(50): os.write(3, struct.pack('!I', len(body)) + body)\n"
        f"    os._exit(0)\n{_FUNCTION}time.sleep(0.3)\n    return 7"
    ),
    "answers before it is asked": (
        "import gc\nchannel = next(one for one in gc.get_objects() if type(one).__name__ == 'Channel')\n"
        "for value in (None, ['object', 0], 7, 7): channel.send({'value': value})\n"
        f"{_FUNCTION}return 7"
    ),
}
"""Those that take a way around: through /proc, the kernel, time, the judge's own words. None is right."""
