"""ODE solver steps: Euler with guidance, Runge-Kutta stages, error norms and step-size control on the device."""

from .control import begin_attempt_, end_attempt_, take_accepted_
from .norms import error_norm_, first_slope_, slope_change
from .op import euler_step, euler_step_, stage_state_
from .reference import ARRIVED, MAX_ATTEMPTS, NONFINITE, RUNNING, UNDERFLOW
from .stepping import Adaptive, EmbeddedPair, attempt_, start_

__all__ = [
    "ARRIVED",
    "MAX_ATTEMPTS",
    "NONFINITE",
    "RUNNING",
    "UNDERFLOW",
    "Adaptive",
    "EmbeddedPair",
    "attempt_",
    "begin_attempt_",
    "end_attempt_",
    "error_norm_",
    "euler_step",
    "euler_step_",
    "first_slope_",
    "slope_change",
    "stage_state_",
    "start_",
    "take_accepted_",
]
