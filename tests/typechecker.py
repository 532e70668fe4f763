"""The run-time checker that the import hook in conftest.py puts on every function of ear_jax."""

import beartype

check = beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))
"""Beartype as the static checker sees types: an int is a legal float."""
