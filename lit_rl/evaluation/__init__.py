"""Whole episodes that say how good a policy is."""
