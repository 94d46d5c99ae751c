"""The experiment: arms x seeds of fine-tuning runs, and an honest verdict on them.

The way through: specification -> data, training -> results -> statistics -> conclusions -> report; `study`
walks it, `display` shows it. Nothing above this package imports it.
"""
