"""KV pages below the device's: in host memory, and in a folder or bucket that outlives the process. Without JAX.

Owns: the pages' bytes with their checksums, the limits of both tiers, the rule by which loading beats computing.
Takes: a page's key (scheduling/page_keys.py) and its K/V as bytes. Gives: the same bytes, or nothing.
Parts: PageStore (store), encode and decode (page_file), HostCache (host_cache), PageFolder (page_folder), CopyRule
(rates), StoreStats (stats).
"""
