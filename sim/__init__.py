"""Pretends: the whole pipeline on one machine, forked from one warm process."""
