"""The load generator against real servers: what it counts, when it asks, and what it says when it cannot."""

import asyncio
import contextlib
import dataclasses
import json
import sys
import time

import pytest

from icarus_jax import cli
from icarus_jax.bench import compare, ours, serve
from icarus_jax.bench.client import Reply, Server, ServerError
from icarus_jax.bench.drive import Driver
from icarus_jax.bench.peers import DIALECTS
from icarus_jax.errors import UsageError
from icarus_jax.weights import tokenizer
from icarus_jax.workloads import workload
from icarus_jax.workloads.calls import Call, Counters, summarise
from icarus_jax.workloads.workload import Turn
from tests import tiny
from tests.cli.test_launch import ROOT, launch
from tests.engine.harness import SMALL, make_engine
from tests.server.served import Served

# The engine of test_end_to_end.py: its programs are in the compilation cache already.
CONFIG = dataclasses.replace(SMALL, max_num_seqs=2, max_model_len=256, num_pages=160)
HEADS = {"a": "shared", "b": "shared", "x": "isolated"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.tiny_model("llama", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def served(folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("adapters")
    adapters = {name: (tiny.tiny_adapter(folder, path, seed=i), kv) for i, (name, kv) in enumerate(HEADS.items())}
    engine = make_engine(folder, adapters, CONFIG)
    with contextlib.closing(Served(engine, tokenizer.load_tokenizer(folder))) as server:
        yield server


SESSIONS = [
    [Turn(session, turn, 6, prompt_len=40 + 18 * turn, common_len=30, wait_s=0.02 * (turn > 0)) for turn in range(3)]
    for session in range(4)
]


BY_CHANCE = 6  # random tokens of a vocabulary of 300 that are cached by chance


def plan(sessions, seed=0):
    return serve.Plan(sessions, 300, seed, "round_robin", "poisson")


@pytest.mark.parametrize("names", [["a", "b"], ["a", "x"]])
def test_a_run_against_the_real_engine(served, names):
    before = served.metric("icarus_prefill_tokens_total")
    mark = 10 + names.index(names[-1]) + ord(names[-1])
    run = asyncio.run(serve.measure(Server(served.url), "icarus", "ours", names, plan(SESSIONS), 20.0, mark))
    s = run.summary
    assert (s["sessions"], s["calls"], s["output_tokens"]) == (4, 12, 12 * 6)
    assert s["prompt_tokens"] == sum(turn.prompt_len for session in SESSIONS for turn in session)
    # once: the common start, each first prompt's rest, and in later turns 12 new tokens and the reply's last one
    assert s["needed_tokens"] == 30 + 4 * (10 + 2 * 13)
    warming = served.metric("icarus_prefill_tokens_total") - before - s["prefill_tokens"]
    assert 0 <= warming <= 3
    assert list(s["models"]) == names and 0.2 < s["fairness"] <= 1
    assert 0 < s["ttft_s"]["p50"] < s["call_s"]["p50"] < s["session_s"]["p50"] < 60
    assert s["steps"] > 6 and 0 < s["busy_s"] < s["duration_s"]
    if "x" not in names:  # two sessions that start together may each compute the common start
        assert abs(s["prefill_tokens"] - s["needed_tokens"]) <= 30 + BY_CHANCE
    else:
        assert s["prefill_tokens"] > s["needed_tokens"] + 100
        assert s["recomputed_tokens"] == s["prefill_tokens"] - s["needed_tokens"]


def test_replies_go_into_the_next_prompt(served):
    """The second turn's prompt holds what the model really said."""
    asked = []

    class Spy(Driver):
        async def ask(self, prompt, *args):
            reply = await super().ask(prompt, *args)
            asked.append((prompt, reply.token_ids))
            return reply

    driver = Spy(Server(served.url), DIALECTS["icarus"], 300, 1)
    session = [dataclasses.replace(turn, model="b") for turn in SESSIONS[0]]
    asyncio.run(driver.run([session], [0.0]))
    (first, said), (second, _), _ = asked
    assert len(said) == 6 and second[:46] == first + said and len(second) == 58


def test_the_same_seed_gives_the_same_tokens(served):
    def digest(seed):
        run = serve.measure(Server(served.url), "icarus", "ours", ["a", "b"], plan(SESSIONS, seed), 20.0, mark=7)
        return asyncio.run(run).summary["output_sha256"]

    assert digest(3) == digest(3) != digest(4)


def test_a_reply_of_another_length_ends_the_run():
    """A server that stops early would win by doing less."""

    async def run():
        server, url = await answer_with(chunked(EVENTS))
        async with server:
            await Driver(Server(url), DIALECTS["vllm"], 300, 0).ask([1], "a", 3)

    with pytest.raises(ServerError, match="a: a reply has 2 tokens; 3 were asked for"):
        asyncio.run(run())


def test_a_plan_numbers_what_fits(folder, tmp_path):
    """Left out: a session whose longest turn is not its last, too; the others are counted anew, from 0."""
    sizes = {3: (40, 60), 5: (250, 40), 9: (40, 60), 11: (40, 250)}
    sessions = [[Turn(s, i, 6, prompt_len=n) for i, n in enumerate(lens)] for s, lens in sizes.items()]
    workload.save(sessions, tmp_path / "w.jsonl")
    config = cli.load_config("bench.py")
    with config.unlocked():
        config.trunk.source, config.engine.max_model_len = folder, 200
        config.workload.update({"name": "file", "path": str(tmp_path / "w.jsonl")})
    found = serve.make_plan(config).sessions
    assert [[(turn.session, turn.prompt_len) for turn in s] for s in found] == [[(0, 40), (0, 60)], [(1, 40), (1, 60)]]


@pytest.mark.parametrize(
    "body, said",
    [({"model": "nobody"}, "404.*nobody"), ({"prompt": [1] * 300}, "400.*256"), ({"max_tokens": -1}, "max_tokens")],
)
def test_a_refusal_ends_the_run(served, body, said):
    good = {"model": "a", "prompt": [1], "max_tokens": 2, "stream": True}
    with pytest.raises(ServerError, match=said) as error:
        asyncio.run(Reply().read(Server(served.url), good | body))
    assert "\n" not in str(error.value)


def answer_with(pieces):
    """A server's URL that answers every connection with raw bytes, piece by piece."""

    async def answer(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0.01)
        writer.close()

    async def run():
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        return server, f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"

    return run()


EVENTS = b'data: {"choices": [{"text": "a"}]}\n\ndata: {"choices": [{"text": "b"}]}\n\ndata: [DONE]\n\n'


USAGE = b'data: {"choices": [], "usage": {"completion_tokens": 9}}\n\n'


def chunked(*parts):
    head = [b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"]
    return head + [b"%x\r\n%s\r\n" % (len(part), part) for part in parts] + [b"0\r\n\r\n"]


@pytest.mark.parametrize(
    "pieces, tokens",
    [
        (chunked(EVENTS), 2),
        (chunked(EVENTS[:20], EVENTS[20:47], EVENTS[47:]), 2),  # events cut in the middle
        ([b"HTTP/1.1 200 OK\r\n\r\n", EVENTS[:30], EVENTS[30:]], 2),  # to the connection's end
        (chunked(EVENTS.replace(b"data: [DONE]\n\n", b"")), "without \\[DONE\\]"),
        (chunked(b'data: {"error": {"message": "too late"}}\n\n'), "too late"),
        (chunked(b'data: {"choices": []}\n\ndata: [DONE]\n\n'), "without a token"),
        (chunked(EVENTS.replace(b"data: [DONE]", USAGE + b"data: [DONE]")), 9),
    ],
)
def test_streams_of_any_cut(pieces, tokens):
    async def read():
        server, url = await answer_with(pieces)
        async with server:
            reply = Reply()
            await reply.read(Server(url), {"model": "m"})
            return reply

    if isinstance(tokens, str):
        with pytest.raises(ServerError, match=tokens):
            asyncio.run(read())
    else:
        reply = asyncio.run(read())
        assert reply.output_len == tokens and 0 < reply.first <= reply.end


class Instant(Driver):
    """Answers at once, and notes when it was asked."""

    def __init__(self, block=0.0):
        super().__init__(None, DIALECTS["icarus"], 99, 0)
        self.block = block

    async def ask(self, prompt, model, output_len, session=""):
        time.sleep(self.block)  # the event loop stands still
        reply = Reply()
        reply.first = reply.end = time.monotonic()
        reply.output_len = output_len
        return reply

    async def _metrics(self):
        return {}


def paced(turns=2):
    return [[Turn(i, t, 1, "m", prompt_len=1 + 2 * t, wait_s=0.2 * (t > 0)) for t in range(turns)] for i in range(5)]


def test_calls_go_out_on_schedule():
    arrivals = [0.0, 0.1, 0.1, 0.3, 0.5]
    driven = asyncio.run(Instant().run(paced(), arrivals))
    for call in driven.calls:
        due = arrivals[call.session] + 0.2 * call.turn
        assert due <= call.start < due + 0.1
    assert len(driven.calls) == 10
    if driven.late_s < 0.05:
        assert driven.complaint == ""


def test_a_client_that_is_too_slow_says_so():
    driven = asyncio.run(Instant(block=0.08).run(paced(1), [0.0] * 5))
    assert driven.late_s > 0.2 and "could not keep the schedule" in driven.complaint
    busy = dataclasses.replace(driven, late_s=0.0, cpu=0.3)
    assert busy.complaint == "the client used 30% of a core"


def test_adapters_and_metrics_of_peers():
    llama, vllm = DIALECTS["llama.cpp"], DIALECTS["vllm"]
    assert llama.body("adapter1") == {"model": "adapter1", "lora": [{"id": 1, "scale": 1.0}]}
    assert llama.body("base") == {"model": "base", "lora": [{"id": 0, "scale": 0.0}]}  # none of the loaded ones
    assert vllm.body("b") == {"model": "b"}
    page = (
        '# HELP vllm:prompt_tokens_total x\nvllm:prompt_tokens_total{model_name="a"} 100.0\n'
        'vllm:prompt_tokens_total{model_name="b"} 50.0\nvllm:prefix_cache_hits_total{engine="0"} 30.0\n'
        "vllm:kv_cache_usage_perc 0.25\nvllm:prompt_tokens_total_created 5\n"
    )
    assert DIALECTS["vllm"].read(page) == {"prefill": 120.0, "cached": 30.0, "pages_used": 0.25}
    assert DIALECTS["llama.cpp"].read("llamacpp:prompt_tokens_total 7\n") == {"prefill": 7.0}


class Lists:
    """A server that has these pages."""

    def __init__(self, **pages):
        self.pages = pages

    async def get(self, path):
        return json.dumps(self.pages[path.rsplit("/", 1)[1].replace("-", "_")])


def test_the_adapters_that_a_server_has():
    models = {"data": [{"id": name} for name in ("base", "a", "b")]}
    vllm = Lists(models=models)
    assert asyncio.run(serve.model_names(vllm, "vllm", 0)) == ["base"]
    assert asyncio.run(serve.model_names(vllm, "vllm", 1)) == ["a"]
    llama = Lists(models=models, lora_adapters=[{"id": 0}, {"id": 1}])
    assert asyncio.run(serve.model_names(llama, "llama.cpp", 0)) == ["base"]
    assert asyncio.run(serve.model_names(llama, "llama.cpp", 2)) == ["adapter0", "adapter1"]
    with pytest.raises(UsageError, match="3 adapters are wanted; the server lists base, adapter0, adapter1"):
        asyncio.run(serve.model_names(llama, "llama.cpp", 3))


def call(session, start, first, end, tokens=11, model="a", turn=0):
    return Call(session, turn, model, start, first, end, 100, tokens)


def test_the_summary_by_hand():
    calls = [call(0, 0, 1, 3), call(0, 4, 5, 9, turn=1), call(1, 2, 4, 6, model="b")]
    s = summarise(calls, [0.0, 1.0], Counters(needed=120, prefill=150, evictions=2))
    assert s["duration_s"] == 9 and s["output_tokens_per_s"] == pytest.approx(33 / 9)
    assert s["session_s"]["p50"] == 7 and s["session_s"]["p99"] == pytest.approx(9 - 0.04)  # of 9 and 5 seconds
    assert s["ttft_s"]["mean"] == pytest.approx(4 / 3) and s["call_s"]["p50"] == 4
    assert s["token_s"]["mean"] == pytest.approx((0.2 + 0.4 + 0.2) / 3)
    assert (s["cached_tokens"], s["recomputed_tokens"], s["evictions"], s["preemptions"]) == (150, 30, 2, None)
    a, b = 4 / 11, 4 / 11
    assert s["models"]["a"]["s_per_token"] == pytest.approx(a) and s["fairness"] == pytest.approx(1.0)
    slow = summarise([*calls, call(2, 0, 1, 44, model="c")], [0, 1, 0], Counters(0))
    assert slow["fairness"] == pytest.approx((a + b + 4) ** 2 / (3 * (a**2 + b**2 + 16)))


def made_up(system, rate, duration, p95, tokens, models=8):
    times = {"p50": 1.0, "p95": p95, "p99": p95, "mean": 1.0}
    summary = {"sessions_per_s": 10 / duration, "output_tokens_per_s": tokens, "session_s": times, "call_s": times}
    return compare.Run(system, models, rate, 10 / rate, summary)


def test_the_comparison_is_made_just_past_saturation():
    isolated = ((0.1, 101, 1.0, 1), (0.5, 21, 2.0, 4), (1.0, 15, 12.0, 4), (2.0, 14, 40.0, 4))
    shared = ((0.1, 101, 1.0, 1), (0.5, 21, 1.0, 5), (1.0, 11, 1.5, 9), (2.0, 7, 4.0, 14))
    runs = [made_up("isolated", *row) for row in isolated] + [made_up("shared", *row) for row in shared]
    (found,) = compare.ratios(runs)
    assert found["throughput_ratio"] == 14 / 4
    assert (found["p95_rate"], found["p95_ratio"]) == (1.0, 8.0)
    assert found["p95_ratios"] == {"0.1": 1.0, "0.5": 2.0, "1": 8.0, "2": 10.0}
    (text,) = compare.ratio_lines([found])
    assert "3.50x" in text and "8.0x lower" in text
    assert [compare.Run.from_json(json.loads(json.dumps(run.as_json()))) for run in runs] == runs
    at_once = [made_up(system, float("inf"), 14, 9.0, 4) for system in ("shared", "isolated")]
    (found,) = compare.ratios(at_once)  # it says nothing of a rate just past saturation
    assert found["p95_rate"] is None and found["p95_ratios"] == {"inf": 1.0}
    (unsaturated,) = compare.ratios([run for run in runs if run.rate < 1])
    assert unsaturated["p95_ratio"] is None and "no finite rate was past" in compare.ratio_lines([unsaturated])[0]


def test_a_whole_sweep_of_a_server_by_its_url(served, folder, tmp_path, capsys):
    workload.save(SESSIONS, tmp_path / "w.jsonl")
    config = cli.load_config("bench.py")
    with config.unlocked():
        config.url, config.system, config.models, config.rates = served.url, "ours", "0,2", "inf,0.5x"
        config.trunk.source, config.out = folder, str(tmp_path / "out")
        config.workload.update({"name": "file", "path": str(tmp_path / "w.jsonl")})
    serve.run(config)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    for n, (most, half) in zip((0, 2), (report["runs"][:2], report["runs"][2:]), strict=True):
        assert most["models"] == half["models"] == n and most["rate"] == "inf"
        assert half["rate"] == pytest.approx(0.5 * most["summary"]["sessions_per_s"], rel=0.01)
    # no run finds the cache of the one before
    assert all(run["summary"]["prefill_tokens"] >= 174 - BY_CHANCE for run in report["runs"])
    assert (tmp_path / "out" / "report.png").stat().st_size > 10_000
    shown = capsys.readouterr().out
    assert "4 sessions, 12 calls, 72 output tokens" in shown and shown.count("ours ") == 4
    config.models = "9"
    with pytest.raises(UsageError, match="9 adapters are wanted"):
        serve.run(config)


@pytest.mark.parametrize(
    "args, said",
    [
        (["serve", "--config.peer=sglang"], "vllm, llama.cpp"),
        (["serve", "--config.systems=mine"], "shared, isolated"),
        (["serve", "--config.workload.name=chat"], "replay"),
        (["serve", "--config.rates=1.25x,inf", "--config.workload.name=react"], "before '1.25x' there has to be 'inf'"),
        (["serve", "--config=bench.py:twice"], "once, prefix"),
        (["serve", "--config.workload.path=nowhere.jsonl"], "nowhere.jsonl: no such file; config.workload.name=react"),
        (["swim"], "step, host, structured, serve, prefix"),
    ],
)
def test_a_wrong_word_is_one_line(args, said):
    done = launch("bench.py", *args)
    assert done.returncode != 0 and said in done.stderr and len(done.stderr.strip().splitlines()) == 1


@pytest.fixture
def double(tmp_path, monkeypatch):
    """Another launch/serve.py, which serves the double of the engine."""
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch" / "serve.py").write_text(
        "import sys\n"
        f"sys.path[:0] = [{str(ROOT)!r}]\n"
        "print(*sys.argv[1:])\n"
        "if '--config=bad.py' in sys.argv: sys.exit('the last line says why')\n"
        "sys.argv = ['serve.py', '--port', sys.argv[-1].partition('--config.server.port=')[2], '--step_seconds=0.01']\n"
        "from tests import doubles\n"
        "doubles.main()\n"
    )
    monkeypatch.setattr(ours, "program", lambda name: [sys.executable, str(tmp_path / "launch" / f"{name}.py")])


def test_our_own_server_is_started_and_stopped(double, folder, tmp_path):
    workload.save(SESSIONS, tmp_path / "w.jsonl")
    config = cli.load_config("bench.py")
    with config.unlocked():
        config.models, config.rates, config.systems = "1", "inf", "shared"
        config.trunk.source, config.out, config.engine.num_pages = folder, str(tmp_path / "out"), 777
        config.workload.update({"name": "file", "path": str(tmp_path / "w.jsonl")})
    serve.run(config)
    (run,) = json.loads((tmp_path / "out" / "report.json").read_text())["runs"]
    assert run["system"] == "shared" and run["summary"]["models"].keys() == {"parrot"}
    assert run["summary"]["calls"] == 12 and run["summary"]["ttft_s"]["p50"] >= 0.01 and run["pages"]
    asked, *log = (tmp_path / "out" / "server-shared-1.log").read_text().splitlines()
    assert "--config=multi.py:1 " in asked and "--config.engine.num_pages=777 " in asked
    assert any("Finished server process" in line for line in log)


def test_a_server_that_does_not_start(double, tmp_path):
    with pytest.raises(UsageError, match="the last line says why"), ours.serving("bad.py", {}, tmp_path / "log"):
        pass
