"""Checks that every part does what it says, on a tiny model or a given one."""
