"""Solvers: functions from a graph and a budget in bytes to a schedule.

`SOLVERS` names them (`solvers.registry`). `solve` runs one, simulates what it returns, and vouches for the result
(`solvers.solve`).
"""

from fxckpt.core.solvers.registry import SOLVERS, Frontier, Method, Solver
from fxckpt.core.solvers.solve import Solution, check_options, look_up, lowest, solve

__all__ = ["SOLVERS", "Frontier", "Method", "Solution", "Solver", "check_options", "look_up", "lowest", "solve"]
