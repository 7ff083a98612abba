"""Data sets as batches of arrays that a model takes."""
