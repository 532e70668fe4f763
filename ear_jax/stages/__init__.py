"""The stages of a run, from an open session to a finished result."""
