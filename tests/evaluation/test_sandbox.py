"""The sandbox against programs that do not stop, hoard, phone home or write, and against forged verdicts."""

from __future__ import annotations

import socket

import pytest

from icarus_jax.evaluation import sandbox, scoring

DOUBLE = {
    "prompt": 'def double(x):\n    """Twice x."""\n',
    "test": "def check(f):\n    assert f(2) == 4\n    assert f(0) == 0\n",
    "entry_point": "double",
}


@pytest.mark.parametrize(
    "text, error",
    [
        ("\n    return 2 * x\n", None),
        ("\n    return x + 2\n", "AssertionError"),
        ("\n    return y\n", "NameError"),
        ("\n    return (\n", "SyntaxError"),
        ("", "AssertionError"),
        ("\n    return 2 * x\n\nimport sys; sys.exit(0)", "SystemExit"),  # before the tests
        ("\n    raise KeyError('k')", "KeyError: 'k'"),
        ("\n    b'\\xff'.decode()", "UnicodeDecodeError: 'utf-8' codec"),
        ("\n    class Odd(Exception): pass\n    raise Odd('so')", "Odd: so"),
        ("\n    return object()", "type object cannot be handed to the check"),
        ("\n    return print", "cannot be handed"),
        ("\n    return (y for y in [2 * x])", "AssertionError"),
        ("\n    import os; os._exit(0)", "ended its interpreter"),
        ("\n    import os; os.write(3, b'x\\n'); os._exit(0)", "wrote into its interpreter's answers"),
    ],
)
def test_humaneval(text, error):
    score = scoring.score_humaneval(text, DOUBLE, sandbox.run_program)
    assert score["pass@1"] == (error is None)
    assert ("error" not in score) if error is None else (error in score["error"])


@pytest.fixture(params=["namespaces", "hook alone"])
def kernel(request, monkeypatch):
    """Both ways that the sandbox can run in."""
    if request.param == "hook alone":
        monkeypatch.setattr(sandbox, "is_isolated", lambda: False)
    elif not sandbox.is_isolated():
        pytest.skip("this system grants no namespaces")
    return request.param


@pytest.mark.parametrize(
    "program, said",
    [
        ("while True: pass", "1 s of processor time"),
        ("while True:\n  try:\n    while True: pass\n  except BaseException: pass", "1 s of processor time"),
        ("import time\ntime.sleep(60)", "limit of 2 s"),
        ("import time, signal\nsignal.setitimer(signal.ITIMER_REAL, 0)\ntime.sleep(60)", "limit of 2 s"),
        ("x = []\nwhile True: x.append(bytes(1 << 20))", "MemoryError"),
        ("x = bytes(1 << 40)", "MemoryError"),
        ("print('x' * 100_000_000)", ""),
        ("import os\nos.fork()", "os.fork"),
        ("import subprocess\nsubprocess.run(['true'])", "subprocess.Popen"),
        ("import os\nos.system('true')", "os.system"),
        ("import os\nos.kill(os.getppid(), 9)", "os.kill"),
        ("import ctypes", "ctypes"),
        ("import resource\nresource.setrlimit(resource.RLIMIT_CPU, (99, 99))", "resource.setrlimit"),
        ("import numpy", "ModuleNotFoundError"),  # the standard library only
    ],
)
def test_a_program_ends_at_its_limits(program, said, kernel):
    """A busy program gets the processor late where others are busy too: only one that sleeps ends by the clock."""
    wall = 2 if "sleep" in program else 60
    outcome = sandbox.run_program(program, cpu_seconds=1, wall_seconds=wall, memory_bytes=256 << 20)
    assert outcome.passed == (said == "")
    assert said in outcome.error and "\n" not in outcome.error


UNGUARDED = """
import json, sys
if sys.argv[1] == "program":
    sys.exit()
try:
    exec(json.load(sys.stdin)["program"])
    print(json.dumps({"passed": True}))
except OSError as error:
    print(json.dumps({"passed": False, "error": str(error)}))
"""
CONNECT = "import socket\nsocket.create_connection(('127.0.0.1', {port}), 2).sendall(b'hello')"


def test_no_program_reaches_the_network(kernel):
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        program = CONNECT.format(port=server.getsockname()[1])
        assert "socket" in sandbox.run_program(program).error
        with pytest.raises(TimeoutError):
            server.accept()


@pytest.mark.skipif(not sandbox.is_isolated(), reason="this system grants no namespaces")
def test_the_kernel_keeps_it_off_the_network_without_the_hook(monkeypatch, tmp_path):
    unguarded = tmp_path / "unguarded.py"
    unguarded.write_text(UNGUARDED)
    monkeypatch.setattr(sandbox, "CHILD", unguarded)
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        outcome = sandbox.run_program(CONNECT.format(port=server.getsockname()[1]))
        assert "unreachable" in outcome.error
        with pytest.raises(TimeoutError):
            server.accept()


@pytest.mark.parametrize(
    "attempt",
    [
        "open({path!r}, 'w')",
        "open({path!r}, 'a')",
        "open({path!r}, 'r+b')",
        "import os; os.open({path!r}, os.O_WRONLY | os.O_CREAT)",
        "import os; os.remove({path!r})",
        "import os; os.rename({path!r}, 'x')",
        "import os; os.truncate({path!r}, 0)",
        "import os; os.chmod({path!r}, 0)",
        "import shutil; shutil.rmtree({folder!r})",
        "import pathlib; pathlib.Path({folder!r}, 'new').mkdir()",
        "import os; os.symlink({folder!r}, 'link'); open('link/kept', 'w')",
        "open('../' * 20 + {path!r}, 'w')",
        "import os; open(os.getcwd() + '/../kept', 'w')",
        "open({path!r}.encode(), 'w')",
        # Around the hook: the names that it might look up, a folder's descriptor, paths that change when looked at.
        "import os; os.path.realpath = lambda path: os.getcwd() + '/x'; open({path!r}, 'w')",
        "import __main__ as m; m._WRITES, m._REFUSED, m._HARMLESS = 0, (), {{'open'}}; open({path!r}, 'w')",
        "import builtins as b; b.type = lambda x: int; b.PermissionError = print; b.str = int; open({path!r}, 'w')",
        "import os; os.open('kept', os.O_WRONLY | os.O_TRUNC, dir_fd=os.open({folder!r}, os.O_RDONLY))",
        "import io\nclass P:\n  n = 0\n  def __fspath__(s): s.n += 1; return 'x' if s.n < 2 else {path!r}\n"
        "io.FileIO(P(), 'w')",
        "class S(str):\n  __eq__ = lambda *_: True\n  __hash__ = str.__hash__\nopen(S({path!r}), 'w')",
        "import gc\nfor x in gc.get_objects(): pass",
    ],
)
def test_no_write_outside_its_folder(attempt, tmp_path):
    kept = tmp_path / "kept"
    kept.write_text("as it was")
    outcome = sandbox.run_program(attempt.format(path=str(kept), folder=str(tmp_path)))
    assert not outcome.passed and ("PermissionError" in outcome.error or "b.str" in attempt), outcome
    assert kept.read_text() == "as it was" and [file.name for file in tmp_path.iterdir()] == ["kept"]


def test_its_own_folder_is_small_and_goes(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(sandbox.tempfile, "tempdir", None)
    assert sandbox.run_program("open('a', 'w').write('x')\nassert open('a').read() == 'x'").passed
    assert "File too large" in sandbox.run_program("open('a', 'wb').write(bytes(5 << 20))").error
    assert list(tmp_path.iterdir()) == []


# ---- forged verdicts

PASS = b'{"passed": true, "error": ""}'
WRITE_ALL = """
import os
def write_all(message):
    for descriptor in range(64):
        try: os.write(descriptor, message)
        except OSError: pass
"""
FORGERIES = {
    "writes a verdict": f"{WRITE_ALL}\nwrite_all({PASS!r})\nos._exit(0)",
    "writes a verdict as a line": f"{WRITE_ALL}\nwrite_all({PASS + b'%c' % 10!r})\nos._exit(0)",
    "writes a verdict and goes on": f"{WRITE_ALL}\nwrite_all({PASS + b'%c' % 10!r})",
    "answers ahead": f'{WRITE_ALL}\nwrite_all(b\'{{"value": ["int", "0x4"]}}%c\' % 10 * 9)\nos._exit(0)',
    "says that it ended well": f'{WRITE_ALL}\nwrite_all(b\'{{"ended": ""}}%c\' % 10)',
    "ends well": "import os\nos._exit(0)",
    "exits well": "import sys\nsys.exit(0)",
    "ends at exit": f"{WRITE_ALL}\nimport atexit\natexit.register(write_all, {PASS!r})\nraise SystemExit(0)",
    "leaves a thread": f"{WRITE_ALL}\nimport threading\n"
    f"threading.Thread(target=lambda: [write_all({PASS + b'%c' % 10!r}) for _ in range(999)]).start()",
    "patches builtins": "import builtins\nbuiltins.AssertionError = builtins.BaseException = builtins.Exception = int\n"
    "builtins.exec = builtins.compile = lambda *_, **__: None",
    "patches its interpreter": "import __main__ as m, json\nm.pack = m.unpack = lambda value: True\n"
    "m._told = lambda error: []\nm.judge = m.Program = print",
    "patches JSON": 'import json\njson.dumps = lambda *_: \'{"passed": true, "error": ""}\'',
    "searches its frames": "import sys\nframe = sys._getframe()\nwhile frame:\n"
    "  for names in (frame.f_locals, frame.f_globals):\n"
    "    for name in list(names):\n      if 'name' not in name: names[name] = True\n  frame = frame.f_back",
    "returns what equals everything": "class Same(int):\n  def __eq__(self, other): return True\n"
    "  __req__ = __eq__\n  __hash__ = int.__hash__\ndouble = lambda x: Same(1)",
    "returns what says it is right": "class Same(list):\n  def __eq__(self, other): return True\n"
    "double = lambda x: Same()",
    "writes to its memory": "open('/proc/self/mem', 'r+b').seek(0)",
    "reads its memory": "open('/proc/self/mem', 'rb').seek(0)",
    "is its own check": "def check(f): pass\nglobals()['check'] = check",
    "raises its limit's signal": "import signal\nsignal.raise_signal(signal.SIGXCPU)",
    "ends in the call": "def double(x):\n  import os\n  os._exit(0)",
    "exits in the call": "def double(x):\n  raise SystemExit(0)",
    "never returns": "def double(x):\n  while True: pass",
    "nests its answer": "def double(x):\n  y = []\n  for _ in range(500): y = [y]\n  return y",
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_no_program_forges_its_verdict(forgery, kernel):
    program = f"def double(x):\n    return x + 1\n{FORGERIES[forgery]}\n"
    outcome = sandbox.run_program(program, scoring.humaneval_check(DOUBLE), cpu_seconds=1)
    assert not outcome.passed and outcome.error and "\n" not in outcome.error


@pytest.mark.parametrize("swallow", ["except Exception: pass", "except: pass"])
def test_a_check_that_catches_everything_is_no_way_out(swallow):
    check = f"f = program_function('f')\nfor i in range(3):\n  try: f(i)\n  {swallow}\n"
    assert sandbox.run_program("def f(x): raise ValueError", check) == sandbox.Outcome(True)
    assert not sandbox.run_program("def f(x):\n  import os\n  os._exit(0)", check).passed


def test_the_check_gets_what_the_program_returns(kernel):
    values = [
        0,
        -1,
        2**64,
        10**5000,
        True,
        None,
        1.5,
        float("inf"),
        2j,
        "ü\ud800\n",
        b"\x00\xff",
        [],
        [1, [2]],
        (1, (2,)),
    ]
    values += [{1: "a", (1, 2): [3]}, set(), {1, 2}, frozenset({3})]
    check = "f = program_function('f')\n"
    check += "for value in VALUES:\n  back = f(value, more=[value])\n  assert back == (value, [value]), (value, back)\n"
    check += "  assert type(back[0]) is type(value)\n"
    check += "x = [3, 1]\nassert list(program_function('g')()) == [1, 2] and program_function('g')() != [1, 2]\n"
    check += "try: program_function('h')()\nexcept ValueError as error: assert str(error) == 'so'\nelse: assert False\n"
    check = check.replace("VALUES", "[" + ", ".join(map(written, values)) + "]")
    program = "def f(x, more): return x, more\ndef g(): yield 1; yield 2\ndef h(): raise ValueError('so')"
    assert sandbox.run_program(program, check) == sandbox.Outcome(True)


def written(value: object) -> str:
    if value == float("inf"):
        return "float('inf')"
    return "10**5000" if value == 10**5000 else repr(value)


def test_the_tests_may_use_what_the_prompt_defines():
    row = {
        "prompt": 'def half(x):\n    return x / 2\n\ndef double(x):\n    """Twice x."""\n',
        "test": "def check(f):\n    assert half(f(3)) == 3\n    assert half(double(5)) == 5\n",
        "entry_point": "double",
    }
    for text, passed in (("\n    return 2 * x", True), ("\n    return x", False)):
        assert scoring.score_humaneval(text, row, sandbox.run_program)["pass@1"] == passed
    bare = DOUBLE | {"prompt": "def double(x):"}
    assert scoring.score_humaneval("\n    return 2 * x", bare, sandbox.run_program)["pass@1"]


def test_no_environment_is_readable(kernel, monkeypatch):
    monkeypatch.setenv("SECRET", "sesame")
    program = """
import glob, os
found = []
for name in [*glob.glob("/proc/[0-9]*/[!er]*"), *glob.glob("/proc/[0-9]*/environ"), "/proc/self/environ"]:
    try: found.append(open(name, "rb").read())
    except OSError: pass
assert not found and "SECRET" not in os.environ
"""
    assert sandbox.run_program(program) == sandbox.Outcome(True)


def test_many_programs_at_once():
    from concurrent.futures import ThreadPoolExecutor

    def run(number):
        return scoring.score_humaneval(f"\n    return {number} * x", DOUBLE, sandbox.run_program)["pass@1"]

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(run, [1, 2, 3] * 8)) == [False, True, False] * 8
