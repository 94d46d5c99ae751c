"""Crisp attention outside of Transformers: `torch.nn`, timm, and a module for layers of one's own.

`sparse` is what all of these share, `masks` reads their masks, `attention`, `multihead`, `intercept`
and `timm_attention` compute, `model` finds and converts them (sparsify, densify, check).
"""
