"""Batch jobs: a file of prompts in, one JSON object a line out, in the order of the prompts."""
