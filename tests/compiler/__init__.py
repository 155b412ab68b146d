"""Compiling, and what it gives: the tests share their blocks."""
