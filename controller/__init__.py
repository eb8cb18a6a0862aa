"""Decides: claims jobs, runs each in a process of its own, folds results. It keeps no state of its own."""
