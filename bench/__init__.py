"""Measurements. Speed claims come from here, never from a timed test."""
