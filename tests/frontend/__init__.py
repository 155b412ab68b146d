"""Tests of the frontend; a package, so that they share the zoo of families and the reference."""
