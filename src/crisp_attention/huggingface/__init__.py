"""Crisp attention in Hugging Face Transformers: one name in both of its registries.

`interface` is what Transformers calls, `autoregister` makes it known, `model` has the verbs (sparsify, densify, dense,
monitor, load), `persistence` what is saved with a model, `callback` the Trainer's side and `recorder` its log. `probe`
looks at every layer once, on `inputs` that fit the model; `audit` asks more (`audit_checks`, `audit_invariance`) of a
`trial`, a copy of the model, and tells each `audit_outcome`.
"""
