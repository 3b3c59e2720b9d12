"""Measures an adapted model against the original: lm-eval quality, speed, paired statistics, report."""
