"""Calibration and evaluation data: readers, labels, preprocessing, synthetic images."""
