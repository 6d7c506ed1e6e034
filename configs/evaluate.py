"""Scores of the trunk and its heads on a task set, through the serving engine.

    python launch/evaluate.py --config=evaluate.py:intent       banking77: the label of a customer's question
    python launch/evaluate.py --config=evaluate.py:slots        snips: intent and slots as JSON
    python launch/evaluate.py --config=evaluate.py:sql          geography: a query, run against the database
    python launch/evaluate.py --config=evaluate.py:math         GSM8K: the number after '####'
    python launch/evaluate.py --config=evaluate.py:humaneval    HumanEval: pass@1, greedy
    python launch/evaluate.py --config=evaluate.py:batch --config.data.path=FILE    any OpenAI batch file

The models are those of multi.py; --config.models=a,b picks some, and --config.limit=N takes the first N rows. The
answers go to --config.out=FILE (results/TASK.jsonl), where a run that was stopped goes on when it is started again,
over more rows too; other models need another FILE.

The files are looked for in ../shared/data, or where --config.data.path (and for sql --config.data.database) says. They
come from PolyAI-LDN/task-specific-datasets (banking77: {"text", "category"}), sonos/nlu-benchmark of 2017 (snips:
{"intent", "data": [{"text", "entity"}, ...]}), jkkummerfeld/text2sql-data (geography: {"question", "sql"}, and the
database as an sqlite file), openai/grade-school-math and openai/human-eval (as they are), one row a line.
"""

from ml_collections import ConfigDict

from icarus_jax.cli import DATA, serving_config, trained_heads

FILES = {
    "intent": {"path": "banking77_dev.jsonl"},
    "slots": {"path": "snips_dev.jsonl"},
    "sql": {"path": "geography_dev.jsonl", "database": "geography.sqlite"},
    "math": {"path": "gsm8k_dev.jsonl"},
    "humaneval": {"path": "HumanEval.jsonl.gz"},
    "batch": {},
}


def get_config(arg: str = "") -> ConfigDict:
    """arg: the task set, or 'batch'. Raises ValueError."""
    if arg not in FILES:
        raise ValueError(f"no argument {arg!r}; the arguments are {', '.join(FILES)}")
    config = serving_config()
    config.heads.update(trained_heads())
    config.task = arg
    config.data = ConfigDict({"path": ""} | {key: str(DATA / name) for key, name in FILES[arg].items()})
    config.models = ""  # a,b; all
    config.limit = 0  # rows; all
    config.out = f"results/{arg}.jsonl"
    return config.lock()
