"""`crisp bench`: what attention costs on this machine, ours beside dense and beside peers.

`variants` says what is timed, `measure` times it, `results` keeps and shows it. Nothing imports this room but the
command line.
"""
