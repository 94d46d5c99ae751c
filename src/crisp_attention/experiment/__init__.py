"""The experiment: arms x seeds of fine-tuning runs, and an honest verdict on them.

The way through: spec -> data, model -> train -> record -> store -> statistics -> verdict -> report.
Nothing above this package imports it.
"""
