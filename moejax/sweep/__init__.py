"""Sweeps: grids of runs, with what must stay equal held constant by construction."""
