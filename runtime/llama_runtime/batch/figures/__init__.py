"""What is counted of a job, and how it is shown."""
