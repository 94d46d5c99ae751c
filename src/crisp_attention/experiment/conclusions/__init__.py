"""From records and statistics to outcomes, patterns and the verdict."""
