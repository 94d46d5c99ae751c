"""Named, fingerprinted examples: where they come from, how they are split, spoiled and batched."""
