"""`python -m crisp_attention.cli`."""

from crisp_attention.cli import main

main()
