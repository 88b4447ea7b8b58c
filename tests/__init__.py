"""The laws: one set of properties per concept, run on every rung, on the known bugs and on the learner's attempt."""
