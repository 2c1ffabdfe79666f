"""Runs a Pyomo model on HiGHS, CBC or Gurobi in one way. It has no formulation of its own.

A time limit with an incumbent gives a usable answer. Every answer is checked against the model's constraints, because
some interfaces return values that are no solution (CBC returns zeros where it stops without an incumbent).

Pyomo takes half a second to import, so this module and the modules with formulations are imported for the first model.
"""

from __future__ import annotations

import logging
import platform
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from elastic_moe.cluster.errors import ConfigError, EmoeError

if TYPE_CHECKING:
    import pyomo.environ as pyo

SOLVERS = ("highs", "cbc", "gurobi")

GUROBI_FREE_LIMIT = 2000
"""Most variables, and most constraints, that gurobipy accepts without a licence."""

GUROBI_TOO_LARGE = 10010
"""Gurobi's error number for a model above that size."""

_FEASIBILITY = 1e-5

_PACKAGES = {"highs": "highspy", "gurobi": "gurobipy"}
_LACKING = {
    "highs": "is not installed: pip install highspy",
    "cbc": "was found neither on PATH nor in pulp: pip install 'elastic-moe[cbc]'",
    "gurobi": "is not installed: pip install 'elastic-moe[gurobi]'",
}


class SolverError(EmoeError):
    """A solver is missing, refused the model, or broke. The message says in one line what to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Solution:
    """The result of a solve. Where `objective` is not None, the model's variables hold the incumbent."""

    objective: float | None
    bound: float
    """No solution of the model costs less; -inf where the solver has proved nothing."""
    optimal: bool
    """Whether the incumbent is proven optimal within the wanted gap."""
    message: str


def solve(model: pyo.ConcreteModel, *, solver: str, time_limit_s: float, gap: float = 1e-4) -> Solution:
    """Minimise `model`, starting from its variables' values where the solver can; blocks for `time_limit_s` at most.

    Raises SolverError where the solver cannot run the model, and ConfigError where there is no solver of that name.
    """
    if solver not in _RUNNERS:
        raise ConfigError(f"solver: expected one of {', '.join(SOLVERS)}, got {solver!r}")
    solution = _RUNNERS[solver](model, max(time_limit_s, 0.05), gap)
    if solution.objective is not None and _violated(model):
        return Solution(objective=None, bound=solution.bound, optimal=False, message=f"{solver} returned no solution")
    return solution


def _violated(model: pyo.ConcreteModel) -> bool:
    import pyomo.environ as pyo

    for constraint in model.component_data_objects(pyo.Constraint, active=True):
        body = pyo.value(constraint.body)
        slack = _FEASIBILITY * (1.0 + abs(body))
        if constraint.lower is not None and body < pyo.value(constraint.lower) - slack:
            return True
        if constraint.upper is not None and body > pyo.value(constraint.upper) + slack:
            return True
    return any(
        abs(variable.value - round(variable.value)) > _FEASIBILITY
        for variable in model.component_data_objects(pyo.Var)
        if variable.is_integer() and variable.value is not None
    )


def _highs(model: pyo.ConcreteModel, time_limit_s: float, gap: float) -> Solution:
    _expect_installed("highs")
    from pyomo.contrib.appsi.solvers import Highs

    runner = Highs()
    runner.config.time_limit = time_limit_s
    runner.config.mip_gap = gap
    runner.config.load_solution = False
    runner.config.warmstart = True
    result = runner.solve(model)
    found = result.best_feasible_objective
    if found is not None:
        runner.load_vars()
    return _solution("highs", found, result.best_objective_bound, result.termination_condition.name)


def _solution(solver: str, found: float | None, bound: float | None, why: str) -> Solution:
    return Solution(
        objective=found,
        bound=-float("inf") if bound is None else float(bound),
        optimal=found is not None and why in ("optimal", "convergenceCriteriaSatisfied"),
        message=f"{solver}: {why}",
    )


def _gurobi(model: pyo.ConcreteModel, time_limit_s: float, gap: float) -> Solution:
    _expect_installed("gurobi")
    import gurobipy
    from pyomo.contrib.solver.common.factory import SolverFactory

    runner = SolverFactory("gurobi_persistent")
    try:
        result = runner.solve(
            model,
            time_limit=time_limit_s,
            rel_gap=gap,
            load_solutions=False,
            raise_exception_on_nonoptimal_result=False,
        )
    except gurobipy.GurobiError as error:
        raise SolverError(_gurobi_complaint(model, error)) from None
    if result.incumbent_objective is not None:
        result.solution_loader.load_vars()
    return _solution(
        "gurobi", result.incumbent_objective, result.objective_bound, str(result.termination_condition.name)
    )


def _gurobi_complaint(model: pyo.ConcreteModel, error: Any) -> str:
    if error.errno != GUROBI_TOO_LARGE:
        return f"gurobi: {' '.join(str(error).split())}"
    import pyomo.environ as pyo

    variables = sum(1 for _ in model.component_data_objects(pyo.Var))
    constraints = sum(1 for _ in model.component_data_objects(pyo.Constraint, active=True))
    return (
        f"gurobi without a licence takes {GUROBI_FREE_LIMIT} variables and as many constraints, "
        f"this model has {variables} and {constraints}: install a licence, or use the solver highs"
    )


def missing(solver: str) -> str | None:
    """What to do about a solver that this machine does not have, in one line; None where it is there."""
    there = cbc_binary() is not None if solver == "cbc" else util.find_spec(_PACKAGES[solver]) is not None
    return None if there else f"the solver {solver} {_LACKING[solver]}"


def _expect_installed(solver: str) -> None:
    if reason := missing(solver):
        raise SolverError(reason)


def cbc_binary() -> str | None:
    """Path of a CBC executable: on PATH, or inside the wheels pulp and cbcbox; None where there is none."""
    found = shutil.which("cbc")
    if found:
        return found
    for package, pattern in (("pulp", _pulp_pattern()), ("cbcbox", "**/bin/cbc*")):
        spec = util.find_spec(package)
        for folder in (spec.submodule_search_locations or []) if spec else []:
            for path in sorted(Path(folder).glob(pattern)):
                if path.is_file():
                    return str(path)
    return None


def _pulp_pattern() -> str:
    system = {"linux": "linux", "darwin": "osx", "win32": "win"}.get(sys.platform, sys.platform)
    machine = "arm64" if platform.machine().lower() in ("arm64", "aarch64") else "i64"
    return f"solverdir/cbc/{system}/{machine}/cbc*"


def _cbc(model: pyo.ConcreteModel, time_limit_s: float, gap: float) -> Solution:
    path = cbc_binary()
    if path is None:
        raise SolverError(f"the solver cbc {_LACKING['cbc']}")
    import pyomo.environ as pyo
    from pyomo.common.errors import ApplicationError

    runner = pyo.SolverFactory("cbc", executable=path)
    runner.options["seconds"] = time_limit_s
    runner.options["ratioGap"] = gap
    with _quiet("pyomo.core", "pyomo.opt"):
        try:
            # CBC may exceed its own limit; Pyomo's limit then kills the process
            result = runner.solve(model, load_solutions=False, warmstart=_has_start(model), timelimit=time_limit_s + 5)
        except (ApplicationError, RuntimeError, ValueError, OSError) as error:
            raise SolverError(f"cbc: {' '.join(str(error).split())}") from None
        why = str(result.solver.termination_condition)
        if not len(result.solution):
            return _solution("cbc", None, None, why)
        model.solutions.load_from(result)
    objective = next(model.component_data_objects(pyo.Objective, active=True))
    if any(variable.value is None for variable in model.component_data_objects(pyo.Var)):
        return _solution("cbc", None, None, why)
    bound = float(result.problem.lower_bound) if why == "optimal" else None
    return _solution("cbc", float(pyo.value(objective)), bound, why)


def _has_start(model: pyo.ConcreteModel) -> bool:
    import pyomo.environ as pyo

    return all(variable.value is not None for variable in model.component_data_objects(pyo.Var))


class _quiet:
    """Silences Pyomo, which logs a warning for every time limit that the Solution reports already."""

    def __init__(self, *names: str) -> None:
        self._loggers = [logging.getLogger(name) for name in names]
        self._levels = [logger.level for logger in self._loggers]

    def __enter__(self) -> None:
        for logger in self._loggers:
            logger.setLevel(logging.ERROR)

    def __exit__(self, *_: object) -> None:
        for logger, level in zip(self._loggers, self._levels, strict=True):
            logger.setLevel(level)


_RUNNERS: dict[str, Callable[[pyo.ConcreteModel, float, float], Solution]] = {
    "highs": _highs,
    "cbc": _cbc,
    "gurobi": _gurobi,
}
