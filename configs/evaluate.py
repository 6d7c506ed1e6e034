"""Scores of the trunk and its heads on a task set, through the serving engine.

    python launch/evaluate.py --config=evaluate.py:intent       banking77: the label of a customer's question
    python launch/evaluate.py --config=evaluate.py:slots        snips: intent and slots as JSON
    python launch/evaluate.py --config=evaluate.py:sql          geography: a query, run against the database
    python launch/evaluate.py --config=evaluate.py:math         GSM8K: the number after '####'
    python launch/evaluate.py --config=evaluate.py:tools        Seal-Tools: tool calls
    python launch/evaluate.py --config=evaluate.py:tools_required   the same with tool_choice=required
    python launch/evaluate.py --config=evaluate.py:humaneval    HumanEval: pass@1, greedy
    python launch/evaluate.py --config=evaluate.py:batch --config.data.path=FILE    any OpenAI batch file

The models are those of multi.py; --config.models=a,b chooses some of them. --config.limit=N takes the first N rows. The
answers are written to --config.out=FILE (results/TASK.jsonl). If a run was stopped, the same command continues it, also
with a larger limit. Other models need another FILE. --config.ray.workers=N spreads the requests over N engines on a Ray
cluster (pip install 'icarus-jax[ray]').

The files are read from ../shared/data, or from --config.data.path (and for sql --config.data.database). They come from
PolyAI-LDN/task-specific-datasets (banking77: {"text", "category"}), sonos/nlu-benchmark of 2017 (snips:
{"intent", "data": [{"text", "entity"}, ...]}), jkkummerfeld/text2sql-data (geography: {"question", "sql"}, and the
database as an sqlite file), fairyshine/Seal-Tools ({"query", "tools" in OpenAI's form, "calls"}),
openai/grade-school-math and openai/human-eval (as they are), one row a line.
"""

from ml_collections import ConfigDict

from icarus_jax.cli import DATA, serving_config, trained_heads

FILES = {
    "intent": {"path": "banking77_dev.jsonl"},
    "slots": {"path": "snips_dev.jsonl"},
    "sql": {"path": "geography_dev.jsonl", "database": "geography.sqlite"},
    "math": {"path": "gsm8k_dev.jsonl"},
    "tools": {"path": "tools_dev.jsonl"},
    "tools_required": {"path": "tools_dev.jsonl"},
    "humaneval": {"path": "HumanEval.jsonl.gz"},
    "batch": {},
}


def get_config(arg: str = "") -> ConfigDict:
    """Makes the config.

    Args:
        arg: The task set, or 'batch'.

    Raises:
        ValueError: There is no such task set.
    """
    if arg not in FILES:
        raise ValueError(f"no argument {arg!r}; the arguments are {', '.join(FILES)}")
    config = serving_config()
    config.heads.update(trained_heads())
    config.task = arg
    config.data = ConfigDict({"path": ""} | {key: str(DATA / name) for key, name in FILES[arg].items()})
    config.models = ""  # a,b; empty: all
    config.limit = 0  # rows; 0: all
    config.out = f"results/{arg}.jsonl"
    # workers: how many engines answer, on a Ray cluster (0: one, in this process). The others are those of ray.py.
    config.ray = ConfigDict({"workers": 0, "address": "", "num_cpus": 1.0, "num_gpus": 0.0, "resources": ""})
    return config.lock()
