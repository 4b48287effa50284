"""What rows and results look like."""
