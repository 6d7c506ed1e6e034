"""Every script in examples/ runs, on a tiny trunk."""

from __future__ import annotations

import importlib.util
import json
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvicorn

from icarus_jax import LLM
from icarus_jax.training.data import Encoder, read_examples
from icarus_jax.weights.tokenizer import load_tokenizer
from tests import tiny
from tests.server.served import wait_for

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
ENGINE = {"num_pages": 64, "max_num_seqs": 4, "max_num_batched_tokens": 64, "max_model_len": 512}


def example(name: str):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("examples")
    trunk = tiny.tiny_model("llama", folder, max_position_embeddings=2048)
    return trunk, {name: tiny.tiny_adapter(trunk, folder, seed=seed) for seed, name in enumerate("ab", 1)}


@pytest.fixture(autouse=True, scope="module")
def own_cache() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules["icarus_jax.cli.composition"], "enable_compilation_cache", lambda: None)
        yield


@pytest.fixture(scope="module")
def url(files) -> Iterator[str]:
    """The URL of a server of the trunk and its heads."""
    trunk, heads = files
    with LLM(trunk, heads, trunk_name="trunk", **ENGINE | {"num_pages": 256, "max_model_len": 2048}) as llm:
        server = uvicorn.Server(uvicorn.Config(llm.asgi(), host="127.0.0.1", port=0, log_config=None))
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        wait_for(lambda: server.started)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/v1"
        server.should_exit = True
        thread.join()


def test_fan_out(files, capsys):
    trunk, heads = files
    example("fan_out").main(heads, trunk=trunk, trunk_name="trunk", **ENGINE)
    head, *lines = capsys.readouterr().out.splitlines()
    count = int(head.split()[0])
    assert [line.partition(":")[0] for line in lines] == ["trunk", "a", "b"]
    assert all(f" {count - 1} from" in line or f" {count} from" in line for line in lines[1:])


def test_handoff(files, capsys):
    trunk, heads = files
    module = example("handoff")
    with LLM(trunk, heads, trunk_name="trunk", **ENGINE) as llm:
        (answer,) = llm.generate(module.PROMPT)
    module.main("a", heads["a"], on=answer.outputs[0].token_ids[0], trunk=trunk, trunk_name="trunk", **ENGINE)
    models = [line.partition(":")[0] for line in capsys.readouterr().out.splitlines()]
    assert models[0] == "trunk" and set(models) <= {"trunk", "a"}


def test_kl_to_trunk(files, capsys):
    trunk, heads = files
    example("kl_to_trunk").main(heads, samples=2, trunk=trunk, trunk_name="trunk", **ENGINE)
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["a", "b"]
    assert all(float(line.split()[1]) != 0 for line in lines)


def test_train_head(files, tmp_path, capsys):
    data = tmp_path / "my.jsonl"
    rows = [{"prompt": f"say {i}", "completion": f"{i}"} for i in range(40)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    example("train_head").main(str(data), "say 3", steps=2, output=str(tmp_path / "run"), trunk=files[0], **ENGINE)
    assert (tmp_path / "run" / "heads" / "mine" / "adapter_config.json").is_file()
    assert "mine: " in capsys.readouterr().out


def test_openai_client(url, capsys):
    example("openai_client").main(url)
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines[-4:-1]] == ["trunk", "a", "b"]
    assert "computed once for 3 models" in lines[-1]


# With the trunk and heads that they name: tests/frameworks/test_shared_cache.py.
def test_agents_sdk(url, capsys):
    example("agents_sdk").main(url, "trunk", "a")
    lines = [line for line in capsys.readouterr().out.splitlines() if " prompt tokens, " in line]
    assert [line.partition(":")[0] for line in lines] == ["planner", "writer"] * 2


def test_agents_langgraph(url, capsys):
    example("agents_langgraph").main(url, "trunk", "a")
    lines = [line for line in capsys.readouterr().out.splitlines() if " prompt tokens, " in line]
    assert [line.partition(":")[0] for line in lines] == ["planner", "writer"] * 2


# On workers, and with one killed: tests/ray/test_batches.py.
def test_ray_data(files):
    pytest.importorskip("ray")
    trunk, heads = files
    module = example("ray_data")
    heads_of = module.Heads(heads, 3, {"trunk": trunk, "trunk_name": "trunk", **ENGINE})
    with heads_of.llm:
        rows = heads_of({"id": ["x", "y"], "prompt": ["One", "Two"]})
        batch = heads_of({"custom_id": ["x"], "url": ["/v1/completions"], "body": [{"prompt": "One"}]})
    assert list(rows) == ["id", "a", "b"] and rows["id"] == ["x", "y"]
    assert [batch["a"][0], batch["b"][0]] == [rows["a"][0], rows["b"][0]]


def test_every_example_is_tested():
    tested = {name.removeprefix("test_") for name in globals() if name.startswith("test_")}
    assert {file.stem for file in EXAMPLES.glob("*.py")} <= tested


def test_own_chats(files, tmp_path, capsys):
    trunk, _ = files
    words = ["hi", "what", "x" * 500, "the blue house"]
    (tmp_path / "gsm8k_train.jsonl").write_text("".join(json.dumps({"question": word}) + "\n" for word in words))
    out = tmp_path / "chats.jsonl"
    example("own_chats").main(str(out), "math", length=100, folder=tmp_path, trunk=trunk, **ENGINE)
    assert capsys.readouterr().out.endswith("3 prompts of 4\n")
    tokenizer = load_tokenizer(trunk)
    read = read_examples(out, Encoder(tokenizer, frozenset({tokenizer.eos_token_id}), 1000), None)
    assert 1 <= len(read) <= 3 and all(read)
