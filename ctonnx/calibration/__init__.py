"""Recalibration: restoring the statistics that steering moves, on a few unlabelled samples."""
