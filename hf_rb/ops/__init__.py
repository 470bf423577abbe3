"""Computation shared by the trainers. `lm_head` holds the only loop over tiles."""
