"""Crisp attention in Hugging Face Transformers: one name in both of its registries.

`interface` is what Transformers calls, `state` what a sparsified model carries, `model` the verbs
(sparsify, densify, dense, monitor, load), `check` the audit, `callback` the Trainer's side.
"""
