"""What runs leave behind: versioned records in a folder. Only a retry replaces one, of a run that failed."""
