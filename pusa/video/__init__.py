"""Decode in a killable child process, fit frames to a size, write videos, pictures and contact sheets."""
