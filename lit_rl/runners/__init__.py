"""Env runners: what steps environments with a policy, in this process or in Ray actors."""
