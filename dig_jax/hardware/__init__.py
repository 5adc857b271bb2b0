"""Chips and the cost of compiled programs, for training and planning."""
