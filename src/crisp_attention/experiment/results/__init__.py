"""What runs leave behind: versioned records in a folder in which nothing is overwritten."""
