"""Environments: making and vectorising them."""
