"""What is done, and the files that say so."""
