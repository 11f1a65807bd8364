"""What algorithms learn with, apart from their losses."""
