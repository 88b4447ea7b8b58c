"""The laws: one set of properties per concept, run on every rung and on the known bugs."""
