"""Grammars that an answer must follow: JSON schemas, regular expressions, choices. Without JAX.

Owns: compiled grammars, their limits, and the masks of tokens that may come next.
Takes: `GrammarSpec`, what a request asks for, and the trunk's tokenizer. Gives: a `Matcher` for each answer, whose mask
has a bit for each token. The engine behind it is llguidance.
Parts: GrammarSpec (spec), Compiler, Grammar and Matcher (compiler), CompileQueue (compile_queue).
"""
