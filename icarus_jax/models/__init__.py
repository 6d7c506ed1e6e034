"""The trunk and its heads as Flax modules, and where their arrays lie on the mesh.

Owns: the forward pass over rows, the head bank, the one table of axis rules (sharding).
Takes: canonical weights, rows, KV pages. Gives: logits f32[S, V] and the updated pages.
Parts: Trunk and Rows (trunk), Block (block), HeadBank (head_bank), PairedTrunk (full_heads), MeshLayout (sharding),
MODELS (presets).
"""
