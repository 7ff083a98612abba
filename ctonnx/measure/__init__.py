"""Measuring a model at many points (β, c), and finding the best."""
