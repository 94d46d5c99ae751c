"""What is asked: arms x seeds in a TOML file, and the runs that follow from it."""
