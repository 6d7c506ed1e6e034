"""The process of a Trial (trial.py): compiles what comes on stdin, and answers on stdout, in lines of JSON.

Past the limit of processor time the kernel ends the process. Standard library and llguidance only.
"""

import json
import resource
import signal
import sys

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

STEPS = 4


def walk(matcher: LLMatcher) -> None:
    """Takes the first steps of an answer: they may be too much where the grammar is not."""
    for _ in range(STEPS):
        if matcher.is_error() or matcher.is_stopped():
            return
        mask = int.from_bytes(matcher.compute_bitmask(), "little")
        matcher.consume_token((mask & -mask).bit_length() - 1)  # the lowest bit


def main() -> None:
    """Reads the terms of the trial, then a grammar a line; answers each with its error, '' if it has none."""
    terms = json.loads(sys.stdin.readline())
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # whoever started the server may have it ignored
    resource.setrlimit(resource.RLIMIT_AS, (terms["memory_bytes"], terms["memory_bytes"]))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    tokenizer = LLTokenizer(terms["tokenizer"], n_vocab=terms["vocab_size"], eos_token=terms["eos_ids"] or None)
    limits = LLParserLimits(**terms["limits"])
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, terms["cpu_seconds"])  # its signal ends the process
        matcher = LLMatcher(tokenizer, json.loads(line), limits=limits, log_level=0)
        walk(matcher)
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(matcher.get_error()), flush=True)


if __name__ == "__main__":
    main()
