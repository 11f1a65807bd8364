"""Checkpoints and what lies beside them: written whole, read without running any code of theirs."""
