"""Sampling: schedules, orders, guidance and the loop over levels."""
